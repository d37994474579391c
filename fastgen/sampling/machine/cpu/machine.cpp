// The step machine: plays the instructions of a step program on a CPU, with all of its threads, in one call.
//
// Memory is float32 and allocated beforehand. A step differs from another one of the same program by the offsets of
// its moving views alone. Threads share the columns of every result (the rows where there are few columns); they wait
// for each other only where an instruction is marked so.

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int DIMS = 5;  // images, three more, columns

struct Side {
    char* base;  // null: there is none
    int64_t slot;  // number of its offset among those of the step, or -1
    int64_t strides[DIMS];
};

struct Instruction {
    int64_t op;  // number of its name in OPS
    int64_t waits;  // for what other threads have written, or still read
    int64_t depth;  // of a product: terms of each sum
    int64_t sizes[DIMS];
    Side out, in[3];  // of a product: rows, packed weights, what is added to
};

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int VECTORS = 2, PANEL = VECTORS * LANES;  // ROWS * VECTORS sums and VECTORS weights fit the registers

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// --- how the work is shared: panels of columns, or rows where there are fewer panels than threads

struct Share {
    int64_t rows_from, rows_to, columns_from, columns_to;
};

Share share_of(const Instruction& one, int thread, int threads) {
    int64_t rows = one.sizes[0] * one.sizes[1] * one.sizes[2] * one.sizes[3], columns = one.sizes[DIMS - 1];
    int64_t panels = (columns + PANEL - 1) / PANEL;
    if (panels < threads) return {rows * thread / threads, rows * (thread + 1) / threads, 0, columns};
    int64_t to = panels * (thread + 1) / threads * PANEL;
    return {0, rows, panels * thread / threads * PANEL, to < columns ? to : columns};
}

int64_t offset_of_row(const Side& side, const int64_t* sizes, int64_t row) {
    int64_t offset = 0;
    for (int d = DIMS - 2; d >= 0; d--) {
        if (sizes[d] > 1) {
            offset += row % sizes[d] * side.strides[d];
            row /= sizes[d];
        }
    }
    return offset;
}

template <class Number>
Number* start_of(const Side& side, const int64_t* offsets) {
    if (!side.base) return nullptr;
    return reinterpret_cast<Number*>(side.base) + (side.slot < 0 ? 0 : offsets[side.slot]);
}

// --- elementwise functions; NaN stays NaN

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

using Apply = void (*)(float*, const float*, const float*, int64_t);

// name, of a[i] and b[i]; the names are those of torch, whose functions these are
#define POINTWISE(F)                                       \
    F(copy_, a[i])                                         \
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
constexpr int64_t COPY_INT64 = sizeof(APPLY) / sizeof(Apply), LINEAR = COPY_INT64 + 1;
const char* const OPS = POINTWISE(NAME) "copy_int64 linear";
constexpr int BLOCK = 256;

const float* gather(const float* from, int64_t stride, int64_t n, float* buffer) {
    if (stride == 1) return from;
    for (int64_t i = 0; i < n; i++) buffer[i] = from[i * stride];
    return buffer;
}

void pointwise(const Instruction& one, const int64_t* offsets, Share share, Apply apply) {
    float* out = start_of<float>(one.out, offsets);
    const float* in[] = {start_of<const float>(one.in[0], offsets), start_of<const float>(one.in[1], offsets)};
    float buffers[3][BLOCK];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        float* to = out + offset_of_row(one.out, one.sizes, row);
        const float* from[2] = {};
        for (int k = 0; k < 2; k++)
            if (in[k]) from[k] = in[k] + offset_of_row(one.in[k], one.sizes, row);
        for (int64_t j = share.columns_from; j < share.columns_to; j += BLOCK) {
            int64_t n = share.columns_to - j < BLOCK ? share.columns_to - j : BLOCK;
            const float* block[2] = {};
            for (int k = 0; k < 2; k++) {
                int64_t stride = one.in[k].strides[DIMS - 1];
                if (in[k]) block[k] = gather(from[k] + j * stride, stride, n, buffers[k]);
            }
            int64_t stride = one.out.strides[DIMS - 1];
            float* place = stride == 1 ? to + j : buffers[2];
            apply(place, block[0], block[1], n);
            if (stride != 1)
                for (int64_t i = 0; i < n; i++) to[(j + i) * stride] = place[i];
        }
    }
}

void copy_int64(const Instruction& one, const int64_t* offsets, Share share) {
    float* out = start_of<float>(one.out, offsets);
    const int64_t* in = start_of<const int64_t>(one.in[0], offsets);
    int64_t out_stride = one.out.strides[DIMS - 1], in_stride = one.in[0].strides[DIMS - 1];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        float* to = out + offset_of_row(one.out, one.sizes, row);
        const int64_t* from = in + offset_of_row(one.in[0], one.sizes, row);
        for (int64_t j = share.columns_from; j < share.columns_to; j++)
            to[j * out_stride] = static_cast<float>(from[j * in_stride]);
    }
}

// --- products: rows (R, depth) times weights (depth, columns), packed as panels (depth, PANEL) one after the other

struct Rows {
    const float *in[ROWS], *added[ROWS];
    float* out[ROWS];
};

template <int R>
void tile(const Rows& rows, const float* weights, int64_t depth) {
    Vector sums[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = rows.added[r] ? *reinterpret_cast<const Vector*>(rows.added[r] + v * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++, weights += PANEL) {
        Vector weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = *reinterpret_cast<const Vector*>(weights + v * LANES);
        for (int r = 0; r < R; r++) {
            Vector x = rows.in[r][k] - Vector{};
            for (int v = 0; v < VECTORS; v++) sums[r][v] += x * weight[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) *reinterpret_cast<Vector*>(rows.out[r] + v * LANES) = sums[r][v];
}

void (*const TILES[])(const Rows&, const float*, int64_t) = {
    nullptr, tile<1>, tile<2>, tile<3>, tile<4>,
#if defined(__AVX512F__)
    tile<5>, tile<6>, tile<7>, tile<8>,
#endif
};

void linear(const Instruction& one, const int64_t* offsets, Share share) {
    const float* in = start_of<const float>(one.in[0], offsets);
    const float* packed = start_of<const float>(one.in[1], offsets);
    const float* added = start_of<const float>(one.in[2], offsets);
    float* out = start_of<float>(one.out, offsets);
    float edge[2][ROWS][PANEL];  // the last panel where it is not full
    for (int64_t column = share.columns_from; column < share.columns_to; column += PANEL) {
        const float* weights = packed + column * one.depth;
        int64_t width = share.columns_to - column;
        for (int64_t row = share.rows_from; row < share.rows_to; row += ROWS) {
            int count = share.rows_to - row < ROWS ? static_cast<int>(share.rows_to - row) : ROWS;
            Rows rows;
            float* places[ROWS];
            for (int r = 0; r < count; r++) {
                rows.in[r] = in + offset_of_row(one.in[0], one.sizes, row + r);
                rows.added[r] = added ? added + offset_of_row(one.in[2], one.sizes, row + r) + column : nullptr;
                rows.out[r] = places[r] = out + offset_of_row(one.out, one.sizes, row + r) + column;
                if (width < PANEL) {
                    if (added) std::memcpy(edge[0][r], rows.added[r], width * sizeof(float));
                    rows.added[r] = added ? edge[0][r] : nullptr;
                    rows.out[r] = edge[1][r];
                }
            }
            TILES[count](rows, weights, one.depth);
            if (width < PANEL)
                for (int r = 0; r < count; r++) std::memcpy(places[r], edge[1][r], width * sizeof(float));
        }
    }
}

}  // namespace

extern "C" {

const char* fastgen_ops() { return OPS; }

int64_t fastgen_panel() { return PANEL; }

void fastgen_run(const Instruction* instructions, int64_t count, const int64_t* offsets, int64_t most_threads) {
#ifdef _OPENMP
#pragma omp parallel num_threads(most_threads)
#endif
    {
        int thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
        for (int64_t k = 0; k < count; k++) {
            const Instruction& one = instructions[k];
#ifdef _OPENMP
            if (one.waits) {
#pragma omp barrier
            }
#endif
            Share share = share_of(one, thread, threads);
            if (one.op == LINEAR)
                linear(one, offsets, share);
            else if (one.op == COPY_INT64)
                copy_int64(one, offsets, share);
            else
                pointwise(one, offsets, share, APPLY[one.op]);
        }
    }
}
}
