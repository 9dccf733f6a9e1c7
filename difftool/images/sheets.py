"""Sample sheets: small pictures enlarged to be seen, what each was asked for written below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from difftool.images.fit import tile, to_pil, zoom_of
from difftool.images.lettering import face, wrapped
from difftool.images.theme import CAPTION, PAPER, RULE

SIDE = 144
"""Pictures are enlarged, pixel by pixel, to at least about this."""
LINES, TEXT = 3, 12
GAP, LEADING = 10, 15


class Cell(NamedTuple):
    """One place of a sheet: a picture, or a few above each other, and words below."""

    pictures: Sequence[Image.Image]
    caption: str


def enlarged(image: Tensor) -> Image.Image:
    """An image [3,H,W] in [-1, 1] as a picture whose pixels can be seen."""
    picture = to_pil(image)
    zoom = zoom_of(picture.size, SIDE)
    size = (picture.width * zoom, picture.height * zoom)
    return picture.resize(size, Image.Resampling.NEAREST)


def sheet(cells: Sequence[Cell], columns: int | None = None) -> Image.Image:
    """The cells in rows, about as many across as down where it is not said."""
    width = max(p.width for cell in cells for p in cell.pictures)
    texts = [wrapped(cell.caption, width, LINES, face(TEXT)) for cell in cells]
    words = LEADING * max(len(lines) for lines in texts)
    margin = GAP // 2
    drawn = []
    for cell, lines in zip(cells, texts, strict=True):
        height = sum(p.height for p in cell.pictures) + 2 * (len(cell.pictures) - 1)
        below = words + (6 if words else 0)
        page = Image.new("RGB", (width + GAP, height + below + GAP), PAPER)
        top = margin
        for picture in cell.pictures:
            page.paste(picture, (margin, top))
            top += picture.height + 2
        draw = ImageDraw.Draw(page)
        draw.rectangle((margin - 1, margin - 1, margin + width, top - 2), outline=RULE)
        for i, line in enumerate(lines):
            face(TEXT).write(page, (margin, top + 14 + i * LEADING), line, CAPTION)
        drawn.append(page)
    inner = tile(drawn, columns)
    page = Image.new("RGB", (inner.width + GAP, inner.height + GAP), PAPER)
    page.paste(inner, (margin, margin))
    return page
