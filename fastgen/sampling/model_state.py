"""A model is left as it was found (`unchanged`), and what has changed since an analysis is noticed (`ModelState`)."""

import itertools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Kept = Callable[[], AbstractContextManager[Any]]  # a model may be called inside, and is afterwards as it was
Change = Literal["nothing", "values", "structure"]
PLAIN = (bool, int, float, complex, str, type(None))
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
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
        attributes: names "module.attribute" of those that were written, once it has been left.
        tensors: name -> what was left in a tensor that was written.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.copies = copies or {}
        self.attributes: set[str] = set()
        self.tensors: dict[str, Tensor] = {}

    def __enter__(self) -> "unchanged":
        self._before = [(path, module, _own(module)) for path, module in self.model.named_modules()]
        self._held: list[tuple[Any, Any]] = []
        for _, module, attributes in self._before:
            registered = [module.__dict__.get(name) for name in _REGISTERED]
            for one in _containers((*registered, *attributes.values())):
                self._held.append((one, one.copy()))
        tensors = dict(_tensors(self.model))
        self._tensors = {
            name: (tensor, self.copies[name] if name in self.copies else tensor.detach().clone())
            for name, tensor in tensors.items()
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for path, module, attributes in self._before:
            for name in _own(module).keys() - attributes.keys():
                del module.__dict__[name]
                self.attributes.add(f"{path}.{name}")
            for name, value in attributes.items():
                if module.__dict__.get(name) is not value:
                    module.__dict__[name] = value
                    self.attributes.add(f"{path}.{name}")
        for container, before in self._held:
            _refill(container, before)
        names = [name for name, (tensor, before) in self._tensors.items() if tensor.shape == before.shape]
        changed = _unequal([self._tensors[name] for name in names])
        for name, differs in zip(names, changed, strict=True):
            if differs:
                tensor, before = self._tensors[name]
                self.tensors[name] = tensor.detach().clone()
                tensor.data.copy_(before)  # through `.data`: a graph that waits for its backward pass stays valid


class ModelState:
    """A copy of a model's parameters, buffers, modes, and of the tensors and numbers that its modules keep as plain
    attributes. Values are compared, because a change through `.data` leaves neither version counter nor address behind.

    What forward passes write themselves is no change: neither the attributes that they write, nor a tensor that holds
    what they leave in it.

    Args:
        model: as it is found.
        written: names of attributes that its forward passes are known to write.
    """

    def __init__(self, model: nn.Module, written: Collection[str] = ()) -> None:
        self.model = model
        self.written = set(written)
        self._modules = _modules(model)
        self._plain = _plain(model)
        self._tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        self._left: dict[str, Tensor] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The model's passes run inside, and it is left as `unchanged` leaves it. Entered while nothing has changed,
        except that a pass of the user's may have left in tensors what passes leave."""
        passes = unchanged(self.model, {k: v for k, v in self._tensors.items() if k not in self._left})
        try:
            with passes:
                yield
        finally:
            self.written |= passes.attributes
            self._left |= passes.tensors

    def change(self) -> Change:
        """ "values": nothing has changed but floating-point numbers, of which none became zero or ceased to be."""
        before, now = (
            {k: v for k, v in one.items() if k not in self.written} for one in (self._plain, _plain(self.model))
        )
        if before != now or self._modules != _modules(self.model):
            return "structure"
        old, new = (
            {k: v for k, v in one.items() if k not in self.written}
            for one in (self._tensors, dict(_tensors(self.model)))
        )
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


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _own(module: nn.Module) -> dict[str, Any]:
    """Attributes of its own, without what `nn.Module` keeps its parameters, buffers, submodules and hooks in."""
    return {name: value for name, value in module.__dict__.items() if name not in _KEPT_BY_TORCH}


def _modules(model: nn.Module) -> list[tuple[Any, ...]]:
    """Their names, classes, modes and hooks; not the hooks of the model as a whole, which mostly count its calls."""
    return [
        (path, type(module), module.training, *(list(getattr(module, hooks).values()) for hooks in _HOOKS if path))
        for path, module in model.named_modules()
    ]


def _containers(values: Sequence[Any]) -> list[Any]:
    """Those among the values, and those inside of them, each once."""
    found: dict[int, Any] = {}
    pending = list(values)
    while pending:
        one = pending.pop()
        if type(one) in CONTAINERS and id(one) not in found:
            found[id(one)] = one
            pending += one.values() if isinstance(one, dict) else one
    return list(found.values())


def _plain(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in _own(module).items()
        if isinstance(value, PLAIN)
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors kept as attributes; of sparse ones what they are made of. Those that wait for
    their shape are none yet."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
        ((f"{path}.{name}", value) for path, module in model.named_modules() for name, value in _own(module).items()),
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


def _refill(container: Any, before: Any) -> None:
    """Gives a dict, list or set what it held before."""
    if isinstance(container, dict):
        same = len(container) == len(before) and all(
            name in container and container[name] is value for name, value in before.items()
        )
    else:
        same = len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(before)
