// How threads share the columns and rows of an instruction, and where its rows lie.
#pragma once

#include "machine.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int VECTORS = 2, PANEL = VECTORS * LANES;  // ROWS * VECTORS sums, VECTORS weights, a factor fit the registers

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct Share {
    int64_t rows_from, rows_to, columns_from, columns_to;
};

Share share_of(const Instruction& one, int thread, int threads, bool whole_rows) {
    int64_t rows = one.sizes[0] * one.sizes[1] * one.sizes[2] * one.sizes[3], columns = one.sizes[DIMS - 1];
    int64_t panels = (columns + PANEL - 1) / PANEL;
    if (panels < threads || whole_rows) return {rows * thread / threads, rows * (thread + 1) / threads, 0, columns};
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

}  // namespace
