"""How the step machine is built: once, and with a word where it fails."""

import pytest

from fastgen.sampling.machine.cpu.build import NoMachine, machine


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    machine.cache_clear()
    try:
        with pytest.raises(NoMachine, match="false fails: no message"):
            machine()
    finally:
        machine.cache_clear()


def test_the_machine_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGEN_MACHINE", str(tmp_path / "kept"))
    machine.cache_clear()
    try:
        assert machine().built.startswith("compiled in") and "run" not in machine().built
        machine.cache_clear()
        assert machine().built == "compiled in an earlier run"
        assert len(list((tmp_path / "kept").iterdir())) == 1
    finally:
        machine.cache_clear()
