"""The step machine: one kernel that reads instruction tables and plays draws and steps, compiled once for all models.

A program (CTA) owns BM images and plays them from the first place to the last by itself: programs share nothing but
weights, so nothing has to be synchronized between them. Between two instructions its threads wait for each other.
Activations lie in one arena of float32, levels and indices in one of int64. Of a model in half precision each result is
rounded as it is stored, and the weights have that precision, so that products run on tensor cores.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, processors_of
from fastgen.kernels.sampler.dispatch import instruction
from fastgen.kernels.sampler.draws import draw
from fastgen.kernels.sampler.words import (
    MOVES,
    MOVES_COUNT,
    OFFSETS,
    PLACE_WORDS,
    PROGRAM,
    STEP_WORDS,
    WORDS,
)

COUNTS = ["first", "last", "until", "drawing", "first_image", "n"]
GIVEN = ["noise_ptr", "known_ptr", "mask_ptr"]  # by the caller, at any address


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=GIVEN)
def step_machine_kernel(
    memory_ptr,  # float32 arena; its first number is 0 and stays so
    integers_ptr,  # int64 arena
    weights_ptr,  # packed
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
    first,  # places from here
    last,  # to before this one are drawn,
    until,  # those before this one are followed by their steps;
    drawing,  # 0: steps alone
    first_image,
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
    first_image = (first_image + tl.program_id(0) * BM).to(tl.int64)
    images = tl.minimum(n - first_image, BM).to(tl.int32)
    for place in range(first, last):
        if drawing != 0:
            at = places_ptr + place * PLACE_WORDS
            draw(memory_ptr, integers_ptr, noise_ptr, known_ptr, mask_ptr, bad_ptr, draws_ptr, at, first_image, images,
                 ROWS, LEVELS, tl.float64 if DOUBLE else tl.float32)  # fmt: skip
        if place < until:
            step = steps_ptr + (place + 1) * STEP_WORDS
            program = programs_ptr + 2 * tl.load(step + PROGRAM)
            offsets = offsets_ptr + tl.load(step + OFFSETS)
            moves = tl.load(step + MOVES_COUNT).to(tl.int32)
            for k in range(0, moves + tl.load(program + 1).to(tl.int32)):
                number = tl.where(k < moves, tl.load(step + MOVES) + k, tl.load(program) + k - moves)
                code = codes_ptr + number * WORDS
                tl.debug_barrier()
                instruction(memory_ptr, integers_ptr, weights_ptr, codes_ptr, code, offsets, first_image, images, 0, 1,
                            BM, BN, BK, BR, BP, ROWS, LINKS, PRECISION)  # fmt: skip


OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 2}


class Tiles(NamedTuple):
    """Images of a program, which are the rows (BM), columns (BN) and depth (BK) of a part of a product; rows (BR) and
    columns (BP) of other instructions; images (ROWS) and levels that are drawn at once; whether that is in float64;
    whether products have LINKS."""

    BM: int = 16
    BN: int = 64
    BK: int = 32
    BR: int = 16
    BP: int = 64
    ROWS: int = 4
    LEVELS: int = 256
    DOUBLE: bool = True
    LINKS: bool = True


SIZES = (Tiles(), Tiles(32), Tiles(64, BN=32))  # of 64x64 sums no registers are left for what follows a product

AMD = tuple(one._replace(LINKS=False) for one in SIZES)  # with them, hundreds of bytes are spilled there


def options_of(tiles: Tiles) -> dict[str, Any]:
    """Of the compiler. By itself ptxas stops at 128 registers, with which two programs fit a processor, and spills; an
    explicit limit makes it take more. AMD's compiler has no such option."""
    return OPTIONS | ({"maxnreg": 255} if tiles.LINKS else {})


def tiles_for(images: int, device: torch.device) -> Tiles:
    """Larger tiles read the weights less often; they pay where smaller ones would not all run at the same time."""
    sizes = SIZES if torch.version.hip is None else AMD
    found = next((one for one in sizes[:-1] if cdiv(images, one.BM) <= processors_of(device)), sizes[-1])
    return found._replace(DOUBLE=draws_in_float64(device))


def draws_in_float64(device: torch.device) -> bool:
    """Not on NVIDIA's chips whose float64 runs at a 32nd or a 64th of float32's speed, which are those of consumers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def play(
    tensors: tuple[Tensor, ...],
    tiles: Tiles,
    precision: str,
    first: int,
    last: int,
    until: int,
    drawing: bool,
    images: tuple[int, int],
) -> None:
    """One launch.

    Args:
        tensors: the kernel's first 13 arguments.
        precision: of products, "ieee" or "tf32x3"; "half" where the weights are in half precision, for which the
            interpreter takes "widened".
        first, last, until, drawing: see the kernel.
        images: from the first to before the last.
    """
    constants: dict[str, Any] = {**tiles._asdict(), "PRECISION": precision, **options_of(tiles)}
    args = (*tensors, first, last, until, int(drawing), *images)
    launch(step_machine_kernel, (cdiv(images[1] - images[0], tiles.BM),), args, constants)


KINDS = {"memory_ptr": "*fp32", "weights_ptr": "*fp32", "noise_ptr": "*fp32", "mask_ptr": "*u8", "bad_ptr": "*i32"}
CONSUMERS = ("sm_86", "sm_89", "sm_120")  # and what is sold for single precision: see `draws_in_float64`
NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def entry(kernel: Any, tiles: Tiles, weights: str, precision: str, skips: dict[str, str]) -> Entry:
    fixed = {**tiles._asdict(), "PRECISION": precision}
    kinds = {name: "*i64" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature = {name: KINDS.get(name, kind) for name, kind in kinds.items() if name not in fixed}
    return Entry(
        kernel,
        f"{weights} {precision}, {tiles.BM} images"
        + ("" if tiles.DOUBLE else ", float32 draws")
        + ("" if tiles.LINKS else ", no links"),
        {**signature, "weights_ptr": f"*{weights}"},
        fixed,
        unaligned=tuple(GIVEN),
        requires=dict.fromkeys(NVIDIA, "mma") if precision != "ieee" else {},
        skips=skips,
        options={key: value for key, value in options_of(tiles).items() if key not in OPTIONS},
        **OPTIONS,
    )


def entries(kernel: Any) -> list[Entry]:
    """Of a kernel that plays instructions: for NVIDIA's chips, for those of consumers, for AMD's."""
    kinds = [(k, "fp32", "tf32x3") for k in range(3)] + [(k, "bf16", "half") for k in range(3)] + [(0, "fp16", "half")]
    others = [one for one in NVIDIA if one not in CONSUMERS]
    found = []
    for k, weights, precision in kinds:
        skips = {**dict.fromkeys(CONSUMERS, "draws in float32"), "gfx942": "has no links of products"}
        found.append(entry(kernel, SIZES[k], weights, precision, skips))
        skips = {**dict.fromkeys(others, "draws in float64"), "gfx942": "has no links of products"}
        found.append(entry(kernel, SIZES[k]._replace(DOUBLE=False), weights, precision, skips))
        if precision == "half":
            found.append(entry(kernel, AMD[k], weights, precision, dict.fromkeys(NVIDIA, "has links of products")))
    return [*found, entry(kernel, AMD[0], "fp32", "ieee", dict.fromkeys(NVIDIA, "takes tf32x3"))]


CATALOGUE: list[Entry] = entries(step_machine_kernel)
