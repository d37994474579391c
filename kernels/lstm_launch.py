"""Launch configurations of the scans, and their entries in the catalogue."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry


@dataclass(frozen=True)
class ScanLaunch:
    """One launch: each program scans images of up to LANES rows (or columns), IMAGES side by side, one after the other.

    U: units, padded. ahead: registers hold what the next step of the backward reads.
    """

    IMAGES: int
    LANES: int
    U: int
    programs: int
    num_warps: int
    ahead: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """num_stages: the pipeliner would load states before they are written."""
        return {"num_warps": self.num_warps, "num_stages": 1, **registers()}


@dataclass(frozen=True)
class StepLaunch:
    """One launch a step: a tile of M pixels and U units, in steps of K."""

    M: int
    U: int
    K: int
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **registers()}


def registers() -> dict[str, int]:
    """ptxas stops at a power of two of its choice, and spills, where it is not told that it may use them all."""
    return {"maxnreg": 255} if torch.version.hip is None else {}


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose(x: Tensor, lanes: int, units: int) -> ScanLaunch | StepLaunch:
    """The launch for x (B, ...) with `lanes` pixels side by side in an image, by what was compiled without spills.

    A single launch where the program's part of the weights and its tile fit registers and shared memory of every chip:
    up to 64 units and 64 lanes (128 lanes of 32 units) in half precision, 32 and 32 in float32 where PyTorch's setting
    allows TF32, else 16 units and 32 lanes.
    """
    batch = x.shape[0]
    most = 4096
    if x.dtype == torch.float32:
        most = 1024 if arithmetic(x)["PRECISION"] == "tf32" else 512
    if torch.version.hip is not None:
        most = min(most, 1024)
    lanes, padded = triton.next_power_of_2(lanes), max(16, triton.next_power_of_2(units))
    if lanes * padded > most or lanes > 128 or padded * padded > most:
        return StepLaunch(16, 32, K=16) if x.dtype == torch.float32 else StepLaunch(32, 32, K=32)
    images = max(1, 16 // lanes)  # tensor cores multiply 16 rows at least
    processors = processors_of(x.device)
    while 2 * images * lanes <= 64 and 2 * images * lanes * padded <= most and batch > images * processors:
        images *= 2  # a step of a larger tile takes hardly longer
    programs = min(triton.cdiv(batch, images), 2 * processors)
    num_warps = 4 if images * lanes * padded <= 512 else 8
    single = x.dtype == torch.float32
    return ScanLaunch(images, lanes, padded, programs, num_warps, ahead(single, images * lanes * padded, num_warps))


def empty_maps(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(B, channels, H, W) with the batch and the size of `like`, channels-last, uninitialized."""
    size = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def ahead(single: bool, tile: int, num_warps: int) -> bool:
    """Not in float32, and not for 16 numbers of a tile a thread: the registers are full."""
    return not single and tile // (32 * num_warps) < 16


def arithmetic(x: Tensor) -> dict[str, Any]:
    """PRECISION and FAST for this dtype and chip.

    float32 keeps its precision on tensor cores by three TF32 products, or one where PyTorch's setting allows TF32.
    bfloat16 has 8 bits of precision: the fast hyperbolic tangent is good to 11.
    """
    if not x.is_cuda:
        return {"PRECISION": "float32", "FAST": False}
    nvidia = torch.version.hip is None
    if x.dtype != torch.float32 or not nvidia:
        return {"PRECISION": "ieee", "FAST": nvidia and x.dtype == torch.bfloat16}
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": "tf32x3" if exact else "tf32", "FAST": False}


AMD = "gfx942"
NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def entry(kernel: Any, dtype: str, tile: dict[str, Any], *, amd: bool = False, **more: Any) -> Entry:
    """Maps with contiguous units, sizes that are multiples of 16. dtype "tf32" is fp32 where that is allowed; `amd`: as
    launched there, not on NVIDIA's chips."""
    precision = {"fp32": "ieee" if amd else "tf32x3", "tf32": "tf32"}.get(dtype, "ieee")
    kind = "fp32" if dtype == "tf32" else dtype
    fixed = {**tile, "PRECISION": precision, "FAST": dtype == "bf16" and not amd}
    fixed |= {f"{name}_unit_stride": 1 for name in ("gates", "grad")} | {"weight_tap_stride": 1}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    floats = ("cell_ptr", "grad_cell_ptr")
    signature = {
        name: "*fp32" if name in floats else f"*{kind}" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
        if name not in fixed
    }
    aligned = tuple(name for name in signature if name == "units" or name.endswith("_stride"))
    sizes = " ".join(f"{name}={value}" for name, value in tile.items() if type(value) is int)
    skips = dict.fromkeys(NVIDIA, "compiled with its fast functions") if amd else {AMD: "compiled without NVIDIA's"}
    config = f"{dtype} {sizes}{' AMD' if amd else ''}"
    options = {} if amd else {"maxnreg": 255}
    return Entry(kernel, config, signature, fixed, aligned=aligned, skips=skips, options=options, **more)


# dtype, LANES, U, warps: shapes that `choose` gives, with one image side by side
SCAN_SIZES = (
    ("bf16", 32, 16, 4),
    ("bf16", 32, 32, 8),
    ("bf16", 128, 32, 8),
    ("bf16", 32, 64, 8),
    ("bf16", 64, 64, 8),
    ("fp16", 64, 64, 8),
    ("fp32", 32, 16, 4),
    ("tf32", 32, 32, 8),
)
AMD_SIZES = (("bf16", 32, 32, 8), ("fp32", 32, 16, 4))


# A tile at the limit of `choose` fills the registers; half of it would leave tensor cores and lanes idle. The others
# lack a word or two, hit in the first-level cache. Hopper, for which the tiles were chosen, spills nothing.
FULL_TILE = {"sm_80": 264, "sm_86": 264, "sm_89": 264, "sm_100": 40, "sm_120": 496}
OTHER_TILE = {"sm_100": 8, "sm_120": 24}


def scan_entry(
    kernel: Any, dtype: str, lanes: int, units: int, num_warps: int, *, amd: bool = False, **constants: Any
) -> Entry:
    tile = {"LANES": lanes, "U": units, "IMAGES": 1, **constants}
    if "AHEAD" in kernel.arg_names:
        tile["AHEAD"] = ahead(dtype in ("fp32", "tf32"), lanes * units, num_warps)
    full = lanes * units == 4096
    spills = FULL_TILE if full else OTHER_TILE
    reason = "registers are full" if full else "a word or two more than the registers hold"
    return entry(kernel, dtype, tile, amd=amd, num_warps=num_warps, num_stages=1, spills=spills, reason=reason)
