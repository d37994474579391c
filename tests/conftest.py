"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are defined.

`pytest -m gpu` on a GPU runs the tests marked so and all that use the fixture `device`, and saves how it went as a row.
"""

import ast
import importlib.util
import os
import sys
import time

import pytest
import torch

CUDA = torch.cuda.is_available()
WORKER = "PYTEST_XDIST_WORKER" in os.environ
PACKAGES = ("hypothesis", "mpmath", "safetensors", "PIL", "sklearn", "matplotlib")  # not on every machine with a GPU
HELD = 2e9  # bytes: what a test leaves cached beyond them goes back to the GPU
START = time.monotonic()

if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if WORKER:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="skip the tests that have not started by then")
    parser.addoption("--rows", help="folder of saved rows for `-m gpu` (default: benchmarks/results)")


def pytest_ignore_collect(collection_path):
    """A file whose imports are not installed is not collected; the header says so."""
    return bool(_missing(collection_path)) or None


def _missing(path):
    if path.suffix != ".py":
        return []
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return sorted(name for name in names & set(PACKAGES) if importlib.util.find_spec(name) is None)


def pytest_report_header(config):
    files = sorted((config.rootpath / "tests").rglob("*.py"))
    return [f"not collected: {file.name} needs {', '.join(_missing(file))}" for file in files if _missing(file)]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    if not CUDA:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        return
    # What only a GPU can show comes first; what takes tens of gigabytes runs one at a time.
    only = [item for item in items if "gpu" in item.keywords]
    others = [item for item in items if "gpu" not in item.keywords]
    items[:] = only + others
    for item in others:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
    if config.pluginmanager.hasplugin("xdist"):
        for item in only:
            if "offsets_beyond" in item.name:
                item.add_marker(pytest.mark.xdist_group("memory"))


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - START > seconds:
        from benchmarks.verify import NO_TIME

        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an illegal memory access the GPU answers nothing more in this process, and all later tests would fail. Of
    several processes this one ends, and pytest-xdist starts another; a single one stops."""
    report = yield
    if CUDA and report.failed:
        from benchmarks import machine

        if machine.lost(torch.device("cuda")):
            if WORKER:
                print(report.longreprtext, file=sys.stderr, flush=True)
                os._exit(3)
            item.session.shouldstop = f"the GPU answers nothing more after {item.nodeid}"
    return report


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if CUDA and config.option.markexpr == "gpu" and not config.option.collectonly:
        from benchmarks import verify

        verify.save(terminalreporter.stats, int(exitstatus), config)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_goes_back():
    yield
    if CUDA and torch.cuda.memory_reserved() > HELD:
        torch.cuda.empty_cache()


@pytest.fixture
def device():
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def full_memory():
    """Memory that a kernel should write starts as NaN; float32 is float32."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels_wherever_they_can(monkeypatch):
    """The masked convolution runs its kernels also where cuDNN is expected to be faster; nothing is remembered."""
    from fastgen.kernels.masked_conv2d import config, launch

    launch.forget()
    monkeypatch.setattr(config, "rule", lambda *arguments: "")
    yield
    launch.forget()
