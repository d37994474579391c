"""Takes a condition and a dtype of levels; gives the backend that draws for them, made when it is first asked for, made
again when the model has changed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.distributions import Bernoulli, Distribution
from fastgen.sampling.adapter import Adapter, casts_to_integers
from fastgen.sampling.causality.drawing_order import NotByReadyTimes, ordered
from fastgen.sampling.causality.draws import Order
from fastgen.sampling.condition import example, kind, wants_condition
from fastgen.sampling.draws import draw_image
from fastgen.sampling.levels import dtype_of, known_levels, levels_of
from fastgen.sampling.model_state import ModelState, device_of
from fastgen.sampling.request import Backend, SampleRequest, tell
from fastgen.sampling.run.engine import Engine, build_engine
from fastgen.sampling.trace.graph import Unsupported
from fastgen.sampling.trace.network import Network, sample_images
from fastgen.sampling.whole_pass import FixedPoint, Naive, places_of, whole_pass

WHOLE_PASSES = ("naive", "fixed_point")
First = tuple[Tensor, bool]  # the output for two images; whether they are the first two of `sample_images`, or blank
MOST_KINDS = 8  # of conditions (prompts of another length, for instance) that have a backend each


@dataclass
class Made:
    """A backend, what it was made for, and what to tell people about it."""

    key: Any
    backend: Backend
    remark: str | None


class Backends:
    """The backends of one model, the latest last: one for each kind of condition and each dtype of the levels.

    Args:
        model: which says of what shape its images are, and what they are drawn from.
        encode: as in `accelerate`.
        choice: the `backend` of `accelerate`.
        verify: as in `accelerate`.
    """

    def __init__(
        self,
        model: Adapter,
        encode: Callable[[Tensor], Tensor] | None,
        choice: str,
        verify: str,
    ) -> None:
        self.model = model
        self.shape = model.shape
        self.distribution: Distribution = model.distribution
        self.custom_encode = encode
        self.integers = False  # whether the model takes levels as they are
        self.choice = choice
        self.verify = verify
        self.made: list[Made] = []
        self._state: ModelState | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"made": [], "_state": None}

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The model may be called inside, and is afterwards as it was. After `get` or `first_pass`."""
        assert self._state is not None
        with self._state.kept():
            self.model.begin_anew = self._state.begin_anew
            try:
                yield
            finally:
                self.model.begin_anew = None

    def calling(self, backend: Backend) -> AbstractContextManager[Any]:
        """`kept` around a backend that calls the model again and again; an engine does so where it calls the model."""
        return nullcontext() if isinstance(backend, Engine) else self.kept()

    def get(self, condition: Any, dtype: torch.dtype = torch.long, first: First | None = None) -> Backend:
        """The backend for this kind of condition, and the model as it now is. `first`: of `first_pass`."""
        self._notice_changes()
        # Under autocast the model is another function: its own passes must meet what the engine was made from.
        device = self.device
        condition = example(condition, device)
        cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = (kind(condition), dtype, cast)
        made = next((made for made in self.made if made.key == key), None)
        if made is None:
            if first is None and dtype == dtype_of(self.distribution):
                first = self.first_pass(condition)
            made = self._make(key, condition, dtype, first)
        self.made = [one for one in self.made if one is not made][1 - MOST_KINDS :] + [made]
        return made.backend

    def first_pass(self, condition: Any) -> First:
        """The model's output for two images. Whatever does not fit together fails here, with a plain error.

        It is found out here whether the model takes one number of images only, and, without an `encode`, whether it
        takes integers, as one of tokens does.
        """
        self._notice_changes()
        condition = example(condition, self.device)
        try:
            return self._of_two(condition)
        except Exception as error:
            waits = condition is None and wants_condition(self.model.model, error)
            if self.model.batch is not None or waits or self._takes_two(condition):
                raise
            found = self.model.find_batch(partial(self._of_two, condition))
            if found is None:
                raise
            return found

    def _takes_two(self, condition: Any) -> bool:
        """Whether the model runs on two images, whatever it returns."""
        dtype = dtype_of(self.distribution)
        levels = torch.zeros((2, *self.shape), dtype=dtype, device=self.device)
        for self.integers in (True, False):
            with suppress(Exception), self.kept():
                self.model(self._encode(dtype)(levels), condition)
                return True
        return False

    def _of_two(self, condition: Any) -> First:
        dtype = dtype_of(self.distribution)
        levels = torch.zeros((2, *self.shape), dtype=dtype, device=self.device)
        samples = sample_images(self.model, self.shape, self._levels(dtype))[:2]

        def passed(integers: bool) -> First:
            self.integers = integers
            with suppress(Exception), self.kept():
                return whole_pass(self.model, self._encode(dtype), samples, condition), True
            with self.kept():  # no place has fewer levels than one
                return whole_pass(self.model, self._encode(dtype), levels, condition), False

        if self.custom_encode is not None or dtype.is_floating_point:
            return passed(False)
        integers = False
        if len(self.model.outer) < 3:  # tokens or codes, perhaps; a model that casts floats to them does not fail
            with self.kept():
                call = self.model if condition is None else partial(self.model, condition=condition)
                integers = casts_to_integers(call, _scaled(self.model.outward(levels), 3, self._dtype))
        errors: list[Exception] = []
        for one in (integers, not integers):
            try:
                return passed(one)
            except Exception as error:
                errors.append(error)
        self.integers = False
        # Of a model that takes the other type, torch says so by a RuntimeError, which is not what is wrong.
        raise min(errors[::-1] if integers else errors, key=lambda error: isinstance(error, RuntimeError))

    def explain(self) -> str:
        """About the latest backend; nothing where there is none."""
        if not self.made:
            return ""
        made = self.made[-1]
        backend: Any = made.backend
        unmeasured = isinstance(backend, Engine) and not backend.decidable and backend.margin.error is None
        if unmeasured and self._state is not None and self._state.change() == "nothing":
            backend.measure()
        alone = f"the model takes {self.model.batch} images at a time, no other number" if self.model.batch else None
        return "\n".join([*(one for one in (made.remark, alone) if one), backend.explain()])

    def _notice_changes(self) -> None:
        if self._state is None:
            self._state = ModelState(self.model)
            return
        change = self._state.change()
        if change != "nothing":
            self._state = ModelState(self.model, self._state)
            if change == "structure" or not all(made.backend.takes_weights() for made in self.made):
                self.made.clear()

    def _make(self, key: Any, condition: Any, dtype: torch.dtype, first: First | None) -> Made:
        encode = self._encode(dtype)
        params = None
        if first is not None:
            params, sampled = first
            check_params = getattr(self.distribution, "check_params", None)
            if check_params is not None:
                check_params(params[..., 0, 0], self.shape[0])
            size = self.distribution.noise_shape(2, self.shape)
            noise = torch.zeros(size, dtype=torch.float32, device=params.device)
            draw_image(SampleRequest(2, self.shape, noise, self.distribution, dtype=dtype), params)
            params = params if sampled else None
        order: Order | None = None
        remark = None
        try:
            network = Network(self.model, self.shape, encode, condition, self._levels(dtype), self.kept, params)
            if self.choice not in WHOLE_PASSES:
                return Made(key, build_engine(network, self.distribution, self.choice, self.verify), None)
            order = ordered(network, self.distribution).draws.order
        except Unsupported as reason:
            order, remark = (reason.order, str(reason)) if isinstance(reason, NotByReadyTimes) else (None, None)
            if self.choice not in WHOLE_PASSES:
                remark = f"fallback: fixed_point, because {reason}"
                tell(f"sampling falls back to the fixed_point backend: {reason}")
            elif remark is None:
                remark = f"taken as causal, which could not be checked: {reason}"
        kind_of = Naive if self.choice == "naive" else FixedPoint
        places = None if order is None else places_of(order, self.shape, self.distribution)
        return Made(key, kind_of(self.model, self.shape, encode, places), remark)

    def _levels(self, dtype: torch.dtype) -> int | Tensor | torch.dtype:
        return dtype if dtype.is_floating_point else known_levels(self.distribution)

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def _encode(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Levels (n, C, H, W) of that dtype -> the model's input."""
        real = dtype_of(self.distribution).is_floating_point
        if dtype.is_floating_point and (self.custom_encode is None or not real):
            encode: Callable[[Tensor], Tensor] = partial(_scaled, levels=None, dtype=self._dtype)
        elif self.custom_encode is not None:
            encode = self.custom_encode
        elif self.integers:
            encode = torch.clone
        else:
            levels = None if isinstance(self.distribution, Bernoulli) else levels_of(self.distribution)
            encode = partial(_scaled, levels=levels, dtype=self._dtype)
        return lambda levels: encode(self.model.outward(levels))


def _scaled(x: Tensor, levels: int | Tensor | None, dtype: torch.dtype) -> Tensor:
    """Levels as floats: in [-1, 1], or as they are where `levels` is None."""
    x = x.to(dtype)
    if isinstance(levels, Tensor):
        levels = levels.to(x.device).clamp(min=2)
    return x if levels is None else x / (levels - 1) * 2 - 1
