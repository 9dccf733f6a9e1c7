"""A figure as one picture, or a moving one: frames labelled with t, SNR and a bar. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

from PIL import Image

from difftool.forward.figures import Figure, Strip, zoom
from difftool.forward.levels import decibels, psnr, short, signal_share, typeset
from difftool.forward.plots import FORMULA
from difftool.forward.plots import panel as plot
from difftool.images.canvas import Canvas, length
from difftool.images.theme import COLORS, MUTED, PAPER

LINE_MAX = 10
"""Frames on a line; longer strips are broken into lines of equal length."""
UNIT = 14.5
"""How many times larger than the labels a frame is."""
SIGNATURE = "difftool noise"
LEAST_PLOT = 11
"""Least height of the panel of curves, in labels."""


def labels(strip: Strip, index: int) -> tuple[str, str]:
    """What is written under a frame, on the left and on the right."""
    if strip.spent:
        spent = strip.spent[index]
        return f"{spent['bits']:.4f}", f"± {spent['bits_error']:.4f}"
    if strip.errors:
        error = strip.errors[index]
        return f"RMSE {error:.3f}", f"PSNR {typeset(psnr(error))} dB"
    level = strip.levels[index]
    time = f"𝑡 = {short(level.t)}" if level.t >= 0 else "𝑥₀"
    return time, f"SNR {typeset(decibels(level))} dB"


class CellSizes(NamedTuple):
    """The measures of a figure's cells, in pixels."""

    unit: float
    """Size of the labels."""
    width: int
    height: int
    """Of a frame, magnified."""
    cell: int
    """Width of a frame and of its labels."""
    gap: int
    margin: int
    label: int
    """Height of what is under a frame."""
    title: int
    """Height of a strip's title."""

    @classmethod
    def of(cls, figure: Figure) -> CellSizes:
        width, height = (side * zoom(figure.size) for side in figure.size)
        unit = min(max(max(width, height) / UNIT, 14), 40)
        pairs = [labels(strip, i) for strip in figure.strips for i in range(len(strip.frames))]
        needed = max(length(left, unit) + length(right, unit) for left, right in pairs)
        return cls(
            unit=unit,
            width=width,
            height=height,
            cell=max(width, math.ceil(needed + 1.2 * unit)),
            gap=round(0.8 * unit),
            margin=round(2.2 * unit),
            label=round(3.2 * unit),
            title=round(2.1 * unit) if len(figure.strips) > 1 else 0,
        )


def draw(figure: Figure) -> Image.Image:
    """The picture of a figure: a row of frames a strip, and the curves beside them."""
    m = CellSizes.of(figure)
    unit, margin = m.unit, m.margin
    count = max(len(strip.frames) for strip in figure.strips)
    lines = math.ceil(count / LINE_MAX)
    columns = math.ceil(count / lines)
    strip_height = m.title + lines * (m.height + m.label)
    frames_width = columns * (m.cell + m.gap) - m.gap
    body = len(figure.strips) * strip_height
    panel = plot_height = 0
    if figure.curves:
        body = max(body, m.title + m.label + round(LEAST_PLOT * unit))
        plot_height = body - m.title - m.label
        panel = round(max(min(max(22 * unit, 0.45 * plot_height), 1.3 * plot_height), 17 * unit))

    headline = length(figure.title, 1.75 * unit) + length(figure.note, 1.1 * unit) + 0.8 * unit
    titles = [
        length(b.title, 1.2 * unit) + length(b.note, unit) + 0.6 * unit for b in figure.strips
    ]
    caption = length(figure.caption, 0.95 * unit)
    inner = math.ceil(max(frames_width + panel, headline, *titles, caption))
    head = round(3.4 * unit)
    size = 2 * margin + inner, margin + head + body + round(1.7 * unit)
    page = Image.new("RGB", size, PAPER)
    canvas = Canvas(page, unit)
    right, baseline = margin + inner, margin + 0.9 * unit
    end = canvas.write(margin, baseline, figure.title, 1.75)
    end = canvas.write(end + 0.8 * unit, baseline, figure.note, 1.1, MUTED)
    if right - end > length(FORMULA, 1.35 * unit) + 2 * unit:
        canvas.write(right, baseline, FORMULA, 1.35, MUTED, align="right")

    top = margin + round(2.3 * unit)
    for strip, color in zip(figure.strips, cycle(COLORS), strict=False):
        if m.title:
            end = canvas.write(margin, top + 1.15 * unit, strip.title, 1.2, color)
            canvas.write(end + 0.6 * unit, top + 1.15 * unit, strip.note, 1.0, MUTED)
        for index in range(len(strip.frames)):
            line, column = divmod(index, columns)
            x = margin + column * (m.cell + m.gap)
            _cell(canvas, x, top + m.title + line * (m.height + m.label), m, strip, index, color)
        top += strip_height
    if figure.curves:
        shown = [strip.levels for strip in figure.strips]
        curves = plot(figure.curves, shown, (panel - 2.5 * unit, plot_height + 2.2 * unit), unit)
        page.paste(curves, (right - curves.width, margin + round(2.3 * unit) + m.title))
    bottom = page.height - 1.6 * unit
    end = canvas.write(margin, bottom, figure.caption, 0.95, MUTED)
    if right - end > length(SIGNATURE, 0.95 * unit) + 2 * unit:
        canvas.write(right, bottom, SIGNATURE, 0.95, MUTED, align="right")
    return page


class AnimationFrame(NamedTuple):
    """One picture of a moving figure."""

    page: Image.Image
    boxes: Sequence[tuple[int, int, int, int]]
    """Where the frames are: left, top, right, bottom."""


def animation_frames(figure: Figure) -> Iterator[AnimationFrame]:
    """A figure as a moving picture: its strips beside each other, one level after the other."""
    m = CellSizes.of(figure)
    titles = [length(strip.title, 1.2 * m.unit) for strip in figure.strips if m.title]
    m = m._replace(cell=max(m.cell, *map(math.ceil, titles), 0))
    count, margin = len(figure.strips), round(0.8 * m.margin)
    width, height = m.cell + m.gap, m.title + m.height + m.label
    columns = min(  # whatever is nearest to 3:2, with the fewest places left empty
        range(1, count + 1),
        key=lambda c: abs(math.log(c * width / (-(-count // c) * height) / 1.5)) + (-count % c),
    )
    lines = -(-count // columns)
    size = 2 * margin + columns * width - m.gap, 2 * margin + lines * height - round(m.unit)
    for position in range(max(len(strip.frames) for strip in figure.strips)):
        page, boxes = Image.new("RGB", size, PAPER), []
        canvas = Canvas(page, m.unit)
        for place, (strip, color) in enumerate(zip(figure.strips, cycle(COLORS), strict=False)):
            x, y = margin + place % columns * width, margin + place // columns * height
            index = min(position, len(strip.frames) - 1)
            if m.title:
                end = canvas.write(x, y + 1.15 * m.unit, strip.title, 1.2, color)
                if end + 0.6 * m.unit + length(strip.note, m.unit) <= x + m.cell:
                    canvas.write(end + 0.6 * m.unit, y + 1.15 * m.unit, strip.note, 1.0, MUTED)
            boxes.append(_cell(canvas, x, y + m.title, m, strip, index, color))
        yield AnimationFrame(page, boxes)


def _cell(
    canvas: Canvas, x: int, y: int, m: CellSizes, strip: Strip, index: int, color: str
) -> tuple[int, int, int, int]:
    """Draw a frame of a strip, its labels, and its signal as a bar; where the frame is."""
    left = x + (m.cell - m.width) // 2
    canvas.frame(left, y, strip.frames[index], (m.width, m.height))
    plain = not (strip.errors or strip.spent)
    if plain:
        share = signal_share(strip.levels[index])
        canvas.bar(x, y + m.height + 0.5 * m.unit, m.cell, share, color)
    under = y + m.height + (1.85 if plain else 1.35) * m.unit
    first, last = labels(strip, index)
    canvas.write(x, under, first, 1.0)
    canvas.write(x + m.cell, under, last, 1.0, MUTED, align="right")
    return left, y, left + m.width, y + m.height
