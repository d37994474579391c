"""What compiled kernels execute and move, by counts: a GPU's time follows from these where a kernel is near its floor.

    PTXEMU_ARCH=90 PYTHONPATH=.:../shared python -m pytest -p tests.emulated tests/kernels/test_counts.py

Instructions are of the PTX, of threads, with those of padding. Each sector of each request moves 32 bytes.
"""

import math
import os

import pytest
import torch

from fastgen.ops import diagonal_lstm, reconstruction_nll, reparameterize_kl, row_lstm

pytest.importorskip("triton")
ptxemu = pytest.importorskip("ptxemu")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(), reason="counts in ptxemu"
)
HOPPER = os.environ.get("PTXEMU_ARCH", "80") == "90"


def counts(run, inputs):
    """Of the forward and of the backward, over all of their kernels."""
    with ptxemu.counting() as forward:
        results = run(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.ones_like(result) for result in results]
    with ptxemu.counting() as backward:
        torch.autograd.grad(results, [x for x in inputs if x.requires_grad], grads)
    return forward.total(), backward.total()


def leaf(x, last=False):
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    return x.detach().requires_grad_()


# Of mu and logvar; instructions an element forward and backward. Longer: tiles that pass through shared memory, so that
# both tensors are read in whole sectors.
LATENTS = {
    "rows": (lambda: (torch.randn(64, 1024), torch.randn(64, 1024)), 75, 75),
    "long rows": (lambda: (torch.randn(1024, 4096), torch.randn(1024, 4096)), 67, 71),
    "long rows, bfloat16": (lambda: torch.randn(2, 1024, 4096).bfloat16().unbind(), 71, 76),
    "halves of a layer": (lambda: torch.randn(64, 1024).chunk(2, 1), 78, 76),
    "halves of a map": (lambda: torch.randn(16, 32, 16, 16).chunk(2, 1), 76, 76),
    "halves of a map, channels last": (lambda: leaf(torch.randn(16, 32, 16, 16), last=True).chunk(2, 1), 80, 80),
    "short rows": (lambda: (torch.randn(128, 20), torch.randn(128, 20)), 90, 90),
    "many short rows": (lambda: (torch.randn(1280, 20), torch.randn(1280, 20)), 87, 84),
    "odd rows": (lambda: (torch.randn(64, 1023), torch.randn(64, 1023)), 86, 89),
    "transposed": (lambda: (torch.randn(1024, 64).T, torch.randn(1024, 64).T), 103, 106),
    "two orders": (lambda: (leaf(torch.randn(16, 32, 16, 16), last=True), torch.randn(16, 32, 16, 16)), 108, 106),
}


@pytest.mark.parametrize("case", LATENTS)
def test_kl_is_near_a_copy(case):
    """At least 85 % of the bytes that are asked for are those of a copy: 3 and 5 numbers an element."""
    make, *most = LATENTS[case]
    inputs = [leaf(x) for x in make()]
    for found, limit, copied in zip(
        counts(lambda *x: reparameterize_kl(*x, impl="triton"), inputs), most, (3, 5), strict=True
    ):
        assert 32 * found.instructions <= limit * inputs[0].numel()
        assert found.moved <= copied * inputs[0].nbytes / 0.85
        assert found.access("global store").widths[16] > 0.9 * found.stores.bytes
        assert found.loads.widths[16] > 0.4 * found.loads.bytes  # of tensors across a tile's order: a number a time
        scattered = ("transposed", "two orders", "many short rows")  # fours of rows are gathered in shared memory
        assert found.shared.wavefronts == found.shared.passes or case in scattered


MIXTURE = ("logistic_mixture", (2, 100, 32, 32), (2, 3, 32, 32), 256)
SOFTMAX = ("categorical", (2, 256, 1, 28, 28), (2, 1, 28, 28), 256)
# Likelihood, shapes of params and target, levels; channels last; bytes moved over those of the floor, forward and
# backward; instructions a parameter, of the mixture at most half of the 81 and 131 of a tile of components a program.
LIKELIHOODS = {
    "bernoulli": (("bernoulli", (8, 1, 64, 64), (8, 1, 64, 64), 2), False, (1.05, 1.05), (50, 32)),
    "gaussian": (("gaussian", (8, 6, 32, 32), (8, 3, 32, 32), 2), False, (1.05, 1.05), (22, 23)),
    "categorical": (SOFTMAX, False, (1.05, 1.05), (15, 34)),
    "categorical, channels last": (SOFTMAX, True, (1.13, 1.13), (43, 27)),
    "mixture": (MIXTURE, False, (1.05, 1.05), (40, 55)),
    "mixture, channels last": (MIXTURE, True, (2.25, 2.85), (46, 54)),
    "mixture, channels last, bfloat16": (MIXTURE, True, (3.6, 5.0), (47, 56)),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_likelihoods_are_at_their_floor(case):
    (likelihood, shape, image, levels), last, traffic, most = LIKELIHOODS[case]
    dtype = torch.bfloat16 if case.endswith("bfloat16") else torch.float32
    params, target = leaf(torch.randn(shape, dtype=dtype), last), torch.randint(0, levels, image)
    target = target.float() if likelihood in ("bernoulli", "gaussian") else target
    both = counts(lambda params: reconstruction_nll(params, target, likelihood, impl="triton"), [params])
    for found, moved, limit in zip(both, traffic, most, strict=True):
        assert found.moved <= moved * found.unique and 32 * found.unique_sectors <= 1.01 * found.unique
        assert 32 * found.instructions <= limit * params.numel()
        # Reductions over levels, components and pixels.
        assert found.shared.wavefronts <= 1.3 * found.shared.requests
        assert found.shared.wavefronts == found.shared.passes
        if not last:
            assert found.loads.efficiency >= 0.95


SIZES = [(16, 16), (28, 20)]  # height and width of an image: a square, and MNIST's cut


def steps_of(operation, height, width):
    return height if operation is row_lstm else height + width - 1


def floor_of_tiles(units, taps, pixels, steps, backward):
    """Bytes in float32: all weights a step; of a pixel what is read and written, states of neighbours once.

    Forward: 4h terms, states, 4h activated gates, cell states twice. Backward: gradient, cell state and the one before,
    4h activated gates, 4h gradients twice, and twice that of the cell state."""
    numbers = 17 if backward else 12
    return 4 * (steps * 4 * taps * units**2 + pixels * numbers * units)


# Operation, taps, units; traffic over the floor forward and backward, of both sizes; barriers a step on sm_80 and on
# sm_90, forward and backward. A state is read once a tap, 3 times by the row operation: its backward at 64 units, where
# weights are few, moves 1.12 and 1.15 of the floor. Fragments are read once more at the end of a tile.
TILES = {
    "diagonal, 64": (diagonal_lstm, 2, 64, ((1.02, 1.07), (1.02, 1.09)), ((13, 5), (21, 11))),
    "diagonal, 128": (diagonal_lstm, 2, 128, ((1.08, 1.04), (1.09, 1.05)), ((41, 13), (37, 19))),
    "row, 64": (row_lstm, 3, 64, ((1.1, 1.12), (1.1, 1.15)), ((17, 7), (29, 15))),
    "row, 128": (row_lstm, 3, 128, ((1.08, 1.07), (1.09, 1.09)), ((57, 13), (53, 27))),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", TILES)
def test_scans_by_tiles(case, size):
    operation, taps, units, traffic, barriers_a_step = TILES[case]
    steps = steps_of(operation, *size)
    gates, weight = (
        leaf(torch.randn(1, 4 * units, *size), last=True),
        leaf(torch.randn(4 * units, units, taps) / 8),
    )
    both = counts(lambda *x: operation(*x, impl="triton"), [gates, weight])
    for backward, (found, moved, barriers) in enumerate(
        zip(both, traffic[SIZES.index(size)], barriers_a_step, strict=True)
    ):
        assert found.moved <= moved * floor_of_tiles(units, taps, math.prod(size), steps, backward)
        assert found.loads.efficiency >= 0.95 and found.stores.efficiency >= 0.95
        assert found.barriers_a_block <= barriers[HOPPER] * steps


# Operation, taps; barriers a step on sm_80 and on sm_90, forward and backward.
HALF = {"diagonal": (diagonal_lstm, 2, ((21, 12), (23, 14))), "row": (row_lstm, 3, ((29, 12), (31, 18)))}


@pytest.mark.parametrize("case", HALF)
def test_barriers_of_tiles_in_half_precision(case):
    """At 128 units."""
    operation, taps, barriers = HALF[case]
    inputs = [leaf(torch.randn(1, 512, 16, 16), last=True), leaf(torch.randn(512, 128, taps) / 8)]
    inputs = [leaf(x.to(torch.bfloat16)) for x in inputs]
    both = counts(lambda *x: operation(*x, impl="triton"), inputs)
    for found, most in zip(both, barriers, strict=True):
        assert found.barriers_a_block <= most[HOPPER] * steps_of(operation, 16, 16)


# Operation, taps, units; barriers a step, forward and backward, of a program an image, on sm_80 and on sm_90.
SCANS = {
    "diagonal, 16": (diagonal_lstm, 2, 16, (8, 8), (8, 8)),
    "diagonal, 64": (diagonal_lstm, 2, 64, (8, 8), (8, 8)),
    "row, 16": (row_lstm, 3, 16, (7, 5), (15, 15)),
    "row, 64": (row_lstm, 3, 64, (15, 9), (15, 9)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", SCANS)
def test_scans_of_a_program_an_image(case, size):
    """In half precision. All is moved once, but by the row operation weights once a step and states once a tap, and in
    its backward cell states twice."""
    operation, taps, units, *barriers = SCANS[case]
    steps = steps_of(operation, *size)
    inputs = [leaf(torch.randn(1, 4 * units, *size), last=True), leaf(torch.randn(4 * units, units, taps) / 8)]
    inputs = [leaf(x.to(torch.bfloat16)) for x in inputs]
    for backward, found in enumerate(counts(lambda *x: operation(*x, impl="triton"), inputs)):
        again = 0
        if operation is row_lstm:
            again = 2 * units * ((steps - 1) * 4 * taps * units + (taps - 1) * math.prod(size) * (4 if backward else 1))
            again += 4 * units * (steps - 1) * size[1] * backward
        assert found.moved <= 1.03 * (found.unique + again)
        assert found.loads.efficiency >= 0.95 and found.stores.efficiency >= 0.95
        assert found.barriers_a_block <= barriers[backward][HOPPER] * steps
