"""Options of a command in a TOML file: `--config FILE`, and the file that a run leaves of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLAG = "--config"


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments of a command with those of its --config FILE put before them, so that the command line has the last
    word. `name = value` is the option --name, true and false --name and --no-name; the table [set] is --set.

    Raises:
        ValueError: the file is missing or no TOML, or holds what is no option.
    """
    given, files = [], []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == FLAG:
            files.append(value if equals else next(rest, ""))
        else:
            given.append(argument)
    tokens = [token for file in files for token in _tokens(_read(Path(file)), file)]
    return [*given[:1], *tokens, *given[1:]]


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
            raise ValueError(f"{file}: {name} must be a text, a number, true or false, got {value!r}")
    return tokens


def written(options: Mapping[str, Any]) -> bytes:
    """Options as a file that `expand` reads; None is left out, a mapping becomes a table at the end."""
    plain = {name: value for name, value in options.items() if value is not None and not isinstance(value, Mapping)}
    tables = {name: value for name, value in options.items() if isinstance(value, Mapping)}
    lines = [f"{name.replace('_', '-')} = {_value(value)}" for name, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items() if value is not None)]
    return ("\n".join(lines) + "\n").encode()


def _value(value: Any) -> str:
    """A value in TOML, whose text, numbers, true, false and lists are written as in JSON."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
