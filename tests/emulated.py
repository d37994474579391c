"""A plugin for pytest: kernels run as compiled code in ptxemu, with the configurations that a GPU would get.

    PYTHONPATH=.:../shared python -m pytest -p tests.emulated tests/ops/test_masked_conv2d_tiles.py

PTXEMU_ARCH=80 (the default) or 90. ptxemu and what it finds: ../shared/ptxemu/README.md.
"""

import os
import types

os.environ["PTXEMU_LIKE"] = "interpreter"  # what the library decides as on a GPU is set below
ARCH = int(os.environ.get("PTXEMU_ARCH", "80"))

pytest_plugins = ["ptxemu.plugin"]


def pytest_configure(config):
    from fastgen.kernels.lstm import choice, diagonal, row, tiles
    from fastgen.kernels.masked_conv2d import config as masked_conv2d

    masked_conv2d.EMULATED = f"sm_{ARCH}"
    processors = {80: 108, 90: 132}.get(ARCH, 64)
    arithmetic = choice.arithmetic
    as_on_a_gpu = {
        "arithmetic": lambda x: arithmetic(types.SimpleNamespace(is_cuda=True, dtype=x.dtype)),
        "processors_of": lambda device: processors,
        "generation_of": lambda device: ARCH // 10,
    }
    for module in (choice, diagonal, row, tiles):
        for name, replacement in as_on_a_gpu.items():
            if hasattr(module, name):
                setattr(module, name, replacement)
