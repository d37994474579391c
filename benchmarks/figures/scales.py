"""Time, work and set-up of sampling over the size of the image and of the batch.

Times are CPU seconds of one thread, which other work on the machine hardly changes.

    python -m benchmarks.figures.scales measure    appends to rows/scales.jsonl; takes about five minutes
    python -m benchmarks.figures.scales draw       draws docs/scales.png from these rows
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases.sampling import scale
from benchmarks.figures.style import COLOURS, MARKERS, figure
from benchmarks.harness import machine, rows
from fastgen import accelerate
from fastgen.models import GatedPixelCNN

ROWS = Path(__file__).parent / "rows" / "scales.jsonl"
PICTURE = machine.ROOT / "docs" / "scales.png"
SIDES, BATCHES = (8, 16, 32, 64), (1, 4, 16, 64)
LEVELS, SIZES = 16, {"channels": 32, "layers": 4}
REPEATS = 3
MOST_PIXELS = 2**16  # larger batches are left out


def measure(sides: tuple[int, ...] = SIDES, batches: tuple[int, ...] = BATCHES) -> Iterator[dict[str, Any]]:
    """A row for each side and batch: "pass_s", seconds of a forward pass of the batch; "sample_s", of drawing it;
    "setup_s", of making and planning a sampler; "passes", whole passes while drawing; "work_ratio"."""
    torch.set_num_threads(1)
    facts = {**machine.facts("cpu"), "time": rows.now(), "threads": 1}
    for side in sides:
        shape = (1, side, side)
        torch.manual_seed(0)
        model = GatedPixelCNN(shape, LEVELS, **SIZES).eval().requires_grad_(False)
        scale(model, torch.randint(LEVELS, (4, *shape)))
        _planned_sampler(model)  # not timed: imports and compiles what is done once per process
        setup, sampler = _seconds(lambda: _planned_sampler(model))  # noqa: B023
        for batch in (batch for batch in batches if batch * side * side <= MOST_PIXELS):
            x, noise = torch.randint(LEVELS, (batch, *shape)), torch.rand(batch, *shape)
            sampler.sample(batch, noise=noise)  # not timed: the first batch measures the engine's rounding
            sampled = [_seconds(lambda: sampler.sample(batch, noise=noise))[0] for _ in range(REPEATS)]  # noqa: B023
            passed = [_seconds(lambda: model(x))[0] for _ in range(REPEATS)]  # noqa: B023
            row = {
                "model": f"GatedPixelCNN, {LEVELS} levels, {SIZES['channels']} channels, {SIZES['layers']} layers",
                "side": side,
                "batch": batch,
                "setup_s": setup,
            }
            row |= {"pass_s": median(passed), "sample_s": median(sampled), "work_ratio": sampler.work_ratio}
            yield {**row, "passes": sampler.stats.passes, **facts}


def _planned_sampler(model: Any) -> Any:
    sampler = accelerate(model, model.shape, distribution=model.distribution)
    sampler.explain()  # makes the plan
    return sampler


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """The processor seconds of a call, and its result."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def draw(saved: list[dict[str, Any]], target: Path = PICTURE) -> Path:
    """Draws the time of a batch and that of the naive loop (a forward pass for each pixel) over the batch size, and
    work and set-up over the side of the image; returns `target`."""
    latest = {(row["side"], row["batch"]): row for row in saved}
    sides = sorted({side for side, _ in latest})
    with figure(target, (13, 4)) as page:
        time_axes, work_axes, setup_axes = page.subplots(1, 3)
        for number, side in enumerate(sides):
            rows_of_side = [latest[key] for key in sorted(latest) if key[0] == side]
            batches = [row["batch"] for row in rows_of_side]
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            time_axes.plot(batches, [row["sample_s"] for row in rows_of_side], label=f"{side}x{side}", **style)
            naive = [row["pass_s"] * side**2 for row in rows_of_side]
            time_axes.plot(batches, naive, linestyle="--", **style)
        time_axes.set(xlabel="images in a batch", ylabel="CPU seconds per batch", title="accelerate (dashed: the loop)")
        time_axes.set_xscale("log", base=2)
        counts = sorted({batch for _, batch in latest})
        time_axes.set_xticks(counts, [f"{count}" for count in counts])
        time_axes.set_yscale("log")
        time_axes.set_ylim(top=30 * max(row["pass_s"] * row["side"] ** 2 for row in latest.values()))
        time_axes.legend(frameon=False, ncols=2, loc="upper left")
        smallest_batches = [next(latest[key] for key in sorted(latest) if key[0] == side) for side in sides]
        work_axes.plot(sides, [side**2 for side in sides], label="the loop", color=COLOURS[7])
        work_axes.plot(sides, [row["work_ratio"] for row in smallest_batches], label="accelerate", color=COLOURS[0])
        work_axes.set(ylabel="multiply-adds per image, in forward passes", title="work (counted)", ylim=(0.5, None))
        work_axes.legend(frameon=False)
        setup_axes.plot(sides, [row["setup_s"] for row in smallest_batches], label="set-up", color=COLOURS[1])
        loop_seconds = [row["pass_s"] * row["side"] ** 2 for row in smallest_batches]
        setup_axes.plot(sides, loop_seconds, label="one image by the loop", color=COLOURS[7])
        setup_axes.set(ylabel="CPU seconds", title="set-up of a sampler (once)")
        setup_axes.legend(frameon=False)
        for axes in (work_axes, setup_axes):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sides, [f"{side}" for side in sides])
            axes.set_xlabel("side of the image")
            axes.set_yscale("log")
        row = smallest_batches[0]
        page.suptitle(f"{row['model']}, one thread of {row['cpu']}, {row['time'][:10]}", fontsize=9)
    return target


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        for row in measure():
            rows.save([row], ROWS)
            seconds = {name: round(value, 4) for name, value in row.items() if name.endswith("_s")}
            print(row["side"], row["batch"], seconds, math.ceil(row["work_ratio"]), flush=True)
    print(draw(rows.read(ROWS)))
