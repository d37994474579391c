"""The kernels of the probes: next to nothing, over and over. They are no part of the library."""

import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, SIZE: tl.constexpr):
    """A node of a graph: it loads and stores what the one before has stored."""
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def pass_to_the_neighbour(x_ptr, arrived_ptr, parts, programs):
    """`parts` barriers between all programs, which must run at the same time: each takes its neighbour's value of the
    part before, adds one and waits until all have done so.

    x_ptr: (2, programs), read and written in turns. arrived_ptr: a counter that starts at 0. A program that waits for
    too long goes on, with a wrong result instead of a hang.
    """
    me = tl.program_id(0)
    neighbour = (me + 1) % programs
    for part in range(parts):
        old = x_ptr + (part % 2) * programs
        new = x_ptr + ((part + 1) % 2) * programs
        value = tl.load(old + neighbour, volatile=True)
        tl.store(new + me, value + 1)
        tl.debug_barrier()
        count = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
        tries = 0
        while (count < (part + 1) * programs) & (tries < 1000000):
            count = tl.atomic_add(arrived_ptr, 0, sem="acq_rel")
            tries += 1
        tl.debug_barrier()


@triton.jit
def instructions(x_ptr, weights_ptr, parts, ROWS: tl.constexpr, K: tl.constexpr, DISTINCT: tl.constexpr):
    """`parts` instructions of a sampler in one program: load a few rows, multiply by the weight of the instruction, an
    activation, store, and a barrier before the next loads them."""
    rows, k = tl.arange(0, ROWS), tl.arange(0, K)
    block = x_ptr + rows[:, None] * K + k[None, :]
    for part in range(parts):
        weight = tl.load(weights_ptr + (part % DISTINCT) * K * K + k[:, None] * K + k[None, :])
        x = tl.load(block)
        out = tl.dot(x, weight, out_dtype=tl.float32)
        tl.debug_barrier()
        tl.store(block, tl.maximum(out, 0.0).to(x.dtype))
        tl.debug_barrier()
