"""The compile gate finds each kind of problem in a package made to have them, and nothing wrong with the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

KERNELS = {
    "copying": """
@triton.jit
def twice(x):
    return x + x

@triton.jit
def copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, twice(tl.load(x_ptr + i, i < size)), i < size)

CATALOGUE = [Entry(copy_kernel, "fp32", {"x_ptr": "*fp32", "out_ptr": "*fp32", "size": "i32"}, {"BLOCK": 1024})]
""",
    "unlisted": """
@triton.jit
def forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)

@triton.jit
def both_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

@triton.jit
def outer_kernel(x_ptr):
    both_kernel(x_ptr)

def launch(x):
    both_kernel[(1,)](x)

CATALOGUE = [Entry(outer_kernel, "fp32", {"x_ptr": "*fp32"})]
""",
    "greedy": """
@triton.jit
def dot_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, tl.trans(x)))

def entry(config, block, warps, **more):
    return Entry(dot_kernel, config, {"x_ptr": "*fp16", "out_ptr": "*fp32"}, {"BLOCK": block}, num_warps=warps, **more)

CATALOGUE = [
    entry("spills", 128, 1),
    entry("spills, allowed", 128, 1, spills={"sm_90": 100000}, reason="a test"),
    entry("shared", 256, 16, spills={"sm_86": 100000}, reason="a test", skips={"sm_90": "only the smaller chip"}),
    entry("wgmma", 64, 4, requires={"sm_90": "wgmma"}),
    entry("no wgmma", 32, 4, requires={"sm_90": "wgmma"}),
    Entry(dot_kernel, "wrong arguments", {"x_ptr": "*fp16"}, {"BLOCK": 64}),
    Entry(dot_kernel, "no compile", {"x_ptr": "*fp16", "out_ptr": "fp32"}, {"BLOCK": 64}),
    entry("no reason", 64, 4, spills={"sm_90": 8}),
    entry("barriers", 64, 4, barriers={"sm_90": 0}),
    entry("barriers, allowed", 64, 4, barriers={"sm_90": 100}),
]
""",
}


def gate(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fastgen.kernels.catalogue", "--json", "--jobs", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    package = folder / "faulty_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    imports = "import triton\nimport triton.language as tl\nfrom fastgen.kernels.catalogue_entry import Entry\n"
    for name, source in KERNELS.items():
        (package / f"{name}.py").write_text(imports + source)
    found = gate(folder, "--package", "faulty_kernels", "--target", "sm_90", "--target", "sm_86")
    assert found.returncode == 1, found.stderr
    return json.loads(found.stdout)


def problem_of(report, config, target):
    return next(row["problem"] for row in report["rows"] if (row["config"], row["target"]) == (config, target))


def test_a_launched_kernel_that_is_not_listed_fails(report):
    missing = [problem for problem in report["problems"] if "not in the catalogue" in problem]
    assert len(missing) == 2
    assert "forgotten_kernel" in missing[0] and "both_kernel" in missing[1]


def test_a_healthy_kernel_passes(report):
    row = next(row for row in report["rows"] if row["kernel"] == "copy_kernel" and row["target"] == "sm_90")
    assert not row["problem"] and row["registers"] > 0 and row["spills"] == 0


@pytest.mark.parametrize(
    ("config", "target", "words"),
    [
        ("spills", "sm_90", "bytes of spills, allowed 0"),
        ("shared", "sm_86", "bytes of shared memory, the chip has 101376"),
        ("no wgmma", "sm_90", "no wgmma instruction"),
        ("wrong arguments", "sm_90", "missing ['out_ptr']"),
        ("no compile", "sm_90", "does not compile"),
        ("no reason", "sm_90", "without a reason"),
        ("barriers", "sm_90", "barriers, allowed 0"),
    ],
)
def test_each_fault_is_named(report, config, target, words):
    assert words in problem_of(report, config, target)
    assert any(f"[{config}] on {target}" in problem for problem in report["problems"])


@pytest.mark.parametrize("config", ["spills, allowed", "wgmma", "barriers, allowed"])
def test_what_is_allowed_or_present_passes(report, config):
    assert problem_of(report, config, "sm_90") == ""


def test_a_target_to_skip_has_no_row(report):
    assert not any(row["config"] == "shared" and row["target"] == "sm_90" for row in report["rows"])


def test_the_real_kernels_are_all_in_the_catalogue():
    found = gate(ROOT, "--kernel", "no kernel has this name")
    assert found.returncode == 0, found.stderr


def test_wrong_usage_is_status_2():
    assert gate(ROOT, "--target", "sm_1").returncode == 2


def test_make_gate_takes_another_triton(tmp_path):
    """One that cannot be imported says that it is the one."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('the other')")
    command = ["make", "--old-file=setup", "gate", f"TRITON={tmp_path}", f"RUN={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 2 and "the compile gate needs Triton" in done.stderr


def test_what_ptxas_refuses_is_a_row(monkeypatch):
    """Of the second run, which only asks what ptxas says."""
    from fastgen.kernels import catalogue
    from fastgen.kernels.sampler import machine

    def refuse(compiled, target):
        raise subprocess.CalledProcessError(255, "ptxas")

    class Compiled:
        metadata = type("Metadata", (), {"shared": 0})

    monkeypatch.setattr("triton.compile", lambda *arguments, **options: Compiled)
    monkeypatch.setattr(catalogue, "_read_cubin", lambda compiled, row: 0)
    monkeypatch.setattr(catalogue, "_serialized", refuse)
    (target,) = (target for target in catalogue.TARGETS if target.name == "sm_90")
    row = catalogue.compile_entry(machine.__name__, 0, target)
    assert row.problem.startswith("does not compile: CalledProcessError: Command 'ptxas'")
