"""Wrong arguments are named."""

import math

import numpy as np
import pytest
import torch
from causal_models import Stranger, small
from torch import nn

from fastgen import Bernoulli, Categorical, accelerate


@pytest.mark.parametrize(
    "error, name, arguments",
    [
        (TypeError, "n must", {"n": 1.5}),
        (ValueError, "n must", {"n": -1}),
        (ValueError, "batch_size", {"batch_size": 0}),
        (TypeError, "seed", {"seed": 0.5}),
        (ValueError, "seed", {"seed": 2**70}),
        (ValueError, "seed and noise", {"seed": 1, "noise": torch.zeros(2, 1, 5, 4)}),
        (TypeError, "noise", {"noise": torch.zeros(2, 1, 5, 4).double()}),
        (TypeError, "noise", {"noise": [0.5]}),
        (ValueError, "noise", {"noise": torch.zeros(2, 1, 4, 5)}),
        (ValueError, "noise", {"noise": torch.ones(2, 1, 5, 4)}),
        (ValueError, "noise", {"noise": torch.full((2, 1, 5, 4), -0.1)}),
        (ValueError, "noise", {"noise": torch.full((2, 1, 5, 4), math.nan)}),
        (ValueError, "temperature", {"temperature": -1}),
        (ValueError, "top_k", {"top_k": 0}),
        (ValueError, "top_p", {"top_p": 0.0}),
        (ValueError, "known_mask is missing", {"known": torch.zeros(1).long()}),
        (ValueError, "known is missing", {"known_mask": torch.ones(1).bool()}),
        (TypeError, "known must", {"known": torch.zeros(1), "known_mask": torch.ones(1).bool()}),
        (TypeError, "known must", {"known": 1, "known_mask": torch.ones(1).bool()}),
        (TypeError, "known_mask must", {"known": torch.zeros(1).long(), "known_mask": torch.ones(1)}),
        (ValueError, "known must", {"known": torch.zeros(3, 5, 4).long(), "known_mask": torch.ones(1).bool()}),
        (ValueError, "known_mask must", {"known": torch.zeros(1).long(), "known_mask": torch.ones(3).bool()}),
        (ValueError, "levels in 0..4", {"known": torch.tensor([5]), "known_mask": torch.ones(1).bool()}),
        (ValueError, "levels in 0..4", {"known": torch.tensor([-1]), "known_mask": torch.ones(1).bool()}),
    ],
    ids=str,
)
def test_bad_arguments_of_sample_are_named(error, name, arguments):
    model, shape, distribution = small("grey")
    sampler = accelerate(model, shape, distribution=distribution, backend="naive")
    with pytest.raises(error, match=name):
        sampler.sample(**{"n": 2} | arguments)


def test_bad_arguments_of_accelerate_are_named():
    model, shape, distribution = small("grey")
    for error, name, arguments in (
        (TypeError, "model", {"model": model.forward}),
        (ValueError, "shape", {"shape": (1, 1, 5, 4)}),
        (ValueError, "shape", {"shape": ()}),
        (ValueError, "layout BTK does not fit", {"distribution": Categorical(5, "BTK")}),
        (ValueError, "layout BHWK does not fit", {"distribution": Categorical(5, "BHWK"), "shape": (3, 5, 4)}),
        (ValueError, "layout must be 'BTK'", {"shape": (20,)}),
        (TypeError, "output must be callable", {"output": 0}),
        (ValueError, "verify", {"verify": "sometimes"}),
        (ValueError, "shape", {"shape": (1, 0, 4)}),
        (ValueError, "shape", {"shape": 3}),
        (ValueError, "shape", {"shape": (1, 2.5, 4)}),
        (TypeError, "distribution", {"distribution": Categorical}),
        (TypeError, "distribution", {"distribution": "categorical"}),
        (TypeError, "encode", {"encode": 1}),
        (ValueError, "backend", {"backend": "fast"}),
        (ValueError, "expected 1 channels", {"distribution": Categorical(2, "B(KC)HW"), "model": Stranger(1, 6)}),
        (ValueError, "K = 4", {"distribution": Categorical(4, "B(KC)HW")}),
        (ValueError, "BKCHW", {"distribution": Categorical(4)}),
    ):
        with pytest.raises(error, match=name):
            accelerate(**{"model": model, "shape": shape, "distribution": distribution, "backend": "naive"} | arguments)
    for output, error in ((lambda x: (x, x), TypeError), (lambda x: x[..., 1:], ValueError)):
        bad = nn.Module()
        bad.forward = output
        with pytest.raises(error, match="model must return"):
            accelerate(bad, (1, 2, 3), distribution=Bernoulli(), backend="naive")


class Conditioned(Stranger):
    def forward(self, x, shift, of):
        return super().forward(x) + shift[:, None, None, None] * of[:, :, None, None]


def test_conditions_may_be_numpys_arrays():
    sampler = accelerate(Conditioned(1, 5).eval(), (1, 5, 4), distribution=Categorical(5, "B(KC)HW"), backend="eager")
    given = {"shift": np.array([1, 2]), "of": np.linspace(-1, 1, 10).reshape(2, 5)}
    tensors = {"shift": torch.tensor([1, 2]), "of": torch.from_numpy(given["of"]).float()}
    images = [sampler.sample(2, seed=0, condition=one) for one in (given, tensors)]
    assert torch.equal(*images) and sampler.stats.backend == "eager"
    params = [sampler.params(images[0], condition=one) for one in (given, tensors)]
    assert torch.equal(*params)


def test_a_list_of_texts_says_what_to_do():
    sampler = accelerate(Stranger(1, 5).eval(), (1, 5, 4), distribution=Categorical(5, "B(KC)HW"), backend="naive")
    with pytest.raises(ValueError, match=r"shape \(3,\); expected 2 rows.*padded to one"):
        sampler.sample(2, condition=[torch.zeros(3), torch.zeros(2)])
