"""The compile gate: compiles every kernel for every target without a GPU, and fails on what must not ship.

    python -m fastgen.kernels.catalogue [--target sm_90] [--kernel NAME] [--json]

Prints registers a thread, bytes of local memory a thread (spills) and shared memory a block of every entry of every
`CATALOGUE`. Exit status 1 names each problem: a kernel that is launched and in no catalogue, an entry that does not
compile, spills beyond its allowance, has more barriers than its allowance, needs more shared memory than the chip has,
lacks an instruction that it should have, or whose wgmma products ptxas serializes. Exit status 2: the gate itself could
not run.
"""

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

PACKAGE = __package__ or "fastgen.kernels"


@dataclass(frozen=True)
class Target:
    """A chip to compile for; `shared_limit` is the shared memory (LDS) that one block may use, in bytes."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = (  # CUDA C++ Programming Guide, table of technical specifications per compute capability; CDNA 3 ISA guide
    Target("sm_80", "cuda", 80, 32, 163 * 1024),
    Target("sm_86", "cuda", 86, 32, 99 * 1024),
    Target("sm_89", "cuda", 89, 32, 99 * 1024),
    Target("sm_90", "cuda", 90, 32, 227 * 1024),
    Target("sm_100", "cuda", 100, 32, 227 * 1024),
    Target("sm_120", "cuda", 120, 32, 99 * 1024),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
)


@dataclass
class Resources:
    """One row of the table: what a compiled kernel takes of one chip, and what is wrong with it."""

    module: str
    kernel: str
    config: str
    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    barriers: int = 0
    problem: str = ""


def kernel_modules(package: str = PACKAGE) -> list[ModuleType]:
    """Every module of the kernels package (subpackages included) but the gate itself."""
    root = importlib.import_module(package)
    names = [info.name for info in pkgutil.walk_packages(root.__path__, f"{package}.")]
    own = {f"{PACKAGE}.catalogue", f"{PACKAGE}.catalogue_entry"}
    return [importlib.import_module(name) for name in names if name not in own]


def _resolve(expression: ast.expr, scope: dict) -> Any:
    """The object that `name` or `module.name` stands for at module level, None for anything else."""
    if isinstance(expression, ast.Name):
        return scope.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(_resolve(expression.value, scope), expression.attr, None)
    return None


def launched_kernels(modules: list[ModuleType]) -> list[Any]:
    """The Triton functions of `modules` that are kernels: launched as `kernel[grid](...)` by name somewhere, or called
    by no other Triton function (so that a kernel launched through a variable is found too)."""
    from triton.runtime.jit import JITFunction

    def is_jit(value: Any) -> bool:
        return isinstance(value, JITFunction)

    functions = {id(f): f for m in modules for f in vars(m).values() if is_jit(f) and f.fn.__module__ == m.__name__}
    called, launched = set(), set()
    for function in functions.values():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                called.add(id(_resolve(node, function.fn.__globals__)))
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(id(_resolve(node.func.value, vars(module))))
    return [function for key, function in functions.items() if key in launched or key not in called]


def compile_entry(module_name: str, index: int, target: Target) -> Resources:
    """Compiles one entry for one target; a failure is a row with a problem."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = importlib.import_module(module_name).CATALOGUE[index]
    row = Resources(module_name, entry.kernel.__name__, entry.config, target.name)
    try:
        signature, hints = entry.arguments()
        compiled = triton.compile(
            ASTSource(entry.kernel, signature, dict(entry.constexprs), hints),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options={"num_warps": entry.num_warps, "num_stages": entry.num_stages, **entry.options},
        )
        row.shared = compiled.metadata.shared
        read = _read_cubin if target.backend == "cuda" else _read_amdgcn
        static_shared = read(compiled, row)
        serialized = _serialized(compiled, target)
        row.barriers = compiled.asm.get("ptx", "").count("bar.sync")
    except Exception as error:  # the compiler raises many kinds: any of them is a finding, not a crash
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        row.problem = f"does not compile: {type(error).__name__}: {lines[-1].strip()}"
        return row
    row.shared = max(row.shared, static_shared)
    required = entry.requires.get(target.name, "")
    problems = []
    if row.spills > entry.spills.get(target.name, 0):
        problems.append(f"{row.spills} bytes of spills, allowed {entry.spills.get(target.name, 0)}")
    if row.shared > target.shared_limit:
        problems.append(f"{row.shared} bytes of shared memory, the chip has {target.shared_limit}")
    if row.barriers > entry.barriers.get(target.name, row.barriers):
        problems.append(f"{row.barriers} barriers, allowed {entry.barriers[target.name]}")
    assembly = _assembly(compiled, target) if required else ""
    problems += [f"no {text} instruction" for text in required.split() if text not in assembly]
    row.problem = "; ".join(problems + serialized)
    return row


def _assembly(compiled: Any, target: Target) -> str:
    if target.backend == "hip":
        return compiled.asm["amdgcn"]
    return compiled.asm["ptx"] + _dumped(compiled, "-sass")  # Triton's own "sass" ends after 4096 instructions


def _dumped(compiled: Any, what: str) -> str:
    """What Triton's `cuobjdump` tells about machine code of NVIDIA's chips."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _serialized(compiled: Any, target: Target) -> list[str]:
    """What ptxas says where it makes wgmma wait after each product (C7510 and its neighbours): half the speed is lost.

    Triton runs ptxas without showing what it says. Often the cause is a loop that might not run: `tl.assume(n > 0)`.
    """
    if target.backend != "cuda" or "wgmma.mma_async" not in compiled.asm["ptx"]:
        return []
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(compiled.asm["ptx"])
        command = [
            get_ptxas(int(target.arch)).path,
            f"--gpu-name=sm_{target.arch}a",
            source,
            "-o",
            os.path.join(folder, "kernel.cubin"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"C75\d\d\b[^\n]*?serialized[^\n']*", report.stdout + report.stderr)))


def _read_cubin(compiled: Any, row: Resources) -> int:
    """Registers and local memory from the machine code. Returns the static shared memory."""
    report = _dumped(compiled, "--dump-resource-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    if usage is None:
        raise RuntimeError(f"no resource usage in the report of cuobjdump: {report!r}")
    registers, stack, shared, local = map(int, usage.groups())
    row.registers, row.spills = registers, stack + local
    return shared


def _read_amdgcn(compiled: Any, row: Resources) -> int:
    """The same for AMD, from the metadata in the assembly. Returns the static LDS."""
    metadata = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"])}
    row.registers, row.spills = metadata["vgpr_count"], metadata["private_segment_fixed_size"]
    return metadata["group_segment_fixed_size"]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.catalogue", description=__doc__.split("\n")[0])
    names = [target.name for target in TARGETS]
    parser.add_argument("--target", action="append", choices=names, help="only this target (may be repeated)")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print rows and problems as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--package", default=PACKAGE, help="the package to check (default %(default)s)")
    return parser.parse_args(argv)


def _print_table(rows: list[Resources], targets: list[Target]) -> None:
    """A line an entry, a column a target: registers / spilled bytes / shared memory in KiB."""
    entries: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in rows:
        entries.setdefault((row.kernel, row.config), {})[row.target] = row
    width = max([len(kernel) + len(config) + 2 for kernel, config in entries] + [6])
    print(f"{'kernel':<{width}}" + "".join(f"{target.name:>14}" for target in targets))
    for (kernel, config), by_target in entries.items():
        cells = []
        for target in targets:
            cell = by_target.get(target.name)
            shown = "-" if cell is None else f"{cell.registers}/{cell.spills}/{cell.shared / 1024:.3g}"
            cells.append(shown + ("!" if cell is not None and cell.problem else ""))
        print(f"{kernel + '[' + config + ']':<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    print(
        "registers a thread / spilled bytes a thread / shared memory a block in KiB; - not launched there; ! a problem"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    # The gate compiles: the interpreter, where it is chosen in the environment, must be off before kernels are defined.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton
    except ImportError:
        print("the compile gate needs Triton (pip install triton); it is published for Linux only", file=sys.stderr)
        return 2
    modules = kernel_modules(arguments.package)
    targets = [target for target in TARGETS if not arguments.target or target.name in arguments.target]
    problems = []
    entries = [
        (module.__name__, i, entry) for module in modules for i, entry in enumerate(getattr(module, "CATALOGUE", []))
    ]
    listed = {id(entry.kernel) for _, _, entry in entries}
    for kernel in launched_kernels(modules):
        if id(kernel) not in listed:
            problems.append(f"{kernel.fn.__module__}.{kernel.__name__}: not in the catalogue of its module")
    jobs = [
        (name, index, target)
        for name, index, entry in entries
        for target in targets
        if target.name not in entry.skips and (arguments.kernel or "") in entry.kernel.__name__
    ]
    with ProcessPoolExecutor(max(arguments.jobs, 1), multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(compile_entry, *zip(*jobs, strict=True))) if jobs else []
    problems += [f"{row.kernel}[{row.config}] on {row.target}: {row.problem}" for row in rows if row.problem]
    if arguments.json:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "problems": problems}
        print(json.dumps(report, indent=1))
    else:
        _print_table(rows, targets)
        print(f"{len(rows)} compilations with Triton {triton.__version__}, {len(problems)} problem(s)")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
