"""The machine, the software and the source that a row was measured with."""

import ast
import functools
import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
SMI_FIELDS = (
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "ecc.mode.current",
    "mig.mode.current",
    "clocks_throttle_reasons.active",
)


def _output(*command: str) -> str:
    """What the command prints, "" where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _smi(device: torch.device, *fields: str) -> list[str]:
    # By UUID: nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # older versions of torch do not say it
    query = ("nvidia-smi", "--format=csv,noheader", "-i", "0" if uuid is None else f"GPU-{uuid}")
    values = [value.strip() for value in _output(*query, f"--query-gpu={','.join(fields)}").split(",")]
    if len(values) == len(fields) and all(values):
        return values
    # One field that this driver does not know makes the whole query fail.
    return [_output(*query, f"--query-gpu={field}") or "unknown" for field in fields]


def power_state(device: torch.device) -> dict[str, str]:
    """Clocks, temperature and power as read now, as a record of how steady they were; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return dict(zip(SMI_FIELDS, _smi(device, *SMI_FIELDS), strict=True))


@functools.cache
def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """Fields of every row of a run: hardware and versions. `gpu` is None where none was used."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _smi(device, "driver_version")[0] if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if cuda else None,
        "commit": commit(),
    }


def folder_name(device: torch.device) -> str:
    """Name of the results folder: the GPU, or the CPU after "cpu-"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{cpu_name()}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


@functools.cache
def commit() -> str:
    """The commit of the checkout, with "+changes" where tracked files differ from it; results do not count.

    In a copy without its history, the environment variable FASTGEN_COMMIT says which commit it was made of.
    """
    found = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (found + "+changes" if changed else found) or os.environ.get("FASTGEN_COMMIT") or "unknown"


@functools.cache
def _imports(file: Path) -> list[str]:
    """Modules of the kernels package that a module of it imports."""
    tree = ast.parse(file.read_text())
    names = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module == "fastgen.kernels":
            names += [alias.name for alias in node.names]
        elif (node.module or "").startswith("fastgen.kernels."):
            folder = "/".join(str(node.module).split(".")[2:])
            names += [folder, *(f"{folder}/{alias.name}" for alias in node.names)]
    return [name for name in names if name != "catalogue_entry" and (KERNELS / f"{name}.py").exists()]


def sources(modules: tuple[str, ...]) -> list[str]:
    """The modules and those of the kernels package that they import, sorted after the first."""
    found, waiting = list(modules), list(modules)
    while waiting:
        new = [name for name in _imports(KERNELS / f"{waiting.pop()}.py") if name not in found]
        found += new
        waiting += new
    return found[:1] + sorted(found[1:])


def kernel_sha256(modules: list[str]) -> str | None:
    """sha256 of the kernels' source: of the one file, or of all of them one after the other. None: a file is gone."""
    if not modules or any(not (KERNELS / f"{name}.py").exists() for name in modules):
        return None
    digest = hashlib.sha256()
    for name in modules:
        digest.update((KERNELS / f"{name}.py").read_bytes())
    return digest.hexdigest()


@functools.cache
def source_sha256() -> str:
    """sha256 of all Python source of the library, the kernels and the benchmarks: tells copies of one commit apart."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "fastgen", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def lost(device: torch.device) -> bool:
    """Whether the GPU answers nothing more in this process, as after an illegal memory access."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
