"""Seeds, chunks, options, conditions; the images themselves are tested with the backends."""

import copy
import math
import pickle

import pytest
import torch
from causal_models import Stranger, small
from torch import nn
from torch.nn import functional as F

from fastgen import Bernoulli, Categorical, accelerate
from fastgen.models import GatedPixelCNN

WHOLE_PASSES = ("naive", "fixed_point")
BACKENDS = (*WHOLE_PASSES, "eager")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def grey(backend):
    model, shape, distribution = small("grey")
    return accelerate(model, shape, distribution=distribution, backend=backend)


@pytest.fixture
def by_class(backend):
    model = Stranger(1, 5, classes=3).eval()
    with torch.no_grad():
        model.of_class.weight *= 3
    return accelerate(model, (1, 4, 4), distribution=Categorical(5, "B(KC)HW"), backend=backend)


def test_seeds(grey):
    first = grey.sample(4, seed=7)
    assert torch.equal(grey.sample(4, seed=7), first)
    assert not torch.equal(grey.sample(4, seed=8), first)
    assert torch.equal(grey.sample(4, seed=torch.Generator().manual_seed(7)), first)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(grey.sample(4, seed=generator), first)
    assert not torch.equal(grey.sample(4, seed=generator), first)  # the generator has moved on
    torch.manual_seed(3)
    from_default = grey.sample(4)
    assert not torch.equal(grey.sample(4), from_default)
    torch.manual_seed(3)
    assert torch.equal(grey.sample(4), from_default)


def test_noise_is_the_image_alone(grey):
    """The same noise gives the same image in whatever batch, and each image depends on its own noise only."""
    noise = torch.rand(grey.noise_shape(5))
    images = grey.sample(5, noise=noise)
    assert torch.equal(grey.sample(5, noise=noise.flip(0)), images.flip(0))
    assert torch.equal(grey.sample(2, noise=noise[3:]), images[3:])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_chunks_give_the_same_images(by_class, batch_size):
    known, mask = torch.randint(5, (5, 1, 4, 4)), torch.rand(5, 1, 4, 4) < 0.3
    options = {"seed": 1, "condition": torch.tensor([0, 1, 2, 0, 1]), "known": known, "known_mask": mask}
    images, log_prob = by_class.sample(5, **options, return_log_prob=True)
    chunked, chunked_log_prob = by_class.sample(5, **options, return_log_prob=True, batch_size=batch_size)
    assert torch.equal(chunked, images)
    torch.testing.assert_close(chunked_log_prob, log_prob, atol=1e-5, rtol=1e-6)  # float32 logits


@pytest.mark.parametrize("backend", WHOLE_PASSES, indirect=True)
@pytest.mark.parametrize("on", ["gpu", "cpu"])
def test_out_of_memory_means_smaller_batches(grey, on):
    sizes = []

    def allocate(module, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 3:
            if on == "cpu":
                torch.empty(2**50)
            raise torch.OutOfMemoryError("no more")

    expected = grey.sample(7, seed=2)
    grey.model.register_forward_pre_hook(allocate)
    assert torch.equal(grey.sample(7, seed=2), expected)
    assert {7, 3, 1} <= set(sizes) <= {7, 3, 1, 2}
    sizes.clear()
    grey.sample(7, seed=2)
    assert max(sizes) == 3  # remembered
    grey.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        grey.sample(1)


def test_nothing_to_draw(grey):
    images, log_prob = grey.sample(0, return_log_prob=True)
    assert images.shape == (0, 1, 5, 4) and images.dtype == torch.long
    assert log_prob.shape == (0,) and log_prob.dtype == torch.float64
    assert grey.sample(0, known=torch.zeros(1, 1, 5, 4).long(), known_mask=torch.tensor(True)).shape == images.shape


def test_known_pixels_are_kept_and_seen(grey):
    noise = torch.rand(grey.noise_shape(3))
    free = grey.sample(3, noise=noise)
    # The image itself as what is known: the others are drawn as before, since their noise means the same.
    mask = torch.rand(3, 1, 5, 4) < 0.5
    assert torch.equal(grey.sample(3, noise=noise, known=free, known_mask=mask), free)
    # Broadcast, any integer dtype, and unread where not known.
    row = torch.full((1, 5, 4), 255, dtype=torch.uint8)
    row[:, 0] = torch.tensor([4, 0, 4, 0])
    mask = torch.zeros(5, 1, dtype=torch.bool)
    mask[0] = True
    images = grey.sample(3, noise=noise, known=row, known_mask=mask)
    assert torch.equal(images[:, :, 0], torch.tensor([4, 0, 4, 0]).expand(3, 1, 4))
    assert not torch.equal(images[:, :, 1:], free[:, :, 1:])


def test_log_prob_is_the_models_own_whatever_the_options(backend):
    model = GatedPixelCNN((3, 3, 4), 4, channels=9, layers=2).double().eval()
    sampler = accelerate(model, model.shape, distribution=model.distribution, backend=backend)
    known = torch.randint(4, model.shape)
    mask = torch.zeros(3, 1, dtype=torch.bool)
    mask[1:] = True
    for options in ({}, {"temperature": 0.5, "top_k": 2}, {"known": known, "known_mask": mask}):
        images, log_prob = sampler.sample(3, seed=0, return_log_prob=True, **options)
        assert log_prob.dtype == torch.float64
        torch.testing.assert_close(log_prob, model.log_prob(images).detach())


def test_options_reach_the_draws(grey):
    """Temperature, top-k and top-p act as on the distribution of the first pixel, which sees nothing."""
    with torch.no_grad():
        logits = grey.model(torch.zeros(1, 1, 5, 4))[0, :, 0, 0].double()
    grid = torch.full(grey.noise_shape(500), 0.5)
    grid[:, 0, 0, 0] = (torch.arange(500) + 0.5) / 500
    two = logits.topk(2).indices
    expected = {
        "temperature": (logits / 0.5).softmax(0),
        "top_k": torch.zeros(5).double().scatter(0, two, logits[two].softmax(0)),
        "top_p": F.one_hot(logits.argmax(), 5).double(),
    }
    for option, value in {"temperature": 0.5, "top_k": 2, "top_p": 1e-6}.items():
        drawn = grey.sample(500, noise=grid, **{option: value})[:, 0, 0, 0]
        share = torch.bincount(drawn, minlength=5) / 500
        torch.testing.assert_close(share.double(), expected[option], atol=2 / 500, rtol=0)
    modes = grey.sample(3, temperature=0)
    assert torch.equal(modes, modes[:1].expand_as(modes))
    with torch.no_grad():
        assert torch.equal(grey.model(modes.float() / 4 * 2 - 1).argmax(1), modes[:, 0])


def test_conditions(by_class):
    labels = torch.tensor([2, 0, 2, 1])
    noise = torch.rand(by_class.noise_shape(4))
    images = by_class.sample(4, noise=noise, condition=labels)
    for index, label in enumerate(labels.tolist()):
        one = by_class.sample(1, noise=noise[index : index + 1], condition=torch.tensor([label]))
        assert torch.equal(one, images[index : index + 1])
    all_twos = by_class.sample(4, noise=noise, condition=2)
    assert torch.equal(all_twos, by_class.sample(4, noise=noise, condition=torch.tensor([2])))
    assert torch.equal(all_twos[labels == 2], images[labels == 2])
    assert not torch.equal(all_twos, images)
    with pytest.raises(ValueError, match=r"condition has a tensor of shape \(3,\); expected 4 rows"):
        by_class.sample(4, condition=torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError):  # from the model: no label
        by_class.sample(4)


def test_a_condition_given_to_accelerate_is_the_default(backend):
    model = Stranger(1, 5, classes=3).eval()
    options = {"distribution": Categorical(5, "B(KC)HW"), "backend": backend}
    expected = accelerate(model, (1, 4, 4), **options).sample(4, seed=0, condition=1)
    for condition in (1, torch.tensor([1]), torch.tensor([1, 1, 1, 1])):
        assert torch.equal(accelerate(model, (1, 4, 4), condition=condition, **options).sample(4, seed=0), expected)


@pytest.mark.parametrize("as_what", ["second argument", "arguments", "keyword arguments"])
def test_a_condition_may_be_arguments_or_any_pytree(backend, as_what):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Stranger(1, 1)

        def forward(self, x, bias, name="no name", scale=1):
            if as_what == "second argument":
                bias, scale, name = bias[0]["bias"], bias[0]["scale"], bias[1]
            assert name == "a name" and scale.dim() == 0
            return self.model(x) + scale * sum(bias)[:, :, None, None]

    sampler = accelerate(Conditioned().eval(), (1, 3, 3), distribution=Bernoulli(), backend=backend)
    far = torch.tensor([[-50.0], [50.0], [50.0]])
    bias, scale = (far, torch.ones(1, 1)), torch.tensor(2.0)
    condition = {
        "second argument": [{"scale": scale, "bias": bias}, "a name"],
        "arguments": (bias, "a name", scale),
        "keyword arguments": {"name": "a name", "scale": scale, "bias": bias},
    }[as_what]
    images = sampler.sample(3, condition=condition, batch_size=2)
    assert torch.equal(images, (far > 0).long()[:, :, None, None].expand(3, 1, 3, 3))


def test_work_is_not_known_before_a_condition(by_class):
    with pytest.raises(RuntimeError, match="fails without a condition"):
        _ = by_class.work_ratio
    assert "fails without a condition" in by_class.explain()
    by_class.sample(2, condition=0)
    assert 0 < by_class.work_ratio <= 16
    assert "fails" not in by_class.explain()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (1, 1, 5), (2, 4, 1)], ids=str)
def test_rows_and_columns_of_one_pixel(shape):
    model = Stranger(shape[0], 4 * shape[0], shape[0]).eval()
    samplers = [
        accelerate(model, shape, distribution=Categorical(4, "B(CK)HW"), backend=backend) for backend in BACKENDS
    ]
    for n in (1, 3):
        first, *others = [sampler.sample(n, seed=0) for sampler in samplers]
        assert first.shape == (n, *shape)
        assert all(torch.equal(first, other) for other in others)


def test_nan_is_an_error_at_the_end(backend):
    class Spoilt(nn.Module):
        """NaN at one pixel of images whose first pixel is 1."""

        def forward(self, x):
            params = torch.zeros_like(x)
            params[:, 0, 1, 1] = torch.where(x[:, 0, 0, 0] == 1, math.nan, 0.0)
            return params

    sampler = accelerate(Spoilt(), (1, 2, 3), distribution=Bernoulli(), backend=backend)
    noise = torch.rand(sampler.noise_shape(3))
    noise[:, 0, 0, 0] = torch.tensor([0.2, 0.9, 0.1])
    with pytest.raises(FloatingPointError, match="NaN"):
        sampler.sample(3, noise=noise)
    good = sampler.sample(3, noise=noise.clamp(max=0.4))
    assert bool((good[:, 0, 0, 0] == 0).all())
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 1] = True  # where a level is known its parameters do not matter
    assert sampler.sample(3, noise=noise, known=torch.ones(1).long(), known_mask=mask)[1, 0, 0, 0] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_of_the_model(backend, dtype):
    model, shape, distribution = small("colours")
    sampler = accelerate(model, shape, distribution=distribution, backend=backend)
    seen = []
    model.to(dtype).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    assert sampler.sample(2, seed=0).shape == (2, *shape)
    assert set(seen) == {dtype}


def test_encode_decides_the_input(backend):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.model = Stranger(3, 5)

        def forward(self, x):
            return self.model(self.embedding(x.squeeze(1)).movedim(-1, 1))

    model = Tokens().eval()
    options = {"distribution": Categorical(5, "B(KC)HW"), "backend": backend}
    sampler = accelerate(model, (1, 3, 4), encode=lambda levels: levels, **options)
    images = sampler.sample(4, seed=0, temperature=0)
    with torch.no_grad():
        assert torch.equal(model(images).argmax(1), images[:, 0])


class Geometric:
    """A distribution by the documented protocol alone: levels 0, 1, 2, ... up to 9 with the failure rate sigmoid(p)."""

    def noise_shape(self, n, shape):
        return (n, *shape)

    def draw(self, params, noise, channel, previous):
        assert params.dim() == 2 and previous.shape == (len(params), channel)
        rate = torch.sigmoid(params[:, channel].double())
        return ((1 - noise[:, channel].double()).log() / rate.log()).floor().clamp(max=9).long()

    def log_prob(self, params, levels):
        rate = torch.sigmoid(params.double())
        return torch.where(levels < 9, (1 - rate).log(), 0.0).add(levels * rate.log()).sum(1)


def test_a_distribution_of_ones_own(backend):
    model = Stranger(2, 2, 2).eval()
    sampler = accelerate(model, (2, 3, 3), distribution=Geometric(), encode=lambda x: x.float() / 9, backend=backend)
    images, log_prob = sampler.sample(5, seed=0, return_log_prob=True)
    other = accelerate(model, (2, 3, 3), distribution=Geometric(), encode=lambda x: x.float() / 9, backend="naive")
    assert torch.equal(images, other.sample(5, seed=0))
    with torch.no_grad():
        params = model(images.float() / 9)
    expected = sum(Geometric().log_prob(params[..., i, j], images[..., i, j]) for i in range(3) for j in range(3))
    torch.testing.assert_close(log_prob, expected)
    with pytest.raises(ValueError, match="Geometric"):
        sampler.sample(1, temperature=0.5)
    with pytest.raises(ValueError, match="encode"):
        accelerate(model, (2, 3, 3), distribution=Geometric(), backend=backend)


def test_progress_counts_every_draw_once(grey, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, unit, disable):
            self.total, self.disable, self.n = total, disable, 0
            bars.append(self)

        def update(self, n):
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    grey.sample(5, seed=0, progress=True, batch_size=2)
    grey.sample(1, seed=0)
    shown, hidden = ((bar.n, bar.total, bar.disable) for bar in bars)
    assert shown == (100, 100, False) and hidden == (0, 20, True)  # nobody is told where nobody looks


def test_no_gradient_and_no_change_of_mode(grey):
    images, log_prob = grey.sample(2, seed=0, return_log_prob=True)
    assert not log_prob.requires_grad
    assert all(parameter.grad is None for parameter in grey.model.parameters())
    grey.model.train()
    assert torch.equal(grey.sample(2, seed=0), images)
    assert grey.model.training
    grey.model(torch.zeros(1, 1, 5, 4)).sum().backward()  # nothing was left that cannot be trained on


def test_copies_and_pickles(grey):
    expected = grey.sample(2, seed=0)
    for twin in (copy.deepcopy(grey), pickle.loads(pickle.dumps(grey))):
        assert twin.model is not grey.model
        assert torch.equal(twin.sample(2, seed=0), expected)
