"""Tasks in their own processes: their results or failures, and that none outlives the parent."""

import os
import signal
import time

import pytest

from benchmarks.harness import processes
from benchmarks.harness.processes import Child, Task


def test_what_a_process_answers_or_why_not():
    assert processes.in_a_process(lambda: 6 * 7) == 42

    def refuse():
        raise ValueError("there is none")

    with pytest.raises(ValueError, match=r"^there is none$"):
        processes.in_a_process(refuse)
    with pytest.raises(ValueError, match="killed by SIGKILL"):
        processes.in_a_process(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match="no result within 0 s"):
        processes.in_a_process(lambda: time.sleep(60), patience=0.2)


class Asleep(Task):
    def work(self, tell):
        time.sleep(60)


class Parent(Task):
    """Starts a child and is killed."""

    def work(self, tell):
        tell("child", Child(Asleep()).process.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, kind, news):
        self.child = news


def test_children_end_with_their_parent():
    parent = Parent()
    processes.run([parent])
    end = time.monotonic() + 10
    while time.monotonic() < end and _state(parent.child) != "Z":
        time.sleep(0.05)
    assert _state(parent.child) == "Z"


def _state(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
