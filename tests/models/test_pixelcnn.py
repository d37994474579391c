"""All convolutional autoregressive models: causality, exact likelihood, checkpoints, training."""

import itertools
import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen import LogisticMixture, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.nn import gated
from tests.models.learning import nats_of_two_images

SMALL = {
    "pixelcnn": lambda shape, levels=4, **options: PixelCNN(shape, levels, channels=24, layers=2, **options),
    "gated": lambda shape, levels=4, **options: GatedPixelCNN(shape, levels, channels=24, layers=3, **options),
    "plusplus": lambda shape, levels=256, **options: PixelCNNPP(shape, channels=4, layers=1, n_mix=2, **options),
}


@pytest.fixture(params=SMALL)
def build(request):
    return lambda *args, **options: SMALL[request.param](*args, **options).double().eval()


def dependences(model, x, condition=None):
    """(C, H, W, C, H, W): whether the parameters of the first element change with the level of the second. A model
    with one set of parameters a pixel counts for all its channels."""
    channels, height, width = model.shape
    places = list(itertools.product(range(channels), range(height), range(width)))
    changed = x.expand(len(places), -1, -1, -1).clone()
    for index, place in enumerate(places):
        changed[(index, *place)] = (changed[(index, *place)] + model.levels // 2) % model.levels
    if condition is not None:
        condition = condition.expand(len(places) + 1)
    with torch.no_grad():
        params = model(torch.cat((x, changed)), condition)
    differs = (params[1:] != params[:1]).any(1)  # (places, [C,] H, W)
    if differs.dim() == 3:
        differs = differs.unsqueeze(1).expand(-1, channels, -1, -1)
    return differs.view(*model.shape, *model.shape).permute(3, 4, 5, 0, 1, 2)


@pytest.mark.parametrize("shape", [(1, 7, 6), (3, 5, 7), (1, 1, 5), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("n_classes", [None, 3])
def test_sees_what_comes_before_and_nothing_else(build, shape, n_classes):
    model = build(shape, n_classes=n_classes)
    x = torch.randint(model.levels, (1, *shape))
    seen = dependences(model, x, None if n_classes is None else torch.tensor([1]))
    channels, height, width = shape
    pixel = torch.arange(height * width).view(1, height, width)
    colour = torch.arange(channels).view(channels, 1, 1)
    rank = pixel.expand(shape) if isinstance(model, PixelCNNPP) else pixel * channels + colour
    before = rank[:, :, :, None, None, None] > rank
    assert not seen[~before].any()
    # Nothing nearby is missed either: the row above within two columns, the left neighbours, the earlier colours.
    for i, j in itertools.product(range(height), range(width)):
        near = before.clone()
        near[:, i, j, :, : max(0, i - 1)] = False
        near[:, i, j, :, :, : max(0, j - 2)] = False
        near[:, i, j, :, :, j + 3 :] = False
        blind = near[:, i, j] & ~seen[:, i, j]
        if isinstance(model, PixelCNN):
            continue  # masked convolutions one after the other have a blind spot to the upper right
        assert not blind.any(), (i, j)


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 1, 1), (3, 2, 1), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("name", ["pixelcnn", "gated"])
def test_probabilities_of_all_images_sum_to_one(name, shape):
    model = SMALL[name](shape, 3 if math.prod(shape) < 6 else 2).double().eval()
    images = torch.tensor(list(itertools.product(range(model.levels), repeat=math.prod(shape)))).view(-1, *shape)
    with torch.no_grad():
        total = model.log_prob(images).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_probabilities_of_all_levels_sum_to_one_in_a_mixture():
    model = SMALL["plusplus"]((1, 1, 2)).double().eval()
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    images = torch.stack((first, second), -1).view(-1, 1, 1, 2)
    with torch.no_grad():
        total = sum(model.log_prob(part).exp().sum() for part in images.split(8192))
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_the_colours_of_a_mixture_follow_the_chain_rule():
    """p(red) is the sum of p(red, green, blue) over all green and blue levels."""
    distribution = SMALL["plusplus"]((3, 1, 1)).distribution
    params = torch.randn(1, 20, dtype=torch.float64)
    green, blue = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    total = 0
    for part in torch.stack((torch.full_like(green, 77), green, blue), -1).view(-1, 3).split(8192):
        total = total + distribution.log_prob(params.expand(len(part), -1), part).exp().sum()
    red_only = torch.cat((params[:, :2], params[:, 2:6]), 1)  # the mixture's logits, red's means and log-scales
    expected = LogisticMixture(2).log_prob(red_only, torch.tensor([[77]])).exp()[0]
    torch.testing.assert_close(total, expected)


def test_log_prob_is_the_chain_rule(build):
    """log p of an image is the sum over its pixels, each computed by a pass that has not seen the pixel."""
    model = build((1, 3, 3), n_classes=2)
    x = torch.randint(model.levels, (2, 1, 3, 3))
    condition = torch.tensor([0, 1])
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for i, j in itertools.product(range(3), range(3)):
            seen = x.clone()
            seen.view(2, 9)[:, 3 * i + j :] = 0
            params = model(seen, condition)[..., i : i + 1, j : j + 1]
            total += model.distribution.log_prob(params, x[..., i : i + 1, j : j + 1])
        torch.testing.assert_close(model.log_prob(x, condition), total)


def test_gradients_of_every_live_parameter(build):
    model = build((3, 4, 4), n_classes=2)
    model.train()
    x = torch.randint(model.levels, (2, 3, 4, 4))
    model.log_prob(x, torch.tensor([0, 1])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for module in model.modules():
        if hasattr(module, "mask"):
            assert (module.weight.grad[~module.mask] == 0).all()


def test_a_state_dict_restores_the_model(build, tmp_path):
    model, other = build((1, 4, 4)), build((1, 4, 4))
    x = torch.randint(model.levels, (2, 1, 4, 4))
    assert not torch.equal(model(x), other(x))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(x), other(x))
    assert not any(key.endswith("mask") for key in model.state_dict())


def test_the_class_matters(build):
    model = build((1, 4, 4), n_classes=3)
    x = torch.randint(model.levels, (1, 1, 4, 4)).expand(2, -1, -1, -1)
    params = model(x, torch.tensor([0, 2]))
    assert not torch.equal(params[0], params[1])
    with pytest.raises(ValueError, match="condition"):
        model(x)
    with pytest.raises(ValueError, match="condition"):
        build((1, 4, 4))(x, torch.tensor([0, 1]))


def test_traces_to_plain_operators(build):
    model = build((1, 5, 5), n_classes=2).float()
    graph = make_fx(model)(torch.randn(1, 1, 5, 5), torch.tensor([1])).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function getitem")) for name in names)


def test_compiles_into_one_graph(build):
    model = build((1, 4, 4))
    x = torch.randint(model.levels, (1, 1, 4, 4))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_the_sampler_reads_what_runs_on_a_gpu(monkeypatch):
    """The sampler can trace the fused block (here in Triton's interpreter): same samples, same backend."""
    model = SMALL["gated"]((1, 3, 3)).eval()
    plain = accelerate(model, (1, 3, 3), distribution=model.distribution)
    expected = plain.sample(2, seed=3)
    monkeypatch.setattr(gated, "runs_triton", lambda impl, x: True)
    fused = accelerate(model, (1, 3, 3), distribution=model.distribution)
    assert torch.equal(fused.sample(2, seed=3), expected)
    assert fused.work_ratio == plain.work_ratio


@pytest.mark.parametrize("name", ["pixelcnn", "gated"])
def test_learns(name):
    assert nats_of_two_images(SMALL[name]((1, 4, 4), 2, n_classes=2)) < 0.5


def test_colours_take_any_number_of_channels():
    for model in (PixelCNN, GatedPixelCNN):
        x = torch.randint(4, (1, 3, 3, 3))
        assert model((3, 3, 3), 4, channels=8, layers=1)(x).shape == (1, 4, 3, 3, 3)


def test_weight_norm_keeps_the_model():
    torch.manual_seed(5)
    plain = SMALL["plusplus"]((3, 4, 4)).eval()
    torch.manual_seed(5)
    normed = SMALL["plusplus"]((3, 4, 4), weight_norm=True).eval()
    x = torch.randint(256, (1, 3, 4, 4))
    torch.testing.assert_close(normed(x), plain(x))
    assert any("original0" in name for name, _ in normed.named_parameters())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PixelCNN((1, 4), 4), "shape"),
        (lambda: PixelCNN(None, 4), "shape must be .* got None"),
        (lambda: PixelCNN((1, 4, 4), 1), "levels"),
        (lambda: PixelCNN((1, 4, 4), "4"), "levels must be an int >= 2, got '4'"),
        (lambda: PixelCNN((1, 4, 4), 4, channels=True), "channels must be .* got True"),
        (lambda: GatedPixelCNN((1, 4, 4), 4, dropout="0.5"), "dropout must be .* got '0.5'"),
        (lambda: PixelCNNPP((1, 4, 4), dropout=1.5), "dropout"),
        (lambda: PixelCNN((1, 4, 4), 4, channels=0), "channels"),
        (lambda: GatedPixelCNN((1, 4, 4), 4, layers=0), "layers"),
        (lambda: GatedPixelCNN((1, 4, 4), 4, n_classes=0), "n_classes"),
        (lambda: PixelCNNPP((2, 4, 4)), "shape"),
        (lambda: PixelCNNPP((1, 4, 4), layers=0), "layers"),
        (lambda: PixelCNNPP((1, 4, 4), n_mix=0), "n_mix"),
        (lambda: PixelCNN((1, 4, 4), 4, channels=4, layers=1)(torch.zeros(1, 1, 4, 5)), "x must have the shape"),
    ],
)
def test_bad_arguments_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_classes_that_a_model_does_not_have_are_named():
    model = GatedPixelCNN((1, 4, 4), 4, channels=8, layers=1, n_classes=3).eval()
    x = torch.randint(4, (2, 1, 4, 4))
    for classes, got in (([0, 5], r"0\.\.5"), ([0, -1], r"-1\.\.0")):
        condition = torch.tensor(classes)
        for call in (
            lambda c=condition: model(x, c),
            lambda c=condition: model.log_prob(x, c),
            lambda c=condition: model.loss(x, c),
            lambda c=condition: model.sample(2, seed=0, condition=c),
        ):
            with pytest.raises(ValueError, match=rf"condition must hold classes 0\.\.2, got {got}"):
                call()
    with pytest.raises(ValueError, match=r"got 7\.\.7"):
        model.sample(2, seed=0, condition=7)
    for wrong in ([0, 1], torch.tensor([0.0, 1.0])):
        with pytest.raises(TypeError, match="condition must be an integer tensor"):
            model.sample(2, seed=0, condition=wrong)
    assert torch.equal(model.sample(2, seed=0, condition=1), model.sample(2, seed=0, condition=torch.tensor([1, 1])))


def test_a_model_is_analysed_once_however_often_it_draws(monkeypatch):
    from fastgen.sampling import backends

    built, build = [], backends.build_engine
    monkeypatch.setattr(backends, "build_engine", lambda *given: (built.append(1), build(*given))[1])
    model = GatedPixelCNN((1, 4, 4), 4, channels=8, layers=1).eval()
    for _ in range(3):
        model.sample(2, seed=0)
    assert len(built) == 1
