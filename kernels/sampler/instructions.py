"""Instructions of the step machine, each played tile after tile: all of its tiles, or every so many from some one on.

A row is an image and a place in the three dimensions after it. No tile of an instruction reads what another one writes.
What a tile is of differs: a product, what has been computed or levels; what then becomes of it, one op, and further
ones, the links, is done in registers and in one place for all.

Functions pass each other

    arenas   (memory_ptr, integers_ptr, weights_ptr, codes_ptr): all float32 and all int64 numbers, packed weights, the
             words of all instructions
    share    (offsets, first_image, images, first, apart): what a program plays of an instruction. offsets_ptr begins at
             those of the step; of the tiles of these images it plays numbers first, first + apart, ...
    code     where the words of an instruction begin
"""

import triton
import triton.language as tl

from fastgen.kernels.sampler.functions import apply
from fastgen.kernels.sampler.rowwise import rowwise
from fastgen.kernels.sampler.sides import places, rounded, rows_in
from fastgen.kernels.sampler.words import (
    ADDED,
    ALONG,
    ALONG_B,
    COLUMN_STRIDE,
    COLUMNS,
    CONTRACT,
    COPY_INT64,
    DEPTH,
    FLOAT16,
    FLOAT32,
    FOLDS,
    HALF,
    HAS_ADDED,
    IN_ORDER,
    KEPT,
    LINKS,
    LINKS_AT,
    LOOKUP,
    MOVE_INT64,
    OP,
    OUT,
    PRODUCT,
    ROUNDED,
    SOFTMAX,
    THEN,
    TO_INT64,
    WEIGHT,
    WEIGHT_PRECISION,
    WORDS,
    A,
    B,
)

AT_ONCE = tl.constexpr(2)  # terms of a sum that `contracted` loads at a time; registers are few


@triton.jit
def times_panel(
    a_ptr, w_ptr, panel, real, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows (BM, depth) times a panel (depth, BN), which is filled up with zeros to a multiple of BK."""
    tl.assume(depth > 0)  # or else ptxas makes products of sm_90 wait for each other
    k = tl.arange(0, BK)
    w_ptr = w_ptr.to(tl.pointer_type(DTYPE)) + panel.to(tl.int64) * (tl.cdiv(depth, BK) * (BK * BN))
    w_ptr += k[:, None] * BN + tl.arange(0, BN)[None, :]
    a_ptr = a_ptr[:, None] + k[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        a = tl.load(a_ptr, mask=real[:, None] & (start + k < depth)[None, :], other=0.0)
        w = tl.load(w_ptr)
        if PRECISION == "widened":
            total = tl.dot(a, w.to(tl.float32), total, input_precision="ieee")
        elif tl.float32 == DTYPE:
            total = tl.dot(a, w, total, input_precision=PRECISION)
        else:
            total = tl.dot(a.to(DTYPE), w, total)
        a_ptr += BK
        w_ptr += BK * BN
    return total


@triton.jit
def multiplied(
    arenas, code, a_ptr, panel, real, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of a product with packed weights, whose precision the instruction says."""
    depth, precision = tl.load(code + DEPTH).to(tl.int32), tl.load(code + WEIGHT_PRECISION)
    w_ptr = arenas[2] + tl.multiple_of(tl.load(code + WEIGHT), 16)
    if precision == FLOAT32:
        total = times_panel(a_ptr, w_ptr, panel, real, depth, BM, BN, BK, tl.float32, PRECISION)
    elif precision == FLOAT16:
        total = times_panel(a_ptr, w_ptr, panel, real, depth, BM, BN, BK, tl.float16, PRECISION)
    else:
        total = times_panel(a_ptr, w_ptr, panel, real, depth, BM, BN, BK, tl.bfloat16, PRECISION)
    return total


@triton.jit
def contracted(code, a_ptr, b_ptr, real, inside, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of products of rows and weights of their own, which have been computed. Pointers (BM,), (BM, BN)."""
    depth, along_a, along_b = tl.load(code + DEPTH).to(tl.int32), tl.load(code + ALONG), tl.load(code + ALONG_B)
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, depth, loop_unroll_factor=AT_ONCE):
        a = tl.load(a_ptr + k * along_a, mask=real, other=0.0)
        total += a[:, None] * tl.load(b_ptr + k * along_b, mask=inside, other=0.0)
    return total


@triton.jit
def follow(arenas, code, share, m, j, inside, value):
    """What an instruction and its links make of a tile of numbers, (rows m, columns j), and store.

    They are done one after the other in a loop, so that the compiler joins no two of them to a multiply-add: every
    number is rounded as if each link were an instruction."""
    memory_ptr, codes_ptr = arenas[0], arenas[3]
    half, folded = tl.load(code + HALF).to(tl.int32), 0
    links = codes_ptr + tl.load(code + LINKS_AT) * WORDS
    pair = tl.broadcast_to((tl.arange(0, value.shape[1]) ^ 1)[None, :], value.shape)
    step = code
    for k in range(0, 1 + tl.load(code + LINKS).to(tl.int32)):
        folds = tl.load(step + FOLDS).to(tl.int32)
        folded |= folds
        # Of the columns that are packed in turns those of the first half go on.
        column = tl.where(folded > 0, j // 2, tl.where(half > 0, j // 2 + j % 2 * half, j))
        kept = inside & (j % 2 + folded < 2)[None, :]
        other = value
        if tl.load(step + HAS_ADDED) != 0:
            along = column * tl.load(step + ADDED + COLUMN_STRIDE).to(tl.int32)
            other = tl.load(memory_ptr + places(step, ADDED, share, m)[:, None] + along[None, :], mask=kept, other=1.0)
        elif folds != 0:
            other = tl.gather(value, pair, 1)
        value = rounded(apply(tl.load(step + THEN), value, other), tl.load(step + ROUNDED))
        along = column * tl.load(step + OUT + COLUMN_STRIDE).to(tl.int32)
        out_ptr = memory_ptr + places(step, OUT, share, m)[:, None] + along[None, :]
        tl.store(out_ptr, value, mask=kept & (j < tl.load(step + KEPT))[None, :])
        step = links + k * WORDS


@triton.jit
def by_tiles(arenas, code, share, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """All instructions but those along rows."""
    memory_ptr, integers_ptr, _, _ = arenas
    _, _, images, first, apart = share
    op, rows, columns = tl.load(code + OP), rows_in(code, images), tl.load(code + COLUMNS).to(tl.int32)
    panels = tl.cdiv(columns, BN)
    for tile in range(first, tl.cdiv(rows, BM) * panels, apart):  # of a row from left to right
        panel, m = tile % panels, tile // panels * BM + tl.arange(0, BM)
        j, real = panel * BN + tl.arange(0, BN), m < rows
        m = tl.where(real, m, 0)
        a_at = places(code, A, share, m)
        if op == PRODUCT:
            value = multiplied(arenas, code, memory_ptr + a_at, panel, real, BM, BN, BK, PRECISION)
        elif op == CONTRACT:
            b_at = places(code, B, share, m)[:, None] + j[None, :] * tl.load(code + B + COLUMN_STRIDE)
            inside = real[:, None] & (j < columns)[None, :]
            value = contracted(code, memory_ptr + a_at, memory_ptr + b_at, real, inside, BM, BN)
        else:
            known = real
            if op == LOOKUP:  # in the table A by the index B, from the end where it is negative
                count = tl.load(code + DEPTH)
                index = tl.load(integers_ptr + places(code, B, share, m), mask=real, other=0)
                index += tl.where(index < 0, count, 0)
                known = real & (index >= 0) & (index < count)
                a_at += tl.where(known, index, 0) * tl.load(code + ALONG)
            at = a_at[:, None] + j[None, :] * tl.load(code + A + COLUMN_STRIDE)
            inside = real[:, None] & (j < columns)[None, :]
            if (op == COPY_INT64) | (op == MOVE_INT64):
                levels = tl.load(integers_ptr + at, mask=inside, other=0)
                if op == MOVE_INT64:
                    tl.debug_barrier()  # it may lie over what it copies
                    out_at = places(code, OUT, share, m)[:, None] + j[None, :] * tl.load(code + OUT + COLUMN_STRIDE)
                    tl.store(integers_ptr + out_at, levels, mask=inside)
                value = levels.to(tl.float32)
            else:
                value = tl.load(memory_ptr + at, mask=inside, other=0.0)
                value = tl.where((known == real)[:, None], value, float("nan"))  # of a row that is not there
                if op == TO_INT64:
                    out_at = places(code, OUT, share, m)[:, None] + j[None, :] * tl.load(code + OUT + COLUMN_STRIDE)
                    tl.store(integers_ptr + out_at, value.to(tl.int64), mask=inside)
            if tl.load(code + IN_ORDER) != 0:
                tl.debug_barrier()
        if (op != MOVE_INT64) & (op != TO_INT64):
            follow(arenas, code, share, m, j, real[:, None] & (j < columns)[None, :], value)


@triton.jit
def instruction(arenas, code, share, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    if tl.load(code + OP) < SOFTMAX:
        by_tiles(arenas, code, share, BM, BN, BK, PRECISION)
    else:
        rowwise(arenas, code, share, BM, BN)
