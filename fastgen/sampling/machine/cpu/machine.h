// What a plan is to the machine. `tables.py` has the same structures.
#pragma once

#include <cstdint>

constexpr int DIMS = 5;  // images, three more, columns

struct Side {
    char* base;  // null: there is none
    int64_t slot;  // number of its offset among those of the step, or -1
    int64_t strides[DIMS];
};

struct Instruction {
    int64_t op;  // number of its name in OPS
    int64_t waits;  // for what other threads have written, or still read
    int64_t depth;  // terms of each sum of a product; numbers of a row
    int64_t depth_strides[2];  // along these, of the first two inputs
    double number;  // rows of the table of a lookup
    int64_t sizes[DIMS];
    Side out, in[3];  // of a product: rows, weight (packed where it is a constant), what is added to
};

struct Program {
    const Instruction* code;  // null: not all of it is the machine's
    int64_t count, threads;
};

struct Step {
    int64_t program;
    const int64_t* offsets;
    int64_t moves, moves_end;  // of rows, before it
};

struct Move {
    char *target, *source;
    int64_t image, bytes;  // from an image to the next, and how much moves
};

// A tensor with places: element (b, channel, level) of place p is base[at[p] + b * image + channel * of_channel + ...].
struct Placed {
    char* base;
    const int64_t* at;
    int64_t image, channel, level;
};

struct Draws {
    int64_t kind;  // of distribution
    int64_t channels;  // drawn at a place
    int64_t levels;  // of a channel, or components of a mixture
    int64_t parameters;  // of a pixel, of a mixture
    Placed params, drawn, noise, known, mask;  // float, int64, float, int64, uint8
    double temperature, top_p;  // top_p 0, top_k 0: without
    int64_t top_k;
    const int64_t* first_channel;  // of a place
    int64_t* bad;  // set where a parameter is NaN
};

struct Play {
    const Program* programs;
    const Step* steps;
    const Move* moves;
    const Draws* draws;
    int64_t images, threads;  // at most
};
