"""Figures of a run, drawn from its metrics.jsonl: what is learned, where, and how it went.

A figure is drawn once, in ink on paper; as SVG its inks become the page's own colours, so that it
follows a reader's light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from difftool.images.theme import AMBER, BLUE, GREEN, INK, MUTED, PAPER, RED, RULE, VIOLET
from difftool.training.metrics import LEVELS, Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE = "#a9cdd3"
TIME = ("#c3dde1", "#8fc0c7", "#5ba3ae", "#2a8795", "#006374")
"""From the start of a run to its end."""
CHANNELS = {"red": RED, "green": GREEN, "blue": "#3b6ea5"}
TERMS = (BLUE, AMBER, VIOLET, RED, GREEN)
VARIABLES = {
    **{PAPER: "paper", INK: "ink", MUTED: "muted", RULE: "rule"},
    **{BLUE: "line", PALE: "pale", RED: "red"},
    **{color: f"time{i}" for i, color in enumerate(TIME)},
}
"""A page's names of the inks, which a dark one sets anew (page.css)."""
POINTS = 800
"""Points of a curve, at most; longer ones are means of neighbours."""
DPI = 150
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "difftool",
    "figure.subplot.hspace": 0.6,  # between the terms, one above the other
}


# --- what is drawn ---------------------------------------------------------------------------


def loss_figure(metrics: Metrics, title: str) -> Figure | None:
    """Loss over the steps, by noise level or term, and below it the gradient and the learning rate;
    None before anything was measured."""
    if not metrics.training:
        return None
    by_level = any(line.get("levels") for line in metrics.training)

    def draw(figure: Figure) -> None:
        right = ["by level"] if by_level else metrics.terms() or ["nothing"]
        column: Any = [[name] for name in right] if len(right) > 1 else right[0]
        mosaic = [["loss", column], ["grad_norm", "lr"]]
        axes = figure.subplot_mosaic(mosaic, height_ratios=(3.3, 1), width_ratios=(3, 2))
        steps = [line["step"] for line in metrics.training]
        _loss(axes["loss"], metrics, title)
        for name, color in zip(right, TERMS * len(right), strict=False):
            if by_level:
                _by_level(axes[name], metrics)
            elif metrics.terms():
                _term(axes[name], metrics, name, color)
                if name != right[-1]:
                    axes[name].set_xticklabels([])
            else:
                axes[name].set_axis_off()
        for key, words in (("grad_norm", "gradient norm"), ("lr", "learning rate")):
            low = _curve(axes[key], steps, _column(metrics, key), color=MUTED, linewidth=1.1)
            axes[key].set_title(words, fontsize=8.5, color=MUTED)
            if key == "grad_norm" and low > 0:
                axes[key].set_yscale("log")
            _dress(axes[key], steps)
            axes[key].set_xlabel("step")

    return _figure((9.6, 5.6), 0.52, draw)


def colour_figure(metrics: Metrics) -> Figure | None:
    """Mean and deviation of red, green and blue over the run; dashed: the data's."""
    if not metrics.colours:
        return None
    steps = [line["step"] for line in metrics.colours]

    def draw(figure: Figure) -> None:
        for axes, key in zip(figure.subplots(1, 2), ("mean", "std"), strict=True):
            for i, (name, color) in enumerate(CHANNELS.items()):
                made = [line["colours"]["samples"][key][i] for line in metrics.colours]
                real = [line["colours"]["data"][key][i] for line in metrics.colours]
                axes.plot(steps, real, color=color, linewidth=1, linestyle=(0, (4, 2)), alpha=0.7)
                axes.plot(steps, made, color=color, linewidth=1.8, marker=".", label=name)
            words = {"mean": "mean of each channel", "std": "deviation of each channel"}
            axes.set_title(words[key])
            _dress(axes, steps)
            low, high = axes.get_ylim()
            middle, half = (low + high) / 2, max((high - low) / 2, 0.25)
            axes.set_ylim(middle - half, middle + half)
        figure.axes[0].legend(ncols=3, fontsize=8, handlelength=1.2, columnspacing=1.2)

    return _figure((9.6, 2.4), 0.3, draw)


def _loss(axes: Axes, metrics: Metrics, title: str) -> None:
    lines = metrics.training
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    window = _window(losses)
    style = {"color": PALE, "linewidth": 0.8} if window > 1 else {"color": BLUE, "linewidth": 1.9}
    low = _curve(axes, steps, losses, **style, label="loss")
    if window > 1:
        mean = running_mean(losses, window)
        _curve(axes, steps, mean, color=BLUE, linewidth=1.9, label="running mean")
    if metrics.validation and metrics.compared == "loss":
        at = [line["step"] for line in metrics.validation]
        held = [line["validation"]["loss"] for line in metrics.validation]
        style = {"color": RED, "linewidth": 1.3, "marker": "o", "markersize": 3.2}
        axes.plot(at, held, **style, markevery=max(1, len(at) // 40), label="held-out pictures")
        low = min(low, *held)
    axes.set_title(title or "loss", fontsize=11, pad=8)
    if low > 0:
        axes.set_yscale("log")
    _dress(axes, steps)
    axes.legend(loc="upper right", fontsize=8)


def _by_level(axes: Axes, metrics: Metrics) -> None:
    """Profiles over log SNR at several times of the run."""
    lines = [line for line in metrics.training if line.get("levels")]
    centres = [low + 1 for low in (LEVELS[0] - 2, *LEVELS)]
    cuts = [round(share * len(lines)) for share in (0, 0.05, 0.15, 0.35, 0.65, 1)]
    spans = [(a, b) for a, b in pairwise(cuts) if b > a][-len(TIME) :]
    for (start, end), color in zip(spans, TIME[len(TIME) - len(spans) :], strict=True):
        profile = _mean_levels(line["levels"] for line in lines[start:end])
        label = f"to step {lines[end - 1]['step']:,}".replace(",", " ")
        axes.plot(centres, _gaps(profile), color=color, linewidth=1.7, label=label)
    if held := [line for line in metrics.validation if line["validation"].get("levels")]:
        profile = _gaps(held[-1]["validation"]["levels"])
        axes.plot(centres, profile, color=RED, linewidth=0, marker="o", markersize=3.5,
                  label="held out, now")  # fmt: skip
    measured = [
        c for c, v in zip(centres, _mean_levels(x["levels"] for x in lines), strict=True) if v
    ]
    axes.set_title("by noise level")
    axes.set_xlabel("log SNR:  noisier  ←        →  cleaner")
    axes.set_yscale("log")
    axes.grid(True, which="major")
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_visible(False)
    if measured:
        axes.set_xlim(min(measured) - 1, max(measured) + 1)
    axes.legend(fontsize=7.5, handlelength=1.4)
    _plain_log(axes)


def _term(axes: Axes, metrics: Metrics, name: str, color: str) -> None:
    """One term of the loss; a share of right answers has an axis from 0 to 100 %."""
    from matplotlib.ticker import MaxNLocator

    steps, values = [line["step"] for line in metrics.training], _column(metrics, name)
    unit = 100 if name == "right" else 1
    scaled = [v if v is None else v * unit for v in values]
    window = _window(values)
    low = _curve(axes, steps, scaled, color=color, linewidth=0.8, alpha=0.4)
    _curve(axes, steps, running_mean(scaled, window), color=color, linewidth=1.8)
    held = [line for line in metrics.validation if name in line["validation"]]
    at, points = [line["step"] for line in held], [line["validation"][name] * unit for line in held]
    axes.plot(at, points, color=RED, linewidth=0, marker="o", markersize=3.2)
    if name == "right":
        axes.set_title("captions matched with their picture in a batch")
        axes.set(ylim=(0, 100), ylabel="%")
    else:
        axes.set_title(name, fontsize=8.5, pad=3)
        axes.set_yscale("log" if min([low, *points]) > 0 else "linear")
    _dress(axes, steps)
    if name != "right":
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))


# --- how -------------------------------------------------------------------------------------


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the `window` values around each place, of fewer at the ends."""
    before, after = window // 2, window - window // 2
    return [_mean(values[max(0, i - before) : i + after]) for i in range(len(values))]


def _mean(values: Iterable[float | None]) -> float | None:
    some = [v for v in values if v is not None]
    return math.fsum(some) / len(some) if some else None


def _window(values: Sequence[Any]) -> int:
    return max(1, len(values) // 40)


def _column(metrics: Metrics, key: str) -> list[float | None]:
    return [line.get(key) for line in metrics.training]


def _curve(axes: Axes, steps: Sequence[int], values: Sequence[float | None], **style: Any) -> float:
    """Draw a curve of at most POINTS points; its least value."""
    stride = -(-len(steps) // POINTS)
    places = range(0, len(steps), stride)
    means = [_mean(values[i : i + stride]) for i in places]
    drawn = [math.nan if v is None else v for v in means]
    axes.plot([steps[min(i + stride, len(steps)) - 1] for i in places], drawn, **style)
    return min((v for v in drawn if not math.isnan(v)), default=math.nan)


def _mean_levels(rows: Iterable[Sequence[float | None]]) -> list[float | None]:
    return [_mean(column) for column in zip(*rows, strict=True)]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [v if v else math.nan for v in values]


def _dress(axes: Axes, steps: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(True, which="major")
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_visible(False)
    last = max(steps)
    axes.set_xlim(0, max(last, 1) * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", "\u2009")))
    if axes.get_yscale() == "log":
        _plain_log(axes)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _number(value: float, _: Any = None) -> str:
    return f"{value:g}".replace("-", "−")


def _plain_log(axes: Axes) -> None:
    """Numbers as one writes them (0.05, 0.1, 0.2) on a logarithmic axis, and not too many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 2.5 else (1,)
    if decades < 0.6:
        subs = (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _figure(inches: tuple[float, float], below: float, draw: Callable[[Figure], None]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=inches)
        # By hand: finding out takes longer than drawing, and a run draws often.
        width, height = inches
        edges = {"left": 0.5 / width, "right": 1 - 0.26 / width, "top": 1 - 0.36 / height}
        figure.subplots_adjust(**edges, bottom=below / height, wspace=0.17, hspace=0.42)
        draw(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(STYLE), io.BytesIO() as file:
        FigureCanvasAgg(figure)
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
        return file.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an SVG element for a page that sets VARIABLES."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with rc_context(STYLE), io.StringIO() as file:
        FigureCanvasSVG(figure)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for ink, variable in VARIABLES.items():
        text = text.replace(ink, f"var(--{variable})")
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids would repeat in a page of several
    head, rest = text.split(">", 1)
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + rest
