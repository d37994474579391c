// The step machine: plays the programs of a plan on a CPU, with all of its threads: draws, steps, whole images in a call.
//
// Memory is float32 and allocated beforehand. A step differs from another one of the same program by the offsets of
// its moving views alone. Threads share the columns of every result (the rows where there are few columns); they wait
// for each other only where an instruction is marked so. What every op means stands in `machine/definitions.py`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "draws.h"
#include "elementwise.h"
#include "machine.h"

namespace {

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

enum : int64_t {
    POINTWISE_OPS = sizeof(APPLY) / sizeof(Apply),
    COPY_INT64 = POINTWISE_OPS,  // to float
    MOVE_INT64,
    PRODUCT,
    CONTRACT,  // this and what follows does whole rows at once
    LOOKUP,
    SOFTMAX,
    LOG_SOFTMAX,
    NORMALIZED,
    SUM,
    MEAN,
    AMAX
};
const char* const OPS = POINTWISE(NAME) "copy_int64 move_int64 product contract lookup softmax log_softmax normalized sum mean amax";
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

template <class Number>
void copy_int64(const Instruction& one, const int64_t* offsets, Share share) {
    Number* out = start_of<Number>(one.out, offsets);
    const int64_t* in = start_of<const int64_t>(one.in[0], offsets);
    int64_t out_stride = one.out.strides[DIMS - 1], in_stride = one.in[0].strides[DIMS - 1];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        Number* to = out + offset_of_row(one.out, one.sizes, row);
        const int64_t* from = in + offset_of_row(one.in[0], one.sizes, row);
        for (int64_t j = share.columns_from; j < share.columns_to; j++)
            to[j * out_stride] = static_cast<Number>(from[j * in_stride]);
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

// --- products of two computed factors: each row has a weight of its own

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

// --- along the last dimension

float greatest(const float* a, int64_t stride, int64_t n) {
    float found = -INFINITY;
    for (int64_t i = 0; i < n; i++) found = a[i * stride] > found || a[i * stride] != a[i * stride] ? a[i * stride] : found;
    return found;
}

void rowwise(const Instruction& one, const int64_t* offsets, Share share, int64_t kind) {
    const float* in = start_of<const float>(one.in[0], offsets);
    float* out = start_of<float>(one.out, offsets);
    int64_t n = one.depth, from = one.depth_strides[0], to = one.out.strides[DIMS - 1];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        const float* a = in + offset_of_row(one.in[0], one.sizes, row);
        float* b = out + offset_of_row(one.out, one.sizes, row);
        if (kind == AMAX) {
            *b = greatest(a, from, n);
            continue;
        }
        double sum = 0;
        if (kind == SOFTMAX || kind == LOG_SOFTMAX) {
            float most = greatest(a, from, n);
            for (int64_t i = 0; i < n; i++) {
                float e = exp_(a[i * from] - most);
                sum += e;
                b[i * to] = kind == SOFTMAX ? e : a[i * from] - most;
            }
            float scale = static_cast<float>(1 / sum), shift = static_cast<float>(std::log(sum));
            for (int64_t i = 0; i < n; i++) b[i * to] = kind == SOFTMAX ? b[i * to] * scale : b[i * to] - shift;
            continue;
        }
        for (int64_t i = 0; i < n; i++) sum += a[i * from];
        if (kind == SUM || kind == MEAN) {
            *b = static_cast<float>(kind == SUM ? sum : sum / n);
            continue;
        }
        double mean = sum / n, squares = 0;
        for (int64_t i = 0; i < n; i++) squares += (a[i * from] - mean) * (a[i * from] - mean);
        double scale = 1 / std::sqrt(squares / n + one.number);
        for (int64_t i = 0; i < n; i++) b[i * to] = static_cast<float>((a[i * from] - mean) * scale);
    }
}

void lookup(const Instruction& one, const int64_t* offsets, Share share) {
    const float* table = start_of<const float>(one.in[0], offsets);
    const int64_t* index = start_of<const int64_t>(one.in[1], offsets);
    float* out = start_of<float>(one.out, offsets);
    int64_t n = one.sizes[DIMS - 1], to = one.out.strides[DIMS - 1];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        const float* from = table + offset_of_row(one.in[0], one.sizes, row) + index[offset_of_row(one.in[1], one.sizes, row)] * one.depth_strides[0];
        float* place = out + offset_of_row(one.out, one.sizes, row);
        for (int64_t i = 0; i < n; i++) place[i * to] = from[i * one.depth_strides[1]];
    }
}

void execute(const Instruction& one, const int64_t* offsets, int thread, int threads) {
    Share share = share_of(one, thread, threads, one.op >= CONTRACT);
    if (one.op < POINTWISE_OPS)
        pointwise(one, offsets, share, APPLY[one.op]);
    else if (one.op == PRODUCT)
        linear(one, offsets, share);
    else if (one.op == COPY_INT64)
        copy_int64<float>(one, offsets, share);
    else if (one.op == MOVE_INT64)
        copy_int64<int64_t>(one, offsets, share);
    else if (one.op == CONTRACT)
        contract(one, offsets, share);
    else if (one.op == LOOKUP)
        lookup(one, offsets, share);
    else
        rowwise(one, offsets, share, one.op);
}

// --- threads

// Threads that wait for each other often, and seldom for long: they look before they give up their processor.
struct Barrier {
    std::atomic<int> arrived{0}, round{0};

    void wait(int threads) {
        int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; round.load(std::memory_order_acquire) == now; looks++)
            if (looks > 2000) sched_yield();
    }
};

void run_program(const Program& program, const int64_t* offsets, int thread, int threads, Barrier& barrier) {
    for (int64_t k = 0; k < program.count; k++) {
        const Instruction& one = program.code[k];
        if (threads > 1 && k > 0 && one.waits) barrier.wait(threads);
        execute(one, offsets, thread, threads);
    }
}

int64_t images_of(int64_t images, int thread, int threads) { return images * thread / threads; }

void move_rows(const Move& move, int64_t images, int thread, int threads) {
    for (int64_t b = images_of(images, thread, threads); b < images_of(images, thread + 1, threads); b++)
        std::memmove(move.target + b * move.image, move.source + b * move.image, move.bytes);
}

}  // namespace

extern "C" {

const char* fastgen_ops() { return OPS; }

int64_t fastgen_panel() { return PANEL; }

void fastgen_run(const Program* program, const int64_t* offsets, int64_t threads) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0, all = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        run_program(*program, offsets, thread, all, barrier);
    }
}

// Draws places from `first` to before `last`, each followed by its step, with so many threads, which are as many as each
// of these programs asks for.
void play_alike(const Play* play, int64_t first, int64_t last, int64_t threads) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0, all = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        for (int64_t place = first; place < last; place++) {
            if (all > 1) barrier.wait(all);
            draw_place(*play->draws, place, images_of(play->images, thread, all),
                       images_of(play->images, thread + 1, all));
            const Step& step = play->steps[place + 1];
            for (int64_t k = step.moves; k < step.moves_end; k++) move_rows(play->moves[k], play->images, thread, all);
            if (all > 1) barrier.wait(all);
            run_program(play->programs[step.program], step.offsets, thread, all, barrier);
        }
    }
}

// Draws places from `first` to before `last`, each followed by its step. Stops at a step whose program is not all of
// the machine's, with its level drawn, and returns the number of that place; else `last`.
int64_t fastgen_play(const Play* play, int64_t first, int64_t last) {
    auto program_of = [&](int64_t place) -> const Program& { return play->programs[play->steps[place + 1].program]; };
    for (int64_t place = first; place < last;) {
        if (!program_of(place).code) {
            draw_place(*play->draws, place, 0, play->images);
            return place;
        }
        int64_t end = place + 1, threads = program_of(place).threads;
        while (end < last && program_of(end).code && program_of(end).threads == threads) end++;
        play_alike(play, place, end, threads);
        place = end;
    }
    return last;
}
}
