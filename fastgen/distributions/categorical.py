"""Distributions of levels 0, 1, ...: `Categorical` and `Bernoulli`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.distributions.base import (
    Channels,
    bounds,
    check_options,
    close_leaders,
    first_exceeding,
    level_counts,
    near_a_step,
    no_ranking,
    precise,
    softmax,
    sum_all_but_batch,
)

LAYOUTS = ("BKCHW", "BCKHW", "B(KC)HW", "B(CK)HW", "BTK", "BKT", "BHWK")


@dataclass(frozen=True)
class Categorical:
    """A softmax over the levels 0..K - 1 for every channel of a pixel (van den Oord et al. 2016, section 3.4).

    Args:
        levels: number of levels K, at least 2. If the number depends on the channel or the place: ints (a sequence or a
            tensor) broadcastable to the shape (C, H, W), (H, W) or (T,), of which K is the largest. A sampler, which
            knows the place, then replaces the logits of levels that a place does not have by -inf; `draw` and
            `log_prob` do not.
        layout: the axes of the model's output, K logits for each of C channels. "BKCHW", "BCKHW", or one axis for both:
            "B(KC)HW" (channel fastest) or "B(CK)HW" (level fastest). With C = 1, a sampler takes an output (B, K, H, W)
            in any of the four. For sequences (B, T): "BTK" or "BKT"; for grids (B, H, W): "BHWK".
        temperature, top_k, top_p: sampling options, which `tempered` sets.
        counts: set by the constructor: `levels` as a tensor, if it is not an int.

    Raises:
        ValueError: levels, layout or a sampling option is not one of these. Methods with `params` raise it if these do
            not have the layout; `check_params` also if they have another number of channels.
    """

    levels: Any  # __post_init__ makes it an int
    layout: str = "BKCHW"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    counts: Tensor | None = field(default=None, repr=False, compare=False)  # `levels` as a tensor, if it is not an int
    independent_channels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int):
            counts = level_counts(self.levels)
            object.__setattr__(self, "counts", counts)
            object.__setattr__(self, "levels", int(counts.max()))
        if self.levels < 2:
            raise ValueError(f"levels must be an int >= 2, got {self.levels!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}")
        check_options(self.temperature, self.top_k, self.top_p)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Categorical):
            return NotImplemented
        same = all(getattr(self, item.name) == getattr(other, item.name) for item in fields(self) if item.compare)
        if self.counts is None or other.counts is None:
            return same and self.counts is other.counts
        return same and torch.equal(self.counts, other.counts)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, *shape)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "Categorical":
        return replace(self, temperature=temperature, top_k=top_k, top_p=top_p)

    def logits(self, params: Tensor) -> Tensor:
        """Views the model's output (n, ...) as logits (n, K, C, ...).

        Raises:
            ValueError: the output does not have this layout.
        """
        axis = {"BTK": -1, "BHWK": -1, "BKT": 1, "BKCHW": 1, "BCKHW": 2}.get(self.layout)
        if self.layout in ("BTK", "BKT", "BHWK"):
            fits = params.dim() in (2, len(self.layout))
        else:
            fits = params.dim() >= (2 if axis is None else 3)
        if not fits or (params.shape[1] % self.levels if axis is None else params.shape[axis] != self.levels):
            raise self._misfit(params)
        if axis is None:
            n, size, *rest = params.shape
            if self.layout == "B(KC)HW":
                return params.view(n, self.levels, size // self.levels, *rest)
            return params.view(n, size // self.levels, self.levels, *rest).transpose(1, 2)
        if "C" in self.layout:
            return params if axis == 1 else params.transpose(1, 2)
        return params.movedim(axis, 1).unsqueeze(2)

    def _misfit(self, params: Tensor) -> ValueError:
        hint = "output= of accelerate picks the logits out of what the model returns"
        if params.dim() == 2 and params.shape[1] % self.levels == 0:
            hint = "where all channels share an axis with the levels, it is layout='B(KC)HW' or 'B(CK)HW'"
        return ValueError(
            f"params has the shape {tuple(params.shape)}; expected K = {self.levels} logits in the layout "
            f"{self.layout}: {hint}"
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probabilities of logits (n, K, ...) after temperature, top-k and top-p, in float64 (see `precise`). With
        top-k or top-p they are not normalized."""
        logits = precise(logits)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(1), self.levels).movedim(-1, 1).to(logits.dtype)
        if self.top_k is None and self.top_p is None:
            return softmax(logits, self.temperature)
        ranked, order = softmax(logits, self.temperature).sort(dim=1, descending=True, stable=True)
        kept = torch.ones_like(ranked, dtype=torch.bool)
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        if self.top_p is not None:
            ranked = ranked * kept
            sums = ranked.cumsum(1)  # sums[:, -1] rather than .sum(): the same order of summation
            kept &= sums - ranked < self.top_p * sums[:, -1:]
        return torch.zeros_like(ranked).scatter(1, order, ranked * kept)

    def restricted(self, params: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The model's output (n, ..., H, W) for images of `shape` (C, H, W), with -inf for levels that a place does not
        have."""
        if self.counts is None:
            return params
        self.check_params(params[..., 0, 0], shape[0])
        hidden = torch.arange(self.levels).view(-1, 1, 1, 1) >= self.counts.expand(shape)
        if self.layout in ("BCKHW", "B(CK)HW"):
            hidden = hidden.transpose(0, 1)
        return params.masked_fill(hidden.reshape(params.shape[1:]).to(params.device), float("-inf"))

    def _rows(self, params: Tensor, channel: Channels) -> tuple[Tensor, torch.Size]:
        """Logits (rows, K) of one channel or several, and the shape of their draws, (n,) or (n, channels). As rows, the
        sums of a channel are rounded in the same way, whether it is drawn alone or with others."""
        logits = self.logits(params)[:, :, channel].movedim(1, -1)
        return logits.reshape(-1, self.levels), logits.shape[:-1]

    def draw(self, params: Tensor, noise: Tensor, channel: Channels, previous: Tensor) -> Tensor:
        logits, shape = self._rows(params, channel)
        return first_exceeding(self.probabilities(logits), noise[:, channel].reshape(-1)).view(shape)

    def steps(self, params: Tensor, channel: Channels) -> Tensor | None:
        if self.temperature == 0 or self.top_k is not None or self.top_p is not None:
            return None  # params also decide which levels can be drawn
        logits, shape = self._rows(params, channel)
        cumulative = self.probabilities(logits).cumsum(1)
        return (cumulative[:, :-1] / cumulative[:, -1:]).view(*shape, -1)

    def uncertain(self, params: Tensor, noise: Tensor, channel: Channels, previous: Tensor, error: float) -> Tensor:
        logits, shape = self._rows(params, channel)
        return self._uncertain(precise(logits), noise[:, channel].reshape(-1), error).view(shape)

    def _uncertain(self, logits: Tensor, noise: Tensor, error: float) -> Tensor:
        """`uncertain` for logits (rows, K) and their uniforms (rows,)."""
        if self.temperature == 0:
            return close_leaders(logits, error)
        error = error / self.temperature
        unsure = near_a_step(self.probabilities(logits), noise, error)
        if self.top_k is None and self.top_p is None:
            return unsure
        # The set of kept levels could change if the last level kept and the next one could swap their ranks, or if the
        # number of levels that top_p keeps could change.
        ranked = logits.sort(dim=1, descending=True).values / self.temperature
        swaps = ranked[:, :-1] - ranked[:, 1:] <= 2 * error + 1e-12
        count = self.levels if self.top_k is None else min(self.top_k, self.levels)
        if count < self.levels:
            unsure = unsure | swaps[:, count - 1]
        if self.top_p is not None and self.top_p < 1 and count > 1:
            share = ranked[:, :count].softmax(1).cumsum(1)[:, :-1]
            low, high = bounds(share, error)
            last = (share < self.top_p).sum(1, keepdim=True)  # rank of the last level that top_p keeps
            swaps = F.pad(swaps, (0, 1)).gather(1, last).squeeze(1)
            unsure = unsure | swaps | ((low < self.top_p) & (self.top_p <= high)).any(1)
        return unsure

    def check_params(self, params: Tensor, channels: int) -> None:
        present = self.logits(params).shape[2]
        if present != channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}, logits of {present} channels in the layout {self.layout} "
                f"with {self.levels} levels; expected {channels} channels"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        log_probabilities = precise(self.logits(params)).log_softmax(1)
        if levels.dim() == log_probabilities.dim() - 2:
            levels = levels.unsqueeze(1)  # sequences and grids have no axis of channels
        return sum_all_but_batch(log_probabilities.gather(1, levels.unsqueeze(1)).squeeze(1))


@dataclass(frozen=True)
class Bernoulli:
    """Levels 0 and 1 with one logit for every channel of a pixel: 1 if noise >= 1 - sigmoid(logit). The model's output
    is (B, C, H, W) logits.

    Raises:
        ValueError: temperature is not a finite number >= 0. `tempered` raises it if top_k or top_p is given,
            `check_params` if params does not have one logit for each channel.
    """

    temperature: float = 1.0
    independent_channels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, *shape)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "Bernoulli":
        check_options(temperature, top_k, top_p)
        no_ranking("Bernoulli", top_k, top_p)
        return replace(self, temperature=temperature)

    def draw(self, params: Tensor, noise: Tensor, channel: Channels, previous: Tensor) -> Tensor:
        logit = precise(params[:, channel])
        if self.temperature == 0:
            return (logit > 0).long()
        return (noise[:, channel] >= torch.sigmoid(-logit / self.temperature)).long()

    def uncertain(self, params: Tensor, noise: Tensor, channel: Channels, previous: Tensor, error: float) -> Tensor:
        logit = precise(params[:, channel])
        if self.temperature == 0:
            return logit.abs() <= error
        u = noise[:, channel]
        slack = 4 * torch.finfo(logit.dtype).eps
        low = torch.sigmoid(-(logit + error) / self.temperature) - slack
        return (low <= u) & (u < torch.sigmoid(-(logit - error) / self.temperature) + slack)

    def check_params(self, params: Tensor, channels: int) -> None:
        if params.dim() < 2 or params.shape[1] != channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected a logit for each of {channels} channels on dim 1"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        return sum_all_but_batch(-F.softplus(precise(params) * (1 - 2 * levels)))
