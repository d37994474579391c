"""The masked convolution forward and backward: what is launched, in which order, with which configuration.

Forward: pack the weights (small), then one product with all that follows in its finish. Backward: the gradient of the
input (pack, one product) and that of the weight (one product, one sum). These lead back through the activation as they
load the gradient, where that moves fewer bytes, and start after a pass that does it elsewhere: see
masked_conv2d_activation.py. Work and traffic of a layer are counted in benchmarks/masked_conv2d.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.kernels import masked_conv2d_cudnn as cudnn
from fastgen.kernels.masked_conv2d_activation import Finish, Incoming, through_activation
from fastgen.kernels.masked_conv2d_config import Layer, Tile, chip_of, choose, gathers, has_tma, meets, on_load
from fastgen.kernels.masked_conv2d_gemm import channels_last, convolve, empty_map, pack
from fastgen.kernels.masked_conv2d_grad import sum_weight_gradient
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

    def layer(self, direction: str, read: Tensor, parts: int, pixels: int, saved: str = "none") -> Layer:
        """The product that reads the map `read` and has `pixels` results a channel."""
        rows, channels = self.weight.shape[0] // parts, self.weight.shape[1]
        if direction == "in":
            rows, channels = channels, rows
        step = self.geometry.stride[0] * self.geometry.stride[1]
        fits = direction != "weight" and step == 1 and not gathers(channels, direction == "in", step)
        tma = fits and saved == "none" and has_tma(chip_of(read.device)) and descriptors_fit(read)
        return Layer(direction, read.dtype, rows, parts, channels, self.known.taps, pixels, step, tma, saved)

    def plan(self, direction: str, tile: Tile, parts: int = 1) -> Plan:
        mirrored = direction == "in"
        channels = self.weight.shape[0] // parts if mirrored else self.weight.shape[1]
        gather = gathers(channels, mirrored, self.geometry.stride[0] * self.geometry.stride[1])
        blocks = Blocks(tile.N, tile.K, parts, gather, mirrored)
        return plan_of(self.known, blocks, self.geometry, self.weight.device)

    def backward_layer(self, direction: str, incoming: Incoming, x: Tensor) -> Layer:
        """The gradient of x ("in") or of the weight from what comes in."""
        grad = incoming.grad
        if direction == "in":
            return self.layer("in", grad, incoming.parts, x[:, :1].numel(), incoming.saved)
        return self.layer("weight", x, incoming.parts, grad[:, :1].numel(), incoming.saved)


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
    other_weight (O, C, 1, 1). keep: "", with ReLU "sign" (what passes, bool), with a gate "valve" (the second half's
    input) or "both" halves'; the second result is empty for "". choice: instead of that for the shape and chip.

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
    channels = {"": 0, "both": 2 * out.shape[1]}.get(keep, out.shape[1])
    kept = empty_map(x, channels, height, width, torch.bool if keep == "sign" else x.dtype)
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
        kept = ~(pre <= 0) if end.keep else kept
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
    saved: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, condition, other and other_weight, as `wanted`; the rest are empty.

    grad: of the result, grad_pre: of the sums where these were kept and used; one is not None. saved: what the forward
    kept, or its activation where it kept nothing. out is of the result's shape; it is read for "relu" and "valve".
    """
    of_x, of_weight, of_bias, of_condition, of_other, of_other_weight = wanted
    rows = weight.shape[0]
    if out.numel() == 0:
        shapes = (x, weight, weight[:, 0, 0, 0], weight.new_empty(out.shape[0], rows), other, other_weight)
        return [
            torch.zeros_like(one) if asked and one is not None else x.new_empty(0)
            for one, asked in zip(shapes, wanted, strict=True)
        ]
    operand = operand_of(weight, mask, stride, padding, dilation)
    sums = "image" if of_condition else "all" if of_bias else ""
    if grad is None and grad_pre is not None:
        grad, grad_pre, saved = grad_pre, None, "none"
    assert grad is not None, "autograd asks for no gradient of nothing"
    incoming, totals = Incoming(grad, saved, out, kept), None
    more = of_other or of_other_weight
    reads, adds_up = False, False
    if grad_pre is None:
        reads, adds_up = _on_load(incoming, x, operand, (of_x, of_weight), sums, more=more)
    if not reads and (of_x or of_weight or more):
        incoming, totals = through_activation(incoming, grad_pre, True, sums)
    found = [x.new_empty(0) for _ in wanted]
    if of_x:
        found[0] = input_gradient(incoming, x, operand)
    if of_weight:
        found[1], added = weight_gradient(incoming, x, operand, adds_up=adds_up)
        totals = added if adds_up else totals
    if other is not None and other_weight is not None:
        pointwise = Operand(other_weight, None, POINTWISE)
        if of_other:
            found[4] = input_gradient(incoming, other, pointwise)
        if of_other_weight:
            found[5] = weight_gradient(incoming, other, pointwise)[0]
    if sums and totals is None:
        totals = through_activation(incoming, grad_pre, False, sums)[1]
    if totals is not None and of_bias:
        found[2] = totals.sum(0).to(weight.dtype)
    if totals is not None and of_condition:
        found[3] = totals.to(x.dtype)
    return found


def _on_load(
    incoming: Incoming, x: Tensor, operand: Operand, wanted: Sequence[bool], sums: str, *, more: bool
) -> tuple[bool, bool]:
    """Whether the products read the incoming gradient itself, and whether that of the weight adds it up for the bias.

    With an activation where that moves fewer bytes than a pass, and the kernel, not cuDNN, would run after the pass as
    well. Without one it is added up where every element is loaded once: the product waits for memory then, and does not
    miss the registers that adding takes. more: the gradient is needed elsewhere, too.
    """
    grad = incoming.grad
    if channels_last(grad, False) is not grad:
        return False, False
    names = [name for name, asked in zip(("in", "weight"), wanted, strict=True) if asked]
    layers = {name: operand.backward_layer(name, incoming, x) for name in names}
    tiles = {name: choose(x.device, layer, precision_of(x))[1] for name, layer in layers.items()}
    times = {name: meets(layer, tiles[name]) for name, layer in layers.items()}
    covers = "weight" in layers and operand.plan("weight", tiles["weight"], incoming.parts).covers
    if incoming.saved == "none":
        return True, sums == "all" and covers and times["weight"] == 1
    if more or sums == "image" or (sums == "all" and not covers):
        return False, False
    if any(one is not None and one.stride() != grad.stride() for one in incoming.maps):
        return False, False
    if "in" in layers and gathers(layers["in"].channels, True, layers["in"].step):
        return False, False
    fewer = on_load(incoming.saved, x.element_size(), sum(times.values()))
    runs = fewer and all(
        _choice(x, one)[0] == "triton" for layer in layers.values() for one in (layer.after_pass, layer)
    )
    return runs, runs and sums == "all"


def input_gradient(incoming: Incoming, x: Tensor, operand: Operand, choice: Choice | None = None) -> Tensor:
    """The gradient of x from one whose channels lie side by side; x gives the shape."""
    grad = incoming.grad
    out = empty_map(x, *x.shape[1:])
    if out.numel() == 0:
        return out
    provider, tile = choice or _choice(x, operand.backward_layer("in", incoming, x))
    if provider != "triton":
        box = operand.known.box if provider == "cropped" else None
        found = cudnn.input_gradient(grad, x, operand.weight, operand.mask, box, operand.geometry)
        return _dense_channels_last(found)
    plan = operand.plan("in", tile, incoming.parts)
    packed = pack(operand.weight, operand.mask, plan)
    if tile.tma:
        convolve_by_descriptors(grad, packed, plan, tile, precision_of(x), out, Finish())
    else:
        convolve(grad, packed, plan, operand.geometry, tile, precision_of(x), out, Finish(), through=incoming)
    return out


def weight_gradient(
    incoming: Incoming, x: Tensor, operand: Operand, choice: Choice | None = None, *, adds_up: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the weight from one whose channels lie side by side; and where `adds_up`, sums over pixels of the
    gradient of the sums, (1, O) float32, which cuDNN does not find.

    adds_up: only where all rows have a live weight (`Plan.covers`).
    """
    grad = incoming.grad
    provider, tile = choice or _choice(x, operand.backward_layer("weight", incoming, x))
    if provider != "triton":
        box = operand.known.box if provider == "cropped" else None
        return cudnn.weight_gradient(grad, x, operand.weight, operand.mask, box, operand.geometry), None
    plan = operand.plan("weight", tile, incoming.parts)
    x = _aligned(x, operand, "weight")
    weight, mask, geometry = operand.weight, operand.mask, operand.geometry
    return sum_weight_gradient(incoming, x, weight, mask, plan, geometry, tile, precision_of(x), atomics(), adds_up)
