#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// Elementwise functions; NaN stays NaN.

// exp(x) = scale * scale2 * (1 + rest): |x - k ln 2| <= ln 2 / 2, where the Taylor series needs seven terms. Of two
// scales neither overflows.
struct Exponential {
    float scale, scale2, rest;
};

inline float power_of_two(int k) {
    int bits = (k + 127) << 23;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline Exponential exponential(float x) {
    float low = x < -104.f ? -104.f : x, inside = low > 89.f ? 89.f : low;
    float k = (inside * 1.44269504f + 12582912.f) - 12582912.f;  // rounded to an integer
    float r = (inside - k * 0.693359375f) + k * 2.12194440e-4f;
    float series = 1.f / 720 + r * (1.f / 5040);
    series = 1.f / 120 + r * series;
    series = 1.f / 24 + r * series;
    series = 1.f / 6 + r * series;
    series = 0.5f + r * series;
    int whole = static_cast<int>(k == k ? k : 0.f), half = whole / 2;
    return {power_of_two(half), power_of_two(whole - half), r + r * r * series};
}

inline float exp_(float x) {
    Exponential e = exponential(x);
    return (1.f + e.rest) * e.scale * e.scale2;
}

inline float expm1_(float x) {
    Exponential e = exponential(x);
    float scale = e.scale * e.scale2, near = scale * e.rest + (scale - 1.f), far = (1.f + e.rest) * e.scale * e.scale2;
    return x > 40.f ? far : near;
}

inline float sigmoid_(float x) { return 1.f / (1.f + exp_(-x)); }

inline float tanh_(float x) {
    float e = expm1_(2.f * std::fabs(x)), found = e < 1e10f ? e / (e + 2.f) : 1.f;
    return x != x ? x : std::copysign(found, x);
}

inline float gelu_(float x) { return 0.5f * x * (1.f + std::erf(x * 0.70710678f)); }

inline float softplus_(float x) { return (x > 0.f ? x : 0.f) + std::log1p(exp_(-std::fabs(x))); }

inline float gelu_tanh_(float x) { return 0.5f * x * (1.f + tanh_(0.79788456f * (x + 0.044715f * x * x * x))); }

using Apply = void (*)(float*, const float*, const float*, int64_t);

// name, of a[i] and b[i]; the names are those of torch, whose functions these are
#define POINTWISE(F)                                       \
    F(copy, a[i])                                          \
    F(add, a[i] + b[i])                                    \
    F(sub, a[i] - b[i])                                    \
    F(mul, a[i] * b[i])                                    \
    F(div, a[i] / b[i])                                    \
    F(neg, -a[i])                                          \
    F(relu, a[i] < 0.f ? 0.f : a[i])                       \
    F(tanh, tanh_(a[i]))                                   \
    F(sigmoid, sigmoid_(a[i]))                             \
    F(exp, exp_(a[i]))                                     \
    F(expm1, expm1_(a[i]))                                 \
    F(log, std::log(a[i]))                                 \
    F(maximum, a[i] > b[i] || a[i] != a[i] ? a[i] : b[i])  \
    F(minimum, a[i] < b[i] || a[i] != a[i] ? a[i] : b[i])  \
    F(rsqrt, 1.f / std::sqrt(a[i]))                        \
    F(gate, tanh_(a[i]) * sigmoid_(b[i]))                  \
    F(glu, a[i] * sigmoid_(b[i]))                          \
    F(hide, b[i] != 0.f ? -INFINITY : a[i])                \
    F(erase, b[i] != 0.f ? 0.f : a[i])                     \
    F(keep, b[i] != 0.f ? a[i] : 0.f)                      \
    F(softplus, softplus_(a[i]))                           \
    F(log1p, std::log1p(a[i]))                             \
    F(erf, std::erf(a[i]))                                 \
    F(eq, a[i] == b[i] ? 1.f : 0.f)                        \
    F(lt, a[i] < b[i] ? 1.f : 0.f)                         \
    F(le, a[i] <= b[i] ? 1.f : 0.f)                        \
    F(gelu, gelu_(a[i]))                                   \
    F(gelu_tanh, gelu_tanh_(a[i]))                         \
    F(silu, a[i] * sigmoid_(a[i]))                         \
    F(elu, a[i] > 0.f ? a[i] : b[i] * expm1_(a[i]))        \
    F(leaky_relu, a[i] > 0.f ? a[i] : b[i] * a[i])         \
    F(square, a[i] * a[i])                                 \
    F(abs, std::fabs(a[i]))                                \
    F(sqrt, std::sqrt(a[i]))                               \
    F(reciprocal, 1.f / a[i])

#define DEFINE(name, expression)                                                                 \
    void apply_##name(float* out, const float* a, [[maybe_unused]] const float* b, int64_t n) { \
        _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) out[i] = expression;                \
    }
#define NAME(name, expression) #name " "
#define ENTRY(name, expression) apply_##name,

POINTWISE(DEFINE)
constexpr Apply APPLY[] = {POINTWISE(ENTRY)};

}  // namespace
