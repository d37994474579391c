"""The command `fastgen`.

Exit status 0: success. 2: wrong usage or input, explained in one line on stderr. 130: interrupted.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

from fastgen._version import __version__

SHARED = ("train", "evaluate", "sample")  # commands whose work the processes of torchrun share


class Parser(argparse.ArgumentParser):
    """Prints errors as one line, and for a misspelt option suggests the one that was probably meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.required_options: list[argparse.Action] = []

    def add_required(self, *names: str, **options: Any) -> None:
        """Adds an option that must be given. argparse's own `required` would report it as missing before a misspelling
        of it as unknown."""
        self.required_options.append(self.add_argument(*names, **{**options, "help": f"{options['help']} (needed)"}))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        parser = getattr(parsed, "parser", self)
        if unknown:
            options = [option for action in parser._actions for option in action.option_strings]
            close = get_close_matches(unknown[0].partition("=")[0], options, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            parser.error(f"unrecognized argument {unknown[0]!r}{hint}")
        for action in parser.required_options:
            if getattr(parsed, action.dest) is None:
                parser.error(f"{action.option_strings[0]} is needed")
        return parsed


def build_parser() -> Parser:
    """The parser of all commands. The `add` of each module sets `run(arguments) -> exit status` on its parser. Only
    `run` imports torch, so that --help and errors are fast. `bench` is only listed: `main` passes its arguments on."""
    from fastgen.cli import bench, compression, demo, doctor, drawing, judging, latent, training, using

    parser = Parser(
        prog="fastgen",
        description="Train, evaluate and sample generative models of images.",
        epilog="fastgen COMMAND --help explains a command.",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=18),
    )
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module in (demo, training, using, drawing, latent, judging, compression, bench, doctor):
        module.add(commands)
    for name, command in commands.choices.items():
        command.set_defaults(parser=command, command=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status. With FASTGEN_DEBUG=1 errors show their whole traceback.

    Under torchrun, processes of a rank above 0 take part in the commands of SHARED and skip all others.
    """
    from fastgen import distributed
    from fastgen.cli import bench, config

    given = list(sys.argv[1:] if argv is None else argv)
    command = given[0] if given else ""
    try:
        if command == "bench":
            run = partial(bench.run, given[1:])
        else:
            arguments = build_parser().parse_args(config.expand(given) if command == "train" else given)
            if getattr(arguments, "out", None) == "":  # an unset variable of a shell; Path("") is the current folder
                arguments.parser.error("--out is empty")
            run = partial(arguments.run, arguments)
        if command not in SHARED:
            return run() if os.environ.get("RANK", "0") == "0" else 0
        with distributed.processes():
            return run()
    except KeyboardInterrupt:
        if distributed.first_to_report():
            print(f"fastgen {command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
        if os.environ.get("FASTGEN_DEBUG") == "1" or (isinstance(error, RuntimeError) and not memory):
            raise
        advice = ": out of memory, try a smaller --batch-size or --n" if memory else ""
        if distributed.first_to_report():
            print(f"fastgen {command}: {_one_line(error)}{advice}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
