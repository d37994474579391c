"""The Ising model on a periodic lattice by a variational autoregressive network (Wu, Wang & Zhang 2019, "Solving
Statistical Mechanics Using Variational Autoregressive Networks"): free energies from exact samples with exact
probabilities, beside the solved model's.

Energy E = -sum of s_i s_j over neighbours, each spin -1 or 1, units J = k = 1; temperatures T, beta = 1 / T. The
network's q(s) is fitted to exp(-beta E) / Z by its own samples alone: (E + T log q(s)) / N has a mean over q that is at
least the free energy a site, f = -T log Z / N, and is f itself for every s where q is right.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen import Bernoulli, accelerate
from fastgen.demos.pictures import COLOURS, Axes, rows_of, sheet
from fastgen.nn import MaskedConv2d

TEMPERATURES = (3.2, 2.6, 2.269, 1.9)  # from hot to cold, as the network meets them; the third is critical
RATE = 2e-3
SHOWN = 8  # lattices of each temperature


def kaufman(height: int, width: int, temperature: float) -> float:
    """f of a periodic lattice, exactly (Kaufman 1949, "Crystal Statistics. II", equation 49)."""
    k = 1 / temperature
    r = np.arange(2 * height)
    gamma = np.arccosh(np.maximum(1, np.cosh(2 * k) / np.tanh(2 * k) - np.cos(np.pi * r / height)))
    gamma[0] = 2 * k + math.log(math.tanh(k))  # has a sign: that of the temperature below the critical one
    half = width * gamma / 2
    cosh, sinh = np.logaddexp(half, -half), np.abs(half) + np.log1p(-np.exp(-2 * np.abs(half)))
    terms = [cosh[1::2].sum(), sinh[1::2].sum(), cosh[::2].sum(), sinh[::2].sum()]
    signs = [1, 1, 1, np.sign(half[0])]
    most = max(terms)
    four = most + math.log(sum(sign * math.exp(term - most) for sign, term in zip(signs, terms, strict=True)))
    log_z = -math.log(2) + height * width / 2 * math.log(2 * math.sinh(2 * k)) + four
    return float(-temperature * log_z / (height * width))


def onsager(temperature: float) -> float:
    """f of an infinite lattice, exactly (Onsager 1944, "Crystal Statistics. I")."""
    k = 1 / temperature
    kappa = 2 * math.sinh(2 * k) / math.cosh(2 * k) ** 2
    points = 20_000
    phi = (np.arange(points) + 0.5) * (math.pi / 2 / points)
    mean = np.log((1 + np.sqrt(np.maximum(0, 1 - (kappa * np.sin(phi)) ** 2))) / 2).mean()
    return float(-temperature * (math.log(2 * math.cosh(2 * k)) + mean / 2))


def energy(spins: Tensor) -> Tensor:
    """E of spins -1 or 1 (n, 1, H, W) on a periodic lattice, (n,)."""
    return -(spins * (spins.roll(1, 2) + spins.roll(1, 3))).sum((1, 2, 3))


class Network(nn.Module):
    """Levels 0 and 1 as floats (n, 1, H, W) -> the logit of each spin given those before it. Residual masked
    convolutions, dilated so that the last row sees the first, to which it is a neighbour."""

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.first = MaskedConv2d(1, channels, 5, padding=2, mask_type="A")
        dilations = [2**power for power in range(max(1, (side - 1).bit_length()))]
        self.rest = nn.ModuleList(
            MaskedConv2d(channels, channels, 3, padding=dilation, dilation=dilation, mask_type="B")
            for dilation in dilations
        )
        self.last = MaskedConv2d(channels, 1, 1, mask_type="B")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(2 * x - 1)
        for layer in self.rest:
            x = x + layer(F.silu(x))
        return self.last(F.silu(x))


def log_prob(network: Network, levels: Tensor) -> Tensor:
    """log q of levels (n, 1, H, W), which have either sign alike, as the energy has: q(s) = (p(s) + p(-s)) / 2."""
    both = torch.cat((levels, 1 - levels))
    p, flipped = Bernoulli().log_prob(network(both.float()), both).chunk(2)
    return torch.logaddexp(p, flipped) - math.log(2)


class Estimate(NamedTuple):
    """Of f, with standard errors: the mean over q, an upper bound, and the one that weights samples by exp(-beta E) / q
    (Nicoli et al. 2020, "Asymptotically unbiased estimation of physical observables with neural samplers"), which is
    right in the limit of many samples. Its error does not know of states that q never draws.

    `effective`: the share of samples that would tell as much, had all the same weight (Kish): 1 where q is right.
    """

    bound: float
    bound_error: float
    weighted: float
    weighted_error: float
    effective: float


def estimate(temperature: float, energies: Tensor, log_q: Tensor, sites: int) -> Estimate:
    each = (energies + temperature * log_q) / sites  # f, where q is right
    n = len(each)
    log_weights = -each * (sites / temperature)
    log_mean = log_weights.logsumexp(0) - math.log(n)
    weights = (log_weights - log_mean).exp()  # of mean 1
    error = weights.std() / math.sqrt(n) * temperature / sites
    bound = each.mean().item(), (each.std() / math.sqrt(n)).item()
    weighted = (-log_mean * temperature / sites).item()
    return Estimate(*bound, weighted, error.item(), 1 / weights.square().mean().item())


def run(
    *, side: int = 16, channels: int = 16, steps: int = 250, batch: int = 128, measured: int = 4000, seed: int = 0
) -> tuple[dict[str, Any], Image.Image]:
    """Fits one network, from the highest temperature to the lowest, and measures f at each.

    Args:
        side: of the lattice.
        steps: of training at each temperature, the first three times as many. In the first half of them it is reached
            gradually, so that q does not lose states.
        batch: lattices a step, drawn by `fastgen.accelerate` from the network as it then is.
        measured: lattices that f is estimated from.
        seed: of the draws.

    Returns:
        For each temperature, as text, what `Estimate` holds; "exact", f of this lattice, "infinite", of an infinite
        one; energy and |magnetization| a site.
    """
    network, sites = Network(side, channels), side * side
    sampler = accelerate(network, (1, side, side), distribution=Bernoulli())
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        levels = sampler.sample(n, seed=generator)
        flip = torch.rand((n, 1, 1, 1), generator=generator) < 0.5
        return torch.where(flip, 1 - levels, levels)

    optimizer = torch.optim.Adam(network.parameters(), RATE)
    numbers: dict[str, Any] = {}
    lattices, before = [], 0.0
    for number, temperature in enumerate(TEMPERATURES):
        count = 3 * steps if number == 0 else steps
        for step in range(count):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / count))
            levels = draw(batch)
            log_q = log_prob(network, levels)
            beta = before + (1 / temperature - before) * min(1.0, 2 * step / count)
            cost = beta * energy(2 * levels - 1) + log_q.detach()
            optimizer.zero_grad()
            ((cost - cost.mean()) * log_q).mean().backward()  # Wu et al., equation 5
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        before = 1 / temperature
        parts = [draw(min(500, measured - start)) for start in range(0, measured, 500)]
        with torch.no_grad():
            log_q = torch.cat([log_prob(network, part) for part in parts]).double()
        spins = 2 * torch.cat(parts).double() - 1
        estimates = estimate(temperature, energy(spins), log_q, sites)
        numbers[str(temperature)] = {
            **estimates._asdict(),
            "exact": kaufman(side, side, temperature),
            "infinite": onsager(temperature),
            "energy": energy(spins).mean().item() / sites,
            "magnetization": spins.mean((1, 2, 3)).abs().mean().item(),
        }
        lattices.append(parts[0][:SHOWN])
    return numbers, _picture(numbers, torch.stack(lattices), side)


def _picture(numbers: dict[str, Any], lattices: Tensor, side: int) -> Image.Image:
    hot, cold = max(TEMPERATURES), min(TEMPERATURES)
    margin = 0.1 * (hot - cold)
    grid = np.linspace(cold - margin, hot + margin, 60)
    exact = [kaufman(side, side, temperature) for temperature in grid]
    axes = Axes((grid[0], grid[-1]), (min(exact) - 0.1, max(exact) + 0.1))
    axes.ticks(
        {temperature: f"{temperature:g}" for temperature in TEMPERATURES},
        {value: f"{value:.2f}" for value in (exact[0], exact[-1])},
    )
    places = [axes.place(*point) for point in zip(grid, exact, strict=True)]
    axes.draw.line(places, COLOURS[0], 2)
    lines = []
    for temperature, row in numbers.items():
        axes.dot(axes.place(float(temperature), row["bound"]), COLOURS[3], 4)
        lines.append(
            (
                f"T = {temperature}: exact {row['exact']:.5f}; bound {row['bound']:.5f} +- {row['bound_error']:.5f}, "
                f"weighted {row['weighted']:.5f} +- {row['weighted_error']:.5f}",
                None,
            )
        )
    return sheet(
        (f"Free energy a site of the {side}x{side} Ising model by temperature: exact, and the network's", axes.picture),
        *lines,
        ("Lattices, a row for each temperature, drawn exactly from the network", rows_of(lattices, 2)),
    )
