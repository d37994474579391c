"""Takes levels of whole images; gives all activations at once, as a pass of the model does, where pixels are known."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import lives
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.rules.scan import Scan
from fastgen.sampling.trace.graph import Map, Operand, Value


def prefill(plan: Plan, given: Mapping[Value, Tensor], store: Callable[[Value, Tensor], None]) -> None:
    """Computes every value for a batch of images.

    Args:
        plan: of the network.
        given: the levels and the condition's values, (n, *shape).
        store: called with each value that sampling keeps, and its elements (n, *shape). Those that pixels not known
            yet decide are of no use, and computed again when their time comes.
    """
    n, device = len(next(iter(given.values()))), next(iter(given.values())).device
    empty = torch.empty((n, 0), device=device)
    found: dict[Value, Tensor] = dict(given)
    computed = plan.timed.computed
    sources = [{source for operand in value.operands for source in operand.values} for value in computed]
    life = lives(sources)

    def whole(value: Value) -> Tensor:
        if value.kind == "constant":
            return value.data.to(device).expand(n, *value.shape)
        return found[value]

    for k, value in enumerate(computed):
        rule = plan.timed.rules[value]
        result = (
            rule.whole(_read(rule.gates, whole, empty)) if isinstance(rule, Scan) else _compute(value, whole, empty)
        )
        found[value] = result
        if value in plan.storage.stored:
            store(value, result)
        for source in sources[k]:
            if life[source][1] == k:
                found.pop(source, None)


def _compute(value: Value, whole: Callable[[Value], Tensor], empty: Tensor) -> Tensor:
    """The operator on the images of a batch one by one, which vmap does at once."""
    operands = value.operands

    fixed = [one.map is not None and one.map.value.kind == "constant" for one in operands]
    tensors = [
        _read(one, whole, empty)[0] if same else _read(one, whole, empty)
        for one, same in zip(operands, fixed, strict=True)
    ]
    with _unwarned():  # of operators that vmap can only loop over
        return torch.vmap(value.compute, in_dims=tuple(None if same else 0 for same in fixed))(*tensors)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    functorch: Any = torch._C._functorch  # which its stubs do not know in full
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _read(operand: Operand, whole: Callable[[Value], Tensor], empty: Tensor) -> Tensor:
    """An operand of a batch of images, (n, *shape); `empty` (n, 0) tells the batch where it holds zeros alone."""
    if operand.map is not None:
        inner, data = operand.map, whole(operand.map.value)
        batched = Map(
            Value("computed", tuple(data.shape), data),
            (len(data), *inner.shape),
            (0, *inner.start),
            ((1, *(0,) * len(inner.start)), *((0, *step) for step in inner.steps)),
        )
        return batched.read(data.contiguous(), 0)
    assert operand.ids is not None
    data = whole(operand.values[-1]) if operand.values else empty
    out = data.new_zeros((len(data), operand.numel))
    for value, places, elements in operand.parts:
        found = whole(value).reshape(len(data), -1)[:, elements.to(data.device)]
        out[:, places.to(data.device)] = found.to(data.dtype)
    return out.view(len(data), *operand.ids.shape)
