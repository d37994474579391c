"""fastgen demo."""

import argparse
import json
from typing import Any

from fastgen.cli.common import add_device, non_negative_int
from fastgen.demos import DEMOS

MAIN = "digits"


def add(commands: Any) -> None:
    listed = "\n".join(f"  {name:<12} {summary}" for name, summary in DEMOS.items())
    parser = commands.add_parser(
        "demo",
        help="train, evaluate and sample on real images, in about two minutes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Without NAME, trains a class-conditional Gated PixelCNN on scikit-learn's handwritten digits,\n"
        "scores it, draws and completes images with fastgen.accelerate, and writes pictures and a report.\n\n"
        f"Each demonstration writes a picture and its numbers:\n{listed}",
    )
    parser.add_argument("name", nargs="?", choices=DEMOS, default=MAIN, metavar="NAME", help="default: digits")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write to (default runs/demo; with NAME runs/demos)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of everything random (default 0)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastgen.cli.common import device_of
    from fastgen.demos import digits, perform

    if arguments.name == MAIN:
        return digits.run(arguments.out or "runs/demo", device_of(arguments), seed=arguments.seed)
    if arguments.device not in (None, "cpu"):
        raise ValueError(f"--device {arguments.device}: the demonstration {arguments.name} runs on the CPU only")
    folder = arguments.out or "runs/demos"
    numbers = perform(arguments.name, folder, seed=arguments.seed)
    print(json.dumps(numbers, indent=2))
    print(f"{arguments.name}.png and {arguments.name}.json are in {folder}")
    return 0
