"""Changed weights go into a plan that stands, wherever it would be the same; else there is another plan."""

import warnings

import pytest
import torch
from torch import nn

from fastgen import Categorical, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.trace.network import Network
from tests.sampling.zoo_case import DataMask


def encode(levels):
    return levels.float() / 2 - 1


class Rectified(nn.Module):
    """What the first pixel is given is a rectified bias: 0, or not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = DataMask(1, 4, 3, hides_centre=True), DataMask(4, 3, 3)

    def forward(self, x):
        seen = self.first(x).relu()
        return self.last(seen * seen)


class Frozen(PixelCNN):
    forward = torch.inference_mode()(PixelCNN.forward)


BUILDS = {
    "inference": lambda: Frozen((1, 5, 4), 3, channels=8, layers=1),
    "plain": lambda: PixelCNN((1, 5, 4), 3, channels=8, layers=2),
    "colours": lambda: PixelCNN((3, 4, 3), 3, channels=9, layers=1),
    "gated": lambda: GatedPixelCNN((1, 5, 4), 3, channels=8, layers=2),
    "plusplus": lambda: PixelCNNPP((3, 8, 8), channels=6, layers=1, n_mix=2),
}


def changed(model, factor=1.4):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("name", BUILDS)
def test_the_next_batch_is_that_of_the_new_weights(name, backend):
    torch.manual_seed(0)
    model = BUILDS[name]().eval()
    fast, naive = (
        accelerate(model, model.shape, distribution=model.distribution, backend=one) for one in (backend, "naive")
    )
    fast.sample(2, seed=0)
    for seed in range(2):
        changed(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fast.sample(3, seed=seed)
        assert torch.equal(found, naive.sample(3, seed=seed))
        assert fast.stats.error < 1e-5 and fast.stats.redrawn == 0


def plan_of(model, shape=(1, 5, 4)):
    return make_plan(Network(model, shape, encode, None, 3), Categorical(3, "B(KC)HW"))


def renewed(model):
    """A plan that has taken over other weights."""
    plan = plan_of(model)
    before = [view.memory.data.clone() for view in weights_of(plan)]
    changed(model)
    assert plan.renew()
    after = [view.memory.data for view in weights_of(plan)]
    assert all(torch.allclose(new, 1.4 * old) for old, new in zip(before, after, strict=True))
    return plan


def test_depthwise_convolutions_take_other_numbers():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = DataMask(1, 9, 3, hides_centre=True), nn.Conv2d(9, 3, 1)
            self.middle = nn.Conv2d(9, 9, 3, padding=1, groups=9)

        def forward(self, x):
            below = self.middle.weight.new_tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
            seen = nn.functional.conv2d(self.first(x), self.middle.weight * below, padding=1, groups=9)
            return self.last(seen.relu())

    torch.manual_seed(0)
    renewed(Depthwise().eval())


def test_other_numbers_fit_and_other_zeros_do_not():
    torch.manual_seed(0)
    model = PixelCNN((1, 5, 4), 3, channels=8, layers=1).eval()
    plan = renewed(model)
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = 0
    assert not plan.renew()


def weights_of(plan):
    return [one.weight for program in plan.programs for one in program.instructions if hasattr(one, "weight")]


def test_a_constant_that_is_no_longer_zero_asks_for_another_plan():
    torch.manual_seed(0)
    model = Rectified().eval()
    with torch.no_grad():
        model.first.bias.fill_(-1.0)
    plan = plan_of(model)
    with torch.no_grad():
        model.first.bias.mul_(2)
    assert plan.renew()
    with torch.no_grad():
        model.first.bias.fill_(1.0)
    assert not plan.renew()


def test_a_number_that_a_weight_gives_asks_for_another_plan():
    class Scaled(Rectified):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return super().forward(x) * self.scale

    torch.manual_seed(0)
    model = Scaled().eval()
    plan = plan_of(model)
    with torch.no_grad():
        model.scale.fill_(0.25)
    assert not plan.renew()
