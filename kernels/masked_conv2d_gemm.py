"""The masked convolution as a product over live columns: pack the weights, multiply, finish in registers.

    m: a pixel of the written map; n: a channel of a part; column: a live (tap, channel), see masked_conv2d_plan.py
    out[m, n] = finish(sum over blocks of columns of read[pixel(m) + tap, channel] * packed[n, column])

Maps are channels-last inside. The finish, and what the gradient of the input does on loading, stand in
masked_conv2d_activation.py. The weights are packed once a call into rows of live columns, zero where masked and where
padded, so that the loop needs no mask for them.

The packing reads and writes every live weight, and its mask: 2 e + 1 bytes a weight (e bytes an element), for 3x3 B to
2 x 128 from 128 channels 0.8 MB, where evaluation moves 8.7 MB for 16 images of 32x32 and 67 MB for 128. Training
needs it anew each step. Packed weights are not kept from call to call, as a change is not always seen: averaged weights
are often copied in through `.data`, which does not count as a version, and a CUDA graph would replay the old ones.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.masked_conv2d_activation import Finish, Incoming, absent_maps, back, catalogue_entry, finish
from fastgen.kernels.masked_conv2d_config import Tile
from fastgen.kernels.masked_conv2d_plan import ENTRY, Geometry, Plan

INTS = tl.constexpr(ENTRY)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """The interpreter multiplies bfloat16 wrongly: it is told by the precision "float32" to widen first."""
    if PRECISION == "float32":
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def masked_conv2d_pack_kernel(
    weight_ptr,  # any strides: (part, row, column's channel, ky, kx)
    mask_ptr,  # bool, the same, or None
    packed_ptr,  # (parts * row_pad, packed columns), written
    columns_ptr,  # (COLUMN, columns) int32
    rows,  # of a part
    row_pad,
    columns,
    packed_columns,
    first_column,
    weight_part,
    weight_row,
    weight_channel,
    weight_y,
    weight_x,
    mask_part,
    mask_row,
    mask_channel,
    mask_y,
    mask_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Weights into rows of live columns; zero where masked, and in the padding of rows and columns."""
    packed_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.load(columns_ptr + column, mask=column < columns, other=-1)
    ky = tl.load(columns_ptr + columns + column, mask=column < columns, other=0)
    kx = tl.load(columns_ptr + 2 * columns + column, mask=column < columns, other=0)
    part, row = (packed_row // row_pad).to(tl.int64), (packed_row % row_pad).to(tl.int64)
    live = (row < rows)[:, None] & (channel >= 0)[None, :]
    channel, ky, kx = channel.to(tl.int64), ky.to(tl.int64), kx.to(tl.int64)
    if mask_ptr is not None:
        within = channel * mask_channel + ky * mask_y + kx * mask_x
        at = mask_ptr + (part * mask_part + row * mask_row)[:, None] + within[None, :]
        shown = tl.load(at, mask=live, other=0)
        live = live & (shown != 0)
    within = channel * weight_channel + ky * weight_y + kx * weight_x
    at = weight_ptr + (part * weight_part + row * weight_row)[:, None] + within[None, :]
    value = tl.load(at, mask=live, other=0.0)
    at = packed_row.to(tl.int64)[:, None] * packed_columns + first_column + column[None, :]
    tl.store(packed_ptr + at, value, mask=(column < columns)[None, :])


@triton.jit
def masked_conv2d_kernel(
    x_ptr,  # (B, x_height, x_width, channels), strides below; the gradient of a result unless SAVED is "none"
    first_ptr,  # as x; see `back`
    second_ptr,
    packed_ptr,  # (parts * row_pad, packed_columns)
    other_ptr,  # (B, out_height, out_width, other_channels) or None: a second map, seen at the pixel itself
    bias_ptr,
    condition_ptr,
    residual_ptr,
    out_ptr,  # (B, out_height, out_width, rows) contiguous, written
    kept_ptr,
    entries_ptr,
    starts_ptr,
    columns_ptr,
    pixels,  # B * lattice_height * lattice_width
    lattice_height,  # the written map in steps of out_step: pixel (out_step * i + class)
    lattice_width,
    out_height,
    out_width,
    out_step_y,
    out_step_x,
    x_height,
    x_width,
    x_step_y,
    x_step_x,
    channels,
    rows,  # of a part
    row_pad,
    row_tiles,
    columns,  # packed columns of x, before those of the other map
    packed_columns,
    other_channels,
    x_image,
    x_y,
    x_x,
    x_channel,
    other_image,
    other_y,
    other_x,
    residual_image,
    residual_y,
    residual_x,
    residual_channel,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,  # the channels fill their blocks
    SAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,  # of the launch: the loop over the second map, which looks nothing up, has fewer
):
    tile = tl.program_id(0) % row_tiles
    place = tl.program_id(1)
    m = tl.program_id(0) // row_tiles * M + tl.arange(0, M)
    image = m // (lattice_height * lattice_width)
    i = m // lattice_width % lattice_height
    j = m % lattice_width
    out_i = i * out_step_y + place // out_step_x
    out_j = j * out_step_x + place % out_step_x
    inside = (m < pixels) & (out_i < out_height) & (out_j < out_width)
    y, x = i * x_step_y, j * x_step_x
    k = tl.arange(0, K)
    n = tile * N + tl.arange(0, N)
    base = (image.to(tl.int64) * x_image + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x)[:, None]
    weights = packed_ptr + n.to(tl.int64)[None, :] * packed_columns + k[:, None]
    to_valve = row_pad.to(tl.int64) * packed_columns
    signal = tl.zeros((M, N), tl.float32)
    valve = tl.zeros((M, N), tl.float32)
    for entry in range(
        tl.load(starts_ptr + place * row_tiles + tile), tl.load(starts_ptr + place * row_tiles + tile + 1)
    ):
        column = tl.load(entries_ptr + entry * INTS + 3) * K
        if GATHER:
            channel = tl.load(columns_ptr + column + k)
            dy = tl.load(columns_ptr + 3 * columns + column + k)[None, :]
            dx = tl.load(columns_ptr + 4 * columns + column + k)[None, :]
            step = (dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x) + channel.to(tl.int64)[None, :] * x_channel
            seen = inside[:, None] & (channel >= 0)[None, :]
            seen = seen & (y[:, None] + dy >= 0) & (y[:, None] + dy < x_height)
            seen = seen & (x[:, None] + dx >= 0) & (x[:, None] + dx < x_width)
            a = tl.load(x_ptr + base + step, mask=seen, other=0.0)
        else:
            dy = tl.load(entries_ptr + entry * INTS)
            dx = tl.load(entries_ptr + entry * INTS + 1)
            channel = tl.load(entries_ptr + entry * INTS + 2) * K
            seen = inside & (y + dy >= 0) & (y + dy < x_height) & (x + dx >= 0) & (x + dx < x_width)
            step = dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x + channel
            there = seen[:, None]
            if not WHOLE:
                there = there & (channel + k < channels)[None, :]
            at = base + step + k[None, :]
            if SAVED == "none":
                a = tl.load(x_ptr + at, mask=there, other=0.0)
            else:
                a, b = back(x_ptr, first_ptr, second_ptr, at, at, there, SAVED)
                a = a.to(packed_ptr.dtype.element_ty)
                if SAVED == "valve":
                    b = b.to(packed_ptr.dtype.element_ty)
                    signal = product(b, tl.load(weights + to_valve + column), signal, PRECISION)
        signal = product(a, tl.load(weights + column), signal, PRECISION)
        if ACTIVATION == "gated":
            valve = product(a, tl.load(weights + to_valve + column), valve, PRECISION)
    image = image.to(tl.int64)[:, None]
    out_i, out_j = out_i.to(tl.int64)[:, None], out_j.to(tl.int64)[:, None]
    if other_ptr is not None:
        read = other_ptr + image * other_image + out_i * other_y + out_j * other_x
        for channel in tl.range(0, other_channels, K, num_stages=(STAGES + 1) // 2):
            a = tl.load(
                read + channel + k[None, :], mask=inside[:, None] & (channel + k < other_channels)[None, :], other=0.0
            )
            signal = product(a, tl.load(weights + columns + channel), signal, PRECISION)
            if ACTIVATION == "gated":
                valve = product(a, tl.load(weights + to_valve + columns + channel), valve, PRECISION)
    row = (image * out_height + out_i) * out_width + out_j
    residual_at = image * residual_image + out_i * residual_y + out_j * residual_x
    finish(
        signal, valve, row, image, n[None, :], inside[:, None], bias_ptr, condition_ptr, residual_ptr, residual_at,
        residual_channel, out_ptr, kept_ptr, rows, ACTIVATION, KEEP,
    )  # fmt: skip


# --- launching


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, channels, height, width), uninitialized, channels-last."""
    return like.new_empty((like.shape[0], height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def channels_last(x: Tensor, gather: bool) -> Tensor:
    """x (B, C, H, W) as the kernels read it fast: channels side by side, every pixel at a multiple of 16 elements.

    A copy where it is not so. Gathered columns are read as they lie.
    """
    if gather:
        return x
    aligned = all(x.stride(axis) % 16 == 0 or x.shape[axis] == 1 for axis in (0, 2, 3)) and x.data_ptr() % 16 == 0
    if x.stride(1) == 1 and aligned:
        return x
    pitch = -(-x.shape[1] // 16) * 16
    copied = x.new_empty(x.shape[0], x.shape[2], x.shape[3], pitch)[..., : x.shape[1]].permute(0, 3, 1, 2)
    return copied.copy_(x)


def pack(
    weight: Tensor, mask: Tensor | None, plan: Plan, other_weight: Tensor | None = None, other_plan: Plan | None = None
) -> Tensor:
    """(parts * row_pad, columns) of weight (O, I, kh, kw), those of the other weight after those of the first."""
    columns = [plan.columns.shape[1]] + ([] if other_plan is None else [other_plan.columns.shape[1]])
    parts = plan.blocks.parts
    packed = weight.new_empty(parts * plan.row_pad, max(sum(columns), plan.blocks.K))
    sources = [(weight, mask, plan, 0)]
    if other_weight is not None and other_plan is not None:
        sources.append((other_weight, None, other_plan, columns[0]))
    for values, shown, source, first in sources:
        if source.columns.shape[1] == 0:
            continue
        mirrored = source.blocks.mirrored
        of_part = values.shape[0] // parts
        numbers: list[int] = []
        for tensor in (values, shown):
            row, channel, y, x = (0,) * 4 if tensor is None else tensor.stride()
            numbers += [of_part * row, *((channel, row) if mirrored else (row, channel)), y, x]
        rows = values.shape[1] if mirrored else of_part
        grid = (triton.cdiv(packed.shape[0], 16), triton.cdiv(source.columns.shape[1], 64))
        masked_conv2d_pack_kernel[grid](
            values, shown, packed, source.columns, rows, source.row_pad, source.columns.shape[1], packed.shape[1],
            first, *numbers, ROWS=16, COLUMNS=64,
        )  # fmt: skip
    return packed


def convolve(
    x: Tensor,
    packed: Tensor,
    plan: Plan,
    geometry: Geometry,
    tile: Tile,
    precision: str,
    out: Tensor,
    end: Finish,
    kept: Tensor | None = None,
    other: Tensor | None = None,
    through: Incoming | None = None,
) -> None:
    """Writes `out` (and `kept`), both channels-last contiguous; x and other as from `channels_last`.

    through: where x is its gradient, taken through the activation on loading.
    """
    batch, rows, out_height, out_width = out.shape
    mirrored = plan.blocks.mirrored
    out_step = geometry.stride if mirrored else (1, 1)
    x_step = (1, 1) if mirrored else geometry.stride
    lattice = [-(-size // step) for size, step in zip((out_height, out_width), out_step, strict=True)]
    pixels = batch * lattice[0] * lattice[1]
    grid = (triton.cdiv(pixels, tile.M) * plan.row_tiles, out_step[0] * out_step[1])
    residual = [0] * 4 if end.residual is None else [end.residual.stride(axis) for axis in (0, 2, 3, 1)]
    maps = (None, None) if through is None else through.maps
    others = [0] * 4 if other is None else [other.shape[1], *(other.stride(axis) for axis in (0, 2, 3))]
    masked_conv2d_kernel[grid](
        x, *maps, packed, other, end.bias, end.condition, end.residual, out, kept,
        plan.entries, plan.starts, plan.columns,
        pixels, *lattice, out_height, out_width, *out_step, x.shape[2], x.shape[3], *x_step, x.shape[1],
        rows, plan.row_pad, plan.row_tiles, plan.columns.shape[1], packed.shape[1], others[0],
        x.stride(0), x.stride(2), x.stride(3), x.stride(1), *others[1:], *residual,
        GATHER=plan.blocks.gather, WHOLE=x.shape[1] % tile.K == 0, SAVED="none" if through is None else through.saved,
        ACTIVATION=end.activation, KEEP=end.keep, PRECISION=precision, M=tile.M, N=tile.N, K=tile.K,
        STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# --- what ships, for the compile gate


def _product_entry(dtype: str, tile: Tile, *, gated: bool, gather: bool = False, last: bool = False, **more) -> Entry:
    """last: with a residual; the others with a second map (not gathered), an image's own bias and what is kept."""
    fixed: dict[str, Any] = {
        "GATHER": gather, "WHOLE": not gather, "SAVED": "none", "ACTIVATION": "gated" if gated else "none",
        "KEEP": "valve" if gated else "", "PRECISION": "tf32" if dtype == "fp32" and tile.K > 16 else "ieee",
        "M": tile.M, "N": tile.N, "K": tile.K, "STAGES": tile.num_stages, "residual_channel": 1,
        "x_step_y": 1, "x_step_x": 1, "out_step_y": 1, "out_step_x": 1,
    }  # fmt: skip
    if not gather:
        fixed["x_channel"] = 1
    absent = ("other_ptr", "condition_ptr") if last or gather else ("residual_ptr",)
    fixed |= dict.fromkeys((*absent, *(() if gated else ("kept_ptr",)))) | absent_maps("none")
    twice = "(x2)" if gated else ""
    kind = "gathered" if gather else "residual" if last else "two maps"
    config = f"{dtype} {tile.M}x{tile.N}{twice}x{tile.K}, {kind}"
    return catalogue_entry(masked_conv2d_kernel, config, dtype, fixed, tile, **more)


def _input_entry(dtype: str, saved: str, tile: Tile, precision: str = "ieee", **more: Any) -> Entry:
    """The gradient of the input, through the activation on loading."""
    absent = ("other_ptr", "bias_ptr", "condition_ptr", "residual_ptr", "kept_ptr")
    fixed: dict[str, Any] = {
        "GATHER": False, "WHOLE": True, "SAVED": saved, "ACTIVATION": "none", "KEEP": "",
        "PRECISION": precision, "M": tile.M, "N": tile.N, "K": tile.K, "STAGES": tile.num_stages,
        "residual_channel": 1, "x_channel": 1,
        "x_step_y": 1, "x_step_x": 1, "out_step_y": 1, "out_step_x": 1,
    }  # fmt: skip
    fixed |= dict.fromkeys(absent) | absent_maps(saved)
    config = f"{dtype} {tile.M}x{tile.N}x{tile.K}, through {saved}"
    return catalogue_entry(masked_conv2d_kernel, config, dtype, fixed, tile, **more)


WGMMA = {"sm_90": "wgmma"}
AMD = {"gfx942": "AMD has 64 KiB of shared memory: two stages there"}
ONLY_AMD = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), "only AMD has two stages")
CATALOGUE = [
    _product_entry("bf16", Tile(128, 64, 64, 8, 5), gated=True, requires=WGMMA, skips=AMD),
    _product_entry("bf16", Tile(128, 128, 64, 8, 5), gated=False, last=True, requires=WGMMA, skips=AMD),
    _product_entry("bf16", Tile(64, 64, 64, 4, 5), gated=True, requires=WGMMA, skips=AMD),
    _product_entry("fp32", Tile(128, 64, 32, 8, 5), gated=True, skips=AMD),
    _product_entry("fp32", Tile(128, 128, 32, 8, 5), gated=False, last=True, skips=AMD),
    _product_entry("fp32", Tile(64, 64, 32, 4, 5), gated=True, skips=AMD),
    _product_entry("fp32", Tile(64, 32, 16, 4, 2), gated=True),
    _product_entry("bf16", Tile(128, 64, 32, 8, 5), gated=True, gather=True, skips=AMD),
    _product_entry("fp32", Tile(128, 64, 32, 8, 5), gated=False, gather=True, skips=AMD),
    _product_entry("bf16", Tile(128, 64, 64, 8, 2), gated=True, skips=ONLY_AMD),
    _product_entry("fp32", Tile(128, 64, 32, 8, 2), gated=True, skips=ONLY_AMD),
    _input_entry("bf16", "valve", Tile(128, 128, 32, 8, 5), requires=WGMMA, skips=AMD),
    _input_entry("bf16", "sign", Tile(128, 128, 32, 8, 5), requires=WGMMA, skips=AMD),
    _input_entry("bf16", "valve", Tile(64, 64, 32, 4, 5), requires=WGMMA, skips=AMD),
    _input_entry("fp32", "valve", Tile(128, 128, 16, 8, 5), "tf32", skips=AMD),
    _input_entry("fp32", "relu", Tile(128, 128, 16, 8, 5), "tf32", skips=AMD),
    _input_entry("fp32", "valve", Tile(64, 64, 16, 4, 2)),
    _input_entry("fp32", "relu", Tile(64, 64, 16, 8, 2)),
    _input_entry("bf16", "valve", Tile(128, 128, 32, 8, 2), skips=ONLY_AMD),
    catalogue_entry(masked_conv2d_pack_kernel, "bf16", "bf16", {"ROWS": 16, "COLUMNS": 64}, Tile(0, 0, 0, 4, 3)),
]
