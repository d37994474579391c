"""Exact free energies compared with sums over all states, and a network that comes close to them."""

import itertools
import math

import pytest
import torch

from fastgen import demos
from fastgen.demos import ising


def states(height, width):
    """All spins of a lattice, (2 ** sites, 1, height, width)."""
    found = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=height * width)), dtype=torch.float64)
    return found.view(-1, 1, height, width)


@pytest.mark.parametrize("temperature", [1.2, 2.269, 3.5])
@pytest.mark.parametrize("sides", [(2, 2), (3, 4), (4, 3), (5, 2)], ids=str)
def test_kaufman_is_the_sum_over_all_states(sides, temperature):
    log_z = torch.logsumexp(-ising.energy(states(*sides)) / temperature, 0).item()
    assert ising.kaufman(*sides, temperature) == pytest.approx(-temperature * log_z / math.prod(sides), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.5, 2.2, 2.4, 5.0])
def test_onsager_is_the_limit(temperature):
    assert ising.onsager(temperature) == pytest.approx(ising.kaufman(300, 300, temperature), abs=3e-5)
    # At the critical temperature: -beta f = ln 2 / 2 + 2 G / pi, with Catalan's constant G.
    critical = 2 / math.log(1 + math.sqrt(2))
    exact = -critical * (math.log(2) / 2 + 2 * 0.9159655941772190 / math.pi)
    assert ising.onsager(critical) == pytest.approx(exact, abs=1e-7)


def test_energy_by_hand():
    spins = torch.ones(2, 1, 3, 4)
    spins[1, 0, 1, 2] = -1
    assert ising.energy(spins).tolist() == [-24, -16]  # four bonds turn


def test_the_network_has_probabilities_of_all_states():
    """They sum to one and are equal for mirrored states; the estimates of f are an upper bound and consistent."""
    network = ising.Network(3, 4)
    levels = ((states(3, 3) + 1) / 2).long()
    with torch.no_grad():
        log_q = ising.log_prob(network, levels).double()
    assert torch.logsumexp(log_q, 0).item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(log_q, log_q.flip(0))
    energies, exact = ising.energy(states(3, 3)), ising.kaufman(3, 3, 2.5)
    drawn = torch.multinomial(log_q.exp(), 100_000, replacement=True)
    found = ising.estimate(2.5, energies[drawn], log_q[drawn], 9)
    mean = (log_q.exp() * (energies + 2.5 * log_q)).sum().item() / 9
    assert abs(found.bound - mean) < 5 * found.bound_error and mean > exact + 0.05
    assert abs(found.weighted - exact) < 5 * found.weighted_error < 0.1
    # Where q is right, every sample says f.
    right = -energies / 2.5 - torch.logsumexp(-energies / 2.5, 0)
    perfect = ising.estimate(2.5, energies[drawn], right[drawn], 9)
    assert perfect.bound == pytest.approx(exact) and perfect.bound_error < 1e-12
    assert perfect.effective == pytest.approx(1) and 0 < found.effective < 0.9


def test_the_demonstration(tmp_path, monkeypatch):
    """A 4x4 lattice at two temperatures, briefly."""
    monkeypatch.setattr(ising, "TEMPERATURES", (3.2, 2.269))
    numbers = demos.perform("ising", tmp_path, side=4, channels=8, steps=60, batch=64, measured=1500)
    assert (tmp_path / "ising.png").exists()
    for row in numbers.values():
        assert row["bound"] > row["exact"] - 4 * row["bound_error"]
        assert row["bound"] < row["exact"] + 0.15 and 0.05 < row["effective"] <= 1
        assert abs(row["weighted"] - row["exact"]) < 6 * row["weighted_error"] + 0.005
    rows = list(numbers.values())
    assert rows[0]["energy"] > rows[-1]["energy"] and rows[0]["magnetization"] < rows[-1]["magnetization"]
