"""The forward process made visible: strips of x_t from picture to static, and tables of the path.

Torch-free: pictures are numpy arrays [H,W,3], float32 in [-1, 1]. All noise comes from one
generator seeded by the seed alone, so a picture's strip is the same alone and among others.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import cycle, groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from difftool.diffusion.path import Edm, Flow, Level, Path
from difftool.errors import UsageError

Picture = NDArray[np.floating[Any]]
SIDE = 256
"""Longest side of a frame, in pixels, where none is asked for."""
PIXELS_MAX = 1 << 26
"""All frames of a sheet together."""

# --- levels ----------------------------------------------------------------------------------


def even_levels(path: Path, count: int | None = None) -> list[Level]:
    """Levels from clean to noisy, evenly in the path's training time: its t, on EDM log sigma.

    On a table they are its nearest entries. Without a count: all of the table, about 1000 others.
    """
    if isinstance(path, Flow):
        times = np.linspace(0, 1, count or path.steps + 1).tolist()
        return [path.level(path.shifted(t)) for t in times]
    if count is not None and count > path.steps and not path.continuous:
        raise UsageError("more levels than the noise path has", f"{count}, it has {path.steps}")
    indices = np.linspace(0, path.steps - 1, count or path.steps).tolist()
    return [path.at_index(index if path.continuous else round(index)) for index in indices]


def log_snr(level: Level) -> float:
    """log(alpha^2 / sigma^2): natural logarithm, infinite at the ends of the path."""
    return 2 * level.half_log_snr


def decibels(level: Level) -> float:
    """The same in dB."""
    return 10 * log_snr(level) / math.log(10)


def signal_share(level: Level) -> float:
    """The signal's share of the variance, alpha^2 / (alpha^2 + sigma^2), in [0, 1]."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


COLUMNS: tuple[str, ...] = ("index", "t", "alpha", "sigma", "log_snr")


def rows(levels: Iterable[Level]) -> list[dict[str, float]]:
    """The levels as rows of COLUMNS; log_snr is the natural logarithm of alpha^2 / sigma^2."""
    return [
        dict(zip(COLUMNS, (index, level.t, level.alpha, level.sigma, log_snr(level)), strict=True))
        for index, level in enumerate(levels)
    ]


def json_rows(levels: Iterable[Level]) -> list[dict[str, float | None]]:
    """`rows` for JSON, which has no infinity: it is null there."""
    return [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows(levels)]


def csv_text(levels: Iterable[Level]) -> str:
    """`rows` as CSV with a header line; infinities are written inf and -inf."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(levels))
    return text.getvalue()


def table(levels: Iterable[Level], bars: bool = False) -> list[str]:
    """Lines of a readable table; `bars` adds the signal's share of the variance as a bar."""
    head = f"{'index':>5}  {'t':>9}  {'alpha':>9}  {'sigma':>9}  {'log_snr':>8}  {'SNR dB':>7}"
    lines = [head + ("  signal" if bars else "")]
    for index, level in enumerate(levels):
        line = (
            f"{index:>5}  {_short(level.t):>9}  {level.alpha:>9.6f}  {level.sigma:>9.6f}"
            f"  {log_snr(level):>8.3f}  {decibels(level):>7.2f}"
        )
        lines.append(line + (f"  {_bar(signal_share(level))}" if bars else ""))
    return lines


def _bar(share: float, width: int = 24) -> str:
    full, eighths = divmod(round(share * width * 8), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def _short(t: float) -> str:
    return f"{t:.0f}" if t >= 1000 else f"{t:.3g}"


# --- the process -----------------------------------------------------------------------------


def picture(image: Image.Image, side: int | None = None) -> Picture:
    """An image (RGB) as x0, its longest side `side` pixels; if None, shrunk to 256 where larger."""
    longest = max(image.size)
    scale = (side or min(SIDE, longest)) / longest
    if scale != 1:
        width, height = (max(1, round(scale * length)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 127.5 - 1


def marginals(x0: Picture, levels: Iterable[Level], seed: int) -> list[Picture]:
    """x_t = alpha x0 + sigma z at each level, all with the same z: one point of q(x_t | x_0)."""
    z = np.random.default_rng(seed).standard_normal(x0.shape, dtype=np.float32)
    return [level.alpha * x0 + level.sigma * z for level in levels]


def chain_levels(path: Path, through: Iterable[Level]) -> list[Level]:
    """The levels that the chain visits, clean to noisy: all of the path's, and `through`."""
    visited = {level.half_log_snr: level for level in (*even_levels(path), *through)}
    return [visited[half_log_snr] for half_log_snr in sorted(visited, reverse=True)]


def chain(x0: Picture, levels: Iterable[Level], seed: int) -> Iterator[Picture]:
    """x_t at each level, each drawn from q(x_t | x_{t-1}) of the picture before it.

    With a = alpha_t / alpha_{t-1} this is N(a x_{t-1}, sigma_t^2 - a^2 sigma_{t-1}^2), which on
    DDPM's path is N(sqrt(1 - beta) x_{t-1}, beta) (Ho et al. 2020, equation 2).
    """
    generator = np.random.default_rng((seed, 1))  # not the marginals' noise
    x_t, alpha, sigma = x0, 1.0, 0.0
    for level in levels:
        scale = level.alpha / alpha
        variance = max(level.sigma**2 - (scale * sigma) ** 2, 0.0)
        z = generator.standard_normal(x0.shape, dtype=np.float32)
        x_t = scale * x_t + math.sqrt(variance) * z
        alpha, sigma = level.alpha, level.sigma
        yield x_t


class ChainCheck(NamedTuple):
    """How far a chain's pictures are from draws of q(x_t | x_0), at worst.

    (x_t - alpha x0) / sigma is then unit noise: its mean and its standard deviation - 1.
    """

    transitions: int
    mean: float
    std: float


def walk(
    x0: Picture, path: Path, shown: Sequence[Level], seed: int
) -> tuple[list[Picture], ChainCheck]:
    """The chain's pictures at the levels shown, and the check of them all."""
    levels = chain_levels(path, shown)
    wanted = set(shown)
    seen: dict[Level, Picture] = {}
    mean = std = 0.0
    for level, x_t in zip(levels, chain(x0, levels, seed), strict=True):
        if level not in wanted:
            continue
        seen[level] = x_t
        if level.sigma > 0:
            residual = (x_t.astype(np.float64) - level.alpha * x0) / level.sigma
            mean = max(mean, abs(float(residual.mean())))
            std = max(std, abs(float(residual.std()) - 1))
    return [seen[level] for level in shown], ChainCheck(len(levels), mean, std)


def visible(x_t: Picture, level: Level) -> NDArray[np.uint8]:
    """x_t as a picture: clamped to [-1, 1], as any viewer would show it.

    Only where the path lets the variance grow (EDM, sigma up to 80) it is first divided by
    hypot(alpha, sigma); the variance preserving and flow paths are shown as they are.
    """
    unit = x_t / max(1.0, math.hypot(level.alpha, level.sigma))
    return ((unit.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


# --- drawing ---------------------------------------------------------------------------------

PAPER, INK, MUTED, TRACK = "#fbfaf7", "#1c1b19", "#85817a", "#e3dfd6"
COLORS = ("#d1495b", "#00798c", "#e09f3e", "#5b8c5a", "#6c5b9e", "#2e4057")
"""Of the bands, in turn."""
LINE_MAX = 10
"""Frames on a line; longer bands are broken into lines of equal length."""
SMALLEST, UNIT = 160, 14.5


class Band(NamedTuple):
    """One row of a sheet: the pictures x_t of a process at its levels."""

    title: str
    note: str
    pictures: Sequence[Picture]
    levels: Sequence[Level]


class Sheet(NamedTuple):
    """What is drawn on one picture."""

    title: str
    note: str
    bands: Sequence[Band]
    caption: str
    curves: Sequence[Sequence[Level]] = ()
    """Levels of each band, close enough together to draw its SNR beside it."""


def strip_sheet(x0: Picture, name: str, path: Path, levels: Sequence[Level], seed: int) -> Sheet:
    """The marginals of one path, from picture to static."""
    _check_room(x0, len(levels))
    band = Band(name, describe(path), marginals(x0, levels, seed), levels)
    return Sheet(name, band.note, [band], f"{_terminal(path)} · seed {seed}")


def markov_sheet(
    x0: Picture, name: str, path: Path, levels: Sequence[Level], seed: int
) -> tuple[Sheet, ChainCheck]:
    """The chain beside the marginals, and how far the two are apart."""
    _check_room(x0, 2 * len(levels))
    pictures, check = walk(x0, path, levels, seed)
    bands = [
        Band("marginals", "𝑞(𝑥ₜ | 𝑥₀): one jump each", marginals(x0, levels, seed), levels),
        Band("chain", f"𝑞(𝑥ₜ | 𝑥ₜ₋₁): {check.transitions} small steps", pictures, levels),
    ]
    caption = (
        f"the chain's (𝑥ₜ − 𝛼 𝑥₀) / 𝜎 has mean 0 within {check.mean:.4f} "
        f"and deviation 1 within {check.std:.4f} · seed {seed}"
    )
    return Sheet(name, describe(path), bands, caption), check


def compare_sheet(x0: Picture, paths: Mapping[str, Path], count: int, seed: int) -> Sheet:
    """A band a path, all with the same noise, and their SNR beside them."""
    _check_room(x0, count * len(paths))
    bands = []
    for name, path in paths.items():
        levels = even_levels(path, count)
        note = f"{describe(path)} · {_terminal(path)}"
        bands.append(Band(name, note, marginals(x0, levels, seed), levels))
    caption = f"the same noise on every path · seed {seed}"
    curves = [even_levels(path) for path in paths.values()]
    return Sheet("forward process", "from picture to static", bands, caption, curves)


def _check_room(x0: Picture, frames: int) -> None:
    height, width = (length * _zoom(x0) for length in x0.shape[:2])
    if frames * height * width > PIXELS_MAX:
        why = f"{frames} frames of {width}x{height} pixels"
        raise UsageError(
            "the strip would be too large", why, "show fewer --steps or a smaller --size"
        )


def _zoom(x0: Picture) -> int:
    """How many times small pictures are magnified, so that their pixels are seen."""
    return max(1, math.ceil(SMALLEST / max(x0.shape)))


def describe(path: Path) -> str:
    """What a path is, in a few words."""
    if isinstance(path, Edm):
        return f"𝜎 from {path.sigma_min:g} to {path.sigma_max:g}"
    if isinstance(path, Flow):
        return "rectified flow" + (f", shift {path.shift:g}" if path.shift != 1 else "")
    return f"{path.steps} steps"


def _terminal(path: Path) -> str:
    return f"terminal SNR {_typeset(decibels(path.level(path.t_max)))} dB"


def draw(sheet: Sheet) -> Image.Image:
    """The picture of a sheet: frames labelled with t, SNR and the signal's share as a bar."""
    bands = sheet.bands
    height, width = bands[0].pictures[0].shape[:2]
    zoom = _zoom(bands[0].pictures[0])
    width, height = width * zoom, height * zoom
    unit = min(max(max(width, height) / UNIT, 14), 40)
    cell = max(width, round(11 * unit))
    gap, margin = round(0.8 * unit), round(2.2 * unit)
    count = len(bands[0].pictures)
    lines = math.ceil(count / LINE_MAX)
    columns = math.ceil(count / lines)
    head, label = round(3.4 * unit), round(3.2 * unit)
    band_head = round(2.1 * unit) if len(bands) > 1 else 0
    band_height = band_head + lines * (height + label)
    frames_width = columns * (cell + gap) - gap
    plot_height = len(bands) * band_height - band_head - label
    panel = round(max(22 * unit, 0.4 * plot_height)) if sheet.curves else 0

    page_width = 2 * margin + frames_width + panel
    page_height = margin + head + len(bands) * band_height + round(1.7 * unit)
    page = Image.new("RGB", (page_width, page_height), PAPER)
    pen = _Pen(page, unit)
    right = page.width - margin
    end = pen.write(margin, margin + 0.9 * unit, sheet.title, 1.75)
    pen.write(end + 0.8 * unit, margin + 0.9 * unit, sheet.note, 1.1, MUTED)
    pen.write(right, margin + 0.9 * unit, "𝑥ₜ = 𝛼 𝑥₀ + 𝜎 𝜀", 1.35, MUTED, align="right")

    top = margin + round(2.3 * unit)
    for band, color in zip(bands, cycle(COLORS), strict=False):
        if band_head:
            end = pen.write(margin, top + 1.15 * unit, band.title, 1.2, color)
            pen.write(end + 0.6 * unit, top + 1.15 * unit, band.note, 1.0, MUTED)
        for index, (x_t, level) in enumerate(zip(band.pictures, band.levels, strict=True)):
            line, column = divmod(index, columns)
            x = margin + column * (cell + gap)
            y = top + band_head + line * (height + label)
            frame = Image.fromarray(visible(x_t, level))
            pen.frame(x, y, frame.resize((width, height), Image.Resampling.NEAREST))
            pen.bar(x, y + height + 0.5 * unit, width, signal_share(level), color)
            under = y + height + 1.85 * unit
            snr = f"SNR {_typeset(decibels(level))} dB"
            pen.write(x, under, f"𝑡 = {_short(level.t)}" if level.t >= 0 else "𝑥₀", 1.0)
            pen.write(x + cell, under, snr, 1.0, MUTED, align="right")
        top += band_height
    if sheet.curves:
        plot = _curves(sheet.curves, panel - 2.5 * unit, plot_height + 2.2 * unit, unit)
        page.paste(plot, (right - plot.width, margin + round(2.3 * unit) + band_head))
    bottom = page.height - 1.6 * unit
    pen.write(margin, bottom, sheet.caption, 0.95, MUTED)
    pen.write(right, bottom, "difftool noise", 0.95, MUTED, align="right")
    return page


def _typeset(value: float) -> str:
    text = "∞" if math.isinf(value) else f"{abs(value):.1f}"
    return ("−" if value < 0 and text != "0.0" else "") + text


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """STIX, the scientific journals' type, in the copy that comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/STIXGeneral.ttf", size)


SUBSCRIPTS = {"₀": "0", "₁": "1", "₋": "−", "ₜ": "𝑡"}


class _Pen:
    """Draws text, frames and bars on a page; sizes are in units of the labels' size."""

    def __init__(self, page: Image.Image, unit: float):
        self.page, self.unit, self.draw = page, unit, ImageDraw.Draw(page)

    def write(
        self, x: float, y: float, text: str, size: float, fill: str = INK, align: str = "left"
    ) -> float:
        """Write text on the baseline y and return where it ends.

        STIX lacks the subscript characters, so they are set as small lowered ones.
        """
        runs = []
        for low, part in groupby(text, SUBSCRIPTS.__contains__):
            run = "".join(SUBSCRIPTS.get(c, c) for c in part)
            font = _font(round(size * self.unit * (0.7 if low else 1)))
            runs.append((run, font, y + (0.2 * size * self.unit if low else 0)))
        if align == "right":
            x -= sum(font.getlength(run) for run, font, _ in runs)
        for run, font, baseline in runs:
            self.draw.text((x, baseline), run, fill, font, anchor="ls")
            x += font.getlength(run)
        return x

    def frame(self, x: float, y: float, picture: Image.Image) -> None:
        """Paste a picture with slightly rounded corners."""
        radius = round(0.3 * self.unit)
        mask = Image.new("L", (picture.width * 4, picture.height * 4))
        ImageDraw.Draw(mask).rounded_rectangle(
            (0, 0, mask.width - 1, mask.height - 1), 4 * radius, 255
        )
        self.page.paste(picture, (round(x), round(y)), mask.resize(picture.size))

    def bar(self, x: float, y: float, width: float, share: float, color: str) -> None:
        """A track of the width with its share filled."""
        thick = max(3, round(0.24 * self.unit))
        box = Image.new("RGB", (round(width) * 4, thick * 4), PAPER)
        draw = ImageDraw.Draw(box)
        for part, fill in ((1.0, TRACK), (share, color)):
            if part * width >= 1:
                end = max(part * box.width, box.height)
                draw.rounded_rectangle((0, 0, end - 1, box.height - 1), box.height / 2, fill)
        small = box.resize((round(width), thick), Image.Resampling.LANCZOS)
        self.page.paste(small, (round(x), round(y)))


def _curves(
    curves: Sequence[Sequence[Level]], width: float, height: float, unit: float
) -> Image.Image:
    """The SNR of the bands, in their colours, over the way from picture to static."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi, pixel = 100, 72 / 100
    style: dict[Any, Any] = {
        "font.family": "STIXGeneral",
        "mathtext.fontset": "stix",
        "font.size": 1.2 * unit * pixel,
        "text.color": MUTED,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": TRACK,
        "grid.color": TRACK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with rc_context(style):
        figure = Figure(
            figsize=(width / dpi, height / dpi), dpi=dpi, facecolor=PAPER, layout="constrained"
        )
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=PAPER)
        for levels, color in zip(curves, cycle(COLORS), strict=False):
            way = np.linspace(0, 1, len(levels))
            snr = [decibels(level) for level in levels]
            axes.plot(way, snr, color=color, linewidth=0.18 * unit * pixel)
        axes.set(xlim=(0, 1), ylim=(-45, 45), xticks=(0, 0.5, 1), ylabel="SNR / dB")
        axes.set_xticklabels(("picture", "", "static"))
        axes.tick_params(length=0)
        axes.grid(True)
        axes.spines[:].set_visible(False)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
