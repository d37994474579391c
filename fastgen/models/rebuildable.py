"""Modules that remember the arguments they were built with, so that a file can say how to build them again."""

import inspect
from typing import Any

from torch import nn


class Rebuildable(nn.Module):
    """Base class of every model of `fastgen.models`. `type(model)(**model.constructor_arguments())` is the same model
    with fresh weights; `fastgen.save` writes these arguments and `fastgen.load` reads them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Rebuildable":
        # Here and not in __init__, so that no subclass has to hand its arguments on.
        model = super().__new__(cls)
        model.__dict__["_built_with"] = (args, kwargs)
        return model

    def constructor_arguments(self) -> dict[str, Any]:
        """The arguments of the constructor by name, without those left at their defaults."""
        args, kwargs = self.__dict__["_built_with"]
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        return dict(list(bound.arguments.items())[1:])

    def note_argument(self, name: str, value: Any) -> None:
        """What a constructor makes of a keyword argument is what a file says, if that is not what was given: rules by
        which it is found may change."""
        _, given = self.__dict__["_built_with"]
        if given.get(name, inspect.signature(type(self).__init__).parameters[name].default) != value:
            given[name] = value
