"""Pieces of a run in their own processes: which rows remain when one dies late, and when the time is over."""

import os
import signal
import time

import pytest

from benchmarks.harness import machine, processes
from benchmarks.harness.pieces import Piece
from benchmarks.harness.session import Session
from tests.benchmarks.square import case, square


@pytest.fixture
def run():
    session = Session(machine.facts("cpu"), "", budget=0.001)

    def start(providers, **options):
        saved = {}

        def save(case, row):
            saved[row["provider"], row["mode"]] = row

        return processes.run(
            [Piece([case(providers, modes=("fwd", "bwd"), threads=1)], session, save)], **options
        ), saved

    return start


def test_one_that_dies_in_its_second_mode_keeps_its_first_and_the_others_have_both(run):
    calls = []

    def second_is_the_last(grad):
        calls.append(grad)  # the first is the comparison's
        if len(calls) > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def dies_in_the_backward(x):
        out = x * x
        if out.requires_grad:
            out.register_hook(second_is_the_last)
        return out * 1

    late, saved = run({"bad": dies_in_the_backward, "power": lambda x: x**2})
    assert late == [] and len(saved) == 6
    for (provider, mode), row in saved.items():
        died = (provider, mode) == ("bad", "bwd")
        assert row["problem"] == ("killed by SIGKILL" if died else ""), (provider, mode)
        assert row["threads"] == 1 and (row["ms_p50"] is None) is died
        assert (row["times_baseline"] is None) is died


def test_when_the_time_is_over_what_still_runs_is_late_and_no_failure(run):
    start = time.monotonic()
    late, saved = run({"slow": lambda x: time.sleep(60)}, end=start + 2)
    assert time.monotonic() - start < 20 and [piece.cases[0].op for piece in late] == ["square"]
    assert not saved


def test_nothing_starts_after_its_time(run):
    late, saved = run({}, start_until=time.monotonic() - 1)
    assert len(late) == 1 and not saved


def test_what_goes_on_is_what_lacks_a_row_without_the_one_that_died():
    """A provider without the mode "bwd" is complete once it has its row of "fwd"."""
    saved = []
    providers = {"compiled reduce-overhead": square, "bad": square}
    first, later = case(providers, modes=("fwd", "bwd")), case({}, "later")
    session = Session(machine.facts("cpu"), "")
    piece = Piece(
        [first, later], session, lambda case, row: saved.append((row["provider"], row["mode"], row["problem"]))
    )
    for name in first.providers:
        piece.hear("row", {"provider": name, "mode": "fwd", "problem": ""})
    piece.hear("doing", "bad")
    rest = piece.died("killed by SIGSEGV")
    assert saved[3:] == [("bad", "bwd", "killed by SIGSEGV")]
    assert [list(one.providers) for one in rest.cases] == [["eager"], ["eager"]] and rest.cases[1].shape == "later"
    piece.hear("case", None)
    piece.hear("case", None)
    assert piece.died("killed by SIGKILL") is None  # it had done all
