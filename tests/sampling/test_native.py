"""The step machine: its functions against float64, its products, and where its threads wait."""

import ctypes
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.sampling.machine.cpu.build import NoMachine, machine
from fastgen.sampling.machine.cpu.encode import Part, Side, Unknown, collapsed, constant_view, translate
from fastgen.sampling.machine.cpu.link import Linker, waits
from fastgen.sampling.plan.program import Instruction, Linear, Memory, View, scratch
from fastgen.sampling.rules.kernels import Slab
from fastgen.sampling.run import cpu_player
from fastgen.sampling.run.torch_player import Run

N = 3
F32 = torch.float32


def run(parts, blocks, threads=1, slots=None, offsets=()):
    linker = Linker(machine(), N, lambda memory: blocks[id(memory)] if memory.data is None else memory.data.view(1, -1))
    codes = linker.link(parts, slots or {})
    numbers = (ctypes.c_int64 * max(1, len(offsets)))(*offsets)
    machine().run(ctypes.addressof(codes), len(codes), ctypes.addressof(numbers), threads)


def memory_of(data):
    """A block for each image that holds data (N, ...), and the view of it."""
    view = scratch(tuple(data.shape[1:]), data.dtype)
    return view, {id(view.memory): data.reshape(N, -1).clone()}


def apply(instruction, inputs, out_sizes, threads=1):
    out, blocks = memory_of(torch.full((N, *out_sizes), math.nan))
    for block in inputs:
        blocks |= block
    instruction = replace(instruction, kwargs={"out": out})
    run(translate(instruction), blocks, threads)
    return blocks[id(out.memory)].view(N, *out_sizes)


VALUES = torch.tensor(
    [0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7, 1e-3, -1e-3, 0.3, -0.34, 0.5, -0.7, 1, -1, 2.5, -9, 20, -30, 60, -87.2]
    + [88.2, 88.5, 88.7, -103, 200, -200, math.inf, -math.inf, math.nan]
)
UNARY = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "neg": torch.neg,
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "silu": torch.ops.aten.silu.out,
    "elu": torch.ops.aten.elu.out,
    "leaky_relu": torch.ops.aten.leaky_relu.out,
}


@pytest.mark.parametrize("name", UNARY)
def test_functions_are_as_near_to_the_truth_as_torch_is(name):
    x = torch.cat((VALUES, torch.linspace(-95, 95, 1000), torch.linspace(-1, 1, 1001))).expand(N, -1).contiguous()
    view, block = memory_of(x)
    found = apply(Instruction(UNARY[name], (view,), {}, None), [block], x.shape[1:])
    function = getattr(torch, name, None) or getattr(torch.nn.functional, name)
    truth, theirs = function(x.double()), function(x)
    assert torch.equal(found.isnan(), truth.isnan()) and torch.equal(found.isinf(), theirs.isinf())
    fine = truth.isfinite() & theirs.isfinite()
    bound = 4e-7 * truth.abs() + 2e-45  # three units in the last place; torch's own reach two
    if name in ("sigmoid", "silu"):
        bound = bound + 1e-36  # where exp(-x) has overflowed
    assert ((found - truth).abs() <= bound)[fine].all()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_operands_broadcast(name, threads):
    a, b = torch.randn(N, 5, 1, 70), torch.randn(N, 1, 3, 70)
    (va, ba), (vb, bb) = memory_of(a), memory_of(b)
    function = getattr(torch, name)
    found = apply(Instruction(function, (va, vb), {}, None), [ba, bb], (5, 3, 70), threads)
    assert torch.equal(found, function(a, b))
    found = apply(Instruction(function, (va, 0.3), {}, None), [ba], (5, 1, 70), threads)
    assert torch.equal(found, function(a, 0.3))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 31), (40, 32), (65, 97)])
@pytest.mark.parametrize("start", ["none", "bias", "map"])
def test_products(depth, columns, start, threads):
    x, weight = torch.randn(N, depth), torch.randn(depth, columns)
    view, block = memory_of(x)
    added, blocks = None, [block]
    truth = x.double() @ weight.double()
    if start == "bias":
        added = torch.randn(columns)
        truth += added
    elif start == "map":
        data = torch.randn(N, columns)
        added, more = memory_of(data)
        blocks.append(more)
        truth += data
    function, args = (torch.mm, (view, weight)) if added is None else (torch.addmm, (added, view, weight))
    found = apply(Instruction(function, args, {}, None), blocks, (columns,), threads)
    torch.testing.assert_close(found.double(), truth, atol=1e-6 * depth, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1))])
@pytest.mark.parametrize("inputs", [1, 5])
def test_slabs_of_convolutions(stride, dilation, inputs, channels_last):
    x, weight, bias = torch.randn(N, 1, inputs, 9, 8), torch.randn(34, inputs, 3, 2), torch.randn(34)
    order = [0, 2, 3, 1] if channels_last else [0, 1, 2, 3]
    view, block = memory_of(x.permute(0, *(1 + d for d in order)).contiguous())
    view = view.order([order.index(d) for d in range(4)])
    call = Slab(stride, dilation, 1)
    truth = torch.nn.functional.conv2d(x[:, 0].double(), weight.double(), bias.double(), stride, 0, dilation)[:, None]
    out = torch.full((N, *truth.shape[1:]), math.nan)
    target, blocks = memory_of(out.permute(0, 1, 3, 4, 2).contiguous())
    instruction = Instruction(call, (view, weight, bias), {"out": target.order([0, 3, 1, 2])}, None)
    if inputs > 1 and not channels_last:
        with pytest.raises(Unknown):
            translate(instruction)
        return
    run(translate(instruction), blocks | block, 2)
    found = blocks[id(target.memory)].view(N, 1, *truth.shape[3:], 34).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)


def test_views_move_by_the_offsets_of_a_step():
    source = Memory("stored", 12, F32)
    view = View(source, (4,), (1,), Linear(2, (3,)), 0)
    out, blocks = memory_of(torch.zeros(N, 4))
    blocks[id(source)] = torch.arange(12.0).repeat(N, 1)
    run([Part("copy_", Side.of(out), (Side.of(view),))], blocks, slots={view: 1}, offsets=(99, 8))
    assert torch.equal(blocks[id(out.memory)], torch.tensor([8.0, 9, 10, 11]).repeat(N, 1))


def test_levels_become_numbers():
    levels = torch.randint(256, (N, 4))
    view, block = memory_of(levels)
    out, blocks = memory_of(torch.zeros(N, 4))
    run(translate(Instruction(torch.Tensor.copy_, (out, view), {}, None)), blocks | block)
    assert torch.equal(blocks[id(out.memory)], levels.float())


def test_what_the_machine_does_not_know_is_left_to_torch():
    view, _ = memory_of(torch.zeros(N, 4))
    half, _ = memory_of(torch.zeros(N, 4, dtype=torch.bfloat16))
    for function, args, out in [
        (torch.erf, (view,), view),
        (torch.add, (half, 1.0), half),
        (torch.ops.aten.elu.out, (view, 1.0, 2.0), view),
        (torch.Tensor.copy_, (half, view), None),
    ]:
        kwargs = {} if out is None else {"out": out}
        with pytest.raises(Unknown):
            translate(Instruction(function, args, kwargs, None))


def test_threads_wait_where_they_read_what_others_wrote():
    blocks = {}

    def block(memory):
        return blocks.setdefault(id(memory), torch.empty(N, memory.numel))

    views = [scratch((64,), F32) for _ in range(3)]
    a, b, c = map(Side.of, views)
    product = Part("linear", b, (replace(a, strides=(0,)), None), torch.zeros(64, 64))
    copy = Part("copy_", c, (b,))
    assert waits([Part("relu", a, (a,)), product, copy], block) == [False, True, False]
    small = scratch((32,), F32)
    half = Side(b.view, (32,), (1,), 32)
    narrow = Part("copy_", Side.of(small), (half,))
    assert waits([product, narrow], block) == [False, True]  # of 64 columns and of 32 threads have other shares
    assert waits([narrow, product], block) == [False, True]  # what others read is not overwritten
    assert waits([product, Part("copy_", a, (c,))], block) == [False, True]
    blocks[id(c.view.memory)] = blocks[id(a.view.memory)]  # two memories in one block
    assert waits([product, copy], block) == [False, True]


def test_threads_do_not_change_a_number():
    torch.manual_seed(0)
    sizes = [96, 160, 64, 200]
    x, block = memory_of(torch.randn(N, sizes[0]))
    parts, blocks = [], dict(block)
    for before, after in pairwise(sizes):
        out, more = memory_of(torch.zeros(N, after))
        blocks |= more
        bias = Side.of(constant_view(torch.randn(after)))
        weight = torch.randn(before, after) / before**0.5
        parts.append(Part("linear", Side.of(out), (Side(x, (after,), (0,)), bias), weight))
        parts.append(Part("tanh", Side.of(out), (Side.of(out),)))
        x = out
    run(parts, blocks)
    alone = blocks[id(x.memory)].clone()
    for _ in range(50):
        run(parts, blocks, threads=2)
        assert torch.equal(blocks[id(x.memory)], alone)


def share_of(sizes, thread, threads):
    """Rows and columns of a thread, as `share_of` in machine.cpp has them."""
    rows, columns, panel = math.prod(sizes[:-1]), sizes[-1], machine().panel
    panels = -(-columns // panel)
    if panels < threads:
        return slice(rows * thread // threads, rows * (thread + 1) // threads), slice(0, columns)
    return slice(None), slice(
        panels * thread // threads * panel, min(columns, panels * (thread + 1) // threads * panel)
    )


def touched(side, sizes, strides, share, depth, block):
    """Places (block, number) that a thread touches of a side; of a product's rows all that it sums over."""
    memory = block(side.view.memory)
    places = torch.full((N, *sizes), side.extra + side.view.offset.at((0,) * len(side.view.offset.coefficients)))
    for d, (size, stride) in enumerate(zip((N, *sizes), (memory.stride(0), *strides), strict=True)):
        places += (torch.arange(size) * stride).view([-1 if k == d else 1 for k in range(places.dim())])
    places = places.reshape(-1, sizes[-1])[share]
    reach = places.reshape(-1, 1) + torch.arange(depth)
    return {(memory.data_ptr(), place) for place in reach.flatten().tolist()}


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("build", [GatedPixelCNN, PixelCNN])
def test_no_thread_touches_what_another_one_writes(build, threads):
    """Every pair of parts between two waits, place by place."""
    model = build((1, 4, 5), 4, channels=64, layers=2).eval()
    plan = accelerate(model, model.shape, distribution=model.distribution, backend="compiled")._engine.plan
    block = Run(plan, N, torch.device("cpu")).block
    pairs = 0
    for program in plan.programs:
        for section in cpu_player.sections(program):
            read, written = {}, {}  # by thread
            for part, wait in zip(section.parts, waits(section.parts, block), strict=True):
                if wait:
                    read, written = {}, {}
                sizes, strides = collapsed(part)
                sides = [side for side in (part.out, *part.inputs) if isinstance(side, Side)]
                for thread in range(threads):
                    share = share_of((N, *sizes), thread, threads)
                    reads = set()
                    for k, (side, along) in enumerate(zip(sides, strides, strict=True)):
                        if k and side.view.memory.kind != "constant":
                            deep = len(part.weight) if part.weight is not None and k == 1 else 1
                            reads |= touched(side, sizes, along, share, deep, block)
                    writes = touched(part.out, sizes, strides[0], share, 1, block)
                    for other in range(threads):
                        if other != thread:
                            pairs += 1
                            assert not reads & written.get(other, set())
                            assert not writes & (written.get(other, set()) | read.get(other, set()))
                    read[thread] = read.get(thread, set()) | reads
                    written[thread] = written.get(thread, set()) | writes
    assert pairs > 100


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    machine.cache_clear()
    try:
        with pytest.raises(NoMachine, match="false fails: no message"):
            machine()
    finally:
        machine.cache_clear()


def test_the_machine_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGEN_MACHINE", str(tmp_path / "kept"))
    machine.cache_clear()
    try:
        assert machine().built.startswith("compiled in") and "run" not in machine().built
        machine.cache_clear()
        assert machine().built == "compiled in an earlier run"
        assert len(list((tmp_path / "kept").iterdir())) == 1
    finally:
        machine.cache_clear()
