"""Entries of the scans in the catalogue of the compile gate: what `choice` gives, chip by chip."""

from collections.abc import Iterator
from typing import Any

import triton

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.lstm.choice import ScanLaunch, TileLaunch, launch_of, taps_together, tile_launch_of

CHIPS = {0: ("gfx942",), 8: ("sm_80", "sm_86", "sm_89"), 9: ("sm_90",), 10: ("sm_100",), 12: ("sm_120",)}
# dtype, lanes and units of scans; dtype and units of tiles. "tf32" is float32 where PyTorch's setting allows it.
SCANS = (
    ("bf16", 32, 16),
    ("bf16", 32, 32),
    ("bf16", 128, 32),
    ("bf16", 32, 64),
    ("bf16", 64, 32),
    ("bf16", 64, 64),
    ("fp16", 64, 64),
    ("fp32", 32, 16),
    ("tf32", 32, 32),
)
TILES = (
    ("bf16", 16),
    ("bf16", 32),
    ("bf16", 64),
    ("bf16", 128),
    ("fp16", 128),
    ("fp32", 16),
    ("fp32", 64),
    ("fp32", 128),
    ("tf32", 128),
)
# Triton 3.9 lets all warps wait for each other after each product of more than four of them.
WAITS_AFTER_PRODUCTS = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 7)
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32"}  # of products of float32, on NVIDIA's chips
# Words that ptxas spills where all registers are in use; they are hit in the first cache.
SPILLS_OF_SCANS = {
    4096: {"sm_90": 128, "sm_100": 168},
    2048: {"sm_80": 16, "sm_90": 16, "sm_100": 8, "sm_120": 8},
}  # by numbers of a tile
SPILLS_OF_TILES = {name: 64 for generation, names in CHIPS.items() if generation for name in names}
SPILLS_OF_TF32_TILES = {"sm_100": 8}  # with Triton 3.6.0, of the Row LSTM's backward


def scan_entries(kernel: Any, *, backward: bool, **constants: Any) -> list[Entry]:
    launches: dict[tuple[str, bool, ScanLaunch], list[int]] = {}
    for generation, dtype, lanes, units in ((g, *size) for g in CHIPS for size in SCANS):
        launch = launch_of(generation, 1, PRECISIONS.get(dtype, ""), 1, lanes, units, 2, backward)
        if isinstance(launch, ScanLaunch):
            launches.setdefault((dtype, generation == 0, launch), []).append(generation)
    return list(_entries(kernel, launches, constants))


def tile_entries(kernel: Any, *, backward: bool) -> list[Entry]:
    """Of both scans, and of a Row LSTM with so many taps that they are not taken together."""
    entries: list[Entry] = []
    for taps, sizes in ((2, TILES), (3, TILES), (5, (("bf16", 128),))):
        launches: dict[tuple[str, bool, TileLaunch], list[int]] = {}
        for generation, dtype, units in ((g, *size) for g in CHIPS for size in sizes):
            launch = tile_launch_of(generation, 1, dtype in PRECISIONS, 1, 1, units, taps, backward)
            launches.setdefault((dtype, generation == 0, launch), []).append(generation)
        entries += _entries(kernel, launches, {"TAPS": taps, "ROW_SCAN": taps > 2, "REVERSE": False})
    return entries


def _entries(kernel: Any, launches: dict[Any, list[int]], constants: dict[str, Any]) -> Iterator[Entry]:
    """launches: the generations of chips that take a dtype, on AMD or not, and a launch. Maps have contiguous units,
    sizes are multiples of 16."""
    for (dtype, amd, launch), generations in launches.items():
        if amd and dtype == "tf32":
            continue
        tile = {name: value for name, value in launch.constants.items() if name.isupper()} | constants
        precision = "ieee" if amd else PRECISIONS.get(dtype, "ieee")
        fixed = {**tile, "PRECISION": precision, "FAST": dtype == "bf16" and not amd}
        fixed |= {f"{name}_unit_stride": 1 for name in ("gates", "grad")}
        if isinstance(launch, ScanLaunch):
            fixed["TOGETHER"] = taps_together(launch, 3)
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        kinds = {"cell_ptr": "*fp32", "grad_cell_ptr": "*fp32"}
        maps = "*fp32" if dtype == "tf32" else f"*{dtype}"
        signature = {
            name: kinds.get(name, maps if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
            if name not in fixed
        }
        num_warps, num_stages = launch.num_warps, launch.constants["num_stages"]
        spills: dict[str, int] = {}
        if isinstance(launch, ScanLaunch):
            spills = SPILLS_OF_SCANS.get(launch.LANES * launch.U, {})
        elif launch.CHUNK:
            pass
        elif num_warps == 16 or (dtype == "fp32" and launch.U >= 64):
            spills = SPILLS_OF_TILES
        elif dtype == "tf32":
            spills = SPILLS_OF_TF32_TILES
        # What was reached; three TF32 products go by shared memory. sm_100 has more, and no limit.
        most = 16 if dtype == "fp32" and tile.get("K") == 16 else 13 if dtype == "fp32" else 10
        if chunk := tile.get("CHUNK"):
            most = 5 + (WAITS_AFTER_PRODUCTS and num_warps > 4) * chunk * (3 if dtype == "fp32" else 1)
        sizes = " ".join(f"{name}={value}" for name, value in tile.items() if name in fixed and type(value) is int)
        yield Entry(
            kernel,
            f"{dtype} {sizes} stages={num_stages}{' AMD' if amd else ''}",
            signature,
            fixed,
            aligned=tuple(name for name in signature if name == "units" or name.endswith("_stride")),
            num_warps=num_warps,
            num_stages=num_stages,
            options={} if amd else {"maxnreg": min(255, 2048 // num_warps)},
            spills={} if amd else spills,
            reason="all registers are in use; a few words, hit in the first cache",
            barriers={} if amd else dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), most),
            skips={
                name: "takes another launch" for generation in CHIPS.keys() - generations for name in CHIPS[generation]
            },
        )
