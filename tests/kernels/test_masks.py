"""The interpreter refuses masks that are not bool (conftest.py), in every Triton."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, LOADS: tl.constexpr, STORES: tl.constexpr):
    place = tl.arange(0, 8)
    inside = place < n
    # A comparison of numbers that meets one of blocks becomes an integer in the interpreter.
    number = inside & (n > 0)
    values = tl.load(x_ptr + place, mask=number if LOADS else inside, other=0.0)
    tl.store(out_ptr + place, values, mask=number if STORES else inside)


@pytest.mark.parametrize(("loads", "stores"), [(False, False), (True, False), (False, True)])
def test_masks_are_bool(loads, stores):
    x, out = torch.arange(8.0), torch.full((8,), -1.0)
    if loads or stores:
        with pytest.raises(Exception, match="mask"):
            copy_kernel[(1,)](x, out, 5, loads, stores)
        return
    copy_kernel[(1,)](x, out, 5, loads, stores)
    assert out.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
