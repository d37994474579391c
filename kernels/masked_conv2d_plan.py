"""Which blocks of a masked convolution hold a live weight: read from the mask once, kept on the device as tables.

A convolution is a matrix product over "columns", the pairs (tap, channel). Columns that no row (output channel) uses
are left out. The rest are packed in blocks of `Blocks.K` columns, and every tile of `Blocks.N` rows walks only through
its own list of blocks that hold a live weight. So a dead tap costs nothing, nor does a block of channels of the centre
tap that a group of colours does not see. There are two ways to fill a block:

- blocks of channels: one tap, K neighbouring channels, which are loaded as they lie in memory;
- gathered: any K live columns, for few channels (an image), where a block a tap would be mostly padding.

The same tables serve the result (rows: output channels), the gradient of the input (rows: input channels, taps
mirrored; with a stride, one list for each class of pixels modulo the stride) and the gradient of the weight.
"""

import hashlib
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ENTRY = 5  # ints of an entry: dy, dx, block of channels, block of columns, tile of rows
COLUMN = 5  # rows of `Plan.columns`: channel (-1: padding), ky, kx, dy, dx


@dataclass(frozen=True)
class Geometry:
    """(height, width) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Blocks:
    """N rows by K columns. A gate's two parts, tanh and sigmoid, are laid over each other: one list serves both."""

    N: int
    K: int
    parts: int = 1
    gather: bool = False
    mirrored: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables on the device, int32.

    Attributes:
        blocks: what the tables were built for.
        entries: (E, ENTRY), sorted by class, then tile of rows.
        starts: (classes * row_tiles + 1,), where the entries of each begin.
        columns: (COLUMN, K), what each packed column is.
        places: (channels * kh * kw,), the packed column of every weight of a row, -1 where it is dead in all rows.
        row_tiles, row_pad: tiles of rows of a part, and rows of a part rounded up to whole tiles.
        covers: whether every list has an entry.
        pairs: number of live pairs (tile of rows, block of columns), E where there is one class.
        live_columns: mean number of columns (not padded) that a row tile walks through; for counting operations.
    """

    blocks: Blocks
    entries: Tensor
    starts: Tensor
    columns: Tensor
    places: Tensor
    row_tiles: int
    row_pad: int
    covers: bool
    pairs: int
    live_columns: float


def classes_of(geometry: Geometry, mirrored: bool) -> list[tuple[int, int]]:
    """Pixels of the written map modulo its step: one class for the result, stride^2 for the gradient of the input."""
    height, width = geometry.stride if mirrored else (1, 1)
    return list(itertools.product(range(height), range(width)))


def tap_offsets(tap: tuple[int, int], place: tuple[int, int], geometry: Geometry, mirrored: bool) -> list[int] | None:
    """(dy, dx) from a pixel of class `place` to the one that the tap reads; None where it reads none."""
    found = []
    for axis in range(2):
        reach = tap[axis] * geometry.dilation[axis] - geometry.padding[axis]
        if not mirrored:
            found.append(reach)
            continue
        distance, rest = divmod(place[axis] - reach, geometry.stride[axis])
        if rest:
            return None
        found.append(distance)
    return found


def build(live: Tensor, blocks: Blocks, geometry: Geometry, device: torch.device) -> Plan:
    """The plan of a mask on the CPU, live (O, I, kh, kw)."""
    weights = live.unflatten(0, (blocks.parts, -1)).any(0)
    if blocks.mirrored:
        weights = weights.transpose(0, 1)
    rows, channels, height, width = weights.shape
    row_tiles = -(-rows // blocks.N)
    row_pad = row_tiles * blocks.N
    taps = [(ky, kx) for ky in range(height) for kx in range(width)]
    # (taps, channels, row tiles): does any row of the tile use this column?
    used = weights.permute(2, 3, 1, 0).reshape(height * width, channels, rows)
    used = _padded(used, 2, row_pad).unflatten(2, (row_tiles, blocks.N)).any(3)
    if blocks.gather:
        pairs = used.any(2).flatten().nonzero().flatten().tolist()
        pairs += [-1] * (-len(pairs) % blocks.K)
        flat = torch.tensor(pairs, dtype=torch.int64)
        lists = used.flatten(0, 1)[flat.clamp(min=0)] & (flat >= 0)[:, None]
        lists = lists.unflatten(0, (-1, blocks.K)).any(1) if len(pairs) else lists
        column_taps, column_channels = flat.div(channels, rounding_mode="floor").clamp(min=0), flat % channels
        column_channels[flat < 0] = -1
        block_taps = [0] * (len(pairs) // blocks.K)
        block_channels = [0] * len(block_taps)
    else:
        groups = -(-channels // blocks.K)
        by_group = _padded(used, 1, groups * blocks.K).unflatten(1, (groups, blocks.K)).any(2)
        placed = by_group.any(2).nonzero().tolist()
        block_taps, block_channels = [tap for tap, _ in placed], [group for _, group in placed]
        lists = by_group[block_taps, block_channels] if placed else by_group.new_zeros(0, row_tiles)
        column_taps = torch.tensor(block_taps, dtype=torch.int64).repeat_interleave(blocks.K)
        first = torch.tensor(block_channels, dtype=torch.int64) * blocks.K
        column_channels = (first[:, None] + torch.arange(blocks.K)).flatten()
        column_channels[column_channels >= channels] = -1
    entries: list[list[int]] = []
    starts = [0]
    for place in classes_of(geometry, blocks.mirrored):
        offsets = [tap_offsets(tap, place, geometry, blocks.mirrored) for tap in taps]
        for tile in range(row_tiles):
            for block in lists[:, tile].nonzero().flatten().tolist():
                offset: list[int] | None = [0, 0] if blocks.gather else offsets[block_taps[block]]
                if offset is not None:
                    entries.append([offset[0], offset[1], block_channels[block], block, tile])
            starts.append(len(entries))
    columns = torch.zeros(COLUMN, len(column_channels), dtype=torch.int32)
    columns[0] = column_channels
    columns[1], columns[2] = column_taps // width, column_taps % width
    if blocks.gather:  # refused with a stride and mirrored taps: there is one class then
        reached = [tap_offsets(tap, (0, 0), geometry, blocks.mirrored) or [0, 0] for tap in taps]
        columns[3:] = torch.tensor(reached, dtype=torch.int32)[column_taps].T
    places = torch.full((channels, height * width), -1, dtype=torch.int32)
    real = (column_channels >= 0).nonzero().flatten()
    places[column_channels[real], column_taps[real]] = real.to(torch.int32)
    lengths = (column_channels >= 0).view(-1, blocks.K).sum(1).float() if len(column_channels) else torch.zeros(0)
    walked = sum(float(lengths[entry[3]]) for entry in entries)
    return Plan(
        blocks=blocks,
        entries=torch.tensor(entries, dtype=torch.int32).view(-1, ENTRY).to(device),
        starts=torch.tensor(starts, dtype=torch.int32).to(device),
        columns=columns.to(device),
        places=places.flatten().to(device),
        row_tiles=row_tiles,
        row_pad=row_pad,
        covers=all(first < last for first, last in itertools.pairwise(starts)),
        pairs=len(entries),
        live_columns=walked / row_tiles,
    )


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


class Known:
    """What was read from a mask (O, I, kh, kw): its state then, its values on the CPU, the plans made of them.

    taps: number of taps with a live weight; box: (top, bottom, left, right) around them, None where there is none.
    """

    def __init__(self, version: int, live: Tensor) -> None:
        self.version, self.live = version, live
        self.digest = hashlib.sha1(live.numpy().tobytes()).digest()
        self.plans: dict[Any, Plan] = {}
        occupied = live.any(0).any(0).nonzero().tolist()
        self.taps = len(occupied)
        self.box: tuple[int, int, int, int] | None = None
        if occupied:
            (top, bottom), (left, right) = ((min(side), max(side) + 1) for side in zip(*occupied, strict=True))
            self.box = (top, bottom, left, right)


_known: Any = WeakTensorKeyDictionary()
_all_live: dict[tuple[int, ...], Known] = {}
_shared: Any = weakref.WeakValueDictionary()  # masks with equal values, those of a model's layers say, share plans


def known_of(mask: Tensor | None, shape: tuple[int, ...]) -> Known:
    """What is known of a mask; None: all of `shape` (O, I, kh, kw) is live.

    The first call with a mask tensor, and each after it was written into, waits for the GPU to read it. Writing
    through `.data` is not seen.
    """
    if mask is None:
        if shape not in _all_live:
            _all_live[shape] = Known(0, torch.ones(shape, dtype=torch.bool))
        return _all_live[shape]
    version = 0 if mask.is_inference() else mask._version
    known = _known.get(mask)
    if known is not None and known.version == version:
        return known
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "masked_conv2d reads a mask once, the first time that it sees it, and cannot do so while a CUDA graph is "
            "captured: run the model once before the capture, with the same mask tensors"
        )
    known = Known(version, mask.detach().cpu().contiguous())
    _known[mask] = known
    return known


def plan_of(known: Known, blocks: Blocks, geometry: Geometry, device: torch.device) -> Plan:
    """The plan of a mask, built on first use."""
    key = (blocks, geometry, device)
    if key not in known.plans:
        shared_key = (known.digest, tuple(known.live.shape), key)
        plan = _shared.get(shared_key)
        if plan is None:
            _shared[shared_key] = plan = build(known.live, blocks, geometry, device)
        known.plans[key] = plan
    return known.plans[key]
