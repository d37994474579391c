"""What ships, for the compile gate: every kernel that a layer of a usual model launches, by chip.

The layers are run on tensors without memory, and the launches noted instead of made.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import Launches
from fastgen.kernels.masked_conv2d import config, launch

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}
SAME = ((1, 1), (1, 1), (1, 1))
SPILLS = {  # bytes a thread, by what follows "masked_conv2d_" in a kernel's name
    "weight_kernel": {"sm_100": 40, "sm_120": 8},
}
REASON = "with Triton 3.6.0, 3.7.1 or 3.9.0, in kernels that hold a tile of sums; of AMD no GPU was at hand"
Kind = tuple[Any, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]  # kernel, signature, constants and options


@contextlib.contextmanager
def noted(chip: str) -> Iterator[dict[Kind, None]]:
    """Inside, launches are not made: what Triton would compile for them on this chip, each once."""
    kinds: dict[Kind, None] = {}

    def note(self: Any, *tensors: Any) -> None:
        signature, constants = {}, dict(self.constants)
        for name, value in zip(self.kernel.arg_names, tensors + self.arguments, strict=False):
            if value is None:
                constants[name] = value
            elif isinstance(value, (int, float)):
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            elif isinstance(value, Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            else:
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        kinds[self.kernel, tuple(signature.items()), tuple(constants.items())] = None

    before = Launches.start, config.EMULATED, config.ALWAYS_KERNELS
    Launches.start, config.EMULATED, config.ALWAYS_KERNELS = note, chip, True  # type: ignore
    launch.forget()
    try:
        yield kinds
    finally:
        Launches.start, config.EMULATED, config.ALWAYS_KERNELS = before  # type: ignore
        launch.forget()


@functools.cache  # a mask is read once
def mask_of(outputs: int, channels: int) -> Tensor:
    mask = torch.zeros(outputs, channels, 3, 3, dtype=torch.bool)
    mask.view(outputs, channels, 9)[..., :5] = True
    return mask


def run_layer(
    dtype: torch.dtype, activation: str, channels: int, *, results: int = 128, batch: int = 128, adds: bool = False,
) -> None:  # fmt: skip
    """Forward and backward of a masked 3x3 layer on maps of 32x32; adds: to a gate a second map, and its sums are used;
    a residual where there is no activation."""

    def feature_map(channels: int) -> Tensor:
        size = (batch, channels, 32, 32)
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    gated = activation == "gated"
    outputs = 2 * results if gated else results
    mask = mask_of(outputs, channels)
    x, result = feature_map(channels), feature_map(results)
    weight = torch.empty(mask.shape, dtype=dtype, device="meta")
    bias, condition = weight.new_empty(outputs), weight.new_empty(batch, outputs) if gated else None
    other = feature_map(256) if adds and gated else None
    other_weight = weight.new_empty(outputs, 256, 1, 1) if adds and gated else None
    residual = result if adds and activation == "none" else None
    keep = "" if not gated else "both" if adds else "valve"
    tensors = (x, weight, mask, bias, condition, residual, other, other_weight)
    out, kept, plans = launch.forward(*tensors, SAME, activation, keep)
    used = feature_map(256) if keep == "both" else None
    wanted = (channels >= 16, True, True, False, other is not None, other is not None)
    given = (result, used, x, weight, mask, out, kept, other, other_weight)
    launch.backward(*given, SAME, keep or activation, wanted, plans)


def run_layers() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        run_layer(dtype, "gated", 128)
        run_layer(dtype, "none", 128, adds=True)
        run_layer(dtype, "none", 192, results=192, adds=True)
    run_layer(torch.bfloat16, "gated", 128, adds=True)
    run_layer(torch.bfloat16, "gated", 128, batch=2)
    run_layer(torch.bfloat16, "relu", 128)
    run_layer(torch.float32, "relu", 3)
    with torch.backends.cudnn.flags(allow_tf32=False):
        run_layer(torch.float32, "gated", 128)


def entries() -> list[Entry]:
    chips: dict[Kind, list[str]] = {}
    for chip in CHIPS:
        with noted(chip) as kinds:
            run_layers()
        for kind in kinds:
            chips.setdefault(kind, []).append(chip)
    made = []
    for (kernel, signature, constants), on in chips.items():
        fixed = dict(constants)
        more: dict[str, Any] = {name: fixed.pop(name) for name in ("num_warps", "num_stages") if name in fixed}
        types = dict(signature)
        words = [str(value) for name, value in fixed.items() if name.isupper() and value != ""]
        words += [f"no {name.split('_')[0]}" for name, value in fixed.items() if value is None]
        matrix = fixed.get("PRECISION") == "tf32" or (fixed.get("PRECISION") == "ieee" and "bf16" in signature[0][1])
        skips = {chip: "is launched otherwise there" for chip in CHIPS if chip not in on}
        more |= {"requires": {"sm_90": "wgmma"} if matrix and "sm_90" in on else {}, "skips": skips}
        spills = SPILLS.get(kernel.__name__.removeprefix("masked_conv2d_"))
        more |= {"spills": spills, "reason": REASON} if spills else {}
        made.append(Entry(kernel, " ".join((signature[0][1], *words)), types, fixed, **more))
    return made


CATALOGUE = entries()
