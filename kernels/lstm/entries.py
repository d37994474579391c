"""Entries of the scans in the catalogue of the compile gate."""

import itertools
from typing import Any

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.lstm.choice import ASSERTING, ahead

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
