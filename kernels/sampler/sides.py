"""Where the rows of an instruction lie, and how its results are rounded. `share` and `code`: see `instructions`."""

import triton
import triton.language as tl

from fastgen.kernels.sampler.words import BFLOAT16, FLOAT16, S1, S2, S3


@triton.jit
def rows_in(code, images):
    return (images * tl.load(code + S1) * tl.load(code + S2) * tl.load(code + S3)).to(tl.int32)


@triton.jit
def places(code, SIDE: tl.constexpr, share, m):
    """Where rows m of a side begin."""
    offsets, first_image, _, _, _ = share
    start = tl.load(code + SIDE) + tl.load(offsets + tl.load(code + SIDE + 1))
    of_image = tl.load(code + SIDE + 2)
    s2, s3 = tl.load(code + S2).to(tl.int32), tl.load(code + S3).to(tl.int32)
    inner = tl.load(code + S1).to(tl.int32) * s2 * s3
    found = start + (first_image + m // inner) * of_image
    if inner > 1:
        d1, d2, d3 = tl.load(code + SIDE + 3), tl.load(code + SIDE + 4), tl.load(code + SIDE + 5)
        found += m % s3 * d3 + m // s3 % s2 * d2 + m // (s2 * s3) % tl.load(code + S1).to(tl.int32) * d1
    return found


@triton.jit
def rounded(x, precision):
    """Results as they are to be stored: in the precision that the value has in the model."""
    if precision == BFLOAT16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    elif precision == FLOAT16:
        x = x.to(tl.float16).to(tl.float32)
    return x
