"""The base class of the autoregressive image models."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen import ops
from fastgen.distributions import Categorical, Distribution
from fastgen.models.arguments import as_floats, check_condition, check_levels, check_shape
from fastgen.models.rebuildable import Rebuildable

if TYPE_CHECKING:
    from fastgen.sampling import Sampler


class AutoregressiveModel(Rebuildable):
    """Base class of models p(x) = prod_i p(x_i | x_<i), with the pixels in raster order and the colours R, G, B of a
    pixel in this order. Likelihoods and samples are exact.

    A subclass makes its layers and defines `forward(x, condition=None) -> params`, which calls `self.encode(x)`.

    Args:
        shape: (C, H, W) of an image.
        levels: number of levels of a channel.
        distribution: distribution of a pixel given `params` at the pixel.
        n_classes: number of classes of a conditional model, None for an unconditional one.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int,
        distribution: Distribution,
        n_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_shape(shape)
        self.shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self.levels = levels
        self.distribution = distribution
        self.n_classes = n_classes
        # At most one sampler. It is in a list, so that adding it does not look like a change of the model's attributes,
        # which a sampler watches.
        self._samplers: list[Any] = []

    def encode(self, x: Tensor) -> Tensor:
        """Converts integer levels (B, C, H, W) to floats in [-1, 1]. A float tensor counts as converted already.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x is not (B, *shape).
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of levels, got {type(x).__name__}")
        dtype = x.dtype if x.is_floating_point() else next(self.parameters()).dtype
        return as_floats(x, self.shape, self.levels, dtype)

    def check_condition(self, condition: Tensor | None) -> None:
        """Raises ValueError or TypeError if classes are missing, wrong, or given to an unconditional model."""
        check_condition(condition, self.n_classes)

    def log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Log-likelihood of integer levels x (B, C, H, W) given classes (B,): (B,) nats.

        Raises:
            TypeError: x or condition is not a tensor of integers.
            ValueError: x or condition has another shape or range, or condition is missing or superfluous.
        """
        self._check(x, condition)
        return self.distribution.log_prob(self(x, condition), x.long())

    def loss(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The mean of -log p(x) over the batch, () nats, for training. Computed in float32 or float64, by a fused
        kernel on a GPU. Raises as `log_prob`."""
        self._check(x, condition)
        params = self(x, condition)
        if isinstance(self.distribution, Categorical):
            return ops.reconstruction_nll(self.distribution.logits(params), x, "categorical").mean()
        return ops.reconstruction_nll(params, x, "logistic_mixture").mean()

    def _check(self, x: Tensor, condition: Tensor | None) -> None:
        check_levels(x, self.levels)
        check_condition(condition, self.n_classes)
        if condition is not None and x.dim() == 4 and tuple(condition.shape) not in ((len(x),), (1,)):
            raise ValueError(f"condition must hold {len(x)} classes, one an image, got {tuple(condition.shape)}")

    @torch.no_grad()
    def sample(self, n: int, **options: Any) -> Tensor:
        """Draws n images; returns int64 levels (n, C, H, W). Options and errors as in
        `fastgen.sampling.Sampler.sample`."""
        return self.sampler(options.get("condition")).sample(n, **options)

    def sampler(self, condition: Any = None) -> "Sampler":
        """The sampler of this model, made by `fastgen.accelerate` at the first call.

        Args:
            condition: an example of the classes of a class-conditional model: a tensor of classes, or one class.

        Raises:
            TypeError, ValueError: as `log_prob` for classes; ValueError also if the model is in training mode.
        """
        from fastgen.sampling import accelerate

        if self.training:
            raise ValueError("model is in training mode (dropout is on): call model.eval() before sampling")
        check_condition(condition, self.n_classes)
        if isinstance(condition, int):
            condition = torch.tensor([condition])
        if not self._samplers:
            self._samplers.append(accelerate(self, self.shape, distribution=self.distribution, condition=condition))
        return self._samplers[0]
