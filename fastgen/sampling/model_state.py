"""A model is left as it was found (`unchanged`), and what has changed since an analysis is noticed (`ModelState`)."""

import itertools
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Kept = Callable[[], AbstractContextManager[Any]]  # a model may be called inside, and is afterwards as it was
Attributes = dict[str, tuple[dict[str, Any], ...]]  # path of a module -> what holds its attributes, and its buffers
Change = Literal["nothing", "values", "structure"]
PLAIN = (bool, int, float, complex, str, type(None))
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
MOST_ITEMS = 2000  # of all containers that are looked into; one that is larger than what is left is not
_OF_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
}  # a layout -> the methods that give the tensors it is made of
_KEPT_BY_TORCH = frozenset(nn.Module().__dict__)
_REGISTERED = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class unchanged:
    """Puts back what forward passes write into a model: parameters (many public models mask their own weights),
    buffers, tensors, numbers and containers kept as attributes. For instance a map as large as the first batch.

    Args:
        model: which model.
        copies: of its tensors as they are now, by name, where there are some already.

    Attributes:
        written: names of attributes that were written, and of tensors that came or went, once it has been left:
            "module.attribute", or "module.attribute[key]" of what lies in a container or a plain object.
        containers: names of those that were written.
        tensors: name -> what was left in a tensor that was written.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.copies = copies or {}
        self.written: set[str] = set()
        self.containers: set[str] = set()
        self.tensors: dict[str, Tensor] = {}

    def __enter__(self) -> "unchanged":
        self._before = [(module, _own(module)) for module in self.model.modules()]
        self._named = dict(_named(self.model))
        self._held = _held(self._named)
        registered: Iterable[Any] = (one.__dict__.get(name) for one in self.model.modules() for name in _REGISTERED)
        self._registered = [(one, one.copy()) for one in registered if type(one) in CONTAINERS]
        tensors = dict(_tensors(self.model, self._named))
        self._tensors = {
            name: (tensor, self.copies[name] if name in self.copies else tensor.detach().clone())
            for name, tensor in tensors.items()
        }
        return self

    def __exit__(self, *_: Any) -> None:
        named = dict(_named(self.model))
        self.written |= {name for name in self._named.keys() | named.keys() if not _same(name, self._named, named)}
        self.written |= self._tensors.keys() ^ dict(_tensors(self.model, named)).keys()
        for module, attributes in self._before:
            for name in _own(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for pair in self._registered:
            _refill(*pair)
        self.containers = {name for name, held in self._held.items() if _refill(*held)}
        for name, (tensor, before) in self._tensors.items():
            if tensor.shape != before.shape:
                tensor.data = before.clone()
                self.written.add(name)
        changed = _unequal(list(self._tensors.values()))
        for (name, (tensor, before)), differs in zip(self._tensors.items(), changed, strict=True):
            if differs:
                self.tensors[name] = tensor.detach().clone()
                tensor.data.copy_(before)  # through `.data`: a graph that waits for its backward pass stays valid


class ModelState:
    """A copy of a model's parameters, buffers, modes, and of the tensors and numbers that its modules keep as plain
    attributes. Values are compared, because a change through `.data` leaves neither version counter nor address behind.

    What forward passes write themselves is no change: neither the attributes that they write, nor a tensor that holds
    what they leave in it. A pass that fails on what passes of the user's have left there, a cache of another number of
    images for instance, may `begin_anew` with what the analysis found.

    Args:
        model: as it is found.
        before: an earlier copy, which knows what forward passes write, and what that was before any.
    """

    def __init__(self, model: nn.Module, before: "ModelState | None" = None) -> None:
        self.model = model
        self.written: set[str] = set() if before is None else before.written
        self._modules = _modules(model)
        self._attributes = {path: tuple(map(dict, of)) for path, of in _attributes(model).items()}
        named = dict(_named(model))
        self._held = _held(named)
        self._refilled: set[str] = set() if before is None else before._refilled  # containers that passes write
        if before is not None:
            _put_back(self.written, self._attributes, before._attributes)
            for name in self._refilled & self._held.keys() & before._held.keys():
                if self._held[name][0] is before._held[name][0]:
                    self._held[name] = before._held[name]
        self._plain = _plain(named)
        self._tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model, named)}
        self._left: dict[str, Tensor] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The model's passes run inside, and it is left as `unchanged` leaves it. Entered while nothing has changed,
        except that a pass of the user's may have written what passes write."""
        passes = unchanged(self.model, {k: v for k, v in self._others(self._tensors).items() if k not in self._left})
        try:
            with passes:
                yield
        finally:
            self.written |= passes.written
            self._refilled |= passes.containers
            self._left |= passes.tensors

    def begin_anew(self) -> bool:
        """Inside of `kept`: what passes write becomes what it was before any. Whether it was anything else."""
        changed = _put_back(self.written, _attributes(self.model), self._attributes)
        for name in self._refilled & self._held.keys():
            changed |= _refill(*self._held[name])
        for name, tensor in _tensors(self.model, dict(_named(self.model))):
            before = self._tensors.get(name)
            if name in self._left and before is not None and before.shape == tensor.shape:
                changed |= not torch.equal(tensor, before)
                tensor.data.copy_(before)
        return changed

    def change(self) -> Change:
        """ "values": nothing has changed but floating-point numbers, of which none became zero or ceased to be."""
        named = dict(_named(self.model))
        if self._others(self._plain) != self._others(_plain(named)) or self._modules != _modules(self.model):
            return "structure"
        old, new = self._others(self._tensors), self._others(dict(_tensors(self.model, named)))
        if old.keys() != new.keys():
            return "structure"
        pairs = [(old[name], new[name]) for name in new]
        if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
            return "structure"
        changed = [name for name, unequal in zip(new, _unequal(pairs), strict=True) if unequal]
        left = self._left
        changed = [
            name
            for name in changed
            if name not in left or bool((_differs(old[name], new[name]) & _differs(left[name], new[name])).any())
        ]
        if not changed:
            return "nothing"
        same = all(new[name].is_floating_point() and torch.equal(old[name] == 0, new[name] == 0) for name in changed)
        return "values" if same else "structure"

    def _others(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Without what passes write."""

        def is_written(name: str) -> bool:
            return name in self.written or ("[" in name and is_written(name[: name.rindex("[")]))

        return {name: value for name, value in named.items() if not is_written(name)}


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _own(module: nn.Module) -> dict[str, Any]:
    """Attributes of its own, without what `nn.Module` keeps its parameters, buffers, submodules and hooks in."""
    return {name: value for name, value in module.__dict__.items() if name not in _KEPT_BY_TORCH}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _attributes(model: nn.Module) -> Attributes:
    both = ((path, module.__dict__, module.__dict__.get("_buffers")) for path, module in model.named_modules())
    return {path: (own, buffers) if isinstance(buffers, dict) else (own,) for path, own, buffers in both}


def _put_back(names: Iterable[str], now: Attributes, before: Attributes) -> bool:
    """Gives attributes and buffers of these names what they were `before`; whether they were anything else."""
    changed = False
    for name in names:
        path, _, name = name.rpartition(".")
        for target, source in zip(now.get(path, ()), before.get(path, ()), strict=False):
            changed |= not _same(name, target, source)
            if name in source:
                target[name] = source[name]
            else:
                target.pop(name, None)
    return changed


def _same(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the same thing has this name in both, or an equal number."""
    if name not in one or name not in other:
        return (name in one) == (name in other)
    a, b = one[name], other[name]
    return a is b or (isinstance(a, PLAIN) and isinstance(b, PLAIN) and a == b)


def _modules(model: nn.Module) -> list[tuple[Any, ...]]:
    """Their names, classes, modes and hooks; not the hooks of the model as a whole, which mostly count its calls."""
    return [
        (path, type(module), module.training, *(list(getattr(module, hooks).values()) for hooks in _HOOKS if path))
        for path, module in model.named_modules()
    ]


def _named(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes, and what lies in containers and in plain objects among them; see `unchanged` for the names."""
    seen: set[int] = set()
    left = MOST_ITEMS

    def inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        nonlocal left
        yield name, value
        if id(value) not in seen and (items := _items(value, left)):
            seen.add(id(value))
            left -= len(items)
            for key, one in items:
                yield from inside(f"{name}[{key!r}]", one)

    for path, module in model.named_modules():
        for name, value in _own(module).items():
            yield from inside(_joined(path, name), value)


def _container(value: Any) -> Any:
    """What holds the value's items and can be written, a dict for a plain object; None where nothing does."""
    if type(value) in (SimpleNamespace, Namespace) or (is_dataclass(value) and not isinstance(value, type)):
        return getattr(value, "__dict__", None)
    return value if type(value) in CONTAINERS else None


def _items(value: Any, most: int) -> list[tuple[Any, Any]]:
    """Keys and what lies there; not those of sets, and not more than so many."""
    held = value if isinstance(value, tuple) else _container(value)
    if held is None or isinstance(held, set) or len(held) > most:
        return []
    return list(held.items() if isinstance(held, dict) else enumerate(held))


def _plain(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if isinstance(value, PLAIN)}


def _held(named: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name of a container -> itself and a copy."""
    found = ((name, _container(value)) for name, value in named.items())
    return {name: (held, held.copy()) for name, held in found if held is not None}


def _tensors(model: nn.Module, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors kept as attributes; of sparse ones what they are made of. Those that wait for
    their shape are none yet."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
        attributes.items(),
    )
    for name, value in named:
        if isinstance(value, Tensor) and value.layout in _OF_SPARSE:
            yield from ((f"{name}.{part}", getattr(value, part)()) for part in _OF_SPARSE[value.layout])
        elif isinstance(value, Tensor) and not is_lazy(value):
            yield name, value


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where; NaN does not differ from NaN."""
    return (a != b) & ((a == a) | (b == b))


def _unequal(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Which pairs of tensors of one shape differ anywhere."""
    if not pairs:
        return []
    device = pairs[0][0].device
    if all(a.device.type == "cpu" for a, _ in pairs):
        equal = [torch.equal(*pair) for pair in pairs]
    else:  # one read for all tensors: on a GPU each would wait for the device
        equal = torch.stack([(a == b).all().to(device) for a, b in pairs]).tolist()
    return [not same and bool(_differs(*pair).any()) for same, pair in zip(equal, pairs, strict=True)]


def _refill(container: Any, before: Any) -> bool:
    """Gives a dict, list or set what it held before; whether it held anything else."""
    if isinstance(container, dict):
        same = len(container) == len(before) and all(
            name in container and container[name] is value for name, value in before.items()
        )
    else:
        same = len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(before)
    return not same
