"""Which weights of a masked convolution are visited, as a few integers that are read from the mask once.

Taps are counted in raster order within the smallest box that holds all live ones; all from the first to the last live
tap are visited. That is exact for the masks of autoregressive models, which show what comes before a pixel; between,
zero weights are multiplied. Of the last tap a colour sees a prefix of the channels alone (`causal_mask`), so that a
tile of rows (output channels) walks through as many of them as its last row sees.
"""

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Of a convolution, (height, width) each."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


class Walk(NamedTuple):
    """What is known of a weight (O, I, kh, kw): all but its values.

    Attributes:
        shape, masked: of the weight, and whether it has a mask.
        parts: 2 where the rows are the two halves of a gate.
        box: (top, bottom, left, right) around the live taps.
        first, taps: the first visited tap of the box in raster order, and how many (one at least).
        live: number of live taps, 0 where all is masked.
        group_rows, group_channels, shown: row n of the last tap sees no channel from
            (n // group_rows + shown) * group_channels on; rows counted within each of `parts`.
    """

    shape: torch.Size
    masked: bool
    parts: int
    box: tuple[int, int, int, int]
    first: int
    taps: int
    live: int
    group_rows: int
    group_channels: int
    shown: int
    geometry: Geometry = Geometry()

    @property
    def width(self) -> int:
        return self.box[3] - self.box[2]

    @property
    def boxed(self) -> int:
        """Taps of the box."""
        return (self.box[1] - self.box[0]) * self.width

    def arguments(self, mirrored: bool) -> tuple[int, ...]:
        """The kernels' arguments from `taps` to `shown`; mirrored: for the gradient of the input."""
        sign, (_, padding, dilation) = -1 if mirrored else 1, self.geometry
        origins = (sign * (self.box[2 * axis] * dilation[axis] - padding[axis]) for axis in range(2))
        steps = (sign * step for step in dilation)
        groups = self.group_rows, self.group_channels, self.shown
        return (self.taps, self.first, self.width, *origins, *steps, *groups)


def walk_of(live: Tensor, parts: int, masked: bool = True) -> Walk:
    """What is known of a weight by its mask (O, I, kh, kw) on the CPU."""
    rows, channels = live.shape[0] // parts, live.shape[1]
    occupied = live.any(0).any(0)
    if not occupied.any():
        return Walk(live.shape, masked, parts, (0, 1, 0, 1), 0, 1, 0, rows, channels, 1)
    sides = [occupied.any(1 - axis).nonzero().flatten().tolist() for axis in range(2)]
    box = (sides[0][0], sides[0][-1] + 1, sides[1][0], sides[1][-1] + 1)
    taps = occupied[box[0] : box[1], box[2] : box[3]].flatten().nonzero().flatten().tolist()
    first, last = taps[0], taps[-1]
    width = box[3] - box[2]
    seen = live[:, :, box[0] + last // width, box[2] + last % width].unflatten(0, (parts, rows)).any(0)
    ends = (seen * torch.arange(1, channels + 1)).amax(1)  # what a row sees lies before

    def limits(groups: tuple[int, int, int]) -> Tensor:
        return ((torch.arange(rows) // groups[0] + groups[2]) * groups[1]).clamp(max=channels)

    several = [n for n in (2, 3, 4) if rows % n == channels % n == 0]
    options = [(rows, channels, 1), *((rows // n, channels // n, shown) for n in several for shown in (0, 1))]
    groups = min((g for g in options if (ends <= limits(g)).all()), key=lambda g: int(limits(g).sum()))
    return Walk(live.shape, masked, parts, box, first, last - first + 1, len(taps), *groups)


class Reading:
    """What was read of a mask: its walks by `parts`. Masks that show the same and lie alike in memory share one."""

    def __init__(self, live: Tensor) -> None:
        self.walks = {parts: walk_of(live, parts) for parts in (1, 2) if live.shape[0] % parts == 0}


UNREAD = object()
_readings: weakref.WeakValueDictionary[Any, Reading] = weakref.WeakValueDictionary()
_known: dict[int, tuple[Any, int | None, int, Reading]] = {}  # by id: the mask (weak), its version, its address


def known_reading(mask: Tensor | None) -> Any:
    """What was read of a mask, None of no mask; UNREAD if it never was, or was written to since. A write by way of
    `.data` into the same memory is not noticed."""
    if mask is None:
        return None
    known = _known.get(id(mask))
    if known is None:
        return UNREAD
    of, version, address, reading = known
    same = of() is mask and mask.data_ptr() == address and (version is None or mask._version == version)
    return reading if same else UNREAD


def read(mask: Tensor | None) -> Any:
    """What a mask shows, None of no mask. Waits until the GPU has sent it, unless it was read before.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the mask was not read before.
    """
    reading = known_reading(mask)
    if reading is UNREAD:
        assert mask is not None
        refuse_in_capture(mask, "reads a mask once, the first time that it sees it, and cannot do so", "the same mask")
        reading = Reading(mask.detach().cpu())
        address = mask.data_ptr()
        kind = (*reading.walks.values(), mask.stride(), mask.dtype, mask.get_device(), address % 16)
        reading = _readings.setdefault(kind, reading)
        place, version = id(mask), None if mask.is_inference() else mask._version
        _known[place] = (weakref.ref(mask, lambda _: _known.pop(place, None)), version, address, reading)
    return reading


@functools.lru_cache(4096)
def all_live(shape: torch.Size, parts: int) -> Walk:
    return walk_of(torch.ones(shape, dtype=torch.bool), parts, masked=False)


def known_walk(mask: Tensor | None, shape: torch.Size, parts: int, geometry: Any = ()) -> Walk:
    """The walk of a mask; None: all of `shape` (O, I, kh, kw) is live. Raises as `read`."""
    walk = all_live(shape, parts) if mask is None else read(mask).walks[parts]
    return walk._replace(geometry=Geometry(*geometry))


def refuse_in_capture(x: Tensor, what: str, how: str) -> None:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"masked_conv2d {what} while a CUDA graph is captured: run the model once before the capture, with {how}"
        )
