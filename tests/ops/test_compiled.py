"""Every operation under `torch.compile` with sizes that vary, and what stays in memory after a call."""

import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastgen import ops
from tests.ops.likelihood_inputs import make

pytest.importorskip("triton")
LEVELS = {"bernoulli": 2, "gaussian": 256, "categorical": 7, "logistic_mixture": 256}


def of_likelihood(likelihood, impl):
    channels = 1 if impl == "reference" else 3  # a mixture's definition on RGB takes half a minute to trace

    def call(n):
        params, target = make(likelihood, n, channels, n + 1, 2 * n)
        return (params,), lambda p: ops.reconstruction_nll(p, target, likelihood, impl=impl)

    return call


def of_elbo(impl):
    def call(n):
        params, target = make("bernoulli", n, 1, n + 1, n + 2)
        return (params, torch.rand(n)), lambda p, kl: ops.elbo(p, target, kl, "bernoulli", impl=impl).elbo

    return call


def of_kl(impl, given):
    def call(n):
        shape = (n, n + 1, n + 2)
        eps = torch.randn(shape) if given else None

        def run(mu, logvar):
            z, kl = ops.reparameterize_kl(mu, logvar, eps=eps, impl=impl)
            return kl + 0 * z.flatten(1).sum(1)

        return (torch.randn(shape), torch.randn(shape)), run

    return call


def of_scan(operation, taps, impl):
    def call(n):
        weight = torch.randn(12, 3, taps)
        return (torch.randn(n, 12, n + 1, n + 2),), lambda gates: operation(gates, weight, impl=impl)

    return call


def of_cross_entropy(n):
    weight, target = torch.randn(2 * 5, 9), torch.randint(5, (n, 2, n + 1, n + 2))
    return (torch.randn(n, 9, n + 1, n + 2),), lambda x: ops.linear_cross_entropy(x, weight, target)


CASES = {"linear_cross_entropy": of_cross_entropy}
for impl in ("reference", "triton"):
    CASES |= {f"{likelihood} {impl}": of_likelihood(likelihood, impl) for likelihood in LEVELS}
    CASES[f"elbo {impl}"] = of_elbo(impl)
    CASES |= {f"kl {impl} {'given' if given else 'drawn'}": of_kl(impl, given) for given in (True, False)}


for impl in ("auto", "triton"):  # the definition unrolls
    CASES[f"diagonal {impl}"] = of_scan(ops.diagonal_lstm, 2, impl)
    CASES[f"row {impl}"] = of_scan(ops.row_lstm, 3, impl)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_sizes_may_vary(case):
    """Compiled once, for sizes that no other dimension has, and run for others, gradients too. Definitions are traced,
    and the operators of kernels with their gradients."""
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager" if "triton" in case else "eager"), []
    for n in (4, 5):
        inputs, run = CASES[case](n)
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
        leaves = [x.clone().requires_grad_() for x in inputs]
        found, wanted = compiled(*leaves), run(*inputs)
        counts.append(counter.frame_count)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(found.sum(), leaves)
        others = [x.clone().requires_grad_() for x in inputs]
        for one, other in zip(grads, torch.autograd.grad(run(*others).sum(), others), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name in CASES if "triton" in name and "drawn" not in name])
def test_works_in_cuda_graphs_of_inductor(case):
    """Which refuse what an operator allocates and keeps."""
    torch._dynamo.reset()
    with torch.device("cuda"):
        inputs, run = CASES[case](3)
    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")

    def evaluated(call):
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = call(*leaves)
        return [x.clone() for x in (found, *torch.autograd.grad(found.sum(), leaves))]

    expected = evaluated(run)
    for _ in range(4):  # compiled, warmed up, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(evaluated(compiled), expected, rtol=1e-4, atol=1e-4)


def test_masks_are_made_for_sizes_that_vary():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x * ops.causal_mask("B", 6, 3, (3, 3), 3).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (2, 3):
        assert torch.equal(compiled(torch.ones(n)), torch.ones(n) * ops.causal_mask("B", 6, 3, (3, 3), 3).sum())


@pytest.mark.parametrize("case", [name for name in CASES if "triton" in name])
def test_nothing_that_a_call_has_allocated_is_kept(case):
    """CUDA graphs, `mode="reduce-overhead"`, take back what an operator has allocated."""
    inputs, run = CASES[case](3)
    counts = []
    gc.freeze()  # what was there before is neither collected nor counted
    try:
        for _ in range(3):
            leaves = [x.clone().requires_grad_() for x in inputs]
            torch.autograd.grad(run(*leaves).sum(), leaves)
            del leaves
            gc.collect()
            counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert counts[1] == counts[2]  # at the first call PyTorch itself may keep some
