"""What the recorder makes of views, copies and writes in place: where every operand takes its elements from."""

import pytest
import torch
from torch.nn import functional as F

from fastgen.sampling.causality.ready_times import ready_times
from fastgen.sampling.trace.element_times import scatter_min
from fastgen.sampling.trace.graph import Map, RandomNumbers, Value
from fastgen.sampling.trace.recorder import trace

MOVES = {
    "slices and steps": lambda x: x[:, :, 1::2, :-1] + 0,
    "pad and crop": lambda x: F.pad(x, (2, 0, 1, 0))[:, :, :-1, :-2] + 0,
    "transposes": lambda x: x.transpose(2, 3).flip(3) + 0,
    "flatten": lambda x: x.flatten(2).transpose(1, 2) + 0,
    "chunks": lambda x: torch.cat(x.chunk(2, 3)[::-1], 3) + 0,
    "expand": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1) + 0,
    "roll and repeat": lambda x: x.roll(1, 2).repeat(1, 2, 1, 1) + 0,
    "unfold": lambda x: F.unfold(x, 2) + 0,
    "tril": lambda x: x.tril() + 0,
}


def written_in_pieces(x):
    out = torch.zeros_like(x)
    for j in range(x.shape[3]):
        out[:, :, :, j] = x[:, :, :, j] * (j + 1)
        out[:, :, 0, j] += 1
    return out * 2


@pytest.mark.parametrize("run", [*MOVES.values(), written_in_pieces], ids=[*MOVES, "written in pieces"])
def test_operands_hold_what_the_run_read(run):
    x = torch.randint(1, 100, (1, 2, 4, 6)).double()
    graph = trace(run, None, x)
    assert torch.equal(graph.data_of(graph.output), run(x))
    for value in graph.values:
        if value.kind == "computed":
            for operand in value.operands:
                assert graph.data_of(operand).shape == operand.shape


def test_views_and_zero_padding_are_affine_maps_without_operations():
    graph = trace(lambda x: F.pad(x, (1, 1, 2, 0))[:, :, :-2] * 3, None, torch.ones(1, 2, 4, 6))
    computed = [value for value in graph.values if value.kind == "computed"]
    assert [value.name for value in computed] == ["mul"]
    assert computed[0].operands[0].map.start == (0, 0, -2, -1)


def test_a_map_refuses_zeros_where_elements_lie():
    value = Value("levels", (4, 5), torch.zeros(4, 5))
    whole = Map.identity(value)
    cropped = whole.pad((-1, 0), (0, 0))
    assert cropped.shape == (3, 5) and cropped.start == (1, 0)
    assert cropped.pad((1, 0), (0, 0)) is None
    assert cropped.pad((0, 2), (1, 0)).start == (1, -2)


def test_least_times_reach_the_elements_that_were_read():
    x = torch.zeros(1, 1, 3, 4)
    graph = trace(lambda x: x[:, :, 1:, ::2] + 0, None, x)
    map = graph.values[1].operands[0].map if graph.values[1].operands else graph.values[-1].operands[0].map
    wanted = torch.tensor([[[[5, 3], [4, 7]]]], dtype=torch.int32)
    found = scatter_min(map, torch.full((), 9, dtype=torch.int32).expand(1, 1, 3, 4), wanted)
    expected = torch.tensor([[9, 9, 9, 9], [5, 9, 3, 9], [4, 9, 7, 9]], dtype=torch.int32)
    assert torch.equal(found[0, 0], expected)


def test_random_numbers_are_not_recorded():
    with pytest.raises(RandomNumbers, match="bernoulli_ draws random numbers"):
        trace(lambda x: F.dropout(x, 0.5), None, torch.ones(1, 1, 2, 2))


def test_random_numbers_that_the_output_does_not_read_leave_no_trace():
    def logits(x):
        y = 2 * x
        y.sigmoid().bernoulli(), torch.rand(3).exp(), torch.empty(2, 2)[0].normal_() + y  # a sample that is thrown away
        return y

    graph = trace(logits, None, torch.ones(1, 1, 2, 2))
    assert [value.name for value in graph.values if value.kind != "constant"] == ["levels", "mul"]
    assert [value.index for value in graph.values] == list(range(len(graph.values)))

    def partly(x):
        y = x.clone()
        y[:, :, 0] = torch.rand(2)
        return y

    with pytest.raises(RandomNumbers, match="rand draws random numbers"):
        trace(partly, None, torch.ones(1, 1, 2, 2))


TABLE, PLACES = torch.randn(3, 4), torch.arange(4)
LOOKUPS = {
    "gather": lambda i: TABLE[:1].gather(1, i),  # token types of RoBERTa, by the numbers of places
    "gather of more": lambda i: TABLE.T.unsqueeze(0).gather(1, i.unsqueeze(2).expand(-1, -1, 2))[..., 1],
    "take_along_dim": lambda i: torch.take_along_dim(TABLE.T, i.T, 0).T[:1],
    "take": lambda i: TABLE.take(i + 4),
    "index_select": lambda i: TABLE.index_select(0, i[0] % 3).sum(1).unsqueeze(0),
    "index_select, last": lambda i: TABLE.index_select(-1, i[0])[1:2],
    "columns": lambda i: TABLE[:, i - 4].sum(0),
    "rows and columns": lambda i: TABLE[i % 3 - 3, PLACES - 4],
    "of each place": lambda i: TABLE.T[PLACES, i % 3],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_what_is_looked_up_depends_on_its_index_alone(name):
    index = torch.tensor([[2, 0, 3, 1]])
    graph = trace(LOOKUPS[name], None, index)
    assert torch.equal(graph.result, LOOKUPS[name](index))
    draw_index = torch.arange(4, dtype=torch.int32)[None]
    assert torch.equal(ready_times(graph, draw_index).output_ready(), draw_index)


def test_powers_in_place():
    def powers(x):
        y = 2 * x
        y.pow_(2)
        y[:, 1:] **= x[:, 1:].abs()
        return y

    x = torch.randn(1, 5)
    graph = trace(powers, None, x)
    assert torch.equal(graph.result, powers(x))
    assert torch.equal(graph.data_of(graph.output), graph.result)


def test_what_is_written_in_place_is_what_is_read_later():
    def shifted(x):
        y = 2 * x
        y[:, 1:] = x[:, :-1].exp()
        return y

    x = torch.randn(1, 5)
    graph = trace(shifted, None, x)
    assert torch.equal(graph.result, shifted(x))
    assert torch.equal(graph.data_of(graph.output), graph.result)
