"""What ships, for the compile gate: every kernel that a layer of a usual model launches, by chip.

The layers are run on tensors without memory, and the launches noted instead of made.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels import catalogue_entry
from fastgen.kernels.catalogue_entry import Kind
from fastgen.kernels.masked_conv2d import config, launch

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
SAME = ((1, 1), (1, 1), (1, 1))
SPILLS = {"masked_conv2d_weight_kernel": {"sm_100": 40, "sm_120": 8}}  # bytes a thread
REASON = "with Triton 3.6.0, 3.7.1 or 3.9.0, in kernels that hold a tile of sums; of AMD no GPU was at hand"


@contextlib.contextmanager
def noted(chip: str) -> Iterator[dict[Kind, None]]:
    """`catalogue_entry.noted` of this chip, where the kernels run whatever the rule says."""
    before = config.EMULATED, config.ALWAYS_KERNELS
    config.EMULATED, config.ALWAYS_KERNELS = chip, True
    launch.forget()
    try:
        with catalogue_entry.noted() as kinds:
            yield kinds
    finally:
        config.EMULATED, config.ALWAYS_KERNELS = before
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


def launched(chip: str) -> dict[Kind, None]:
    """What the layers of usual models launch."""
    with noted(chip) as kinds:
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
    return kinds


def about(kind: Kind) -> dict[str, Any]:
    kernel, signature, constants = kind
    known, spills = dict(constants), SPILLS.get(kernel.__name__, {})
    precision = known.get("PRECISION")
    by_tensor_cores = precision == "tf32" or (precision == "ieee" and "bf16" in signature[0][1])
    requires = {"sm_90": "wgmma" if known["num_warps"] % 4 == 0 else "mma.sync"} if by_tensor_cores else {}
    return {"requires": requires, "spills": spills, "reason": REASON if spills else ""}


CATALOGUE = catalogue_entry.entries_of({chip: launched(chip) for chip in CHIPS}, about)
