"""Options in a TOML file: reads `--config FILE`, and writes the file that a training run leaves in its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLAG = "--config"


def expand(argv: Sequence[str]) -> list[str]:
    """Replaces --config FILE by the options in the file. These come first, so that the command line overrides them.

    `name = value` in the file becomes the option --name; true and false become --name and --no-name; the table [set]
    becomes --set.

    Args:
        argv: the command and its arguments.

    Raises:
        ValueError: the file is not TOML, or a value cannot be the value of an option.
        OSError: the file is missing or cannot be read.
    """
    others, files = [], []
    remaining = iter(argv)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == FLAG:
            files.append(value if equals else next(remaining, ""))
        else:
            others.append(argument)
    tokens = [token for file in files for token in _tokens(_read(Path(file)), file)]
    return [*others[:1], *tokens, *others[1:]]


def _read(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ValueError(f"{FLAG} needs Python 3.11 or newer, or: pip install tomli") from error
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not a TOML file ({error})") from error


def _tokens(options: Mapping[str, Any], file: str) -> list[str]:
    tokens: list[str] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if name == "set" and isinstance(value, dict):
            tokens += [part for key, entry in value.items() for part in ("--set", f"{key}={entry!r}")]
        elif isinstance(value, bool):
            tokens.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (str, int, float)):
            tokens.append(f"{option}={value}")
        else:
            raise ValueError(f"{file}: {name} must be a string, a number, true or false, got {value!r}")
    return tokens


def to_toml(options: Mapping[str, Any]) -> bytes:
    """The content of a file with these options, which `expand` reads. None is left out; mappings become tables, which
    come last."""
    plain = {name: value for name, value in options.items() if value is not None and not isinstance(value, Mapping)}
    tables = {name: value for name, value in options.items() if isinstance(value, Mapping)}
    lines = [f"{name.replace('_', '-')} = {_value(value)}" for name, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items() if value is not None)]
    return ("\n".join(lines) + "\n").encode()


def _value(value: Any) -> str:
    """A value as TOML, which writes strings, numbers, booleans and lists as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
