// Products: of rows (R, depth) and weights (depth, columns) packed as panels (depth, PANEL), and of computed factors.
#pragma once

#include <cstring>

#include "rows.h"

namespace {

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
    nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>,
#if defined(__AVX512F__)
    tile<7>, tile<8>,
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

// Of two computed factors: each row has a weight of its own.
void contract(const Instruction& one, const int64_t* offsets, Share share) {
    const float* in = start_of<const float>(one.in[0], offsets);
    const float* weights = start_of<const float>(one.in[1], offsets);
    const float* added = start_of<const float>(one.in[2], offsets);
    float* out = start_of<float>(one.out, offsets);
    int64_t columns = one.sizes[DIMS - 1], depth = one.depth;
    int64_t of_rows = one.depth_strides[0], of_weights = one.depth_strides[1];
    int64_t across = one.in[1].strides[DIMS - 1], to = one.out.strides[DIMS - 1];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        const float* x = in + offset_of_row(one.in[0], one.sizes, row);
        const float* w = weights + offset_of_row(one.in[1], one.sizes, row);
        const float* from = added ? added + offset_of_row(one.in[2], one.sizes, row) : nullptr;
        float* place = out + offset_of_row(one.out, one.sizes, row);
        int64_t step = one.in[2].strides[DIMS - 1];
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
