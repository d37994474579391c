"""`accelerate` and the `Sampler` it returns: arguments, chunks, changed parameters; the drawing is the backends'."""

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.distributions import Bernoulli, Distribution
from fastgen.sampling.causality.drawing_order import drawing_order
from fastgen.sampling.causality.report import Order
from fastgen.sampling.draws import draw_image
from fastgen.sampling.model_state import Snapshot, unchanged
from fastgen.sampling.request import (
    Backend,
    SampleRequest,
    SampleResult,
    check_noise,
    checked_count,
    checked_distribution,
    checked_known,
    checked_shape,
    example,
    kind,
    levels_of,
    rows_between,
    rows_for,
    tempered_distribution,
    uniforms,
)
from fastgen.sampling.run.engine import build_engine
from fastgen.sampling.trace.graph import Unsupported
from fastgen.sampling.whole_pass import FixedPoint, Naive, whole_pass

BACKENDS = ("auto", "naive", "eager", "compiled", "cuda_graph", "persistent", "fixed_point")
WHOLE_PASSES = ("naive", "fixed_point")


def accelerate(
    model: nn.Module,
    shape: Sequence[int],
    *,
    distribution: Distribution,
    encode: Callable[[Tensor], Tensor] | None = None,
    condition: Any = None,
    backend: str = "auto",
) -> "Sampler":
    """An exact sampler of any causal model that computes every activation of the network once an image.

    Args:
        model: any module, model(x (B, C, H, W)[, condition]) -> params (B, ..., H, W). Analysed as it is: call
            `model.eval()` first.
        shape: (C, H, W) of an image.
        distribution: of a pixel given the model's output there: `fastgen.Categorical`, `fastgen.Bernoulli`,
            `fastgen.LogisticMixture` or an object as described in `fastgen.distributions`.
        encode: int64 levels (B, C, H, W) -> the model's input. Default: levels as floats of the model's dtype in
            [-1, 1], and for Bernoulli 0. and 1.
        condition: an example of the model's second argument, and what `sample` takes where it is given none. Where
            the model needs one and there is none here, it is analysed at the first `sample`.
        backend: "auto", or how to run: "naive" (a whole forward pass a draw), "fixed_point" (whole passes until
            nothing changes), or the schedule that computes each activation once, "eager", "compiled", "cuda_graph" or
            "persistent". All give the same images for the same noise.

    Raises:
        fastgen.NotCausalError: a parameter depends on a pixel that is drawn later.
        TypeError, ValueError: an argument is wrong, or the model's output does not fit the distribution.
    """
    return Sampler(model, shape, distribution, encode, condition, backend)


class Sampler:
    """Draws images of one model; made by `fastgen.accelerate`, where the arguments are explained."""

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        distribution: Distribution,
        encode: Callable[[Tensor], Tensor] | None,
        condition: Any,
        backend: str,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.model = model
        self.shape = checked_shape(shape)
        self.distribution = checked_distribution(distribution, self.shape)
        if encode is None and levels_of(distribution) is None:
            raise ValueError(
                f"encode must be given for {type(distribution).__name__}: it does not say how many levels there are"
            )
        if encode is not None and not callable(encode):
            raise TypeError(f"encode must be callable, got {type(encode).__name__}")
        self.custom_encode = encode
        self.condition = condition
        self.backend = backend
        self._engine: Backend | None = None
        self._snapshot: Snapshot | None = None
        self._remark: str | None = None
        self._built_for: Any = None
        self._waits = ""
        self._most: int | None = None
        self._volatile: set[str] = set()  # attributes that the forward pass writes
        try:
            params = self._blank_pass(condition)
        except Exception as error:
            # A model that wants a condition fails without one, and is analysed when there is one.
            if condition is not None or not _wants_condition(model, error):
                raise
            self._waits = f"not analysed yet, the model fails without a condition: {error}"
        else:
            self._engine = self._build(params, condition)

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """The shape of `noise` for n images, (n, U, H, W)."""
        return tuple(self.distribution.noise_shape(checked_count("n", n, 0), self.shape))

    @property
    def work_ratio(self) -> float:
        """Multiply-adds spent on one image over those of one forward pass; 1 is the least.

        Raises RuntimeError where the model needs a condition and has not been given one yet.
        """
        if self._engine is None:
            raise RuntimeError(self._waits)
        return self._engine.work_ratio

    def explain(self) -> str:
        """What runs and why, as text for people."""
        lines = [f"{type(self.model).__name__}, images {self.shape}, {self.distribution}", f"backend: {self.backend}"]
        if self._remark is not None:
            lines.append(self._remark)
        return "\n".join([*lines, self._waits if self._engine is None else self._engine.explain()])

    @torch.no_grad()
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
            condition: what the model is conditioned on: any pytree whose tensors have one row an image, or one for
                all; an int is one class for all. None: the condition given to `accelerate`.
            progress: whether to show a bar.
            return_log_prob: whether to return the log-likelihoods, too.
            batch_size: most images at once. None: as many as run well together, or half as many where memory
                runs out, and so on.

        Returns:
            int64 levels (n, C, H, W) on the model's device; with return_log_prob, and (n,) float64 nats: of the
            whole images, known pixels included, under the model as it is (temperature 1).

        Raises:
            TypeError, ValueError: an argument is wrong.
            FloatingPointError: the model's output at a draw was NaN.
        """
        n = checked_count("n", n, 0)
        if batch_size is not None:
            batch_size = checked_count("batch_size", batch_size, 1)
        device = self._device()
        distribution = tempered_distribution(self.distribution, temperature, top_k, top_p)
        if noise is None:
            noise = uniforms(self.noise_shape(n), seed, device)
        elif seed is not None:
            raise ValueError(f"seed and noise exclude each other, got seed={seed!r} and a noise tensor")
        else:
            check_noise(noise, self.noise_shape(n))
        known, known_mask = checked_known(known, known_mask, (n, *self.shape), levels_of(self.distribution), device)
        if condition is None:
            condition = self.condition
        if n == 0:
            nothing = torch.empty((0, *self.shape), dtype=torch.long, device=device)
            return (nothing, torch.empty(0, dtype=torch.float64, device=device)) if return_log_prob else nothing
        condition = rows_for(condition, n, device)
        engine = self._engine
        if engine is None or self._is_stale(condition):
            self._engine = None  # its memory is free before the next is made
            self._engine = engine = self._build(self._blank_pass(condition), condition)
        whole = SampleRequest(
            n, self.shape, noise.to(device), distribution, known, known_mask, condition, return_log_prob
        )
        parts = self._run(engine, whole, batch_size, progress)
        levels = torch.cat([part.levels for part in parts])
        if not return_log_prob:
            return levels
        return levels, torch.cat([part.log_prob for part in parts if part.log_prob is not None])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what is made again at the next `sample`."""
        made = {"_engine": None, "_snapshot": None, "_built_for": None, "_waits": "not analysed since it was copied"}
        return self.__dict__ | made

    def _run(self, engine: Backend, whole: SampleRequest, batch_size: int | None, progress: bool) -> list[SampleResult]:
        from tqdm.auto import tqdm

        draws = self.shape[0] * self.shape[1] * self.shape[2]
        parts: list[SampleResult] = []
        start, most = 0, min(size for size in (whole.n, batch_size, self._most, engine.most) if size is not None)
        most = -(-whole.n // -(-whole.n // most))  # parts of about one size
        with tqdm(total=whole.n * draws, unit="draw", disable=not progress) as bar:

            def advance(images: int, done: int) -> None:
                bar.update(images * done)

            while start < whole.n:
                stop = min(start + most, whole.n)
                size = stop - start
                try:
                    part = engine.run(_part(whole, start, stop, partial(advance, size)))
                except RuntimeError as error:
                    if size == 1 or not _is_out_of_memory(error):
                        raise
                else:
                    if bool(part.bad):
                        raise FloatingPointError("the model's output is NaN at a pixel that was to be drawn")
                    parts.append(part)
                    start = stop
                    continue
                # Out of the handler, whose traceback would keep the memory of the failed batch.
                self._most = most = size // 2
                bar.update(start * draws - bar.n)
                torch.cuda.empty_cache()
        return parts

    def _blank_pass(self, condition: Any) -> Tensor:
        """The model's output for two blank images. Whatever does not fit together fails here, with a plain error."""
        device = self._device()
        levels = torch.zeros((2, *self.shape), dtype=torch.long, device=device)
        with torch.no_grad(), unchanged(self.model) as state:
            params = whole_pass(self.model, self._encode(), levels, example(condition, device))
        self._volatile |= state.touched
        return params

    def _is_stale(self, condition: Any) -> bool:
        """Whether the engine was made for another state of the model, or another kind of condition."""
        return self._snapshot is None or self._built_for != kind(condition) or self._snapshot.differs(self.model)

    def _build(self, params: Tensor, condition: Any) -> Backend:
        """Makes the engine, and remembers what it is made for. `params` is the output of `_blank_pass`."""
        check_params = getattr(self.distribution, "check_params", None)
        if check_params is not None:
            check_params(params[..., 0, 0], self.shape[0])
        blank = torch.zeros(self.noise_shape(2), device=params.device)
        draw_image(SampleRequest(2, self.shape, blank, self.distribution), params)
        encode, condition = self._encode(), example(condition, self._device())
        engine = self._make(encode, condition)
        self._snapshot, self._built_for = Snapshot(self.model, self._volatile), kind(condition)
        return engine

    def _make(self, encode: Callable[[Tensor], Tensor], condition: Any) -> Backend:
        given = (self.model, self.shape, self.distribution, encode, condition)
        order: Order | None = None
        self._remark = None
        try:
            if self.backend not in WHOLE_PASSES:
                return build_engine(*given, self.backend)
            order = drawing_order(*given, levels_of(self.distribution) or 2)
        except Unsupported as reason:
            if self.backend in WHOLE_PASSES:
                self._remark = f"taken as causal, which could not be checked: {reason}"
            else:
                self._remark = f"fallback: fixed_point, because {reason}"
                warnings.warn(f"sampling falls back to the fixed_point backend: {reason}", stacklevel=5)
        if self.backend == "naive":
            return Naive(self.model, self.shape, encode, order)
        return FixedPoint(self.model, self.shape, encode)

    def _device(self) -> torch.device:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    def _encode(self) -> Callable[[Tensor], Tensor]:
        if self.custom_encode is not None:
            return self.custom_encode
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        levels = None if isinstance(self.distribution, Bernoulli) else levels_of(self.distribution)
        return partial(_encode_levels, levels=levels, dtype=dtype)


def _part(whole: SampleRequest, start: int, stop: int, progress: Callable[[int], Any]) -> SampleRequest:
    """Images start..stop-1 of a job."""
    return SampleRequest(
        stop - start,
        whole.shape,
        whole.noise[start:stop],
        whole.distribution,
        None if whole.known is None else whole.known[start:stop],
        None if whole.known_mask is None else whole.known_mask[start:stop],
        rows_between(whole.condition, start, stop),
        whole.return_log_prob,
        progress,
    )


def _encode_levels(x: Tensor, levels: int | None, dtype: torch.dtype) -> Tensor:
    """Levels as floats: in [-1, 1], or as they are where `levels` is None."""
    x = x.to(dtype)
    return x if levels is None else x / (levels - 1) * 2 - 1


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _wants_condition(model: nn.Module, error: Exception) -> bool:
    """Whether `error`, raised by a call without a condition, may come from that: the model's forward has a second
    argument, and cannot do without it, or the error speaks of it or of None."""
    try:
        arguments = [
            one for one in inspect.signature(model.forward).parameters.values() if one.kind != one.KEYWORD_ONLY
        ]
    except ValueError:
        return False
    if len(arguments) < 2 or arguments[1].kind == arguments[1].VAR_KEYWORD:
        return False
    second = arguments[1]
    return second.default is second.empty or re.search(rf"\b{second.name}\b|None", str(error)) is not None
