"""`fastgen.patch` on strangers' layers, each written as somebody might write it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastgen
from fastgen.nn import MaskedConv2d
from fastgen.ops import causal_mask


class Overwrites(nn.Conv2d):
    """The usual style: a float mask that overwrites the weights in every call."""

    def __init__(self, mask_type, *arguments, **options):
        super().__init__(*arguments, **options)
        self.mask_type = mask_type
        self.register_buffer("mask", self.weight.data.clone())
        _, _, height, width = self.weight.size()
        self.mask.fill_(1)
        self.mask[:, :, height // 2, width // 2 + (mask_type == "B") :] = 0
        self.mask[:, :, height // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class Multiplies(nn.Conv2d):
    """A two-dimensional mask with another name, a functional convolution, *args and **kwargs."""

    def __init__(self, *arguments, kind=torch.uint8, persistent=True, **options):
        super().__init__(*arguments, **options)
        mask = causal_mask("A", 1, 1, self.kernel_size)[0, 0].to(kind)
        self.register_buffer("visible", mask, persistent=persistent)

    def forward(self, *arguments, **options):
        return self.convolve(*arguments, **options)

    def convolve(self, picture):
        weight = self.weight * self.visible
        return F.conv2d(picture, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Colours(nn.Conv2d):
    """A bool mask of colour groups, applied with torch.where; the weights are overwritten under no_grad."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("seen", causal_mask("B", self.out_channels, self.in_channels, self.kernel_size, 3))

    def forward(self, input):
        with torch.no_grad():
            self.weight.copy_(torch.where(self.seen, self.weight, torch.zeros_like(self.weight)))
        return self._conv_forward(input, self.weight, self.bias)


class AfterReLU(Overwrites):
    def forward(self, x):
        return super().forward(x).relu()


class TakesACondition(Overwrites):
    def forward(self, x, shift=None):
        out = super().forward(x)
        return out if shift is None else out + shift


class Scaled(Overwrites):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class Halved(Overwrites):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.mask *= 0.5


class OnlyInTraining(Overwrites):
    def forward(self, x):
        return super().forward(x) if self.training else nn.Conv2d.forward(self, x).sin()


class Detaches(Overwrites):
    def forward(self, x):
        return super().forward(x.detach())


class Forgets(Overwrites):
    """A layer with a mask that it does not use."""

    def forward(self, x):
        return nn.Conv2d.forward(self, x)


class Slotted(Overwrites):
    __slots__ = ("extra",)


TAKEN = {
    "overwrites": lambda: Overwrites("A", 3, 6, 5, padding=2),
    "all shown": lambda: Overwrites("B", 3, 6, 1),
    "no bias": lambda: Overwrites("B", 3, 6, 3, padding="same", bias=False),
    "strided": lambda: Multiplies(3, 6, 3, 2, (2, 1), (1, 2)),
    "float": lambda: Multiplies(3, 6, (3, 5), padding=(1, 2), kind=torch.float32),
    "not saved": lambda: Multiplies(3, 6, 3, persistent=False),
    "colours": lambda: Colours(3, 6, 3, padding=1),
    "float64": lambda: Overwrites("A", 3, 6, 3, dtype=torch.float64),
}
LEFT = {
    "plain": lambda: nn.Conv2d(3, 6, 3),
    "groups": lambda: Multiplies(3, 6, 3, groups=3),
    "circular": lambda: Overwrites("A", 3, 6, 3, padding=1, padding_mode="circular"),
    "relu": lambda: AfterReLU("A", 3, 6, 3),
    "argument": lambda: TakesACondition("A", 3, 6, 3),
    "parameter": lambda: Scaled("A", 3, 6, 3),
    "soft mask": lambda: Halved("A", 3, 6, 3),
    "evaluation": lambda: OnlyInTraining("A", 3, 6, 3),
    "detaches": lambda: Detaches("A", 3, 6, 3),
    "forgets": lambda: Forgets("A", 3, 6, 3),
    "slots": lambda: Slotted("A", 3, 6, 3),
    "weight_norm": lambda: parametrizations.weight_norm(Multiplies(3, 6, 3)),
    "meta": lambda: Overwrites("A", 3, 6, 3, device="meta"),
    "ours": lambda: MaskedConv2d(3, 6, 3, mask_type="A"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_takes_a_stranger_s_layer(name):
    layer = TAKEN[name]()
    original = copy.deepcopy(layer)
    parameters = dict(layer.named_parameters())
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert fastgen.patch(layer) == 1
    assert fastgen.patch(layer) == 0
    assert isinstance(layer, MaskedConv2d)
    assert all(parameter is parameters[key] for key, parameter in layer.named_parameters())
    assert list(layer.state_dict()) == list(state)
    for key, value in layer.state_dict().items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key])
    x = torch.randn(2, 3, 9, 8, dtype=layer.weight.dtype, requires_grad=True)
    out, expected = layer(x), original(x)
    torch.testing.assert_close(out, expected)
    grads = [
        torch.autograd.grad(one.sin().sum(), [x, *m.parameters()]) for one, m in ((out, layer), (expected, original))
    ]
    mask = next(buffer for buffer in original.buffers()).to(torch.bool).expand(layer.weight.shape)
    for index, (one, other) in enumerate(zip(*grads, strict=True)):
        if index == 1:
            assert (one[~mask] == 0).all()
            other = torch.where(mask, other, 0)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LEFT)
def test_leaves_what_it_cannot_reproduce(name):
    layer = LEFT[name]()
    kind = type(layer)
    assert fastgen.patch(nn.Sequential(layer)) == 0
    assert type(layer) is kind


def test_leaves_hooks_alone():
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer = Overwrites("A", 3, 6, 3)
        getattr(layer, register)(lambda *arguments: None)
        assert fastgen.patch(layer) == 0


class Model(nn.Module):
    """A small PixelCNN with batch normalization and one layer in two places."""

    def __init__(self):
        super().__init__()
        again = Overwrites("B", 8, 8, 3, padding=1)
        self.first = Overwrites("A", 1, 8, 7, padding=3)
        self.net = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), again, nn.ReLU(), again)
        self.again = [again]
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(self.net(self.first(x)) + self.again[0](self.first(x)))


def train(model, steps=5):
    """Losses of a few steps with momentum, on the same data each time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randint(2, (4, 1, 6, 6), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x.float()), x[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_a_model_goes_on_training_as_it_did():
    model = Model()
    other = copy.deepcopy(model)
    assert fastgen.patch(other) == 2
    assert other.net[2] is other.net[4] is other.again[0]
    torch.testing.assert_close(train(other), train(model))
    for (name, one), two in zip(other.named_parameters(), model.parameters(), strict=True):
        mask = (
            other.get_submodule(name.rpartition(".")[0]).mask.bool() if name in ("first.weight", "net.2.weight") else 1
        )
        torch.testing.assert_close(one * mask, two * mask)


def test_state_dicts_go_both_ways():
    model, other = Model(), Model()
    fastgen.patch(other)
    x = torch.randn(1, 1, 5, 5)
    model.eval(), other.eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    train(other)
    other.eval()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))


def test_the_mask_goes_on_deciding():
    layer = Overwrites("A", 3, 6, 3, padding=1)
    fastgen.patch(layer)
    x = torch.randn(1, 3, 5, 5)
    layer.mask[:, :, 1, 1] = 1
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight * layer.mask, layer.bias, padding=1))
    state = layer.state_dict()
    state["mask"] = torch.ones_like(state["mask"])
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    copied = copy.deepcopy(layer).double()
    torch.testing.assert_close(copied(x.double()).float(), layer(x))


def test_random_numbers_and_weights_are_not_touched():
    layer = Overwrites("A", 3, 6, 3)
    before, weight = torch.get_rng_state(), layer.weight.detach().clone()
    fastgen.patch(layer)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(layer.weight, weight)


def test_compiles_after_the_patch():
    layer = Overwrites("A", 3, 6, 3)
    fastgen.patch(layer)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_wants_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        fastgen.patch(train)
