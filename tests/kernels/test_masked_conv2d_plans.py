"""What runs a product of the masked convolution: plans of calls, tiles, the rule, measured tables."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastgen.kernels import common
from fastgen.kernels.masked_conv2d import catalogue, config, launch, tune, walk
from fastgen.kernels.masked_conv2d.config import Layer, Tile
from fastgen.kernels.masked_conv2d.launch import Backward
from fastgen.kernels.masked_conv2d.products import Convolve, box_of
from fastgen.models import GatedPixelCNN
from fastgen.nn import MaskedConv2d
from fastgen.ops import masked_conv2d
from tests.ops.masked_conv2d_truth import problem

CPU = torch.device("cpu")
CHIPS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    launch.forget()
    yield
    launch.forget()


def elsewhere(tensor):
    """The same in memory that begins an element later."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride())
    return moved.copy_(tensor)


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
    monkeypatch.setattr(launch, "PLANS", 2)
    masked_conv2d(x.detach()[:, :, :3], weight.detach(), mask, bias.detach(), impl="triton")
    assert len(launch._plans) == 1


def test_gradients_of_one_kind_are_planned_once(monkeypatch):
    """What their plans depend on beside the call that they are of: the gradient that comes in, what is asked for, and
    the precision, which may be set anew after the forward."""
    made = []
    whole = Backward.__init__
    monkeypatch.setattr(Backward, "__init__", lambda self, *args, **more: made.append(1) or whole(self, *args, **more))
    x, weight, mask, bias = problem("B", 2, 16, 8, 4, 4, (3, 3), dtype=torch.float32)
    grad = torch.randn(2, 4, 4, 4)

    def run(grad, bias):
        out = masked_conv2d(x, weight, mask, bias, padding=1, activation="gated", impl="triton")
        return torch.autograd.grad(out, [one for one in (x, weight, bias) if one.requires_grad], grad)

    expected = run(grad, bias)
    run(2 * grad, bias)
    assert made == [1]
    as_map = grad.contiguous(memory_format=torch.channels_last)
    for other, asked in ((as_map, bias), (elsewhere(as_map), bias), (grad, bias.detach())):
        made.clear()
        for one, two in zip(run(other, asked), expected, strict=False):
            torch.testing.assert_close(one, two)
        assert made == [1]
    out = masked_conv2d(x, weight, mask, bias, padding=1, activation="gated", impl="triton")
    monkeypatch.setattr(launch, "precision_of", lambda x: "another")
    torch.autograd.grad(out, (x, weight, bias), grad)
    assert made == [1, 1]


ANOTHER = {
    "strides of x": lambda x, w, m, b, o: (x.contiguous(), w, m, b, o),
    "alignment of x": lambda x, w, m, b, o: (elsewhere(x), w, m, b, o),
    "strides of the weight": lambda x, w, m, b, o: (x, w.contiguous(memory_format=torch.channels_last), m, b, o),
    "alignment of the weight": lambda x, w, m, b, o: (x, elsewhere(w), m, b, o),
    "alignment of the bias": lambda x, w, m, b, o: (x, w, m, elsewhere(b), o),
    "strides of the mask": lambda x, w, m, b, o: (x, w, m.contiguous(memory_format=torch.channels_last), b, o),
    "alignment of the mask": lambda x, w, m, b, o: (x, w, elsewhere(m), b, o),
    "mask": lambda x, w, m, b, o: (x, w, ~m, b, o),
    "no mask": lambda x, w, m, b, o: (x, w, None, b, o),
    "no bias": lambda x, w, m, b, o: (x, w, m, None, o),
    "dtype": lambda x, w, m, b, o: (x.bfloat16(), w.bfloat16(), m, b.bfloat16(), o),
    "padding": lambda x, w, m, b, o: (x, w, m, b, {**o, "padding": (1, 0)}),
    "activation": lambda x, w, m, b, o: (x, w, m, b, {**o, "activation": "relu"}),
    "training": lambda x, w, m, b, o: (x, w.clone().requires_grad_(), m, b, o),
}


@pytest.mark.parametrize("changed", ANOTHER)
def test_another_kind_of_call_is_planned_anew(changed):
    x, weight, mask, bias = (one.detach() for one in problem("B", 2, 16, 8, 4, 5, dtype=torch.float32))
    call = (x.contiguous(memory_format=torch.channels_last), weight, mask, bias, {"padding": 1, "activation": "gated"})
    for count, (*tensors, options) in enumerate((call, ANOTHER[changed](*call), call)):
        found = masked_conv2d(*tensors, **options, impl="triton")
        expected = masked_conv2d(*tensors, **options, impl="reference")
        torch.testing.assert_close(found, expected, atol=1e-5 if x.dtype == found.dtype else 1e-2, rtol=1e-2)
        assert len(launch._plans) == min(count + 1, 2)


def test_results_are_made_on_the_device_of_the_tensors(monkeypatch):
    """Two pretended GPUs, of which the other one is current."""
    current, made = [0], []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    x = SimpleNamespace(get_device=lambda: 1, is_cuda=False)
    plan = SimpleNamespace(run=lambda *tensors: made.append(current[0]))
    plans = {}
    launch.planned(plans, "a kind", (x,), (lambda x: x,), lambda x: made.append(current[0]) or plan)
    launch.run(plans["a kind"], (x,))
    assert made == [1, 1] and current == [0]


def test_a_call_that_is_planned_takes_few_steps_of_python(monkeypatch):
    """Calls of functions, which are what the host's time is made of; launches are left out."""
    x, weight, mask, bias = (one.detach() for one in problem("B", 2, 16, 8, 4, 4, dtype=torch.float32))
    options = {"padding": 1, "activation": "gated", "impl": "triton"}
    masked_conv2d(x, weight, mask, bias, **options)
    monkeypatch.setattr(common.Launches, "start", lambda self, *tensors: None)
    calls = []
    masked_conv2d(x, weight, mask, bias, **options)
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event.endswith("call") else None)
    try:
        masked_conv2d(x, weight, mask, bias, **options)
    finally:
        sys.setprofile(None)
    assert 10 < len(calls) <= 66


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


def layers(chip, precision):
    for direction, dtype, rows, channels, pixels in itertools.product(
        ("out", "in", "weight"), (torch.float32, torch.bfloat16), (1, 24, 128, 768), (1, 3, 48, 256), (50, 10**6)
    ):
        for gated in (False, True) if direction == "out" else (False,):
            sizes = 2 * rows if gated else rows, channels, 5, 6, pixels
            yield Layer(direction, chip, dtype, precision, *sizes, gated, config.has_tma(chip))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_default_fits_its_chip(chip, precision):
    """Powers of two, at least 16 for a product, the buffers within shared memory, the sums within the registers."""
    for layer in layers(chip, precision):
        tile = config.default_tile(layer)
        assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.M, tile.N, tile.K))
        weight = layer.direction == "weight"
        step = tile.M * (tile.N + tile.K) if weight else (tile.M + tile.N) * tile.K
        buffers = tile.num_stages - (chip not in ("sm_90", "sm_100") and not tile.tma)  # registers hold one there
        assert max(buffers, 1) * step * layer.dtype.itemsize <= CHIPS[chip] * 1024
        sums = tile.N * tile.K if weight else tile.M * tile.N
        assert sums / (32 * tile.num_warps) <= 128
        assert not tile.tma or config.has_tma(chip)
        found = tune.candidates(layer)
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


LAYER = Layer("out", "sm_90", torch.bfloat16, "ieee", 256, 128, 5, 6, 16 * 28 * 28, True, True)


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
        ({"channels": 3, "taps": 24, "boxed": 28}, "ieee", ""),
        ({"taps": 25, "boxed": 28}, "ieee", "25 of 28 taps"),
    ],
)
def test_cudnn_by_rule(changes, precision, why):
    layer = replace(LAYER, precision=precision, **changes)
    found = config.rule(layer)
    assert why in found and bool(why) == bool(found)
    assert config.rule(replace(layer, chip="interpreter")) == ""
    choice = config.choose(CPU, layer)
    assert choice.provider == ("cudnn" if why else "triton") and why in choice.why


def test_what_the_kernels_cannot_do_is_done_by_cudnn():
    layer = Layer("in", "interpreter", torch.bfloat16, "float32", 128, 128, 5, 6, 1000, False, False)
    assert config.choose(CPU, layer).provider == "triton"
    assert config.choose(CPU, replace(layer, strided=True)).provider == "cudnn"
    assert config.choose(CPU, replace(layer, pixels=0)).provider == "cudnn"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_TUNED", str(tmp_path))
    monkeypatch.setattr(config, "EMULATED", "sm_90")
    config.measured.cache_clear()
    yield tmp_path / "sm-90.json"
    config.measured.cache_clear()


def test_without_a_measurement_the_rule_decides(table):
    found = config.choose(CPU, LAYER)
    assert found[:2] == ("triton", config.default_tile(LAYER)) and "not measured" in found.why
    assert "not yet measured" in config.describe("sm_90")
    assert not list(config.SHIPPED.glob("*.json"))


def test_a_measured_choice_is_saved_and_overrides_the_rule(table):
    by_rule = replace(LAYER, channels=129, tma=False)
    tile = Tile(64, 32, 64, 4, 3, True)
    row = {"provider": "cudnn", "tile": tile._asdict(), "ms": {"triton": 2.0, "cudnn": 1.0}, "refused": 0}
    assert tune.save("sm_90", {LAYER.key: row}, {"torch": "2"}) == table
    tune.save("sm_90", {by_rule.key: {**row, "provider": "triton"}}, {"torch": "2"})
    found = config.choose(CPU, LAYER)
    assert found[:2] == ("cudnn", tile) and "cudnn 1 ms" in found.why
    assert config.choose(CPU, by_rule)[:2] == ("triton", Tile(64, 32, 64, 4, 3, False))
    assert "cudnn 1 ms" in config.describe("sm_90") and LAYER.key in config.describe("sm_90")
    assert [file.name for file in table.parent.iterdir()] == [table.name]
    near = replace(LAYER, pixels=LAYER.pixels + 7)
    assert config.choose(CPU, near).provider == "cudnn"


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"layers": {"k": {"provider": "magic"}}}', '{"layers": {"k": {"provider": "cudnn"}}}']
)
def test_a_damaged_table_is_named(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match=r"sm-90\.json is no table"):
        config.choose(CPU, LAYER)


def test_a_layer_tells_what_will_run(monkeypatch):
    layer = MaskedConv2d(16, 32, 3, padding=1, mask_type="B", activation="gated")
    assert "PyTorch's definition" in layer.provider(torch.zeros(1, 16, 4, 4))
    monkeypatch.setattr(config, "EMULATED", "sm_90")
    monkeypatch.setattr("fastgen.nn.masked_conv.uses_triton", lambda impl, x: True)
    with torch.backends.cudnn.flags(allow_tf32=True):
        lines = layer.provider(torch.zeros(1, 16, 4, 4)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["result", "gradient of the input", "gradient of the weight"]
    assert "triton" in lines[0] and "cuDNN" in lines[2] and "by rule, not measured" in lines[2]
    odd = MaskedConv2d(129, 258, 1, mask_type="B", data_channels=3, dtype=torch.bfloat16)
    lines = odd.provider(torch.zeros(1, 129, 4, 4, dtype=torch.bfloat16)).splitlines()
    assert all("cuDNN" in line and "channels are no multiple of 8" in line for line in lines)


def test_choices_are_for_one_device_and_precision(monkeypatch):
    """TF32 that is switched is another kind of call."""
    monkeypatch.setattr(launch, "precision_of", lambda x: "ieee")
    x, weight, mask, bias = (one.detach() for one in problem("B", 2, 16, 16, 4, 4, (1, 1), dtype=torch.float32))
    masked_conv2d(x, weight, mask, bias, impl="triton")
    monkeypatch.setattr(launch, "precision_of", lambda x: "tf32")
    masked_conv2d(x, weight, mask, bias, impl="triton")
    assert len(launch._plans) == 2


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
