"""What follows the sums of a masked convolution in registers, and the way back: bias, activation, residual.

The finish adds the bias and an image's own bias, applies ReLU or the gate, adds a residual, and keeps the least that
the backward needs beside the result (e bytes an element of x's dtype, R results a pixel):

    none                       nothing
    ReLU                       nothing: the result tells what passed
    ReLU, then a residual      R bytes: what passed, as the sum does not tell ("sign")
    gate                       e R: its second half's input b ("valve"); the first follows from the result
    gate, then a residual      2 e R: both halves' inputs a, b ("both"), and the result is not needed

Back, with t = tanh(a), s = sigmoid(b), out = t s, t = out / s where a was not kept, and g the incoming gradient:

    da = g * s * (1 - t^2)        db = g * t * s * (1 - s)

This is done either by a pass that writes the gradient of the sums, or by the products as they load it. A pass moves
what it loads and writes once, and the products then load what it has written; without it they load more each time:

                     pass loads    writes    products load    without the pass
    gate                3 e R       2 e R      2 e R times        3 e R times
    ReLU                2 e R         e R        e R times        2 e R times
    ReLU, residual   (e + 1) R        e R        e R times     (e + 1) R times

where `times` counts, in both products together, the taps and tiles that meet an element. `on_load` of
masked_conv2d_config.py takes the smaller sum, which counts as if no cache helped: without the pass for up to 4 times
with a gate (a 1x1 layer of 256 channels, two taps of 128, a first layer whose input is an image), 2 with ReLU. Beyond
that the pass also saves arithmetic: on the way through the gate an element costs about 20 instructions and two of the
special unit, as long as its multiply-adds with 128 channels take on the tensor cores of a Hopper.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.masked_conv2d_config import Tile

PROGRAMS = 1024  # of the pass, about; a constant, so that sums do not depend on the chip


@triton.jit
def tanh(x):
    """To float32's precision, also near 0, where 2 * sigmoid(2x) - 1 cancels; never NaN for a finite x."""
    q = x * x
    series = x * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925))))))
    shrunk = tl.exp(-2 * tl.abs(x))
    far = (1 - shrunk) / (1 + shrunk)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -far, far))


@triton.jit
def finish(
    signal,  # (M, N) float32
    valve,  # the gate's second half, unused without
    row,  # (M, 1) int64, the pixel's place in the written map
    image,  # (M, 1) int64
    n,  # (1, N)
    inside,  # (M, 1)
    bias_ptr,
    condition_ptr,
    residual_ptr,
    residual_at,  # (M, 1) offset of the pixel
    residual_channel,
    out_ptr,
    kept_ptr,
    rows,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
):
    """From sums to results; see the module's docstring. Biases (parts * rows,), an image's own (B, parts * rows)."""
    parts: tl.constexpr = 2 if ACTIVATION == "gated" else 1
    real = n < rows
    if bias_ptr is not None:
        signal += tl.load(bias_ptr + n, mask=real, other=0.0).to(tl.float32)
        if ACTIVATION == "gated":
            valve += tl.load(bias_ptr + rows + n, mask=real, other=0.0).to(tl.float32)
    if condition_ptr is not None:
        own = condition_ptr + image * (parts * rows) + n
        signal += tl.load(own, mask=inside & real, other=0.0).to(tl.float32)
        if ACTIVATION == "gated":
            valve += tl.load(own + rows, mask=inside & real, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    if KEEP == "sign":
        tl.store(kept_ptr + row * rows + n, (signal <= 0) == 0, mask=inside & real)  # a NaN passes
    if KEEP == "valve":
        tl.store(kept_ptr + row * rows + n, valve.to(kind), mask=inside & real)
    if KEEP == "both":
        at = row * (2 * rows) + n
        tl.store(kept_ptr + at, signal.to(kind), mask=inside & real)
        tl.store(kept_ptr + at + rows, valve.to(kind), mask=inside & real)
    if ACTIVATION == "gated":
        signal = tanh(signal) * tl.sigmoid(valve)
    elif ACTIVATION == "relu":
        signal = tl.where(signal < 0, 0.0, signal)  # keeps NaN
    if residual_ptr is not None:
        at = residual_ptr + residual_at + n.to(tl.int64) * residual_channel
        signal += tl.load(at, mask=inside & real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * rows + n, signal.to(kind), mask=inside & real)


@triton.jit
def back(grad_ptr, first_ptr, second_ptr, at, first_at, inside, SAVED: tl.constexpr):
    """The gradient of what entered the activation, of both its halves with a gate, float32; zero outside.

    SAVED and what its maps are: "none"; "relu": the result; "sign": what passed; "valve": the result, the second half;
    "both": the halves. at: offsets into the gradient; first_at: into the maps.
    """
    first = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = first
    if SAVED == "relu":
        out = tl.load(first_ptr + first_at, mask=inside, other=0.0).to(tl.float32)
        first = tl.where(out > 0, first, tl.where(out == 0, 0.0, first * out))  # NaN stays NaN
    if SAVED == "sign":
        first = tl.where(tl.load(first_ptr + first_at, mask=inside, other=0) != 0, first, 0.0)
    if SAVED == "valve" or SAVED == "both":
        known = tl.load(first_ptr + first_at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(tl.load(second_ptr + first_at, mask=inside, other=0.0).to(tl.float32))
        if SAVED == "both":
            t = tanh(known)
            out = t * s
        else:
            out = known
            t = tl.where(s > 0, out / s, 0.0)
            t = tl.where(t > 1, 1.0, tl.where(t < -1, -1.0, t))
        second = first * out * (1 - s)
        first = first * (s - out * t)
    return first, second


@triton.jit
def masked_conv2d_activation_backward_kernel(
    grad_ptr,  # (B, height, width, rows), strides below
    grad_pre_ptr,  # (B, height, width, parts * rows) or None: gradient of the sums themselves, added
    first_ptr,  # (B, height, width, rows) at `kept_pitch` a pixel; see `back`
    second_ptr,
    grad_sums_ptr,  # written: (B, height, width, parts * rows) at `pitch` a pixel, or None
    sums_ptr,  # written: (programs along the pixels, parts * rows) float32, or None
    group,  # pixels that share a bias: height * width for an image's own, all of them for none
    shares,  # programs of a group
    steps,  # blocks of pixels a program walks through
    height,
    width,
    rows,
    kept_pitch,
    pitch,
    grad_image,
    grad_y,
    grad_x,
    grad_channel,
    grad_pre_image,
    grad_pre_y,
    grad_pre_x,
    grad_pre_channel,
    SAVED: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    parts: tl.constexpr = 2 if SAVED == "valve" or SAVED == "both" else 1
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    start = tl.program_id(0) // shares * group
    end = start + group
    start += tl.program_id(0) % shares * steps * PIXELS
    first_sum = tl.zeros((1, ROWS), tl.float32)
    second_sum = tl.zeros((1, ROWS), tl.float32)
    for step in range(steps):
        pixel = (start + step * PIXELS + tl.arange(0, PIXELS))[:, None]
        inside = (pixel < end) & (n < rows)
        image = (pixel // (height * width)).to(tl.int64)
        y = (pixel // width % height).to(tl.int64)
        x = (pixel % width).to(tl.int64)
        pixel = pixel.to(tl.int64)
        at = image * grad_image + y * grad_y + x * grad_x + n.to(tl.int64) * grad_channel
        first, second = back(grad_ptr, first_ptr, second_ptr, at, pixel * kept_pitch + n, inside, SAVED)
        if grad_pre_ptr is not None:
            at = grad_pre_ptr + image * grad_pre_image + y * grad_pre_y + x * grad_pre_x
            first += tl.load(at + n.to(tl.int64) * grad_pre_channel, mask=inside, other=0.0).to(tl.float32)
            if parts == 2:
                at += (n + rows).to(tl.int64) * grad_pre_channel
                second += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if grad_sums_ptr is not None:
            at = grad_sums_ptr + pixel * pitch + n
            tl.store(at, first.to(grad_sums_ptr.dtype.element_ty), mask=inside)
            if parts == 2:
                tl.store(at + rows, second.to(grad_sums_ptr.dtype.element_ty), mask=inside)
        first_sum += tl.sum(first, 0)[None, :]
        second_sum += tl.sum(second, 0)[None, :]
    if sums_ptr is not None:
        at = sums_ptr + tl.program_id(0).to(tl.int64) * (parts * rows) + n
        tl.store(at, first_sum, mask=n < rows)
        if parts == 2:
            tl.store(at + rows, second_sum, mask=n < rows)


# --- launching


@dataclass(frozen=True)
class Finish:
    """What happens to the sums; tensors (O,), (B, O), (B, R, H', W') any strides, or None. keep: as in `forward`."""

    activation: str = "none"
    bias: Tensor | None = None
    condition: Tensor | None = None
    residual: Tensor | None = None
    keep: str = ""


@dataclass(frozen=True)
class Incoming:
    """The gradient (B, R, H', W') of what follows an activation, and what leads back through it.

    saved: "none" where `grad` is that of the sums, else how to get there from `out` and `kept`; see `back`.
    """

    grad: Tensor
    saved: str = "none"
    out: Tensor | None = None
    kept: Tensor | None = None

    @property
    def parts(self) -> int:
        return 2 if self.saved in ("valve", "both") else 1

    @property
    def maps(self) -> tuple[Tensor | None, Tensor | None]:
        """The two that `back` reads, channels-last, contiguous, but for the halves of "both"."""
        if self.saved == "both" and self.kept is not None:
            first, second = self.kept.chunk(2, 1)
            return first, second
        of_result = {"relu": self.out, "valve": self.out, "sign": self.kept}.get(self.saved)
        return of_result, self.kept if self.saved == "valve" else None


def through_activation(
    incoming: Incoming, grad_pre: Tensor | None, write: bool, sums: str
) -> tuple[Incoming, Tensor | None]:
    """The gradient of the sums (B, parts * R, H', W'), where `write`, else what comes in; and its sums over pixels,
    float32.

    sums: "" for none, "all" (1, parts * R), "image"
    (B, parts * R). grad_pre: a gradient of the sums that is added.
    """
    grad = incoming.grad
    batch, rows, height, width = grad.shape
    parts = incoming.parts
    blocks = (32, 64) if rows > 32 else (128, 16)
    groups = batch if sums == "image" else 1
    group = batch * height * width // groups
    shares = max(1, min(triton.cdiv(group, blocks[0]), PROGRAMS // (groups * triton.cdiv(rows, blocks[1])) or 1))
    steps = triton.cdiv(triton.cdiv(group, blocks[0]), shares)
    shares = triton.cdiv(group, steps * blocks[0])
    pitch = -(-parts * rows // 16) * 16
    written = None
    if write:
        written = grad.new_empty(batch, height, width, pitch)[..., : parts * rows].permute(0, 3, 1, 2)
    found = grad.new_empty(groups * shares, parts * rows, dtype=torch.float32) if sums else None
    strides = [0 if one is None else one.stride(axis) for one in (grad, grad_pre) for axis in (0, 2, 3, 1)]
    masked_conv2d_activation_backward_kernel[(groups * shares, triton.cdiv(rows, blocks[1]))](
        grad, grad_pre, *incoming.maps, written, found, group, shares, steps, height, width, rows,
        2 * rows if incoming.saved == "both" else rows, pitch, *strides, SAVED=incoming.saved, PIXELS=blocks[0],
        ROWS=blocks[1],
    )  # fmt: skip
    totals = None if found is None else found.view(groups, shares, parts * rows).sum(1)
    return incoming if written is None else Incoming(written), totals


# --- what ships, for the compile gate


def catalogue_entry(kernel: Any, config: str, dtype: str, fixed: dict[str, Any], tile: Tile, **more: Any) -> Entry:
    """`fixed`: constexprs and absent tensors. Strides and numbers of channels are aligned, as in every large layer."""
    kinds = {"entries_ptr": "*i32", "starts_ptr": "*i32", "columns_ptr": "*i32", "places_ptr": "*i32"}
    kinds |= {"mask_ptr": "*i1", "partial_ptr": "*fp32", "sums_ptr": "*fp32"}
    if fixed.get("SAVED") == "sign":
        kinds["first_ptr"] = "*i1"
    if fixed.get("KEEP") == "sign":
        kinds["kept_ptr"] = "*i1"
    signature = {
        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in fixed
    }
    even = ("rows", "row_pad", "channels", "other_channels", "columns", "packed_columns", "pitch", "kept_pitch")
    strides = tuple(f"{name}_{axis}" for name in ("x", "other", "residual", "grad") for axis in ("image", "y", "x"))
    aligned = tuple(name for name in signature if name in (*even, *strides))
    return Entry(
        kernel, config, signature, fixed, aligned=aligned, num_warps=tile.num_warps, num_stages=tile.num_stages, **more
    )


def absent_maps(saved: str) -> dict[str, None]:
    """The maps of `back` that are not there."""
    there = {"none": 0, "relu": 1, "sign": 1, "valve": 2, "both": 2}[saved]
    return dict.fromkeys(("first_ptr", "second_ptr")[there:])


def _pass_entry(dtype: str, saved: str, pixels: int, rows: int, *, sums_used: bool = False) -> Entry:
    fixed: dict[str, Any] = {"SAVED": saved, "PIXELS": pixels, "ROWS": rows, "grad_channel": 1}
    name, value = ("grad_pre_channel", 1) if sums_used else ("grad_pre_ptr", None)
    fixed |= {name: value, **absent_maps(saved)}
    config = f"{dtype} {saved} {pixels}x{rows}{', sums used too' if sums_used else ''}"
    return catalogue_entry(masked_conv2d_activation_backward_kernel, config, dtype, fixed, Tile(0, 0, 0, 4, 3))


CATALOGUE = [
    _pass_entry("bf16", "both", 32, 64, sums_used=True),
    _pass_entry("bf16", "valve", 32, 64),
    _pass_entry("bf16", "sign", 32, 64),
    _pass_entry("fp32", "relu", 32, 64),
]
