"""fastgen demo."""

import argparse
import json
from typing import Any

from fastgen.cli.common import add_device, natural
from fastgen.demos import DEMOS

MAIN = "digits"


def add(commands: Any) -> None:
    listed = "; ".join(f"{name}: {what}" for name, what in DEMOS.items())
    parser = commands.add_parser(
        "demo",
        help="train, evaluate and sample on real images, in two minutes",
        description="Trains a class-conditional Gated PixelCNN on scikit-learn's handwritten digits, scores it, draws "
        "and completes images with fastgen.accelerate, and writes pictures and a report. Others show more.",
    )
    parser.add_argument("name", nargs="?", choices=DEMOS, default=MAIN, metavar="NAME", help=listed)
    parser.add_argument("--out", metavar="FOLDER", help="folder to write to (default runs/demo, of others runs/demos)")
    parser.add_argument("--seed", type=natural, default=0, help="of everything random (default 0)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastgen.cli.common import device_of
    from fastgen.demos import digits, perform

    if arguments.name == MAIN:
        return digits.run(arguments.out or "runs/demo", device_of(arguments), seed=arguments.seed)
    if arguments.device not in (None, "cpu"):
        raise ValueError(f"--device {arguments.device}: the demonstration {arguments.name} runs on the CPU")
    numbers = perform(arguments.name, arguments.out or "runs/demos", seed=arguments.seed)
    print(f"{arguments.name}: {json.dumps(numbers, indent=2)}")
    print(f"picture and numbers in {arguments.out or 'runs/demos'}")
    return 0
