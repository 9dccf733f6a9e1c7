"""The forward process: x_t = alpha x0 + sigma eps at any level, or step by step. Torch-free.

Signals are numpy arrays, float32, of any shape; pictures are [H,W,3] in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from difftool.diffusion.path import Level, Path
from difftool.forward.levels import even_levels
from difftool.images.fit import scaled

Signal = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]
"""[H,W,3]."""
SIDE = 256
"""Longest side of a frame, in pixels, where none is asked for."""


class Space(Protocol):
    """Where noise is added to a picture, and the way back to pixels."""

    x0: Signal
    """The picture, in this space."""
    size: tuple[int, int]
    """Width and height of its pictures, in pixels."""

    def to_pixels(self, x: Signal) -> Pixels:
        """What a point of the space looks like."""
        ...


class PixelSpace:
    """The picture itself, its longest side `side` pixels; if None, shrunk to 256 where larger."""

    def __init__(self, image: Image.Image, side: int | None = None):
        longest = max(image.size)
        scale = (side or min(SIDE, longest)) / longest
        width, height = (max(1, round(scale * length)) for length in image.size)
        self.size = width, height
        self.x0: Signal = np.asarray(scaled(image, self.size), np.float32) / 127.5 - 1

    def to_pixels(self, x: Signal) -> Pixels:
        return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def unit(x_t: Signal, level: Level) -> Signal:
    """x_t as it is, except where the path lets the variance grow (EDM, sigma up to 80): there it is
    divided by hypot(alpha, sigma)."""
    return x_t / max(1.0, math.hypot(level.alpha, level.sigma))


def noise_like(x0: Signal, seed: int) -> Signal:
    """The noise of all of a picture's marginals."""
    return np.random.default_rng(seed).standard_normal(x0.shape, dtype=np.float32)


def marginals(x0: Signal, levels: Iterable[Level], seed: int) -> Iterator[Signal]:
    """x_t = alpha x0 + sigma z at each level, all with the same z: one point of q(x_t | x_0)."""
    z = noise_like(x0, seed)
    return (level.alpha * x0 + level.sigma * z for level in levels)


def chain_levels(path: Path, through: Iterable[Level]) -> list[Level]:
    """The levels that the chain visits, clean to noisy: all of the path's, and `through`."""
    visited = {level.half_log_snr: level for level in (*even_levels(path), *through)}
    return [visited[half_log_snr] for half_log_snr in sorted(visited, reverse=True)]


def chain(x0: Signal, levels: Iterable[Level], seed: int) -> Iterator[Signal]:
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
    x0: Signal, path: Path, shown: Sequence[Level], seed: int
) -> tuple[list[Signal], ChainCheck]:
    """The chain's pictures at the levels shown, and the check of them all."""
    levels = chain_levels(path, shown)
    wanted = set(shown)
    kept: dict[Level, Signal] = {}
    mean = std = 0.0
    for level, x_t in zip(levels, chain(x0, levels, seed), strict=True):
        if level not in wanted:
            continue
        kept[level] = x_t
        if level.sigma > 0:
            residual = (x_t.astype(np.float64) - level.alpha * x0) / level.sigma
            mean = max(mean, abs(float(residual.mean())))
            std = max(std, abs(float(residual.std()) - 1))
    return [kept[level] for level in shown], ChainCheck(len(levels), mean, std)
