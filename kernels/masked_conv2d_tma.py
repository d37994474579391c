"""The same product with tensor descriptors, for Hopper and later: the tensor memory accelerator loads whole boxes of
pixels, fills what lies outside the map with zeros by itself, and leaves the registers of addresses and masks free.

A program owns a box of pixels (images x rows x columns) instead of a run of them: all sides are powers of two, and
`box_of` takes the shape that wastes the least. Without a stride only, as the accelerator reads neighbours.
"""

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.masked_conv2d_activation import Finish, catalogue_entry, finish
from fastgen.kernels.masked_conv2d_config import Tile
from fastgen.kernels.masked_conv2d_gemm import INTS, WGMMA, product
from fastgen.kernels.masked_conv2d_plan import Plan


@triton.jit
def masked_conv2d_tma_kernel(
    x_desc,  # (B, x_height, x_width, channels), boxes (IMAGES, HEIGHT, WIDTH, K)
    packed_desc,  # (parts * row_pad, packed columns), boxes (N, K)
    other_desc,  # as x_desc, the second map, or None
    bias_ptr,
    condition_ptr,
    residual_ptr,
    out_ptr,  # (B, out_height, out_width, rows) contiguous, written
    kept_ptr,
    entries_ptr,
    starts_ptr,
    batch,
    out_height,
    out_width,
    across,  # boxes side by side
    down,
    rows,
    row_pad,
    row_tiles,
    columns,
    other_channels,
    residual_image,
    residual_y,
    residual_x,
    residual_channel,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,  # as in masked_conv2d_kernel
):
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH
    tile = tl.program_id(0) % row_tiles
    box = tl.program_id(0) // row_tiles
    image = box // (across * down) * IMAGES
    y = box // across % down * HEIGHT
    x = box % across * WIDTH
    signal = tl.zeros((M, N), tl.float32)
    valve = tl.zeros((M, N), tl.float32)
    for entry in range(tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)):
        dy = tl.load(entries_ptr + entry * INTS)
        dx = tl.load(entries_ptr + entry * INTS + 1)
        channel = tl.load(entries_ptr + entry * INTS + 2) * K
        column = tl.load(entries_ptr + entry * INTS + 3) * K
        a = x_desc.load([image, y + dy, x + dx, channel]).reshape(M, K)
        signal = product(a, packed_desc.load([tile * N, column]).T, signal, PRECISION)
        if ACTIVATION == "gated":
            valve = product(a, packed_desc.load([row_pad + tile * N, column]).T, valve, PRECISION)
    if other_desc is not None:
        for channel in tl.range(0, other_channels, K, num_stages=(STAGES + 1) // 2):
            a = other_desc.load([image, y, x, channel]).reshape(M, K)
            signal = product(a, packed_desc.load([tile * N, columns + channel]).T, signal, PRECISION)
            if ACTIVATION == "gated":
                valve = product(a, packed_desc.load([row_pad + tile * N, columns + channel]).T, valve, PRECISION)
    m = tl.arange(0, M)
    images = (image + m // (HEIGHT * WIDTH))[:, None]
    i = (y + m // WIDTH % HEIGHT)[:, None]
    j = (x + m % WIDTH)[:, None]
    inside = (images < batch) & (i < out_height) & (j < out_width)
    images, i, j = images.to(tl.int64), i.to(tl.int64), j.to(tl.int64)
    row = (images * out_height + i) * out_width + j
    residual_at = images * residual_image + i * residual_y + j * residual_x
    n = (tile * N + tl.arange(0, N))[None, :]
    finish(
        signal, valve, row, images, n, inside, bias_ptr, condition_ptr, residual_ptr, residual_at, residual_channel,
        out_ptr, kept_ptr, rows, ACTIVATION, KEEP,
    )  # fmt: skip


def descriptors_fit(x: Tensor) -> bool:
    """Whether the accelerator can address a map (B, C, H, W): channels side by side, all else in units of 16 bytes."""
    steps = [x.stride(axis) * x.element_size() for axis in (0, 2, 3)]
    return x.stride(1) == 1 and all(step > 0 and step % 16 == 0 for step in steps) and x.data_ptr() % 16 == 0


def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of `pixels` pixels, all powers of two, of which the fewest boxes are needed."""
    shapes = []
    wide = 1
    while wide <= pixels:
        high = 1
        while wide * high <= pixels:
            shapes.append((pixels // (wide * high), high, wide))
            high *= 2
        wide *= 2
    # Among equals the widest, whose pixels lie side by side.
    return min(shapes, key=lambda s: (-(-batch // s[0]) * -(-height // s[1]) * -(-width // s[2]), -s[2], -s[1]))


def _descriptor(x: Tensor, box: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)


def convolve_by_descriptors(
    x: Tensor,
    packed: Tensor,
    plan: Plan,
    tile: Tile,
    precision: str,
    out: Tensor,
    end: Finish,
    kept: Tensor | None = None,
    other: Tensor | None = None,
) -> None:
    """As `convolve` in masked_conv2d_gemm.py, with stride 1; x, other and packed must fit (`descriptors_fit`)."""
    batch, rows, height, width = out.shape
    box = box_of(tile.M, batch, height, width)
    across, down = triton.cdiv(width, box[2]), triton.cdiv(height, box[1])
    boxes = triton.cdiv(batch, box[0]) * down * across
    maps = [None if one is None else _descriptor(one.permute(0, 2, 3, 1), [*box, tile.K]) for one in (x, other)]
    residual = [0] * 4 if end.residual is None else [end.residual.stride(axis) for axis in (0, 2, 3, 1)]
    masked_conv2d_tma_kernel[(boxes * plan.row_tiles,)](
        maps[0], _descriptor(packed, [tile.N, tile.K]), maps[1], end.bias, end.condition, end.residual, out, kept,
        plan.entries, plan.starts, batch, height, width, across, down, rows, plan.row_pad, plan.row_tiles,
        plan.columns.shape[1], 0 if other is None else other.shape[1], *residual,
        ACTIVATION=end.activation, KEEP=end.keep, PRECISION=precision,
        IMAGES=box[0], HEIGHT=box[1], WIDTH=box[2], N=tile.N, K=tile.K, STAGES=tile.num_stages,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# --- what ships, for the compile gate


def _entry(dtype: str, tile: Tile, box: tuple[int, int, int], *, gated: bool) -> Any:
    fixed: dict[str, Any] = {
        "ACTIVATION": "gated" if gated else "none", "KEEP": "both" if gated else "",
        "PRECISION": "tf32" if dtype == "fp32" else "ieee",
        "IMAGES": box[0], "HEIGHT": box[1], "WIDTH": box[2], "N": tile.N, "K": tile.K,
        "STAGES": tile.num_stages, "residual_channel": 1,
    }  # fmt: skip
    absent = ("residual_ptr",) if gated else ("other_desc", "condition_ptr", "kept_ptr")
    maps = f"tensordesc<{dtype}[{box[0]},{box[1]},{box[2]},{tile.K}]>"
    entry = catalogue_entry(
        masked_conv2d_tma_kernel,
        f"{dtype} {tile.M}x{tile.N}{'(x2)' if gated else ''}x{tile.K}",
        dtype,
        fixed | dict.fromkeys(absent),
        tile,
        requires=WGMMA if dtype == "bf16" else {},
        skips=dict.fromkeys(("sm_80", "sm_86", "sm_89", "gfx942"), "has no tensor memory accelerator"),
    )
    described = {"x_desc": maps, "other_desc": maps, "packed_desc": f"tensordesc<{dtype}[{tile.N},{tile.K}]>"}
    signature = {name: described.get(name, kind) for name, kind in entry.signature.items()}
    return replace(entry, signature=signature)


CATALOGUE = [
    _entry("bf16", Tile(128, 64, 64, 8, 5, True), (1, 4, 32), gated=True),
    _entry("bf16", Tile(128, 128, 64, 8, 5, True), (1, 4, 32), gated=False),
    _entry("fp32", Tile(128, 64, 32, 8, 5, True), (1, 4, 32), gated=True),
]
