"""Orders found from ready times alone: of total orders, of few dependences, of circles."""

import pytest
import torch

from fastgen.sampling.causality.draws import Draws, raster
from fastgen.sampling.causality.search import search, topological_order

SHAPE = (1, 6, 7)
COUNT = 42
DRAWS = Draws(raster(SHAPE, False), torch.zeros(1, 1, dtype=torch.long), SHAPE)
NOTHING = torch.zeros(COUNT, COUNT, dtype=torch.bool)


class Network:
    """Ready times of a model whose draws depend on each other as a matrix says; counts how often it is asked."""

    def __init__(self, depends):
        self.depends, self.asked = depends, 0

    def __call__(self, index):
        self.asked += 1
        return torch.where(self.depends, index.reshape(1, -1), -1).amax(1).view(1, 1, *SHAPE[1:])

    def allows(self, draws):
        number = draws.of_levels().flatten()  # by pixel
        return bool((self(draws.of_levels()).flatten() < number).all())


def total(order):
    rank = torch.empty(COUNT, dtype=torch.long)
    rank[order] = torch.arange(COUNT)
    return rank.view(-1, 1) > rank.view(1, -1)


def by_chance(seed, share):
    generator = torch.Generator().manual_seed(seed)
    depends = total(torch.randperm(COUNT, generator=generator))
    return depends & (torch.rand(COUNT, COUNT, generator=generator) < share)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_is_found_in_few_tries(seed, share):
    network = Network(by_chance(seed, share))
    found = search(network, DRAWS, NOTHING)
    assert found.circle == [] and network.allows(found.draws)
    assert sorted(found.draws.order) == DRAWS.order
    assert network.asked < 35


@pytest.mark.parametrize("turn", ["flip", "columns", "both"])
def test_raster_orders_from_other_corners_are_tried_first(turn):
    pixels = torch.arange(COUNT).view(6, 7)
    order = {"flip": pixels.flip(0), "columns": pixels.T, "both": pixels.T.flip(0, 1)}[turn].flatten()
    network = Network(total(order))
    assert search(network, DRAWS, NOTHING).draws.order == [DRAWS.order[k] for k in order.tolist()]
    assert network.asked <= 8


@pytest.mark.parametrize("length", [1, 2, 5, 42])
def test_a_circle_is_named(length):
    depends = by_chance(5, 0.3)
    members = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))[:length]
    depends[members, members.roll(-1)] = True
    found = search(Network(depends), DRAWS, NOTHING)
    assert found.draws is None and found.circle
    numbers = [DRAWS.order.index(draw) for draw in found.circle]
    assert all(depends[a, b] for a, b in zip(numbers, numbers[1:] + numbers[:1], strict=True))


def test_what_is_known_beforehand_is_kept_to():
    known = total(torch.arange(COUNT).flip(0)) & (torch.arange(COUNT) == COUNT - 1)  # all after the last pixel
    draws = search(Network(NOTHING), DRAWS, known).draws
    assert draws.order[0] == (0, 5, 6)
    assert search(Network(total(torch.arange(COUNT))), DRAWS, known).circle


def test_the_order_nearest_to_the_given_one():
    depends = torch.zeros(4, 4, dtype=torch.bool)
    depends[0, 3] = depends[1, 0] = True
    assert topological_order(depends) == [2, 3, 0, 1]
    depends[3, 1] = True
    assert topological_order(depends) is None
