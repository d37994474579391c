"""Where a tile (ROWS, OUT, IN) of latent numbers lies in tensors of any strides: the device's half of `layout`."""

import triton
import triton.language as tl


@triton.jit
def begin_of(row, columns, ODD: tl.constexpr, ALIGNED: tl.constexpr):
    """Where in a dense tensor the group of numbers begins that a row begins in, and how far into it."""
    first = row * columns
    if ODD or ALIGNED > 0:
        GROUP: tl.constexpr = ALIGNED if ALIGNED > 0 else 4
        return first // GROUP * GROUP, (first % GROUP).to(tl.int32)
    return first, tl.zeros_like(row).to(tl.int32)


@triton.jit
def places_of(tile, tiles, inner, STEP: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """Every STEP-th number of a program's tile: its place behind the beginning of the row; of a tile of two dimensions
    the outer and inner ones too."""
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
    """What of a tile belongs to its rows; and what is read and written, with ALIGNED groups in whole: what their
    neighbours have in common two rows write alike."""
    column = place - ahead
    own = (row < rows) & (column >= 0) & (column < columns)
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
    """Of a tile in a tensor of any strides, in 64 bits; flat: in one that is dense."""
    if ALIGNED > 0:
        return flat
    column = place - ahead
    if OUT > 1:
        return row * strides[0] + outer.to(tl.int64) * strides[1] + within.to(tl.int64) * strides[2]
    if DIVIDED:
        along = (column // inner).to(tl.int64) * strides[1]
        return row * strides[0] + along + (column % inner).to(tl.int64) * strides[2]
    return row * strides[0] + column.to(tl.int64) * strides[2]
