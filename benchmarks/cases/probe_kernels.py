"""The kernels of the probes: each repeats a step that does almost nothing. They are not part of the library."""

import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, SIZE: tl.constexpr):
    """Adds one to x. As a node of a CUDA graph it loads what the node before has stored."""
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def pass_to_the_neighbour(x_ptr, arrived_ptr, parts, programs):
    """`parts` barriers between all programs, which must run at the same time. In each part, every program stores its
    neighbour's value of the previous part plus one, and waits until all programs have done so.

    x_ptr: (2, programs), of which one row is read and the other written, alternating. arrived_ptr: a counter that
    starts at 0. A program that has waited for too long goes on: the result is then wrong, instead of a hang.
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
    """`parts` instructions as in the sampler, in one program. Each loads a few rows, multiplies them by its weight,
    applies an activation and stores them; a barrier separates it from the next."""
    rows, k = tl.arange(0, ROWS), tl.arange(0, K)
    block = x_ptr + rows[:, None] * K + k[None, :]
    for part in range(parts):
        weight = tl.load(weights_ptr + (part % DISTINCT) * K * K + k[:, None] * K + k[None, :])
        x = tl.load(block)
        out = tl.dot(x, weight, out_dtype=tl.float32)
        tl.debug_barrier()
        tl.store(block, tl.maximum(out, 0.0).to(x.dtype))
        tl.debug_barrier()
