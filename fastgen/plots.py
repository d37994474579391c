"""Pictures: grids of images (Pillow), curves of a training run (matplotlib, where installed)."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgen.files import write_atomically

GAP = 2  # pixels between images
LEAST_SIZE = 48  # pixels; smaller images are enlarged by a whole factor
HIDDEN = (70, 110, 180)  # the colour of what is hidden
PAPER, INK = (255, 255, 255), (40, 40, 40)


def image_grid(
    images: Tensor,
    levels: int,
    path: str | os.PathLike,
    *,
    columns: int,
    hidden: Tensor | None = None,
    row_names: Sequence[str] = (),
) -> None:
    """Writes a PNG of images side by side, row by row, level 0 black and the highest white.

    Args:
        images: levels (n, C, H, W), integers or floats, C = 1 or 3.
        levels: number of levels of a channel.
        columns: images in a row.
        hidden: bool, broadcastable to (n, 1, H, W): painted over.
        row_names: a text to the left of each row; none where empty.

    Raises:
        ValueError: path does not end in .png, images have another shape, or row_names are not one a row.
        OSError: the file cannot be written.
    """
    path = png_path(path)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have the shape (n, C, H, W) with n >= 1 and C = 1 or 3, got {images.shape}")
    count, _, height, width = images.shape
    rows = -(-count // columns)
    if row_names and len(row_names) != rows:
        raise ValueError(f"row_names must be one for each of {rows} rows, got {len(row_names)}")
    pixels = (images.detach().cpu().float() * (255 / (levels - 1))).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    if hidden is not None:
        over = hidden.cpu().expand(count, 1, height, width).permute(0, 2, 3, 1)
        pixels = torch.where(over, torch.tensor(HIDDEN, dtype=torch.uint8), pixels)
    scale = max(1, -(-LEAST_SIZE // max(height, width)))
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
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically({path: buffer.getvalue()})


def curves(rows: Sequence[dict[str, float]], path: str | os.PathLike, *, lines: dict[str, float] | None = None) -> bool:
    """Writes a PNG of a run's loss over its steps: the rows of metrics.jsonl. Returns False where matplotlib is not
    installed.

    Args:
        lines: values to draw as horizontal lines, by name: what the run is compared with.

    Raises:
        ValueError: path does not end in .png.
        OSError: the file cannot be written.
    """
    path = png_path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit = "loss"
    for part in ("train", "validation"):
        for name in dict.fromkeys(key for row in rows for key in row if key.startswith(f"{part}_")):
            unit = name.removeprefix(f"{part}_")
            found = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*found, strict=True), label=part, linewidth=1.2)
    for number, (name, value) in enumerate((lines or {}).items()):
        axes.axhline(value, label=f"{name}: {value:.3f}", color=f"C{number + 2}", linestyle="--", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel({"bits_per_dim": "bits/dim", "squared_error": "squared error a dimension"}.get(unit, unit))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically({path: buffer.getvalue()})
    return True


def png_path(path: str | os.PathLike) -> Path:
    """Raises ValueError where the path does not end in .png."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG: the name must end in .png")
    return path
