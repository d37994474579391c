// Draws of a place by inverse CDF, in float64, as `fastgen.distributions` defines them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "machine.h"

namespace {

enum : int64_t { CATEGORICAL, BERNOULLI, LOGISTIC_MIXTURE };
constexpr double MIN_LOG_SCALE = -7;

template <class Number>
Number* at(const Placed& one, int64_t place, int64_t image, int64_t channel) {
    return reinterpret_cast<Number*>(one.base) + one.at[place] + image * one.image + channel * one.channel;
}

inline double power_of_two64(int64_t k) {
    int64_t bits = (k + 1023) << 52;
    double out;
    std::memcpy(&out, &bits, 8);
    return out;
}

// x = k ln 2 + r with |r| <= ln 2 / 2, where 13 terms of the series of exp are exact to the last bit or two. 0 comes of
// x <= -746 alone: a level of the least probability is drawn where the noise is 0. Of two scales neither underflows.
inline double exp64(double x) {
    double k = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0;  // rounded to an integer
    double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    double sum = 1.0 / 6227020800;
    constexpr double terms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1,
                                1};
    for (double term : terms) sum = term + r * sum;
    int64_t whole = static_cast<int64_t>(k), half = whole / 2;
    return sum * power_of_two64(half) * power_of_two64(whole - half);
}

// Probabilities of logits[0..n), step apart, in `found`; whether one of them is NaN.
bool softmax64(const float* logits, int64_t step, int64_t n, double temperature, double* found) {
    bool nan = false;
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < n; k++) {
        found[k] = logits[k * step];
        nan |= found[k] != found[k];
        most = std::max(most, found[k]);
    }
    if (nan || std::isinf(most)) {
        std::fill(found, found + n, std::nan(""));
        return nan;
    }
    for (int64_t k = 0; k < n; k++) {
        double x = (found[k] - most) / temperature;
        found[k] = exp64(x < -746 ? -746 : x);
    }
    double sum = 0;
    for (int64_t k = 0; k < n; k++) sum += found[k];
    for (int64_t k = 0; k < n; k++) found[k] /= sum;
    return false;
}

int64_t greatest_of(const float* logits, int64_t step, int64_t n, bool& nan) {
    int64_t best = 0;
    for (int64_t k = 0; k < n; k++) {
        nan |= logits[k * step] != logits[k * step];
        if (logits[k * step] > logits[best * step]) best = k;
    }
    return best;
}

// The smallest index whose cumulative probability exceeds u times their sum.
int64_t first_exceeding(const double* probabilities, int64_t n, double u) {
    double total = 0, sum = 0;
    for (int64_t k = 0; k < n; k++) total += probabilities[k];
    double threshold = u * total;
    for (int64_t k = 0; k < n; k++) {
        sum += probabilities[k];
        if (sum > threshold) return k;
    }
    return n - 1;
}

// Keeps the most probable levels alone: top_k of them, and of these the fewest that together have top_p of their sum.
void keep_top(double* probabilities, int64_t n, int64_t top_k, double top_p, std::vector<int64_t>& order) {
    order.resize(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return probabilities[a] > probabilities[b]; });
    int64_t kept = top_k > 0 ? std::min(top_k, n) : n;
    if (top_p > 0) {
        double total = 0, sum = 0;
        for (int64_t k = 0; k < kept; k++) total += probabilities[order[k]];
        int64_t k = 0;
        for (; k < kept; k++) {
            double one = probabilities[order[k]];
            sum += one;
            if (!(sum - one < top_p * total)) break;
        }
        kept = k;
    }
    for (int64_t k = kept; k < n; k++) probabilities[order[k]] = 0;
}

int64_t draw_categorical(const Draws& draws, const float* logits, double u, bool& nan) {
    static thread_local std::vector<double> probabilities;
    static thread_local std::vector<int64_t> order;
    if (draws.temperature == 0) return greatest_of(logits, draws.params.level, draws.levels, nan);
    probabilities.resize(draws.levels);
    nan |= softmax64(logits, draws.params.level, draws.levels, draws.temperature, probabilities.data());
    if (draws.top_k > 0 || draws.top_p > 0)
        keep_top(probabilities.data(), draws.levels, draws.top_k, draws.top_p, order);
    return first_exceeding(probabilities.data(), draws.levels, u);
}

int64_t draw_bernoulli(const Draws& draws, float logit, double u, bool& nan) {
    nan |= logit != logit;
    if (draws.temperature == 0) return logit > 0;
    return u >= 1 / (1 + std::exp(logit / draws.temperature));
}

// Parameters of a pixel: M logits, then means, log-scales (and, for colours, coefficients) of each channel.
int64_t draw_mixture(const Draws& draws, const float* params, const float* noise, int64_t channel,
                     const int64_t* drawn, bool& nan) {
    static thread_local std::vector<double> probabilities;
    int64_t m = draws.levels, step = draws.params.level, kinds = draws.parameters == 10 * m ? 3 : 2, component;
    for (int64_t k = 0; k < draws.parameters; k++) nan |= params[k * step] != params[k * step];
    if (draws.temperature == 0) {
        component = greatest_of(params, step, m, nan);
    } else {
        probabilities.resize(m);
        nan |= softmax64(params, step, m, draws.temperature, probabilities.data());
        component = first_exceeding(probabilities.data(), m, noise[0]);
    }
    auto of = [&](int64_t colour, int64_t kind) {
        return static_cast<double>(params[(m + (colour * kinds + kind) * m + component) * step]);
    };
    double x = of(channel, 0);
    if (kinds == 3 && channel > 0) {
        auto level = [&](int64_t c) { return drawn[c * draws.drawn.channel] / 127.5 - 1; };
        if (channel == 1) x += std::tanh(of(0, 2)) * level(0);
        if (channel == 2) x = x + std::tanh(of(1, 2)) * level(0) + std::tanh(of(2, 2)) * level(1);
    }
    if (draws.temperature > 0) {
        double u = noise[(channel + 1) * draws.noise.channel];
        double scale = std::exp(std::max(of(channel, 1), MIN_LOG_SCALE)) * draws.temperature;
        x += scale * (std::log(u) - std::log1p(-u));
    }
    x = std::nearbyint((std::min(std::max(x, -1.0), 1.0) + 1) * 127.5);
    return x == x ? static_cast<int64_t>(x) : 0;
}

void draw_place(const Draws& draws, int64_t place, int64_t from, int64_t to) {
    int64_t first = draws.first_channel[place];
    for (int64_t b = from; b < to; b++) {
        for (int64_t channel = first; channel < first + draws.channels; channel++) {
            int64_t* drawn = at<int64_t>(draws.drawn, place, b, 0);
            if (draws.known.base && *at<uint8_t>(draws.mask, place, b, channel)) {
                drawn[channel * draws.drawn.channel] = *at<int64_t>(draws.known, place, b, channel);
                continue;
            }
            bool nan = false;
            int64_t level;
            if (draws.kind == CATEGORICAL) {
                const float* logits = at<float>(draws.params, place, b, channel);
                level = draw_categorical(draws, logits, *at<float>(draws.noise, place, b, channel), nan);
            } else if (draws.kind == BERNOULLI) {
                float logit = *at<float>(draws.params, place, b, channel);
                level = draw_bernoulli(draws, logit, *at<float>(draws.noise, place, b, channel), nan);
            } else {
                const float *params = at<float>(draws.params, place, b, 0), *noise = at<float>(draws.noise, place, b, 0);
                level = draw_mixture(draws, params, noise, channel, drawn, nan);
            }
            drawn[channel * draws.drawn.channel] = level;
            if (nan) __atomic_store_n(draws.bad, int64_t{1}, __ATOMIC_RELAXED);
        }
    }
}

}  // namespace
