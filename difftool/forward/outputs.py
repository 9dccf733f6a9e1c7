"""A figure as the bytes of a file, by the kind of file. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from difftool.forward.animation import gif, webp
from difftool.forward.drawing import draw
from difftool.forward.figures import Figure
from difftool.forward.levels import csv_text
from difftool.forward.page import page
from difftool.forward.plots import draw_curves
from difftool.images.write import encode_png


class FigureFormat(NamedTuple):
    """How a figure becomes a file."""

    write: Callable[[Figure], bytes]
    steps: int
    """Levels shown where it is not said."""


def _table(figure: Figure) -> bytes:
    return csv_text(figure.rows()).encode()


OUTPUTS: dict[str, FigureFormat] = {
    "png": FigureFormat(lambda figure: encode_png(draw(figure)), 8),
    "gif": FigureFormat(gif, 40),
    "webp": FigureFormat(webp, 40),
    "html": FigureFormat(page, 25),
    "csv": FigureFormat(_table, 8),
}
"""By ending, without the dot."""
CURVES: dict[str, Callable[[Figure], bytes]] = {
    "png": lambda figure: encode_png(draw_curves(figure)),
    "html": page,
    "csv": _table,
}
"""The same for curves without a picture."""
