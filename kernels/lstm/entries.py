"""Entries of the scans in the catalogue of the compile gate."""

import itertools
from typing import Any

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.lstm.choice import warps_of

AMD = "gfx942"
NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def entry(kernel: Any, dtype: str, tile: dict[str, Any], *, amd: bool = False, **more: Any) -> Entry:
    """Maps with contiguous units, sizes that are multiples of 16. dtype "tf32" is fp32 where that is allowed; `amd`: as
    launched there, not on NVIDIA's chips; `tile`: constants, None for an absent pointer."""
    precision = {"fp32": "ieee" if amd else "tf32x3", "tf32": "tf32"}.get(dtype, "ieee")
    fixed = {**tile, "PRECISION": precision, "FAST": dtype == "bf16" and not amd}
    fixed |= {f"{name}_unit_stride": 1 for name in ("gates", "grad")}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    types = {"cell_ptr": "*fp32", "grad_cell_ptr": "*fp32"}
    maps = "*fp32" if dtype == "tf32" else f"*{dtype}"
    signature = {
        name: types.get(name, maps if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in fixed
    }
    aligned = tuple(name for name in signature if name == "units" or name.endswith("_stride"))
    sizes = " ".join(f"{name}={value}" for name, value in tile.items() if type(value) is int)
    skips = dict.fromkeys(NVIDIA, "compiled with its fast functions") if amd else {AMD: "compiled without NVIDIA's"}
    skips |= more.pop("skips", {})
    # What was reached; on sm_90 three TF32 products of 16 units go by shared memory. sm_100 has more, and no limit.
    most = 16 if dtype == "fp32" and tile.get("K") == 16 else 10
    barriers = {} if amd else dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), most)
    options = {} if amd else {"maxnreg": min(255, 2048 // more["num_warps"])}
    config = f"{dtype} {sizes}{' AMD' if amd else ''}"
    return Entry(
        kernel, config, signature, fixed, aligned=aligned, skips=skips, options=options, barriers=barriers, **more
    )


# dtype, LANES, U: shapes that `choose` gives, with one image side by side
SCAN_SIZES = (
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
AMD_SIZES = (("bf16", 32, 32), ("fp32", 32, 16))

NO_FULL_TILES = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "has no `full_tiles`")
SPILLS = {
    4096: {"sm_90": 128, "sm_100": 168},
    2048: {"sm_80": 16, "sm_90": 16, "sm_100": 8, "sm_120": 8},
}  # by numbers of a tile


def scan_entries(kernel: Any, **constants: Any) -> list[Entry]:
    entries = []
    for amd, sizes in ((False, SCAN_SIZES), (True, AMD_SIZES)):
        for dtype, lanes, units in sizes:
            tile = {"LANES": lanes, "U": units, "IMAGES": 1, **constants}
            more: dict[str, Any] = {"skips": NO_FULL_TILES} if lanes * units == 4096 else {}
            if not amd and lanes * units in SPILLS:
                more |= {
                    "spills": SPILLS[lanes * units],
                    "reason": "16 warps have 128 registers; hit in the first cache",
                }
            more |= {"num_warps": warps_of(lanes * units), "num_stages": 1}
            entries.append(entry(kernel, dtype, tile, amd=amd, **more))
    return entries


# dtype, M, U, K, warps: what `scan_by_tiles` gives on NVIDIA's chips; those of the largest K need `full_tiles`
FORWARD_TILES = (
    ("bf16", 64, 16, 16, 8),
    ("bf16", 64, 32, 32, 8),
    ("bf16", 32, 64, 32, 8),
    ("bf16", 32, 64, 64, 8),
    ("bf16", 32, 128, 32, 16),
    ("bf16", 32, 128, 64, 16),
    ("fp16", 32, 128, 64, 16),
    ("fp32", 64, 16, 16, 8),
    ("fp32", 32, 64, 32, 8),
    ("tf32", 32, 64, 32, 8),
)
BACKWARD_TILES = (
    ("bf16", 64, 16, 32, 8),
    ("bf16", 64, 32, 64, 8),
    ("bf16", 32, 64, 64, 8),
    ("bf16", 32, 64, 128, 8),
    ("bf16", 32, 128, 64, 16),
    ("bf16", 32, 128, 128, 16),
    ("fp16", 32, 128, 128, 16),
    ("fp32", 64, 16, 32, 8),
    ("fp32", 32, 64, 32, 4),
    ("fp32", 32, 128, 32, 8),
    ("tf32", 32, 128, 32, 8),
)
AMD_TILES = (("bf16", 64, 32, 32, 8), ("bf16", 64, 64, 32, 8), ("fp32", 64, 16, 16, 8), ("fp32", 16, 32, 16, 4))


def tile_entries(kernel: Any, sizes: tuple[tuple[str, int, int, int, int], ...]) -> list[Entry]:
    """Of both scans."""
    twice = sizes is BACKWARD_TILES
    on_amd = tuple((dtype, M, U, K * (2 if twice else 1), num_warps) for dtype, M, U, K, num_warps in AMD_TILES)
    entries = []
    for taps, (amd, tiles) in itertools.product((2, 3), ((False, sizes), (True, on_amd))):
        for dtype, M, U, K, num_warps in tiles:
            tile = {"M": M, "U": U, "K": K, "TAPS": taps, "ROW_SCAN": taps == 3, "REVERSE": False}
            largest = not amd and max(size[3] for size in sizes) == K
            more: dict[str, Any] = {"skips": NO_FULL_TILES} if largest else {}
            if not amd and (num_warps == 16 or (dtype, U) == ("fp32", 64)):
                more |= {
                    "spills": dict.fromkeys(NVIDIA, 64),
                    "reason": "terms wait for the products; a few words a tile",
                }
            entries.append(entry(kernel, dtype, tile, amd=amd, num_warps=num_warps, **more))
    return entries
