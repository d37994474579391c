"""`accelerate` and `Sampler`: they check arguments, split batches and notice changed models; the backends draw."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.distributions import Distribution
from fastgen.sampling.adapter import Adapter
from fastgen.sampling.backends import Backends
from fastgen.sampling.batches import Batches
from fastgen.sampling.condition import rows_for, rows_for_some, wants_condition
from fastgen.sampling.levels import check_levels, checked_known, checked_levels, dtype_of, image_of, levels_of
from fastgen.sampling.precision import ieee_float32
from fastgen.sampling.request import (
    Draw,
    SampleRequest,
    SampleStats,
    check_noise,
    checked_count,
    checked_distribution,
    tempered_distribution,
    uniforms,
)

BACKENDS = ("auto", "naive", "eager", "compiled", "cuda_graph", "persistent", "fixed_point")
VERIFY = ("auto", "always", "never")
MOST_OPTIONS = 16  # combinations of temperature and so on, kept so that a backend meets the same objects again


def accelerate(
    model: nn.Module,
    shape: Sequence[int],
    *,
    distribution: Distribution,
    encode: Callable[[Tensor], Tensor] | None = None,
    condition: Any = None,
    output: Callable[[Any], Tensor] | None = None,
    backend: str = "auto",
    verify: str = "auto",
) -> "Sampler":
    """Makes an exact sampler of a causal model that computes each activation of the network once per image.

    Args:
        model: any module, model(x (B, C, H, W)[, condition]) -> params (B, ..., H, W). It is analysed as it is: call
            `model.eval()` first. A model that accepts only one batch size is always called with that.
        shape: (C, H, W) of an image; (H, W) of a grid of codes or (T,) of a sequence: x is then (B, H, W) or (B, T),
            params (B, ..., H, W), (B, ..., T), or with the levels last, as the distribution's layout says. Wherever
            (n, C, H, W) is written, (n, H, W) or (n, T) is meant for these.
        distribution: of a pixel given the model's output there: `fastgen.Categorical`, `fastgen.Bernoulli`,
            `fastgen.LogisticMixture`, `fastgen.Gaussian`, `fastgen.Logistic`, `fastgen.GaussianMixture` or an object
            as described in `fastgen.distributions`. Channels of a pixel that do not depend on each other, neither in
            the distribution nor in the model, are drawn together.
        encode: int64 levels (B, C, H, W) -> the model's input. Default: levels as floats of the model's dtype in
            [-1, 1]; 0. and 1. for Bernoulli; real values as they are; int64 levels for a model that takes only
            integers, as one that begins with an embedding does. `fastgen.shift_right(start)` is for models whose
            output at a place describes the next place, as in language models.
        condition: an example of the model's second argument, of its further arguments (a tuple) or of its keyword
            arguments (a dict). `sample` uses it if it is given none. If the model needs a condition and none is given
            here, the model is analysed at the first `sample`. A condition of another shape needs another analysis:
            pad texts of different lengths to one length, and pass the mask that the model has for padding.
        output: what the model returns -> params, for models that return a tuple, a dict or a dataclass.
        backend: "auto", or how to run: "naive" (one forward pass per draw), "fixed_point" (forward passes until no
            level changes), or an engine that computes each activation once: "eager", "compiled", "cuda_graph" or
            "persistent". All give the same images for the same noise.
        verify: when a forward pass of the model over the finished batch verifies the images of an engine, which adds
            up in another order than the model. "always": at least once per batch, and again until no draw differs,
            which guarantees the images of "naive". "auto": only if an error of 1.5 times the largest seen so far could
            have changed a draw, and for the first batch of each size; `explain` states this measured margin. "never":
            no pass. "auto" makes no pass either in half precision, where two passes of the model itself may differ, or
            for real values, which differ in their last bits anyway: `explain` then states 1.5 times the largest
            difference seen, for real values in their own units.

    Raises:
        fastgen.NotCausalError: a parameter depends on a pixel that is drawn later.
        TypeError, ValueError: an argument is wrong, or the model's output does not fit the distribution.
    """
    return Sampler(model, shape, distribution, encode, condition, output, backend, verify)


class Sampler:
    """Draws images of one model. `fastgen.accelerate` makes it and explains its arguments.

    Threads may share a sampler, and samplers may share a model: calls take turns. The model is left as it was,
    including what its forward pass caches from its first batch. Copies and pickles leave out what the next call
    rebuilds.

    Attributes:
        stats: `SampleStats` (backend, passes, redrawn, error, launches, seconds) of the latest `sample`; each call
            makes a new one; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        distribution: Distribution,
        encode: Callable[[Tensor], Tensor] | None,
        condition: Any,
        output: Callable[[Any], Tensor] | None,
        backend: str,
        verify: str,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, value, known in (("backend", backend, BACKENDS), ("verify", verify, VERIFY)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if output is not None and not callable(output):
            raise TypeError(f"output must be callable, got {type(output).__name__}")
        self.model = model
        self._adapter = Adapter(model, shape, distribution, output)
        self.shape = self._adapter.outer
        self.distribution = checked_distribution(distribution, self._adapter.shape)
        check_levels(levels_of(distribution), self.shape)
        if encode is None and levels_of(distribution) is None and not dtype_of(distribution).is_floating_point:
            raise ValueError(
                f"encode must be given for {type(distribution).__name__}: it does not say how many levels there are"
            )
        if encode is not None and not callable(encode):
            raise TypeError(f"encode must be callable, got {type(encode).__name__}")
        self.condition = condition
        self.stats: SampleStats | None = None
        self._options: dict[Any, Distribution] = {}
        self._backends = Backends(self._adapter, encode, backend, verify)
        self._waits = "not analysed since it was copied"
        self._batches = Batches()
        with _turn():
            try:
                first = self._backends.first_pass(condition)
            except Exception as error:
                # A model that wants a condition fails without one, and is analysed when there is one.
                if condition is not None or not wants_condition(model, error):
                    raise
                self._waits = f"not analysed yet, the model fails without a condition: {error}"
            else:
                self._backends.get(condition, dtype_of(distribution), first)

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """The shape of `noise` for n images: (n, U, H, W), or (n, *shape) for a grid or a sequence with one uniform per
        draw."""
        n = checked_count("n", n, 0)
        found = tuple(self.distribution.noise_shape(n, self._adapter.shape))
        plain = len(self.shape) < 3 and found == (n, *self._adapter.shape)
        return (n, *self.shape) if plain else found

    @property
    def work_ratio(self) -> float:
        """Multiply-adds spent on one image over those of one forward pass; 1 is the least.

        Raises RuntimeError where the model needs a condition and has not been given one yet.
        """
        if not self._backends.made:
            raise RuntimeError(self._waits)
        return self._backends.made[-1].backend.work_ratio

    def explain(self) -> str:
        """What runs and why, and what is guaranteed or measured of the images, as text for people."""
        lines = [f"{type(self.model).__name__}, images {self.shape}, {self.distribution}"]
        lines.append(f"backend: {self._backends.choice}")
        with _turn():
            return "\n".join([*lines, self._backends.explain() or self._waits])

    def sample(
        self,
        n: int,
        *,
        seed: int | torch.Generator | None = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        condition: Any = None,
        progress: bool = False,
        return_log_prob: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """Draws n images.

        Args:
            n: number of images; 0 gives an empty tensor.
            seed: an int, the same noise on every device and for every batch_size, or a torch.Generator of any
                device. None: torch's default generator of the model's device.
            noise: instead of a seed, float32 uniforms in [0, 1) of shape `noise_shape(n)`.
            temperature: divides the logits (and multiplies the scales of logistics); 0 takes the mode.
            top_k: only the k most probable levels of a draw.
            top_p: only the fewest most probable levels of a draw that together have this probability.
            known: integer levels, broadcastable to (n, C, H, W); read where known_mask is True.
            known_mask: bool, broadcastable to (n, C, H, W), True where the level in `known` is kept.
            condition: what the model is conditioned on: any pytree whose tensors, or NumPy arrays, have one row an
                image, or one for all; an int is one class for all. None: the condition given to `accelerate`.
            progress: whether to show a bar.
            return_log_prob: whether to return the log-likelihoods, too.
            batch_size: most images at once. None: as many as run well together, or half as many where memory
                runs out, and so on.

        Returns:
            int64 levels (n, C, H, W) on the model's device, or real values of the distribution's dtype; with
            return_log_prob, and (n,) float64 nats: of the whole images, known pixels included, under the model as it
            is (temperature 1).

        Raises:
            TypeError, ValueError: an argument is wrong.
            FloatingPointError: the model's output at a draw was NaN.
        """
        start = time.perf_counter()
        n = checked_count("n", n, 0)
        if batch_size is not None:
            batch_size = checked_count("batch_size", batch_size, 1)
        device = self._backends.device
        if noise is None:
            noise = uniforms(self.noise_shape(n), seed, device)
        elif seed is not None:
            raise ValueError(f"seed and noise exclude each other, got seed={seed!r} and a noise tensor")
        else:
            check_noise(noise, self.noise_shape(n))
        dtype = dtype_of(self.distribution)
        known, known_mask = checked_known(
            known, known_mask, (n, *self.shape), levels_of(self.distribution), device, dtype
        )
        condition = rows_for(self.condition if condition is None else condition, n, device)
        inward, shape = self._adapter.inward, self._adapter.shape
        with _turn():
            distribution = self._tempered(temperature, top_k, top_p)
            if n == 0:
                self.stats = SampleStats(self._backends.made[-1].backend.name if self._backends.made else "none")
                nothing = torch.empty((0, *self.shape), dtype=dtype, device=device)
                return (nothing, torch.empty(0, dtype=torch.float64, device=device)) if return_log_prob else nothing
            backend = self._backends.get(condition, dtype)
            known, known_mask = (None if one is None else inward(one) for one in (known, known_mask))
            noise = inward(noise.to(device))
            whole = SampleRequest(n, shape, noise, distribution, known, known_mask, condition, return_log_prob)
            whole = replace(whole, dtype=dtype)
            self.stats = stats = SampleStats(backend.name)
            parts = self._batches.run(backend, whole, batch_size, progress, partial(self._backends.calling, backend))
            for part in parts:
                stats.add(part)
            levels = self._adapter.outward(torch.cat([part.levels for part in parts]))
            stats.seconds = time.perf_counter() - start
        if not return_log_prob:
            return levels
        return levels, torch.cat([part.log_prob for part in parts if part.log_prob is not None])

    def decode(self, draw: Draw, n: int, *, condition: Any = None, dtype: torch.dtype = torch.long) -> Tensor:
        """Fills n images with levels that come from outside, for instance from an entropy decoder.

        Each place is asked for once, in the drawing order, and sees what was given for all before it. A schedule
        (every backend but "naive" and "fixed_point") makes no whole pass of the model.

        Args:
            draw: draw(params, place) -> the levels there, (n,), or (n, C) where all channels of a pixel come at once
                (for C = 1 either). params (n, ...) is the model's output at the pixel; place is (channel, row,
                column), and the channel None where all come at once.
            n: number of images.
            condition: as in `sample`.
            dtype: of the levels. A floating-point type gives the model real values as they are, without `encode`.

        Returns:
            What was drawn, (n, C, H, W) of that dtype.

        Raises:
            TypeError, ValueError: an argument is wrong, or what `draw` returned.
        """
        n = checked_count("n", n, 0)
        if not callable(draw):
            raise TypeError(f"draw must be callable, got {type(draw).__name__}")
        if not isinstance(dtype, torch.dtype) or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"dtype must be an integer or a floating-point type, got {dtype!r}")
        count = levels_of(self.distribution)
        if (
            count is not None
            and not dtype.is_floating_point
            and torch.iinfo(dtype).max < int(torch.as_tensor(count).max()) - 1
        ):
            raise ValueError(f"dtype must hold the levels of {self.distribution}, got {dtype}")
        return self._adapter.outward(self._decode(draw, n, condition, dtype)[0])

    def params(self, levels: Tensor, *, condition: Any = None) -> Tensor:
        """The model's output for given images as `decode` sees it: bit for bit, on the same machine, by the same
        backend, for the same number of images.

        Args:
            levels: (n, C, H, W), integer levels, or real values as they are.
            condition: as in `sample`.

        Returns:
            (n, ..., H, W)
        """
        levels = self._adapter.inward(checked_levels("levels", levels, self.shape, levels_of(self.distribution)))
        return self._adapter.params(self._decode(image_of(levels), len(levels), condition, levels.dtype)[1])

    def _decode(self, draw: Draw, n: int, condition: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        condition = rows_for_some(self.condition if condition is None else condition, n, self._backends.device)
        held = dtype if dtype.is_floating_point else torch.long
        with _turn():
            backend = self._backends.get(condition, held)
            shape = self._adapter.shape
            blank = torch.empty((max(n, 1), 0, *shape[1:]), device=self._backends.device)
            request = SampleRequest(
                len(blank), shape, blank, self._backends.distribution, condition=condition, dtype=held
            )
            zeros = torch.zeros(1, shape[0], dtype=held)  # one image tells the shapes of none
            asked = draw if n else lambda _, place: zeros if place[0] is None else zeros[:, 0]
            with self._backends.calling(backend):
                levels, params = backend.decode(asked, request)
        return levels[:n].to(dtype), params[:n]

    def _tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> Distribution:
        key = (temperature, top_k, top_p)
        if key not in self._options:
            found = tempered_distribution(self._backends.distribution, *key)
            if len(self._options) >= MOST_OPTIONS:
                self._options.pop(next(iter(self._options)))
            self._options[key] = found
        return self._options[key]


@contextmanager
def _turn() -> Iterator[None]:
    """Lets in one thread at a time, with float32 products in IEEE arithmetic and without autograd. Tensors that are
    kept must not be inference tensors."""
    with ieee_float32(), torch.inference_mode(False), torch.no_grad():
        yield
