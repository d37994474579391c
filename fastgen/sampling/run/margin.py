"""How far the engine's output has been from the model's own: a measured margin, and the draws that it could change."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastgen.sampling.draws import WIDEST, draw_image, greatest_shift, unsure_images
from fastgen.sampling.request import SampleRequest, tell

# Times the largest difference that was seen, of thousands or millions: some five standard deviations. The largest of
# another batch is within a fifth of it, and a draw changes only if its noise lies where an error passes the margin.
MARGIN = 1.5
MOST_SHIFTS = 8  # distributions, options included, whose shift is remembered

T = TypeVar("T")


class Held(Generic[T]):
    """A few values, each for an object: for itself, which is held, not for what it looks like or where it lies.

    Args:
        most: how many; the one that was put longest ago goes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._pairs: list[tuple[object, T]] = []

    def get(self, key: object) -> T | None:
        return next((value for one, value in self._pairs if one is key), None)

    def put(self, key: object, value: T) -> None:
        self._pairs = [pair for pair in self._pairs if pair[0] is not key][1 - self.most :] + [(key, value)]

    def values(self) -> list[T]:
        return [value for _, value in self._pairs]


class Margin:
    """The errors that whole passes have shown, of all batches of one engine.

    Args:
        of_draws: what draws that are not made in float64 may be wrong by besides, in a parameter or in a cumulative
            probability.

    Attributes:
        error: the largest difference of a parameter; None before the first pass.
        scale: the largest parameter of the pass that showed it.
        of_values: the largest difference of a real value, drawn of the same noise after the same values; None where
            levels are drawn.
    """

    def __init__(self, of_draws: float = 0.0) -> None:
        self.of_draws = of_draws
        self.error: float | None = None
        self.scale = 0.0
        self.of_values: float | None = None
        self._shifts = Held[float](MOST_SHIFTS)  # of cumulative probabilities, by distribution

    def measure(self, request: SampleRequest, params: Tensor, truth: Tensor, half: bool) -> float:
        """Notes the difference between the engine's output and the model's (n, ..., H, W), and returns the largest."""
        exact = torch.promote_types(truth.dtype, torch.float32)
        error = float((truth.to(exact) - params.to(exact)).abs().nan_to_num(0, posinf=0).max())
        if self.error is None or error > self.error:
            self.error = max(error, 1e-12)
            self.scale = float(truth.to(exact).abs().nan_to_num(0, posinf=0).max())
            if self.error > 1e-3 * self.scale + 1e-9 and not half:
                tell(
                    f"the engine's output differs from the model's by {self.error:.1e}, more than rounding: please "
                    "report this model; the images are right, but took more passes than they should"
                )
        if request.dtype.is_floating_point:
            drawn = draw_image(request, params)[0].double() - draw_image(request, truth)[0].double()
            self.of_values = max(self.of_values or 0.0, float(drawn.abs().nan_to_num(0, posinf=0).max()))
        shift = greatest_shift(request, params, truth)
        if shift is not None:
            self._shifts.put(request.distribution, max(self._shifts.get(request.distribution) or 1e-12, shift))
        return error

    def unsure(self, request: SampleRequest, params: Tensor, levels: Tensor) -> Tensor:
        """In which images an error of that size could have changed a draw, (n,) bool: levels (n, C, H, W), made of
        params."""
        if self.error is None:
            return torch.ones(request.n, dtype=torch.bool, device=params.device)
        shift = self._shifts.get(request.distribution)
        error = MARGIN * self.error + self.of_draws
        return unsure_images(request, params, levels, error, shift and MARGIN * shift, self.of_draws)

    def __str__(self) -> str:
        if self.error is None:
            return "not measured yet"
        shift = max(self._shifts.values(), default=None)
        steps = "" if shift is None else f", {MARGIN * shift * WIDEST:.1e} in a cumulative probability"
        if self.of_values is not None:
            steps = f", {MARGIN * self.of_values:.1e} in a value that is drawn"
        if self.of_draws:
            steps += f", and {self.of_draws:.1e} of draws in float32"
        return (
            f"{MARGIN * self.error:.1e} in a parameter{steps} (the model's and this output differed by "
            f"{self.error:.1e} at most, of parameters up to {self.scale:.1e})"
        )
