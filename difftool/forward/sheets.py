"""What is shown: rows of frames with their levels. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

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

if TYPE_CHECKING:
    from difftool.diffusion.denoiser import Cond
    from difftool.forward.levels import Row
    from difftool.forward.reverse import ModelSpace

PIXELS_MAX = 1 << 26
"""All frames of a sheet together."""
SMALLEST = 160
"""Longest side of a frame as it is drawn, at least, in pixels."""


class Band(NamedTuple):
    """One row of a sheet: what a process looks like at its levels."""

    title: str
    note: str
    levels: Sequence[Level]
    frames: Sequence[Pixels] = ()
    errors: Sequence[float] = ()
    """Of predictions: RMSE to the picture."""

    def rows(self) -> list[Row]:
        """Its levels as a table."""
        return rows(self.levels, self.errors)


class Live(NamedTuple):
    """A picture [H,W,3] and the noise of its marginals."""

    x0: Signal
    z: Signal


class Sheet(NamedTuple):
    """What is drawn on one picture."""

    title: str
    note: str
    bands: Sequence[Band]
    caption: str
    curves: Sequence[Sequence[Level]] = ()
    """Levels of each band, close enough together to draw its SNR beside it."""
    whole: Sequence[Level] = ()
    """Levels all along the path of bands that have but one."""
    live: Live | None = None
    """What its frames can be computed from, where it has none."""
    rivals: bool = False
    """Whether the bands are of different paths; else they are different views of one."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its frames, in pixels; of nothing where it has no picture."""
        picture = self.live.x0 if self.live else [*self.bands[0].frames, np.empty((0, 0))][0]
        height, width = picture.shape[:2]
        return width, height

    def rows(self) -> list[Row]:
        """All its levels as one table, the name of the path at the end where there are several."""
        if self.rivals:
            return [row | {"path": band.title} for band in self.bands for row in band.rows()]
        return self.bands[-1].rows()


def strip_sheet(space: Space, name: str, path: Path, levels: Sequence[Level], seed: int) -> Sheet:
    """The marginals of one path, from picture to static."""
    check_room(space.size, len(levels))
    note = describe(path)
    band = Band(name, note, levels, _marginal_frames(space, levels, seed))
    caption = f"{terminal(path)} · seed {seed}"
    return Sheet(brief(name), note, [band], caption, whole=_whole(path))


def markov_sheet(
    space: Space, name: str, path: Path, levels: Sequence[Level], seed: int
) -> tuple[Sheet, ChainCheck]:
    """The chain beside the marginals, and how far the two are apart."""
    check_room(space.size, 2 * len(levels))
    signals, check = walk(space.x0, path, levels, seed)
    jumps, steps = "𝑞(𝑥ₜ | 𝑥₀): one jump each", f"𝑞(𝑥ₜ | 𝑥ₜ₋₁): {check.transitions} small steps"
    bands = [
        Band("marginals", jumps, levels, _marginal_frames(space, levels, seed)),
        Band("chain", steps, levels, _frames(space, signals, levels)),
    ]
    caption = (
        f"the chain's (𝑥ₜ − 𝛼 𝑥₀) / 𝜎 has mean 0 within {check.mean:.4f} "
        f"and deviation 1 within {check.std:.4f} · seed {seed}"
    )
    return Sheet(brief(name), describe(path), bands, caption, whole=_whole(path)), check


def compare_sheet(
    space: Space,
    paths: Mapping[str, Path],
    levels: Mapping[str, Sequence[Level]],
    seed: int,
) -> Sheet:
    """A band a path, all with the same noise, and their SNR beside them."""
    bands = []
    for name, path in paths.items():
        shown = levels[name]
        check_room(space.size, len(shown) * len(paths))
        note = f"{describe(path)} · {terminal(path)}"
        bands.append(Band(name, note, shown, _marginal_frames(space, shown, seed)))
    caption = f"the same noise on every path · seed {seed}"
    curves = [even_levels(path) for path in paths.values()]
    return Sheet("forward process", "from picture to static", bands, caption, curves, rivals=True)


def reverse_sheet(
    space: ModelSpace,
    levels: Sequence[Level],
    seed: int,
    cond: Cond,
    told: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Sheet:
    """x_t, and below it the picture that the network sees in it, with its error."""
    check_room(space.size, 2 * len(levels))
    model, path = space.model, space.model.denoiser.path
    x_ts = list(marginals(space.x0, levels, seed))
    frames, errors = [], []
    for x0 in space.predictions(x_ts, levels, cond):
        frames.append(space.seen(x0))
        errors.append(space.error(x0))
        progress(len(frames))
    note = "𝐸[𝑥₀ | 𝑥ₜ], as the network sees it"
    bands = [
        Band("𝑥ₜ", "what the network is given", levels, _frames(space, x_ts, levels)),
        Band("prediction", note, levels, frames, errors),
    ]
    caption = f"RMSE against the picture, in [−1, 1]; PSNR with peak 2 · seed {seed}"
    about = f"{model.denoiser.target}-prediction, {describe(path)}"
    about += f" · {brief(told)}" if told else ""
    return Sheet(brief(model.name), about, bands, caption, whole=_whole(path))


def live_sheet(
    space: Space, paths: Mapping[str, Path], levels: Mapping[str, Sequence[Level]], seed: int
) -> Sheet:
    """The marginals of paths, to be computed where they are shown."""
    check_room(space.size, 1)
    sheet = curve_sheet(paths, levels)
    caption = f"the same noise at all levels · seed {seed}"
    live = Live(space.x0, noise_like(space.x0, seed))
    title = "forward process" if sheet.rivals else sheet.title
    return sheet._replace(title=title, caption=caption, curves=(), live=live)


def curve_sheet(paths: Mapping[str, Path], levels: Mapping[str, Sequence[Level]]) -> Sheet:
    """Paths without a picture: all of their levels, and those that a sampler visits."""
    bands = [Band(n, f"{describe(p)} · {terminal(p)}", levels[n]) for n, p in paths.items()]
    curves = [even_levels(path) for path in paths.values()]
    title, note = (brief(bands[0].title), bands[0].note) if len(bands) == 1 else ("noise paths", "")
    return Sheet(title, note, bands, "", curves, rivals=len(bands) > 1)


def _whole(path: Path, count: int = 200) -> list[Level]:
    return even_levels(path, min(count, path.steps))


def _marginal_frames(space: Space, levels: Sequence[Level], seed: int) -> list[Pixels]:
    return [
        space.seen(unit(x_t, level))
        for x_t, level in zip(marginals(space.x0, levels, seed), levels, strict=True)
    ]


def _frames(space: Space, signals: Sequence[Signal], levels: Sequence[Level]) -> list[Pixels]:
    return [space.seen(unit(x, level)) for x, level in zip(signals, levels, strict=True)]


def check_room(size: tuple[int, int], count: int) -> None:
    """UsageError if that many frames are more than a sheet holds."""
    width, height = (side * zoom(size) for side in size)
    if count * height * width > PIXELS_MAX:
        why = f"{count} frames of {width}x{height} pixels"
        raise UsageError(
            "the strip would be too large", why, "show fewer --steps or a smaller --size"
        )


def zoom(size: tuple[int, int]) -> int:
    """How many times small pictures are magnified, so that their pixels are seen."""
    return max(1, math.ceil(SMALLEST / max(size)))
