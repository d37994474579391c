"""fastgen bench: the benchmarks of the source checkout."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = "measure against plain PyTorch: python -m benchmarks in a source checkout, with the same arguments"
NOT_HERE = "the benchmarks are not installed with the library: run this from a source checkout"


def add(commands: Any) -> None:
    """For the list of commands: its arguments are those of `python -m benchmarks`, its help included."""
    commands.add_parser("bench", help=HELP, add_help=False)


def run(arguments: Sequence[str]) -> int:
    """Raises ValueError outside a source checkout, where only help can be had."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        if {"-h", "--help"} & set(arguments):
            print(f"usage: fastgen bench [ARGUMENTS]\n\n{HELP}\n\n{NOT_HERE}")
            return 0
        raise ValueError(NOT_HERE)
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=root).returncode
