"""One launch of everything that is launched by default, against float64: is it right on this device? Nothing is timed.

The public operations choose their kernels and configurations by dtype, sizes and chip. The tables below hold sizes on
both sides of each of these choices: channels below 16, odd and a multiple of 16, one pixel and many, every activation,
likelihood, direction and tap count, with and without what is optional.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import reconstruction_nll as likelihoods
from benchmarks.harness.case import INTERPRETED, Case
from fastgen import ops
from fastgen.nn import GatedMaskedBlock
from fastgen.ops.diagonal_lstm import diagonal_lstm_reference
from fastgen.ops.masked_conv2d import masked_conv2d_reference
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference
from fastgen.ops.row_lstm import row_lstm_reference

# dtype, and whether products of float32 may be TF32
MODES = [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False), (torch.float16, True)]
PRODUCTS = ("masked", "gated", "diagonal", "row")  # what has any
# (B, I, O, N), kernel, mask type, activation, further arguments
Convolution = tuple[tuple[int, int, int, int], int, str, str, dict[str, Any]]
CONVOLUTIONS: list[Convolution] = [
    ((3, 128, 256, 28), 3, "B", "gated", {}),
    ((3, 128, 256, 28), 1, "B", "gated", {}),
    ((3, 128, 128, 28), 3, "B", "relu", {}),
    ((3, 128, 128, 28), 3, "B", "none", {}),
    ((2, 256, 512, 19), 3, "B", "gated", {}),
    ((3, 64, 64, 32), 5, "B", "relu", {}),
    ((3, 48, 40, 13), 3, "B", "gated", {}),
    ((2, 96, 192, 17), 3, "A", "none", {"data_channels": 3}),
    ((2, 17, 34, 9), 3, "B", "gated", {}),
    ((5, 1, 64, 28), 7, "A", "none", {}),
    ((5, 3, 128, 32), 7, "A", "relu", {}),
    ((3, 128, 256, 32), 7, "B", "gated", {}),
    ((2, 32, 32, 15), 3, "B", "relu", {"stride": 2}),
    ((2, 32, 64, 15), 3, "B", "gated", {"dilation": 2}),
    ((1, 128, 256, 1), 1, "B", "none", {}),
    ((2, 3, 6, 7), 1, "B", "gated", {}),
]
# B, units, height, width
SCANS = [(3, 16, 28, 28), (2, 32, 32, 32), (2, 64, 32, 32), (2, 128, 32, 32), (1, 64, 64, 64), (2, 20, 7, 13)]
SCANS += [(1, 32, 128, 5), (2, 7, 1, 1), (2, 96, 9, 40)]
LATENTS = [(3, 37), (128, 20), (256, 1024), (3, 70001), (16, 4, 32, 32), (1, 1)]
IMAGES = [(3, 1, 28, 28), (2, 3, 32, 32), (2, 3, 5, 7)]
BLOCKS = [(3, 128, 28), (2, 32, 9)]
Tables = dict[str, list[Any]]
TOY: Tables = {"convolutions": CONVOLUTIONS[-1:], "scans": [(1, 3, 2, 3)]}
TOY |= {"latents": LATENTS[:1], "images": [(1, 3, 2, 3)]}
ALL: Tables = {"convolutions": CONVOLUTIONS, "scans": SCANS, "latents": LATENTS, "images": IMAGES}


def convolution(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], kernel: int, mask_type: str, of_mask: int
) -> dict[str, Any]:
    batch, of, to, n = sizes
    x = torch.randn(batch, of, n, n, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(to, of, kernel, kernel, device=device) / (of * kernel**2 / 2) ** 0.5
    floats = {"x": x, "weight": weight, "bias": torch.randn(to, device=device)}
    mask = ops.causal_mask(mask_type, to, of, kernel, of_mask).to(device)
    return {**{name: one.to(dtype).requires_grad_() for name, one in floats.items()}, "mask": mask}


def convolve(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, *, call: Callable[..., Tensor], **options: Any
) -> Tensor:
    return call(x, weight, mask, bias, padding=weight.shape[2] // 2, **options)


def _block(device: torch.device, dtype: torch.dtype, batch: int, channels: int, n: int) -> dict[str, Any]:
    maps = [torch.randn(batch, channels, n, n, device=device).to(dtype).requires_grad_() for _ in range(2)]
    block = GatedMaskedBlock(channels, channels).to(device, dtype)
    return {"block": block, "vertical": maps[0], "horizontal": maps[1]}


def _gated(block: GatedMaskedBlock, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
    return block(vertical, horizontal)


def scan(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], taps: int) -> dict[str, Tensor]:
    batch, units, height, width = sizes
    gates = torch.randn(batch, 4 * units, height, width, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4 * units, units, taps, device=device) / (taps * units) ** 0.5
    return {"gates": gates.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}


def _latent(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], given: bool) -> dict[str, Tensor]:
    mu, logvar = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    return {"mu": mu, "logvar": logvar, **({"eps": torch.randn(shape, device=device).to(dtype)} if given else {})}


def _kl_alone(mu: Tensor, logvar: Tensor, *, call: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Tensor:
    """Of a call that draws its noise inside, the divergence alone can be compared."""
    return call(mu, logvar, **options)[1]


def _nats(device: torch.device, dtype: torch.dtype, likelihood: str, image: tuple[int, ...]) -> dict[str, Tensor]:
    found = likelihoods.likelihood_inputs(device, likelihood, image, dtype)
    if likelihood == "logistic_mixture" and image[1] == 1:
        found["params"] = found["params"].detach()[:, :30].clone().requires_grad_()
    return found


def _of_all(tables: Tables, size: str) -> Iterator[Any]:
    """(name, inputs, definition, operation by name of `impl`) of everything that is launched."""
    for sizes, kernel, mask_type, activation, more in tables["convolutions"]:
        options = {"activation": activation, **{k: v for k, v in more.items() if k != "data_channels"}}
        given = {"sizes": sizes, "kernel": kernel, "mask_type": mask_type, "of_mask": more.get("data_channels", 1)}
        what = " ".join(f"{key}={value}" for key, value in more.items())
        yield (
            f"masked_conv2d {'x'.join(map(str, sizes))} {kernel}x{kernel} {mask_type} {activation} {what}".strip(),
            functools.partial(convolution, **given),
            functools.partial(convolve, call=masked_conv2d_reference, **options),
            functools.partial(convolve, call=ops.masked_conv2d, **options),
        )
    for sizes in tables["scans"]:
        name = "x".join(map(str, sizes))
        for reverse in (False, True):
            yield (
                f"diagonal_lstm {name}{' reverse' if reverse else ''}",
                functools.partial(scan, sizes=sizes, taps=2),
                functools.partial(diagonal_lstm_reference, reverse=reverse),
                functools.partial(ops.diagonal_lstm, reverse=reverse),
            )
        for taps in (1, 3, 5):
            inputs = functools.partial(scan, sizes=sizes, taps=taps)
            yield f"row_lstm {name} k={taps}", inputs, row_lstm_reference, ops.row_lstm
    for shape in tables["latents"]:
        name = "x".join(map(str, shape))
        for free_bits in (0.0, 0.1):
            yield (
                f"reparameterize_kl {name} free_bits={free_bits}",
                functools.partial(_latent, shape=shape, given=True),
                functools.partial(reparameterize_kl_reference, free_bits=free_bits),
                functools.partial(ops.reparameterize_kl, free_bits=free_bits),
            )
        yield (
            f"reparameterize_kl {name} own noise",
            functools.partial(_latent, shape=shape, given=False),
            functools.partial(_kl_alone, call=reparameterize_kl_reference),
            functools.partial(_kl_alone, call=ops.reparameterize_kl),
        )
    for image in tables["images"]:
        for likelihood in likelihoods.RIVALS:
            yield (
                f"reconstruction_nll {likelihood} {'x'.join(map(str, image))}",
                functools.partial(_nats, likelihood=likelihood, image=image),
                functools.partial(reconstruction_nll_reference, likelihood=likelihood),
                functools.partial(ops.reconstruction_nll, likelihood=likelihood),
            )
    if size != "toy":  # its kernels on a CPU are compared by the benchmark masked_conv2d
        for batch, channels, n in BLOCKS:
            inputs = functools.partial(_block, batch=batch, channels=channels, n=n)
            yield f"gated block {batch}x{channels}x{n}x{n}", inputs, _gated, _gated


def cases(size: str, device: torch.device) -> list[Case]:
    """Each with what plain PyTorch loses in that dtype, which the tolerance is taken from."""
    cuda = device.type == "cuda"
    found = []
    modes = [(torch.float32, True)] if size == "toy" else MODES
    for dtype, tf32 in modes:
        for shape, inputs, definition, operation in _of_all(TOY if size == "toy" else ALL, size):
            if not (tf32 or shape.startswith(PRODUCTS)):
                continue
            own = operation if operation is _gated else functools.partial(operation, impl="triton")
            found.append(
                Case(
                    op="launches",
                    shape=shape if tf32 else f"{shape} IEEE",
                    dtype=dtype,
                    inputs=functools.partial(inputs, dtype=dtype),
                    providers={"definition": definition, "fastgen" if cuda else f"fastgen, {INTERPRETED}": own},
                    truth=definition,
                    modes=("full",),
                    tf32=tf32,
                )
            )
    return found
