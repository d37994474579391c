"""Running a stranger's model without leaving traces in it."""

from typing import Any

import torch
from torch import nn


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
