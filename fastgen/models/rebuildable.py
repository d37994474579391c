"""Modules that remember the arguments they were built with, so that a file can say how to build them again."""

import inspect
import os
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
        """Records the value that the constructor really uses for a keyword argument, where it rounds what it was given.

        A file then holds that value, and does not depend on how later versions round. Nothing is recorded where the
        constructor of a subclass has no such argument.
        """
        _, keywords = self.__dict__["_built_with"]
        parameter = inspect.signature(type(self).__init__).parameters.get(name)
        if parameter is not None and keywords.get(name, parameter.default) != value:
            keywords[name] = value

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """`fastgen.save`, which also works for a subclass of your own. Raises as `fastgen.save` does."""
        from fastgen import checkpoint

        checkpoint.write(folder, checkpoint.configuration(self), self.state_dict())

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> Any:
        """Loads a model of this class, in evaluation mode, from a folder that `save_pretrained`, `fastgen.save` or a
        run wrote. If there is no such folder, `name` is taken as a repository USER/NAME of the Hugging Face hub.

        Raises:
            ValueError: there is none, or of another class; see `fastgen.load`.
        """
        from fastgen import checkpoint

        return checkpoint.load(checkpoint.pretrained(name), cls)
