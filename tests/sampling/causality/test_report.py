"""Which layer a report names where a model leaks."""

import pytest
from torch import nn

import fastgen
from fastgen import Categorical, NotCausalError, accelerate


class Coded(nn.Module):
    """Convolutions over embedded codes (B, H, W); `wrong` is the one with a tap on its right."""

    def __init__(self, wrong, first="A"):
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.layers = nn.ModuleList(
            fastgen.nn.MaskedConv2d(4, 4, 3, padding=1, mask_type=first if k == 0 else "B") for k in range(3)
        )
        self.head = nn.Conv2d(4, 3, 1)
        if wrong is not None:
            self.layers[wrong].mask[:, :, 1, 2] = 1

    def forward(self, codes):
        x = self.embed(codes).permute(0, 3, 1, 2)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("wrong", range(3))
def test_the_layer_that_leaks_is_named_behind_an_embedding(wrong):
    with pytest.raises(NotCausalError) as caught:
        accelerate(Coded(wrong).eval(), (4, 5), distribution=Categorical(3, "B(KC)HW"))
    assert {leak.module for leak in caught.value.report.leaks} == {f"layers.{wrong}"}


def test_the_first_layer_is_named_where_no_layer_hides_the_own_pixel():
    with pytest.raises(NotCausalError) as caught:
        accelerate(Coded(None, first="B").eval(), (4, 5), distribution=Categorical(3, "B(KC)HW"))
    assert caught.value.report.leaks[0].module == "layers.0"


def test_the_layer_that_leaks_is_named_behind_a_shift():
    class Dilated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 8)  # as many features as places
            self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=2) for _ in range(3))
            self.head = nn.Linear(8, 5)

        def forward(self, tokens):
            x = self.embed(tokens).mT
            for k, layer in enumerate(self.layers):
                begin = 1 if k == 1 else 0  # where 0 is right
                x = layer(x)[..., begin : begin + 8].relu()
            return self.head(x.mT)

    with pytest.raises(NotCausalError) as caught:
        accelerate(Dilated(), (8,), distribution=Categorical(5, "BTK"), encode=fastgen.shift_right(0))
    assert {leak.module for leak in caught.value.report.leaks} == {"layers.1"}
