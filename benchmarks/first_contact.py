"""`python -m benchmarks first-contact`: for a GPU and little time. The most valuable measurements come first, and every
result is saved at once.

1. The device's own rates: copying and matrix products.
2. One launch of everything that is launched by default, and the headline cases, compared with float64. There are as
   many processes as cores: most of the time goes into compiling, and the compiler's cache keeps the results.
3. The headline cases, timed one after the other.
4. All other cases, until the time is over.

The folder $OUT, if it is set, gets rows.jsonl, log.txt and, at the end, table.md. `python -m benchmarks adopt
rows.jsonl` saves the rows in a checkout. `--resume` skips what is there already, including failures.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import cases, measure
from benchmarks.figures import tables
from benchmarks.harness import launches, machine, processes, report, rows, runner
from benchmarks.harness.case import Case, name_of
from benchmarks.harness.pieces import Piece
from benchmarks.harness.session import OUT_OF_MEMORY, Session

LAYER = "128x32x32 to 256, 3x3 B gated"
SAMPLING = "GatedPixelCNN 1x28x28 levels=256 B="
# (benchmark, dtype, size); all cases of "probes".
HEADLINES = (
    *(("masked_conv2d", "bfloat16", f"{batch}x{LAYER}") for batch in (128, 16)),
    *(("diagonal_lstm", "bfloat16", f"B=16 h={units} 32x32") for units in (64, 128)),
    ("reparameterize_kl", "bfloat16", "1024x4096"),
    ("reconstruction_nll", "bfloat16", "logistic_mixture 64x3x32x32"),
    *(("sampling", "float32", f"{SAMPLING}{batch}") for batch in (16, 256)),
    ("probes", None, None),
    ("masked_conv2d", "float32", f"128x{LAYER}"),
    ("reparameterize_kl", "float32", "1024x4096"),
    ("reconstruction_nll", "float32", "logistic_mixture 64x3x32x32"),
)
SIZE = "gpu"
PATIENCE = 60.0  # seconds for one step of one provider: its comparison, including compilation, or a few samples
LAUNCHES_SHARE = 0.45  # of the time, at most, for phase 2
LEAN = "BENCHMARKS_IMPORT_NOTHING_BEFOREHAND"  # environment variable: skip _preload
CASES_PER_PROCESS = 6  # starting a process takes seconds
# Words in the names of providers that are measured last: they take minutes to compile, are slower than a similar
# provider, or are variants that fastgen does not choose.
NOT_FIRST = ("compiled, skewed", "unrolled", "naive, compiled", "distributions", "by diagonals", "split", "launched")


def headlines(session: Session) -> list[Case]:
    """The cases of HEADLINES, without the providers of NOT_FIRST.

    Raises:
        ValueError: a headline is not a case.
    """
    chosen: list[Case] = []
    for name, dtype, shape in HEADLINES:
        candidates = [case for case in cases.load(name, SIZE, session.device) if case.op == name]
        if dtype is not None:
            candidates = [case for case in candidates if (name_of(case.dtype), case.shape) == (dtype, shape)]
        if not candidates:
            raise ValueError(f"no case of {name} is {dtype} {shape}")
        chosen += [case.without(*NOT_FIRST) for case in candidates]
    return chosen


def run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    """Returns the exit status: 1 if a result was wrong or a provider of fastgen died.

    Raises:
        ValueError: there is no GPU.
    """
    start = time.monotonic()
    end = start + 60 * arguments.minutes
    session = measure.begin("cuda", command)
    session.patience = PATIENCE
    facts, device = session.facts, session.device
    saved = rows.RESULTS / machine.folder_name(facts)
    folder = folder if os.environ.get("OUT") else folder / saved.name
    earlier = [old for old in dict.fromkeys((saved, folder)) if arguments.resume and old.exists()]
    results = measure.Results(folder, [row for old in earlier for row in rows.load(old)])
    _preload()
    folder.mkdir(parents=True, exist_ok=True)
    launch_cases, headline_cases = cases.load("launches", SIZE, device), headlines(session)
    comparing = replace(session, timing=False)

    def left(candidates: Iterable[Case], *, timed: bool = True, again: frozenset[tuple] = frozenset()) -> list[Case]:
        """The cases that have no valid rows yet; rows with a key in `again` do not count."""
        known = {key: row for key, row in results.known.items() if key not in again}
        return rows.left(candidates, facts, known, timed=timed)

    def several_per_process(todo: list[Case]) -> list[Piece]:
        """Neighbouring cases share kernels. Each process takes every n-th case, so that processes which run at the same
        time compile different kernels."""
        pieces = []
        for blocking in (True, False):
            group = [case for case in todo if case.blocking is blocking]
            count = -(-len(group) // CASES_PER_PROCESS)
            pieces += [Piece(group[i::count], comparing, results.save) for i in range(count)]
        return pieces

    def one_per_process(todo: list[Case], piece_session: Session = session) -> list[Piece]:
        return [Piece([case], piece_session, results.save) for case in todo]

    def phase(name: str, pieces: list[Piece], lanes: int = 1, until: float = end) -> None:
        count = sum(len(piece.cases) for piece in pieces)
        print(f"\n--- {time.monotonic() - start:.0f} s: {name}, {count} cases", flush=True)
        results.brief = lanes > 1
        processes.run(pieces, lanes=lanes, end=until, log=log.fileno())

    with (folder / "log.txt").open("ab", buffering=0) as log:
        pieces = several_per_process(left(launch_cases)) + one_per_process(left(headline_cases, timed=False), comparing)
        phase("every launch against float64", pieces, os.cpu_count() or 1, start + LAUNCHES_SHARE * (end - start))
        # A case that ran out of memory beside others may fit on its own.
        too_large = frozenset(rows.key(row) for row in results.rows if row["problem"] == OUT_OF_MEMORY)
        phase("headlines", one_per_process(left(headline_cases, again=too_large)))
        for name, words in (("the rest", NOT_FIRST), ("the rest, what takes long", ())):
            rest = [case.without(*words) for case in cases.in_turns(cases.ON_A_GPU, SIZE, device)]
            phase(name, several_per_process(left(launch_cases)) + one_per_process(left(rest)))
    report.footer(results.rows, 0, left([*launch_cases, *rest]), folder)
    known = results.known
    kernels = "\n".join(report.kernels(list(known.values()), launches.catalogue()))
    (folder / tables.TABLE).write_text(f"{tables.gpu_table(facts['gpu'], known.values())}\n{kernels}\n")
    headline_keys = {(case.op, case.shape, name_of(case.dtype)) for case in headline_cases}
    headline_rows = (row for row in known.values() if (row["op"], row["shape"], row["dtype"]) in headline_keys)
    print(f"\n{kernels}\n\n{tables.gpu_table(facts['gpu'], headline_rows)}")
    return 1 if any(runner.went_wrong(row) for row in results.rows) else 0


def _preload() -> None:
    """Imports, before processes are forked, what each of them would spend seconds on. If an import initializes CUDA,
    which forks could then not use, the command restarts itself with LEAN set."""
    if LEAN in os.environ:
        return
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # the compiler must not start worker processes
    # The compiler of PyTorch 2.11 asks for a GPU when it is imported; with this setting, that initializes nothing.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    importlib.import_module("torch._inductor.compile_fx")
    launches.catalogue()
    try:
        processes.in_a_process(torch.cuda.init)
    except ValueError as problem:
        print(f"an import initializes CUDA: starting again without imports beforehand ({problem})", flush=True)
        os.environ[LEAN] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])
