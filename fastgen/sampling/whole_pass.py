"""Sampling by whole passes of the model: `Naive`, the definition, and `FixedPoint`, the same images in fewer passes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.distributions import Distribution
from fastgen.distributions.base import independent
from fastgen.sampling.condition import rows_for
from fastgen.sampling.draws import draw_image, draw_pixel, image_log_prob
from fastgen.sampling.levels import decoded_levels
from fastgen.sampling.request import Draw, Place, SampleRequest, SampleResult
from fastgen.sampling.trace.network import check_output


class Naive:
    """One draw after another; what is not drawn yet holds level 0.

    Args:
        model: called as model(encode(levels)[, condition]), as it is.
        shape: (C, H, W).
        encode: levels (n, C, H, W) int64 -> the model's input.
        order: of the draws, each (channel, row, column), the channels of a pixel in order; channel None where all come
            in one draw. Default: pixels in raster order, all channels of a pixel before the next.
    """

    name = "naive"
    most: int | None = None

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        encode: Callable[[Tensor], Tensor],
        order: Sequence[Place] | None = None,
    ) -> None:
        self.model = model
        self.encode = encode
        self.shape = shape
        channels, height, width = shape
        raster: Iterator[Place] = ((c, i, j) for i in range(height) for j in range(width) for c in range(channels))
        self.order: list[Place] = list(raster if order is None else order)

    @property
    def work_ratio(self) -> float:
        return float(len(self.order))

    def explain(self) -> str:
        return f"one whole forward pass for each of the {len(self.order)} draws of an image: the definition"

    def takes_weights(self) -> bool:
        return False  # the order of the draws may have come from changes of the input

    def decode(self, draw: Draw, request: SampleRequest) -> tuple[Tensor, Tensor]:
        levels = first_levels(request)
        found: Tensor | None = None
        for place in self.order:
            channel, i, j = place
            params = whole_pass(self.model, self.encode, levels, request.condition)
            found = torch.empty_like(params) if found is None else found
            found[..., i, j] = params[..., i, j]
            drawn = decoded_levels(draw(params[..., i, j].clone(), place), params, place, request)
            levels[:, slice(None) if channel is None else channel, i, j] = drawn
        assert found is not None
        return levels, found

    def run(self, request: SampleRequest) -> SampleResult:
        levels = first_levels(request)
        bad = torch.zeros((), dtype=torch.bool, device=levels.device)
        to_draw = (
            torch.ones(request.shape, dtype=torch.bool)
            if request.known_mask is None
            else (~request.known_mask.cpu()).any(0)
        )
        passes = 0
        params = None
        for channel, i, j in self.order:
            at = slice(None) if channel is None else slice(channel, channel + 1)
            if to_draw[at, i, j].any():
                params = whole_pass(self.model, self.encode, levels, request.condition)
                passes += 1
                bad |= draw_pixel(
                    request.distribution,
                    params[..., i, j],
                    request.noise[..., i, j],
                    channel,
                    levels[..., i, j],
                    None if request.known is None else request.known[..., i, j],
                    None if request.known_mask is None else request.known_mask[..., i, j],
                )
            if request.progress is not None:
                request.progress(len(levels[0, at, i, j]))
        log_prob = None
        if request.return_log_prob:
            # A pass for the very last draw has seen all other levels, and no parameters depend on this one.
            if params is None or not to_draw[at, i, j].any():
                params = whole_pass(self.model, self.encode, levels, request.condition)
                passes += 1
            log_prob = image_log_prob(request.distribution, params, levels)
        return SampleResult(levels, log_prob, bad, passes=passes)


def places_of(
    order: Sequence[tuple[int, int, int]], shape: tuple[int, int, int], distribution: Distribution
) -> list[Place]:
    """The draws of whole passes in the order of a causal model: all channels of a pixel at once where neither the model
    nor the distribution makes them depend on each other."""
    channels, height, width = shape
    if channels == 1 or len(order) > height * width:
        return list(order)
    together: list[int | None] = [None] if independent(distribution) else list(range(channels))
    return [(c, i, j) for _, i, j in order for c in together]


def first_levels(request: SampleRequest) -> Tensor:
    """Images (n, C, H, W) before the first draw: the known levels, and level 0 elsewhere."""
    levels = torch.zeros((request.n, *request.shape), dtype=request.dtype, device=request.noise.device)
    if request.known is not None and request.known_mask is not None:
        # Copied, so that the strides of `known` do not choose another convolution, which would round otherwise.
        levels.copy_(request.known.masked_fill(~request.known_mask, 0))
    return levels


def whole_pass(model: nn.Module, encode: Callable[[Tensor], Tensor], levels: Tensor, condition: Any) -> Tensor:
    """The model's output (n, ..., H, W) for levels (n, C, H, W).

    Raises:
        TypeError: the output is not a tensor.
        ValueError: it has no place for each image and pixel.
    """
    n, size = len(levels), levels.shape[-2:]
    # Always the same strides: PyTorch chooses the convolution by them, and another one rounds otherwise. One channel
    # counts as channels last too, so that `contiguous` would not do.
    levels = levels.clone(memory_format=torch.contiguous_format)
    params = _call(model, encode, levels, condition)
    if n == 1 and params.shape[:1] != (1,):
        # Some models squeeze their output, and with it a batch of one. Two equal images are no exception to them.
        params = _call(model, encode, torch.cat([levels, levels]), rows_for(condition, 2))[:1]
    if params.dim() < 3 or params.shape[0] != n or params.shape[-2:] != size:
        raise ValueError(
            f"model must return parameters (n, ..., H, W) = ({n}, ..., {size[0]}, {size[1]}), "
            f"got the shape {tuple(params.shape)}"
        )
    return params


def _call(model: nn.Module, encode: Callable[[Tensor], Tensor], levels: Tensor, condition: Any) -> Tensor:
    x = encode(levels)
    params = model(x) if condition is None else model(x, condition)
    check_output(params)
    return params


class FixedPoint(Naive):
    """All pixels of all images are drawn after every pass, until no level changes. The order of pixels is that of
    `decode` alone.

    The batch stays whole to the end: the output for an image could otherwise be rounded in another way.
    """

    name = "fixed_point"
    passes: int | None = None

    @property
    def draws(self) -> int:
        return math.prod(self.shape)

    @property
    def work_ratio(self) -> float:
        """Passes of the last batch; before the first, the most that it can take."""
        return float(self.draws + 1 if self.passes is None else self.passes)

    def explain(self) -> str:
        last = "" if self.passes is None else f"; {self.passes} for the last batch"
        return f"whole forward passes until the image no longer changes, {self.draws + 1} at most{last}"

    def run(self, request: SampleRequest, begin: Tensor | None = None) -> SampleResult:
        """Takes levels for the first pass, where some are known to be nearly right.

        Raises:
            RuntimeError: the images do not settle, so that the model cannot be causal.
        """
        levels = first_levels(request) if begin is None else begin
        reported = 0
        for passes in range(1, self.draws + 2):
            params = whole_pass(self.model, self.encode, levels, request.condition)
            before = levels
            levels, bad = draw_image(request, params)
            changed = (
                ((levels != before) & ~(levels.isnan() & before.isnan())).any(0).movedim(0, -1).flatten().nonzero()
            )
            settled = self.draws if len(changed) == 0 else int(changed[0])
            if request.progress is not None and settled > reported:
                request.progress(settled - reported)
                reported = settled
            if settled == self.draws:
                self.passes = passes
                log_prob = image_log_prob(request.distribution, params, levels) if request.return_log_prob else None
                return SampleResult(levels, log_prob, bad, passes=passes)
        raise RuntimeError(
            f"the images still change after {self.draws + 1} passes, more than a causal model can take: it depends on "
            "pixels not drawn yet, or on chance (dropout or a normalization in training mode: call model.eval())"
        )
