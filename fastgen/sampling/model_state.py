"""A model is left as it was found (`unchanged`), and its changes since an analysis are noticed (`Snapshot`)."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class unchanged:
    """Restores what a forward pass writes into a model: running statistics, tensors and numbers kept as attributes.

    Attributes:
        touched: names of the attributes that were written, "module.attribute", once it has been left.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.touched: set[str] = set()

    def __enter__(self) -> "unchanged":
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        self.attributes = [(name, module, _own(module)) for name, module in self.model.named_modules()]
        return self

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for buffer, before in self.buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for path, module, attributes in self.attributes:
            for name in _own(module).keys() - attributes.keys():
                del module.__dict__[name]
                self.touched.add(f"{path}.{name}")
            for name, value in attributes.items():
                if module.__dict__.get(name) is not value:
                    module.__dict__[name] = value
                    self.touched.add(f"{path}.{name}")


def _own(module: nn.Module) -> dict[str, Any]:
    """Attributes of its own, without what `nn.Module` keeps its parameters, buffers, submodules and hooks in."""
    return {name: value for name, value in module.__dict__.items() if name not in _KEPT}


_KEPT = frozenset(nn.Module().__dict__)


PLAIN = (bool, int, float, complex, str, type(None))


class Snapshot:
    """A copy of a model's parameters, buffers, modes, and of the tensors and numbers that its modules keep as plain
    attributes. Values are compared, because a change through `.data` leaves neither version counter nor address
    behind.

    Args:
        ignored: "module.attribute" names that do not count, as the forward pass itself writes them.
    """

    def __init__(self, model: nn.Module, ignored: Collection[str] = ()) -> None:
        self.ignored = frozenset(ignored)
        self.modules = _modules(model, self.ignored)
        self.tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model, self.ignored)}

    @torch.no_grad()
    def differs(self, model: nn.Module) -> bool:
        """Whether anything is not as it was: values, dtypes, devices, modules, training modes."""
        tensors = dict(_tensors(model, self.ignored))
        if self.modules != _modules(model, self.ignored) or self.tensors.keys() != tensors.keys():
            return True
        pairs = [(old, tensors[name]) for name, old in self.tensors.items()]
        if any((old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device) for old, new in pairs):
            return True
        if not pairs:
            return False
        # One read for all tensors: on a GPU each would wait for the device.
        same = torch.stack([(old == new).all().to(pairs[0][0].device) for old, new in pairs]).tolist()
        unlike = [pair for pair, equal in zip(pairs, same, strict=True) if not equal]
        return any(bool(((old != new) & ((old == old) | (new == new))).any()) for old, new in unlike)  # not NaN for NaN


def _modules(model: nn.Module, ignored: Collection[str]) -> list[tuple[str, type, dict[str, Any]]]:
    return [
        (
            path,
            type(module),
            {key: value for key, value in _attributes(path, module, ignored) if isinstance(value, PLAIN)},
        )
        for path, module in model.named_modules()
    ]


def _tensors(model: nn.Module, ignored: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        for key, value in _attributes(path, module, ignored):
            if isinstance(value, Tensor):
                yield f"{path}.{key} (attribute)", value


def _attributes(path: str, module: nn.Module, ignored: Collection[str]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in module.__dict__.items() if f"{path}.{key}" not in ignored)
