"""fastgen bench: the benchmarks of the source checkout."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = "measure against plain PyTorch (in a source checkout; same arguments as python -m benchmarks)"
NOT_HERE = "the benchmarks are not installed with the library: run this from a source checkout"


def add(commands: Any) -> None:
    """Lists the command. `run` passes all arguments on to `python -m benchmarks`, --help included."""
    commands.add_parser("bench", help=HELP, add_help=False)


def run(arguments: Sequence[str]) -> int:
    """Runs `python -m benchmarks`. Outside a source checkout, prints help or raises ValueError."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        if {"-h", "--help"} & set(arguments):
            print(f"usage: fastgen bench [ARGUMENTS]\n\n{HELP}\n\n{NOT_HERE}")
            return 0
        raise ValueError(NOT_HERE)
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=root).returncode
