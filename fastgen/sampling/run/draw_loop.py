"""Draws the images of a batch with a player: the levels of a place, the step that they decide, the next place.

A player has the memory of a batch and plays the steps of a plan over it. It knows nothing of draws, of known levels or
of whole passes: all that is here, once for every player.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgen.sampling.draws import draw_pixel
from fastgen.sampling.levels import decoded_levels
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.request import Draw, SampleRequest


class Player(Protocol):
    """Plays a plan for batches of n images on one device; made as Player(plan, n, device).

    A player may also have a method `play(request, first) -> Tensor | None`, which draws all places from number `first`
    on by itself, after `begin` and `fill_known`, and returns `bad` as `draw_batch` does: for distributions that it
    knows. None says that it does not know this one, and has done nothing.

    Attributes:
        plan: what is played.
        n: number of images.
        device: where they are.
        levels: (n, C, H, W), a view of the player's memory that the draws write to; zero after `begin`.
    """

    plan: Plan
    n: int
    device: torch.device
    levels: Tensor

    def another(self, n: int) -> "Player":
        """A player for n images, which may share memory with this one: what one of them has drawn is lost when the
        other begins."""
        ...

    def begin(self, request: SampleRequest) -> None:
        """Takes `request.condition`, sets all levels to zero, computes what depends on no pixel."""
        ...

    def params(self) -> Tensor:
        """The model's output for what has been drawn, (n, ..., H, W), a view; of half precision perhaps as float32."""
        ...

    def step(self, place: int) -> None:
        """Computes what the levels at this place of `plan.order` decide, after those of all places before it."""
        ...

    def fill_known(self, levels: Tensor, count: int) -> None:
        """Takes over levels (n, C, H, W) of which the first `count` places are known in every image, and computes all
        that these decide, in one pass. What other places hold counts for nothing."""
        ...


def draw_batch(player: Player, request: SampleRequest) -> Tensor:
    """Draws all images of a request, which stay in `player.levels`, with the output that they were drawn of in
    `player.params()`.

    Leading known places, a row of them at least, are filled in one pass.

    Returns:
        A bool scalar on the device: the parameters of some draw were NaN.
    """
    player.begin(request)
    plan = player.plan
    draws = request.shape[0] if plan.whole_pixels else 1  # of a place
    known = known_everywhere(plan, request)
    first = [*known, False].index(False)
    if first < request.shape[2]:
        first = 0
    elif request.known is not None:
        player.fill_known(request.known, first)
        if request.progress is not None:
            request.progress(first * draws)
    play = getattr(player, "play", None)
    if play is not None:  # without the host between two steps
        bad = play(request, first)
        if bad is not None:
            return bad
    bad = torch.zeros((), dtype=torch.bool, device=player.device)
    for place in range(first, len(plan.order)):
        if known[place] and request.known is not None:
            c, i, j = plan.order[place]
            at = slice(None) if plan.whole_pixels else c
            player.levels[:, at, i, j] = request.known[:, at, i, j]
            player.step(place)
        else:
            draw_place(player, request, place, bad)
        if request.progress is not None:
            request.progress(draws)
    return bad


def draw_place(player: Player, request: SampleRequest, place: int, bad: Tensor) -> None:
    """Draws one place of the order and computes what it decides; `bad` notes parameters that are NaN."""
    c, i, j = player.plan.order[place]
    bad |= draw_pixel(
        request.distribution,
        params_at(player, i, j),
        request.noise[..., i, j],
        None if player.plan.whole_pixels else c,
        player.levels[..., i, j],
        None if request.known is None else request.known[..., i, j],
        None if request.known_mask is None else request.known_mask[..., i, j],
    )
    player.step(place)


def params_at(player: Player, row: int, column: int) -> Tensor:
    """The model's output at a pixel, (n, ...), in the model's dtype."""
    return player.params()[..., row, column].to(player.plan.output_dtype)


def decode_batch(player: Player, draw: Draw, request: SampleRequest) -> None:
    """Fills all images with levels that `draw` gives, as `Sampler.decode` says; they stay in `player.levels`."""
    player.begin(request)
    together = player.plan.whole_pixels and request.shape[0] > 1
    for number, (c, i, j) in enumerate(player.plan.order):
        place = (None if together else c, i, j)
        params = params_at(player, i, j).clone()  # the caller may keep them
        at = slice(None) if together else c
        player.levels[:, at, i, j] = decoded_levels(draw(params, place), params, place, request)
        player.step(number)


def known_everywhere(plan: Plan, request: SampleRequest) -> list[bool]:
    """For every place whether its levels are known in all images."""
    if request.known_mask is None:
        return [False] * len(plan.order)
    return at_places(plan, request.known_mask.all(0, keepdim=True).cpu(), torch.all)[0].tolist()


def at_places(plan: Plan, values: Tensor, join: Callable[..., Any]) -> Tensor:
    """Values (n, C, H, W) in drawing order, (n, places); those of the channels of a place are joined (all, any)."""
    index = torch.tensor(plan.order, device=values.device)
    if plan.whole_pixels:
        return join(values, 1)[:, index[:, 1], index[:, 2]]
    return values[:, index[:, 0], index[:, 1], index[:, 2]]


def from_places(plan: Plan, values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The opposite of `at_places`: values (n, places) as (n, C, H, W)."""
    index = torch.tensor(plan.order, device=values.device)
    found = values.new_empty((len(values), *shape))
    if plan.whole_pixels:
        found[:, :, index[:, 1], index[:, 2]] = values[:, None]
    else:
        found[:, index[:, 0], index[:, 1], index[:, 2]] = values
    return found
