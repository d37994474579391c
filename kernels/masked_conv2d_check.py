"""Does a launch configuration compute the right thing on this very device?

Compilers have produced silently wrong code for single configurations on single chips, so that none is used before it
has passed here: a small layer in which the tiles are full, are not, and meet the border, against float64.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels import masked_conv2d as kernels
from fastgen.kernels.masked_conv2d_activation import Incoming
from fastgen.kernels.masked_conv2d_config import Layer, Tile


@dataclass(frozen=True)
class Problem:
    """A layer with "same" padding on square maps, with the mask of a grey image."""

    batch: int
    channels: int
    outputs: int
    kernel: int
    size: int
    dtype: torch.dtype
    gated: bool
    mask: str = "B"
    saved: str = "none"  # what leads back through an activation in the gradients


def live_weights(problem: Problem, device: torch.device) -> Tensor:
    """(O, I, k, k): all before the centre in raster order, and with mask "B" the centre."""
    mask = torch.zeros(problem.kernel**2, dtype=torch.bool)
    mask[: problem.kernel**2 // 2 + (problem.mask == "B")] = True
    shape = (problem.outputs, problem.channels, problem.kernel, problem.kernel)
    return mask.view(problem.kernel, problem.kernel).expand(shape).contiguous().to(device)


@dataclass
class Product:
    """One of the three products of a layer: how to run it with a choice, and what it should give in float64.

    adding_up: the sums for the bias, which the product for the weight finds on the way, and what they should be.
    """

    layer: Layer
    run: Callable[[kernels.Choice], Tensor]
    truth: Tensor
    adding_up: tuple[Callable[[kernels.Choice], Any], Tensor] | None = None


def products(problem: Problem, device: torch.device) -> dict[str, Product]:
    """By direction, on random numbers."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    p, side = problem, problem.size
    mask = live_weights(problem, device)

    def feature_map(channels: int) -> Tensor:
        return normal(p.batch, side, side, channels).permute(0, 3, 1, 2).to(p.dtype)

    x = feature_map(p.channels)
    results = p.outputs // 2 if p.saved == "valve" else p.outputs
    out, kept = feature_map(results).tanh(), feature_map(results)
    if p.saved == "relu":
        out = out.relu()
    incoming = Incoming(feature_map(results), p.saved, out, kept > 0 if p.saved == "sign" else kept)
    grad = of_sums(incoming.grad, p.saved, out, kept)
    weight = (normal(p.outputs, p.channels, p.kernel, p.kernel) / (p.channels * p.kernel**2 / 2) ** 0.5).to(p.dtype)
    padding, parts = [p.kernel // 2] * 2, 2 if p.gated else 1
    operand = kernels.operand_of(weight, mask, [1, 1], padding, [1, 1])
    activation = "gated" if p.gated else "none"

    def forward(choice: kernels.Choice) -> Tensor:
        absent = (None, None, None, None, None)
        return kernels.forward(x, weight, mask, *absent, [1, 1], padding, [1, 1], activation, "", choice)[0]

    wide_x, wide_weight = x.double(), (weight * mask).double()
    truth = F.conv2d(wide_x, wide_weight, padding=padding)
    geometry = ([1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False])
    # Not by autograd, which is off inside an operator.
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, wide_x, wide_weight, None, *geometry)
    if p.gated:
        truth = truth[:, : p.outputs // 2].tanh() * truth[:, p.outputs // 2 :].sigmoid()
    pixels = p.batch * side * side
    weights = functools.partial(kernels.weight_gradient, incoming, x, operand)
    return {
        "out": Product(operand.layer("out", x, parts, pixels), forward, truth),
        "in": Product(
            operand.backward_layer("in", incoming, x),
            lambda choice: kernels.input_gradient(incoming, x, operand, choice),
            of_x,
        ),
        "weight": Product(
            operand.backward_layer("weight", incoming, x),
            lambda choice: weights(choice)[0],
            of_weight * mask,
            (lambda choice: weights(choice, adds_up=True)[1], grad.sum((0, 2, 3))[None]),
        ),
    }


def of_sums(grad: Tensor, saved: str, out: Tensor, kept: Tensor) -> Tensor:
    """The gradient of the sums in float64, by the definition; see `back` of the kernels."""
    grad, out, kept = grad.double(), out.double(), kept.double()
    if saved == "valve":
        s = kept.sigmoid()
        return torch.cat((grad * (s - out * (out / s).clamp(-1, 1)), grad * out * (1 - s)), 1)
    return grad if saved == "none" else grad * ((out if saved == "relu" else kept) > 0)


def error_of(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value; infinite where there is a NaN."""
    error = ((found.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def tolerance(dtype: torch.dtype, tf32: bool) -> float:
    """Of `error_of`: two roundings of the result in half precision, sixteen for the order of a sum in float32."""
    if dtype == torch.float32:
        return 4e-3 if tf32 else 16 * torch.finfo(dtype).eps
    return 2 * torch.finfo(dtype).eps


_found: dict[tuple[torch.device, Layer, Tile, bool], bool] = {}


def trusted(device: torch.device, layer: Layer, tile: Tile, tf32: bool) -> bool:
    """Whether the tile has passed on the device for the kind of `layer`; False where a CUDA graph is being captured and
    it was not tried before. Tries once in each process, which waits for the GPU; warns where it fails."""
    channels = layer.channels
    if channels >= 16:
        channels = 2 * tile.K if channels % tile.K == 0 else tile.K + tile.K // 2
    kind = Layer(layer.direction, layer.dtype, 2 * tile.N + 16, layer.parts, channels, 0, 0, 1, tile.tma, layer.saved)
    key = (device, kind, tile, tf32)
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _found[key] = passes(device, kind, tile, tf32)
        if not _found[key]:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            warnings.warn(
                f"masked_conv2d: {tile} gives wrong results for {kind} on {name}; it is not used", stacklevel=2
            )
    return _found[key]


def passes(device: torch.device, kind: Layer, tile: Tile, tf32: bool) -> bool:
    """Whether the tile gives the right numbers, twice the same, for a layer of these rows and channels.

    A configuration that does not compile or launch does not pass.
    """
    channels, outputs = kind.channels, kind.rows
    if kind.direction == "in":
        channels, outputs = outputs, channels
    problem = Problem(3, channels, kind.parts * outputs, 3, 12, kind.dtype, kind.parts == 2, saved=kind.saved)
    product = products(problem, device)[kind.direction]
    allowed, choice = tolerance(kind.dtype, tf32), ("triton", tile)
    try:
        first = product.run(choice)
        if error_of(first, product.truth) > allowed or not torch.equal(first, product.run(choice)):
            return False
        if product.adding_up is None:
            return True
        add_up, sums = product.adding_up
        return error_of(add_up(choice), sums) <= allowed
    except Exception:  # too much shared memory, too many registers, a compiler's own failure
        return False
