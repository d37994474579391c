"""What runs a product of a masked convolution: a kernel with a launch configuration, or cuDNN.

A rule decides until a GPU was measured: `python -m fastgen.kernels.masked_conv2d.tune` times the candidates of a layer
and cuDNN on this machine's GPU and saves the times as `<GPU>.json` in the folder FASTGEN_TUNED (default
~/.cache/fastgen/masked_conv2d). A measured row overrides the rule, and one in that folder overrides one in `tuned/`
beside this file, which ships. No GPU has been measured yet: nothing ships.
"""

import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastgen.kernels.common import cdiv, next_power_of_2

SHIPPED = Path(__file__).parent / "tuned"
EMULATED: str | None = None  # the chip, "sm_90" say, that CPU tensors count as where kernels are compiled or emulated
ALWAYS_KERNELS = False  # whether the kernels run also where cuDNN is expected to be faster: to compile and to test them


class Tile(NamedTuple):
    """What a program computes: M pixels by N channels (both halves of a gate together) in steps of K columns; for the
    gradient of the weight N rows by K columns in steps of M pixels. tma: it loads by tensor descriptors."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int
    tma: bool = False


class Choice(NamedTuple):
    """provider: "triton" or "cudnn". why: the reason, for people."""

    provider: str
    tile: Tile
    why: str


@dataclass(frozen=True)
class Layer:
    """What a choice depends on.

    direction: "out" (the result), "in" (the gradient of the input), "weight" (its gradient).
    """

    direction: str
    chip: str  # see `chip_of`
    dtype: torch.dtype
    precision: str  # see `precision_of`
    rows: int  # channels written, of both halves with a gate
    channels: int  # channels read
    taps: int  # live ones
    boxed: int  # taps of the smallest box around the live ones, which is what cuDNN multiplies
    pixels: int  # of the written map, in all images
    gated: bool  # whether the product passes a gate
    tma: bool  # whether tensor descriptors can address the maps
    strided: bool = False

    @property
    def key(self) -> str:
        """The name in tables. Pixels are rounded up to a power of two: a choice holds for similar batches."""
        kind, gate = str(self.dtype).removeprefix("torch."), " gated" if self.gated else ""
        sizes = f"{self.channels}->{self.rows}{gate} taps {self.taps}"
        return f"{self.direction} {kind} {sizes} pixels {1 << max(self.pixels - 1, 1).bit_length()}"

    @property
    def gathers(self) -> bool:
        """Whether a block of columns holds several taps: one tap of fewer channels does not fill the least of 16."""
        return self.channels < 16

    @property
    def scalar(self) -> bool:
        """Whether no tensor core computes it."""
        return self.precision == "ieee" and self.dtype == torch.float32

    @property
    def unit(self) -> int:
        """Elements of 16 bytes."""
        return 16 // self.dtype.itemsize


@functools.cache
def _chip_of_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def chip_of(device: torch.device) -> str:
    """The name of the GPU's architecture ("sm_90", "gfx942"), or "interpreter" for the CPU."""
    if device.type != "cuda":
        return EMULATED or "interpreter"
    return _chip_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


def precision_of(x: torch.Tensor) -> str:
    """The `input_precision` of products: TF32 for float32 where PyTorch's setting for convolutions allows it."""
    if EMULATED is None and not x.is_cuda:
        return "float32"
    if x.dtype is not torch.float32:
        return "ieee"
    settings = getattr(torch.backends.cudnn, "conv", None)  # of PyTorch 2.9 and later; the older one warns there
    allowed = torch.backends.cudnn.allow_tf32 if settings is None else settings.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@functools.cache
def has_tma(chip: str) -> bool:
    """Whether kernels can load by descriptors: on Hopper and later, and in the interpreter."""
    known = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    return known and (chip == "interpreter" or (chip.startswith("sm_") and int(chip[3:]) >= 90))


def side_of(channels: int, most: int) -> int:
    """The side of a tile: a power of two in [16, most], half of `most` where that pads the channels by a tenth less."""
    side = min(max(next_power_of_2(channels), 16), most)
    half = side // 2
    return half if half >= 64 and cdiv(channels, side) * side > 1.1 * cdiv(channels, half) * half else side


def default_tile(layer: Layer) -> Tile:
    """128 pixels by 128 channels in 8 warps, less where there is less to do.

    - K: 128 bytes of each pixel (64 channels in half precision, 32 in float32), a cache line, and the swizzle that
      wgmma likes. Less where there are fewer channels. Gathered: 32 columns, or 16 where that pads less.
    - 64 channels in 4 warps where that pads less: 192, three groups of colours.
    - 64 pixels in 4 warps where 128 would leave most of a hundred multiprocessors without a tile.
    - without tensor cores (float32 where TF32 is off): 64 x 64 in steps of 16, within the registers of 4 warps.
    - three stages: 96 KiB of shared memory, two programs on a Hopper multiprocessor. Two on AMD (64 KiB).
    - of the weight's gradient: 128 bytes of each row of pixels. In TF32 on Hopper 64 x 64 in 2 warps, too few for
      wgmma, which wants pixels side by side: transposing takes shared memory 1.6 times as long as smaller tiles do.
    - the interpreter: tiny tiles, so that small tests have several.
    """
    weight, gathers, line = layer.direction == "weight", layer.gathers, 8 * layer.unit
    if layer.chip == "interpreter":
        return Tile(32, 16, 16, 4, 1, layer.tma and not gathers)
    wide, stages = side_of(layer.rows, 128), 3 if layer.chip.startswith("sm_") else 2
    if layer.scalar:
        return Tile(16, min(wide, 64), 32, 4, 2) if weight else Tile(64, min(wide, 64), 16, 4, 2)
    if weight and gathers:  # whose addresses take registers
        return Tile(line, min(wide, 64), 32, 4, stages)
    if weight:
        deep = side_of(layer.channels, 128)
        if layer.chip == "sm_90" and layer.precision == "tf32":
            small = Tile(line, min(wide, 64), min(deep, 64), 2, stages, True)
            return small if layer.tma else Tile(line, min(wide, 32), deep, 4, stages)  # addresses take registers
        return Tile(line, wide, deep, 8 if wide * deep > 64 * 64 else 4, stages, layer.tma and deep >= 32)
    deep = side_of(layer.channels, line)
    if gathers:
        deep = 16 if 0 < layer.taps * layer.channels % 32 <= 16 else 32
    if cdiv(layer.pixels, 128) * cdiv(layer.rows, wide) < 100 or wide < 32:
        return Tile(64, min(wide, 64), deep, 4, stages)
    return Tile(128, wide, deep, 8 if wide > 64 else 4, stages, layer.tma and not gathers and deep == line)


def rule(layer: Layer) -> str:
    """Why cuDNN is expected to be faster than the kernels, "" where it is not; nothing here was measured on a GPU.

    Channels that are no multiple of 16 bytes: tiles are powers of two, and groups of odd sizes end inside of them. The
    PixelRNN with colours (3 x 43 units) would visit 1.92 times its live multiply-adds in the default tiles and 1.33
    times in 32 x 16, the smallest, where loads are of single elements besides; cuDNN visits 1.5 times. A padded pitch
    inside of the map would have to be kept by all that lies between two convolutions, a scan and additions there. All
    other models visit 1.1 times at most (test_masked_conv2d_walk.py).
    """
    weight, unit = layer.direction == "weight", layer.unit
    if layer.strided:
        return "the kernels have no strides"
    if layer.pixels == 0:
        return "there is nothing to compute"
    if layer.chip == "interpreter" or ALWAYS_KERNELS:
        return ""
    if layer.scalar:
        return "float32 without TF32: cuDNN's own kernels keep the arithmetic units busier"
    if layer.dtype == torch.float32 and weight:
        return "gradient of a float32 weight: TF32 products want its pixels side by side"
    if layer.channels >= 16 and (layer.channels % unit or (weight and layer.rows % unit)):
        return f"{layer.channels} channels are no multiple of {unit}, so that loads are narrow"
    if layer.channels >= 16 and layer.taps >= 25 and 1.15 * layer.taps > layer.boxed:
        return f"{layer.taps} of {layer.boxed} taps are live: little is skipped"
    return ""


def choose(device: torch.device, layer: Layer) -> Choice:
    """As measured for this GPU where it was, by the rule and the default otherwise."""
    tile, why = default_tile(layer), rule(layer)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else layer.chip
    known = None if layer.chip == "interpreter" or layer.strided or not layer.pixels else measured(gpu).get(layer.key)
    if known is not None:
        return known._replace(tile=known.tile._replace(tma=known.tile.tma and layer.tma))
    return Choice("cudnn" if why else "triton", tile, f"by rule, not measured{why and ': '}{why}")


# --- measured choices


def own_table(gpu: str) -> Path:
    """Where the measurements of this machine are kept."""
    folder = Path(os.environ.get("FASTGEN_TUNED") or Path.home() / ".cache/fastgen/masked_conv2d")
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") + ".json")


@functools.cache
def measured(gpu: str) -> dict[str, Choice]:
    """Measured choices by `Layer.key`. In the file each is {"provider", "tile": fields of Tile, "ms": {name: time}}.

    Raises:
        ValueError: the file is not what the search writes.
    """
    rows: dict[str, Choice] = {}
    own = own_table(gpu)
    for path in (path for path in (SHIPPED / own.name, own) if path.exists()):
        try:
            for key, row in json.loads(path.read_text())["layers"].items():
                if row["provider"] not in ("triton", "cudnn"):
                    raise ValueError(f"unknown provider {row['provider']!r} for {key!r}")
                times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in row["ms"].items())
                rows[key] = Choice(row["provider"], Tile(**row["tile"]), f"measured: {times}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no table of measured masked convolutions: {error}; remove it") from error
    return rows


def describe(gpu: str) -> str:
    """A line a measured layer: what "auto" runs and why. For reports."""
    lines = [f"  {key}: {choice.provider} ({choice.why})" for key, choice in sorted(measured(gpu).items())]
    head = f"masked_conv2d on {gpu}:"
    return "\n".join([head, *lines]) if lines else f"{head} not yet measured, what runs is chosen by rule"
