"""Writes the reference: one page, made from the docstrings of all public names."""

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
SECTIONS = ("Args", "Attributes", "Raises", "Returns")  # headings inside a docstring
INTRODUCTION = f"""# fastgen {__version__}: reference

Sizes: B images in a batch, C channels, (H, W) height and width, h hidden units, K levels of a channel, D latent
dimensions, P distribution parameters for each pixel. Images are tensors (B, C, H, W) of integer levels 0..K - 1. An
`impl` of "auto" runs a Triton kernel for CUDA tensors and the PyTorch definition elsewhere.

Log-likelihoods are in nats; bits/dim = nats / (C * H * W * ln 2). Mask type A hides the centre pixel of a kernel,
type B shows it. Within an RGB pixel the colours are ordered: red sees no other colour, green sees red, blue sees
red and green.
"""


def markdown() -> str:
    """The page as Markdown: every public name of MODULES, once, under the first module that has it."""
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
    """Classes and functions in the module's `__all__` or, without an `__all__`, those that the module defines."""
    defined = [name for name, item in vars(module).items() if getattr(item, "__module__", "") == module.__name__]
    public = getattr(module, "__all__", [name for name in defined if name[0] != "_"])
    items = {name: getattr(module, name) for name in public}
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
    """Public methods and properties with a docstring, of a class and of those of its bases that fastgen defines."""
    if inspect.isclass(item):
        bases = [base for base in item.__mro__ if base.__module__.startswith("fastgen")]
        members = {name: member for base in reversed(bases) for name, member in vars(base).items()}
        for name, member in members.items():
            member = member.__func__ if isinstance(member, classmethod) else member
            if name[0] != "_" and (inspect.isfunction(member) or isinstance(member, property)) and member.__doc__:
                yield name, member


def _call(name: str, item: Any) -> str:
    """The call of a function, a method or a class; one line for each argument if it is long."""
    signature = inspect.signature(item)
    arguments = [argument for argument in signature.parameters.values() if argument.name not in ("self", "cls")]
    result = inspect.Signature.empty if inspect.isclass(item) else signature.return_annotation
    call = signature.replace(parameters=arguments, return_annotation=result)
    text = re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", f"{name}{call}")  # torch.Tensor is Tensor
    text = re.sub(r"<function <lambda> at \w+>", "...", text)
    if len(text) <= 100:
        return text
    opening, listed, rest = re.match(r"(\w+\()(.*?)(\)(?: -> .*)?)$", text).groups()  # type: ignore[union-attr]
    separator = r", (?![^\[(]*[\])])"  # a comma outside of brackets
    return "\n".join([opening, *(f"    {argument}," for argument in re.split(separator, listed)), rest])


def _text(item: Any) -> str:
    """A docstring as Markdown: its sections become lists, indented blocks become code."""
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
    parser.add_argument(
        "file",
        nargs="?",
        default="reference.html",
        help="the file to write: Markdown if it ends in .md, otherwise HTML (default %(default)s)",
    )
    target = Path(parser.parse_args(arguments).file)
    page = markdown()
    content = page if target.suffix == ".md" else pages.to_html(page)
    write_atomically({target: content.encode()})
    print(target)


if __name__ == "__main__":
    main()
