"""A sheet as the bytes of a file, by the kind of file. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from difftool.forward.animation import gif, webp
from difftool.forward.drawing import draw
from difftool.forward.levels import csv_text
from difftool.forward.page import page
from difftool.forward.plots import draw_curves
from difftool.forward.sheets import Sheet
from difftool.images.write import encode_png


class Output(NamedTuple):
    """How a sheet becomes a file."""

    write: Callable[[Sheet], bytes]
    steps: int
    """Levels shown where it is not said."""


def _table(sheet: Sheet) -> bytes:
    return csv_text(sheet.rows()).encode()


OUTPUTS: dict[str, Output] = {
    "png": Output(lambda sheet: encode_png(draw(sheet)), 8),
    "gif": Output(gif, 40),
    "webp": Output(webp, 40),
    "html": Output(page, 25),
    "csv": Output(_table, 8),
}
"""By ending, without the dot."""
CURVES: dict[str, Callable[[Sheet], bytes]] = {
    "png": lambda sheet: encode_png(draw_curves(sheet)),
    "html": page,
    "csv": _table,
}
"""The same for curves without a picture."""
