"""The likelihood's operator: the kernels beside the definition, layouts, shapes, arguments, registration."""

import math
import sys

import pytest
import torch

import fastgen
from fastgen.ops.reconstruction_nll import INTEGERS, LIKELIHOODS, reconstruction_nll, reconstruction_nll_reference
from tests.ops.likelihood_inputs import IMPLS, LEVELS, make

# The interpreter computes on numpy arrays, which say aloud that exp(x) = inf; the kernels mean it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduction", ["sample", "none"])
def test_kernel_is_the_definition_over_several_blocks(likelihood, channels, reduction, device):
    """More elements than a block, sizes that divide none, an upstream gradient a sample or an element."""
    params, target = make(likelihood, 2, channels, 37, 31)
    params, target = params.to(device), target.to(device)
    results = []
    for impl in ("triton", "reference"):
        leaf = params.clone().requires_grad_()
        nll = reconstruction_nll(leaf, target, likelihood, reduction=reduction, impl=impl)
        nll.backward(torch.linspace(-1, 1, nll.numel(), device=device).view(nll.shape))
        results.append((nll.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=1e-5)
    largest = results[1][1].abs().max().item()
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_layouts_need_no_copies(likelihood, device):
    """Channels last, sliced, transposed and broadcast inputs give what their contiguous copies give, gradients too."""
    params, target = make(likelihood, 2, 3, 6, 10)
    params, target = params.to(device), target.to(device)
    layouts = {
        "channels last": (params.movedim(1, -1).contiguous().movedim(-1, 1), target),
        "both last": (
            params.movedim(1, -1).contiguous().movedim(-1, 1),
            target.contiguous(memory_format=torch.channels_last),
        ),
        "sliced": (params[..., ::2], target[..., ::2]),
        "turned": (params.transpose(-1, -2), target.transpose(-1, -2)),
        "broadcast": (params[:1].expand_as(params), target[:, :, :1].expand_as(target)),
    }
    for name, (p, t) in layouts.items():
        leaf, copy = p.detach().requires_grad_(), p.detach().contiguous().requires_grad_()
        nll = reconstruction_nll(leaf, t, likelihood, impl="triton")
        wanted = reconstruction_nll(copy, t.contiguous(), likelihood, impl="reference")
        torch.testing.assert_close(nll, wanted, rtol=2e-6, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
        upstream = torch.randn_like(nll)
        (grad,) = torch.autograd.grad(nll, leaf, upstream)
        (truth,) = torch.autograd.grad(wanted, copy, upstream)
        torch.testing.assert_close(
            grad, truth, rtol=1e-4, atol=1e-6 * truth.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("channels", "n_mix"), [(3, 14), (3, 3), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sample", "none"])
def test_a_mixture_whose_channels_are_neighbours_gives_the_same_bits(channels, n_mix, dtype, reduction, device):
    """Several programs an image, several tiles of channels, which are a multiple of four or not."""
    params, target = make("logistic_mixture", 2, channels, 14, 11, n_mix)
    params, target = params.to(device, dtype), target.to(device)
    results = []
    for leaf in (params, params.contiguous(memory_format=torch.channels_last)):
        leaf = leaf.requires_grad_()
        nll = reconstruction_nll(leaf, target, "logistic_mixture", reduction=reduction, impl="triton")
        (grad,) = torch.autograd.grad(nll, leaf, torch.arange(1.0, 1 + nll.numel(), device=device).view(nll.shape))
        assert grad.stride() == leaf.stride()
        results.append((nll, grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("layout", fastgen.distributions.LAYOUTS[:4])
def test_logits_in_every_layout_are_read_where_they_are(layout, device, monkeypatch):
    """The four places that models put the levels and the colours in: views, gradients in the model's own layout."""
    logits, target = make("categorical", 2, 3, 4, 5)
    order = {"BKCHW": (0, 1, 2), "BCKHW": (0, 2, 1), "B(KC)HW": (0, 1, 2), "B(CK)HW": (0, 2, 1)}[layout]
    stored = logits.permute(*order, 3, 4).contiguous()
    stored = stored.flatten(1, 2) if "(" in layout else stored
    leaf = stored.to(device).requires_grad_()
    view = fastgen.Categorical(7, layout).logits(leaf)
    assert view.data_ptr() == leaf.data_ptr()

    def refuse(*args, **options):
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    nll = reconstruction_nll(view, target.to(device), "categorical", impl="triton")
    (grad,) = torch.autograd.grad(nll.sum(), leaf)
    monkeypatch.undo()
    exact = logits.double().requires_grad_()
    truth = reconstruction_nll(exact, target, "categorical", impl="reference")
    torch.testing.assert_close(nll.cpu().double(), truth, rtol=2e-6, atol=2e-5)
    wanted = torch.autograd.grad(truth.sum(), exact)[0].permute(*order, 3, 4).reshape(stored.shape)
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-4, atol=1e-6)
    assert grad.stride() == leaf.stride()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float64])
def test_target_dtypes(kind, device):
    for likelihood in LIKELIHOODS:
        params, target = make(likelihood, classes=3)
        if likelihood in ("categorical", "logistic_mixture") and not (kind in INTEGERS and kind != torch.int8):
            continue
        params, target = params.to(device), target.to(device, kind)
        truth = reconstruction_nll(params, target, likelihood, impl="reference")
        torch.testing.assert_close(reconstruction_nll(params, target, likelihood, impl="triton"), truth)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradient_fills_its_whole_tensor_and_repeats_to_the_bit(likelihood, device, monkeypatch):
    params, target = make(likelihood, 2, 3, 5, 7)
    params, target = params.to(device), target.to(device)

    def nan_like(tensor, **options):
        return torch.full_like(tensor, math.nan, **options)

    monkeypatch.setattr(torch, "empty_like", nan_like)
    upstream = torch.ones(2, device=device)
    _, kept = torch.ops.fastgen.reconstruction_nll(params, target, likelihood, LEVELS, False)
    first = torch.ops.fastgen.reconstruction_nll_backward(upstream, params, target, kept, likelihood, LEVELS)
    again = torch.ops.fastgen.reconstruction_nll_backward(upstream, params, target, kept, likelihood, LEVELS)
    assert first.isfinite().all() and torch.equal(first, again)


def test_gradients_not_asked_for_are_not_computed(device, monkeypatch):
    params, target = make("gaussian")
    params, target = params.to(device), target.to(device)
    nll = reconstruction_nll(params, target, "gaussian", impl="triton")
    assert not nll.requires_grad
    leaf = params.clone().requires_grad_()
    reconstruction_nll(leaf, target, "gaussian", impl="triton").sum().backward()
    assert leaf.grad is not None and target.grad is None


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("per_element", [False, True])
def test_opcheck(likelihood, per_element, device):
    params, target = make(likelihood, 2, 1, 2, 3, n_mix=2, classes=3)
    params, target = params.to(device).requires_grad_(), target.to(device)
    torch.library.opcheck(torch.ops.fastgen.reconstruction_nll, (params, target, likelihood, LEVELS, per_element))
    shape = (2, 1, 2, 3) if per_element else (2,)
    _, kept = torch.ops.fastgen.reconstruction_nll(params.detach(), target, likelihood, LEVELS, per_element)
    arguments = (torch.ones(shape, device=device), params.detach(), target, kept, likelihood, LEVELS)
    torch.library.opcheck(torch.ops.fastgen.reconstruction_nll_backward, arguments)


def test_float64_is_for_the_definition(device):
    params, target = make("bernoulli", dtype=torch.float64)
    assert reconstruction_nll(params.to(device), target.to(device)).dtype == torch.float64
    with pytest.raises(ValueError, match="float32"):
        reconstruction_nll(params.to(device), target.to(device), impl="triton")


# --- shapes, layouts, arguments


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_map_sums_to_the_sample(likelihood, impl, device):
    params, target = make(likelihood, channels=3)
    params, target = params.to(device), target.to(device)
    nll = reconstruction_nll(params, target, likelihood, impl=impl)
    each = reconstruction_nll(params, target, likelihood, reduction="none", impl=impl)
    assert each.shape == ((3, 1, 3, 5) if likelihood == "logistic_mixture" else (3, 3, 3, 5))
    torch.testing.assert_close(each.flatten(1).sum(1), nll)
    # An image may have fewer dimensions.
    row = reconstruction_nll(params[..., 0], target[..., 0], likelihood, reduction="none", impl=impl)
    torch.testing.assert_close(row, each[..., 0])


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("image", [(0, 1, 2, 2), (2, 1, 0, 2), (1, 1, 1, 1)])
def test_empty_and_single(likelihood, image, impl, device):
    params, target = make(likelihood, *image)
    params = params.to(device).requires_grad_()
    nll = reconstruction_nll(params, target.to(device), likelihood, impl=impl)
    nll.sum().backward()
    assert nll.shape == image[:1] and params.grad.shape == params.shape
    assert (nll == 0).all() or image == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("x", torch.zeros(1)), TypeError, "params must be a float tensor"),
        ((torch.zeros(1, dtype=torch.long), torch.zeros(1)), TypeError, "params must be a float tensor"),
        ((torch.zeros(1), [0.0]), TypeError, "target must be a real tensor"),
        ((torch.zeros(1), torch.zeros(1), "poisson"), ValueError, "likelihood must be one of"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, r"\(2, 3\)"),
        ((torch.zeros(2, 3), torch.full((2, 3), 0.5)), ValueError, "target must be 0 or 1.*0.5"),
        ((torch.zeros(2, 3), torch.full((2, 3), math.nan)), ValueError, "target must be 0 or 1"),
        ((torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), "gaussian"), ValueError, r"2\*C"),
        ((torch.zeros(2, 4, 3), torch.zeros(2, 3), "categorical"), TypeError, "integer levels"),
        ((torch.zeros(2, 4, 3), torch.full((2, 3), 4), "categorical"), ValueError, r"0\.\.3"),
        ((torch.zeros(2, 4, 3), torch.full((2, 3), -1), "categorical"), ValueError, r"0\.\.3"),
        ((torch.zeros(2, 9, 1, 1), torch.zeros(2, 3, 1, 1).int(), "logistic_mixture"), ValueError, r"10\*M"),
        ((torch.zeros(2, 6, 1, 1), torch.zeros(2, 2, 1, 1).int(), "logistic_mixture"), ValueError, r"3\*M"),
        ((torch.zeros(2, 9, 1, 1), torch.zeros(2, 1, 1, 1), "logistic_mixture"), TypeError, "integer levels"),
        ((torch.zeros(2, 9, 1, 1), torch.full((2, 1, 1, 1), 256), "logistic_mixture"), ValueError, r"0\.\.255"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        reconstruction_nll(*arguments)


def test_wrong_options():
    params, target = make("bernoulli")
    for options, message in (
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"levels": 1}, "levels must be"),
        ({"compat": "pixelcnn++"}, "compat must be"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruction_nll(params, target, "bernoulli", **options)


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_compiles_in_one_graph_and_runs_under_autocast(likelihood, impl, device):
    params, target = make(likelihood)
    params, target = params.to(device).requires_grad_(), target.to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(params, target):
        return reconstruction_nll(params, target, likelihood, impl=impl)

    nll = reconstruction_nll(params, target, likelihood, impl=impl)
    (wanted,) = torch.autograd.grad(nll.sum(), params)
    compiled = loss(params, target)
    torch.testing.assert_close(compiled, nll)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), params)[0], wanted)
    with torch.autocast(device, torch.bfloat16):
        assert reconstruction_nll(params * 1, target, likelihood, impl=impl).dtype == torch.float32


def test_reference_is_the_public_function_on_the_cpu():
    params, target = make("logistic_mixture", channels=3)
    assert torch.equal(
        reconstruction_nll(params, target, "logistic_mixture", impl="reference"),
        reconstruction_nll_reference(params, target, "logistic_mixture"),
    )


def test_a_compiled_softmax_is_the_compilers_own(monkeypatch):
    """As on a GPU: `_uses_kernel` chooses by what is compiled."""
    module = sys.modules["fastgen.ops.reconstruction_nll"]
    monkeypatch.setattr(module, "uses_triton", lambda impl, tensor: impl != "reference")
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        for likelihood in LIKELIHOODS:
            params, _ = make(likelihood)
            assert module._uses_kernel("auto", params, likelihood) == (not compiling or likelihood != "categorical")
            assert module._uses_kernel("triton", params, likelihood)
