"""Sampling by fixed-point iteration on the noise: exact, in few whole forward passes for many models.

For fixed noise the image is the one that its own draws give back: x = draw(model(x), noise). Starting anywhere, each
pass makes at least one further draw final, in whatever order the model is causal, and an image that a pass does not
change is the only such image (Song et al. 2021, "Accelerating Feedforward Computation via Parallel Nonlinear Equation
Solving"; Wiggers & Hoogeboom 2020, "Predictive Sampling with Forecasting Autoregressive Models").
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgen.sampling.draw import draw_image, image_log_prob
from fastgen.sampling.job import Drawn, Job
from fastgen.sampling.naive import first_levels, whole_pass


class FixedPoint:
    """All pixels of all images are drawn after every pass, until no level changes. The order of pixels is nowhere used.

    The batch stays whole to the end: the output for an image could otherwise be rounded in another way.

    Args:
        model: called as model(encode(levels)[, condition]), as it is.
        shape: (C, H, W).
        encode: levels (n, C, H, W) int64 -> the model's input.
    """

    most: int | None = None

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], encode: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.encode = encode
        self.draws = shape[0] * shape[1] * shape[2]
        self.passes: int | None = None

    @property
    def work_ratio(self) -> float:
        """Passes of the last batch; before the first, the most that it can take."""
        return float(self.draws + 1 if self.passes is None else self.passes)

    def explain(self) -> str:
        last = "" if self.passes is None else f"; {self.passes} for the last batch"
        return f"whole forward passes until the image no longer changes, {self.draws + 1} at most{last}"

    @torch.no_grad()
    def run(self, job: Job) -> Drawn:
        """Raises RuntimeError where the images do not settle, so that the model cannot be causal."""
        levels = first_levels(job)
        reported = 0
        for passes in range(1, self.draws + 2):
            params = whole_pass(self.model, self.encode, levels, job.condition)
            before = levels
            levels, bad = draw_image(job, params)
            changed = (levels != before).any(0).movedim(0, -1).flatten().nonzero()
            settled = self.draws if len(changed) == 0 else int(changed[0])
            if job.progress is not None and settled > reported:
                job.progress(settled - reported)
                reported = settled
            if settled == self.draws:
                self.passes = passes
                log_prob = image_log_prob(job.distribution, params, levels) if job.return_log_prob else None
                return Drawn(levels, log_prob, bad, passes)
        raise RuntimeError(
            f"the images still change after {self.draws + 1} passes, more than a causal model can take: it depends on "
            "pixels not drawn yet, or on chance (dropout or a normalization in training mode: call model.eval())"
        )
