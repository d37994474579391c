"""Benchmarks of fastgen against plain PyTorch, on this machine.

    python -m benchmarks [NAME ...]          measure; rows are saved in benchmarks/results/<GPU or CPU>/
    python -m benchmarks --full              more sizes, dtypes, rivals and samples, without a time limit
    python -m benchmarks --budget SECONDS    start no case later than this (default: 420 if no NAME is given)
    python -m benchmarks --resume            measure only cases without valid rows
    python -m benchmarks --compare OLD       measure, and show changes against the rows in OLD (a file or folder)
    python -m benchmarks --dry-run           only compare with float64, at toy size; on a CPU in Triton's interpreter
    python -m benchmarks first-contact [--minutes M] [--resume]
                                             for a GPU and little time: its rates, every kernel once, headlines, the
                                                 rest
    python -m benchmarks gpu-tests [PATH ..] run the quick tests on this GPU in several processes (--full: all tests)
    python -m benchmarks host                measure the host's time for a call of each operation; needs no GPU
    python -m benchmarks predict [FILE ..]   predict the time of whole images in one launch, with the rates in these
                                                 rows
    python -m benchmarks status              for every kernel and GPU: was it right, and are its rows of today's
                                                 source?
    python -m benchmarks readme-tables       write the README's performance section from the saved rows
    python -m benchmarks adopt FILE ..       save rows that were measured on another machine
    python -m benchmarks plots               draw the saved rows into runs/benchmarks/

Every case runs in its own process. first-contact and gpu-tests write to the folder $OUT if it is set.
Exit status 1: a result was wrong, or the README does not agree with the rows (--check). 2: wrong usage.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

COMMANDS = ("first-contact", "gpu-tests", "host", "predict", "status", "readme-tables", "adopt", "plots")
WITH_PATHS = ("gpu-tests", "predict", "adopt")


class _Parser(argparse.ArgumentParser):
    """Prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all), or a command")
    parser.add_argument("--full", action="store_true", help="more sizes, dtypes and samples")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case or test after this time")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="time of first-contact (default 5)")
    parser.add_argument("--resume", action="store_true", help="skip the cases whose saved rows are still valid")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="show changes beyond noise against these rows")
    parser.add_argument("--dry-run", action="store_true", help="compare with float64 at toy size, measure no times")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--results", type=Path, help="folder of saved rows (default benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="readme-tables: check the files without writing them")
    arguments = parser.parse_args(argv)
    command, rest = (arguments.names[:1] or [""])[0], arguments.names[1:]
    arguments.command = command if command in COMMANDS and (not rest or command in WITH_PATHS) else "measure"
    if arguments.command != "measure":
        arguments.names = rest
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.dry_run and not _on_a_gpu(arguments):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before kernels are defined
    from benchmarks.harness.rows import RESULTS

    folder = arguments.results or RESULTS
    command = " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)])
    try:
        return _run(arguments, folder, command)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _on_a_gpu(arguments: argparse.Namespace) -> bool:
    import torch

    return torch.cuda.is_available() if arguments.device is None else arguments.device == "cuda"


def _run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    """Runs the command and returns its exit status. Raises ValueError for wrong usage or input."""
    from benchmarks import cases, first_contact, host, measure
    from benchmarks.figures import plots, tables
    from benchmarks.harness import machine, report, rows

    # On a borrowed machine, only files in $OUT survive.
    out = arguments.results or Path(os.environ.get("OUT") or folder)
    match arguments.command:
        case "first-contact":
            return first_contact.run(arguments, out, command)
        case "gpu-tests":
            from benchmarks import gpu_tests  # needs pytest

            return gpu_tests.run(out, arguments.names, arguments.budget, command, full=arguments.full)
        case "host":
            return host.run(folder, command)
        case "predict":
            from benchmarks import predict  # needs Triton

            return predict.run(arguments.names, "toy" if arguments.dry_run else "gpu-full" if arguments.full else "gpu")
        case "status":
            return report.status(folder)
        case "readme-tables":
            return tables.write(folder, check=arguments.check)
        case "adopt":
            for name in arguments.names:
                rows.adopt(rows.load(Path(name)), folder)
            return 0
        case "plots":
            for file in plots.draw(rows.load(folder), machine.ROOT / "runs" / "benchmarks"):
                print(file)
            return 0
    for name in arguments.names:
        if name not in cases.NAMES:
            known = f"one of {', '.join(cases.NAMES)}, or one of the commands {', '.join(COMMANDS)} alone"
            raise ValueError(f"unknown benchmark {name!r}: expected {known}")
    return measure.run(arguments, folder, command)


if __name__ == "__main__":
    sys.exit(main())
