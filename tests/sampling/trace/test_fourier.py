"""Convolutions by Fourier transforms, held to the naive loop, and what is no causal one."""

import warnings

import pytest
import torch
from torch import fft, nn

from fastgen import Categorical, NotCausalError, accelerate, shift_right
from tests.sampling.exactness import assert_exact, pair

K, T, WIDTH = 5, 9, 6


class Long(nn.Module):
    """A residual layer (B, T, WIDTH) whose kernel is as long as the sequence."""

    def __init__(self, size=2 * T, norm=None, heads=1, dim=-1, factor=1.0, late=False):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(heads, WIDTH, T))
        self.out = nn.Linear(heads * WIDTH, WIDTH)
        self.size, self.norm, self.dim, self.factor, self.late = size, norm, dim, factor, late

    def forward(self, x):
        if self.dim == 1:  # as Mega has it
            spectrum = fft.rfft(x, self.size, dim=1) * fft.rfft(self.kernel[0].T, self.size, dim=0)
            return x + torch.tanh(self.out(fft.irfft(spectrum, self.size, dim=1)[:, :T]))
        given = torch.cat((x[:, :1], x[:, :-1]), 1) if self.late else x  # in two pieces
        spectrum = fft.rfft(given.mT, self.size, norm=self.norm)
        kernel = fft.rfft(self.kernel, self.size)
        spectrum = torch.einsum("bhl,chl->bchl", spectrum, kernel) * self.factor  # as S4 has it
        found = fft.irfft(spectrum, self.size, norm=self.norm)[..., :T]
        return x + torch.tanh(self.out(found.flatten(1, 2).mT))


class Tokens(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(K + 1, WIDTH), *layers, nn.Linear(WIDTH, K))

    def forward(self, tokens):
        return 3 * self.body(tokens)


ARGUMENTS = {"distribution": Categorical(K, "BTK"), "encode": shift_right(K)}
LAYERS = {
    "twice": {},
    "longer": {"size": 32},
    "heads": {"heads": 3},
    "ortho": {"norm": "ortho"},
    "forward": {"norm": "forward", "factor": 0.5},
    "pieces": {"late": True, "heads": 2},
    "dim": {"dim": 1, "size": 2 * T - 1},
}


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_by_transforms(name, backend):
    torch.manual_seed(0)
    fast, naive = pair(Tokens(Long(**LAYERS[name]), Long()).eval(), (T,), backend, **ARGUMENTS)
    assert_exact(fast, naive, 5, seed=0)
    assert "convolutions by Fourier transforms are computed as convolutions" in fast.explain()
    assert fast.work_ratio == 1


def test_other_weights_are_taken():
    torch.manual_seed(0)
    model = Tokens(Long()).eval()
    fast, naive = pair(model, (T,), "compiled", **ARGUMENTS)
    before = fast.sample(5, seed=0)
    with torch.no_grad():
        model.body[1].kernel.copy_(torch.randn(1, WIDTH, T))
    assert not torch.equal(assert_exact(fast, naive, 5, seed=0), before)


def test_a_kernel_of_both_sides_is_not_causal():
    class Both(Long):
        def forward(self, x):
            kernel = torch.cat((self.kernel[0], self.kernel[0].flip(-1)), -1)
            return x + fft.irfft(fft.rfft(x.mT, 2 * T) * fft.rfft(kernel), 2 * T)[..., :T].mT

    class Circular(Long):
        def forward(self, x):
            return x + fft.irfft(fft.rfft(x.mT) * fft.rfft(self.kernel[0]), T).mT

    for layer in (Both(), Circular()):
        with warnings.catch_warnings(), pytest.raises(NotCausalError):
            warnings.simplefilter("ignore")
            accelerate(Tokens(layer).eval(), (T,), **ARGUMENTS)


FACTORS = {
    "divided": lambda u, k: u / 2.5 * k,
    "product divided": lambda u, k: (u * k).div(-7),
    "negative": lambda u, k: -u * k,
    "kernel first": lambda u, k: k * u,
}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", FACTORS)
def test_one_sequence_of_numbers_before_each(name, rank):
    """The model shifts its input itself, and has one kernel for all."""

    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.out = nn.Parameter(torch.randn(*[1] * (rank - 1), T)), nn.Linear(1, K)

        def forward(self, x):
            before = nn.functional.pad(x[:, :-1], (1, 0))
            spectrum = FACTORS[name](fft.rfft(before, 2 * T), fft.rfft(self.kernel, 2 * T))
            return self.out(fft.irfft(spectrum, 2 * T)[:, :T, None])

    torch.manual_seed(0)
    fast, naive = pair(Numbers().eval(), (T,), "compiled", distribution=Categorical(K, "BTK"))
    assert_exact(fast, naive, 5, seed=0)


@pytest.mark.parametrize("fades", [False, True])
def test_correlations(fades):
    """As Mega has them: with the conjugate of a kernel whose last number is of the present place."""

    class Correlation(Long):
        def forward(self, x):
            kernel = self.kernel[0] * (0.1 ** torch.arange(T).flip(0) if fades else 1)
            spectrum = fft.rfft(x, 20, dim=1) * fft.rfft(kernel.T, 20, dim=0).conj()
            found = fft.irfft(spectrum, 20, dim=1).roll(-1, 1)
            return x + torch.tanh(self.out(found.index_select(1, torch.arange(20 - T, 20))))

    torch.manual_seed(0)
    fast, naive = pair(Tokens(Correlation(), Long()).eval(), (T,), "compiled", **ARGUMENTS)
    assert_exact(fast, naive, 5, seed=0)


def test_a_product_of_two_transforms_is_none():
    class Quadratic(Long):
        def forward(self, x):
            both = fft.rfft(x.mT, 2 * T) * fft.rfft(x.mT, 2 * T)
            return torch.tanh(0.02 * fft.irfft(both, 2 * T)[..., :T].mT)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="fixed_point"):
        fast = accelerate(Tokens(Quadratic()).eval(), (T,), **ARGUMENTS)
    naive = accelerate(Tokens(Quadratic()).eval(), (T,), backend="naive", **ARGUMENTS)
    naive.model.load_state_dict(fast.model.state_dict())
    assert torch.equal(fast.sample(4, seed=0), naive.sample(4, seed=0))
