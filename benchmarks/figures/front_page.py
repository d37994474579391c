"""Draws the README's picture from the results of `fastgen demo`: python -m benchmarks.figures.front_page runs/demo

The PNG contains the numbers as text, which the test of the README compares with the README.
"""

import json
import sys
from pathlib import Path

from benchmarks.figures.style import COLOURS, figure
from benchmarks.harness.machine import ROOT

PICTURE = ROOT / "docs" / "front_page.png"
KEPT = ("date", "device", "threads", "sampling_batch", "naive_seconds", "fast_seconds", "samples_identical", "versions")


def draw(demo: Path, target: Path = PICTURE) -> Path:
    """Draws samples on the left and the two times on the right; returns `target`.

    Args:
        demo: the folder that `fastgen demo` wrote.
        target: the PNG to write.

    Raises:
        ValueError: the samples differ from those of the naive loop.
    """
    from PIL import Image

    numbers = {key: value for key, value in json.loads((demo / "report.json").read_text()).items() if key in KEPT}
    if not numbers["samples_identical"]:
        raise ValueError(f"{demo}: the samples differ from those of the naive loop")
    with figure(target, (10, 4.6), metadata={"Description": json.dumps(numbers)}) as page:
        left, right = page.subplots(1, 2, width_ratios=(1, 1.15))
        left.imshow(Image.open(demo / "samples.png"))
        left.set_axis_off()
        left.set_title(f"{numbers['sampling_batch']} digits drawn by a PixelCNN", fontsize=12)
        seconds = [numbers["naive_seconds"], numbers["fast_seconds"]]
        right.barh([1, 0], seconds, 0.5, color=[COLOURS[7], COLOURS[0]])
        for place, name, value in zip(
            (1, 0), ("the network once per pixel", "fastgen.accelerate"), seconds, strict=True
        ):
            right.text(0, place + 0.31, name, fontsize=12, va="bottom")
            right.text(value, place, f"  {value:.3g} s", fontsize=14, va="center")
        right.set_xlim(0, seconds[0] * 1.25)
        right.set_ylim(-0.6, 1.8)
        right.set_axis_off()
        right.set_title(f"{seconds[0] / seconds[1]:.0f} times as fast, the same images pixel for pixel", fontsize=12)
        threads = "1 thread" if numbers["threads"] == 1 else f"{numbers['threads']} threads"
        source = f"{numbers['device'].upper()}, {threads}, torch {numbers['versions']['torch']}, {numbers['date']}"
        right.text(0, -0.55, source, fontsize=9, color="grey")
    return target


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
