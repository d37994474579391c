"""fastgen bench: the benchmarks of the source checkout."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure against plain PyTorch",
        description="Runs `python -m benchmarks` in the source checkout, with whatever follows: see `fastgen bench "
        "--list` and the README.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the help of python -m benchmarks")
    parser.add_argument("--dry-run", action="store_true", help="compare with float64 at toy size, take no times")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError("the benchmarks are not installed with the library: run this from a source checkout")
    options = ["--help"] if arguments.list else [*arguments.names, *(["--dry-run"] if arguments.dry_run else [])]
    return subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=root).returncode
