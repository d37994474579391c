"""fastgen doctor: what this machine has, and which kernels can run on it."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "tqdm")
OPTIONAL = {
    "scikit-learn": "the data sets digits and patches, and fastgen demo",
    "matplotlib": "training curves and reliability diagrams",
    "datasets": "the data sets hf:NAME",
    "tensorboard": "TensorBoard logs of training runs",
    "constriction": "fastgen compress and decompress",
    "huggingface_hub": "from_pretrained with a repository of the hub",
    **({"tomli": "--config (Python 3.10 has no tomllib)"} if sys.version_info < (3, 11) else {}),
}
LEAST_CAPABILITY = (8, 0)  # the oldest GPUs for which the compile gate compiles the kernels


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, and which kernels can run on it",
        description="Prints versions, GPUs, and for each kernel whether it can run here; if not, why.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen._version import __version__

    print(f"fastgen {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        print(f"  {name} {_version(name) or 'not installed'}")
    for name, purpose in OPTIONAL.items():
        print(f"  {name} {_version(name) or f'not installed (for {purpose})'}")
    print(f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for line in gpus():
        print(f"GPU: {line}")
    reason = why_no_kernels()
    print("Kernels:")
    for name, problem in kernels(reason):
        print(f"  {name}: {problem or 'can run'}")
    if reason:
        print(f'No Triton kernel runs here: {reason}. impl="auto" runs the PyTorch definitions, with the same results.')
    elif torch.cuda.is_available():
        from fastgen.kernels.masked_conv2d.config import describe

        print(describe(torch.cuda.get_device_name()))
    else:
        print('TRITON_INTERPRET=1 is set: impl="triton" runs the kernels on CPU tensors in Triton\'s interpreter')
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[str]:
    """One line for each GPU that torch finds, or one line that says why there is none."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return [f"none: torch {torch.__version__} is built for CPUs"]
        return [f"none: torch {torch.__version__} finds no GPU or no driver"]
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        lines.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}, CUDA {torch.version.cuda}")
    return lines


def why_no_kernels() -> str:
    """The reason why no kernel can run on this machine; "" if kernels can run."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it is published for Linux)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU (with TRITON_INTERPRET=1 kernels run on the CPU in Triton's interpreter, slowly)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected at least 8.0"
    return ""


def kernels(reason: str) -> list[tuple[str, str]]:
    """(FAMILY.NAME of a kernel, the reason why it cannot run here or "") for each kernel. Without Triton kernels cannot
    be listed, so that there is one entry for each family.

    Args:
        reason: what `why_no_kernels` returned.
    """
    from fastgen import kernels as package

    if importlib.util.find_spec("triton") is None:
        files = [file for folder in package.__path__ for file in Path(folder).glob("*/*.py")]
        families = {file.parent.name for file in files if "@triton.jit" in file.read_text()}
        return [(family, "no Triton") for family in sorted(families)]
    short = reason.partition(" (")[0]
    lines = []
    for full in sorted(info.name for info in pkgutil.walk_packages(package.__path__, "fastgen.kernels.")):
        name = full.split(".")[2]
        try:
            module = importlib.import_module(full)
        except Exception as error:  # any error in defining a kernel is reported, not raised
            lines.append((name, f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"))
            continue
        entries: dict[str, list[Any]] = {}
        for entry in getattr(module, "CATALOGUE", []):
            entries.setdefault(entry.kernel.__name__, []).append(entry)
        lines += [(f"{name}.{kernel}", short or _skipped(configs)) for kernel, configs in entries.items()]
    return lines


def _skipped(entries: list[Any]) -> str:
    """The reason why a kernel is never launched on this GPU; "" if it is."""
    import torch

    if not torch.cuda.is_available():
        return ""  # the interpreter runs all kernels
    target = "gfx942" if torch.version.hip else "sm_{}{}".format(*torch.cuda.get_device_capability())
    reasons = [entry.skips.get(target, "") for entry in entries]
    return reasons[0] if all(reasons) else ""
