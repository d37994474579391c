"""Properties of all cases at every size, and of some cases in particular."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import cases
from benchmarks.cases import sampling
from benchmarks.harness import machine
from benchmarks.harness.case import SIZES
from benchmarks.harness.launches import catalogue
from benchmarks.harness.runner import measure
from benchmarks.harness.session import Session

CPU = torch.device("cpu")


def test_every_benchmark_has_a_place_in_the_order():
    assert sorted(cases.ON_A_GPU) == sorted((*cases.ON_A_CPU, "probes"))
    assert sorted(cases.NAMES) == sorted((*cases.ON_A_GPU, "launches"))


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_size_is_stated(name):
    for size in SIZES:
        found = cases.load(name, size, CPU)
        assert found and len({(case.op, case.shape, case.dtype) for case in found}) == len(found)
        assert found[0].op == name  # a file may hold more that belongs to it, as whole layers do


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in Triton's interpreter
def test_the_launches_are_right_and_launch_every_kernel_but_those_of_some_chips_and_sizes():
    """At toy size, in the interpreter. Other kernels need some chip, or sizes that are too large here."""
    pytest.importorskip("triton")
    session = Session(machine.facts("cpu"), "", timing=False)
    found = [row for case in cases.load("launches", "toy", CPU) for row in measure(case, session)]
    assert {row["verdict"] for row in found} == {"correct"}
    launched = {kernel for row in found for kernel in row["launched"]}
    every = set(catalogue())
    others = {name for name in every if "tiles" in name or "tma" in name}
    others |= {"reparameterize_kl_sum_kernel"}
    assert others >= every - launched


def off(play, *arguments):
    """A step machine whose weights are 1 % too large."""
    tensors, *rest = arguments
    play((*tensors[:2], 1.01 * tensors[2], *tensors[3:]), *rest)


def crash(play, *arguments):
    play(*arguments)
    raise RuntimeError("CUDA error: misaligned address")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("fault", "verdict", "died_in"), [(off, "wrong", None), (crash, "dead", "step_machine_kernel")]
)
def test_a_fault_of_the_step_machine_is_seen(fault, verdict, died_in, monkeypatch):
    """The fault is found, although a whole pass of the model corrects the images."""
    pytest.importorskip("triton")
    from fastgen.sampling.run import gpu_player

    monkeypatch.setattr(gpu_player, "play", functools.partial(fault, gpu_player.play))
    (case,) = (case for case in cases.load("launches", "toy", CPU) if "step machine" in case.shape)
    (row,) = measure(case, Session(machine.facts("cpu"), "", timing=False))
    assert (row["verdict"], row["died_in"], row["launched"]) == (verdict, died_in, ["step_machine_kernel"])


def test_a_step_machine_that_is_not_played_is_no_success(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (case,) = (case for case in cases.load("launches", "toy", CPU) if "step machine" in case.shape)
    with pytest.warns(UserWarning, match="falls back from the persistent"):
        (row,) = measure(case, Session(machine.facts("cpu"), "", timing=False))
    assert row["verdict"] == "dead" and "not played by persistent" in row["problem"]


# Without those that take seconds for a pass here, and without mixtures, which have no logits of levels.
JOBS = [job for size in ("toy", "cpu", "gpu") for job in sampling.JOBS[size] if job[1] != (3, 32, 32)]
JOBS = [job for job in JOBS if job[0] is not sampling.plus_plus]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_sampling_is_measured_on_logits_that_spread(job):
    """With nearly equal logits rounding would never change a draw, and no image would be drawn again."""
    build, shape, levels, size, _ = job
    inputs = sampling._inputs(CPU, (build, shape, levels, size, 1))
    assert sampling.spread_of(inputs["model"](inputs["x"])) >= 1.5


def test_sampling_has_every_model_at_every_batch():
    found = {(build.__name__, shape, levels, batch) for build, shape, levels, _, batch in sampling.JOBS["gpu-full"]}
    models = [(name, (1, 28, 28), levels) for name in ("GatedPixelCNN", "PixelCNN") for levels in (2, 256)]
    models += [(name, (3, 32, 32), 256) for name in ("PixelCNN", "PixelCNNPP")]
    models += [("PixelRNN", (1, 28, 28), 2), ("TransformerPrior", (1, 16, 16), 512)]
    assert found >= {(*model, batch) for model in models for batch in (1, 16, 256, 1024, 4096)}
    rivals = {"naive", "naive, compiled", "eager", "fixed_point", "fastgen", "fastgen, persistent"}
    assert all(rivals <= {*case.providers} for case in sampling.cases("gpu-full", CPU))


def test_a_model_is_analysed_once_a_backend_and_only_where_that_runs(monkeypatch):
    asked = []
    make = sampling.accelerate
    monkeypatch.setattr(
        sampling, "accelerate", lambda *a, backend, **o: asked.append(backend) or make(*a, backend=backend, **o)
    )
    case = cases.load("sampling", "toy", CPU)[0].without("compiled")
    rows = {row["provider"]: row for row in measure(case, Session(machine.facts("cpu"), "", budget=0.0))}
    assert sorted(asked) == ["auto", "eager", "fixed_point", "naive"]
    assert rows["naive"]["share"] == 1 / 4 and rows["fastgen"]["share"] is None
    assert rows["fastgen"]["error"] == 0 and rows["fastgen"]["work_ratio"] >= 1
    asked.clear()
    measure(case.only(["one forward pass", "fastgen"]), Session(machine.facts("cpu"), "", timing=False))
    assert asked == ["naive", "auto"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.cases import probe_kernels as k
f, i = "*fp32", "i32"
for kernel, signature, constants in (
    (k.add_one, {"x_ptr": f}, {"SIZE": 32}),
    (k.pass_to_the_neighbour, {"x_ptr": f, "arrived_ptr": "*i32", "parts": i, "programs": i}, {}),
    (k.instructions, {"x_ptr": "*bf16", "weights_ptr": "*bf16", "parts": i}, {"ROWS": 16, "K": 128, "DISTINCT": 24}),
):
    constexprs = {name: "constexpr" for name in constants}
    source = ASTSource(kernel, signature | constexprs, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(kernel.__name__, compiled.asm["ptx"].count("bar.sync"), compiled.asm["ptx"].count("mma.sync"))
"""


def test_the_probes_compile_for_a_gpu():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=machine.ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = {name: (int(bars), int(products)) for name, bars, products in map(str.split, done.stdout.splitlines())}
    assert found["pass_to_the_neighbour"][0] >= 2 and found["instructions"][0] >= 2 and found["instructions"][1] > 0
