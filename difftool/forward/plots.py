"""Curves of noise paths, drawn by matplotlib in the figures' colours. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from difftool.diffusion.path import Level
from difftool.forward.figures import Figure
from difftool.forward.levels import decibels, log_snr, short
from difftool.images.canvas import Canvas
from difftool.images.theme import COLORS, INK, MUTED, PAPER, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

FORMULA = "𝑥ₜ = 𝛼 𝑥₀ + 𝜎 𝜀"
DPI = 100
POINT = 72 / DPI
"""A pixel, in matplotlib's points."""
NAMES = 3
"""Paths named on a line."""
DECIBEL_RANGE, LOG_RANGE = 62, 14
"""Where plots end: EDM's ends are seen, and a terminal SNR of zero leaves the plot."""


@contextmanager
def _canvas(size: tuple[float, float], type_size: float) -> Iterator[Plot]:
    """A plot of that many pixels; labels of that height."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Plot

    style: dict[Any, Any] = {
        "font.family": "STIXGeneral",
        "mathtext.fontset": "stix",
        "font.size": type_size * POINT,
        "text.color": MUTED,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": RULE,
        "axes.facecolor": PAPER,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "lines.solid_capstyle": "round",
    }
    with rc_context(style):
        width, height = (side / DPI for side in size)
        yield Plot((width, height), dpi=DPI, facecolor=PAPER, layout="constrained")


def _picture(plot: Plot) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = FigureCanvasAgg(plot)
    drawn.draw()
    return Image.fromarray(np.asarray(drawn.buffer_rgba())[..., :3].copy())


def _plain(axes: Axes) -> None:
    axes.tick_params(which="both", length=0)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def positions(curve: Sequence[Level], levels: Sequence[Level]) -> list[float]:
    """How far along a curve levels are, in [0, 1] from its clean to its noisy end."""
    snr = [-level.half_log_snr for level in curve]
    share = np.linspace(0, 1, len(curve))
    ends = np.clip(snr, -1e3, 1e3)  # interpolation needs finite ends
    places = np.clip([-level.half_log_snr for level in levels], -1e3, 1e3)
    return np.interp(places, ends, share).tolist()


def panel(
    curves: Sequence[Sequence[Level]],
    shown: Sequence[Sequence[Level]],
    size: tuple[float, float],
    unit: float,
) -> Image.Image:
    """The SNR of paths, in their colours, over the way from picture to static; the levels shown are
    dots on it."""
    with _canvas(size, 1.2 * unit) as plot:
        axes = plot.add_subplot()
        axes.set_ylim(-DECIBEL_RANGE, DECIBEL_RANGE)
        for levels, dots, color in zip(curves, shown, cycle(COLORS), strict=False):
            way = np.linspace(0, 1, len(levels))
            snr = [decibels(level) for level in levels]
            axes.plot(way, snr, color=color, linewidth=0.16 * unit * POINT)
            _dots(axes, levels, dots, decibels, color, 0.5 * unit)
        axes.set(xlim=(0, 1), xticks=(0, 1), ylabel="SNR / dB")
        axes.set_yticks(range(-60, 61, 20), [f"{v}".replace("-", "−") for v in range(-60, 61, 20)])
        first, last = axes.set_xticklabels(("picture", "static"))
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        _plain(axes)
        return _picture(plot)


def draw_curves(figure: Figure) -> Image.Image:
    """alpha and sigma of a figure's paths beside their log-SNR. Levels that a sampler visits, where
    its strips have any, are dots on them."""
    unit, width, plot_height = 20.0, 1560, 560
    margin, line = round(2.2 * unit), round(1.7 * unit)
    lines = -(-len(figure.strips) // NAMES) if figure.comparison else 0
    head = round(3.0 * unit) + line * lines
    bottom = round((2.4 if figure.caption else 0.8) * unit)
    page = Image.new("RGB", (width, margin + head + plot_height + bottom), PAPER)
    canvas = Canvas(page, unit)
    end = canvas.write(margin, margin + 0.9 * unit, figure.title, 1.75)
    canvas.write(end + 0.8 * unit, margin + 0.9 * unit, figure.note, 1.1, MUTED)
    canvas.write(width - margin, margin + 0.9 * unit, FORMULA, 1.35, MUTED, align="right")
    if figure.comparison:
        for k, (strip, color) in enumerate(zip(figure.strips, cycle(COLORS), strict=False)):
            x = margin + k // lines * (width - 2 * margin) / NAMES
            y = margin + 2.9 * unit + k % lines * line
            end = canvas.write(x, y, strip.title, 1.2, color)
            canvas.write(end + 0.6 * unit, y, strip.note, 1.0, MUTED)
    plot = _curves(figure, (width - 2 * margin + 0.8 * unit, plot_height), unit)
    page.paste(plot, (round(margin - 0.4 * unit), margin + head))
    canvas.write(margin, page.height - 1.6 * unit, figure.caption, 0.95, MUTED)
    return page


def _curves(figure: Figure, size: tuple[float, float], unit: float) -> Image.Image:
    with _canvas(size, 0.95 * unit) as plot:
        left, right = plot.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        left.set_title(r"signal $\alpha$, and noise $\sigma$ in dashes", loc="left", color=INK)
        right.set_title(r"$\log\,\alpha^2 / \sigma^2$, and SNR in dB", loc="left", color=INK)
        right.set_ylim(-LOG_RANGE, LOG_RANGE)
        if len(figure.curves) == 1 and (largest := figure.curves[0][-1].sigma) > 1.5:
            left.set_yscale("log")
            left.set_ylim(figure.curves[0][0].sigma / 1.5, 1.5 * largest)
        else:
            left.set_ylim(-0.02, 1.05)
        decibel_axis = right.secondary_yaxis("right", functions=(_to_decibels, _from_decibels))
        decibel_axis.tick_params(length=0)
        decibel_axis.spines[:].set_visible(False)
        for strip, curve, color in zip(figure.strips, figure.curves, cycle(COLORS), strict=False):
            for axes, value, dashes in (
                (left, lambda level: level.alpha, (None, None)),
                (left, lambda level: level.sigma, (3, 1.6)),
                (right, log_snr, (None, None)),
            ):
                way, values = np.linspace(0, 1, len(curve)), [value(level) for level in curve]
                axes.plot(way, values, dashes=dashes, color=color, linewidth=0.14 * unit * POINT)
                _dots(axes, curve, strip.levels, value, color, 0.42 * unit)
        for axes in (left, right):
            _position_axis(axes, figure)
            _plain(axes)
        return _picture(plot)


def _dots(
    axes: Axes,
    curve: Sequence[Level],
    levels: Sequence[Level],
    value: Callable[[Level], float],
    color: str,
    size: float,
) -> None:
    """Levels as dots on their curve, whole at the plot's borders; those beyond are left out."""
    low, high = axes.get_ylim()
    inside = [level for level in levels if low <= value(level) <= high]
    at, values = positions(curve, inside), [value(level) for level in inside]
    dots = axes.plot(at, values, "o", color=color, ms=size * POINT, mec=PAPER, clip_on=False)
    dots[0].set(zorder=3, in_layout=False)


def _position_axis(axes: Axes, figure: Figure) -> None:
    """The way from picture to static, in the path's own time where there is but one."""
    if len(figure.curves) == 1:
        curve = figure.curves[0]
        places = [k / 3 for k in range(4)]
        names = [short(curve[round(place * (len(curve) - 1))].t) for place in places]
        axes.set_xlabel("$t$", labelpad=1)
    else:
        places, names = [0.0, 1.0], ["picture", "static"]
    axes.set_xlim(0, 1)
    axes.set_xticks(places, names)
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")


def _to_decibels(log: float) -> float:
    return 10 * log / math.log(10)


def _from_decibels(value: float) -> float:
    return value * math.log(10) / 10
