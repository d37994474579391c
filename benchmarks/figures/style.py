"""The style of figures: colours that colour-blind readers can distinguish, no frame, files written atomically."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.files import write_atomically

# The palette of Okabe & Ito 2008, with black and grey at the end.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"


@contextmanager
def look() -> Iterator[None]:
    """Inside, matplotlib draws in this style.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from cycler import cycler
        from matplotlib import rc_context
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install fastgen[plots]") from error
    marked = cycler(color=COLOURS) + cycler(marker=list(MARKERS))
    with rc_context({"axes.prop_cycle": marked, "axes.spines.top": False, "axes.spines.right": False}):
        yield


@contextmanager
def figure(target: Path, size: tuple[float, float], *, metadata: dict[str, str] | None = None) -> Iterator[Any]:
    """Yields a matplotlib figure of `size` inches, which is written to `target`, a PNG, at the end. Raises as
    `look`."""
    with look():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        page = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(page)
        yield page
        buffer = io.BytesIO()
        page.savefig(buffer, format="png", dpi=110, metadata=metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({target: buffer.getvalue()})
