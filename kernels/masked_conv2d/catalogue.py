"""What ships, for the compile gate: the kernels with the default configurations of large layers, by chip."""

from typing import Any

import torch

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.masked_conv2d import backward, forward
from fastgen.kernels.masked_conv2d.config import Layer, Tile, default_tile

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WGMMA = {"sm_90": "wgmma"}


def entry(kernel: Any, config: str, dtype: str, fixed: dict[str, Any], tile: Tile | None = None, **more: Any) -> Entry:
    """`fixed`: constexprs, absent tensors and descriptors' types."""
    kinds = {"mask_ptr": "*i1", "partial_ptr": "*fp32", "sums_ptr": "*fp32", "sign_ptr": "*i1"}
    kinds |= {name: kind for name, kind in fixed.items() if str(kind).startswith("tensordesc")}
    if fixed.get("KEEP") == "sign":
        kinds["kept_ptr"] = "*i1"
    if fixed.get("SAVED") == "sign":
        kinds["first_ptr"] = "*i1"
    constants = {name: value for name, value in fixed.items() if name not in kinds or value is None}
    signature = {
        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
    options = {} if tile is None else {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Entry(kernel, config, signature, constants, **options, **more)


def layers(direction: str, dtype: str, *, gated: bool = False, pixels: int = 2**17, channels: int = 128) -> Layer:
    rows = 256 if gated or direction == "weight" else 128
    return Layer(direction, DTYPES[dtype], rows, channels, 5, pixels, 1, gated, True)


def by_tile(layer: Layer, precision: str, tma: bool) -> dict[Tile, dict[str, str]]:
    """The default tiles of a layer on all chips, each with the chips that it does not run on."""
    found: dict[Tile, list[str]] = {}
    for chip in CHIPS:
        tile = default_tile(chip, layer, precision)._replace(tma=tma)
        if not tma or (chip.startswith("sm_") and int(chip[3:]) >= 90):
            found.setdefault(tile, []).append(chip)
    reason = "is not the default there" if not tma else "has no tensor memory accelerator"
    return {tile: {chip: reason for chip in CHIPS if chip not in chips} for tile, chips in found.items()}


def product_entries(dtype: str, precision: str, *, gated: bool, tma: bool, **of_layer: Any) -> list[Entry]:
    """With a gate a second map, an image's own bias and what is kept; without, a residual, as from the last layer of a
    block; the gradient of the input where `mirrored`."""
    mirrored = of_layer.pop("mirrored", False)
    layer = layers("in" if mirrored else "out", dtype, gated=gated, **of_layer)
    unit = 16 // DTYPES[dtype].itemsize
    found = []
    for tile, skips in by_tile(layer, precision, tma).items():
        fixed: dict[str, Any] = {
            "MIRRORED": mirrored, "OUT_UNIT": unit, "ACTIVATION": "gated" if gated else "none",
            "KEEP": "valve" if gated else "", "FAST": dtype == "bf16" and "gfx942" in skips,
            "PRECISION": precision, "N": tile.N, "K": tile.K, "residual_channel": 1,
        }  # fmt: skip
        absent = ["residual"] if gated else ["other", "condition", *(["residual", "bias"] if mirrored else [])]
        if tma:
            box = f"1,{tile.M // 32},32"
            stored = tile.N // 2 if gated else tile.N
            fixed |= {"IMAGES": 1, "HEIGHT": tile.M // 32, "WIDTH": 32, "sign_ptr": None}
            fixed |= {
                "x_desc": f"tensordesc<{dtype}[{box},{tile.K}]>",
                "other_desc": f"tensordesc<{dtype}[{box},{tile.K}]>",
            }
            fixed |= {"packed_desc": f"tensordesc<{dtype}[{tile.N},{tile.K}]>"}
            fixed |= dict.fromkeys(("out_desc", "kept_desc"), f"tensordesc<{dtype}[{box},{stored}]>")
            fixed |= {} if gated else {"kept_desc": None}
            fixed |= {f"{name}_desc" if name == "other" else f"{name}_ptr": None for name in absent}
        else:
            gather = layer.gathers
            fixed |= {"GATHER": gather, "UNIT": 1 if gather else unit, "M": tile.M}
            fixed |= {} if gather else {"x_channel": 1}
            fixed |= {f"{name}_ptr": None for name in absent} | ({} if gated else {"kept_ptr": None})
        kernel = forward.masked_conv2d_tma_kernel if tma else forward.masked_conv2d_kernel
        kind = f"{'gated' if gated else 'mirrored' if mirrored else 'residual'}{', gathered' if layer.gathers else ''}"
        config = f"{dtype} {tile.M}x{tile.N}x{tile.K}, {kind}"
        requires = (
            WGMMA if "sm_90" not in skips and precision != "ieee" or dtype == "bf16" and "sm_90" not in skips else {}
        )
        found.append(entry(kernel, config, dtype, fixed, tile, skips=skips, requires=requires))
    return found


def weight_entries(dtype: str, precision: str, *, tma: bool, adds_up: bool, **of_layer: Any) -> list[Entry]:
    layer = layers("weight", dtype, **of_layer)
    unit = 16 // DTYPES[dtype].itemsize
    found = []
    for tile, skips in by_tile(layer, precision, tma).items():
        fixed: dict[str, Any] = {"GRAD_UNIT": unit, "PRECISION": precision, "N": tile.N, "K": tile.K}
        if not adds_up:
            fixed["sums_ptr"] = None
        if tma:
            box = f"1,{tile.M // 32},32"
            fixed |= {"IMAGES": 1, "HEIGHT": tile.M // 32, "WIDTH": 32}
            fixed |= {} if adds_up else {"grad_ptr": None}
            fixed |= {
                "grad_desc": f"tensordesc<{dtype}[{box},{tile.N}]>",
                "x_desc": f"tensordesc<{dtype}[{box},{tile.K}]>",
            }
        else:
            fixed |= {"GATHER": layer.gathers, "UNIT": 1 if layer.gathers else unit, "M": tile.M}
            fixed |= {} if layer.gathers else {"x_channel": 1}
        kernel = backward.masked_conv2d_weight_tma_kernel if tma else backward.masked_conv2d_weight_kernel
        kind = f"{', gathered' if layer.gathers else ''}{', adds up' if adds_up else ''}"
        config = f"{dtype} {tile.N}x{tile.K} of {tile.M} pixels{kind}"
        requires = WGMMA if "sm_90" not in skips and dtype == "bf16" else {}
        found.append(entry(kernel, config, dtype, fixed, tile, skips=skips, requires=requires))
    return found


def pass_entry(dtype: str, saved: str, *, sums_used: bool = False) -> Entry:
    fixed: dict[str, Any] = {"SAVED": saved, "UNIT": 16 // DTYPES[dtype].itemsize, "PIXELS": 32, "ROWS": 64}
    fixed |= {"grad_channel": 1, "grad_pre_channel": 1}
    there = {"none": 0, "relu": 1, "sign": 1, "valve": 2, "both": 2}[saved]
    fixed |= dict.fromkeys(("first_ptr", "second_ptr")[there:]) | ({} if sums_used else {"grad_pre_ptr": None})
    config = f"{dtype} {saved}{', sums used too' if sums_used else ''}"
    return entry(backward.masked_conv2d_activation_backward_kernel, config, dtype, fixed)


CATALOGUE = [
    *product_entries("bf16", "ieee", gated=True, tma=True),
    *product_entries("bf16", "ieee", gated=False, tma=True),
    *product_entries("bf16", "ieee", gated=False, tma=True, mirrored=True, channels=256),
    *product_entries("fp32", "tf32", gated=True, tma=True),
    *product_entries("bf16", "ieee", gated=True, tma=False),
    *product_entries("bf16", "ieee", gated=True, tma=False, pixels=2**11),
    *product_entries("bf16", "ieee", gated=False, tma=False),
    *product_entries("bf16", "ieee", gated=False, tma=False, mirrored=True, channels=256),
    *product_entries("bf16", "ieee", gated=True, tma=False, channels=3),
    *product_entries("fp32", "tf32", gated=True, tma=False),
    *product_entries("fp32", "tf32", gated=False, tma=False, mirrored=True, channels=256),
    *product_entries("fp32", "ieee", gated=True, tma=False),
    *product_entries("fp32", "tf32", gated=False, tma=False, channels=3),
    *weight_entries("bf16", "ieee", tma=True, adds_up=True),
    *weight_entries("bf16", "ieee", tma=True, adds_up=False),
    *weight_entries("fp32", "tf32", tma=True, adds_up=False),
    *weight_entries("bf16", "ieee", tma=False, adds_up=True),
    *weight_entries("bf16", "ieee", tma=False, adds_up=False, channels=3),
    *weight_entries("fp32", "tf32", tma=False, adds_up=True),
    *weight_entries("fp32", "ieee", tma=False, adds_up=True),
    pass_entry("bf16", "both", sums_used=True),
    pass_entry("bf16", "valve"),
    pass_entry("bf16", "sign"),
    pass_entry("fp32", "relu"),
    entry(forward.masked_conv2d_pack_kernel, "bf16", "bf16", {"RUN": 8, "ROWS": 16, "COLUMNS": 64}),
    entry(backward.masked_conv2d_weight_sum_kernel, "bf16", "bf16", {"BLOCK": 256}),
    entry(backward.masked_conv2d_bias_kernel, "bf16", "bf16", {"ROWS": 128}),
]
