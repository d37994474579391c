"""Grids of images, sheets with captions and small plots, drawn with Pillow alone."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgen.plots import INK, PAPER, grid

GRID = (215, 215, 215)
# One colour for each class: Tableau's ten.
COLOURS = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
]  # fmt: skip
LINE = 18  # height of a line of text in pixels
FONT = ImageFont.load_default(size=13)


def rows_of(images: Tensor, levels: int) -> Image.Image:
    """Draws levels (rows, columns, C, H, W) as a grid of images; see `fastgen.plots.grid`."""
    return grid(images.flatten(0, 1), levels, columns=images.shape[1])


def sheet(*parts: tuple[str, Image.Image | None]) -> Image.Image:
    """One picture of several (caption, picture) pairs, from top to bottom. A caption is one line above its picture; the
    picture may be None."""
    widths = [max(FONT.getlength(text), 0 if picture is None else picture.width) for text, picture in parts]
    height = sum(LINE + (0 if picture is None else picture.height + LINE // 2) for _, picture in parts)
    page = Image.new("RGB", (int(max(widths)) + 2 * LINE, height + 2 * LINE), PAPER)
    draw, top = ImageDraw.Draw(page), LINE
    for caption, picture in parts:
        draw.text((LINE, top), caption, INK, FONT)
        top += LINE
        if picture is not None:
            page.paste(picture, (LINE, top))
            top += picture.height + LINE // 2
    return page


class Axes:
    """A small plot, with methods for ticks, lines and dots. To draw anything else: `draw`, at pixels from `place`.

    Args:
        x, y: ranges of the coordinates.
        size: width and height in pixels.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float], size: tuple[int, int] = (440, 260)) -> None:
        self.x, self.y = x, y
        self.left, self.top, self.right, self.bottom = 64, 8, size[0] - 12, size[1] - 22
        self.picture = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.picture)
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), outline=INK)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The pixel, counted from the upper left corner, at the coordinates (x, y)."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def ticks(self, x: dict[float, str], y: dict[float, str]) -> None:
        """Draws a grid line and a label at each of these coordinates."""
        for value, label in x.items():
            at, _ = self.place(value, 0)
            self.draw.line((at, self.top + 1, at, self.bottom - 1), GRID)
            self.draw.text((at, self.bottom + 4), label, INK, FONT, anchor="ma")
        for value, label in y.items():
            _, at = self.place(0, value)
            self.draw.line((self.left + 1, at, self.right - 1, at), GRID)
            self.draw.text((self.left - 6, at), label, INK, FONT, anchor="rm")

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: tuple[int, int, int]) -> None:
        points = [self.place(x, y) for x, y in zip(xs, ys, strict=True)]
        self.draw.line(points, colour, 2)
        for point in points:
            self.dot(point, colour, 3)

    def dot(self, point: tuple[float, float], colour: tuple[int, int, int], radius: float = 2) -> None:
        self.draw.ellipse((point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius), colour)
