"""A page that text, frames and bars are drawn on. Torch-free."""

from __future__ import annotations

from functools import cache
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from difftool.images.theme import INK, PAPER, RULE


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """STIX, the scientific journals' type, in the copy that comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/STIXGeneral.ttf", size)


SUBSCRIPTS = {"₀": "0", "₁": "1", "₋": "−", "ₜ": "𝑡"}
TextRun = tuple[str, ImageFont.FreeTypeFont, float]


def _runs(text: str, size: float) -> list[TextRun]:
    """Text, font and lowering of its parts.

    STIX lacks the subscript characters, so they are set as small lowered ones.
    """
    runs = []
    for low, part in groupby(text, SUBSCRIPTS.__contains__):
        run = "".join(SUBSCRIPTS.get(c, c) for c in part)
        runs.append((run, _font(round(size * (0.7 if low else 1))), 0.2 * size if low else 0.0))
    return runs


def length(text: str, size: float) -> float:
    """How wide a text is, in pixels."""
    return sum(font.getlength(run) for run, font, _ in _runs(text, size))


class Canvas:
    """Draws text, frames and bars on a page; sizes are in units of the labels' size."""

    def __init__(self, page: Image.Image, unit: float):
        self.page, self.unit, self.draw = page, unit, ImageDraw.Draw(page)

    def write(
        self, x: float, y: float, text: str, size: float, fill: str = INK, align: str = "left"
    ) -> float:
        """Write text on the baseline y and return where it ends."""
        runs = _runs(text, size * self.unit)
        if align == "right":
            x -= sum(font.getlength(run) for run, font, _ in runs)
        for run, font, lowered in runs:
            self.draw.text((x, y + lowered), run, fill, font, anchor="ls")
            x += font.getlength(run)
        return x

    def frame(self, x: int, y: int, pixels: np.ndarray, size: tuple[int, int]) -> None:
        """A picture of that size with slightly rounded corners."""
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
        radius = min(round(0.3 * self.unit), min(size) // 3)
        mask = Image.new("L", (4 * size[0], 4 * size[1]))
        edge = 0, 0, mask.width - 1, mask.height - 1
        ImageDraw.Draw(mask).rounded_rectangle(edge, 4 * radius, 255)
        self.page.paste(picture, (x, y), mask.resize(size))

    def bar(self, x: float, y: float, width: float, share: float, color: str) -> None:
        """A track of the width with its share filled."""
        thick = max(3, round(0.24 * self.unit))
        box = Image.new("RGB", (round(width) * 4, thick * 4), PAPER)
        draw = ImageDraw.Draw(box)
        for part, fill in ((1.0, RULE), (share, color)):
            if part * width >= 1:
                end = max(part * box.width, box.height)
                draw.rounded_rectangle((0, 0, end - 1, box.height - 1), box.height / 2, fill)
        small = box.resize((round(width), thick), Image.Resampling.LANCZOS)
        self.page.paste(small, (round(x), round(y)))
