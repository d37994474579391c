"""Real values and levels where something is at its end: not finite, too large for their dtype, of no image."""

import pytest
import torch
from torch import nn

import fastgen
from fastgen import Categorical, Gaussian, accelerate

BACKENDS = ("naive", "fixed_point", "eager", "compiled")


class Shifted(nn.Module):
    """Means and log-scales (B, 2, T), of the value before."""

    def __init__(self, scale=0.0):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 1)
        with torch.no_grad():
            self.conv.bias[1] = scale

    def forward(self, x):
        return self.conv(nn.functional.pad(x[:, None], (1, -1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_values_go_through_an_encode_of_ones_own(backend):
    torch.manual_seed(0)
    model = Shifted().eval()
    given = {"distribution": Gaussian(), "encode": lambda x: 2 * x.round(decimals=1)}
    values = accelerate(model, (5,), backend=backend, **given).sample(3, seed=0)
    torch.testing.assert_close(values, accelerate(model, (5,), backend="eager", **given).sample(3, seed=0))
    assert values.unique().numel() == 15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [500.0, float("nan")])
def test_values_that_are_not_finite_are_refused(backend, scale):
    torch.manual_seed(0)
    model = Shifted().eval()
    sampler = accelerate(model, (5,), distribution=Gaussian(), backend=backend)
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias[1] = scale
    with pytest.raises(FloatingPointError, match="NaN at a pixel that was to be drawn, or a value is infinite"):
        sampler.sample(3, seed=0)


def test_a_dtype_that_cannot_hold_the_levels_is_refused():
    model = fastgen.models.PixelCNN((1, 2, 2), 300, channels=4, layers=1).eval()
    sampler = accelerate(model, model.shape, distribution=model.distribution)
    with pytest.raises(ValueError, match="dtype must hold the levels of Categorical"):
        sampler.decode(lambda params, place: torch.zeros(1), 1, dtype=torch.uint8)
    assert sampler.decode(lambda params, place: torch.full((1,), 299), 1, dtype=torch.int16).max() == 299


def test_no_image_has_no_row_of_a_condition():
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 1)

        def forward(self, x, by):
            return self.conv(nn.functional.pad(x[:, None], (1, -1))) + by[:, None, None]

    sampler = accelerate(Moved().eval(), (4,), distribution=Categorical(3, "BKT"), condition={"by": torch.rand(2)})
    none = torch.zeros(0, 4, dtype=torch.long)
    assert sampler.decode(lambda params, place: none[:, 0], 0, condition={"by": torch.rand(0)}).shape == (0, 4)
    assert sampler.params(none, condition={"by": torch.rand(0)}).shape == (0, 3, 4)


def test_a_start_that_is_no_level_is_refused():
    with pytest.raises(ValueError, match="start must be finite"):
        fastgen.shift_right(float("nan"))
    with pytest.raises(ValueError, match=r"start must be an integer, as the levels are, got 0\.5"):
        fastgen.shift_right(0.5)(torch.zeros(1, 3, dtype=torch.long))


def test_numbers_of_levels_by_place_are_compared():
    assert Categorical([2, 3]) == Categorical(torch.tensor([2, 3])) and hash(Categorical([2, 3])) == hash(
        Categorical(3)
    )
    assert Categorical([2, 3]) != Categorical([3, 2]) != Categorical(3) != Categorical(3, "BTK")
    assert Categorical(3) == Categorical(3)
