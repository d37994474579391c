"""The reference: one page, made from the docstrings of all public names."""

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgen import pages
from fastgen._version import __version__
from fastgen.files import write_atomically

MODULES = (
    "fastgen",
    "fastgen.ops",
    "fastgen.nn",
    "fastgen.models",
    "fastgen.sampling",
    "fastgen.likelihood",
    "fastgen.data",
    "fastgen.train",
    "fastgen.weights",
    "fastgen.plots",
)
SECTIONS = ("Args", "Attributes", "Raises", "Returns")  # of a docstring
INTRODUCTION = f"""# fastgen {__version__}: reference

B is the batch, C the channels of an image, (H, W) its size, h hidden units, K levels, D latent dimensions, P parameters
a pixel. Tensors of images are (B, C, H, W). Log-likelihoods are in nats; bits/dim are nats / (C * H * W * ln 2). Mask
type A hides the pixel itself, B shows it; of the three colours of a pixel, R sees none, G sees R, B sees R and G.
"""


def markdown() -> str:
    """The page: every public name of MODULES, once, under the first module that has it."""
    parts, seen = [INTRODUCTION], set()
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{_text(module)}")
        for public, item in public_names(module).items():
            if id(item) not in seen:
                seen.add(id(item))
                parts += _entry(f"{name}.{public}", item)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def public_names(module: Any) -> dict[str, Any]:
    """Classes and functions: those of `__all__`, or else those that the module itself defines."""
    own = [name for name, item in vars(module).items() if getattr(item, "__module__", "") == module.__name__]
    listed = getattr(module, "__all__", [name for name in own if name[0] != "_"])
    items = {name: getattr(module, name) for name in listed}
    return {name: item for name, item in items.items() if inspect.isclass(item) or inspect.isroutine(item)}


def _entry(name: str, item: Any) -> Iterator[str]:
    yield f"### {name}"
    if inspect.isclass(item) and issubclass(item, Exception):
        yield _text(item)
        return
    yield f"```\n{_call(name.rpartition('.')[2], item)}\n```"
    yield _text(item)
    for key, method in _methods(item):
        yield f"**{key}**"
        if isinstance(method, property):
            yield f"A property. {_text(method)}"
        else:
            yield f"```\n{_call(key, method)}\n```"
            yield _text(method)


def _methods(item: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties with a docstring that fastgen's classes define, of the class and of its bases."""
    if inspect.isclass(item):
        own = [kind for kind in item.__mro__ if kind.__module__.startswith("fastgen")]
        found = {key: value for kind in reversed(own) for key, value in vars(kind).items()}
        for key, value in found.items():
            value = value.__func__ if isinstance(value, classmethod) else value
            if key[0] != "_" and (inspect.isfunction(value) or isinstance(value, property)) and value.__doc__:
                yield key, value


def _call(name: str, item: Any) -> str:
    """The call as one would write it, a line for each argument where it is long."""
    text = re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", f"{name}{inspect.signature(item)}")  # torch.Tensor is Tensor
    text = re.sub(r"<function <lambda> at \w+>", "...", text)
    if len(text) <= 100:
        return text
    opening, arguments, rest = re.match(r"(\w+\()(.*?)(\)(?: -> .*)?)$", text).groups()  # type: ignore[union-attr]
    return "\n".join([opening, *(f"    {one}," for one in re.split(r", (?![^\[(]*[\])])", arguments)), rest])


def _text(item: Any) -> str:
    """A docstring as Markdown: its sections become lists, what is indented becomes code."""
    blocks = []
    for block in (inspect.getdoc(item) or "").split("\n\n"):
        heading, _, body = block.partition("\n")
        if heading.rstrip(":") in SECTIONS and heading.endswith(":"):
            named = re.sub(r"^    (\w[\w.*, ]*):", r"- `\1`:", body, flags=re.M)
            blocks.append(f"*{heading[:-1]}*\n\n{inspect.cleandoc(body) if heading == 'Returns:' else named}")
        elif block.startswith("    "):
            blocks.append(f"```\n{block}\n```")
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastgen.reference", description=__doc__)
    parser.add_argument("file", nargs="?", default="reference.html", help="to write: .md, or else HTML (%(default)s)")
    target = Path(parser.parse_args(arguments).file)
    page = markdown()
    content = page if target.suffix == ".md" else pages.to_html(page)
    write_atomically({target: content.encode()})
    print(target)


if __name__ == "__main__":
    main()
