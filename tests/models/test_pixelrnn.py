"""PixelRNN: causality with colours, exact likelihood, the configurations of the paper."""

import itertools
import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fastgen
from fastgen.models import PixelRNN
from fastgen.models.pixelrnn import KINDS
from tests.models.learning import nats_of_two_images

# Two elements of a batch may differ in the last bit by their place in a matrix product, and far pixels matter little.
ROUNDING = 1e-13


def small(kind, shape, levels=4, **options):
    return PixelRNN(shape, levels, kind=kind, hidden_channels=24, layers=2, **options).double().eval()


def dependences(model, x, condition=None):
    """(C, H, W, C, H, W): the change of the parameters of the first element with the level of the second."""
    places = list(itertools.product(*map(range, model.shape)))
    images = x.repeat(len(places) + 1, 1, 1, 1)
    for index, place in enumerate(places):
        images[(index, *place)] = (images[(index, *place)] + model.levels // 2) % model.levels
    with torch.no_grad():
        params = model(images, None if condition is None else condition.expand(len(images)))
    change = (params[:-1] - params[-1]).abs().amax(1)
    return change.view(*model.shape, *model.shape).permute(3, 4, 5, 0, 1, 2)


def precedence(channels, height, width):
    """(C, H, W, C, H, W): whether the second element comes before the first."""
    pixel = torch.arange(height * width).view(1, height, width)
    rank = pixel * channels + torch.arange(channels).view(-1, 1, 1)
    return rank[:, :, :, None, None, None] > rank


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize(
    ("shape", "n_classes"), [((1, 7, 6), None), ((3, 4, 5), 3), ((1, 1, 5), 2), ((3, 3, 1), None)], ids=str
)
def test_sees_what_comes_before_and_nothing_else(kind, shape, n_classes):
    model = small(kind, shape, n_classes=n_classes)
    x = torch.randint(model.levels, (1, *shape))
    change = dependences(model, x, None if n_classes is None else torch.tensor([1]))
    before = precedence(*shape)
    assert change[~before].max() < ROUNDING
    _, height, width = shape
    for i, j in itertools.product(range(height), range(width)):
        # Of what came before: the row, and the rows above within three pixels, to both sides with two scans.
        near = before[:, i, j].clone()
        near[:, :, : max(0, i - 3)] = False
        if kind == "row_lstm":
            near[:, :, :i] = False
        near[..., : max(0, j - 3)] = near[..., j + 4 :] = False
        assert (change[:, i, j][near] > ROUNDING).all(), (i, j)


def test_skewed_padding_leaks_nothing():
    model = small("diagonal_bilstm", (3, 3, 4), skewed_padding=True)
    change = dependences(model, torch.randint(4, (1, 3, 3, 4)))
    assert torch.equal(change > ROUNDING, precedence(3, 3, 4))
    plain = small("diagonal_bilstm", (3, 3, 4))
    plain.load_state_dict(model.state_dict())
    x = torch.randint(4, (1, 3, 3, 4))
    assert not torch.equal(plain(x), model(x))


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 1)], ids=str)
def test_probabilities_of_all_images_sum_to_one(kind, shape):
    model = small(kind, shape, 2)
    images = torch.tensor(list(itertools.product(range(2), repeat=math.prod(shape)))).view(-1, *shape)
    with torch.no_grad():
        total = model.log_prob(images).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_gradients_of_every_live_parameter(kind):
    model = small(kind, (3, 4, 4), n_classes=2).train()
    model.log_prob(torch.randint(4, (2, 3, 4, 4)), torch.tensor([0, 1])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for module in model.modules():
        if hasattr(module, "mask"):
            assert (module.weight.grad[~module.mask] == 0).all()


def test_the_scans_are_single_nodes_of_a_trace(kind):
    model = small(kind, (1, 4, 4)).float()
    with torch.no_grad():
        graph = make_fx(model, tracing_mode="real")(torch.randn(2, 1, 4, 4)).graph
    scans = [node for node in graph.nodes if str(node.target).startswith("fastgen.")]
    assert len(scans) == (4 if kind == "diagonal_bilstm" else 2)
    assert all(len(node.args) <= 3 for node in scans)


def test_state_dict_and_files_restore_the_model(kind, tmp_path):
    model, other = small(kind, (1, 4, 4)), small(kind, (1, 4, 4))
    x = torch.randint(4, (2, 1, 4, 4))
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    fastgen.save(model, tmp_path)
    assert torch.equal(fastgen.load(tmp_path)(x), model(x))


def test_learns(kind):
    assert nats_of_two_images(PixelRNN((1, 4, 4), 2, kind=kind, hidden_channels=8, layers=1, n_classes=2)) < 0.5


def test_the_configurations_of_the_paper():
    with torch.device("meta"):
        mnist, cifar = PixelRNN.mnist(), PixelRNN.cifar10(layers=2, n_classes=10)
    assert (mnist.shape, mnist.levels, len(mnist.blocks)) == ((1, 28, 28), 2, 7)
    assert mnist.blocks[0].scan.from_left.state_to_state.shape == (64, 16, 2)
    assert mnist.head[1].out_channels == 32
    assert (cifar.shape, cifar.levels, len(cifar.blocks)) == ((3, 32, 32), 256, 2)
    assert cifar.blocks[0].scan.from_left.state_to_state.shape == (4 * 129, 129, 2)
    assert cifar.n_classes == 10


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "diagonal"}, "kind"),
        ({"hidden_channels": 0}, "hidden_channels"),
        ({"layers": 0}, "layers"),
        ({"n_classes": 0}, "n_classes"),
        ({"kind": "row_lstm", "skewed_padding": True}, "skewed_padding"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        PixelRNN((1, 4, 4), 4, **options)
