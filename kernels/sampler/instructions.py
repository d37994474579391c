"""Instructions of the step machine, each played tile after tile: all of its tiles, or every so many from some one on.

A row is an image and a place in the three dimensions after it. No tile of an instruction reads what another one writes.
What follows a product or a pointwise operation number by number, its links, is done in registers.
"""

import triton
import triton.language as tl

from fastgen.kernels.sampler.functions import apply
from fastgen.kernels.sampler.words import (
    ADDED,
    ALONG,
    ALONG_B,
    BFLOAT16,
    COLUMNS,
    COPY_INT64,
    DEPTH,
    FLOAT16,
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
    ROUNDED,
    S1,
    S2,
    S3,
    WEIGHT,
    WORDS,
    A,
    B,
)

BJ = tl.constexpr(32)  # columns of a tile of `contract`


@triton.jit
def rows_in(code, images):
    return (images * tl.load(code + S1) * tl.load(code + S2) * tl.load(code + S3)).to(tl.int32)


@triton.jit
def places(code, SIDE: tl.constexpr, offsets, first_image, m):
    """Where rows m of a side begin."""
    start = tl.load(code + SIDE) + tl.load(offsets + tl.load(code + SIDE + 1))
    of_image = tl.load(code + SIDE + 2)
    s2, s3 = tl.load(code + S2).to(tl.int32), tl.load(code + S3).to(tl.int32)
    inner = tl.load(code + S1).to(tl.int32) * s2 * s3
    found = start + (first_image + m // inner) * of_image
    if inner > 1:
        d1, d2, d3 = tl.load(code + SIDE + 3), tl.load(code + SIDE + 4), tl.load(code + SIDE + 5)
        found += m % s3 * d3 + m // s3 % s2 * d2 + m // (s2 * s3) % tl.load(code + S1).to(tl.int32) * d1
    return found


@triton.jit
def rounded(x, code):
    """Results as they are to be stored: in the precision that the value has in the model."""
    to = tl.load(code + ROUNDED)
    if to == BFLOAT16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    elif to == FLOAT16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def contract(
    memory_ptr,
    code,
    offsets,
    first_image,
    images,
    first,
    apart,
    ROWS: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
):
    """out = rows @ weight + added, each row with a weight of its own that has been computed."""
    rows, columns, depth = (
        rows_in(code, images),
        tl.load(code + COLUMNS).to(tl.int32),
        tl.load(code + DEPTH).to(tl.int32),
    )
    along_a, along_b = tl.load(code + ALONG), tl.load(code + ALONG_B)
    panels = tl.cdiv(columns, BJ)
    for tile in range(first, tl.cdiv(rows, ROWS) * panels, apart):
        j, m = tile % panels * BJ + tl.arange(0, BJ), tile // panels * ROWS + tl.arange(0, ROWS)
        real = m < rows
        inside = real[:, None] & (j < columns)[None, :]
        m = tl.where(real, m, 0)
        a_ptr = memory_ptr + places(code, A, offsets, first_image, m)
        b_ptr = (memory_ptr + places(code, B, offsets, first_image, m))[:, None] + j[None, :] * tl.load(code + B + 6)
        products = tl.zeros((ROWS, BK, BJ), tl.float32)
        for start in range(0, depth, BK):
            k = start + tl.arange(0, BK)
            kept = real[:, None] & (k < depth)[None, :]
            a = tl.load(a_ptr[:, None] + (k * along_a)[None, :], mask=kept, other=0.0)
            both = kept[:, :, None] & inside[:, None, :]
            b = tl.load(b_ptr[:, None, :] + (k * along_b)[None, :, None], mask=both, other=0.0)
            products += a[:, :, None] * b
        total = tl.sum(products, 1)
        if tl.load(code + HAS_ADDED) != 0:
            at = places(code, ADDED, offsets, first_image, m)[:, None] + j[None, :] * tl.load(code + ADDED + 6)
            total += tl.load(memory_ptr + at, mask=inside, other=0.0)
        at = places(code, OUT, offsets, first_image, m)[:, None] + j[None, :] * tl.load(code + OUT + 6)
        tl.store(memory_ptr + at, rounded(total, code), mask=inside)


@triton.jit
def columns_of(code, j):
    """Which columns of the result those of number j among the packed ones are."""
    half = tl.load(code + HALF).to(tl.int32)
    return tl.where(half > 0, j // 2 + j % 2 * half, j)


@triton.jit
def follow(memory_ptr, codes_ptr, code, offsets, first_image, m, j, inside, value, FOLDS: tl.constexpr):
    """What the links of an instruction make of a tile of its result, and store.

    They are done one after the other in a loop, so that the compiler joins no two of them to a multiply-add: every
    number is rounded as if each link were an instruction."""
    link = codes_ptr + tl.load(code + LINKS_AT) * WORDS
    folded = 0
    for _ in range(0, tl.load(code + LINKS).to(tl.int32)):
        column, kept = j, inside
        if FOLDS:
            folded |= tl.load(link + HALF).to(tl.int32)
            column = tl.where(folded > 0, j // 2, columns_of(code, j))
            kept &= (j % 2 + folded < 2)[None, :]
        other = value
        if tl.load(link + HAS_ADDED) != 0:
            along = column * tl.load(link + ADDED + 6).to(tl.int32)
            at = places(link, ADDED, offsets, first_image, m)[:, None] + along[None, :]
            other = tl.load(memory_ptr + at, mask=kept, other=1.0)
        elif FOLDS:
            if tl.load(link + HALF) != 0:
                pair = (tl.arange(0, value.shape[1]) ^ 1)[None, :]
                other = tl.gather(value, tl.broadcast_to(pair, value.shape), 1)
        value = rounded(apply(tl.load(link + OP), value, other), link)
        along = column * tl.load(link + OUT + 6).to(tl.int32)
        at = places(link, OUT, offsets, first_image, m)[:, None] + along[None, :]
        tl.store(memory_ptr + at, value, mask=kept & (j < tl.load(link + KEPT))[None, :])
        link += WORDS


@triton.jit
def product(
    memory_ptr,
    weights_ptr,
    codes_ptr,
    code,
    offsets,
    first_image,
    images,
    first,
    apart,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LINKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = rows @ weight + added; the weight as panels (depth, BN), depth filled up with zeros to a multiple of BK."""
    rows, columns, depth = (
        rows_in(code, images),
        tl.load(code + COLUMNS).to(tl.int32),
        tl.load(code + DEPTH).to(tl.int32),
    )
    parts, panels = tl.cdiv(depth, BK), tl.cdiv(columns, BN)
    k = tl.arange(0, BK)
    for tile in range(first, tl.cdiv(rows, BM) * panels, apart):
        panel, m = tile % panels, tile // panels * BM + tl.arange(0, BM)
        real = m < rows
        m = tl.where(real, m, 0)
        a_ptr = memory_ptr + places(code, A, offsets, first_image, m)[:, None] + k[None, :]
        start = tl.multiple_of(tl.load(code + WEIGHT) + panel.to(tl.int64) * parts * (BK * BN), 16)
        w_ptr = weights_ptr + start + (k[:, None] * BN + tl.arange(0, BN)[None, :])
        total = tl.zeros((BM, BN), tl.float32)
        for part in range(0, parts):
            a = tl.load(a_ptr, mask=real[:, None] & (part * BK + k < depth)[None, :], other=0.0)
            w = tl.load(w_ptr)
            if PRECISION == "widened":  # weights in half precision, which the interpreter cannot multiply
                total = tl.dot(a, w.to(tl.float32), total, input_precision="ieee")
            elif PRECISION == "half":
                total = tl.dot(a.to(w.dtype), w, total)
            else:
                total = tl.dot(a, w, total, input_precision=PRECISION)
            a_ptr += BK
            w_ptr += BK * BN
        j = panel * BN + tl.arange(0, BN)
        inside = real[:, None] & (j < columns)[None, :]
        column = columns_of(code, j)
        if tl.load(code + HAS_ADDED) != 0:
            at = places(code, ADDED, offsets, first_image, m)
            total += tl.load(memory_ptr + at[:, None] + column[None, :], mask=inside, other=0.0)
        total = rounded(total, code)
        kept = inside & (j < tl.load(code + KEPT))[None, :]
        at = places(code, OUT, offsets, first_image, m)
        tl.store(memory_ptr + at[:, None] + column[None, :], total, mask=kept)
        if LINKED:
            follow(memory_ptr, codes_ptr, code, offsets, first_image, m, j, inside, total, True)


@triton.jit
def pointwise(
    memory_ptr,
    integers_ptr,
    codes_ptr,
    code,
    offsets,
    first_image,
    images,
    first,
    apart,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """out = op(a, b); copies; out = table[index], with the table in A and the index in B."""
    op = tl.load(code + OP)
    rows, columns = rows_in(code, images), tl.load(code + COLUMNS).to(tl.int32)
    panels = tl.cdiv(columns, BP)
    for tile in range(first, tl.cdiv(rows, BR) * panels, apart):  # of a row from left to right
        j, m = tile % panels * BP + tl.arange(0, BP), tile // panels * BR + tl.arange(0, BR)
        real = m < rows
        inside = real[:, None] & (j < columns)[None, :]
        m = tl.where(real, m, 0)
        a_at = places(code, A, offsets, first_image, m)[:, None] + j[None, :] * tl.load(code + A + 6)
        of_row = places(code, B, offsets, first_image, m)
        out_at = places(code, OUT, offsets, first_image, m)[:, None] + j[None, :] * tl.load(code + OUT + 6)
        if op == MOVE_INT64:
            moved = tl.load(integers_ptr + a_at, mask=inside, other=0)
            if tl.load(code + IN_ORDER) != 0:
                tl.debug_barrier()
            tl.store(integers_ptr + out_at, moved, mask=inside)
        else:
            if op == COPY_INT64:
                a = tl.load(integers_ptr + a_at, mask=inside, other=0).to(tl.float32)
            else:
                if op == LOOKUP:
                    a_at += (tl.load(integers_ptr + of_row, mask=real, other=0) * tl.load(code + ALONG))[:, None]
                a = tl.load(memory_ptr + a_at, mask=inside, other=0.0)
            if op < COPY_INT64:
                b_at = of_row[:, None] + j[None, :] * tl.load(code + B + 6)
                a = apply(op, a, tl.load(memory_ptr + b_at, mask=inside, other=1.0))
            if tl.load(code + IN_ORDER) != 0:
                tl.debug_barrier()
            a = rounded(a, code)
            tl.store(memory_ptr + out_at, a, mask=inside & (j < tl.load(code + KEPT))[None, :])
            follow(memory_ptr, codes_ptr, code, offsets, first_image, m, j, inside, a, False)
