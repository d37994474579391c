// The step machine: plays the programs of a plan on a CPU, with all of its threads: draws, steps, whole images in a call.
//
// Memory is float32 and allocated beforehand. A step differs from another one of the same program by the offsets of
// its moving views alone. Threads share the images of a batch; where these are fewer than threads, they share the columns
// of every result (the rows where there are few columns), and wait for each other where an instruction is marked so.
// What every op means stands in `machine/definitions.py`.

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
#include "products.h"

namespace {

enum : int64_t {
    POINTWISE_OPS = sizeof(APPLY) / sizeof(Apply),
    COPY_INT64 = POINTWISE_OPS,  // to float
    TO_INT64,
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
const char* const OPS = POINTWISE(NAME) "copy_int64 to_int64 move_int64 product contract lookup softmax log_softmax normalized sum mean amax";
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

template <class To, class From>
void converted(const Instruction& one, const int64_t* offsets, Share share) {
    To* out = start_of<To>(one.out, offsets);
    const From* in = start_of<const From>(one.in[0], offsets);
    int64_t out_stride = one.out.strides[DIMS - 1], in_stride = one.in[0].strides[DIMS - 1];
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        To* to = out + offset_of_row(one.out, one.sizes, row);
        const From* from = in + offset_of_row(one.in[0], one.sizes, row);
        for (int64_t j = share.columns_from; j < share.columns_to; j++)
            to[j * out_stride] = static_cast<To>(from[j * in_stride]);
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

std::atomic<bool> missed{false};  // a lookup has met a row that its table does not have

void lookup(const Instruction& one, const int64_t* offsets, Share share) {
    const float* table = start_of<const float>(one.in[0], offsets);
    const int64_t* index = start_of<const int64_t>(one.in[1], offsets);
    float* out = start_of<float>(one.out, offsets);
    int64_t n = one.sizes[DIMS - 1], to = one.out.strides[DIMS - 1], count = static_cast<int64_t>(one.number);
    for (int64_t row = share.rows_from; row < share.rows_to; row++) {
        int64_t number = index[offset_of_row(one.in[1], one.sizes, row)];
        if (number < 0) number += count;
        if (number < 0 || number >= count) {
            missed = true;
            number = 0;
        }
        const float* from = table + offset_of_row(one.in[0], one.sizes, row) + number * one.depth_strides[0];
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
        converted<float, int64_t>(one, offsets, share);
    else if (one.op == TO_INT64)
        converted<int64_t, float>(one, offsets, share);
    else if (one.op == MOVE_INT64)
        converted<int64_t, int64_t>(one, offsets, share);
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
        if (k > 0 && one.waits && !by_images(one.sizes[0], threads)) barrier.wait(threads);
        execute(one, offsets, thread, threads);
    }
}

void move_rows(const Move& move, int64_t images, int thread, int threads) {
    for (int64_t b = images_of(images, thread, threads); b < images_of(images, thread + 1, threads); b++)
        std::memmove(move.target + b * move.image, move.source + b * move.image, move.bytes);
}

}  // namespace

extern "C" {

const char* fastgen_ops() { return OPS; }

int64_t fastgen_panel() { return PANEL; }

// Plays a program once. Returns whether a lookup has missed.
int64_t fastgen_run(const Program* program, const int64_t* offsets, int64_t threads) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0, all = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        run_program(*program, offsets, thread, all, barrier);
    }
    return missed.exchange(false);
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
        bool alone = by_images(play->images, all);
        for (int64_t place = first; place < last; place++) {
            if (!alone) barrier.wait(all);
            draw_place(*play->draws, place, images_of(play->images, thread, all),
                       images_of(play->images, thread + 1, all));
            const Step& step = play->steps[place + 1];
            for (int64_t k = step.moves; k < step.moves_end; k++) move_rows(play->moves[k], play->images, thread, all);
            if (!alone) barrier.wait(all);
            run_program(play->programs[step.program], step.offsets, thread, all, barrier);
        }
    }
}

// Draws places from `first` to before `last`, each followed by its step. Stops at a step whose program is not all of
// the machine's, with its level drawn, and returns the number of that place; else `last`; -1 where a lookup has missed.
int64_t fastgen_play(const Play* play, int64_t first, int64_t last) {
    auto program_of = [&](int64_t place) -> const Program& { return play->programs[play->steps[place + 1].program]; };
    auto threads_of = [&](int64_t place) { return std::min(program_of(place).threads, play->threads); };
    for (int64_t place = first; place < last;) {
        if (!program_of(place).code) {
            draw_place(*play->draws, place, 0, play->images);
            return missed.exchange(false) ? -1 : place;
        }
        int64_t end = place + 1, threads = threads_of(place);
        while (end < last && program_of(end).code && threads_of(end) == threads) end++;
        play_alike(play, place, end, threads);
        place = end;
    }
    return missed.exchange(false) ? -1 : last;
}
}
