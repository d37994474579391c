"""Parameters whose neighbours in memory are channels, turned around for programs whose threads have a pixel each.

The parameters of a program's BLOCK pixels lie in its planes, (channels, BLOCK), a plane a parameter. What the program
has written there it reads from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.likelihood.image import image_offsets


@triton.jit
def move_planes(map_ptr, planes_at, image_offset, first_pixel, pixels, channels, n1, n2, strides, DENSE: tl.constexpr,
                FOURS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """From an image of channels that are neighbours to planes, or with BACK from planes to such an image.

    A tile at a time, which is read and written in the order of either memory: the compiler turns it in shared memory.
    Threads exchange what they read and write besides by planes, and wait for each other.
    """
    if BACK:
        tl.debug_barrier()
    PIXELS: tl.constexpr = 32  # of a tile
    CHANNELS: tl.constexpr = 128
    ACROSS: tl.constexpr = BLOCK // PIXELS
    if FOURS:
        channels = channels // 4 * 4  # so that the compiler knows it to be a multiple
    for tile in range(ACROSS * tl.cdiv(channels, CHANNELS)):
        number = tile % ACROSS * PIXELS + tl.arange(0, PIXELS)
        channel = tile // ACROSS * CHANNELS + tl.arange(0, CHANNELS)
        pixel = first_pixel + number
        offset = image_offset + image_offsets(pixel, n1, n2, strides[0], strides[1], strides[2], DENSE)
        if FOURS:
            offset = tl.multiple_of(offset, 4)
        at_map = map_ptr + offset[:, None] + channel[None, :]
        at_plane = planes_at + channel[None, :] * BLOCK + number[:, None]
        real = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        if BACK:
            tl.store(at_map, tl.load(at_plane, real, other=0.0), real)
        else:
            tl.store(at_plane, tl.load(at_map, real, other=0.0), (channel < channels)[None, :])
    if not BACK:
        tl.debug_barrier()


def planes_of(programs: int, block: int, params: Tensor, *grad: Tensor) -> tuple[Tensor | None, bool]:
    """Planes for maps (B, channels, H, W), and whether each pixel's channels are multiples of four numbers, and begin
    at one. None where neighbours are no channels, or an image is a pixel."""
    maps, (channels, *image) = (params, *grad), params.shape[1:]
    if channels == 1 or image == [1, 1] or any(one.stride(1) != 1 for one in maps):
        return None, False
    fours = all(n % 4 == 0 for one in maps for n in (channels, one.stride(0), *one.stride()[2:]))
    return torch.empty(programs, channels, block, dtype=params.dtype, device=params.device), fours
