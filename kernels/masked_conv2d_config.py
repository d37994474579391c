"""Launch configurations of the masked convolution: a default for every shape and chip, and measured ones as data.

A default is chosen by rules that hold on every chip. `python -m fastgen.kernels.tune_masked_conv2d` measures the
candidates of a layer on this machine's GPU and saves the best one that passed a numeric check there, together with
cuDNN's times, as `<GPU>.json`: in the folder FASTGEN_TUNED (default ~/.cache/fastgen/masked_conv2d), which is looked up
first, or in `tuned/` beside this file, which ships. No GPU has been measured yet: that folder is empty.
"""

import functools
import importlib.util
import itertools
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "tuned"
PROVIDERS = ("triton", "dense", "cropped")


@dataclass(frozen=True)
class Tile:
    """M pixels by N channels (of each half, with a gate) in steps of K columns. tma: tensor descriptors."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int
    tma: bool = False


@dataclass(frozen=True)
class Layer:
    """What a choice depends on. `pixels` is the number of results of a channel, B * H' * W'.

    direction: "out" (the result), "in" (the gradient of the input), "weight" (its gradient).
    saved: what leads back through an activation on loading; "none" where the gradient is that of the sums.
    """

    direction: str
    dtype: torch.dtype
    rows: int  # channels written, of each half with a gate
    parts: int  # 2 where a gate is passed in this product
    channels: int  # channels read, of each half
    taps: int  # live ones
    pixels: int
    step: int  # product of the strides
    tma: bool  # whether tensor descriptors can address the maps
    saved: str = "none"

    @property
    def key(self) -> str:
        """Name in the tables. Pixels are rounded to a power of two: a choice holds for similar batches."""
        size = 1 << max(self.pixels - 1, 1).bit_length()
        kind = str(self.dtype).removeprefix("torch.")
        shape = f"{self.channels}->{self.parts}x{self.rows} taps {self.taps} step {self.step}"
        through = "" if self.saved == "none" else f" through {self.saved}"
        return f"{self.direction} {kind} {shape} pixels {size}{through}"

    @property
    def after_pass(self) -> "Layer":
        """The same product where a pass has led back through the activation before."""
        whole = {"in": "channels", "weight": "rows"}[self.direction]
        return replace(self, saved="none", parts=1, **{whole: self.parts * getattr(self, whole)})


@functools.cache
def chip_of(device: torch.device) -> str:
    """ "sm_90" and the like, "gfx942" and the like, or "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def has_tma(chip: str) -> bool:
    """Hopper and later, where this Triton takes descriptors made on the host. The interpreter plays them as well."""
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return False
    return chip == "interpreter" or (chip.startswith("sm_") and int(chip[3:]) >= 90)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, kept in [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def gathers(channels: int, mirrored: bool, step: int) -> bool:
    """Below 16 channels a block of one tap would be mostly padding, as a matrix product needs 16 columns at least.

    Not for the gradient of the input with a stride, where taps differ by pixel.
    """
    return channels < 16 and not (mirrored and step > 1)


def meets(layer: Layer, tile: Tile) -> int:
    """How often a product of the backward loads each element of the gradient: once a tap and tile of channels."""
    if layer.direction == "in":
        return layer.taps * -(-layer.rows // tile.N)
    if gathers(layer.channels, False, layer.step):
        return -(-layer.taps * layer.channels // tile.K)
    return layer.taps * -(-layer.channels // tile.K)


def on_load(saved: str, itemsize: int, times: int) -> bool:
    """Whether the products of the backward lead back through the activation as they load the gradient.

    Where that moves fewer bytes than a pass before them, even if no cache helps; counted in
    masked_conv2d_activation.py. times: sum of `meets`.
    """
    loaded, written = {
        "relu": (2 * itemsize, itemsize),
        "sign": (itemsize + 1, itemsize),
        "valve": (3 * itemsize, 2 * itemsize),
    }[saved]
    return times * loaded < loaded + written + times * written


def default_tile(chip: str, layer: Layer, precision: str) -> Tile:
    """128 pixels by 64 (two halves of 64 with a gate, 128 without) in 8 warps, less where there is less to do.

    - K: 128 bytes of each row (64 channels in half precision, 32 in float32): a whole cache line, and the swizzle that
      wgmma likes. Less where there are fewer channels. Gathered: 32 columns, or 16 where that pads less, and in float32
      64 channels at most, as addresses take registers.
    - 64 pixels in 4 warps where 128 would leave most of a hundred multiprocessors without a tile.
    - without tensor cores (float32 where TF32 is off): 64 x 64 in steps of 16, within the registers of 4 warps, or of
      8 through a ReLU on loading.
    - five stages: the pipeline gives two to the entries of the list, which it fetches ahead of the blocks that they
      name, and three to these: 96 KiB of shared memory, two programs on a Hopper multiprocessor. Two on AMD (64 KiB).
    - through an activation on loading: half as deep, as up to three maps and two blocks of weights are buffered.
    - the interpreter: tiny tiles, so that small tests have several.
    """
    if chip == "interpreter":
        return Tile(32, 16, 16, 4, 1, layer.tma)
    if layer.direction == "weight":
        return _weight_tile(chip, layer, precision)
    sums = layer.parts if layer.direction == "out" else 1
    wide = power_of_two(layer.rows, 16, 128 // sums)
    if precision == "ieee" and layer.dtype == torch.float32:
        return Tile(64, min(wide, 64 // sums), 16, 8 if layer.saved in ("relu", "sign") else 4, 2)
    line = (128 if layer.saved == "none" else 64) // layer.dtype.itemsize
    deep = power_of_two(layer.channels, 16, line)
    if gathers(layer.channels, layer.direction == "in", layer.step):
        deep = 16 if 0 < layer.taps * layer.channels % 32 <= 16 else 32
        if layer.dtype == torch.float32:
            wide = min(wide, 64)
    stages = 5 if chip.startswith("sm_") else 2
    tiles = -(-layer.pixels // 128) * -(-layer.rows // wide)
    if tiles < 100 or wide == 16:
        return Tile(64, min(wide, 64), deep, 4, stages)
    return Tile(128, wide, deep, 8, stages, tma=layer.tma and deep == line)


def _weight_tile(chip: str, layer: Layer, precision: str) -> Tile:
    """M pixels a step, sums of N rows (both halves of a gate) by K columns: 128 x 128 in 8 warps, less where there is
    less; without tensor cores 64 x 32. Fewer pixels where they pass an activation on loading, which takes registers."""
    if precision == "ieee" and layer.dtype == torch.float32:
        return Tile(16, power_of_two(layer.rows, 16, 64 // layer.parts), 32, 4, 2)
    n = power_of_two(layer.rows, 16, 128 // layer.parts)
    k = 32 if gathers(layer.channels, False, layer.step) else power_of_two(layer.channels, 16, 128)
    pixels = max(16, {"none": 128, "valve": 32}.get(layer.saved, 64) // layer.dtype.itemsize)
    warps = 8 if layer.parts * n * k > 64 * 64 else 4
    return Tile(pixels, n, k, warps, 3 if chip.startswith("sm_") else 2)


def candidates(chip: str, layer: Layer, precision: str) -> list[Tile]:
    """What the search tries: the default first, then its neighbours in every direction."""
    base = default_tile(chip, layer, precision)
    found = [base]
    deeps = {base.K // 2, base.K, base.K * 2} if layer.direction == "weight" else {base.K // 2, base.K}
    pixels = {base.M // 2, base.M, base.M * 2} if layer.direction == "weight" else {64, 128}
    for tma, m, n, k in itertools.product(
        sorted({False, base.tma}), sorted(pixels), (base.N // 2, base.N, base.N * 2), sorted(deeps)
    ):
        if m >= 16 and 16 <= n <= 128 and 16 <= k <= 128:
            found += [Tile(m, n, k, warps, stages, tma) for warps, stages in itertools.product((4, 8), (2, 3, 5, 7))]
    return list(dict.fromkeys(found))


# --- measured choices


def folder() -> Path:
    """Where this machine's measurements are kept."""
    return Path(os.environ.get("FASTGEN_TUNED") or Path.home() / ".cache/fastgen/masked_conv2d")


def file_name(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") + ".json"


@functools.cache
def measured(gpu: str) -> dict[str, Any]:
    """Measured choices by `Layer.key`: {"provider": one of PROVIDERS, "tile": fields of Tile, "ms": {name: time}}.

    Raises:
        ValueError: the file is not what the search writes.
    """
    found: dict[str, Any] = {}
    for place in (SHIPPED, folder()):
        path = place / file_name(gpu)
        if not path.exists():
            continue
        try:
            layers = json.loads(path.read_text())["layers"]
            for key, row in layers.items():
                if row["provider"] not in PROVIDERS:
                    raise ValueError(f"unknown provider {row['provider']!r} for {key!r}")
                found[key] = {**row, "tile": Tile(**row["tile"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no table of measured masked convolutions: {error}; remove it") from error
    return found


@functools.lru_cache(4096)
def choose(device: torch.device, layer: Layer, precision: str) -> tuple[str, Tile]:
    """(provider, tile): as measured for this GPU where it was, the default otherwise."""
    chip = chip_of(device)
    if chip != "interpreter":
        row = measured(torch.cuda.get_device_name(device)).get(layer.key)
        if row is not None:
            tile: Tile = row["tile"]
            return row["provider"], tile if layer.tma else replace(tile, tma=False)
    return "triton", default_tile(chip, layer, precision)


def save(gpu: str, layers: dict[str, Any], versions: dict[str, str]) -> Path:
    """Adds rows to this machine's table of the GPU; a reader sees the old file or the new one, never a part."""
    path = folder() / file_name(gpu)
    found: dict[str, Any] = {}
    if path.exists():
        found = json.loads(path.read_text())["layers"]
    found |= {key: {**row, "tile": asdict(row["tile"])} for key, row in layers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"gpu": gpu, **versions, "layers": dict(sorted(found.items()))}, file, indent=1)
    os.replace(file.name, path)
    measured.cache_clear()
    choose.cache_clear()
    return path


def describe(gpu: str) -> str:
    """One line a measured layer: what "auto" runs there and why. For reports."""
    rows = measured(gpu)
    if not rows:
        return f"masked_conv2d on {gpu}: not yet measured, the Triton kernel with its default configuration everywhere"
    lines = [f"masked_conv2d on {gpu}, measured:"]
    for key, row in sorted(rows.items()):
        times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in row["ms"].items())
        lines.append(f"  {key}: {row['provider']} ({times})")
    return "\n".join(lines)
