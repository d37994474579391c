"""Models of other shapes as models of images: everything behind this sees x (B, C, H, W) -> params (B, ..., H, W).

A sequence of T tokens is an image of one row, (1, 1, T), a grid of codes one of one channel, (1, H, W). For instance a
language model tokens (B, T) -> logits (B, T, K) is given levels[:, 0, 0], and gives its logits as (B, K, 1, T).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.distributions import Categorical
from fastgen.sampling.condition import copied, rows_of
from fastgen.sampling.request import checked_sizes

BATCHES = (1, *range(3, 17), 20, 24, 25, 32, 48, 50, 64, 100, 128, 256)


class Adapter(nn.Module):
    """model(x[, condition]) with the output of a model of images, with the modules and parameters of the model itself.

    Args:
        model: the user's. A condition that is a tuple is its further arguments, a dict its keyword arguments, anything
            else its second argument.
        shape: (C, H, W), (H, W) or (T,).
        distribution: of what is drawn. Where its layout has K last, the output is (B, T, K) or (B, H, W, K).
        output: what the model returns -> params; None where it returns these.

    Attributes:
        outer: the shape as the user has it.
        shape: (C, H, W), of what is drawn.
        distribution: for params as they are inside, (n, ..., H, W).
        batch: the one number of images that the model takes; None: it takes any.
        begin_anew: called when a pass has failed; whether it is worth another try.
    """

    model: nn.Module
    begin_anew: Callable[[], bool] | None = None

    def __init__(
        self, model: nn.Module, shape: Sequence[int], distribution: Any, output: Callable[[Any], Any] | None
    ) -> None:
        super().__init__()
        self.__dict__["model"] = model  # no submodule: names are those of the model itself
        self.outer = checked_sizes(shape)
        channels, height, width = (1,) * (3 - len(self.outer)) + self.outer
        self.shape = (channels, height, width)
        self.output = output
        layout = getattr(distribution, "layout", None)
        self.batch: int | None = None
        self.levels_last = layout in ("BTK", "BHWK")
        sizes = {"BTK": 1, "BKT": 1, "BHWK": 2}.get(layout or "", len(self.outer))
        if sizes != len(self.outer) and not (layout == "BHWK" and self.outer[0] == 1):
            raise ValueError(f"layout {layout} does not fit shape={self.outer}")
        if len(self.outer) == 1 and layout is not None and not layout.endswith(("T", "TK")):
            raise ValueError(f"layout must be 'BTK' or 'BKT' for shape={self.outer}, got {layout!r}")

        if isinstance(distribution, Categorical) and layout in ("BTK", "BKT", "BHWK"):
            distribution = replace(distribution, layout="B(KC)HW")
        self.distribution = distribution

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Those of the model, from which parameters and buffers follow."""
        return self.model.named_modules(*args, **kwargs)

    def forward(self, x: Tensor, condition: Any = None) -> Any:
        try:
            return self._batches(x, condition)
        except Exception:
            if self.begin_anew is None or not self.begin_anew():
                raise
            return self._batches(x, condition)

    def _batches(self, x: Tensor, condition: Any) -> Any:
        if self.batch is None:
            return self._params(x, condition)
        parts = []
        for start in range(0, len(x), self.batch):
            # Constants fill a batch: of all its images, a trace then follows those that are asked for.
            filled = torch.cat((x[start : start + self.batch], x.new_zeros((self.batch, *x.shape[1:]))))[: self.batch]
            rows = torch.arange(start, start + self.batch, device=x.device).clamp(max=len(x) - 1)
            found = self._params(filled, rows_of(condition, rows))
            if not isinstance(found, Tensor):
                return found
            parts.append(found)
        return torch.cat(parts)[: len(x)]

    def _params(self, x: Tensor, condition: Any) -> Any:
        condition = copied(condition)
        if condition is None:
            found = self.model(x)
        elif type(condition) is tuple:
            found = self.model(x, *condition)
        elif type(condition) is dict:
            found = self.model(x, **condition)
        else:
            found = self.model(x, condition)
        if self.output is not None:
            found = self.output(found)
        if not isinstance(found, Tensor):
            return found
        if len(self.outer) < 3 and len(x) > 1:  # some models squeeze a batch of one
            self._check_places(found)
        if self.levels_last:
            found = found.movedim(-1, 1)
        if len(self.outer) == 1:
            found = found.unsqueeze(-2)
        found = found.unsqueeze(1) if len(self.outer) < 3 and found.dim() == 3 else found
        if isinstance(self.distribution, Categorical) and found.shape[-2:] == self.shape[1:]:
            layout, levels = self.distribution.layout, self.distribution.levels
            if layout in ("BKCHW", "BCKHW") and self.shape[0] == 1 and found.shape[1:-2] == (levels,):
                found = found.unsqueeze(layout.index("C"))  # models of one channel leave its axis out
            found = self.distribution.restricted(found, self.shape)
        return found

    def _check_places(self, params: Tensor) -> None:
        """Raises ValueError where the model's output for a sequence or a grid has not one place for each of it."""
        places = params.shape[-1 - len(self.outer) : -1] if self.levels_last else params.shape[-len(self.outer) :]
        if tuple(places) != self.outer:
            names = ", ".join(("T",) if len(self.outer) == 1 else ("H", "W"))
            expected = f"(n, {names}, K)" if self.levels_last else f"(n, ..., {names})"
            raise ValueError(
                f"model must return parameters {expected} for shape={self.outer}, one for each place of the input, got "
                f"the shape {tuple(params.shape)}"
            )

    def inward(self, levels: Tensor) -> Tensor:
        """Levels or noise of a user's shape, or (n, ..., H, W) already, as that."""
        return levels if levels.dim() == 4 else levels.reshape(len(levels), 1, *self.shape[1:])

    def outward(self, levels: Tensor) -> Tensor:
        """Levels (n, C, H, W) in the user's shape, as `encode` takes them."""
        return levels if len(self.outer) == 3 else levels.reshape(len(levels), *self.outer)

    def params(self, params: Tensor) -> Tensor:
        """Params (n, ..., H, W) as the model itself has them, but for an axis of one channel."""
        if len(self.outer) == 1:
            params = params.squeeze(-2)
        return params.movedim(1, -1) if self.levels_last else params

    def find_batch(self, run: Callable[[], Any]) -> Any:
        """Sets `batch` to the one size that the model takes, where it does not take two images; what `run`, a pass of
        two images, returns then. None: it fails at each size."""
        for self.batch in BATCHES:
            with suppress(Exception):
                return run()
        self.batch = None
        return None


class _Casts(TorchDispatchMode):
    """Notes whether a floating-point tensor of one size is cast to integers."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].numel() == self.numel:
            self.found = self.found or (args[0].is_floating_point() and not made.dtype.is_floating_point)
        return made


def casts_to_integers(run: Callable[[Tensor], Any], floats: Tensor) -> bool:
    """Whether a model casts its input to integers, or fails on floats: as one that begins with an embedding does."""
    with _Casts(floats.numel()) as casts:
        try:
            run(floats)
        except Exception:
            return True
    return casts.found
