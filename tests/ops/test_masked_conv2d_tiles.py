"""The launch configurations that ship, at sizes that fill the tiles and divide none, against float64.

On a GPU and where compiled kernels are emulated those of that chip; in the interpreter its own, tiny ones, for every
other combination, so that any two values still meet.
"""

from dataclasses import replace

import pytest
import torch

from fastgen.kernels.masked_conv2d import check, tune
from fastgen.kernels.masked_conv2d.config import Choice, chip_of, default_tile

pytestmark = pytest.mark.usefixtures("full_memory", "kernels_wherever_they_can")
CASES = {"bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False), "tf32": (torch.float32, True),
         "float32": (torch.float32, False)}  # fmt: skip


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(128, 256), (120, 72), (3, 128), (17, 34), (64, 64)])
@pytest.mark.parametrize("arithmetic", CASES)
def test_defaults_give_the_right_numbers(arithmetic, channels, outputs, gated, direction, device):
    dtype, tf32 = CASES[arithmetic]
    place = torch.device(device)
    big = torch.cuda.is_available()
    if chip_of(place) == "interpreter":
        turn = list(CASES).index(arithmetic) // 3 + (3, 17, 64, 120, 128).index(channels) + gated
        if channels > 64 or arithmetic in ("float16", "tf32") or (turn + tune.DIRECTIONS.index(direction)) % 2:
            pytest.skip("takes minutes in the interpreter")
        channels, outputs = min(channels, 24), min(outputs, 34)
    problem = tune.Problem(17 if big else 2, channels, outputs, 3, 27 if big else 11, dtype, gated)
    with torch.backends.cudnn.flags(allow_tf32=tf32):
        make, tensors = problem.product(direction, place)
        layer = make(*tensors).layer
        # As of a full-size layer: the number of pixels decides the size of the tile.
        tile = default_tile(replace(layer, pixels=64 * 32 * 32))
        for one in dict.fromkeys((tile._replace(tma=layer.tma and tile.tma), tile._replace(tma=False))):
            product = make(*tensors, choice=Choice("triton", one, "a test"))
            error = check.error_of(product, check.results(product.run(*tensors)), tensors)
            assert error <= check.tolerance(product), one
