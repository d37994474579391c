"""Where a tile (ROWS, OUT, IN) of latent numbers lies in tensors of any strides: the device's half of `layout`.

A row is what a posterior has of one image: D numbers, which lie in at most two dimensions, an outer and an inner one.
Numbers are drawn, or read whole, in groups (of four, or of ALIGNED). Arguments that the kernels of this folder share:

    rows, columns     B and D
    outers, inner     lengths of a row's two dimensions
    NAME_row_stride, NAME_outer_stride, NAME_inner_stride    of tensor NAME
    tiles             of a program, one after the other in its rows
    begin, ahead      the number of the tensor at which the group begins that a row begins in, and how far into it
    place             of a number, counted from `begin`; its column is place - ahead
    outer, within     of a number of a row with two dimensions: its places along them
    ROWS, OUT, IN, ODD, ALIGNED, FOURS, DIVIDED, WIDE    `layout.Tiles`
"""

import triton
import triton.language as tl


@triton.jit
def begin_of(row, columns, ODD: tl.constexpr, ALIGNED: tl.constexpr):
    """`begin` and `ahead` of a row."""
    first = row * columns
    if ODD or ALIGNED > 0:
        GROUP: tl.constexpr = ALIGNED if ALIGNED > 0 else 4
        return first // GROUP * GROUP, (first % GROUP).to(tl.int32)
    return first, tl.zeros_like(row).to(tl.int32)


@triton.jit
def places_of(tile, tiles, inner, STEP: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """`place` of every STEP-th number of a program's tile, and in a tile of two dimensions its `outer` and `within`."""
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
def masks_of(place, outer, within, ahead, row, rows, columns, outers, inner, ALIGNED: tl.constexpr, OUT: tl.constexpr):
    """Which numbers of a tile belong to its rows, and which are read and written. The latter are whole groups if rows
    are ALIGNED: two rows that share a group both write it, and write the same."""
    # One comparison: what lies before a row is a large number without a sign.
    UNSIGNED: tl.constexpr = tl.uint64 if place.dtype == tl.int64 else tl.uint32
    own = (place - ahead).to(UNSIGNED) < tl.where(row < rows, columns, 0).to(UNSIGNED)
    inside = own
    if OUT > 1:
        own = (row < rows) & (outer < outers) & (within < inner)
        inside = own
    elif ALIGNED > 0:
        inside = (row < rows) & (place // ALIGNED * ALIGNED < columns + ahead)
    return own, inside


@triton.jit
def offsets(flat, row, place, outer, within, ahead, inner, strides, ALIGNED: tl.constexpr, DIVIDED: tl.constexpr,
            OUT: tl.constexpr):  # fmt: skip
    """Of a tile's numbers in a tensor of any strides, in 64 bits. flat: their offsets in a dense tensor."""
    if ALIGNED > 0:
        return flat
    column = place - ahead
    if OUT > 1:
        return row * strides[0] + outer.to(tl.int64) * strides[1] + within.to(tl.int64) * strides[2]
    if DIVIDED:
        along = (column // inner).to(tl.int64) * strides[1]
        return row * strides[0] + along + (column % inner).to(tl.int64) * strides[2]
    return row * strides[0] + column.to(tl.int64) * strides[2]
