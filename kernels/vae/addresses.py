"""Where a tile (ROWS, OUT, IN) of latent numbers lies in tensors of any strides: the device's half of `layout`.

A row is what a posterior has of one image: D numbers, which lie in at most two dimensions, an outer and an inner one.
Numbers are drawn, or read whole, in groups (of four, or of ALIGNED). Arguments that the kernels of this folder share:

    rows, columns     B and D
    outers, inner     lengths of a row's two dimensions; of PACKED rows `outers` is how many a program has
    NAME_row_stride, NAME_outer_stride, NAME_inner_stride    of tensor NAME
    tiles             of a program, one after the other in its rows
    row, column       of a number; before its row's begin a column is negative
    outer, within     of a number of a row with two dimensions: its places along them
    ROWS, OUT, IN, ODD, ALIGNED, FOURS, DIVIDED, WIDE, PACKED    `layout.Tiles`
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(
    tile, tiles, rows, columns, outers, inner,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ODD: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of the numbers of a program's tile: row, column, outer, within, their offset in a dense tensor; of its fours
    where they lie in the noise; which numbers belong to its rows, and which are read and written. The latter are whole
    groups if rows are ALIGNED: two rows that share a group both write it, and write the same."""
    if PACKED:
        found = packed_tile(rows, columns, outers, IN)
    else:
        found = padded_tile(tile, tiles, rows, columns, outers, inner, ROWS, OUT, IN, ODD, ALIGNED, WIDE)
    return found


@triton.jit
def packed_tile(rows, columns, held, IN: tl.constexpr):
    row_of_four, four = fours_of(rows, columns // 4, held, IN)
    row = in_fours(row_of_four)
    column = in_fours(4 * four) + (tl.arange(0, IN) % 4)[None, None, :]
    column = tl.max_contiguous(tl.multiple_of(column, (1, 1, 4)), (1, 1, 4))
    every = tl.full((1, 1, IN), True, tl.int1)
    return row, column, column, column, row * columns + column, row_of_four * (columns // 4) + four, every, every


@triton.jit
def padded_tile(
    tile, tiles, rows, columns, outers, inner,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ODD: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    first = row * columns
    ahead = tl.zeros_like(row).to(tl.int32)
    if ODD or ALIGNED > 0:  # a row is read from the group on that it begins in
        GROUP: tl.constexpr = ALIGNED if ALIGNED > 0 else 4
        ahead = (first % GROUP).to(tl.int32)
        first = first // GROUP * GROUP
    place, outer, within = places_of(tile, tiles, inner, 1, WIDE, OUT, IN)
    fourth, _, _ = places_of(tile, tiles, inner, 4, WIDE, OUT, IN)
    column = place - ahead
    # One comparison: what lies before a row is a large number without a sign.
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    own = column.to(UNSIGNED) < tl.where(row < rows, columns, 0).to(UNSIGNED)
    inside = own
    if OUT > 1:
        own = (row < rows) & (outer < outers) & (within < inner)
        inside = own
    elif ALIGNED > 0:
        inside = (row < rows) & (place // ALIGNED * ALIGNED < columns + ahead)
    return row, column, outer, within, first + place, (first >> 2) + (fourth >> 2), own, inside


@triton.jit
def places_of(tile, tiles, inner, STEP: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """Of every STEP-th number of a program's tile its place in the row, and in a tile of two dimensions its `outer` and
    `within`."""
    number = tl.program_id(1)
    if WIDE:
        number = number.to(tl.int64)
    number = number * tiles + tile
    within = (STEP * tl.arange(0, IN // STEP))[None, None, :]
    if OUT > 1:
        across = (inner + IN - 1) // IN
        outer = number // across * OUT + tl.arange(0, OUT)[None, :, None]
        within = number % across * IN + within
        place = outer * inner + within
    else:
        place = number * IN + within
        outer = place
    return place, outer, within


@triton.jit
def fours_of(rows, fours, held, IN: tl.constexpr):
    """Of each four in a PACKED tile of `held` rows, each of `fours` fours: its row and its place there.

    Behind its last row a tile repeats numbers of that row, so that nothing is masked.
    """
    number = tl.arange(0, IN // 4)[None, None, :]
    row = number * (65536 // fours + 1) >> 16  # number // fours, for numbers below 256
    first = tl.program_id(0).to(tl.int64) * held
    last = tl.minimum(held, rows - first).to(tl.int32) - 1
    return first + tl.minimum(row, last), number - row * fours


@triton.jit
def in_fours(x):
    """Four times each number."""
    fours = tl.broadcast_to(x[:, :, :, None], (x.shape[0], x.shape[1], x.shape[2], 4))
    return tl.max_constancy(tl.reshape(fours, (x.shape[0], x.shape[1], 4 * x.shape[2])), (1, 1, 4))


@triton.jit
def sums_of_rows(x, columns, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, PACKED: tl.constexpr):
    """Of a tile's numbers. A PACKED tile holds at most ROWS rows of at most OUT fours."""
    if PACKED:
        fours = tl.sum(tl.reshape(x, (IN // 4, 4)), axis=1)
        place = tl.arange(0, OUT)[:, None]
        at = tl.minimum(tl.arange(0, ROWS)[None, :] * (columns // 4) + place, IN // 4 - 1)
        found = tl.reshape(tl.gather(fours, tl.reshape(at, (OUT * ROWS,)), 0), (OUT, ROWS))
        sums = tl.sum(tl.where(place < columns // 4, found, 0.0), axis=0)
    else:
        sums = tl.sum(tl.reshape(x, (ROWS, OUT * IN)), axis=1)
    return sums


@triton.jit
def offsets(flat, row, column, outer, within, inner, strides, ALIGNED: tl.constexpr, DIVIDED: tl.constexpr,
            OUT: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Of a tile's numbers in a tensor of any strides, in 64 bits. flat: their offsets in a dense tensor."""
    if ALIGNED > 0:
        return flat
    if OUT > 1 and not PACKED:
        return row * strides[0] + outer.to(tl.int64) * strides[1] + within.to(tl.int64) * strides[2]
    if DIVIDED:
        along = (column // inner).to(tl.int64) * strides[1]
        return row * strides[0] + along + (column % inner).to(tl.int64) * strides[2]
    return row * strides[0] + column.to(tl.int64) * strides[2]
