"""The likelihoods against sums over all values, torch.distributions, 60-digit arithmetic and autograd."""

import math

import mpmath
import pytest
import torch

import fastgen
from fastgen.ops.reconstruction_nll import LIKELIHOODS, reconstruction_nll
from tests.ops.likelihood_inputs import IMPLS, make

# The interpreter computes on numpy arrays, which say aloud that exp(x) = inf; the kernels mean it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LAYOUTS = pytest.mark.parametrize(
    "lay_out", [lambda x: x, lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)], ids=["planes", "channels last"]
)


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


@pytest.mark.parametrize("skipped", [0, 1], ids=["vectors", "unaligned"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n_mix", [1, 2, 3, 4, 5, 10, 15, 24])
def test_components_of_a_pixel_side_by_side(n_mix, channels, skipped, device):
    """Channels-last: all numbers of components, read together or, where their memory begins at an odd place, singly."""
    params, target = make("logistic_mixture", channels=channels, n_mix=n_mix, height=7, width=11)
    stored = torch.empty(params.numel() + skipped, device=device)[skipped:]
    last = stored.view(params.movedim(1, -1).shape).copy_(params.movedim(1, -1)).movedim(-1, 1).requires_grad_()
    exact = params.double().requires_grad_()
    target = target.to(device)
    nll = reconstruction_nll(last, target, "logistic_mixture", impl="triton")
    truth = reconstruction_nll(exact.to(device), target, "logistic_mixture", impl="reference")
    torch.testing.assert_close(nll.double(), truth, rtol=2e-6, atol=2e-6)
    grad, wanted = torch.autograd.grad(nll.sum(), last)[0], torch.autograd.grad(truth.sum(), exact)[0]
    torch.testing.assert_close(grad.double().cpu(), wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("extreme", [1e4, 1e20, 3e38])
@LAYOUTS
def test_finite_parameters_give_finite_values_and_gradients(likelihood, extreme, impl, lay_out, device):
    params, target = make(likelihood, channels=3, scale=1.0)
    params = lay_out(torch.sign(params) * extreme).to(device).requires_grad_()
    nll = reconstruction_nll(params, target.to(device), likelihood, impl=impl)
    nll.sum().backward()
    assert nll.isfinite().all() and params.grad.isfinite().all()
    with torch.no_grad():
        same = reconstruction_nll(params, target.to(device), likelihood, impl="reference")
    torch.testing.assert_close(nll.detach(), same, rtol=1e-5, atol=0)


@IMPLS
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
@LAYOUTS
def test_nan_in_nan_out(likelihood, channels, impl, lay_out, device):
    """Each parameter of a pixel in turn: only that image's likelihood is NaN."""
    params, target = make(likelihood, batch=1, channels=channels, n_mix=2, classes=3)
    count = params.shape[1]
    poisoned = params.repeat(count + 1, 1, 1, 1, *[1] * (params.dim() - 4))
    for parameter in range(count):
        poisoned[parameter, parameter].view(-1)[3] = math.nan
    target = target.expand(count + 1, -1, -1, -1).to(device)
    nll = reconstruction_nll(lay_out(poisoned).to(device), target, likelihood, impl=impl)
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
