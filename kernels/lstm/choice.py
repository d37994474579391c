"""How a scan is launched: what there is, and what is chosen."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, next_power_of_2, processors_of, tf32_allowed


@dataclass(frozen=True)
class ScanLaunch:
    """One launch: each program scans images of up to LANES rows (or columns), IMAGES side by side, one after the other.

    U: units, padded.
    """

    IMAGES: int
    LANES: int
    U: int
    programs: int
    num_warps: int

    @property
    def constants(self) -> dict[str, Any]:
        """num_stages: the pipeliner would load states before they are written."""
        tile = {"IMAGES": self.IMAGES, "LANES": self.LANES, "U": self.U}
        return {**tile, "num_warps": self.num_warps, "num_stages": 1, **registers(self.num_warps)}

    def images_of_a_program(self, batch: int) -> int:
        """One after the other."""
        return cdiv(batch, self.programs * self.IMAGES)


@dataclass(frozen=True)
class TileLaunch:
    """One launch: each program scans its images by tiles of M pixels and U units. A tile adds up its products in parts,
    of TOGETHER times K states. With a CHUNK, weights go to registers in fragments: PARTS of a neighbour, whose
    states go to shared memory CHUNK parts at a time. WHOLE: each has K states, none is padded.

    num_stages: 2 where tensor cores read both factors from shared memory, which then holds two parts, 1 with a CHUNK,
    elsewhere 3.
    """

    M: int
    U: int
    K: int
    programs: int
    num_warps: int = 4
    TOGETHER: int = 1
    num_stages: int = 3
    PARTS: int = 0
    CHUNK: int = 0
    WHOLE: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        names = ("M", "U", "K", "TOGETHER", "PARTS", "CHUNK", "WHOLE")
        tile = {name: getattr(self, name) for name in names} | {"WARPS": self.num_warps}
        return {**tile, "num_warps": self.num_warps, "num_stages": self.num_stages, **registers(self.num_warps)}


@functools.cache
def registers(num_warps: int) -> dict[str, int]:
    """ptxas stops at a power of two of its choice, and spills, where it is not told that it may use them all."""
    return {"maxnreg": min(255, 2048 // num_warps)} if torch.version.hip is None else {}


@functools.cache
def generation_of(device: torch.device) -> int:
    """The compute capability of NVIDIA's chip, the number before the point; 0 on AMD's; 9 where there is none."""
    if device.type != "cuda":
        return 9
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def full_tiles(generation: int) -> bool:
    """Whether a tile of 4096 numbers fits the registers: on Hopper and data-centre Blackwell, whose tensor cores read
    both factors from shared memory."""
    return generation in (9, 10)


def constants_of(launch: ScanLaunch | TileLaunch, x: Tensor) -> dict[str, Any]:
    """Tile, options of the compiler, and arithmetic for the dtype and chip of x."""
    return {**arithmetic(x), **launch.constants}


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
    return {"PRECISION": "tf32" if tf32_allowed() else "tf32x3", "FAST": False}


def choose(x: Tensor, lanes: int, units: int, taps: int = 2, *, backward: bool = False) -> ScanLaunch | TileLaunch:
    """The launch for x (B, ...) with `lanes` pixels side by side in an image, by what was compiled without spills.

    Weights and cell states stay with a program where they fit its registers and its shared memory: in half precision
    up to 64 units and 64 lanes (128 lanes of 32 units), or half of that on chips without `full_tiles`; in float32 up to
    32 and 32 where PyTorch's setting allows TF32, else 16 units and 32 lanes. Other sizes go by tiles. All of it is one
    launch a scan: 2 * N launches of a step would cost the host more than the GPU.

    Units that are no multiple of 16 are loaded one by one, which takes more registers: they get half of the largest
    tile, and still spill some words (on sm_90 72 bytes at most).
    """
    return launch_of(*_chip_and_precision(x), x.shape[0], lanes, units, taps, backward)


def scan_by_tiles(x: Tensor, lanes: int, units: int, taps: int = 2, *, backward: bool = False) -> TileLaunch:
    """One launch, a program an image or more, for any number of units."""
    generation, processors, single = _chip_and_precision(x)
    return tile_launch_of(generation, processors, bool(single), x.shape[0], lanes, units, taps, backward)


def _chip_and_precision(x: Tensor) -> tuple[int, int, str]:
    """Its generation and number of processors; the precision of products of float32, "" in half precision."""
    single = arithmetic(x)["PRECISION"] if x.dtype == torch.float32 else ""
    return generation_of(x.device), processors_of(x.device), single


@functools.lru_cache(1024)
def launch_of(
    generation: int, processors: int, single: str, batch: int, lanes: int, units: int, taps: int, backward: bool
) -> ScanLaunch | TileLaunch:
    most, widest = (4096 if full_tiles(generation) and units % 16 == 0 else 2048), 64
    if single:
        most, widest = (1024, 32) if single == "tf32" else (512, 16)
    if generation == 0:
        most, widest = min(most, 1024), min(widest, 32)
    padded = max(16, next_power_of_2(units))
    slots = next_power_of_2(lanes)
    if slots * padded > most or slots > 128 or padded > widest:
        return tile_launch_of(generation, processors, bool(single), batch, lanes, units, taps, backward)
    images = max(1, 16 // slots)  # tensor cores multiply 16 rows at least
    while 2 * images * slots <= 64 and 2 * images * slots * padded <= most and batch > images * processors:
        images *= 2  # a step of a larger tile takes hardly longer
    num_warps = warps_of(images * slots * padded)
    # Registers hold two programs of 4 warps at least, and one of more; a further program would only begin later.
    programs = min(cdiv(max(batch, 1), images), processors * max(1, 8 // num_warps))
    return ScanLaunch(images, slots, padded, programs, num_warps)


def warps_of(tile: int) -> int:
    """For a tile of so many numbers: a thread has 4, or 8 of the largest tile, which then fit its registers.

    There is no choice to be measured between 4 and 8 warps. Instructions of a warp and barriers in a step, forward and
    backward, counted on sm_90 in bfloat16: 32 lanes of 64 units take 4 warps 921 in 12 and 1102 in 10, 8 warps 518 in
    10 and 617 in 8, 16 warps 285 in 8 and 407 in 8. 16 lanes of 16 units take 4 warps 190 and 231, 8 warps 153 and 164,
    in 8 barriers each: all processors' schedulers are busy with 4, and 8 execute 1.4 to 1.6 times as much in all.
    """
    return 4 if tile <= 512 else 8 if tile <= 1024 else 16


def taps_together(launch: ScanLaunch, taps: int) -> int:
    """Of the Row LSTM's forward, a power of two: 1 where weights of several taps would spill."""
    large = launch.U >= 64 or launch.IMAGES * launch.LANES * launch.U >= 4096
    return 1 if large else min(next_power_of_2(taps), 128 // launch.U)


def tile_launch_of(
    generation: int, processors: int, single: bool, batch: int, lanes: int, units: int, taps: int, backward: bool
) -> TileLaunch:
    """The largest tile without more than a few words of spills reads weights least often, and the largest parts that
    shared memory holds wait least often: a step takes 2 barriers a part, and about 4 a tile. The backward has one
    product instead of four, and the larger parts."""
    padded = min(128, max(16, next_power_of_2(units)))
    full = full_tiles(generation)
    together, num_stages, parts, chunk, whole = 1, 3, 0, 0, False
    if generation == 0:
        M, U, K, num_warps = (16, 32, 16, 4) if single and padded > 16 else (64, min(64, padded), min(32, padded), 8)
        K *= 2 if backward else 1
    elif padded == 16:
        M, U, K, num_warps = 64, 16, 32 if backward else 16, 8
    elif single and generation == 9:
        U = 128 if backward and padded == 128 else 64
        M, K, num_warps, num_stages = 32, 16, 4 if backward and U == 64 else 8, 1
        channels = (4 if backward else 1) * units
        parts, whole = cdiv(channels, K), channels % K == 0
        most = 12 if whole and not backward and (taps, parts) == (3, 8) else 8  # a larger one spills
        chunk = max(size for size in range(1, most + 1) if taps * parts % size == 0)
    elif single:
        U = 128 if backward and padded == 128 else 64
        M, K, num_warps = 32, 32, 4 if full and backward and U == 64 else 8
        if backward:  # 64 states fill the shared memory of sm_86; smaller products spill less
            K, together = (32, 2) if U == 64 else (16, 4)
    elif padded == 32:
        M, U, K, num_warps = 64, 32, 64 if backward else 32, 8
    elif backward:
        K = 256 if full else 128 if generation == 8 and padded == 128 else 64  # on sm_120 larger ones spill
        M, U, num_warps = 32, padded, 16 if padded == 128 else 8
        num_stages = 2 if generation == 9 else 3
    else:
        together = taps if full and taps in (2, 3) else 1
        K = 64 if full and together == 1 else 32
        M, U, num_warps = 32, padded, 16 if padded == 128 else 8
        num_stages = 2 if generation == 9 else 3
    programs = max(1, min(cdiv(batch, max(1, M // lanes)), processors))
    return TileLaunch(M, U, K, programs, num_warps, together, num_stages, parts, chunk, whole)
