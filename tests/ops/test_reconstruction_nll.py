"""The likelihoods against sums over all values, torch.distributions, 60-digit arithmetic and autograd."""

import math

import mpmath
import pytest
import torch

import fastgen
from fastgen.ops.reconstruction_nll import INTEGERS, LIKELIHOODS, reconstruction_nll, reconstruction_nll_reference

LEVELS = 256
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
# The interpreter computes on numpy arrays, which say aloud that exp(x) = inf; the kernels mean it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(likelihood, batch=3, channels=1, height=3, width=5, n_mix=3, classes=7, dtype=torch.float32, scale=1.0):
    """Parameters and a target that fit the likelihood; the first pixels of a mixture's target are its two edges."""
    image = (batch, channels, height, width)
    if likelihood == "bernoulli":
        return torch.randn(image, dtype=dtype) * scale, torch.randint(0, 2, image)
    if likelihood == "gaussian":
        return torch.randn(batch, 2 * channels, height, width, dtype=dtype) * scale, torch.randn(image, dtype=dtype)
    if likelihood == "categorical":
        return torch.randn(batch, classes, *image[1:], dtype=dtype) * scale, torch.randint(0, classes, image)
    channels_out = n_mix * (10 if channels == 3 else 3)
    params = torch.randn(batch, channels_out, height, width, dtype=dtype) * scale
    target = torch.randint(0, LEVELS, image, dtype=torch.uint8)
    if target.numel():
        target[..., 0] = 0
        target[..., -1] = LEVELS - 1
    return params, target


def every_level(params, levels, **options):
    """Nats of each level at one pixel of one channel, params (1, P, 1, 1)."""
    values = torch.arange(levels, device=params.device).view(1, 1, levels, 1)
    each = params.expand(1, -1, levels, 1)
    return reconstruction_nll(each, values, "logistic_mixture", levels=levels, reduction="none", **options).flatten()


# --- the probabilities of all values sum to one


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
def test_discrete_likelihoods_sum_to_one(scale):
    logit = torch.randn(50) * scale
    both = [reconstruction_nll(logit, torch.full((50,), value), "bernoulli") for value in (0.0, 1.0)]
    torch.testing.assert_close(torch.exp(-both[0]) + torch.exp(-both[1]), torch.ones(50), rtol=0, atol=1e-6)

    logits = (torch.randn(1, 256, 1, 1) * scale).expand(256, -1, -1, -1)
    nll = reconstruction_nll(logits.unsqueeze(2), torch.arange(256).view(256, 1, 1, 1), "categorical")
    assert math.isclose(torch.exp(-nll.double()).sum(), 1, abs_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mean", "log_scale"),
    [(0.0, -3.0), (1.0, -4.0), (-1.5, -7.0), (0.9922, -6.9), (0.3, -7.0), (0.0, 5.0), (7.0, 40.0), (-50.0, 2.0)],
)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_one_logistic_sums_to_one(mean, log_scale, levels, dtype, device):
    """(1, -4) and values near 254 / 255 are where public ports sum to as much as 1.55."""
    params = torch.tensor([0.3, mean, log_scale], dtype=dtype, device=device).view(1, 3, 1, 1)
    impl = "triton" if dtype == torch.float32 else "reference"
    total = torch.exp(-every_level(params, levels, impl=impl).double()).sum().item()
    assert math.isclose(total, 1, abs_tol=2e-4 if dtype == torch.float32 else 1e-11)


def test_mixture_of_three_colours_sums_to_one():
    """Over all 17 ** 3 colours of a pixel; the means of G and B move with the colours before them."""
    levels = 17
    colours = torch.cartesian_prod(*[torch.arange(levels)] * 3)[..., None, None]
    for scale in (1.0, 5.0):
        params = (torch.randn(1, 20, 1, 1, dtype=torch.float64) * scale).expand(len(colours), -1, -1, -1)
        nll = reconstruction_nll(params, colours, "logistic_mixture", levels=levels)
        assert math.isclose(torch.exp(-nll).sum(), 1, abs_tol=1e-9)


def test_gaussian_integrates_to_one():
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    for mean, log_variance in ((0.0, 0.0), (1.3, 3.0), (-2.0, -8.0)):
        params = torch.tensor([mean, log_variance], dtype=torch.float64).view(1, 2, 1, 1).expand(len(x), -1, -1, -1)
        density = torch.exp(-reconstruction_nll(params, x.view(-1, 1, 1, 1), "gaussian"))
        assert math.isclose(torch.trapezoid(density, x), 1, abs_tol=1e-8)


def test_a_uniform_model_has_eight_bits_a_pixel():
    nll = reconstruction_nll(torch.zeros(2, 256, 3, 2, 2), torch.randint(0, 256, (2, 3, 2, 2)), "categorical")
    torch.testing.assert_close(nll / (12 * math.log(2)), torch.full((2,), 8.0))


# --- against other people's code


def test_bernoulli_and_categorical_are_torch_distributions():
    logits, target = make("bernoulli", channels=3, dtype=torch.float64)
    truth = -torch.distributions.Bernoulli(logits=logits).log_prob(target.double()).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction_nll(logits, target, "bernoulli"), truth)
    logits, target = make("categorical", channels=3, dtype=torch.float64)
    truth = -torch.distributions.Categorical(logits=logits.movedim(1, -1)).log_prob(target).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction_nll(logits, target, "categorical"), truth)


def test_gaussian_is_torch_distributions():
    params, target = make("gaussian", channels=3, dtype=torch.float64)
    mean, log_variance = params[:, :3], params[:, 3:]
    truth = -torch.distributions.Normal(mean, torch.exp(log_variance / 2)).log_prob(target)
    torch.testing.assert_close(reconstruction_nll(params, target, "gaussian"), truth.flatten(1).sum(1))
    torch.testing.assert_close(reconstruction_nll(params, target, "gaussian", reduction="none"), truth)


@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_is_the_distribution_that_is_sampled(channels):
    params, target = make("logistic_mixture", channels=channels, n_mix=4, scale=3.0, dtype=torch.float64)
    truth = -fastgen.LogisticMixture(4).log_prob(params, target.long())
    torch.testing.assert_close(reconstruction_nll(params, target, "logistic_mixture"), truth)


# --- 60 digits


def precise_logistic(mean, log_scale, level, levels):
    """-log p of one level under one discretized logistic."""
    half = mpmath.mpf(levels - 1) / 2
    centred = mpmath.mpf(level) / half - 1 - mpmath.mpf(mean)
    scale = mpmath.exp(mpmath.mpf(max(log_scale, -7)))

    def cdf(x):
        return 1 / (1 + mpmath.exp(-x / scale))

    upper, lower = centred + 1 / (2 * half), centred - 1 / (2 * half)
    if level == 0:
        return float(-mpmath.log(cdf(upper)))
    if level == levels - 1:
        return float(-mpmath.log(cdf(-lower)))
    # The difference is taken in the tail where both are small, so that 60 digits are enough.
    difference = cdf(upper) - cdf(lower) if centred < 0 else cdf(-lower) - cdf(-upper)
    return float(-mpmath.log(difference))


@pytest.mark.parametrize(
    ("dtype", "impl"), [(torch.float32, "reference"), (torch.float32, "triton"), (torch.float64, "reference")]
)
def test_one_logistic_against_sixty_digits(dtype, impl, device):
    """Narrow and wide scales, near the mean and far out: where the published recipe is wrong by up to 1.6 nats."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.rand(300, generator=generator) * 3 - 1.5
    log_scale = torch.rand(300, generator=generator) * 16 - 9
    level = torch.randint(0, 256, (300,), generator=generator)
    level[:20], level[20:40] = 0, 255
    params = torch.stack([torch.zeros(300), mean, log_scale]).to(device, dtype)[None, ..., None]
    target = level.to(device)[None, None, :, None]
    nll = reconstruction_nll(params, target, "logistic_mixture", reduction="none", impl=impl).flatten().cpu()
    with mpmath.workdps(60):
        truth = [
            precise_logistic(*triple, 256)
            for triple in zip(mean.tolist(), log_scale.tolist(), level.tolist(), strict=True)
        ]
    truth = torch.tensor(truth, dtype=torch.float64)
    absolute, relative = (2e-5, 2e-6) if dtype == torch.float32 else (1e-12, 1e-13)
    torch.testing.assert_close(nll.double(), truth, atol=absolute, rtol=relative)
    assert (truth < 15).sum() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_and_gaussian_tails_against_sixty_digits(dtype):
    rtol = 3e-7 if dtype == torch.float32 else 1e-14
    logits = torch.tensor([-80.0, -30.0, -1e-4, 0.0, 0.5, 20.0, 60.0], dtype=dtype)
    deviations, log_variances = torch.tensor([0.0, 1e-3, 3.0, 40.0], dtype=dtype), (-20, -3, 70)
    with mpmath.workdps(60):
        zero = [mpmath.log(1 + mpmath.exp(mpmath.mpf(x))) for x in logits.tolist()]
        one = [mpmath.log(1 + mpmath.exp(-mpmath.mpf(x))) for x in logits.tolist()]
        gaussian = [
            [(mpmath.log(2 * mpmath.pi) + v + mpmath.mpf(x) ** 2 * mpmath.exp(-v)) / 2 for x in deviations.tolist()]
            for v in log_variances
        ]
    for value, truth in ((0, zero), (1, one)):
        nll = reconstruction_nll(logits, torch.full((7,), value), "bernoulli")
        torch.testing.assert_close(
            nll.double(), torch.tensor([float(t) for t in truth], dtype=torch.float64), rtol=rtol, atol=0
        )
    for log_variance, truth in zip(log_variances, gaussian, strict=True):
        params = torch.stack([torch.zeros_like(deviations), torch.full_like(deviations, log_variance)], 1)
        nll = reconstruction_nll(params, deviations.unsqueeze(1), "gaussian")
        wanted = torch.tensor([float(t) for t in truth], dtype=torch.float64)
        torch.testing.assert_close(nll.double(), wanted, rtol=10 * rtol, atol=10 * rtol)


def test_pixelcnnpp_numbers_differ_only_where_its_recipe_is_wrong():
    params, target = make("logistic_mixture", channels=3, batch=8, height=8, width=8)
    exact = reconstruction_nll(params, target, "logistic_mixture", reduction="none")
    published = reconstruction_nll(params, target, "logistic_mixture", reduction="none", compat="pixelcnn++")
    assert 0 < (exact - published).abs().max() < 1
    # One component, scale exp(-7), half a level off the bin: the density is far from the bin's probability.
    narrow = torch.tensor([0.0, 100.0 / 127.5 - 1, -7.0]).view(1, 3, 1, 1)
    level = torch.tensor([103]).view(1, 1, 1, 1)
    gap = reconstruction_nll(narrow, level, "logistic_mixture") - reconstruction_nll(
        narrow, level, "logistic_mixture", compat="pixelcnn++"
    )
    assert gap.abs() > 0.5


# --- gradients


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduction", ["sample", "none"])
def test_gradcheck(likelihood, channels, reduction):
    params, target = make(likelihood, batch=2, channels=channels, height=2, width=2, dtype=torch.float64)
    params.requires_grad_()
    if likelihood == "gaussian":
        target.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, t: reconstruction_nll(p, t, likelihood, reduction=reduction), (params, target)
    )


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_storage_is_computed_in_float32(likelihood, channels, dtype, impl, device):
    """The parameters as stored, in float64, are the truth: what is left is float32 arithmetic for any storage type.

    The gradient is allowed the rounding of its dtype, and absolutely what a few float32 roundings of the parameters
    themselves would change (the narrowest logistic turns a rounding of its mean into 1e3 times that)."""
    params, target = make(likelihood, channels=channels, height=7, width=19)
    params, target = params.to(device, dtype), target.to(device)
    low, exact = params.clone().requires_grad_(), params.double().requires_grad_()
    nll = reconstruction_nll(low, target, likelihood, reduction="none", impl=impl)
    truth = reconstruction_nll(exact, target, likelihood, reduction="none", impl="reference")
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), truth, rtol=1e-6, atol=2e-6)
    upstream = torch.randn_like(nll)
    nll.backward(upstream)
    truth.backward(upstream.double())
    assert low.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=eps, atol=1e-6 * largest)


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("extreme", [1e4, 1e20, 3e38])
def test_finite_parameters_give_finite_values_and_gradients(likelihood, extreme, impl, device):
    params, target = make(likelihood, channels=3, scale=1.0)
    params = (torch.sign(params) * extreme).to(device).requires_grad_()
    nll = reconstruction_nll(params, target.to(device), likelihood, impl=impl)
    nll.sum().backward()
    assert nll.isfinite().all() and params.grad.isfinite().all()
    with torch.no_grad():
        same = reconstruction_nll(params, target.to(device), likelihood, impl="reference")
    torch.testing.assert_close(nll.detach(), same, rtol=1e-5, atol=0)


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_nan_in_nan_out(likelihood, channels, impl, device):
    """Each parameter of a pixel in turn: only that image's likelihood is NaN."""
    params, target = make(likelihood, batch=1, channels=channels, n_mix=2, classes=3)
    count = params.shape[1]
    poisoned = params.repeat(count + 1, 1, 1, 1, *[1] * (params.dim() - 4))
    for parameter in range(count):
        poisoned[parameter, parameter].view(-1)[3] = math.nan
    target = target.expand(count + 1, -1, -1, -1).to(device)
    nll = reconstruction_nll(poisoned.to(device), target, likelihood, impl=impl)
    assert nll[:-1].isnan().all() and nll[-1].isfinite()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_gradient_of_a_float_target(likelihood, device):
    params, target = make(likelihood, channels=3)
    grads = {}
    for impl in ("reference", "triton"):
        leaf = target.float().to(device).requires_grad_()
        reconstruction_nll(params.to(device), leaf, likelihood, impl=impl).sum().backward()
        grads[impl] = leaf.grad
    torch.testing.assert_close(grads["triton"], grads["reference"])


# --- the operator


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


@pytest.mark.parametrize("layout", fastgen.distributions.LAYOUTS)
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
    first = torch.ops.fastgen.reconstruction_nll_backward(upstream, params, target, likelihood, LEVELS)
    again = torch.ops.fastgen.reconstruction_nll_backward(upstream, params, target, likelihood, LEVELS)
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
    arguments = (torch.ones(shape, device=device), params.detach(), target, likelihood, LEVELS)
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
