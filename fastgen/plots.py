"""Pictures: grids of images (Pillow), curves of a training run (matplotlib, where installed)."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgen.files import write_atomically

GAP = 2  # pixels between images
LEAST_SIZE = 48  # pixels of the longer side; smaller images are enlarged by an integer factor
HIDDEN = (70, 110, 180)  # RGB that covers hidden pixels
PAGE_IMAGES, PAGE_PIXELS = 400, 2**24  # most images, and most pixels, of one picture of `image_pages`
UNITS = {  # labels for the units of `fastgen.train.unit`
    "bits_per_dim": "bits/dim",
    "squared_error": "squared error a dimension",
    "density_nats": "nats of the density, an image",
}
PAPER, INK = (255, 255, 255), (40, 40, 40)


def image_grid(images: Tensor, levels: int, path: str | os.PathLike, **options: Any) -> None:
    """Writes a PNG of images side by side.

    Args:
        images, levels: as in `grid`.
        path: the file to write, which ends in .png.
        options: further arguments of `grid`.

    Raises:
        ValueError: path does not end in .png, or as `grid`.
        OSError: the file cannot be written.
    """
    path = png_path(path)
    write_atomically({path: png(grid(images, levels, **options))})


def image_pages(images: Tensor, levels: int, path: str | os.PathLike, *, columns: int) -> list[Path]:
    """`image_grid` on as many pages as keep each PNG small enough for common programs. Writes `path` itself if one page
    is enough, otherwise NAME-1.png, NAME-2.png, ... Returns the paths. Raises as `image_grid`."""
    path = png_path(path)
    tile = math.prod(side * _scale(images) + GAP for side in images.shape[2:])
    rows = max(1, min(PAGE_PIXELS // (tile * columns), PAGE_IMAGES // columns))
    pages = images.split(rows * columns)
    digits = len(str(len(pages)))
    paths = [path.with_stem(f"{path.stem}-{number + 1:0{digits}}") for number in range(len(pages))]
    paths = [path] if len(pages) == 1 else paths
    for page, target in zip(pages, paths, strict=True):
        image_grid(page, levels, target, columns=columns)
    return paths


def grid(
    images: Tensor, levels: int, *, columns: int, hidden: Tensor | None = None, row_names: Sequence[str] = ()
) -> Image.Image:
    """Draws images side by side, row by row; level 0 is black and the highest level white.

    Args:
        images: levels (n, C, H, W), integers or floats, n >= 1. If C is neither 1 nor 3, the channels of an image are
            drawn side by side in grey.
        levels: number of levels of a channel.
        columns: images in a row.
        hidden: bool, broadcastable to (n, 1, H, W). Pixels that are True are covered with a colour.
        row_names: one text to the left of each row; empty for none.

    Raises:
        ValueError: images has another shape, levels < 2, columns < 1, or there is not one name for each row.
    """
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"images must have the shape (n, C, H, W) with n >= 1, got {tuple(images.shape)}")
    if levels < 2:
        raise ValueError(f"levels must be >= 2, got {levels}")
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    count, rows = len(images), -(-len(images) // columns)
    if row_names and len(row_names) != rows:
        raise ValueError(f"row_names must be one for each of {rows} rows, got {len(row_names)}")
    pixels = to_pixels(images, levels)
    if hidden is not None:
        covered = hidden.cpu().expand(count, 1, *images.shape[2:]).permute(0, 2, 3, 1)
        covered = covered.repeat(1, 1, pixels.shape[2] // images.shape[3], 1)
        pixels = torch.where(covered, torch.tensor(HIDDEN, dtype=torch.uint8), pixels)
    height, width = pixels.shape[1:3]
    scale = _scale(images)
    font = ImageFont.load_default(size=14)
    margin = max((int(font.getlength(name)) for name in row_names), default=-GAP) + 2 * GAP
    size = (margin + columns * (width * scale + GAP), rows * (height * scale + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names):
        middle = GAP + row * (height * scale + GAP) + height * scale // 2
        draw.text((GAP, middle), name, INK, font, anchor="lm")
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        place = (margin + column * (width * scale + GAP), GAP + row * (height * scale + GAP))
        tile = Image.fromarray(image.contiguous().numpy())
        sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), place)
    return sheet


def to_pixels(images: Tensor, levels: int) -> Tensor:
    """Converts levels (n, C, H, W) to uint8 (n, H, W, 3) on the CPU; to (n, H, C * W, 3) if C is neither 1 nor 3."""
    if images.shape[1] not in (1, 3):
        images = images.transpose(1, 2).flatten(2).unsqueeze(1)
    pixels = (images.detach().cpu().float() * (255 / (levels - 1))).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def columns_of(count: int) -> int:
    """The number of columns that makes a grid of `count` pictures about as high as it is wide."""
    return max(1, round(count**0.5))


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _scale(images: Tensor) -> int:
    return max(1, -(-LEAST_SIZE // max(images.shape[2:])))


def curves(rows: Sequence[dict[str, float]], path: str | os.PathLike, *, lines: dict[str, float] | None = None) -> bool:
    """Writes a PNG of a training run's loss over its steps. Returns False if matplotlib is not installed.

    Args:
        rows: the rows of the run's metrics.jsonl.
        path: the file to write, which ends in .png.
        lines: values to compare with, by name; each becomes a horizontal line.

    Raises:
        ValueError: path does not end in .png.
        OSError: the file cannot be written.
    """
    path = png_path(path)
    axes = _axes("step", "", (7, 4))
    if axes is None:
        return False
    unit = "loss"
    for part in ("train", "validation"):
        for name in dict.fromkeys(key for row in rows for key in row if key.startswith(f"{part}_")):
            unit = name.removeprefix(f"{part}_")
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=part, linewidth=1.2)
    for number, (name, value) in enumerate((lines or {}).items()):
        axes.axhline(value, label=f"{name}: {value:.3f}", color=f"C{number + 2}", linestyle="--", linewidth=1)
    axes.set_ylabel(UNITS.get(unit, unit))
    _write_figure(axes, path)
    return True


def reliability(results: dict[str, tuple[Tensor, Tensor]], path: str | os.PathLike) -> bool:
    """Writes a PNG of accuracy over confidence (a reliability diagram), with the diagonal of perfect calibration.
    Returns False if matplotlib is not installed.

    Args:
        results: for each classifier, by name, the mean confidence (n,) and the accuracy (n,) of n bins; NaN for an
            empty bin.
        path: the file to write, which ends in .png.

    Raises:
        ValueError, OSError: as `curves`.
    """
    path = png_path(path)
    axes = _axes("confidence", "accuracy", (5, 4.5))
    if axes is None:
        return False
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (confidence, accuracy) in results.items():
        filled = ~accuracy.isnan()
        axes.plot(confidence[filled].tolist(), accuracy[filled].tolist(), marker="o", markersize=4, label=name)
    _write_figure(axes, path)
    return True


def _axes(x: str, y: str, size: tuple[float, float]) -> Any:
    """The axes of a new matplotlib figure of `size` inches, labelled x and y; None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _write_figure(axes: Any, path: Path) -> None:
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=130)
    write_atomically({path: buffer.getvalue()})


def png_path(path: str | os.PathLike) -> Path:
    """The path as a Path. Raises ValueError if it does not end in .png."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG: the name must end in .png")
    return path
