"""What the masked convolution visits: masks are read once, and walks see all that is live."""

import gc

import pytest
import torch

from fastgen.kernels.masked_conv2d import config, launch, walk
from fastgen.kernels.masked_conv2d.config import Layer
from fastgen.kernels.masked_conv2d.walk import known_walk, walk_of
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.nn import MaskedConv2d
from fastgen.ops import causal_mask


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    launch.forget()
    yield
    launch.forget()


def visited(found, kernel_width, rows, channels, n, k, mirrored):
    """(tile of n written channels, tap, part, channel) of each step, as the kernels count: `steps_of`, `place_of`."""
    steps = set()
    part_rows = rows // found.parts
    for tile in range(-(-(channels if mirrored else part_rows) // n)):
        parts, blocks = (found.parts, -(-part_rows // k)) if mirrored else (1, -(-channels // k))
        skipped, seen = 0, 0
        if mirrored:
            start = max(tile * n // found.group_channels + 1 - found.shown, 0) * found.group_rows
            skipped = min(start // k, blocks)
            seen = parts * (blocks - skipped)
        else:
            end = (min(tile * n + n, part_rows) - 1) // found.group_rows + found.shown
            seen = min(-(-end * found.group_channels // k), blocks)
        count = max((found.taps - 1) * parts * blocks + seen, 1)
        skipped = min(skipped, blocks - 1)
        for step in range(count):
            tap, block = divmod(step, parts * blocks)
            if mirrored and tap == found.taps - 1:
                block += skipped * (1 + block // (blocks - skipped))
            ky, kx = divmod(found.first + tap, found.width)
            place = (found.box[0] + ky) * kernel_width + found.box[2] + kx
            assert (tile, place, block) not in steps
            steps.add((tile, place, block))
    return steps


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["A", "B", "A3", "B3", "half", "sparse", "none"])
def test_all_that_is_live_is_visited_once(kind, parts, mirrored):
    if kind in ("half", "sparse"):
        mask = torch.rand(12 * parts, 24, 3, 4) < {"half": 0.5, "sparse": 0.01}[kind]
    elif kind == "none":
        mask = torch.zeros(12 * parts, 24, 3, 4, dtype=torch.bool)
    else:
        mask = causal_mask(kind[0], 12, 24, 3, 3 if kind.endswith("3") else 1).repeat(parts, 1, 1, 1)
    found = walk_of(mask, parts)
    width = mask.shape[3]
    n, k = 4, 4
    steps = visited(found, width, 12 * parts, 24, n, k, mirrored)
    for o, i, ky, kx in mask.nonzero().tolist():
        part, row = divmod(o, 12)
        expected = (i // n, ky * width + kx, part * 3 + row // k) if mirrored else (row // n, ky * width + kx, i // k)
        assert expected in steps
    if kind in ("A3", "B3"):  # no block of a later colour of the centre
        centre = [step for step in steps if step[1] == 4]
        pairs = {"A": 3, "B": 6}[kind[0]] * (4 * 8 // 16) * (parts if mirrored else 1)
        assert len(centre) == pairs
    assert found.live == int(mask.any(0).any(0).sum())


def of_layer(name, layer, direction):
    """(whether the kernels compute a product of a layer on an H100 in bfloat16, visited multiply-adds a pixel)."""
    parts = 2 if name.endswith(("vertical", "horizontal")) else 1  # which pass the gate
    outputs, inputs = layer.mask.shape[:2]
    rows, channels = (inputs, outputs) if direction == "in" else (outputs, inputs)
    found = walk_of(layer.mask, parts)
    gated = parts > 1 and direction == "out"
    shape = rows, channels, found.live, found.boxed, 2**17
    kind = Layer(direction, "sm_90", torch.bfloat16, "ieee", *shape, gated, True)
    tile, runs = config.default_tile(kind), config.rule(kind) == ""
    if kind.gathers:
        return runs, -(-rows // tile.N) * tile.N * -(-found.taps * channels // tile.K) * tile.K
    written = tile.N // 2 if gated else tile.N
    steps = visited(found, layer.mask.shape[3], outputs, inputs, written, tile.K, direction == "in")
    return runs, tile.N * tile.K * len(steps)


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)], ids=str)
@pytest.mark.parametrize(("kind", "by_kernels"), [(PixelCNN, 1), (GatedPixelCNN, 1), (PixelRNN, 0)])
def test_little_more_than_the_live_weights_of_the_models_is_visited(kind, by_kernels, shape, direction):
    """Multiply-adds of all layers that the kernels compute, those of the image included, in the default tiles. The
    PixelRNN with colours has 129 and 258 channels, of which cuDNN computes the products."""
    live = seen = everything = 0
    for name, layer in kind(shape).named_modules():
        if not isinstance(layer, MaskedConv2d) or (direction == "in" and layer.in_channels < 16):
            continue  # an image needs no gradient
        runs, count = of_layer(name, layer, direction)
        everything += int(layer.mask.sum())
        live, seen = live + runs * int(layer.mask.sum()), seen + runs * count
    if by_kernels or shape[0] == 1:
        assert live == everything > 0
    else:
        assert live < 0.05 * everything
    assert seen <= 1.1 * live or live < 0.05 * everything


def test_a_mask_is_read_once_and_again_after_a_write():
    mask = causal_mask("A", 16, 16, 3)
    first = known_walk(mask, mask.shape, 1)
    assert (first.taps, first.box, first.live) == (4, (0, 2, 0, 3), 4)
    assert walk.read(mask) is walk.read(mask) and known_walk(mask, mask.shape, 2).parts == 2
    mask.fill_(True)
    assert known_walk(mask, mask.shape, 1).taps == 9
    with torch.inference_mode():
        other = mask.clone()
        assert known_walk(other, other.shape, 1).taps == 9
    mask.data = causal_mask("B", 16, 16, 3)
    assert known_walk(mask, mask.shape, 1).taps == 5
    gc.collect()  # the masks of other tests
    before = len(walk._known)
    del mask
    gc.collect()
    assert len(walk._known) == before - 1


def test_a_capture_is_noticed(monkeypatch):
    class OnAGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before the capture, with this shape"):
        walk.refuse_in_capture(OnAGpu(), "chooses", "this shape")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    walk.refuse_in_capture(OnAGpu(), "chooses", "this shape")
