"""Benchmarks of fastgen against plain PyTorch, on this machine.

    python -m benchmarks [NAME ...]          run; rows are saved under benchmarks/results/<GPU or CPU>/
    python -m benchmarks --full              more sizes, dtypes and samples
    python -m benchmarks --compare OLD       run, and show what changed against the rows in OLD (a file or folder)
    python -m benchmarks --dry-run           only compare with float64, at toy size; on a CPU in Triton's interpreter
    python -m benchmarks status              for every kernel and GPU: are its rows fresh, stale or missing?
    python -m benchmarks readme-tables       write the README's performance section from the saved rows
    python -m benchmarks gpu-tests           the whole test suite on this GPU, compute-sanitizer too; saved as rows
    python -m benchmarks plots               draw the saved rows into runs/benchmarks/

Exit status 1: a result was wrong, or the README is not what the rows say (--check). 2: wrong usage.
"""

import argparse
import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

    from benchmarks.case import Case

NAMES = (
    "masked_conv2d",
    "reparameterize_kl",
    "reconstruction_nll",
    "linear_cross_entropy",
    "elbo",
    "diagonal_lstm",
    "row_lstm",
    "training",
    "vae",
    "sampling",
)
COMMANDS = ("status", "readme-tables", "plots", "gpu-tests")


def load_cases(name: str, size: str, device: "torch.device") -> "list[Case]":
    """The cases of one benchmark; see benchmarks.case.SIZES."""
    return importlib.import_module(f"benchmarks.{name}").cases(size, device)


def without_compilation(case: "Case") -> "Case":
    """A CPU compiles for minutes: by default only for all its threads, not again for one."""
    kept = {name: call for name, call in case.providers.items() if "compiled" not in name}
    return dataclasses.replace(case, providers=kept)


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; none: all. Or one command")
    parser.add_argument("--full", action="store_true", help="more sizes, dtypes and samples")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="show changes beyond noise against these rows")
    parser.add_argument("--dry-run", action="store_true", help="compare at toy size, take and save no times")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--results", type=Path, help="the folder of saved rows (default benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="readme-tables: only check, change nothing")
    arguments = parser.parse_args(argv)
    known = COMMANDS if len(arguments.names) == 1 and arguments.names[0] in COMMANDS else NAMES
    for name in arguments.names:
        if name not in known:
            parser.error(f"unknown benchmark {name!r}: expected one of {', '.join(NAMES)}, or a command alone")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.dry_run and arguments.device != "cuda":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # must be chosen before kernels are defined
    from benchmarks import report, rows

    folder = arguments.results or rows.RESULTS
    try:
        if arguments.names[:1] == ["status"]:
            return report.status(folder)
        if arguments.names[:1] == ["readme-tables"]:
            return report.readme_tables(folder, check=arguments.check)
        if arguments.names[:1] == ["plots"]:
            return report.plots(folder)
        command = " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)])
        if arguments.names[:1] == ["gpu-tests"]:
            from benchmarks import verify

            return verify.run(folder, command)
        return _run(arguments, folder, command)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    import torch

    from benchmarks import machine, report, rows
    from benchmarks.runner import Session, measure

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU")
    cuda = torch.cuda.is_available() if arguments.device is None else arguments.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    old = rows.load(arguments.compare) if arguments.compare else []
    size = "toy" if arguments.dry_run else device.type.replace("cuda", "gpu") + ("-full" if arguments.full else "")
    session = Session(device, command, budget=1.0 if arguments.full else 0.25, timing=not arguments.dry_run)
    report.header(session)
    new: list[rows.Row] = []
    threads_before = torch.get_num_threads()
    for name in arguments.names or NAMES:
        # A CPU is measured with one thread, where processor time tells what was disturbed, and with all.
        for threads in [threads_before] if cuda or arguments.dry_run else sorted({1, threads_before}):
            torch.set_num_threads(threads)
            for case in load_cases(name, size, device):
                if size == "cpu" and threads < threads_before:
                    case = without_compilation(case)
                measured = measure(case, session)
                report.case_table(case, measured)
                new += measured
                if not arguments.dry_run:
                    rows.save(measured, folder / machine.folder_name(device))
    torch.set_num_threads(threads_before)
    if arguments.compare:
        report.changes(old, new)
    wrong = [row for row in new if row["problem"].startswith("wrong")]
    report.footer(session, new, folder / machine.folder_name(device))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
