"""The host's side of the masked convolution: which blocks are visited, what is cached, which configuration runs."""

import gc
import itertools
import json

import pytest
import torch

from fastgen.kernels import masked_conv2d as kernels
from fastgen.kernels import masked_conv2d_check as check
from fastgen.kernels import masked_conv2d_config as config
from fastgen.kernels import masked_conv2d_plan as plans
from fastgen.kernels import tune_masked_conv2d as tune
from fastgen.kernels.masked_conv2d_config import Layer, Tile
from fastgen.kernels.masked_conv2d_plan import Blocks, Geometry, build, known_of, plan_of
from fastgen.kernels.masked_conv2d_tma import box_of
from fastgen.ops import causal_mask

CPU = torch.device("cpu")
SAME = Geometry((1, 1), (1, 1), (1, 1))
CHIPS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


def visited(plan, rows, channels, taps):
    """(row tile, tap, channel) of every real column in every list, with repetitions."""
    found = []
    for _, _, _, block, tile in plan.entries.tolist():
        columns = plan.columns[:3, block * plan.blocks.K : (block + 1) * plan.blocks.K].T.tolist()
        found += [(tile, ky * taps[1] + kx, channel) for channel, ky, kx in columns if channel >= 0]
    return found


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_visits_what_is_live_once_and_no_dead_block(gather, mirrored, parts, density):
    live = torch.rand(22, 37, 3, 2) < density
    if mirrored and parts == 2:
        parts = 1
    plan = build(live, Blocks(4, 16, parts, gather, mirrored), SAME, CPU)
    weights = live.transpose(0, 1) if mirrored else live
    rows, channels = weights.shape[:2]
    seen = visited(plan, rows, channels, (3, 2))
    assert len(seen) == len(set(seen))
    for row, channel, ky, kx in weights.nonzero().tolist():
        assert (row % (rows // parts) // 4, ky * 2 + kx, channel) in set(seen)
    for _, _, _, block, tile in plan.entries.tolist():
        channel, ky, kx = plan.columns[:3, block * 16 : (block + 1) * 16].long()
        used = weights.unflatten(0, (parts, -1))[:, 4 * tile : 4 * tile + 4, channel.clamp(min=0), ky, kx]
        assert (used & (channel >= 0)).any()
    places = plan.places.view(channels, 3, 2)
    for channel, ky, kx in weights.any(0).nonzero().tolist():
        assert plan.columns[:3, places[channel, ky, kx]].tolist() == [channel, ky, kx]
    assert plan.live_columns == len(seen) / plan.row_tiles


@pytest.mark.parametrize(("kind", "centre"), [("A", 3), ("B", 6)])
def test_dead_colour_blocks_of_the_centre_are_skipped(kind, centre):
    plan = build(causal_mask(kind, 48, 48, 3, 3), Blocks(16, 16), SAME, CPU)
    assert plan.pairs == 4 * 9 + centre


@pytest.mark.parametrize("stride", [(2, 2), (1, 3)])
def test_the_classes_of_a_stride_share_the_taps_among_them(stride):
    """Every tap reads each output pixel once, whatever the class of the input pixel that it came from."""
    geometry = Geometry(stride, (1, 2), (1, 1))
    plan = build(torch.ones(16, 16, 3, 3, dtype=torch.bool), Blocks(16, 16, mirrored=True), geometry, CPU)
    assert plan.pairs == 9 and len(plan.starts) == stride[0] * stride[1] + 1
    for place in plans.classes_of(geometry, True):
        for ky, kx in itertools.product(range(3), range(3)):
            offset = plans.tap_offsets((ky, kx), place, geometry, True)
            if offset is not None:
                for axis, tap in enumerate((ky, kx)):
                    assert offset[axis] * stride[axis] - geometry.padding[axis] + tap == place[axis]


def test_a_mask_is_read_once_and_again_after_a_write():
    mask = causal_mask("A", 16, 16, 3)
    blocks = Blocks(16, 16)
    first = plan_of(known_of(mask, mask.shape), blocks, SAME, CPU)
    assert plan_of(known_of(mask, mask.shape), blocks, SAME, CPU) is first
    equal = mask.clone()
    assert plan_of(known_of(equal, equal.shape), blocks, SAME, CPU) is first
    mask.fill_(True)
    assert plan_of(known_of(mask, mask.shape), blocks, SAME, CPU).pairs == 9
    assert known_of(mask, mask.shape).taps == 9 and known_of(equal, mask.shape).box == (0, 2, 0, 3)
    with torch.inference_mode():
        other = mask.clone()
        assert known_of(other, other.shape).taps == 9


def test_plans_go_with_their_masks():
    mask = torch.rand(16, 16, 2, 2) < 0.5
    plan_of(known_of(mask, mask.shape), Blocks(16, 16), SAME, CPU)
    before = len(plans._known), len(plans._shared)
    del mask
    gc.collect()
    assert (len(plans._known), len(plans._shared)) == (before[0] - 1, before[1] - 1)


def layers(tma):
    for direction, dtype, rows, channels, pixels in itertools.product(
        ("out", "in", "weight"), (torch.float32, torch.bfloat16), (1, 24, 128, 768), (1, 3, 48, 256), (50, 10**6)
    ):
        forms = [(1, "none"), (2, "none")] if direction == "out" else [(1, "none"), (1, "sign"), (2, "valve")]
        for parts, saved in forms:
            tensors = tma and direction != "weight" and saved == "none"
            yield Layer(direction, dtype, rows, parts, channels, 5, pixels, 1, tensors, saved)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_default_fits_its_chip(chip, precision):
    """Powers of two, at least 16 for a product, the buffers within shared memory, the sums within the registers."""
    for layer in layers(config.has_tma(chip)):
        tile = config.default_tile(chip, layer, precision)
        assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.M, tile.N, tile.K))
        weight = layer.direction == "weight"
        buffers = tile.num_stages if weight else (tile.num_stages + 1) // 2
        if not weight and chip not in ("sm_90", "sm_100"):  # a product reads registers there, and frees a buffer early
            buffers = max(1, buffers - 1)
        maps = {"none": 1, "sign": 2, "valve": 3}[layer.saved]
        step = tile.M * (maps * tile.N + tile.K) if weight else (maps * tile.M + layer.parts * tile.N) * tile.K
        assert buffers * step * layer.dtype.itemsize <= CHIPS[chip] * 1024
        sums = layer.parts * tile.N * tile.K if weight else tile.M * tile.N
        sums *= layer.parts if layer.direction == "out" else 1
        assert sums / (32 * tile.num_warps) <= 128
        assert not tile.tma or config.has_tma(chip)
        assert tile in config.candidates(chip, layer, precision)


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


LAYER = Layer("out", torch.bfloat16, 128, 2, 128, 5, 16 * 28 * 28, 1, True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU/1")
    monkeypatch.setattr(config, "chip_of", lambda device: "sm_90")
    for cache in (config.measured, config.choose):
        cache.cache_clear()
    yield tmp_path / "A-GPU-1.json"
    for cache in (config.measured, config.choose):
        cache.cache_clear()


def test_without_a_measurement_the_default_runs(table):
    assert config.choose(CPU, LAYER, "ieee") == ("triton", config.default_tile("sm_90", LAYER, "ieee"))
    assert "not yet measured" in config.describe("A GPU/1")
    assert not list(config.SHIPPED.glob("*.json"))


def test_a_measured_choice_is_saved_and_followed(table):
    slower = Layer("in", torch.bfloat16, 128, 1, 128, 5, 16 * 28 * 28, 1, False)
    tile = Tile(64, 32, 64, 4, 3, True)
    row = {"provider": "cropped", "tile": tile, "ms": {"triton": 2.0, "cropped": 1.0}, "refused": 0}
    assert config.save("A GPU/1", {LAYER.key: row}, {"torch": "2"}) == table
    config.save("A GPU/1", {slower.key: {**row, "provider": "triton"}}, {"torch": "2"})
    assert config.choose(CPU, LAYER, "ieee") == ("cropped", tile)
    assert config.choose(CPU, slower, "ieee") == ("triton", Tile(64, 32, 64, 4, 3, False))
    assert "cropped 1 ms" in config.describe("A GPU/1") and LAYER.key in config.describe("A GPU/1")
    assert [file.name for file in table.parent.iterdir()] == [table.name]
    near = Layer("out", torch.bfloat16, 128, 2, 128, 5, 16 * 28 * 28 + 7, 1, True)
    assert config.choose(CPU, near, "ieee")[0] == "cropped"


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"layers": {"k": {"provider": "magic"}}}', '{"layers": {"k": {"provider": "dense"}}}']
)
def test_a_damaged_table_is_named(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match=r"A-GPU-1\.json is no table"):
        config.choose(CPU, LAYER, "ieee")


def test_the_search_refuses_wrong_numbers(monkeypatch):
    """In the interpreter: a configuration that computes something else is not chosen, however fast."""
    problem = check.Problem(1, 17, 6, 3, 4, torch.float32, True)
    monkeypatch.setattr(tune, "milliseconds", lambda call, device: 1.0)
    for name, product in check.products(problem, CPU).items():
        right, wrong = Tile(32, 16, 16, 4, 1), Tile(16, 16, 16, 4, 1)
        run = product.run

        def faulty(choice, run=run):
            return run(choice) * (1.01 if choice == ("triton", Tile(16, 16, 16, 4, 1)) else 1)

        product.run = faulty
        row = tune.search(product, CPU, [wrong, right], False)
        assert (row["tile"], row["refused"]) == (right, 1), name
        assert set(row["ms"]) == {"dense", "cropped", "triton"}
        row = tune.search(product, CPU, [wrong], False)
        assert row["provider"] != "triton" and row["refused"] == 1
        json.dumps(row["ms"])


@pytest.mark.parametrize(
    ("direction", "channels", "parts", "saved"),
    [
        ("out", 17, 2, "none"),
        ("in", 32, 1, "none"),
        ("weight", 3, 1, "none"),
        ("in", 17, 2, "valve"),
        ("weight", 3, 2, "valve"),
        ("in", 17, 1, "relu"),
        ("weight", 17, 1, "sign"),
    ],
)
def test_a_configuration_is_trusted_once_it_gave_the_right_numbers(direction, channels, parts, saved, monkeypatch):
    """In the interpreter, with kernels that are right, and with some that write nothing."""
    monkeypatch.setattr(check, "_found", {})
    tile = Tile(128, 16, 16, 4, 1)
    layer = Layer(direction, torch.float32, 6, parts, channels, 5, 100, 1, False, saved)
    assert check.trusted(CPU, layer, tile, False)
    if direction == "weight":  # right weights, wrong sums for the bias
        found = kernels.sum_weight_gradient
        monkeypatch.setattr(kernels, "sum_weight_gradient", lambda *all_of: (found(*all_of)[0], torch.ones(1, 1)))
        with pytest.warns(UserWarning, match="it is not used"):
            assert not check.trusted(CPU, layer, Tile(128, 16, 16, 2, 1), False)
    monkeypatch.setattr(kernels, "convolve", lambda *arguments, **more: arguments[6].zero_())
    monkeypatch.setattr(kernels, "sum_weight_gradient", lambda *arguments: (torch.zeros_like(arguments[2]), None))
    assert check.trusted(CPU, layer, tile, False), "asked a second time, it is not tried again"
    with pytest.warns(UserWarning, match="it is not used"):
        assert not check.trusted(CPU, layer, Tile(128, 16, 16, 8, 1), False)


def test_what_is_not_trusted_is_left_to_cudnn(monkeypatch):
    asked = []
    monkeypatch.setattr(check, "trusted", lambda device, layer, tile, tf32: asked.append(tile) or False)
    default = Tile(128, 64, 64, 8, 5, True)
    monkeypatch.setattr(kernels, "choose", lambda device, layer, precision: ("triton", default))

    class OnAGpu:
        is_cuda, device, dtype = True, CPU, torch.bfloat16

    assert kernels._choice(OnAGpu(), LAYER) == ("dense", default)
    assert asked == [default, Tile(128, 64, 64, 8, 5, False)]


def test_the_search_wants_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
