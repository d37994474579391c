"""The host's side of the masked convolution: what is visited, what is remembered, what runs and whether it is right."""

import gc
import itertools
import json
import sys

import pytest
import torch

from fastgen.kernels.masked_conv2d import catalogue, check, config, launch, products, tune, walk
from fastgen.kernels.masked_conv2d.config import Layer, Tile
from fastgen.kernels.masked_conv2d.products import Convolve, box_of
from fastgen.kernels.masked_conv2d.walk import Geometry, known_walk, walk_of
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.nn import MaskedConv2d
from fastgen.ops import causal_mask, masked_conv2d
from tests.ops.masked_conv2d_truth import problem

CPU = torch.device("cpu")
SAME = Geometry((1, 1), (1, 1), (1, 1))
CHIPS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


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
    kind = Layer(direction, torch.bfloat16, rows, channels, found.live, 2**17, 1, gated, True)
    boxed = (found.box[1] - found.box[0]) * found.width
    tile = config.default_tile("sm_90", kind, "ieee")
    runs = config.rule("sm_90", kind, "ieee", boxed) == ""
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
    assert known_walk(mask, mask.shape, 1) is first and known_walk(mask, mask.shape, 2).parts == 2
    mask.fill_(True)
    assert known_walk(mask, mask.shape, 1).taps == 9
    with torch.inference_mode():
        other = mask.clone()
        assert known_walk(other, other.shape, 1).taps == 9
    before = len(walk._known)
    del mask
    gc.collect()
    assert len(walk._known) == before - 1


def test_calls_of_one_kind_are_planned_once(monkeypatch):
    made = []
    whole = Convolve.__init__
    monkeypatch.setattr(Convolve, "__init__", lambda self, *args, **more: made.append(1) or whole(self, *args, **more))
    x, weight, mask, bias = problem("B", 2, 16, 8, 4, 4, dtype=torch.float32)
    for _ in range(3):
        masked_conv2d(x.detach(), weight.detach(), mask.clone(), bias.detach(), impl="triton")
    assert made == [1]
    masked_conv2d(x.detach()[:1], weight.detach(), mask, bias.detach(), impl="triton")
    assert made == [1, 1]
    monkeypatch.setattr(launch, "CALLS", 2)
    masked_conv2d(x.detach()[:, :, :3], weight.detach(), mask, bias.detach(), impl="triton")
    assert len(launch._calls) == 1


def test_nothing_is_decided_inside_a_capture(monkeypatch):
    """A device that captures, pretended: what was seen before runs, what is new is refused."""
    x, weight, mask, bias = (one.detach() for one in problem("B", 2, 16, 8, 4, 4, dtype=torch.float32))
    masked_conv2d(x, weight, mask, bias, impl="triton")

    def refuse(x, what, how):
        raise RuntimeError(f"{what} {how}")

    monkeypatch.setattr(launch, "refuse_in_capture", refuse)
    monkeypatch.setattr(walk, "refuse_in_capture", refuse)
    masked_conv2d(x, weight, mask, bias, impl="triton")
    with pytest.raises(RuntimeError, match="a shape"):
        masked_conv2d(x[:1], weight, mask, bias, impl="triton")
    with pytest.raises(RuntimeError, match="reads a mask once"):
        masked_conv2d(x, weight, mask.clone(), bias, impl="triton")


def test_a_capture_is_noticed(monkeypatch):
    class OnAGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before the capture, with this shape"):
        walk.refuse_in_capture(OnAGpu(), "chooses", "this shape")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    walk.refuse_in_capture(OnAGpu(), "chooses", "this shape")


def layers(tma):
    for direction, dtype, rows, channels, pixels in itertools.product(
        ("out", "in", "weight"), (torch.float32, torch.bfloat16), (1, 24, 128, 768), (1, 3, 48, 256), (50, 10**6)
    ):
        for gated in (False, True) if direction == "out" else (False,):
            yield Layer(direction, dtype, 2 * rows if gated else rows, channels, 5, pixels, 1, gated, tma)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_default_fits_its_chip(chip, precision):
    """Powers of two, at least 16 for a product, the buffers within shared memory, the sums within the registers."""
    for layer in layers(config.has_tma(chip)):
        tile = config.default_tile(chip, layer, precision)
        assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.M, tile.N, tile.K))
        weight = layer.direction == "weight"
        step = tile.M * (tile.N + tile.K) if weight else (tile.M + tile.N) * tile.K
        buffers = tile.num_stages - (chip not in ("sm_90", "sm_100") and not tile.tma)  # registers hold one there
        assert max(buffers, 1) * step * layer.dtype.itemsize <= CHIPS[chip] * 1024
        sums = tile.N * tile.K if weight else tile.M * tile.N
        assert sums / (32 * tile.num_warps) <= 128
        assert not tile.tma or config.has_tma(chip)
        found = config.candidates(chip, layer, precision)
        assert found[0] == tile and len(found) == len(set(found)) <= 8


@pytest.mark.parametrize("size", [(1, 5, 5), (7, 4, 4), (2, 28, 28), (3, 1, 200), (1, 1, 1), (128, 8, 8)], ids=str)
def test_boxes_waste_the_least(size):
    box = box_of(128, *size)
    assert box[0] * box[1] * box[2] == 128
    count = 1
    for full, side in zip(size, box, strict=True):
        assert side & (side - 1) == 0
        count *= -(-full // side)
    assert count >= -(-size[0] * size[1] * size[2] // 128)
    if size == (128, 8, 8):
        assert count == 64


LAYER = Layer("out", torch.bfloat16, 256, 128, 5, 16 * 28 * 28, 1, True, True)


@pytest.mark.parametrize(
    ("changes", "precision", "why"),
    [
        ({}, "ieee", ""),
        ({"direction": "weight"}, "ieee", ""),
        ({"dtype": torch.float32}, "tf32", ""),
        ({"dtype": torch.float32}, "ieee", "float32 without TF32"),
        ({"dtype": torch.float32, "direction": "weight"}, "tf32", "gradient of a float32 weight"),
        ({"channels": 129}, "ieee", "no multiple of 8"),
        ({"channels": 130, "dtype": torch.float32}, "tf32", "no multiple of 4"),
        ({"channels": 120}, "ieee", ""),
        ({"channels": 3, "taps": 24}, "ieee", ""),
        ({"taps": 25}, "ieee", "25 of 28 taps"),
    ],
)
def test_cudnn_by_rule(changes, precision, why, monkeypatch):
    layer = Layer(**{**vars(LAYER), **changes})
    boxed = 28 if layer.taps > 5 else 6
    found = config.rule("sm_90", layer, precision, boxed)
    assert why in found and bool(why) == bool(found)
    assert config.rule("interpreter", layer, precision, boxed) == ""
    monkeypatch.setattr(config, "EMULATED", "sm_90")
    assert config.choose(CPU, layer, precision, boxed).provider == ("cropped" if why else "triton")


def test_what_the_kernels_cannot_do_is_done_by_cudnn():
    layer = Layer("in", torch.bfloat16, 128, 128, 5, 1000, 4, False, False)
    assert config.choose(CPU, layer, "float32", 6).provider == "cropped"
    assert config.choose(CPU, Layer(**{**vars(layer), "step": 1}), "float32", 6).provider == "triton"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_TUNED", str(tmp_path))
    monkeypatch.setattr(config, "EMULATED", "sm_90")
    config.measured.cache_clear()
    yield tmp_path / "sm-90.json"
    config.measured.cache_clear()


def test_without_a_measurement_the_rule_decides(table):
    found = config.choose(CPU, LAYER, "ieee", 6)
    assert found[:2] == ("triton", config.default_tile("sm_90", LAYER, "ieee")) and "not measured" in found.why
    assert "not yet measured" in config.describe("sm_90")
    assert not list(config.SHIPPED.glob("*.json"))


def test_a_measured_choice_is_saved_and_overrides_the_rule(table):
    by_rule = Layer(**{**vars(LAYER), "channels": 129, "tma": False})
    tile = Tile(64, 32, 64, 4, 3, True)
    row = {"provider": "cropped", "tile": tile, "ms": {"triton": 2.0, "cropped": 1.0}, "refused": 0}
    assert config.save("sm_90", {LAYER.key: row}, {"torch": "2"}) == table
    config.save("sm_90", {by_rule.key: {**row, "provider": "triton"}}, {"torch": "2"})
    found = config.choose(CPU, LAYER, "ieee", 6)
    assert found[:2] == ("cropped", tile) and "cropped 1 ms" in found.why
    assert config.choose(CPU, by_rule, "ieee", 6)[:2] == ("triton", Tile(64, 32, 64, 4, 3, False))
    assert "cropped 1 ms" in config.describe("sm_90") and LAYER.key in config.describe("sm_90")
    assert [file.name for file in table.parent.iterdir()] == [table.name]
    near = Layer(**{**vars(LAYER), "pixels": LAYER.pixels + 7})
    assert config.choose(CPU, near, "ieee", 6).provider == "cropped"


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"layers": {"k": {"provider": "magic"}}}', '{"layers": {"k": {"provider": "dense"}}}']
)
def test_a_damaged_table_is_named(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match=r"sm-90\.json is no table"):
        config.choose(CPU, LAYER, "ieee", 6)


def test_a_layer_tells_what_will_run(monkeypatch):
    layer = MaskedConv2d(16, 32, 3, padding=1, mask_type="B", activation="gated")
    assert "PyTorch's definition" in layer.provider(torch.zeros(1, 16, 4, 4))
    monkeypatch.setattr(config, "EMULATED", "sm_90")
    monkeypatch.setattr("fastgen.nn.masked_conv.uses_triton", lambda impl, x: True)
    with torch.backends.cudnn.flags(allow_tf32=True):
        lines = layer.provider(torch.zeros(1, 16, 4, 4)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["result", "gradient of the input", "gradient of the weight"]
    assert "triton" in lines[0] and "cropped" in lines[2] and "by rule, not measured" in lines[2]


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_the_search_refuses_wrong_numbers(direction, monkeypatch):
    """In the interpreter: a configuration that computes something else is not chosen, however fast."""
    monkeypatch.setattr(tune, "milliseconds", lambda call, device: 1.0)
    product = tune.Problem(1, 17, 6, 3, 4, torch.float32, True).product(direction, CPU)
    right, wrong = Tile(32, 16, 16, 4, 1), Tile(16, 16, 16, 4, 1)
    name = "masked_conv2d_weight_kernel" if direction == "weight" else "masked_conv2d_kernel"
    place = 3 if direction == "weight" else 6
    broken = Broken(getattr(products, name), lambda a, c: c["IMAGES"] == 16 and a[place].mul_(1.01))
    monkeypatch.setattr(products, name, broken)
    with pytest.warns(UserWarning, match="gives wrong results"):
        row = tune.search(product, CPU, [wrong, right])
    assert (row["tile"], row["refused"]) == (right, 1)
    assert set(row["ms"]) == {"dense", "cropped", "triton"}
    with pytest.warns(UserWarning, match="gives wrong results"):
        row = tune.search(product, CPU, [wrong])
    assert row["provider"] != "triton" and row["refused"] == 1
    json.dumps(row["ms"])


class Broken:
    """A kernel that does its work and then something else."""

    def __init__(self, kernel, spoil):
        self.kernel, self.spoil = kernel, spoil

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            self.spoil(arguments, constants)

        return run


def layer_and_gradients(channels_last=True):
    torch.manual_seed(0)
    x, weight, mask, bias = problem("B", 2, 16, 16, 4, 4, (1, 1), dtype=torch.float32)
    out = masked_conv2d(x, weight, mask, bias, impl="triton")
    grad = torch.randn_like(out).contiguous(memory_format=torch.channels_last)
    return [out, *torch.autograd.grad(out, (x, weight, bias), grad)]


def test_what_gives_right_numbers_is_tried_once(monkeypatch):
    monkeypatch.setattr(check, "can_be_wrong", lambda x: True)
    tried = []
    whole = check.is_right
    monkeypatch.setattr(check, "is_right", lambda *args: tried.append(args[0]) or whole(*args))
    found = layer_and_gradients()
    assert [one.func.__name__ for one in tried] == ["Convolve", "WeightGradient", "Convolve"]
    layer_and_gradients()
    assert len(tried) == 3
    x, weight, mask, bias = problem("B", 5, 16, 16, 4, 4, (1, 1), dtype=torch.float32)
    masked_conv2d(x.detach(), weight.detach(), mask, bias.detach(), impl="triton")
    assert len(tried) == 3, "another batch is the same kernel"
    monkeypatch.setattr(check, "can_be_wrong", lambda x: False)
    launch.forget()
    assert all(torch.equal(one, two) for one, two in zip(found, layer_and_gradients(), strict=True))


def spoiled(place, boxes):
    """Multiplies an argument, a tensor or a descriptor, where a map is given by descriptors, or always."""

    def spoil(arguments, constants):
        if not boxes or constants["HEIGHT"] > 0:
            getattr(arguments[place], "base", arguments[place]).mul_(1.1)

    return spoil


@pytest.mark.parametrize(
    ("kernel", "place"),
    [
        ("masked_conv2d_kernel", 6),
        # The weight, while the sums for the bias stay right; and the other way round.
        ("masked_conv2d_weight_kernel", 3),
        ("masked_conv2d_weight_kernel", 4),
    ],
)
def test_what_gives_wrong_numbers_is_not_used(kernel, place, monkeypatch):
    """By descriptors it is wrong, without it is right; then nothing is right."""
    expected = layer_and_gradients()
    monkeypatch.setattr(check, "can_be_wrong", lambda x: True)
    whole = getattr(products, kernel)
    for boxes in (True, False):
        launch.forget()
        monkeypatch.setattr(products, kernel, Broken(whole, spoiled(place, boxes)))
        with pytest.warns(UserWarning, match="gives wrong results"):
            found = layer_and_gradients()
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two)
    assert check.FAILED in reasons()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", tune.DIRECTIONS)
@pytest.mark.parametrize("tap", range(5))
def test_a_wrong_tap_is_noticed(tap, direction, dtype, monkeypatch):
    """One weight of 5 * 24 is taken from another place, or is missing in the gradient."""
    make, tensors = tune.Problem(1, 24, 32, 3, 6, dtype, False).product(direction, CPU)
    choice = make(*tensors).choice
    assert check.is_right(make, tensors, choice)

    def spoil(arguments, constants):
        if direction == "weight":
            arguments[3][:, 5, tap * 32 + 7] = 0
        else:
            column = tap * 32 + 7
            arguments[2][5, column] = arguments[2][5, column + 1]

    name = "masked_conv2d_weight_kernel" if direction == "weight" else "masked_conv2d_pack_kernel"
    monkeypatch.setattr(products, name, Broken(getattr(products, name), spoil))
    with pytest.warns(UserWarning, match="gives wrong results"):
        assert not check.is_right(make, tensors, choice)


def reasons():
    runs = [call.run for call in launch._calls.values()]
    products = [getattr(run, name, run) for run in runs for name in ("weight_gradient", "x_gradient")]
    return [one.choice.why for one in products if hasattr(one, "choice")]


def test_what_does_not_run_is_not_used_but_full_memory_is_told(monkeypatch):
    monkeypatch.setattr(check, "can_be_wrong", lambda x: True)

    def fail(arguments, constants):
        if constants["HEIGHT"] > 0:
            raise error

    monkeypatch.setattr(products, "masked_conv2d_kernel", Broken(products.masked_conv2d_kernel, fail))
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        layer_and_gradients()
    assert not check._trusted
    error = RuntimeError("out of shared memory")
    with pytest.warns(UserWarning, match="does not run and is not used: out of shared memory"):
        layer_and_gradients()


def test_choices_are_for_one_device_and_precision(monkeypatch):
    """TF32 that is switched is another kind of call."""
    monkeypatch.setattr(launch, "precision_of", lambda device, dtype: "ieee")
    x, weight, mask, bias = (one.detach() for one in problem("B", 2, 16, 16, 4, 4, (1, 1), dtype=torch.float32))
    masked_conv2d(x, weight, mask, bias, impl="triton")
    monkeypatch.setattr(launch, "precision_of", lambda device, dtype: "tf32")
    masked_conv2d(x, weight, mask, bias, impl="triton")
    assert len(launch._calls) == 2


def test_the_search_wants_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_training_step_of_the_gated_pixelcnn_compiles_few_kernels(monkeypatch):
    """28x28 images, batch 64, bfloat16, as on an H100; the gradient of the logits lies as they do."""
    for module in ("fastgen.ops.masked_conv2d", "fastgen.nn.masked_conv"):
        monkeypatch.setattr(sys.modules[module], "uses_triton", lambda impl, x: True)
    model = GatedPixelCNN((1, 28, 28), layers=3).bfloat16()
    with catalogue.noted("sm_90") as found:
        out = model(torch.zeros(64, 1, 28, 28, dtype=torch.long))
        out.backward(torch.empty_like(out))
    names = [kind[0].__name__ for kind in found]
    assert names.count("masked_conv2d_kernel") == 5  # with what launches them, not the number of layers
    assert len(found) <= 14
