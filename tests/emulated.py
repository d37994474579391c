"""A plugin for pytest: kernels run as compiled code in ptxemu, with the configurations that a GPU would get.

    PYTHONPATH=.:../shared python -m pytest -p tests.emulated tests/ops/test_masked_conv2d_tiles.py

PTXEMU_ARCH=80 (the default) or 90. ptxemu and what it finds: ../shared/ptxemu/README.md.
"""

import os
import re
import types

os.environ["PTXEMU_LIKE"] = "interpreter"  # what the library decides as on a GPU is set below
ARCH = int(os.environ.get("PTXEMU_ARCH", "80"))

pytest_plugins = ["ptxemu.plugin"]

TABLE = re.compile(r"^[ \t]*(\S+):\s*\.branchtargets([^;]*);(\s*)brx\.idx(?:\.uni)?\s+(%\w+),\s*\1;", re.MULTILINE)


def in_known_instructions(ptx):
    """PTX without those that ptxemu does not know: a comparison and a branch for every target of a jump table; an
    exact reciprocal, which is what Newton's steps after the approximate one come to."""

    def chain(found):
        _, targets, between, index = found.groups()
        jumps = (
            f"setp.eq.u32 %is_target, {index}, {number};\n@%is_target bra {target.strip()};"
            for number, target in enumerate(targets.split(","))
        )
        return between + "\n".join(jumps)

    found, count = TABLE.subn(chain, ptx.replace("rcp.approx.ftz.f64", "rcp.rn.f64"))
    return found.replace("\t.reg ", "\t.reg .pred %is_target;\n\t.reg ", 1) if count else ptx


def pytest_configure(config):
    from ptxemu import emulator

    from fastgen.kernels.lstm import choice, diagonal, row, tiles
    from fastgen.kernels.masked_conv2d import config as masked_conv2d
    from fastgen.sampling.run import gpu_player

    load = emulator.load
    emulator.load = lambda ptx: load(in_known_instructions(ptx))
    masked_conv2d.EMULATED = f"sm_{ARCH}"
    processors = {80: 108, 90: 132}.get(ARCH, 64)
    arithmetic = choice.arithmetic
    as_on_a_gpu = {
        "arithmetic": lambda x: arithmetic(types.SimpleNamespace(is_cuda=True, dtype=x.dtype)),
        "processors_of": lambda device: processors,
        "generation_of": lambda device: ARCH // 10,
        "precision_on": lambda device: "tf32x3",
    }
    for module in (choice, diagonal, row, tiles, gpu_player):
        for name, replacement in as_on_a_gpu.items():
            if hasattr(module, name):
                setattr(module, name, replacement)
