"""Compares one launch of everything that is launched by default with float64, to see if it is right on this device.
Nothing is timed.

The public operations choose their kernels and configurations by dtype, sizes and chip. The tables below hold sizes on
both sides of each choice: channels below 16, odd, and a multiple of 16; one pixel and many; every activation,
likelihood, direction and number of taps; with and without optional arguments.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import elbo, masked_conv2d, reconstruction_nll, reparameterize_kl, scans
from benchmarks.cases.references import gated_block_cropped
from benchmarks.harness.case import INTERPRETED, Case
from fastgen import accelerate, ops
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.ops.diagonal_lstm import diagonal_lstm_reference
from fastgen.ops.masked_conv2d import masked_conv2d_reference
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference
from fastgen.ops.row_lstm import row_lstm_reference

# dtype, and whether float32 products may be rounded to TF32
MODES = [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False), (torch.float16, True)]
PRODUCTS = ("masked_conv2d", "diagonal_lstm", "row_lstm")  # operations with matrix products, for which TF32 matters
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
BLOCKS = [(3, 128, 28), (2, 32, 9)]
# B, units, height, width
SCANS = [(3, 16, 28, 28), (2, 32, 32, 32), (2, 64, 32, 32), (2, 128, 32, 32), (1, 64, 64, 64), (2, 20, 7, 13)]
SCANS += [(1, 32, 128, 5), (2, 7, 1, 1), (2, 96, 9, 40)]
LATENTS = [(3, 37), (128, 20), (256, 1024), (3, 70001), (16, 4, 32, 32), (1, 1)]
IMAGES = [(3, 1, 28, 28), (2, 3, 32, 32), (2, 3, 5, 7)]


class Tables(NamedTuple):
    """The sizes of all operations.

    Attributes:
        convolutions: see Convolution.
        blocks: (B, channels, N) of gated blocks on N x N maps.
        scans: (B, hidden units, height, width).
        latents: shapes of mu and logvar.
        images: (B, C, H, W).
    """

    convolutions: list[Convolution] = CONVOLUTIONS
    blocks: list[tuple[int, int, int]] = BLOCKS
    scans: list[tuple[int, int, int, int]] = SCANS
    latents: list[tuple[int, ...]] = LATENTS
    images: list[tuple[int, int, int, int]] = IMAGES


# No blocks: the benchmark masked_conv2d compares them in the interpreter.
TOY = Tables(CONVOLUTIONS[-1:], [], [(1, 3, 2, 3)], LATENTS[:1], [(1, 3, 2, 3)])


class Operation(NamedTuple):
    """An operation at one size.

    Attributes:
        op, shape: as in `Case`.
        inputs: function of device and dtype that returns the arguments.
        definition: the operation in plain PyTorch.
        call: the public operation, which also takes `impl`.
    """

    op: str
    shape: str
    inputs: Callable[..., dict[str, Any]]
    definition: Callable[..., Any]
    call: Callable[..., Any]


def _latent(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = reparameterize_kl.inputs(device, shape, dtype)
    return inputs | reparameterize_kl.noise(inputs)


def _kl_alone(mu: Tensor, logvar: Tensor, *, call: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Tensor:
    """Only the KL of an operation that draws its own noise: its z cannot be compared."""
    return call(mu, logvar, **options)[1]


def operations(tables: Tables) -> Iterator[Operation]:
    """All operations that launch kernels, at these sizes."""
    calls: Iterable[Callable[..., Any]]  # the definition and the operation
    for sizes, kernel, mask_type, activation, more in tables.convolutions:
        options = {"activation": activation, **{k: v for k, v in more.items() if k != "data_channels"}}
        input_options = {"kernel": kernel, "mask_type": mask_type, "data_channels": more.get("data_channels", 1)}
        suffix = "".join(f" {key}={value}" for key, value in more.items())
        yield Operation(
            "masked_conv2d",
            f"{'x'.join(map(str, sizes))} {kernel}x{kernel} {mask_type} {activation}{suffix}",
            partial(masked_conv2d.inputs, sizes=sizes, **input_options),
            partial(masked_conv2d.convolve, call=masked_conv2d_reference, **options),
            partial(masked_conv2d.convolve, call=ops.masked_conv2d, **options),
        )
    for block in tables.blocks:
        inputs, name = partial(masked_conv2d.block_inputs, sizes=block), f"gated block {'x'.join(map(str, block))}"
        yield Operation("masked_conv2d", name, inputs, gated_block_cropped, masked_conv2d.run_block)
    for sizes in tables.scans:
        name = "x".join(map(str, sizes))
        for suffix, reverse in (("", False), (" reverse", True)):
            calls = (partial(call, reverse=reverse) for call in (diagonal_lstm_reference, ops.diagonal_lstm))
            yield Operation("diagonal_lstm", name + suffix, partial(scans.inputs, sizes=sizes, taps=2), *calls)
        for taps in (1, 3, 5):
            inputs = partial(scans.inputs, sizes=sizes, taps=taps)
            yield Operation("row_lstm", f"{name} k={taps}", inputs, row_lstm_reference, ops.row_lstm)
    for shape in tables.latents:
        name = "x".join(map(str, shape))
        functions: tuple[Callable[..., Any], ...] = (reparameterize_kl_reference, ops.reparameterize_kl)
        for free_bits in (0.0, 0.1):
            calls = (partial(function, free_bits=free_bits) for function in functions)
            yield Operation("reparameterize_kl", f"{name} free_bits={free_bits}", partial(_latent, shape=shape), *calls)
        inputs, calls = partial(reparameterize_kl.inputs, shape=shape), (partial(_kl_alone, call=f) for f in functions)
        yield Operation("reparameterize_kl", f"{name} own noise", inputs, *calls)
    for image in tables.images:
        for likelihood in reconstruction_nll.RIVALS:
            inputs = partial(reconstruction_nll.inputs, likelihood=likelihood, image=image)
            calls = (partial(f, likelihood=likelihood) for f in (reconstruction_nll_reference, ops.reconstruction_nll))
            yield Operation("reconstruction_nll", f"{likelihood} {'x'.join(map(str, image))}", inputs, *calls)


# The model, the shape of its images, its size, and the number of images. 3,000 and 6,000 images are enough rows for the
# larger tiles of the sampler on 94 to 187 multiprocessors.
Machine = tuple[Callable[..., nn.Module], tuple[int, int, int], dict[str, Any], int]
MACHINES: list[Machine] = [
    *((GatedPixelCNN, (1, 4, 5), {"levels": 5, "channels": 24, "layers": 2}, n) for n in (3, 3000, 6000)),
    (PixelCNN, (3, 3, 4), {"levels": 256, "channels": 48, "layers": 2}, 5),
    (PixelCNNPP, (3, 4, 4), {"channels": 12, "layers": 1, "n_mix": 2}, 5),
]
TOY_MACHINES: list[Machine] = [(GatedPixelCNN, (1, 2, 3), {"levels": 3, "channels": 4, "layers": 1}, 2)]
FAR = 1e-4  # largest tolerated distance of the engine's parameters from those of the model's own pass


def _model(device: torch.device, machine: Machine) -> dict[str, Any]:
    build, shape, size, n = machine
    model: Any = build(shape, **size).to(device).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(2)  # otherwise all levels are almost equally probable
    return {"model": model, "noise": torch.rand(model.distribution.noise_shape(n, shape), device=device)}


def _images(model: Any, noise: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W), and n ones if the backend drew them rightly, before a whole pass of the model corrected
    them; otherwise n zeros.

    Raises:
        RuntimeError: the sampler fell back to another backend.
    """
    sampler = accelerate(model, model.shape, distribution=model.distribution, backend=backend, verify="always")
    levels = sampler.sample(len(noise), noise=noise)
    stats = sampler.stats
    if stats is None or stats.backend != backend:
        raise RuntimeError(f"not played by {backend}: {sampler.explain()}")
    # Rounding alone changes about one draw in 10^5.
    wrong = (stats.error or 0.0) > FAR or stats.redrawn > len(noise) / 100
    return levels, torch.full((len(noise),), float(not wrong))


def step_machines(machines: list[Machine], backends: Sequence[str], provider: str) -> Iterator[Case]:
    """Compares the kernels that draw whole images with the naive loop. The cases are not `blocking`: the backends may
    capture CUDA graphs."""
    for machine, backend in itertools.product(machines, backends):
        build, shape, _, n = machine
        yield Case(
            op="launches",
            shape=f"step machine {backend}, {build.__name__} {'x'.join(map(str, shape))} B={n}",
            dtype=torch.float32,
            inputs=partial(_model, machine=machine),
            providers={provider: partial(_images, backend=backend)},
            truth=partial(_images, backend="naive"),
            modes=("fwd",),
            exact=True,
            timed=False,
        )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    """Each operation beside its definition in plain PyTorch, whose error in this dtype sets the tolerance."""
    toy = size == "toy"
    provider = "fastgen" if device.type == "cuda" else f"fastgen, {INTERPRETED}"
    # The interpreter can run only "persistent": the other backend needs CUDA graphs.
    machines, backends = (TOY_MACHINES, ["persistent"]) if toy else (MACHINES, ["persistent", "cuda_graph"])
    yield from step_machines(machines, backends, provider)
    for dtype, tf32 in [(torch.float32, True)] if toy else MODES:
        for operation in operations(TOY if toy else Tables()):
            if tf32 or operation.op in PRODUCTS:
                yield Case(
                    op="launches",
                    shape=f"{operation.op} {operation.shape}{'' if tf32 else ' IEEE'}",
                    dtype=dtype,
                    inputs=partial(operation.inputs, dtype=dtype),
                    providers={
                        "definition": operation.definition,
                        provider: partial(operation.call, impl="triton"),
                    },
                    truth=operation.definition,
                    modes=("full",),
                    tf32=tf32,
                    timed=False,
                    blocking=True,
                )


# Sizes for `python -m benchmarks host`. They are small, since operations that fastgen leaves to PyTorch really run.
SMALL = Tables(
    [((2, 32, 64, 8), 3, "B", "gated", {})], [], [(2, 16, 8, 8), (2, 128, 8, 8)], [(128, 20)], [(2, 3, 8, 8)]
)


def of_host() -> Iterator[Operation]:
    """One or two small sizes of every public operation."""
    yield from operations(SMALL)
    call = partial(elbo.fused, likelihood="bernoulli")
    inputs = partial(elbo.inputs, likelihood="bernoulli", image=(8, 1, 8, 8), latent=20)
    yield Operation("elbo", "bernoulli 8x1x8x8 D=20", inputs, elbo.definition_of("bernoulli"), call)
