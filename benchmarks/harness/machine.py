"""The machine, the software versions and the source that a row was measured with."""

import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
SMI_FIELDS = (
    *("pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit"),
    *("ecc.mode.current", "mig.mode.current", "clocks_event_reasons.active"),
)


def _output(*command: str) -> str:
    """The output of a command; "" if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _smi(*fields: str) -> list[str]:
    # The GPU is named by UUID: nvidia-smi numbers all GPUs, torch only those in CUDA_VISIBLE_DEVICES.
    uuid = getattr(torch.cuda.get_device_properties("cuda"), "uuid", None)  # missing in older versions of torch
    query = ("nvidia-smi", "--format=csv,noheader", "-i", "0" if uuid is None else f"GPU-{uuid}")
    values = [value.strip() for value in _output(*query, f"--query-gpu={','.join(fields)}").split(",")]
    return values if len(values) == len(fields) and all(values) else ["unknown"] * len(fields)


def power_state(device: torch.device) -> dict[str, str]:
    """Current clocks, temperature and power, which show whether the GPU was throttled; empty on a CPU."""
    return dict(zip(SMI_FIELDS, _smi(*SMI_FIELDS), strict=True)) if device.type == "cuda" else {}


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model_name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model_name.group(1).strip() if model_name else platform.processor() or platform.machine()


def allow_tf32(allowed: bool = True) -> None:
    """Allows or forbids TF32 in all float32 products of convolutions and matrices, of rivals and of fastgen. It reads
    no setting: torch's older getters raise if a newer setter was used."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def gpu() -> str | None:
    return torch.cuda.get_device_name("cuda") if torch.cuda.is_available() else None


def facts(kind: str | None = None) -> dict[str, Any]:
    """The fields of every row about hardware, versions and source. `gpu` is None if no GPU is used.

    Args:
        kind: "cpu", "cuda", or None for the GPU if there is one.

    Raises:
        ValueError: a GPU is asked for, and torch finds none.
    """
    name = None if kind == "cpu" else gpu()
    if kind == "cuda" and name is None:
        raise ValueError("--device cuda: torch finds no CUDA GPU")
    triton = importlib.util.find_spec("triton")
    return {
        "gpu": name,
        "driver": _smi("driver_version")[0] if name else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if name else None,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if triton else None,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "commit": commit(),
        "source_sha256": source_sha256(),
    }


def folder_name(row: dict[str, Any]) -> str:
    """The folder of a row (or of `facts`): the name of the GPU, or of the CPU after "cpu-"."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", row["gpu"] or f"cpu-{row['cpu']}").strip("-")


def commit() -> str:
    """The commit of the checkout, with "+changes" if tracked files other than results differ from it.

    For a copy without history, it is the value of the environment variable FASTGEN_COMMIT, or "unknown".
    """
    head = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (head + "+changes" if changed else head) or os.environ.get("FASTGEN_COMMIT") or "unknown"


def source_sha256() -> str:
    """sha256 of all Python source of the library, the kernels and the benchmarks. It identifies copies without
    history."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "fastgen", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def kernel_sha256(modules: Iterable[str]) -> str | None:
    """sha256 of all source that the kernels in these modules (e.g. "vae/reparameterize_kl") can depend on: the folders
    of their families, and the files that all families share. None if a module no longer exists, or there are none."""
    files = [KERNELS / f"{module}.py" for module in modules]
    if not files or not all(file.exists() for file in files):
        return None
    folders = {KERNELS, *(file.parent for file in files)}
    source = sorted(file for folder in folders for file in folder.glob("*.py") if "catalogue" not in file.name)
    return hashlib.sha256(b"".join(file.read_bytes() for file in source)).hexdigest()


def lost(device: torch.device) -> bool:
    """Whether this process can no longer use the GPU, for example after an illegal memory access."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False
