"""The step machine: one kernel reads the tables of a plan and plays draws and steps, compiled once for all models.

It is launched for whole images or for a part of them:

    places      A program (CTA) owns BM images and plays them from the first place to the last by itself: programs share
                nothing but weights, so nothing has to be synchronized between them. Between two instructions its
                threads wait for each other.
    together    Several programs own BM images. Between two instructions they wait for each other, at most `patience`
                looks long: where one is missing the launch ends, with nonsense, and says so.
    single      An instruction, or the draws of a place, by all programs for all images. Launches, which CUDA graphs
                hold, take the place of barriers. Which step or place that is stands on the device, so that the launches
                of a step, captured once, play all steps that have the same program.

Activations lie in one arena of float32, levels and indices in one of int64. Of a model in half precision each result is
rounded as it is stored, and the weights have that precision, so that products run on tensor cores.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, processors_of
from fastgen.kernels.sampler.draws import draw
from fastgen.kernels.sampler.instructions import instruction
from fastgen.kernels.sampler.words import (
    COLUMNS,
    DRAW,
    MOVES,
    MOVES_COUNT,
    NOTHING,
    OFFSETS,
    OP,
    PLACE_WORDS,
    PLACES,
    PROGRAM,
    S1,
    SOFTMAX,
    STEP_WORDS,
    WORDS,
)

COUNTS = ["what", "first", "last", "until", "drawing", "n", "together", "patience"]
GIVEN = ["noise_ptr", "known_ptr", "mask_ptr"]  # by the caller, at any address


@triton.jit
def meet(meeting_ptr, together, patience):
    """Programs that share images wait until all have come here as often, or until they have looked often enough;
    returns how often they are to look the next time: no more where one is missing."""
    tl.debug_barrier()
    if together > 1:
        counter = meeting_ptr + 1 + tl.program_id(0) // together
        come, looks = tl.atomic_add(counter, 1, sem="acq_rel"), 0
        all_here = (come // together + 1) * together
        while (come < all_here) & (looks < patience):
            come = tl.atomic_add(counter, 0, sem="acq_rel")
            looks += 1
        if come < all_here:
            tl.store(meeting_ptr, 1)
            patience = 0
        tl.debug_barrier()
    return patience


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=GIVEN)
def step_machine_kernel(
    memory_ptr,  # float32 arena; its first number is 0 and stays so
    integers_ptr,  # int64 arena
    weights_ptr,  # packed, float32 or two numbers in half precision
    codes_ptr,  # instructions
    programs_ptr,  # (programs, 2): first instruction, number of instructions
    steps_ptr,  # (steps, STEP_WORDS)
    offsets_ptr,
    draws_ptr,  # of the request
    places_ptr,  # (places, PLACE_WORDS)
    noise_ptr,
    known_ptr,  # int64
    mask_ptr,  # uint8
    bad_ptr,  # int32 (1,), set where a parameter is NaN
    next_ptr,  # of single launches, (2,): the place to draw, which draws alone read; the step to play, which they write
    meeting_ptr,  # int32: whether a program was missing; then 0 for all that share images
    what,  # PLACES or NOTHING; of a place DRAW, k for the k-th copy, and after these the instructions of its step
    first,  # places from here
    last,  # to before this one are drawn,
    until,  # those before this one are followed by their steps;
    drawing,  # 1, or 0: steps alone
    n,  # images
    together,  # programs that share images
    patience,  # of programs that wait for another, in looks
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    arenas = memory_ptr, integers_ptr, weights_ptr, codes_ptr
    request = draws_ptr, noise_ptr, known_ptr, mask_ptr, bad_ptr
    part, programs = tl.program_id(0) % together, together
    group = tl.where(what == PLACES, tl.program_id(0) // together, 0)
    first_image = (group * BM).to(tl.int64)
    images = tl.minimum(n - first_image, BM).to(tl.int32)
    if what != PLACES:
        # Whoever reads one of the two numbers writes the other one.
        of_step = (what != DRAW).to(tl.int32)
        first = (tl.load(next_ptr + of_step) - of_step).to(tl.int32)
        last = first + (what != NOTHING).to(tl.int32)
        part, programs, images = tl.program_id(0), tl.num_programs(0), n
        if part == 0:
            tl.store(next_ptr + (1 - of_step), (first + 1).to(tl.int64))
    # Addresses of all kinds of instructions, if computed before these loops, would fill the registers.
    for place in tl.range(first, last, disable_licm=True):
        step = steps_ptr + (place + 1) * STEP_WORDS
        # Of a place, first there are the draws, then copies, then the instructions of the step's program.
        start, stop = what, what + 1
        if what == PLACES:
            start, stop = 1 - drawing, 1
            if place < until:
                instructions = tl.load(programs_ptr + 2 * tl.load(step + PROGRAM) + 1)
                stop += (tl.load(step + MOVES_COUNT) + instructions).to(tl.int32)
        for number in tl.range(start, stop, disable_licm=True):
            patience = meet(meeting_ptr, tl.where(what == PLACES, together, 1), patience)
            if number == DRAW:
                rows = offsets_ptr, first_image, images, part, programs
                draw(arenas, request, places_ptr + place * PLACE_WORDS, rows, ROWS, LEVELS,
                     tl.float64 if DOUBLE else tl.float32)  # fmt: skip
            else:
                moves = tl.load(step + MOVES_COUNT).to(tl.int32)
                copies = number <= moves
                begin = tl.load(programs_ptr + 2 * tl.load(step + PROGRAM)) - moves
                begin = tl.where(copies, tl.load(step + MOVES), begin)
                # A copy may lie over what it copies: a program has all columns of its images.
                each = tl.where(copies, tl.cdiv(images, programs), images)
                skipped = tl.where(copies, part * each, 0)
                tiles = (offsets_ptr + tl.load(step + OFFSETS), first_image + skipped,
                         tl.minimum(images - skipped, each), tl.where(copies, 0, part),
                         tl.where(copies, 1, programs))  # fmt: skip
                instruction(arenas, codes_ptr + (begin + number - 1) * WORDS, tiles, BM, BN, BK, PRECISION)


class Tiles(NamedTuple):
    """Images of a program, which are the rows (BM) of a tile, its columns (BN) and the depth (BK) of a part of a
    product; images (ROWS) and levels that are drawn at once; whether that is in float64."""

    BM: int = 16
    BN: int = 64
    BK: int = 32
    ROWS: int = 4
    LEVELS: int = 256
    DOUBLE: bool = True


SIZES = (Tiles(), Tiles(32), Tiles(64, BN=32))  # of 64x64 sums no registers are left for what follows a product
AMD = (Tiles(), Tiles(32, BN=32), Tiles(64, BN=32))  # where 32x64 spill
PATIENCE = 2**22  # looks at a counter in L2, each about a microsecond


def tiles_for(images: int, device: torch.device) -> Tiles:
    """Larger tiles read the weights less often; they pay where smaller ones would not all run at the same time."""
    sizes = SIZES if torch.version.hip is None else AMD
    found = next((one for one in sizes[:-1] if cdiv(images, one.BM) <= processors_of(device)), sizes[-1])
    return found._replace(DOUBLE=draws_in_float64(device))


def options_of(hip: bool) -> dict[str, Any]:
    """Of the compiler. By itself ptxas stops at 128 registers, with which two programs fit a processor, and spills; an
    explicit limit makes it take more. AMD's compiler has no such option; its warps are twice as wide."""
    return {"num_warps": 4, "num_stages": 2} if hip else {"num_warps": 8, "num_stages": 2, "maxnreg": 255}


def draws_in_float64(device: torch.device) -> bool:
    """Not on NVIDIA's chips whose float64 runs at a 32nd or a 64th of float32's speed, which are those of consumers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def play(
    tensors: tuple[Tensor, ...],
    tiles: Tiles,
    precision: str,
    places: tuple[int, int, int],
    drawing: bool,
    images: int,
    together: int = 1,
    patience: int = PATIENCE,
) -> None:
    """One launch of whole images.

    Args:
        tensors: the kernel's first 15 arguments.
        precision: of products of float32, "ieee" or "tf32x3"; "widened", for Triton's interpreter, if those of half
            precision are products of float32, too.
        places: first, last, until; see the kernel.
        together: programs that share images. All programs of the launch must run at the same time.
        patience: see the kernel.
    """
    programs = cdiv(images, tiles.BM) * together
    _launch(tensors, tiles, precision, programs, (PLACES.value, *places, int(drawing), images, together, patience))


def play_one(tensors: tuple[Tensor, ...], tiles: Tiles, precision: str, what: int, programs: int, images: int) -> None:
    """One launch of an instruction, or of the draws of a place.

    Args:
        tensors, precision: as in `play`.
        what: see the kernel.
        programs: `programs_for` an instruction; of draws and copies one for ROWS and BM images.
    """
    _launch(tensors, tiles, precision, programs, (what, 0, 0, 0, 0, images, 1, 0))


def _launch(tensors: tuple[Tensor, ...], tiles: Tiles, precision: str, programs: int, counts: tuple[int, ...]) -> None:
    cooperative = {"launch_cooperative_grid": True} if counts[-2] > 1 else {}
    constants: dict[str, Any] = {**tiles._asdict(), "PRECISION": precision, **cooperative}
    constants |= options_of(torch.version.hip is not None)
    launch(step_machine_kernel, (programs,), (*tensors, *counts), constants)


def programs_for(code: Sequence[int], images: int, tiles: Tiles) -> int:
    """The tiles of an instruction, given its words."""
    *sizes, columns = code[S1.value : COLUMNS.value + 1]
    rows = images * sizes[0] * sizes[1] * sizes[2]
    return cdiv(rows, tiles.BM) * (1 if code[OP.value] >= SOFTMAX.value else cdiv(columns, tiles.BN))


KINDS = {"memory_ptr": "*fp32", "weights_ptr": "*fp32", "noise_ptr": "*fp32", "mask_ptr": "*u8"}
KINDS |= {"bad_ptr": "*i32", "meeting_ptr": "*i32"}
CONSUMERS = ("sm_86", "sm_89", "sm_120")  # and what is sold for single precision: see `draws_in_float64`
DATA_CENTRES = ("sm_80", "sm_90", "sm_100")


def entry(tiles: Tiles, precision: str, targets: Sequence[str]) -> Entry:
    fixed = {**tiles._asdict(), "PRECISION": precision}
    kinds = {name: "*i64" if name.endswith("_ptr") else "i32" for name in step_machine_kernel.arg_names}
    options = options_of("gfx942" in targets)
    others = {*CONSUMERS, *DATA_CENTRES, "gfx942"} - {*targets}
    return Entry(
        step_machine_kernel,
        f"{precision}, {tiles.BM} images" + ("" if tiles.DOUBLE else ", float32 draws"),
        {name: KINDS.get(name, kind) for name, kind in kinds.items() if name not in fixed},
        fixed,
        unaligned=tuple(GIVEN),
        requires={} if precision == "ieee" else {target: _products_on(target, tiles) for target in targets},
        skips=dict.fromkeys(others, "draws in the other precision, or multiplies so"),
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        options=options,
    )


def _products_on(target: str, tiles: Tiles) -> str:
    """Words of PTX for products on tensor cores, of each precision, and the word of SASS."""
    if target == "sm_100" and tiles.BM == 64:
        return "tcgen05.mma kind::f16 kind::tf32 UTCHMMA"
    return f"mma f32.bf16.bf16 f32.f16.f16 f32.tf32.tf32 {'HGMMA' if target == 'sm_90' and tiles.BM == 64 else 'HMMA'}"


CATALOGUE: list[Entry] = [
    *(entry(one, "tf32x3", DATA_CENTRES) for one in SIZES),
    *(entry(one._replace(DOUBLE=False), "tf32x3", CONSUMERS) for one in SIZES),
    *(entry(one, "ieee", ["gfx942"]) for one in AMD),
]
