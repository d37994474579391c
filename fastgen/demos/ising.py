"""Free energies of the Ising model from a variational autoregressive network (Wu, Wang & Zhang 2019, "Solving
Statistical Mechanics Using Variational Autoregressive Networks"), compared with the exact solution.

A lattice of N sites with periodic boundaries has spins s_i of -1 or 1 and the energy E(s) = -sum of s_i s_j over pairs
of neighbours (coupling J = 1, Boltzmann constant k = 1). At temperature T a state s has the probability
p(s) = exp(-E(s) / T) / Z, and f = -T log Z / N is the free energy per site.

The network defines a distribution q(s) that can be sampled and evaluated exactly. It is trained on its own samples to
minimize the mean over q of (E(s) + T log q(s)) / N. This mean is an upper bound of f; where q = p, every sample gives f
itself.
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

TEMPERATURES = (3.2, 2.6, 2.269, 1.9)  # in the order of training; an infinite lattice has its phase transition at 2.269
RATE = 2e-3  # peak learning rate of Adam
SHOWN = 8  # lattices of each temperature in the picture
DRAWN_AT_ONCE = 500  # lattices


def kaufman(height: int, width: int, temperature: float) -> float:
    """The exact free energy per site of a periodic lattice of height x width sites (Kaufman 1949, "Crystal Statistics.
    II", equation 49)."""
    k = 1 / temperature
    r = np.arange(2 * height)
    gamma = np.arccosh(np.maximum(1, np.cosh(2 * k) / np.tanh(2 * k) - np.cos(np.pi * r / height)))
    gamma[0] = 2 * k + math.log(math.tanh(k))  # negative above the critical temperature
    x = width * gamma / 2
    log_2cosh, log_2sinh = np.logaddexp(x, -x), np.abs(x) + np.log1p(-np.exp(-2 * np.abs(x)))
    log_products = [log_2cosh[1::2].sum(), log_2sinh[1::2].sum(), log_2cosh[::2].sum(), log_2sinh[::2].sum()]
    signs = [1, 1, 1, np.sign(x[0])]
    largest = max(log_products)  # factored out of the sum of exponentials
    total = sum(sign * math.exp(product - largest) for sign, product in zip(signs, log_products, strict=True))
    log_z = -math.log(2) + height * width / 2 * math.log(2 * math.sinh(2 * k)) + largest + math.log(total)
    return float(-temperature * log_z / (height * width))


def onsager(temperature: float) -> float:
    """The exact free energy per site of an infinite lattice (Onsager 1944, "Crystal Statistics. I"), an integral over
    the angle phi by the midpoint rule."""
    k = 1 / temperature
    kappa = 2 * math.sinh(2 * k) / math.cosh(2 * k) ** 2
    points = 20_000
    phi = (np.arange(points) + 0.5) * (math.pi / 2 / points)
    mean = np.log((1 + np.sqrt(np.maximum(0, 1 - (kappa * np.sin(phi)) ** 2))) / 2).mean()
    return float(-temperature * (math.log(2 * math.cosh(2 * k)) + mean / 2))


def energy(spins: Tensor) -> Tensor:
    """The energies (n,) of lattices of spins -1 and 1, floats (n, 1, H, W), with periodic boundaries."""
    return -(spins * (spins.roll(1, 2) + spins.roll(1, 3))).sum((1, 2, 3))


class Network(nn.Module):
    """A PixelCNN with residual layers: levels 0 and 1 as floats (n, 1, H, W) -> the logit (n, 1, H, W) of each level
    given those before it. The convolutions are dilated so that the last row sees the first row, its periodic neighbour.

    Args:
        side: height and width of the lattice.
        channels: feature maps of each layer.
    """

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
    """log q (n,) of levels (n, 1, H, W). A state and its mirror image, with all spins flipped, have the same energy; q
    gives them the same probability, the mean of the network's two."""
    mirrored_too = torch.cat((levels, 1 - levels))
    log_p, log_p_mirrored = Bernoulli().log_prob(network(mirrored_too.float()), mirrored_too).chunk(2)
    return torch.logaddexp(log_p, log_p_mirrored) - math.log(2)


class Estimate(NamedTuple):
    """Two estimates of the free energy per site f from samples of q.

    Attributes:
        bound, bound_error: the mean over q of (E + T log q) / N, an upper bound of f, and its standard error.
        weighted, weighted_error: the estimate of f that weights samples by exp(-E / T) / q (Nicoli et al. 2020,
            "Asymptotically unbiased estimation of physical observables with neural samplers"), and its standard error.
            It converges to f with the number of samples; the error does not account for states that q never draws.
        effective: Kish's effective sample size of these weights, divided by the number of samples: 1 where q is exact.
    """

    bound: float
    bound_error: float
    weighted: float
    weighted_error: float
    effective: float


def estimate(temperature: float, energies: Tensor, log_q: Tensor, sites: int) -> Estimate:
    """Estimates f from the energies (n,) and log q (n,) of n samples of q."""
    n = len(energies)
    free_energies = (energies + temperature * log_q) / sites  # of each sample; all equal f where q is exact
    log_weights = -free_energies * (sites / temperature)  # log of exp(-E / T) / q
    log_mean_weight = log_weights.logsumexp(0) - math.log(n)
    weights = (log_weights - log_mean_weight).exp()  # their mean is 1
    return Estimate(
        bound=free_energies.mean().item(),
        bound_error=(free_energies.std() / math.sqrt(n)).item(),
        weighted=(-log_mean_weight * temperature / sites).item(),
        weighted_error=(weights.std() / math.sqrt(n) * temperature / sites).item(),
        effective=1 / weights.square().mean().item(),
    )


def run(
    *, side: int = 16, channels: int = 16, steps: int = 250, batch: int = 128, measured: int = 4000, seed: int = 0
) -> tuple[dict[str, Any], Image.Image]:
    """Trains one network at each of TEMPERATURES in turn, and estimates f at each.

    Args:
        side: height and width of the lattice.
        channels: feature maps of each layer of the network.
        steps: training steps at each temperature; three times as many at the first. During the first half of the steps
            the inverse temperature moves linearly from the previous one, so that q does not lose states.
        batch: lattices in each step, which `fastgen.accelerate` draws from the current network.
        measured: number of lattices that f is estimated from.
        seed: seed of the draws.

    Returns:
        For each temperature, as text: the fields of `Estimate`; "exact" and "infinite", the exact f of this lattice and
        of an infinite one; "energy" and "magnetization", the means per site of E and of |sum of spins|.
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
    shown, previous_beta = [], 0.0
    for temperature in TEMPERATURES:
        count = steps if numbers else 3 * steps
        for step in range(count):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / count))
            levels = draw(batch)
            log_q = log_prob(network, levels)
            beta = previous_beta + (1 / temperature - previous_beta) * min(1.0, 2 * step / count)
            cost = beta * energy(2 * levels - 1) + log_q.detach()
            optimizer.zero_grad()
            ((cost - cost.mean()) * log_q).mean().backward()  # Wu et al., equation 5
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        previous_beta = 1 / temperature
        parts = [draw(min(DRAWN_AT_ONCE, measured - start)) for start in range(0, measured, DRAWN_AT_ONCE)]
        with torch.no_grad():
            log_q = torch.cat([log_prob(network, part) for part in parts]).double()
        spins = 2 * torch.cat(parts).double() - 1
        energies = energy(spins)
        numbers[str(temperature)] = {
            **estimate(temperature, energies, log_q, sites)._asdict(),
            "exact": kaufman(side, side, temperature),
            "infinite": onsager(temperature),
            "energy": energies.mean().item() / sites,
            "magnetization": spins.mean((1, 2, 3)).abs().mean().item(),
        }
        shown.append(parts[0][:SHOWN])
    return numbers, _picture(numbers, torch.stack(shown), side)


def _picture(numbers: dict[str, Any], lattices: Tensor, side: int) -> Image.Image:
    hot, cold = max(TEMPERATURES), min(TEMPERATURES)
    margin = 0.1 * (hot - cold)
    temperatures = np.linspace(cold - margin, hot + margin, 60)
    exact = [kaufman(side, side, temperature) for temperature in temperatures]
    axes = Axes((temperatures[0], temperatures[-1]), (min(exact) - 0.1, max(exact) + 0.1))
    axes.ticks(
        {temperature: f"{temperature:g}" for temperature in TEMPERATURES},
        {value: f"{value:.2f}" for value in (exact[0], exact[-1])},
    )
    axes.draw.line([axes.place(*point) for point in zip(temperatures, exact, strict=True)], COLOURS[0], 2)
    captions = []
    for temperature, row in numbers.items():
        axes.dot(axes.place(float(temperature), row["bound"]), COLOURS[3], 4)
        captions.append(
            f"T = {temperature}: exact {row['exact']:.5f}; bound {row['bound']:.5f} +- {row['bound_error']:.5f}, "
            f"weighted {row['weighted']:.5f} +- {row['weighted_error']:.5f}"
        )
    return sheet(
        (f"Free energy per site of the {side}x{side} Ising model over temperature: exact (line),", None),
        ("and the network's bound (dots)", axes.picture),
        *((caption, None) for caption in captions),
        ("Lattices drawn from the network, one row for each temperature", rows_of(lattices, 2)),
    )
