"""Launch configurations of the scans, and their entries in the catalogue."""

import functools
import itertools
from dataclasses import dataclass, replace
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

    @property
    def tile(self) -> dict[str, int]:
        return {"IMAGES": self.IMAGES, "LANES": self.LANES, "U": self.U}

    def images_of_a_program(self, batch: int) -> int:
        """One after the other."""
        return triton.cdiv(batch, self.programs * self.IMAGES)


@dataclass(frozen=True)
class TileLaunch:
    """Scans by tiles of M pixels and U units, in parts of K (a backward, with one product instead of four: 2K).

    groups: of images, each scanned in one launch by so many programs; 0 launches every step for itself, a tile a
    program. More than one program wait for each other, and each looks `patience` times (seconds) before it fails.
    """

    M: int
    U: int
    K: int
    num_warps: int = 4
    groups: int = 0
    programs: int = 1
    patience: int = 2**22

    @property
    def options(self) -> dict[str, Any]:
        """To wait, all programs must run at the same time; what never arrives is an assertion, so compiled in."""
        options = {"num_warps": self.num_warps, "num_stages": 3, **registers()}
        return {**options, "launch_cooperative_grid": True, **ASSERTING} if self.programs > 1 else options


ASSERTING = {"debug": True, "sanitize_overflow": False}


def registers() -> dict[str, int]:
    """ptxas stops at a power of two of its choice, and spills, where it is not told that it may use them all."""
    return {"maxnreg": 255} if torch.version.hip is None else {}


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def full_tiles(device: torch.device) -> bool:
    """Whether a tile of 4096 numbers fits the registers: on Hopper and data-centre Blackwell, whose tensor cores read
    both factors from shared memory."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose(x: Tensor, lanes: int, units: int) -> ScanLaunch | TileLaunch:
    """The launch for x (B, ...) with `lanes` pixels side by side in an image, by what was compiled without spills.

    Up to 64 units it is one launch. Weights and cell states stay with a program where they fit its registers and its
    shared memory: in half precision up to 64 units and 64 lanes (128 lanes of 32 units), or half of that on chips
    without `full_tiles`; in float32 up to 32 and 32 where PyTorch's setting allows TF32, else 16 units and 32 lanes.
    Other sizes go by tiles. More units are too much for one processor: each step is a launch.

    Units that are no multiple of 16 are loaded one by one, which takes more registers: they get half of the largest
    tile, and still spill some words (on sm_90 72 bytes at most).
    """
    batch = x.shape[0]
    single = x.dtype == torch.float32
    most, widest = (4096 if full_tiles(x.device) and units % 16 == 0 else 2048), 64
    if single:
        most, widest = (1024, 32) if arithmetic(x)["PRECISION"] == "tf32" else (512, 16)
    if torch.version.hip is not None:
        most, widest = min(most, 1024), min(widest, 32)
    padded = max(16, triton.next_power_of_2(units))
    slots = triton.next_power_of_2(lanes)
    if slots * padded > most or slots > 128 or padded > widest:
        return scan_by_tiles(x, lanes, units) if units <= 64 else step_by_step(x)
    images = max(1, 16 // slots)  # tensor cores multiply 16 rows at least
    processors = processors_of(x.device)
    while 2 * images * slots <= 64 and 2 * images * slots * padded <= most and batch > images * processors:
        images *= 2  # a step of a larger tile takes hardly longer
    num_warps = 4 if images * slots * padded <= 512 else 8
    # Registers hold two programs of 4 warps at least, and one of 8; a further program would only begin later.
    programs = min(triton.cdiv(batch, images), processors * 8 // num_warps)
    return ScanLaunch(images, slots, padded, programs, num_warps, ahead(single, images * slots * padded, num_warps))


def scan_by_tiles(x: Tensor, lanes: int, units: int) -> TileLaunch:
    """One launch, a program an image or more, for any number of units.

    The tile is the largest without spills, so that weights are read least often.
    """
    padded = min(64, max(16, triton.next_power_of_2(units)))
    if x.dtype != torch.float32:
        tall = padded < 64 or torch.version.hip is not None
        launch = TileLaunch(64 if tall else 32, padded, K=min(32, padded), num_warps=8)
    elif padded == 16:
        launch = TileLaunch(64, 16, K=16, num_warps=8)
    elif torch.version.hip is None:
        launch = TileLaunch(32, 64, K=16, num_warps=8)
    else:
        launch = step_by_step(x)
    groups = min(triton.cdiv(x.shape[0], max(1, launch.M // lanes)), processors_of(x.device))
    return replace(launch, groups=max(1, groups))


def step_by_step(x: Tensor) -> TileLaunch:
    """A launch a step, for any number of units: tiles are small, for many programs."""
    return TileLaunch(16, 32, K=16) if x.dtype == torch.float32 else TileLaunch(32, 32, K=32)


def shared_scan(x: Tensor, lanes: int, units: int) -> TileLaunch:
    """One launch in which programs share the units and pixels of an image, one program a processor.

    Not chosen by `choose`: not yet measured.
    """
    launch = step_by_step(x)
    batch, processors = x.shape[0], processors_of(x.device)
    across = triton.cdiv(units, launch.U)
    images = triton.cdiv(batch, max(1, min(batch, processors // across)))
    groups = triton.cdiv(batch, images)
    programs = min(across * triton.cdiv(images * lanes, launch.M), processors // groups)
    return replace(launch, groups=groups, programs=max(1, programs))


def empty_maps(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(B, channels, H, W) with the batch and the size of `like`, channels-last, uninitialized."""
    size = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def empty_results(gates: Tensor, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """For hidden states, and to train for activated gates and cell states (float32)."""
    channels = gates.shape[1]
    hidden = empty_maps(gates, channels // 4, gates.dtype)
    if not save:
        return hidden, None, None
    return hidden, empty_maps(gates, channels, gates.dtype), empty_maps(gates, channels // 4, torch.float32)


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
    launched there, not on NVIDIA's chips; `tile`: constants, None for an absent pointer."""
    precision = {"fp32": "ieee" if amd else "tf32x3", "tf32": "tf32"}.get(dtype, "ieee")
    fixed = {**tile, "PRECISION": precision, "FAST": dtype == "bf16" and not amd}
    fixed |= {f"{name}_unit_stride": 1 for name in ("gates", "grad")} | {"weight_tap_stride": 1}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    types = {"cell_ptr": "*fp32", "grad_cell_ptr": "*fp32", "arrivals_ptr": "*i32"}
    maps = "*fp32" if dtype == "tf32" else f"*{dtype}"
    signature = {
        name: types.get(name, maps if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in fixed
    }
    aligned = tuple(name for name in signature if name == "units" or name.endswith("_stride"))
    sizes = " ".join(f"{name}={value}" for name, value in tile.items() if type(value) is int)
    kind = f"{dtype}{' shared' if 'arrivals_ptr' in signature else ''}"
    skips = dict.fromkeys(NVIDIA, "compiled with its fast functions") if amd else {AMD: "compiled without NVIDIA's"}
    skips |= more.pop("skips", {})
    options = {**more.pop("options", {}), **({} if amd else {"maxnreg": 255})}
    config = f"{kind} {sizes}{' AMD' if amd else ''}"
    return Entry(kernel, config, signature, fixed, aligned=aligned, skips=skips, options=options, **more)


# dtype, LANES, U, warps: shapes that `choose` gives, with one image side by side
SCAN_SIZES = (
    ("bf16", 32, 16, 4),
    ("bf16", 32, 32, 8),
    ("bf16", 128, 32, 8),
    ("bf16", 32, 64, 8),
    ("bf16", 64, 32, 8),
    ("bf16", 64, 64, 8),
    ("fp16", 64, 64, 8),
    ("fp32", 32, 16, 4),
    ("tf32", 32, 32, 8),
)
AMD_SIZES = (("bf16", 32, 32, 8), ("fp32", 32, 16, 4))

NO_FULL_TILES = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "has no `full_tiles`")
FEW_WORDS = {"spills": {"sm_100": 24}, "reason": "six words, hit in the first-level cache; half a tile would idle"}


def scan_entries(kernel: Any, **constants: Any) -> list[Entry]:
    found = []
    for amd, sizes in ((False, SCAN_SIZES), (True, AMD_SIZES)):
        for dtype, lanes, units, num_warps in sizes:
            tile = {"LANES": lanes, "U": units, "IMAGES": 1, **constants}
            if "AHEAD" in kernel.arg_names:
                tile["AHEAD"] = ahead(dtype in ("fp32", "tf32"), lanes * units, num_warps)
            more: dict[str, Any] = FEW_WORDS if dtype == "tf32" else {}
            if lanes * units == 4096:
                more = {"skips": NO_FULL_TILES}
            found.append(entry(kernel, dtype, tile, amd=amd, num_warps=num_warps, num_stages=1, **more))
    return found


# dtype, M, U, K, warps: what `scan_by_tiles` and `step_by_step` give
TILE_SIZES = (
    ("bf16", 64, 16, 16, 8),
    ("bf16", 64, 32, 32, 8),
    ("bf16", 32, 64, 32, 8),
    ("fp16", 32, 64, 32, 8),
    ("fp32", 64, 16, 16, 8),
    ("fp32", 32, 64, 16, 8),
    ("tf32", 32, 64, 16, 8),
)
AMD_TILE_SIZES = (("bf16", 64, 32, 32, 8), ("bf16", 64, 64, 32, 8), ("fp32", 64, 16, 16, 8))
STEP_SIZES = (("bf16", 32, 32, 32, 4), ("fp32", 16, 32, 16, 4), ("tf32", 16, 32, 16, 4))
AMD_STEP_SIZES = STEP_SIZES[:2]


def tile_entries(kernel: Any, parts: int) -> list[Entry]:
    """Of both scans, and of programs that wait for each other; parts: K of the kernel over that of the launch."""
    found = []
    for taps, (amd, waits, sizes) in itertools.product(
        (2, 3),
        (
            (False, False, TILE_SIZES + STEP_SIZES),
            (False, True, STEP_SIZES),
            (True, False, AMD_TILE_SIZES + AMD_STEP_SIZES),
            (True, True, AMD_STEP_SIZES),
        ),
    ):
        # Looks at the arrivals are loads: many of them would be in each other's way as atomic additions.
        more = {"options": ASSERTING, "requires": {} if amd else dict.fromkeys(NVIDIA, "ld.global.gpu.acquire")}
        for dtype, M, U, K, num_warps in sizes:
            tile = {"M": M, "U": U, "K": parts * K, "TAPS": taps, "ROW_SCAN": taps == 3, "REVERSE": False}
            tile |= {} if waits else {"arrivals_ptr": None}
            found.append(entry(kernel, dtype, tile, amd=amd, num_warps=num_warps, **(more if waits else {})))
    return found
