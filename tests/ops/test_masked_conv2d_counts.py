"""What the products of a masked convolution move and execute, as compiled, where this is emulated and counted."""

from dataclasses import replace

import pytest
import torch

from fastgen.kernels.masked_conv2d import config, tune
from fastgen.kernels.masked_conv2d.backward import BIASES
from fastgen.kernels.masked_conv2d.config import Choice, default_tile

pytestmark = [
    pytest.mark.usefixtures("full_memory", "kernels_wherever_they_can"),
    pytest.mark.skipif(config.EMULATED is None, reason="counts what is emulated: -p tests.emulated"),
]
BATCH, CHANNELS, OUTPUTS, SIDE = 2, 128, 256, 16
PIXELS = BATCH * SIDE**2
TAPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0)]  # of the mask B of 3x3
SEEN = BATCH * sum((SIDE - abs(dy)) * (SIDE - abs(dx)) for dy, dx in TAPS)  # pairs of a pixel and a tap inside the map


def counted(direction, dtype, tma):
    """(product, counts of its main kernel); in the tile of a full-size layer, by descriptors where there are some."""
    import ptxemu

    make, tensors = tune.Problem(BATCH, CHANNELS, OUTPUTS, 3, SIDE, dtype, True).product(direction, torch.device("cpu"))
    layer = replace(make(*tensors).layer, pixels=64 * 32 * 32)
    tile = default_tile(layer)
    product = make(*tensors, choice=Choice("triton", tile if tma else tile._replace(tma=False), "a test"))
    with ptxemu.counting() as found:
        product.run(*tensors)
    name = "masked_conv2d_weight_kernel" if direction == "weight" else "masked_conv2d_kernel"
    return product, found.kernels[name]


def needed(product, direction):
    """Bytes that the tiling moves: each program's tiles of maps and weights, and results, each once."""
    tile, size = product.choice.tile, product.layer.dtype.itemsize
    if direction == "weight":
        columns, shares = len(TAPS) * CHANNELS, product.shares
        grad = (columns // tile.K + 1) * PIXELS * OUTPUTS  # once more for the bias
        x = OUTPUTS // tile.N * SEEN * CHANNELS
        return size * (grad + x) + 4 * shares * OUTPUTS * (columns + min(columns // tile.K, BIASES.value))
    read, rows = (OUTPUTS, CHANNELS) if direction == "in" else (CHANNELS, OUTPUTS)
    weights = PIXELS // tile.M * rows * len(TAPS) * read
    written = PIXELS * (rows if direction == "in" else 2 * (OUTPUTS // 2))  # a gate keeps the valve
    return size * (rows // tile.N * SEEN * read + weights + written)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("direction", tune.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_little_more_is_moved_than_the_tiling_needs(dtype, direction, tma):
    if tma and not config.has_tma(config.EMULATED):
        pytest.skip("has no descriptors")
    with torch.backends.cudnn.flags(allow_tf32=True):
        product, found = counted(direction, dtype, tma)
    ratio = found.moved / needed(product, direction)
    # Of TF32 on Hopper a descriptor lays rows so that two of the four that a product reads at once share banks.
    most = (
        2 if config.EMULATED == "sm_90" and product.layer.precision == "tf32" and direction == "weight" and tma else 1
    )
    conflicts = [place for place, access in found.places.items() if access.wavefronts > most * access.passes]
    print(f"moved {ratio:.3f}, loads {found.loads.efficiency:.3f}, bank conflicts in {conflicts}")
    assert 0.9 <= ratio <= 1.2
    assert found.loads.efficiency >= 0.95
    if direction == "out":
        assert 32 * found.classes["special"] <= 2 * PIXELS * OUTPUTS // 2, "special functions of the gate"
    # Triton's sum over the pixels for the bias, once a program, is not the product.
    assert all("standard.py" in place for place in conflicts)
