"""Modules that remember their constructor's arguments, so that a saved file can say how to build them again."""

import inspect
import os
from typing import Any

from torch import nn


class Rebuildable(nn.Module):
    """Base class of all models. `type(model)(**model.constructor_arguments())` builds the same model with fresh
    weights; `fastgen.save` writes these arguments and `fastgen.load` reads them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Rebuildable":
        # In __new__ rather than in __init__: subclasses then need not pass their arguments on.
        model = super().__new__(cls)
        model.__dict__["_built_with"] = (args, kwargs)
        return model

    def constructor_arguments(self) -> dict[str, Any]:
        """The arguments that the constructor was given, by name; arguments left at their defaults are not included."""
        args, kwargs = self.__dict__["_built_with"]
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        return dict(list(bound.arguments.items())[1:])

    def note_argument(self, name: str, value: Any) -> None:
        """Records the value that a constructor uses in place of a keyword argument that it rounds.

        Saved files then hold this value, and do not depend on how later versions round. Nothing is recorded if the
        constructor of a subclass has no such argument.
        """
        _, keywords = self.__dict__["_built_with"]
        parameter = inspect.signature(type(self).__init__).parameters.get(name)
        if parameter is not None and keywords.get(name, parameter.default) != value:
            keywords[name] = value

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """As `fastgen.save`, but also for your own subclass of a model. Raises as `fastgen.save`."""
        from fastgen import checkpoint

        checkpoint.write(folder, checkpoint.configuration(self), self.state_dict())

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> Any:
        """Loads a model of this class, on the CPU, in evaluation mode.

        Args:
            name: a folder that `save_pretrained`, `fastgen.save` or a training run wrote; if there is no such folder, a
                repository USER/NAME of the Hugging Face hub.

        Raises:
            ValueError: there is neither, or the model is of another class, or as `fastgen.load`.
        """
        from fastgen import checkpoint

        return checkpoint.load(checkpoint.pretrained(name), cls)
