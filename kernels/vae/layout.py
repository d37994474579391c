"""How a launch walks over latent numbers (B, D...): which rows they form, and how programs cut these into tiles."""

import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgen.kernels.common import cdiv, next_power_of_2

TILE = 1024  # numbers: 8 a thread, two 16-byte loads of each fp32 input in flight
SECTOR = 32  # bytes: what memory moves at least
PROGRAMS = 1024  # enough to fill the chip; fixed, so that sums do not depend on the device
Strides = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """B rows of D numbers, each of at most two dimensions (outer, inner), in which several tensors of one shape lie.

    strides: of each tensor, from row to row and along the two dimensions; None for a tensor that is absent.
    """

    rows: int
    outer: int
    inner: int
    strides: tuple[Strides | None, ...]

    @property
    def columns(self) -> int:
        return self.outer * self.inner

    def aligned(self, size: int) -> bool:
        """Whether each tensor is one dense run of whole groups of `size` numbers, none of them longer than a row."""
        dense = all(stride in (None, (self.inner, 0, 1)) for stride in self.strides)
        return self.outer == 1 and dense and self.rows * self.inner % size == 0 and self.inner >= size


@functools.lru_cache(4096)
def rows_of(shape: tuple[int, ...], *strides: Strides | None) -> Rows | None:
    """Dimensions that lie one behind the other in all tensors become one. None where more than two remain."""
    present = [stride for stride in strides if stride is not None]
    merged: list[tuple[int, list[int]]] = []
    for axis in range(1, len(shape)):
        steps = [stride[axis] for stride in present]
        if shape[axis] == 1:
            continue
        if merged and all(last == s * shape[axis] for last, s in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * shape[axis], steps)
        else:
            merged.append((shape[axis], steps))
    if len(merged) > 2:
        return None
    (outer, to_outer), (inner, to_inner) = ([(1, [0] * len(present))] * 2 + merged)[-2:]
    merged_strides = iter(zip([stride[0] for stride in present], to_outer, to_inner, strict=True))
    return Rows(shape[0], outer, inner, tuple(None if stride is None else next(merged_strides) for stride in strides))


def as_rows(order: tuple[int, ...], *tensors: Tensor | None) -> tuple[tuple[Tensor | None, ...], Rows]:
    """The tensors with their dimensions in that order, and their rows. Copies only where these do not exist."""
    if order != tuple(range(len(order))):
        tensors = tuple(None if tensor is None else tensor.permute(order) for tensor in tensors)
    shape = next(tensor.shape for tensor in tensors if tensor is not None)
    rows = rows_of(tuple(shape), *(None if tensor is None else tensor.stride() for tensor in tensors))
    if rows is None:
        return as_rows(tuple(range(len(order))), *(None if x is None else x.contiguous() for x in tensors))
    return tensors, rows


@dataclass(frozen=True)
class Tiles:
    """How programs walk: a tile is ROWS rows by OUT by IN numbers; a row has `splits` programs, each of `tiles` tiles.

    Four numbers are drawn together. ODD: D is no multiple of four, so that a row may begin within such a group.
    ALIGNED: the numbers of a sector, if a row is read from the beginning of the sector that it begins in, which takes
    dense tensors; else 0. FOURS: D and the strides between rows are passed in fours, so that the compiler knows them to
    be multiples. DIVIDED: OUT is 1, but rows have two dimensions: a division takes a column apart. WIDE: columns are
    counted in 64 bits. PACKED: a tile is of IN numbers, whole rows without gaps, at most ROWS, each of at most OUT
    fours. held: rows of a program.
    """

    ROWS: int
    OUT: int
    IN: int
    splits: int
    tiles: int
    ODD: bool
    ALIGNED: int
    FOURS: bool
    DIVIDED: bool
    WIDE: bool
    PACKED: bool
    held: int

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        names = ("ROWS", "OUT", "IN", "ODD", "ALIGNED", "FOURS", "DIVIDED", "WIDE", "PACKED")
        return {name: getattr(self, name) for name in names} | {"num_warps": self.IN // 256 if self.PACKED else 4}

    def numbers(self, rows: Rows) -> list[int]:
        """What the kernels take of the rows: B, D, lengths of the two dimensions, strides of all tensors."""
        unit = 4 if self.FOURS else 1
        present = (stride or (0, 0, 0) for stride in rows.strides)
        strides = [number for row, *rest in present for number in (row // unit, *rest)]
        return [rows.rows, rows.columns // unit, self.held if self.PACKED else rows.outer, rows.inner, *strides]


def tiles_of(rows: Rows, itemsize: int) -> Tiles:
    """itemsize: bytes of the smallest element."""
    return _tiles_of(rows, SECTOR // itemsize, PROGRAMS)


@functools.lru_cache(4096)
def _tiles_of(rows: Rows, sector: int, programs: int) -> Tiles:
    """A wide row has tiles of its own; short rows, padded to a power of two, share a tile. If there are too few rows to
    fill the chip, they are split between programs.

    Two dimensions are cut into squares, so that tensors which are contiguous along different dimensions are both read
    in whole sectors; but only if the inner length is a multiple of four, as a group of numbers that are drawn together
    would else lie in two squares. Rows whose neighbours in memory are of other rows (transposed tensors) are cut into
    squares of rows and columns.
    """
    columns = rows.columns
    odd, square = columns % 4 != 0, rows.outer > 1 and rows.inner % 4 == 0
    starts = [columns, *(stride[0] for stride in rows.strides if stride)]
    # The compiler sees multiples of 16 for itself.
    fours = not odd and rows.outer == 1 and all(n % 4 == 0 for n in starts) and any(n % 16 for n in starts)
    # Several short rows of fours are one request of a warp, which then begins with a sector.
    aligned = sector if (odd or (fours and sector > 8 and columns >= 128)) and rows.aligned(sector) else 0
    if square:
        IN = min(next_power_of_2(rows.inner), max(32, TILE // next_power_of_2(rows.outer)))
        OUT = min(next_power_of_2(rows.outer), TILE // IN)
        count = cdiv(rows.outer, OUT) * cdiv(rows.inner, IN)
    else:
        length = columns + (max(aligned, 4) - 1 if odd or aligned else 0)  # as it may begin within a group
        OUT, IN = 1, min(next_power_of_2(max(length, 4)), TILE)
        if IN == TILE:  # rows of 1030 numbers are better cut into 33 times 32 than into twice 1024
            IN = min((TILE >> shift for shift in range(6)), key=lambda size: cdiv(length, size) * size)
        if any(stride[0] < stride[2] for stride in rows.strides if stride):
            IN = min(IN, 32)
        count = cdiv(length, IN)
    ROWS = TILE // (OUT * IN)
    packed = None if aligned else _packed(rows, sector, cdiv(rows.rows, ROWS) * ROWS * IN * count)
    if packed is not None:
        return packed
    splits = min(cdiv(programs, cdiv(rows.rows, ROWS)), count)
    tiles = cdiv(count, splits)
    return Tiles(
        ROWS, OUT, IN, cdiv(count, tiles), tiles, odd, aligned, fours and not aligned, rows.outer > 1 and not square,
        count * OUT * IN >= 2**31, False, ROWS,
    )  # fmt: skip


def _packed(rows: Rows, sector: int, padded: int) -> Tiles | None:
    """Short rows one behind the other, if tiles of whole rows have clearly fewer gaps than rows of `padded` numbers.

    As many rows as begin and end with a sector if they are dense. A tile is read by fours: where eight numbers of two
    bytes are a 16-byte load, rows are better padded.
    """
    present = [stride for stride in rows.strides if stride]
    starts = [rows.columns, *(stride[0] for stride in present)]
    eights = sector > 8 and all(n % 8 == 0 for n in starts)
    if eights or rows.outer > 1 or any(stride[2] != 1 for stride in present) or any(n % 4 for n in starts):
        return None
    group = sector // math.gcd(sector, rows.columns)
    sizes = [(size // rows.columns // group * group, size) for size in (256, 512, TILE)]
    numbers, held, IN = min(
        ((cdiv(rows.rows, held) * size, held, size) for held, size in sizes if held), default=(padded, 0, 0)
    )
    if 1.1 * numbers > padded:
        return None
    most = next_power_of_2(held), next_power_of_2(rows.columns // 4)
    fours = any(n % 16 for n in starts)
    return Tiles(*most, IN, 1, 1, False, 0, fours, False, False, True, held)
