"""Benchmarks of fastgen against plain PyTorch, on this machine.

    python -m benchmarks [NAME ...]          run; rows are saved under benchmarks/results/<GPU or CPU>/
    python -m benchmarks --full              more sizes, dtypes, rivals and samples, for as long as it takes
    python -m benchmarks --budget SECONDS    start no case later than that (default: 420 where no NAME is given)
    python -m benchmarks --resume            only what has no rows yet that are still true
    python -m benchmarks --compare OLD       run, and show what changed against the rows in OLD (a file or folder)
    python -m benchmarks --dry-run           only compare with float64, at toy size; on a CPU in Triton's interpreter
    python -m benchmarks status              for every kernel and GPU: are its rows fresh, stale or missing?
    python -m benchmarks readme-tables       write the README's performance section from the saved rows
    python -m benchmarks gpu-tests [PATH ..] the tests on this GPU, then compute-sanitizer; saved as rows
    python -m benchmarks plots               draw the saved rows into runs/benchmarks/

Exit status 1: a result was wrong, or the README is not what the rows say (--check). 2: wrong usage.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

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
BUDGET = 420.0  # seconds of a run without NAME and --full, so that it ends within ten minutes
LAST_CASE = 90.0  # seconds after them in which the last case may still compile
PATIENCE = 60.0, 600.0  # seconds that one rival may compile, without and with --full


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
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no case (gpu-tests: test) later than that"
    )
    parser.add_argument("--resume", action="store_true", help="skip the cases whose saved rows are still true")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="show changes beyond noise against these rows")
    parser.add_argument("--dry-run", action="store_true", help="compare at toy size, take and save no times")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--results", type=Path, help="the folder of saved rows (default benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="readme-tables: only check, change nothing")
    arguments = parser.parse_args(argv)
    if arguments.names[:1] == ["gpu-tests"]:
        return arguments
    known = COMMANDS if len(arguments.names) == 1 and arguments.names[0] in COMMANDS else NAMES
    for name in arguments.names:
        if name not in known:
            parser.error(f"unknown benchmark {name!r}: expected one of {', '.join(NAMES)}, or a command alone")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.dry_run and not _on_a_gpu(arguments):
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

            return verify.run(folder, arguments.names[1:], arguments.budget)
        return _run(arguments, folder, command)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _on_a_gpu(arguments: argparse.Namespace) -> bool:
    import torch

    return torch.cuda.is_available() if arguments.device is None else arguments.device == "cuda"


def _run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    import torch

    from benchmarks import agenda, machine, report, rows
    from benchmarks.runner import NO_TIME, Session, measure, went_wrong

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU")
    cuda = _on_a_gpu(arguments)
    device = torch.device("cuda" if cuda else "cpu")
    folder = folder / machine.folder_name(device)
    old = rows.load(arguments.compare) if arguments.compare else []
    saved = {rows.key(row): row for row in rows.load(folder)} if arguments.resume and folder.exists() else {}
    size = "toy" if arguments.dry_run else device.type.replace("cuda", "gpu") + ("-full" if arguments.full else "")
    end = time.perf_counter() + _budget(arguments)
    threads_before = torch.get_num_threads()
    session = Session(device, command, budget=0.5 if arguments.full else 0.1, timing=not arguments.dry_run)
    session.patience, session.end = PATIENCE[arguments.full], end + LAST_CASE
    report.header(session)
    new: list[rows.Row] = []
    kept: list[rows.Row] = []
    late: list[agenda.Item] = []
    for item in agenda.agenda(arguments.names or (agenda.ON_A_GPU if cuda else agenda.ON_A_CPU), size, device):
        if found := agenda.already_measured(item, device, saved) if saved else None:
            kept += found
            continue
        if time.perf_counter() > end:
            late.append(item)
            continue
        torch.set_num_threads(item.threads)
        measured = measure(item.case, session)
        torch.set_num_threads(threads_before)
        report.case_table(item.case, measured)
        new += measured
        if not arguments.dry_run:
            rows.save([row for row in measured if row["problem"] != NO_TIME], folder)
        if cuda and machine.lost(device):
            return _start_again(arguments, end - time.perf_counter())
    if arguments.compare:
        report.changes(old, new)
    report.footer(session, new, kept, late, folder)
    return 1 if any(went_wrong(row) for row in (*new, *kept)) else 0


def _budget(arguments: argparse.Namespace) -> float:
    if arguments.budget is not None:
        return arguments.budget
    return float("inf") if arguments.names or arguments.full or arguments.dry_run else BUDGET


def _start_again(arguments: argparse.Namespace, left: float) -> int:
    """A kernel has broken this process's GPU context: a new process goes on with the rest. The failure is a row."""
    print("\nThe GPU answers nothing more in this process after that failure.", file=sys.stderr, flush=True)
    if arguments.dry_run:
        return 1
    options = ["--resume", "--device", "cuda", *(["--full"] if arguments.full else [])]
    for name in ("results", "compare"):
        if getattr(arguments, name) is not None:
            options += [f"--{name}", str(getattr(arguments, name))]
    if left < float("inf"):
        options += ["--budget", f"{max(left, 0):.0f}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *arguments.names, *options])


if __name__ == "__main__":
    sys.exit(main())
