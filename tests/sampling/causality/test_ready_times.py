"""Ready times and needs of single operations, against what changes of the input show."""

import functools

import pytest
import torch
from torch.nn import functional as F

from fastgen.sampling.causality.draws import Draws, draw_index_of, raster
from fastgen.sampling.causality.ready_times import ready_times
from fastgen.sampling.trace.element_times import ElementTimes
from fastgen.sampling.trace.graph import CONSTANT, NEVER
from fastgen.sampling.trace.recorder import trace

SIZE = (1, 2, 4, 5)


def weights(*shape, live=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found * (torch.rand(shape, generator=generator) < live)


def masked_scores(x):
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(2)
    return (x[0, 0].mT @ x[0, 0] / 100).masked_fill(hidden, -1e9).softmax(-1)


OPERATIONS = {
    "convolution": lambda x: F.conv2d(x, weights(3, 2, 3, 3, live=0.6), padding=1),
    "kinds of channels": lambda x: F.conv2d(x, weights(4, 2, 2, 2, live=0.3), padding=(1, 0), dilation=(1, 2)),
    "stride and groups": lambda x: F.conv2d(x, weights(4, 1, 2, 3, live=0.7), stride=(2, 1), padding=(0, 2), groups=2),
    "transpose": lambda x: F.conv_transpose2d(x, weights(2, 3, 2, 3, live=0.7), stride=2, padding=1),
    "transpose in groups": lambda x: F.conv_transpose2d(x, weights(2, 2, 3, 2, live=0.7), groups=2, dilation=2),
    "one dimension": lambda x: F.conv1d(x[:, 0], weights(3, 4, 2, live=0.5), padding=1),
    "matrix": lambda x: x @ weights(5, 6, live=0.4),
    "vector": lambda x: x.flatten() @ weights(40, live=0.4),
    "many kinds of columns": lambda x: x.flatten(1) @ weights(40, 90, live=0.2),
    "product": lambda x: x[0] @ x[0].mT,
    "constants in front": lambda x: weights(3, 4, live=0.5) @ x,
    "attention": masked_scores,
    "mean": lambda x: x.mean((1, 3)),
    "norm": lambda x: F.layer_norm(x, (5,)),
    "running sum": lambda x: x.cumsum(2),
    "pool": lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    "mask": lambda x: x * (weights(4, 5, live=0.5) != 0),
    "conditions": lambda x: ((x > 0) | (weights(4, 5, live=0.5) != 0)).double(),
    "choice": lambda x: torch.where(weights(4, 5, live=0.5) != 0, x, x.flip(3) * 2),
    "join": lambda x: torch.cat((x[:, :1], -x, x[:, 1:]), 1) * 1.5,
    "patches": lambda x: F.unfold(x, 2, padding=1) * 2,
    "broadcast": lambda x: x + x[:, :, :1],
    "strange steps": lambda x: x[:, :, ::2, 1:].transpose(2, 3) + 1,
    "padding of rows": lambda x: torch.tanh(F.pad(x.mean(3, keepdim=True) + weights(4, 5), (2, 0))) + 0.5,
    "padding": lambda x: torch.tanh(F.pad(x, (2, 0, 1, 1))) + 0.5,
}


def reads(function):
    """[output, input]: which elements of the output change with which of the input, for some inputs."""
    found = None
    for seed in range(4):
        x = 3 * weights(*SIZE, seed=100 + seed)
        base = function(x).flatten()
        rows = []
        for number in range(x.numel()):
            other = x.clone()
            other.view(-1)[number] += 20 * (-1) ** seed
            rows.append(function(other).flatten() != base)
        moved = torch.stack(rows, 1)
        found = moved if found is None else found | moved
    return found


@functools.cache
def known(name):
    return reads(OPERATIONS[name])


def draw_index(kind):
    number = torch.arange(20, dtype=torch.int32).view(4, 5)
    if kind == "pixels":
        return number.expand(SIZE)
    if kind == "by chance":
        return torch.randperm(40, generator=torch.Generator().manual_seed(3)).int().view(SIZE)
    return torch.stack((2 * number, 2 * number + 1)).unsqueeze(0)


@pytest.mark.parametrize("kind", ["pixels", "channels", "by chance"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_element_is_ready_with_the_last_level_that_it_reads(name, kind):
    index = draw_index(kind)
    timed = ready_times(trace(OPERATIONS[name], None, weights(*SIZE)), index)
    expected = torch.where(known(name), index.reshape(1, -1), -1).amax(1)
    assert torch.equal(timed.output_ready().reshape(-1).clamp(min=-1), expected)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_level_is_needed_with_the_first_element_that_reads_it(name, expanded):
    """`needs` of all operations on the way from the output to the input."""
    graph = trace(lambda x: OPERATIONS[name](x + 0), None, weights(*SIZE))  # the sum is a computed value that reads x
    timed = ready_times(graph, draw_index("pixels"))
    first = next(value for value in timed.computed)
    shape = graph.output.shape
    if expanded and len(shape) == 4:
        wanted = torch.randint(50, shape[2:], generator=torch.Generator().manual_seed(1)).int().expand(shape)
    else:
        wanted = torch.randint(50, shape, generator=torch.Generator().manual_seed(1)).int()
    found = ElementTimes(NEVER)
    found.scatter_min(graph.output, wanted)
    for value in reversed(timed.computed):
        if value is not first:
            running = torch.where(timed.analysis.ready_of(value) == CONSTANT, NEVER, found.of(value))
            running = found.of(value) if torch.equal(running, found.of(value)) else running  # as it is expanded
            for operand, times in timed.rules[value].needs(running):
                found.scatter_min(operand, times)
    expected = torch.where(known(name).T, wanted.reshape(1, -1), NEVER).amin(1)
    assert torch.equal(found.of(first).reshape(-1), expected.int())


def test_the_worked_example():
    kernel = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]]).view(1, 1, 3, 3)
    graph = trace(lambda x: F.conv2d(x, kernel, padding=1), None, torch.rand(1, 1, 3, 3))
    ready = ready_times(graph, draw_index_of(raster((1, 3, 3), False), (1, 3, 3))).output_ready()
    assert ready.clamp(min=-1).flatten().tolist() == [-1, 0, 1, 1, 3, 4, 4, 6, 7]


def test_of_a_draw_the_latest_of_all_that_it_reads_counts():
    draws = Draws(raster((2, 1, 2), True), torch.tensor([[0, 1, 0]]), (2, 1, 2))
    ready = torch.tensor([[[[-1, 1]], [[0, 2]], [[3, -1]]]])  # parameters 0 and 2 belong to channel 0
    assert draws.latest_of(ready).tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize(
    ("function", "hidden"),
    [
        (lambda x: x.cumsum(2) - x, True),
        (lambda x: x - x, True),
        (lambda x: x + (-x), True),
        (lambda x: torch.add(x, x, alpha=-1), True),
        (lambda x: x / x, True),
        (lambda x: (x > 0).double() * x.flip(3), True),
        (lambda x: x.round(), True),
        (lambda x: torch.where(x > 9, x, 0.0), True),
        (lambda x: x.gather(3, x.argsort(3)), True),
        (lambda x: x - x.flip(3), False),
        (lambda x: x - 3, False),
        (lambda x: F.relu(x - 100), False),
        (lambda x: x * x.flip(2), False),
        (lambda x: (x * 1e-3).softmax(3), False),
    ],
)
def test_what_may_hide_what_it_reads(function, hidden):
    graph = trace(function, None, -weights(*SIZE).abs())
    index = draw_index("pixels")
    bound = ready_times(graph, index)
    certain = ready_times(graph, index, bound).output_ready()
    assert (certain <= bound.output_ready()).all()
    assert bool((certain < 0).all()) == hidden
