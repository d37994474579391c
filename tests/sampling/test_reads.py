"""Models that read numbers of their input or condition in Python; rows of tables that there are, or are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical, accelerate, shift_right
from tests.sampling.exactness import assert_exact, pair

LEVELS, LENGTH, END = 6, 8, 5
DISTRIBUTION = Categorical(LEVELS, "BTK")


class Tokens(nn.Module):
    """Logits of the next token from the sum of those before; `change(hidden, x, y, table)` is what a test is about."""

    def __init__(self, change, levels=LEVELS):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(levels, 8))
        self.change, self.out = change, nn.Linear(8, LEVELS)

    def forward(self, x, y=None):
        return self.out(self.change(F.embedding(x, self.table), x, y, self.table).cumsum(1))


def refused(hidden, ok):
    if not ok:
        raise ValueError("the model refuses its input")
    return hidden


def after_the_end(hidden, x):
    ended = (x == END).cumsum(1) > 0
    return torch.where(ended[..., None], -hidden, hidden)


BRANCHES = {
    "any": lambda x: (x == END).any(),
    "all": lambda x: not (x != END).all(),
    "int": lambda x: int((x == END).sum()) > 0,
    "item": lambda x: (x == END).float().max().item() > 0.5,
    "tolist": lambda x: any(END in row for row in x.tolist()),
    "numpy": lambda x: (x.numpy() == END).any(),
}


@pytest.mark.filterwarnings("ignore:sampling falls back")
@pytest.mark.parametrize("name", BRANCHES)
def test_a_model_that_branches_on_its_tokens_is_drawn_by_whole_passes(name):
    branch = BRANCHES[name]
    model = Tokens(lambda h, x, y, t: after_the_end(h, x) if branch(x) else h).eval()
    made = {"distribution": DISTRIBUTION, "encode": shift_right(1)}
    fast, naive = (accelerate(model, (LENGTH,), backend=one, **made) for one in ("auto", "naive"))
    for n in (1, 1, 8, 8):
        assert torch.equal(fast.sample(n, seed=n), naive.sample(n, seed=n))
    assert fast.stats.backend == "fixed_point"
    assert "depends on" in fast.explain()


CHECKS = {
    "all": lambda h, x, y, t: refused(h, (x < LEVELS).all()),
    "max": lambda h, x, y, t: refused(h, x.max() < LEVELS),
    "item": lambda h, x, y, t: refused(h, x.min().item() >= 0),
    "nan": lambda h, x, y, t: refused(h, not torch.isnan(h).any()),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_model_that_checks_its_tokens_is_played(name):
    model = Tokens(CHECKS[name]).eval()
    assert_exact(*pair(model, (LENGTH,), "compiled", distribution=DISTRIBUTION, encode=shift_right(1)), 5, seed=0)


def test_errors_of_pytorch_under_another_answer_are_no_refusal():
    def change(hidden, x, y, table):
        if not (x == -1).any():
            return hidden
        torch.ones(int((x == -1).sum()))[0]  # without one there is no first
        return after_the_end(hidden, x)

    model = Tokens(change).eval()
    with pytest.warns(UserWarning, match="depends on its input"):
        accelerate(model, (LENGTH,), distribution=DISTRIBUTION, encode=shift_right(1)).sample(1, seed=0)


OF_CONDITION = {
    "any": lambda h, x, y, t: h.tanh() if (y == 0).any() else h,
    "item": lambda h, x, y, t: h * y.float().max().item(),
    "tolist": lambda h, x, y, t: h * torch.tensor([1.0 + one for one in y.tolist()])[:, None, None],
}


@pytest.mark.filterwarnings("ignore:sampling falls back")
@pytest.mark.parametrize("name", OF_CONDITION)
def test_a_model_that_reads_its_condition_gets_the_one_that_is_asked_for(name):
    model = Tokens(OF_CONDITION[name]).eval()
    made = {"distribution": DISTRIBUTION, "encode": shift_right(1), "condition": torch.ones(3, dtype=torch.long)}
    fast, naive = (accelerate(model, (LENGTH,), backend=one, **made) for one in ("auto", "naive"))
    for condition in ([1, 1, 1], [2, 0, 3], [0, 0, 0]):
        given = {"condition": torch.tensor(condition), "seed": 3}
        assert torch.equal(fast.sample(3, **given), naive.sample(3, **given))


@pytest.mark.parametrize("backend", ["naive", "eager", "compiled"])
def test_a_condition_that_the_model_writes_into_stays_the_users(backend):
    model = Tokens(lambda h, x, y, t: h + t[y.add_(1) % 5][:, None]).eval()
    condition = torch.tensor([4])
    given = {"distribution": DISTRIBUTION, "encode": shift_right(1), "condition": condition, "backend": backend}
    sampler = accelerate(model, (LENGTH,), **given)
    images = sampler.sample(3, seed=0)
    assert torch.equal(sampler.sample(3, seed=0, condition=condition), images) and condition.item() == 4
    plain = Tokens(lambda h, x, y, t: h + t[:1]).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(images, accelerate(plain, (LENGTH,), **given).sample(3, seed=0))


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_negative_indices_count_from_the_end(backend):
    model = Tokens(lambda h, x, y, t: h + t[x - 3]).eval()
    assert_exact(*pair(model, (LENGTH,), backend, distribution=DISTRIBUTION, encode=shift_right(1)), 5, seed=0)


@pytest.mark.parametrize("backend", ["eager", "compiled", "persistent"])
def test_negative_classes_count_from_the_end(backend):
    model = Tokens(lambda h, x, y, t: h + t[y][:, None]).eval()
    made = {"distribution": DISTRIBUTION, "encode": shift_right(1), "condition": torch.tensor([0, 5])}
    fast, naive = pair(model, (LENGTH,), backend, **made)
    assert_exact(fast, naive, 3, seed=0, condition=torch.tensor([-1, 2, -6]))


CLASSES = {
    "embedding": (IndexError, lambda h, x, y, t: h + F.embedding(y, t)[:, None]),
    "index": (IndexError, lambda h, x, y, t: h + t[y][:, None]),
    "one_hot": (RuntimeError, lambda h, x, y, t: h + (F.one_hot(y, LEVELS).float() @ t)[:, None]),
    "gather": (RuntimeError, lambda h, x, y, t: h + t.gather(0, y[:, None].expand(-1, 8))[:, None]),
}


@pytest.mark.parametrize("backend", ["naive", "fixed_point", "eager", "compiled"])
@pytest.mark.parametrize("name", CLASSES)
def test_classes_that_there_are_not_are_refused_as_the_model_does(name, backend):
    error, change = CLASSES[name]
    model = Tokens(change).eval()
    made = {"distribution": DISTRIBUTION, "encode": shift_right(1), "condition": torch.tensor([1, 2])}
    sampler = accelerate(model, (LENGTH,), backend=backend, **made)
    expected = sampler.sample(2, seed=0, condition=torch.tensor([0, 5]))
    for wrong in (6, 10**9, -7):
        with pytest.raises(error):
            sampler.sample(2, seed=0, condition=torch.tensor([1, wrong]))
    assert torch.equal(sampler.sample(2, seed=0, condition=torch.tensor([0, 5])), expected)


@pytest.mark.parametrize(
    ("backend", "error"), [("eager", IndexError), ("compiled", IndexError), ("persistent", FloatingPointError)]
)
def test_levels_that_a_table_lacks_are_an_error(backend, error):
    """The head has a level more than the embedding: an error when it is drawn, as in the loop. GPUs read NaN there."""
    model = Tokens(lambda h, x, y, t: h, levels=LEVELS - 1).eval()
    with torch.no_grad():
        model.out.bias[-1] = -30  # at first it is not drawn
    made = {"distribution": DISTRIBUTION, "encode": shift_right(1), "verify": "never"}
    sampler = accelerate(model, (LENGTH,), backend=backend, **made)
    assert sampler.sample(4, seed=0).max() < LEVELS - 1
    noise = torch.full((4, LENGTH), 0.5)
    noise[2, 3] = 1 - 2**-24
    with torch.no_grad():
        model.out.bias[-1] = 0
    with pytest.raises(error):
        sampler.sample(4, noise=noise)
