// How threads share the images, columns or rows of an instruction, and where its rows lie.
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

int64_t images_of(int64_t images, int thread, int threads) { return images * thread / threads; }

// Threads that have images of their own never wait: an image reads and writes nothing of another one's.
bool by_images(int64_t images, int threads) { return images >= threads; }

Share share_of(const Instruction& one, int thread, int threads, bool whole_rows) {
    int64_t images = one.sizes[0], of_image = one.sizes[1] * one.sizes[2] * one.sizes[3];
    int64_t rows = images * of_image, columns = one.sizes[DIMS - 1];
    if (by_images(images, threads)) {
        int64_t from = images_of(images, thread, threads), to = images_of(images, thread + 1, threads);
        return {from * of_image, to * of_image, 0, columns};
    }
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
