"""fastgen demo."""

import argparse
from typing import Any

from fastgen.cli.common import add_device


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train, evaluate and sample on real images, in minutes",
        description="Trains a class-conditional Gated PixelCNN on scikit-learn's handwritten digits, scores it, draws "
        "and completes images with fastgen.accelerate, and writes pictures and a report.",
    )
    parser.add_argument("--out", default="runs/demo", metavar="RUN", help="folder to write to (default runs/demo)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastgen import demo
    from fastgen.cli.common import device_of

    return demo.run(arguments.out, device_of(arguments))
