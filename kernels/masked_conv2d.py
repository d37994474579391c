"""The masked convolution forward and backward: what is launched, in which order, with which configuration.

Forward: pack the weights (small), then one product with all that follows in its finish. Backward: one pass through the
activation (none without activation and biases), the gradient of the input (pack, one product), the gradient of the
weight (one product, one sum). Work and traffic of a layer are counted in benchmarks/masked_conv2d.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.kernels import masked_conv2d_cudnn as cudnn
from fastgen.kernels.masked_conv2d_config import Layer, Tile, chip_of, choose, gathers, has_tma
from fastgen.kernels.masked_conv2d_gemm import Finish, channels_last, convolve, empty_map, pack
from fastgen.kernels.masked_conv2d_grad import sum_weight_gradient, through_activation
from fastgen.kernels.masked_conv2d_plan import Blocks, Geometry, Known, Plan, known_of, plan_of
from fastgen.kernels.masked_conv2d_tma import convolve_by_descriptors, descriptors_fit

MAX_PIXELS = 2**31 - 2**25  # pixels are counted in 32 bits, with room for the last blocks; offsets in 64
Choice = tuple[str, Tile]  # provider and tile
POINTWISE = Geometry((1, 1), (0, 0), (1, 1))


def precision_of(x: Tensor) -> str:
    """The products' `input_precision`: TF32 for float32 where PyTorch's setting for convolutions allows it."""
    if not x.is_cuda:
        return "float32"
    if x.dtype != torch.float32:
        return "ieee"
    settings = getattr(torch.backends.cudnn, "conv", None)  # of PyTorch 2.9 and later; the older one warns there
    allowed = torch.backends.cudnn.allow_tf32 if settings is None else settings.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def atomics() -> bool:
    """Whether the gradient of the weight may be added up in any order: FASTGEN_ATOMICS=1."""
    return os.environ.get("FASTGEN_ATOMICS") == "1" and not torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True)
class Operand:
    """A weight (O, I, kh, kw) with its mask and how it is applied."""

    weight: Tensor
    mask: Tensor | None
    geometry: Geometry

    @property
    def known(self) -> Known:
        return known_of(self.mask, tuple(self.weight.shape))

    def layer(self, direction: str, read: Tensor, parts: int, pixels: int) -> Layer:
        """The product that reads the map `read` and has `pixels` results a channel."""
        rows, channels = self.weight.shape[:2]
        if direction == "in":
            rows, channels = channels, rows
        step = self.geometry.stride[0] * self.geometry.stride[1]
        fits = direction != "weight" and step == 1 and not gathers(channels, direction == "in", step)
        tma = fits and has_tma(chip_of(read.device)) and descriptors_fit(read)
        return Layer(direction, read.dtype, rows // parts, parts, channels, self.known.taps, pixels, step, tma)

    def plan(self, direction: str, tile: Tile, parts: int = 1) -> Plan:
        mirrored = direction == "in"
        channels = self.weight.shape[0 if mirrored else 1]
        gather = gathers(channels, mirrored, self.geometry.stride[0] * self.geometry.stride[1])
        blocks = Blocks(tile.N, tile.K, parts, gather, mirrored)
        return plan_of(self.known, blocks, self.geometry, self.weight.device)


def _choice(read: Tensor, layer: Layer) -> Choice:
    """What was measured or is the default, if it has passed the numeric check on this GPU; else cuDNN."""
    precision = precision_of(read)
    provider, tile = choose(read.device, layer, precision)
    if provider != "triton" or not read.is_cuda:
        return provider, tile
    from fastgen.kernels.masked_conv2d_check import trusted  # which runs the functions below

    for candidate in dict.fromkeys((tile, replace(tile, tma=False))):
        if trusted(read.device, layer, candidate, precision == "tf32"):
            return "triton", candidate
    return "dense", tile


def operand_of(
    weight: Tensor, mask: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Operand:
    geometry = Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    return Operand(weight, mask, geometry)


def _aligned(x: Tensor, operand: Operand, direction: str) -> Tensor:
    channels = operand.weight.shape[0 if direction == "in" else 1]
    step = operand.geometry.stride[0] * operand.geometry.stride[1]
    return channels_last(x, gathers(channels, direction == "in", step))


def forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    condition: Tensor | None,
    residual: Tensor | None,
    other: Tensor | None,
    other_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    keep: str,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor]:
    """activation(conv(x, weight) + conv1x1(other, other_weight) + bias + condition) + residual, and what is kept.

    x (B, I, H, W), weight (O, I, kh, kw), bias (O,), condition (B, O), residual like the result, other (B, C, H', W'),
    other_weight (O, C, 1, 1). keep: "", or with a gate "valve" (the second half's input) or "both" halves'; the second
    result is empty where nothing is kept. choice: instead of that for the shape and chip.

    Raises:
        ValueError: more than MAX_PIXELS pixels: split the batch.
    """
    operand = operand_of(weight, mask, stride, padding, dilation)
    parts = 2 if activation == "gated" else 1
    height, width = (
        (x.shape[2 + a] + 2 * padding[a] - dilation[a] * (weight.shape[2 + a] - 1) - 1) // stride[a] + 1
        for a in range(2)
    )
    pixels = x.shape[0] * height * width
    if max(pixels, x[:, :1].numel()) > MAX_PIXELS:
        raise ValueError(f"x has more than {MAX_PIXELS} pixels, {tuple(x.shape)}: split the batch")
    out = empty_map(x, weight.shape[0] // parts, height, width)
    kept = empty_map(x, {"": 0, "valve": out.shape[1], "both": 2 * out.shape[1]}[keep], height, width)
    if out.numel() == 0:
        return out, kept if keep else x.new_empty(0)
    x = _aligned(x, operand, "out")
    provider, tile = choice or _choice(x, operand.layer("out", x, parts, pixels))
    condition = None if condition is None else condition.contiguous()
    end = Finish(activation, None if bias is None else bias.contiguous(), condition, residual, keep)
    if provider != "triton":
        return _finish_plainly(x, operand, provider, end, other, other_weight)
    plan = operand.plan("out", tile, parts)
    other_plan = None
    if other is not None and other_weight is not None:
        other = channels_last(other, gather=False)
        blocks = Blocks(tile.N, tile.K, parts)
        other_plan = plan_of(known_of(None, tuple(other_weight.shape)), blocks, POINTWISE, x.device)
    packed = pack(weight, mask, plan, other_weight, other_plan)
    target = kept if keep else None
    if tile.tma and (other is None or descriptors_fit(other)):
        convolve_by_descriptors(x, packed, plan, tile, precision_of(x), out, end, target, other)
    else:
        convolve(x, packed, plan, operand.geometry, tile, precision_of(x), out, end, target, other)
    return out, kept if keep else x.new_empty(0)


def _finish_plainly(
    x: Tensor, operand: Operand, provider: str, end: Finish, other: Tensor | None, other_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The forward by cuDNN, the finish by PyTorch."""
    box = operand.known.box if provider == "cropped" else None
    pre = cudnn.sums(x, operand.weight, operand.mask, box, operand.geometry)
    if other is not None and other_weight is not None:
        pre = pre + torch.nn.functional.conv2d(other, other_weight)
    if end.bias is not None:
        pre = pre + end.bias[:, None, None]
    if end.condition is not None:
        pre = pre + end.condition[:, :, None, None]
    out, kept = pre, pre.new_empty(0)
    if end.activation == "relu":
        out = pre.relu()
    if end.activation == "gated":
        signal, valve = pre.chunk(2, 1)
        out = signal.tanh() * valve.sigmoid()
        if end.keep:
            kept = pre if end.keep == "both" else valve
    if end.residual is not None:
        out = out + end.residual
    return _dense_channels_last(out), _dense_channels_last(kept) if end.keep else kept


def _dense_channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def backward(
    grad: Tensor | None,
    grad_pre: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    out: Tensor,
    kept: Tensor,
    other: Tensor | None,
    other_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, condition, other and other_weight, as `wanted`; the rest are empty.

    grad: of the result, without the residual, None for zeros; grad_pre: of the sums, where these were kept and used.
    out is the forward's result, whose values are read only with an activation.
    """
    of_x, of_weight, of_bias, of_condition, of_other, of_other_weight = wanted
    rows = weight.shape[0]
    if out.numel() == 0:
        shapes = (x, weight, weight[:, 0, 0, 0], weight.new_empty(out.shape[0], rows), other, other_weight)
        return [
            torch.zeros_like(one) if asked and one is not None else x.new_empty(0)
            for one, asked in zip(shapes, wanted, strict=True)
        ]
    needs_map = of_x or of_weight or of_other or of_other_weight
    sums = "image" if of_condition else "all" if of_bias else ""
    grad_map, totals = grad, None
    direct = activation == "none" and grad_pre is None and grad is not None and channels_last(grad, False) is grad
    if sums or not direct:
        write = needs_map and not direct
        written, totals = through_activation(grad, grad_pre, out, kept, activation, write, sums)
        grad_map = grad if written is None else written
    found = [x.new_empty(0) for _ in wanted]
    if totals is not None and of_bias:
        found[2] = totals.sum(0).to(weight.dtype)
    if totals is not None and of_condition:
        found[3] = totals.to(x.dtype)
    if grad_map is None:
        return found
    operand = operand_of(weight, mask, stride, padding, dilation)
    if of_x:
        found[0] = input_gradient(grad_map, x, operand)
    if of_weight:
        found[1] = weight_gradient(grad_map, x, operand)
    if other is not None and other_weight is not None:
        pointwise = Operand(other_weight, None, POINTWISE)
        if of_other:
            found[4] = input_gradient(grad_map, other, pointwise)
        if of_other_weight:
            found[5] = weight_gradient(grad_map, other, pointwise)
    return found


def input_gradient(grad: Tensor, x: Tensor, operand: Operand, choice: Choice | None = None) -> Tensor:
    """The gradient of x from that of the sums, whose channels lie side by side; x gives the shape."""
    out = empty_map(x, *x.shape[1:])
    if out.numel() == 0:
        return out
    provider, tile = choice or _choice(x, operand.layer("in", grad, 1, x[:, :1].numel()))
    if provider != "triton":
        box = operand.known.box if provider == "cropped" else None
        found = cudnn.input_gradient(grad, x, operand.weight, operand.mask, box, operand.geometry)
        return _dense_channels_last(found)
    plan = operand.plan("in", tile)
    packed = pack(operand.weight, operand.mask, plan)
    if tile.tma:
        convolve_by_descriptors(grad, packed, plan, tile, precision_of(x), out, Finish())
    else:
        convolve(grad, packed, plan, operand.geometry, tile, precision_of(x), out, Finish())
    return out


def weight_gradient(grad: Tensor, x: Tensor, operand: Operand, choice: Choice | None = None) -> Tensor:
    """The gradient of the weight from that of the sums, whose channels lie side by side."""
    provider, tile = choice or _choice(x, operand.layer("weight", x, 1, grad[:, :1].numel()))
    if provider != "triton":
        box = operand.known.box if provider == "cropped" else None
        return cudnn.weight_gradient(grad, x, operand.weight, operand.mask, box, operand.geometry)
    plan = operand.plan("weight", tile)
    x = _aligned(x, operand, "weight")
    weight, mask, geometry = operand.weight, operand.mask, operand.geometry
    return sum_weight_gradient(grad, x, weight, mask, plan, geometry, tile, precision_of(x), atomics())
