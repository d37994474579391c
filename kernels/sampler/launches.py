"""The step machine with an instruction a launch: launches, which CUDA graphs hold, take the place of barriers.

A launch is one of a step or of the draws before it. Which step that is stands on the device, so that the launches of a
step, captured once, play all steps that have the same program.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch
from fastgen.kernels.sampler.dispatch import instruction
from fastgen.kernels.sampler.draws import draw
from fastgen.kernels.sampler.instructions import BJ
from fastgen.kernels.sampler.machine import GIVEN, Tiles, entries, options_of
from fastgen.kernels.sampler.words import (
    COLUMNS,
    CONTRACT,
    DRAW,
    FIRST_MOVE,
    MOVES,
    NOTHING,
    OFFSETS,
    OP,
    PLACE_WORDS,
    PRODUCT,
    S1,
    SOFTMAX,
    STEP_WORDS,
    WORDS,
)


@triton.jit(do_not_specialize=["what", "n"], do_not_specialize_on_alignment=GIVEN)
def step_launch_kernel(
    memory_ptr,  # all as in `step_machine_kernel`
    integers_ptr,
    weights_ptr,
    codes_ptr,
    steps_ptr,
    offsets_ptr,
    draws_ptr,
    places_ptr,
    noise_ptr,
    known_ptr,
    mask_ptr,
    bad_ptr,
    counter_ptr,  # (2,): the place to draw, which draws alone read; the step to play, which they alone write
    what,  # number of an instruction, or DRAW, NOTHING, FIRST_MOVE - k
    n,  # images
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DOUBLE: tl.constexpr,
    LINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    if what == DRAW:
        place = tl.load(counter_ptr)
        first_image = program * ROWS
        draw(memory_ptr, integers_ptr, noise_ptr, known_ptr, mask_ptr, bad_ptr, draws_ptr,
             places_ptr + place * PLACE_WORDS, first_image.to(tl.int64), tl.minimum(n - first_image, ROWS),
             ROWS, LEVELS, tl.float64 if DOUBLE else tl.float32)  # fmt: skip
        if program == 0:
            tl.store(counter_ptr + 1, place + 1)
    else:
        number = tl.load(counter_ptr + 1)
        if program == 0:
            tl.store(counter_ptr, number)
        if what != NOTHING:
            step = steps_ptr + number * STEP_WORDS
            moves = what <= FIRST_MOVE
            # A copy may lie over what it copies: a program has all columns of its images.
            first_image = tl.where(moves, program * BR, 0)
            images = tl.where(moves, tl.minimum(n - first_image, BR), n)
            code = codes_ptr + tl.where(moves, tl.load(step + MOVES) + (FIRST_MOVE - what), what) * WORDS
            instruction(memory_ptr, integers_ptr, weights_ptr, codes_ptr, code, offsets_ptr + tl.load(step + OFFSETS),
                        first_image.to(tl.int64), images, tl.where(moves, 0, program), tl.where(moves, 1, programs),
                        BM, BN, BK, BR, BP, ROWS, LINKS, PRECISION)  # fmt: skip


def programs_for(code: Sequence[int], images: int, tiles: Tiles) -> int:
    """The tiles of an instruction, given its words."""
    op, (*sizes, columns) = code[OP.value], code[S1.value : COLUMNS.value + 1]
    rows = images * sizes[0] * sizes[1] * sizes[2]
    if op == PRODUCT.value:
        return cdiv(rows, tiles.BM) * cdiv(columns, tiles.BN)
    if op == CONTRACT.value:
        return cdiv(rows, tiles.ROWS) * cdiv(columns, BJ.value)
    return cdiv(rows, tiles.BR) * (1 if op >= SOFTMAX.value else cdiv(columns, tiles.BP))


def play_one(tensors: tuple[Tensor, ...], tiles: Tiles, precision: str, what: int, programs: int, images: int) -> None:
    """One launch.

    Args:
        tensors: the kernel's first 13 arguments.
        precision: as in `machine.play`.
        what: see the kernel.
        programs: `programs_for` an instruction; of draws and copies one for ROWS and BR images.
    """
    constants: dict[str, Any] = {**tiles._asdict(), "PRECISION": precision, **options_of(tiles)}
    launch(step_launch_kernel, (programs,), (*tensors, what, images), constants)


CATALOGUE: list[Entry] = entries(step_launch_kernel)
