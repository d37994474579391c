"""Where the threads of the step machine wait for each other: place by place, and that they change no number."""

import math
import os
from itertools import pairwise

import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.cpu.tables import Linker, Panels, Side
from fastgen.sampling.machine.language import Lookup, Pointwise, Product, Rowwise, constant
from fastgen.sampling.run.cpu_player import sections
from fastgen.sampling.run.memory import PlanMemory
from tests.sampling.machine.played import Blocks, N, by_machine, linked
from tests.sampling.models import Attention, planned


def waits(blocks, *instructions):
    _, (_, codes) = linked(blocks, instructions)
    return [bool(code.waits) for code in codes]


def test_threads_wait_where_they_read_what_others_wrote():
    blocks = Blocks()
    a, b, c = (blocks.result(64) for _ in range(3))
    product = Product(b, a, constant(torch.zeros(64, 64)))
    copy = Pointwise("copy", c, (b,))
    assert waits(blocks, Pointwise("relu", a, (a,)), product, copy) == [False, True, False]
    narrow = Pointwise("copy", blocks.result(32), (b.narrow(0, 32, 32),))
    assert waits(blocks, product, narrow) == [False, True]  # of 64 columns and of 32 threads have other shares
    assert waits(blocks, narrow, product) == [False, True]  # what others read is not overwritten
    assert waits(blocks, product, Pointwise("copy", a, (c,))) == [False, True]
    blocks.blocks[c.memory] = blocks.blocks[a.memory]  # two memories in one block
    assert waits(blocks, product, copy) == [False, True]


def test_threads_wait_for_whole_rows():
    blocks = Blocks()
    a, b, c = (blocks.result(6, 64) for _ in range(3))
    relu, softmax = Pointwise("relu", b, (a,)), Rowwise("softmax", c, b)
    assert waits(blocks, relu, softmax, Pointwise("copy", a, (c,))) == [False, True, True]
    assert waits(blocks, softmax, relu) == [False, True]
    contract = Product(c, a, blocks.result(64, 64))
    assert waits(blocks, Pointwise("relu", a, (b,)), contract) == [False, True]
    assert waits(blocks, contract, Pointwise("relu", a, (b,))) == [False, True]
    table, index = blocks.result(9, 64), blocks.result(6, dtype=torch.int64)
    lookup = Lookup(c, table, index)
    assert waits(blocks, Pointwise("copy", table, (1.0,)), lookup) == [False, True]
    assert waits(blocks, lookup, Pointwise("copy", table, (1.0,))) == [False, True]


def network(sizes, seed=0):
    """Products with a tanh after each, then a softmax, a product of two computed factors, a look-up."""
    torch.manual_seed(seed)
    blocks = Blocks()
    x, found = blocks.holding(torch.randn(N, 2, sizes[0])), []
    for before, after in pairwise(sizes):
        out = blocks.result(2, after)
        found.append(Product(out, x, constant(torch.randn(before, after) / before**0.5), constant(torch.randn(after))))
        found.append(Pointwise("tanh", out, (out,)))
        x = out
    found.append(Rowwise("softmax", rows := blocks.result(2, sizes[-1]), x))
    found.append(Product(scores := blocks.result(2, 2), rows, x.order([1, 0])))
    table = blocks.result(2, sizes[-1])
    found += [Pointwise("add", table, (rows, x)), Rowwise("sum", total := blocks.result(2, 1), scores)]
    found.append(Lookup(last := blocks.result(4, sizes[-1]), table, constant(torch.tensor([1, 0, 0, 1]))))
    found.append(Pointwise("mul", end := blocks.result(2, sizes[-1]), (last.narrow(0, 1, 2), total)))
    return blocks, found, end


@pytest.mark.parametrize("threads", [2, 3, 4, 5])  # of the images of each, or of columns
def test_threads_do_not_change_a_number(threads):
    blocks, instructions, out = network([96, 160, 64, 200])
    by_machine(blocks, instructions)
    alone = blocks.read(out).clone()
    assert alone.isfinite().all()
    for _ in range(25):
        blocks.read(out).fill_(math.nan)
        by_machine(blocks, instructions, threads=threads)
        assert torch.equal(blocks.read(out), alone)


def test_more_threads_than_processors_come_to_an_end():
    blocks, instructions, out = network([64, 64])
    by_machine(blocks, instructions)
    alone = blocks.read(out).clone()
    by_machine(blocks, instructions, threads=4 * (os.cpu_count() or 1) + 1)
    assert torch.equal(blocks.read(out), alone)


def share_of(sizes, thread, threads, whole_rows):
    """Rows and columns of a thread, as `share_of` in machine.cpp has them."""
    rows, columns, panel = math.prod(sizes[:-1]), sizes[-1], machine().panel
    if sizes[0] >= threads:
        first, last = sizes[0] * thread // threads, sizes[0] * (thread + 1) // threads
        return slice(first * rows // sizes[0], last * rows // sizes[0]), slice(0, columns)
    panels = -(-columns // panel)
    if panels < threads or whole_rows:
        return slice(rows * thread // threads, rows * (thread + 1) // threads), slice(0, columns)
    first, last = panels * thread // threads * panel, panels * (thread + 1) // threads * panel
    return slice(None), slice(first, min(columns, last))


def touched(part, k, side, strides, share, memory, program):
    """What a thread reads of a side, or writes (k = 0), in its block: {address: places, as a mask}."""
    block = memory.block(side.view.memory, program)
    sizes, reach = (N, *part.collapsed()[0]), torch.zeros(1, dtype=torch.long)
    places = torch.full(sizes, side.view.offset.at((0,) * len(side.view.offset.coefficients)))
    for d, (size, stride) in enumerate(zip(sizes, (block.stride(0), *strides), strict=True)):
        places += (torch.arange(size) * stride).view([-1 if d == e else 1 for e in range(places.dim())])
    if part.op == "lookup" and k == 1:  # any row of the table
        rows, columns = (torch.arange(size) * s for size, s in zip(side.view.sizes, part.along, strict=True))
        reach = (rows[:, None] + columns).flatten()
    elif k == 0 and part.op in ("softmax", "log_softmax", "normalized"):
        reach = torch.arange(part.depth) * side.view.strides[-1]
    elif k == 1 and part.op == "product":
        reach = torch.arange(part.depth)
    elif (k == 1 and part.depth) or (k == 2 and part.op == "contract"):
        reach = torch.arange(part.depth) * part.along[k - 1]
    mask = torch.zeros(1 + int(places.max() + reach.max()), dtype=torch.bool)
    mask[(places.reshape(-1, sizes[-1])[share].reshape(-1, 1) + reach).flatten()] = True
    return {block.data_ptr(): mask}


def joined(*masks):
    found = {}
    for one in masks:
        for key, mask in one.items():
            have = found.get(key, mask)
            size = max(len(have), len(mask))
            found[key] = pad(have, size) | pad(mask, size)
    return found


def pad(mask, size):
    return torch.nn.functional.pad(mask, (0, size - len(mask)))


def meet(one, other):
    both = one.keys() & other.keys()
    return any((one[key][: len(other[key])] & other[key][: len(one[key])]).any() for key in both)


MODELS = {
    "gated": lambda: (GatedPixelCNN((1, 4, 5), 4, channels=64, layers=2), (1, 4, 5)),
    "plain": lambda: (PixelCNN((1, 4, 5), 4, channels=64, layers=2), (1, 4, 5)),
    "plusplus": lambda: (PixelCNNPP((3, 2, 3), channels=40, layers=1, n_mix=2), (3, 2, 3)),
    "attention": lambda: (Attention(4, side=4, width=72), (1, 4, 4)),
}


@pytest.mark.parametrize(
    ("name", "threads"), [*((name, 4) for name in MODELS), *((name, 2) for name in MODELS), ("plain", 5), ("plain", 3)]
)
def test_no_thread_touches_what_another_one_writes(name, threads):
    """All that threads do between two waits, place by place; those that have images of their own never wait."""
    plan = planned(*MODELS[name]())
    memory = PlanMemory(plan, N, torch.device("cpu"))
    linker = Linker(machine(), N, memory, Panels(machine().panel))
    parts, ops = 0, set()
    read, written = {}, {}  # by thread
    for number, program in enumerate(plan.programs):
        slots = {view: k for k, view in enumerate(program.moving())}
        for section in sections(program):
            codes = linker.link(section.parts, number, slots)
            for k, (part, code) in enumerate(zip(section.parts, codes, strict=True)):
                ops.add(part.op)
                if threads > N and (code.waits or k == 0):
                    read, written = {}, {}
                sizes, strides = part.collapsed()
                whole_rows = code.op >= machine().ops["contract"]
                for thread in range(threads):
                    share = share_of((N, *sizes), thread, threads, whole_rows)
                    reads, left = [], iter(strides[1:])
                    for k, side in enumerate(part.inputs, 1):
                        if isinstance(side, Side):
                            along = next(left)
                            if side.view.memory.kind != "constant":
                                reads.append(touched(part, k, side, along, share, memory, number))
                    reads = joined(*reads)
                    writes = touched(part, 0, part.out, strides[0], share, memory, number)
                    for other in range(threads):
                        if other != thread:
                            assert not meet(reads, written.get(other, {}))
                            assert not meet(writes, joined(written.get(other, {}), read.get(other, {})))
                    read[thread] = joined(read.get(thread, {}), reads)
                    written[thread] = joined(written.get(thread, {}), writes)
                parts += 1
    assert parts > 20
    assert "product" in ops and (name != "attention" or {"contract", "softmax", "normalized"} <= ops)
