"""Builds the step machine with the system's C++ compiler, once for every processor and compiler, and loads it."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fastgen.files import make_folder, write_atomically

SOURCE = Path(__file__).with_name("machine.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
LIMIT_S = 120


@dataclass(frozen=True)
class Machine:
    """Attributes:
    run: (program, offsets, threads), pointers as integers -> whether a lookup has missed: one program.
    play: (play, first place, last place) -> place, or -1: draws and steps, see machine.cpp.
    ops: number of every operation by its name.
    panel: columns that a packed panel of weights has.
    built: how it came to be, for people.
    """

    run: "ctypes._NamedFuncPointer"
    play: "ctypes._NamedFuncPointer"
    ops: dict[str, int]
    panel: int
    built: str


class NoMachine(Exception):
    """There is no compiler, or it fails; the text says why."""


@functools.cache
def machine() -> Machine:
    """The machine. Raises NoMachine."""
    compiler = os.environ.get("CXX", "c++")
    source = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.h"))) + SOURCE.read_bytes()
    # What the compiler defines tells its version and the processor.
    facts = _compiler([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(b"\0".join([source, facts, " ".join(FLAGS).encode()])).hexdigest()[:16]
    folder = Path(os.environ.get("FASTGEN_MACHINE") or Path.home() / ".cache" / "fastgen" / "machine")
    path, built = folder / f"{key}.so", "compiled in an earlier run"
    if not path.exists():
        started = time.perf_counter()
        path = Path(tempfile.mkdtemp(prefix="fastgen-")) / path.name
        _compiler([compiler, *FLAGS, str(SOURCE), "-o", str(path)])
        built = f"compiled in {time.perf_counter() - started:.1f} s"
        try:
            make_folder(folder)
            write_atomically({folder / path.name: path.read_bytes()})
        except (OSError, ValueError):
            built += f", not kept, since {folder} cannot be written to"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoMachine(f"the compiled machine does not load: {error}") from error
    library.fastgen_ops.restype = ctypes.c_char_p
    library.fastgen_panel.restype = ctypes.c_int64
    library.fastgen_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.fastgen_run.restype = ctypes.c_int64
    library.fastgen_play.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.fastgen_play.restype = ctypes.c_int64
    ops = {one: k for k, one in enumerate(library.fastgen_ops().decode().split())}
    return Machine(library.fastgen_run, library.fastgen_play, ops, library.fastgen_panel(), built)


def _compiler(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=True)
    except FileNotFoundError as error:
        raise NoMachine(f"there is no C++ compiler {command[0]!r} (the variable CXX names another)") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise NoMachine(f"{command[0]} fails: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise NoMachine(f"{command[0]} takes more than {LIMIT_S} s") from error
    return done.stdout
