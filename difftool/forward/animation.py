"""A figure as a moving picture: GIF, every frame with a palette of its own, or WebP. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from difftool.forward.drawing import AnimationFrame, animation_frames
from difftool.forward.figures import Figure
from difftool.forward.process import Pixels
from difftool.images.animation import GIF, animated
from difftool.images.formats import OWN
from difftool.images.read import EXIF_SOFTWARE
from difftool.images.theme import COLORS, INK, MUTED, PAPER, RULE

PACE, FIRST, LAST = 80, 1000, 1400
"""Milliseconds of a frame, of the picture, and of the static at the end."""
SHADES = 6
"""Steps from paper to each ink: the edges of the type."""
EFFORT = 20
"""Of the lossless encoder, to 100; noise cannot be packed any better."""


def gif(figure: Figure) -> bytes:
    """The figure as a GIF that plays for ever."""
    inks = _inks(figure)
    frames = [_indexed(frame, inks) for frame in animation_frames(figure)]
    return animated(frames, _durations(frames), "GIF", **GIF)


def webp(figure: Figure) -> bytes:
    """The figure as an animated WebP that plays for ever; lossless, for else it has no fine colour,
    of which noise is full."""
    frames = [frame.page for frame in animation_frames(figure)]
    exif = Image.Exif()
    exif[EXIF_SOFTWARE] = OWN["Software"]
    lossless = {"lossless": True, "quality": EFFORT, "method": 2}
    return animated(frames, _durations(frames), "WEBP", **lossless, exif=exif)


def _durations(frames: Sequence[Image.Image]) -> list[int]:
    durations = [PACE] * len(frames)
    durations[0], durations[-1] = FIRST, LAST
    return durations


def _inks(figure: Figure) -> Pixels:
    """Paper, inks and what lies between them [N,3]: in every frame, so that nothing flickers."""
    names = [INK, MUTED, RULE, *(c for _, c in zip(figure.strips, cycle(COLORS), strict=False))]
    paper = np.array(ImageColor.getrgb(PAPER))
    steps = np.linspace(0, 1, SHADES + 1)[1:, None]
    mixed = [paper + steps * (ImageColor.getrgb(ink) - paper) for ink in dict.fromkeys(names)]
    return np.concatenate([paper[None], *mixed]).round().astype(np.uint8)


def _indexed(frame: AnimationFrame, inks: Pixels) -> Image.Image:
    """A frame in 256 colours: the page's few, exactly, and the rest chosen for the pictures, which
    are dithered."""
    page, own = np.asarray(frame.page), len(inks)
    indices = _nearest(page, inks)
    crops = [page[top:bottom, left:right] for left, top, right, bottom in frame.boxes]
    joined = Image.fromarray(np.concatenate([crop.reshape(1, -1, 3) for crop in crops], axis=1))
    chosen = joined.quantize(256 - own, Image.Quantize.MEDIANCUT)
    for (left, top, right, bottom), crop in zip(frame.boxes, crops, strict=True):
        picture = Image.fromarray(crop).quantize(palette=chosen, dither=Image.Dither.FLOYDSTEINBERG)
        corners = (crop == inks[0]).all(axis=2)
        indices[top:bottom, left:right] = np.where(corners, 0, np.asarray(picture) + own)
    indexed = Image.fromarray(indices, "P")
    indexed.putpalette(inks.tobytes() + bytes(chosen.getpalette() or ())[: 3 * (256 - own)])
    return indexed


def _nearest(page: Pixels, colors: Pixels) -> NDArray[np.uint8]:
    """The index of the nearest colour of each pixel [H,W]."""
    packed = page.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    unique, where = np.unique(packed, return_inverse=True)
    parts = np.stack([unique >> 16, unique >> 8 & 255, unique & 255], axis=1)
    distance = np.square(parts[:, None] - colors.astype(np.int64)).sum(axis=2)
    return distance.argmin(axis=1).astype(np.uint8)[where].reshape(page.shape[:2])
