// Products: of rows (R, depth) and weights (depth, columns) packed as panels (depth, PANEL), and of computed factors.
#pragma once

#include <algorithm>
#include <cstring>

#include "rows.h"

namespace {

struct Rows {
    const float *in[ROWS], *added[ROWS];
    float* out[ROWS];
};

// Compilers would load a weight again for every row, and loads are what a small tile waits for.
#if defined(__AVX__)
#define KEEP(vector) asm("" : "+v"(vector))
#else
#define KEEP(vector) (void)(vector)
#endif

// R rows times P panels. Every sum is taken in one order, whatever R and P are: threads must not change it.
template <int R, int P>
void tile(const Rows& rows, const float* weights, int64_t depth) {
    constexpr int WIDE = P * VECTORS;
    Vector sums[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < WIDE; v++)
            sums[r][v] = rows.added[r] ? *reinterpret_cast<const Vector*>(rows.added[r] + v * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++, weights += PANEL) {
        Vector weight[WIDE];
        for (int v = 0; v < WIDE; v++) {
            weight[v] = *reinterpret_cast<const Vector*>(weights + v / VECTORS * PANEL * depth + v % VECTORS * LANES);
            if (R > 1) KEEP(weight[v]);
        }
        for (int r = 0; r < R; r++) {
            Vector x = rows.in[r][k] - Vector{};
            for (int v = 0; v < WIDE; v++) sums[r][v] += x * weight[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < WIDE; v++) *reinterpret_cast<Vector*>(rows.out[r] + v * LANES) = sums[r][v];
}

typedef void (*Tile)(const Rows&, const float*, int64_t);
constexpr Tile TILES[] = {
    nullptr, tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>,
#if defined(__AVX512F__)
    tile<7, 1>, tile<8, 1>,
#endif
};
// A sum waits for the one before it: few rows take several panels at once, so that there are sums enough meanwhile.
constexpr Tile WIDE_TILES[] = {nullptr, tile<1, 4>, tile<2, 2>};
constexpr int WIDE_PANELS[] = {1, 4, 2};

void linear(const Instruction& one, const int64_t* offsets, Share share) {
    const float* in = start_of<const float>(one.in[0], offsets);
    const float* packed = start_of<const float>(one.in[1], offsets);
    const float* added = start_of<const float>(one.in[2], offsets);
    float* out = start_of<float>(one.out, offsets);
    float edge[2][ROWS][PANEL];  // the last panel where it is not full
    int64_t height = share.rows_to - share.rows_from, tiles = (height + ROWS - 1) / ROWS;
    int64_t wide = height <= 2 ? WIDE_PANELS[height] * PANEL : PANEL, step;
    for (int64_t column = share.columns_from; column < share.columns_to; column += step) {
        const float* weights = packed + column * one.depth;
        int64_t width = share.columns_to - column;
        step = width < wide ? PANEL : wide;
        for (int64_t number = 0; number < tiles; number++) {
            int64_t row = share.rows_from + height * number / tiles;
            int count = static_cast<int>(share.rows_from + height * (number + 1) / tiles - row);
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
            (step > PANEL ? WIDE_TILES : TILES)[count](rows, weights, one.depth);
            if (width < PANEL)
                for (int r = 0; r < count; r++) std::memcpy(places[r], edge[1][r], width * sizeof(float));
        }
    }
}

// Rounded once wherever the processor can, whatever the compiler makes of it: threads must not change a sum.
inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return c + a * b;
#endif
}

// Sums of products that lie side by side: found[j] = from[j] + sum_k x[k][j] * w[k][j].
template <int N>
void side_by_side(float* found, const float* x, int64_t of_x, const float* w, int64_t of_w, int64_t depth,
                  const float* from) {
    float sums[N];
    for (int j = 0; j < N; j++) sums[j] = from ? from[j] : 0.f;
    for (int64_t k = 0; k < depth; k++, x += of_x, w += of_w)
        for (int j = 0; j < N; j++) sums[j] = multiply_add(x[j], w[j], sums[j]);
    for (int j = 0; j < N; j++) found[j] = sums[j];
}

// Of two computed factors: each row has a weight of its own.
void contract(const Instruction& one, const int64_t* offsets, Share share) {
    const float* in = start_of<const float>(one.in[0], offsets);
    const float* weights = start_of<const float>(one.in[1], offsets);
    const float* added = start_of<const float>(one.in[2], offsets);
    float* out = start_of<float>(one.out, offsets);
    int64_t columns = one.sizes[DIMS - 1], depth = one.depth;
    int64_t of_rows = one.depth_strides[0], of_weights = one.depth_strides[1];
    int64_t across = one.in[1].strides[DIMS - 1], to = one.out.strides[DIMS - 1];
    auto next_to = [&](const Side& side) { return !side.base || side.strides[DIMS - 2] == 1; };
    bool together = columns == 1 && next_to(one.out) && next_to(one.in[0]) && next_to(one.in[1]) && next_to(one.in[2]);
    constexpr int MANY = 4 * LANES;
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        const float* x = in + offset_of_row(one.in[0], one.sizes, row);
        const float* w = weights + offset_of_row(one.in[1], one.sizes, row);
        const float* from = added ? added + offset_of_row(one.in[2], one.sizes, row) : nullptr;
        float* place = out + offset_of_row(one.out, one.sizes, row);
        int64_t step = one.in[2].strides[DIMS - 1];
        if (together) {  // groups of a depthwise convolution
            int64_t left = std::min(one.sizes[DIMS - 2] - row % one.sizes[DIMS - 2], share.rows_to - row);
            int64_t many = left >= MANY ? MANY : left >= LANES ? LANES : 1;
            auto sums = many == MANY ? side_by_side<MANY> : many == LANES ? side_by_side<LANES> : side_by_side<1>;
            sums(place, x, of_rows, w, of_weights, depth, from);
            row += many - 1;
            continue;
        }
        if (across == 1 && to == 1) {  // the weight's rows one after the other
            for (int64_t j = 0; j < columns; j++) place[j] = from ? from[j * step] : 0.f;
            for (int64_t k = 0; k < depth; k++) {
                float scale = x[k * of_rows];
                const float* along = w + k * of_weights;
                for (int64_t j = 0; j < columns; j++) place[j] += scale * along[j];
            }
            continue;
        }
        for (int64_t j = 0; j < columns; j++) {
            float sums[LANES] = {};
            const float* along = w + j * across;
            int64_t k = 0;
            if (of_rows == 1 && of_weights == 1)
                for (; k + LANES <= depth; k += LANES)
                    for (int lane = 0; lane < LANES; lane++) sums[lane] += x[k + lane] * along[k + lane];
            float sum = from ? from[j * step] : 0.f;
            for (; k < depth; k++) sum += x[k * of_rows] * along[k * of_weights];
            for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
            place[j * to] = sum;
        }
    }
}

}  // namespace
