"""Any instruction of the step machine."""

import triton
import triton.language as tl

from fastgen.kernels.sampler.instructions import BJ, contract, pointwise, product
from fastgen.kernels.sampler.rowwise import rowwise
from fastgen.kernels.sampler.words import (
    CONTRACT,
    OP,
    PRODUCT,
    SOFTMAX,
)


@triton.jit
def instruction(
    memory_ptr,
    integers_ptr,
    weights_ptr,
    codes_ptr,
    code,
    offsets,
    first_image,
    images,
    first,
    apart,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    LINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles first, first + apart, ... of an instruction for some images."""
    op = tl.load(code + OP)
    if op == PRODUCT:
        product(memory_ptr, weights_ptr, codes_ptr, code, offsets, first_image, images, first, apart,
                BM, BN, BK, LINKS, PRECISION)  # fmt: skip
    elif op == CONTRACT:
        contract(memory_ptr, code, offsets, first_image, images, first, apart, ROWS, BJ, 16)
    elif op >= SOFTMAX:
        rowwise(memory_ptr, code, offsets, first_image, images, first, apart, BR, BP)
    else:
        pointwise(memory_ptr, integers_ptr, codes_ptr, code, offsets, first_image, images, first, apart, BR, BP)
