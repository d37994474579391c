"""Predictions for a GPU: counts compared with hand calculations, rates from rows, the largest term."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.predict import MICRO, Rates, Work, predict, rates_of, tiles_of, work_of
from fastgen import Categorical
from fastgen.kernels.sampler.machine import Tiles
from fastgen.models import GatedPixelCNN
from fastgen.sampling.machine.gpu.fusion import fuse
from fastgen.sampling.machine.language import AffineOffset, Memory, Pointwise, Product, View, constant, dense_strides
from tests.sampling.models import planned

TILES = Tiles(BM=16, BN=64, BK=32)


class Waves(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.float()).sin()


def view(number, *sizes):
    memory = Memory("stored", number, torch.Size(sizes).numel(), torch.float32)
    return View(memory, sizes, dense_strides(sizes), AffineOffset(0), 0)


@pytest.mark.parametrize(("places", "images", "row_tiles"), [(1, 16, 1), (1, 3, 1), (5, 16, 5), (3, 11, 3)])
def test_a_product_reads_its_packed_weights_once_a_tile_of_rows(places, images, row_tiles):
    product = Product(view(0, places, 70), view(1, places, 40), constant(torch.zeros(40, 70)))
    (one,) = fuse([product])
    packed = 128 * 64  # 70 columns in panels of 64, a depth of 40 in parts of 32
    numbers = images * places * (70 + 2 * 40)  # the rows once a panel
    assert work_of(one, TILES, images) == Work(4 * row_tiles * packed, 16 * row_tiles * packed, 4 * numbers)


def test_pointwise_operations_read_and_write():
    (one,) = fuse([Pointwise("add", view(0, 6), (view(1, 6), 0.5))])
    assert work_of(one, TILES, 3) == Work(0, 0, 4 * 3 * 12)


def row(width, ms, **more):
    shape = f"1000 products 16x{width} by {width}x{width} in one program"
    return {"op": "probes", "provider": "fastgen", "shape": shape, "ms_p50": ms, "matmul_tflop_s": 494.5} | more


def test_rates_are_solved_from_two_probes():
    fixed, rate = 0.6e-6, 8e10
    measured = [row(width, 1e3 * (fixed + 2 * width**2 / rate)) for width in (128, 256)]
    rates, told = rates_of([row(128, 9.9), *measured, row(256, 1.0, provider="eager"), row(64, 1.0)])
    assert set(told) == {"instruction", "weights", "multiply_adds"}
    assert rates.instruction == pytest.approx(fixed) and rates.weights == pytest.approx(rate)
    assert rates.multiply_adds == pytest.approx(Rates.multiply_adds / 2)
    assert rates_of([]) == (Rates(), [])
    assert rates_of([row(128, 1.0)])[0] == replace(Rates(), multiply_adds=rates.multiply_adds)


def test_the_binding_term_is_that_of_the_lowest_rate():
    model = GatedPixelCNN((1, 5, 5), 4, channels=8, layers=2)
    plan = planned(model, model.shape)
    slow = {"weights": 1e6, "multiply_adds": 1e6, "instruction": 1.0, "draw": 1.0}
    names = {"multiply_adds": "products", "instruction": "fixed", "draw": "draws"}
    for rate, value in slow.items():
        found = predict(plan, 16, replace(Rates(), **{rate: value}))
        assert found.binding == names.get(rate, rate)
        assert found.seconds == pytest.approx(sum(found.terms.values()))
    lone = Rates(weights=1e30, together=1e30, multiply_adds=1e30, instruction=1 / MICRO, draw=0)
    steps = [len(fuse(plan.programs[step.program].instructions)) for step in plan.steps[1:]]
    found = predict(plan, 16, lone)
    assert found.instructions == sum(steps) / 25 == pytest.approx(MICRO * found.seconds)
    many = predict(plan, 64 * 132 + 1, lone)  # one tile more than run at the same time
    assert many.seconds == pytest.approx(2 * found.seconds)


def test_a_heavy_program_takes_launches_and_is_shared_by_all_processors(monkeypatch):
    model = GatedPixelCNN((1, 5, 5), 4, channels=8, layers=2)
    plan = planned(model, model.shape)
    free = Rates(weights=1e30, together=1e30, multiply_adds=1e30, instruction=0, draw=0, launch=1 / MICRO)
    number = plan.steps[5].program  # of the end of a row
    served = sum(step.program == number for step in plan.steps[1:])
    instructions = fuse(plan.programs[number].instructions)
    assert predict(plan, 1, free).seconds == pytest.approx(0, abs=1e-12)
    monkeypatch.setattr("benchmarks.predict.heavy_programs", lambda *_: {number})
    assert predict(plan, 1, free).seconds == pytest.approx(served * len(instructions) / 25 / MICRO)
    slow = replace(free, launch=0, multiply_adds=1e6)
    many, one = predict(plan, 256, slow), predict(plan, 256, replace(slow, processors=1))
    assert tiles_of(instructions[0], TILES, 256) > 1 and many.seconds < one.seconds


@pytest.mark.parametrize(
    ("rate", "shape"), [("launch", "1000 launches, one after the other"), ("barrier", "1000 barriers between all")]
)
def test_the_time_of_a_launch_or_a_barrier_is_that_of_its_probe(rate, shape):
    rates, told = rates_of([row(0, 0.003) | {"shape": shape}])
    assert told == [rate] and getattr(rates, rate) == pytest.approx(3e-6)


def test_programs_that_share_images_wait_for_each_other_and_share_tiles():
    model = GatedPixelCNN((1, 5, 5), 4, channels=40, layers=2)
    plan = planned(model, model.shape)
    free = Rates(weights=1e30, together=1e30, multiply_adds=1e30, instruction=0, draw=0, barrier=1 / MICRO)
    steps = sum(len(fuse(plan.programs[step.program].instructions)) for step in plan.steps[1:])
    assert predict(plan, 16, free).terms["barriers"] == 0
    for sharing in (2, 8):
        found = predict(plan, 16, free, sharing)
        assert MICRO * found.seconds == pytest.approx((steps + 25) / 25) and found.binding == "barriers"
    assert predict(plan, 16, replace(free, processors=1), 2).terms["barriers"] == 0  # no two run at the same time
    assert predict(plan, 132 * 16 // 2 + 1, free, 2).terms["barriers"] == 0
    slow = replace(free, barrier=0, multiply_adds=1e6)
    alone, two = (predict(plan, 16, slow, sharing).seconds for sharing in (1, 2))
    panels = [one.head.op == "product" and tiles_of(one, TILES, 16) for one in fuse(plan.programs[1].instructions)]
    assert max(panels) >= 2 and alone / 2 <= two < alone
    draws = replace(free, barrier=0, draw=1 / MICRO)
    assert [MICRO * predict(plan, 16, draws, sharing).seconds for sharing in (1, 2, 8)] == pytest.approx([4, 2, 1])


def test_what_the_machine_does_not_know_is_not_predicted():
    model = Waves(1, 4, 3, padding=1)
    with torch.no_grad():
        model.weight[..., 1, 1:] = model.weight[..., 2, :] = 0
    assert predict(planned(model, (1, 3, 3), Categorical(4, "B(KC)HW")), 16, Rates()).endswith("sin")


def test_the_command_says_what_is_assumed(capsys, tmp_path):
    assert main(["predict", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ASSUMED") == 8 and "GatedPixelCNN 1x2x2 levels=3 B=2" in printed
    assert main(["predict", str(tmp_path / "none.jsonl"), "--dry-run"]) == 2
