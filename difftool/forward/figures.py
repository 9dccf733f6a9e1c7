"""What is shown: rows of frames with their levels. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from difftool.diffusion.path import Level, Path
from difftool.errors import UsageError
from difftool.forward.levels import brief, describe, even_levels, rows, terminal
from difftool.forward.process import (
    ChainCheck,
    Pixels,
    Signal,
    Space,
    marginals,
    noise_like,
    unit,
    walk,
)
from difftool.images.theme import INK, PAPER, RED

if TYPE_CHECKING:
    from difftool.diffusion.denoiser import Cond
    from difftool.diffusion.likelihood import Likelihood
    from difftool.forward.levels import LevelRow
    from difftool.forward.reverse import ModelSpace

PIXELS_MAX = 1 << 26
"""All frames of a figure together."""
SMALLEST = 160
"""Longest side of a frame as it is drawn, at least, in pixels."""


class Strip(NamedTuple):
    """One row of a figure: what a process looks like at its levels."""

    title: str
    note: str
    levels: Sequence[Level]
    frames: Sequence[Pixels] = ()
    errors: Sequence[float] = ()
    """Of predictions: RMSE to the picture."""
    spent: Sequence[LevelRow] = ()
    """Of a likelihood: "bits" per dimension at each level, and what else is known of them."""

    def rows(self) -> list[LevelRow]:
        """Its levels as a table."""
        table = rows(self.levels, self.errors)
        return [a | b for a, b in zip(table, self.spent, strict=True)] if self.spent else table


class PictureAndNoise(NamedTuple):
    """A picture x0 and the noise z of all its marginals, both [H,W,3]."""

    x0: Signal
    z: Signal


class Figure(NamedTuple):
    """What is drawn on one picture."""

    title: str
    note: str
    strips: Sequence[Strip]
    caption: str
    curves: Sequence[Sequence[Level]] = ()
    """Levels of each strip, close enough together to draw its SNR beside it."""
    whole: Sequence[Level] = ()
    """Levels all along the path of strips that have but one."""
    computed_from: PictureAndNoise | None = None
    """What its frames can be computed from, where it has none."""
    comparison: bool = False
    """Whether the strips are of different paths; else they are different views of one."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its frames, in pixels; of nothing where it has no picture."""
        picture = (
            self.computed_from.x0
            if self.computed_from
            else [*self.strips[0].frames, np.empty((0, 0))][0]
        )
        height, width = picture.shape[:2]
        return width, height

    def rows(self) -> list[LevelRow]:
        """All its levels as one table, the name of the path at the end where there are several."""
        if self.comparison:
            return [row | {"path": strip.title} for strip in self.strips for row in strip.rows()]
        return self.strips[-1].rows()


def marginal_figure(
    space: Space, name: str, path: Path, levels: Sequence[Level], seed: int
) -> Figure:
    """The marginals of one path, from picture to static."""
    check_size(space.size, len(levels))
    note = describe(path)
    strip = Strip(name, note, levels, _marginal_frames(space, levels, seed))
    caption = f"{terminal(path)} · seed {seed}"
    return Figure(brief(name), note, [strip], caption, whole=_whole(path))


def markov_figure(
    space: Space, name: str, path: Path, levels: Sequence[Level], seed: int
) -> tuple[Figure, ChainCheck]:
    """The chain beside the marginals, and how far the two are apart."""
    check_size(space.size, 2 * len(levels))
    signals, check = walk(space.x0, path, levels, seed)
    jumps, steps = "𝑞(𝑥ₜ | 𝑥₀): one jump each", f"𝑞(𝑥ₜ | 𝑥ₜ₋₁): {check.transitions} small steps"
    strips = [
        Strip("marginals", jumps, levels, _marginal_frames(space, levels, seed)),
        Strip("chain", steps, levels, _frames(space, signals, levels)),
    ]
    caption = (
        f"the chain's (𝑥ₜ − 𝛼 𝑥₀) / 𝜎 has mean 0 within {check.mean:.4f} "
        f"and deviation 1 within {check.std:.4f} · seed {seed}"
    )
    return Figure(brief(name), describe(path), strips, caption, whole=_whole(path)), check


def compare_figure(
    space: Space,
    paths: Mapping[str, Path],
    levels: Mapping[str, Sequence[Level]],
    seed: int,
) -> Figure:
    """A strip a path, all with the same noise, and their SNR beside them."""
    strips = []
    for name, path in paths.items():
        shown = levels[name]
        check_size(space.size, len(shown) * len(paths))
        note = f"{describe(path)} · {terminal(path)}"
        strips.append(Strip(name, note, shown, _marginal_frames(space, shown, seed)))
    caption = f"the same noise on every path · seed {seed}"
    curves = [even_levels(path) for path in paths.values()]
    return Figure(
        "forward process", "from picture to static", strips, caption, curves, comparison=True
    )


def reverse_figure(
    space: ModelSpace,
    levels: Sequence[Level],
    seed: int,
    cond: Cond,
    condition: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Figure:
    """x_t, and below it the picture that the network sees in it, with its error."""
    check_size(space.size, 2 * len(levels))
    model, path = space.model, space.model.denoiser.path
    x_ts = list(marginals(space.x0, levels, seed))
    frames, errors = [], []
    for x0 in space.predictions(x_ts, levels, cond):
        frames.append(space.to_pixels(x0))
        errors.append(space.error(x0))
        progress(len(frames))
    note = "𝐸[𝑥₀ | 𝑥ₜ], as the network sees it"
    strips = [
        Strip("𝑥ₜ", "what the network is given", levels, _frames(space, x_ts, levels)),
        Strip("prediction", note, levels, frames, errors),
    ]
    caption = f"RMSE against the picture, in [−1, 1]; PSNR with peak 2 · seed {seed}"
    about = f"{model.denoiser.target}-prediction, {describe(path)}"
    about += f" · {brief(condition)}" if condition else ""
    return Figure(brief(model.name), about, strips, caption, whole=_whole(path))


def likelihood_figure(
    space: ModelSpace, found: Likelihood, seed: int, condition: str = ""
) -> Figure:
    """x_t in the middle of each interval of log SNR, and below it where in the picture its bits go,
    the darker the more, each on a scale of its own."""
    check_size(space.size, 2 * len(found.maps))
    model, path = space.model, space.model.denoiser.path
    ends = list(pairwise(found.edges))[::-1]  # from clean to noisy, as all strips
    levels = [path.at_half_log_snr((low + high) / 4) for low, high in ends]
    x_ts = list(marginals(space.x0, levels, seed))
    nearest, maps = Image.Resampling.NEAREST, found.maps.numpy()[::-1]
    shares = [each / (np.quantile(each, 0.995) or 1) for each in maps]
    shares = [
        Image.fromarray(each.astype(np.float32)).resize(space.size, nearest) for each in shares
    ]
    bound, flow = found.bound, found.flow
    bits = zip(bound.levels, bound.errors, flow.levels, flow.errors, strict=True)
    names = ("bits", "bits_error", "flow_bits", "flow_bits_error")
    spent = [
        {"log_snr_low": low, "log_snr_high": high} | dict(zip(names, values, strict=True))
        for (low, high), values in zip(ends, [*bits][::-1], strict=True)
    ]
    note = "where in the picture they go, the darker the more; below it bits/dim"
    strips = [
        Strip("𝑥ₜ", "in the middle of each interval", levels, _frames(space, x_ts, levels)),
        Strip("bits", note, levels, [_tinted(np.asarray(share)) for share in shares], spent=spent),
    ]
    less = f", {found.tight} without its slack" if found.tight else ""
    caption = f"{bound} bits/dim by the variational bound{less}, {flow} by the ODE · seed {seed}"
    caption = caption.replace("-", "−")
    about = f"{model.denoiser.target}-prediction, {describe(path)}"
    about += f" · {brief(condition)}" if condition else ""
    return Figure(brief(model.name), about, strips, caption, whole=_whole(path))


def _tinted(share: Signal) -> Pixels:
    """Shares [H,W] of what is darkest, as colours: the page's own, red, ink."""
    colours = [ImageColor.getrgb(colour) for colour in (PAPER, RED, INK)]
    channels = [np.interp(share, (0, 0.5, 1), channel) for channel in zip(*colours, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def page_figure(
    space: Space, paths: Mapping[str, Path], levels: Mapping[str, Sequence[Level]], seed: int
) -> Figure:
    """The marginals of paths, to be computed where they are shown."""
    check_size(space.size, 1)
    figure = curve_figure(paths, levels)
    caption = f"the same noise at all levels · seed {seed}"
    source = PictureAndNoise(space.x0, noise_like(space.x0, seed))
    title = "forward process" if figure.comparison else figure.title
    return figure._replace(title=title, caption=caption, curves=(), computed_from=source)


def curve_figure(paths: Mapping[str, Path], levels: Mapping[str, Sequence[Level]]) -> Figure:
    """Paths without a picture: all of their levels, and those that a sampler visits."""
    strips = [Strip(n, f"{describe(p)} · {terminal(p)}", levels[n]) for n, p in paths.items()]
    curves = [even_levels(path) for path in paths.values()]
    title, note = (
        (brief(strips[0].title), strips[0].note) if len(strips) == 1 else ("noise paths", "")
    )
    return Figure(title, note, strips, "", curves, comparison=len(strips) > 1)


def _whole(path: Path, count: int = 200) -> list[Level]:
    return even_levels(path, min(count, path.steps))


def _marginal_frames(space: Space, levels: Sequence[Level], seed: int) -> list[Pixels]:
    return [
        space.to_pixels(unit(x_t, level))
        for x_t, level in zip(marginals(space.x0, levels, seed), levels, strict=True)
    ]


def _frames(space: Space, signals: Sequence[Signal], levels: Sequence[Level]) -> list[Pixels]:
    return [space.to_pixels(unit(x, level)) for x, level in zip(signals, levels, strict=True)]


def check_size(size: tuple[int, int], count: int) -> None:
    """UsageError if that many frames are more than a figure holds."""
    width, height = (side * zoom(size) for side in size)
    if count * height * width > PIXELS_MAX:
        why = f"{count} frames of {width}x{height} pixels"
        raise UsageError(
            "the strip would be too large", why, "show fewer --steps or a smaller --size"
        )


def zoom(size: tuple[int, int]) -> int:
    """How many times small pictures are magnified, so that their pixels are seen."""
    return max(1, math.ceil(SMALLEST / max(size)))
