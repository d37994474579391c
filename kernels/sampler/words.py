"""Words of the tables that the step machine reads, all int64. `fastgen.sampling.machine.gpu` writes them.

An instruction has WORDS words. A side of it (result, inputs) begins at OUT, A, B or ADDED and has SIDE words: where it
begins in its arena, the number of its offset among those of a step (0: none), the strides of images, of three more
dimensions and of columns.

Links are what an instruction does to each number of its result before it is stored; they are written as instructions,
with the sizes of theirs, their op in THEN and its second operand in ADDED.
"""

import triton.language as tl

# The ops of `fastgen.sampling.machine.definitions`; first those of one or two numbers.
POINTWISE = (
    "copy", "add", "sub", "mul", "div", "maximum", "minimum", "neg", "relu", "tanh", "sigmoid", "exp", "expm1", "log",
    "silu", "gelu", "gelu_tanh", "elu", "leaky_relu", "square", "abs", "sqrt", "rsqrt", "reciprocal", "gate", "glu",
    "hide", "erase", "keep", "softplus", "log1p", "erf", "eq", "lt", "le",
    "copy_int64", "to_int64", "move_int64", "lookup",
)  # fmt: skip
ROWWISE = ("softmax", "log_softmax", "normalized", "sum", "mean", "amax")
OPS = {name: number for number, name in enumerate((*POINTWISE, "product", "contract", *ROWWISE))}

(
    COPY, ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, NEG, RELU, TANH, SIGMOID, EXP, EXPM1, LOG,
    SILU, GELU, GELU_TANH, ELU, LEAKY_RELU, SQUARE, ABS, SQRT, RSQRT, RECIPROCAL, GATE, GLU,
    HIDE, ERASE, KEEP, SOFTPLUS, LOG1P, ERF, EQ, LT, LE,
    COPY_INT64, TO_INT64, MOVE_INT64, LOOKUP,
    PRODUCT, CONTRACT,
    SOFTMAX, LOG_SOFTMAX, NORMALIZED, SUM, MEAN, AMAX,
) = map(tl.constexpr, range(len(OPS)))  # fmt: skip

# Of an instruction. THEN: the op of one or two numbers that makes a result of what the instruction has computed, the
# second number in ADDED. ALONG: strides of A and B along the depth. NUMBER: bits of a float32. WEIGHT: where packed
# weights begin, in units of 4 bytes, and their precision. IN_ORDER: a copy whose target begins before its source, over
# which it may lie. ROUNDED: to what precision the result is rounded. KEPT: how many columns of it are stored, all or
# none. LINKS, LINKS_AT: how many there are, and the number of the first among all instructions. HALF: columns of a
# half, where a link, which FOLDS, joins the two halves of a product's columns, which are packed in turns.
(
    OP, THEN, DEPTH, ALONG, ALONG_B, NUMBER, WEIGHT, WEIGHT_PRECISION, HAS_ADDED, IN_ORDER, ROUNDED, KEPT,
    LINKS, LINKS_AT, HALF, FOLDS, S1, S2, S3, COLUMNS,
) = map(tl.constexpr, range(20))  # fmt: skip
OUT, A, B, ADDED = map(tl.constexpr, range(20, 48, 7))
SIDE, WORDS = 7, tl.constexpr(48)
COLUMN_STRIDE = tl.constexpr(6)  # a side's last word
FLOAT32, BFLOAT16, FLOAT16 = map(tl.constexpr, range(3))  # precisions

# What a launch plays: draws and steps of places; nothing; or of one place the draws, or a copy or an instruction of the
# step after it, which are counted from 1 on.
PLACES, NOTHING, DRAW = map(tl.constexpr, (-1, -2, 0))

# Of a step: program, first word of its offsets, first of the copies before it and their number. Of a program: first
# instruction, number.
PROGRAM, OFFSETS, MOVES, MOVES_COUNT, STEP_WORDS = map(tl.constexpr, range(5))

# Of the draws of a request. TEMPERATURE, TOP_P: bits of a float64. TOP_K: 0 without both. Then
# strides by images, channels, levels.
(
    KIND, CHANNELS, LEVELS, PARAMETERS, HAS_KNOWN, TEMPERATURE,
    PARAMS_IMAGE, PARAMS_CHANNEL, PARAMS_LEVEL, DRAWN_IMAGE, DRAWN_CHANNEL, NOISE_IMAGE, NOISE_CHANNEL,
    KNOWN_IMAGE, KNOWN_CHANNEL, MASK_IMAGE, MASK_CHANNEL, TOP_K, TOP_P, DRAWS_WORDS,
) = map(tl.constexpr, range(20))  # fmt: skip
CATEGORICAL, BERNOULLI, MIXTURE = map(tl.constexpr, range(3))  # kinds

# Of a place that is drawn: where its parameters, level, noise, known level and mask lie, and its first channel.
PARAMS_AT, DRAWN_AT, NOISE_AT, KNOWN_AT, MASK_AT, FIRST_CHANNEL, PLACE_WORDS = map(tl.constexpr, range(7))
