"""A GPU and little time: what is worth most first, and nothing lost of what has been seen.

1. the device's own rates; 2. one launch of everything that is launched by default, compared with float64, in as many
processes as there are cores (they wait for the compiler, and leave what they compiled in its cache), and the headlines
compared, too; 3. the headlines, timed one after the other; 4. the rest in turns, until the time is over.

rows.jsonl, log.txt and, at the end, table.md lie in $OUT where that is set: `python -m benchmarks adopt rows.jsonl`
saves them elsewhere. `--resume` goes on behind what is there, failures included.
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
# Benchmark, dtype, size; all of "probes".
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
PATIENCE = 60.0  # seconds of one step of one provider: its comparison with all that it compiles, or some samples
FOR_LAUNCHES = 0.45  # of the time, at most
LEAN = "BENCHMARKS_IMPORT_NOTHING_BEFOREHAND"  # environment variable
TOGETHER = 6  # cases of one process: to start one takes seconds
# What takes minutes to compile, what is slower than its neighbour by another way, what fastgen does not choose.
NOT_FIRST = ("compiled, skewed", "unrolled", "naive, compiled", "distributions", "by diagonals", "split", "launched")


def headlines(session: Session) -> list[Case]:
    """Those cases, without the rivals that take long to compile or are never the strongest.

    Raises:
        ValueError: a headline is no case.
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
    """Exit status 1: something was wrong or dead.

    Raises:
        ValueError: there is no GPU.
    """
    start = time.monotonic()
    end = start + 60 * arguments.minutes
    session = measure.begin("cuda", command)
    session.patience = PATIENCE
    facts, device = session.facts, session.device
    at_home = rows.RESULTS / machine.folder_name(facts)
    folder = folder if os.environ.get("OUT") else folder / at_home.name
    earlier = [old for old in {at_home: 0, folder: 0} if arguments.resume and old.exists()]
    results = measure.Results(folder, [row for old in earlier for row in rows.load(old)])
    _preload()
    folder.mkdir(parents=True, exist_ok=True)
    launch_cases, headline_cases = cases.load("launches", SIZE, device), headlines(session)
    comparing = replace(session, timing=False)

    def left(candidates: Iterable[Case], *, timed: bool = True, again: frozenset[tuple] = frozenset()) -> list[Case]:
        known = {key: row for key, row in results.known.items() if key not in again}
        return rows.left(candidates, facts, known, timed=timed)

    def several_a_process(todo: list[Case]) -> list[Piece]:
        """Cases that lie side by side share their kernels: processes that take every n-th compile different ones."""
        pieces = []
        for blocking in (True, False):
            alike = [case for case in todo if case.blocking is blocking]
            count = -(-len(alike) // TOGETHER)
            pieces += [Piece(alike[i::count], comparing, results.save) for i in range(count)]
        return pieces

    def one_a_process(todo: list[Case], its_session: Session = session) -> list[Piece]:
        return [Piece([case], its_session, results.save) for case in todo]

    def phase(name: str, pieces: list[Piece], lanes: int = 1, until: float = end) -> None:
        count = sum(len(piece.cases) for piece in pieces)
        print(f"\n--- {time.monotonic() - start:.0f} s: {name}, {count} cases", flush=True)
        results.brief = lanes > 1
        processes.run(pieces, lanes=lanes, end=until, log=log.fileno())

    with (folder / "log.txt").open("ab", buffering=0) as log:
        pieces = several_a_process(left(launch_cases)) + one_a_process(left(headline_cases, timed=False), comparing)
        phase("every launch against float64", pieces, os.cpu_count() or 1, start + FOR_LAUNCHES * (end - start))
        # One after the other, there may be memory enough.
        too_large = frozenset(rows.key(row) for row in results.rows if row["problem"] == OUT_OF_MEMORY)
        phase("headlines", one_a_process(left(headline_cases, again=too_large)))
        for name, words in (("the rest", NOT_FIRST), ("the rest, what takes long", ())):
            rest = [case.without(*words) for case in cases.in_turns(cases.ON_A_GPU, SIZE, device)]
            phase(name, several_a_process(left(launch_cases)) + one_a_process(left(rest)))
    report.footer(results.rows, 0, left([*launch_cases, *rest]), folder)
    known = results.known
    kernels = "\n".join(report.kernels(list(known.values()), launches.catalogue()))
    (folder / tables.TABLE).write_text(f"{tables.gpu_table(facts['gpu'], known.values())}\n{kernels}\n")
    shown = {(case.op, case.shape, name_of(case.dtype)) for case in headline_cases}
    chosen = (row for row in known.values() if (row["op"], row["shape"], row["dtype"]) in shown)
    print(f"\n{kernels}\n\n{tables.gpu_table(facts['gpu'], chosen)}")
    return 1 if any(runner.went_wrong(row) for row in results.rows) else 0


def _preload() -> None:
    """Imports what every process would import for seconds. Where that uses CUDA, so that forks cannot, the command
    starts anew without it."""
    if LEAN in os.environ:
        return
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # no processes of the compiler's beside this one
    # The compiler of PyTorch 2.11 asks whether there is a GPU when it is imported.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    importlib.import_module("torch._inductor.compile_fx")
    launches.catalogue()
    try:
        processes.in_a_process(torch.cuda.init)
    except ValueError as problem:
        print(f"an import uses CUDA: once more, without what is imported beforehand ({problem})", flush=True)
        os.environ[LEAN] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])
