"""Pictures one after the other as a GIF. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from difftool.images.formats import OWN

PACE, LAST = 90, 1600
"""Milliseconds of a frame, and of the last one."""
MAX_SIDE = 512
"""Of frames."""


def gif(frames: Sequence[Image.Image]) -> bytes:
    """A GIF that plays for ever, each frame at the last one's size, cut down to MAX_SIDE."""
    scale = min(1.0, MAX_SIDE / max(frames[-1].size))
    size = tuple(max(1, round(side * scale)) for side in frames[-1].size)
    made = [
        frame.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC).quantize(256)
        for frame in frames
    ]
    file, (first, *rest) = BytesIO(), made
    durations = [PACE] * len(rest) + [LAST]
    first.save(
        file, "GIF", save_all=True, append_images=rest, duration=durations, loop=0,
        optimize=False, disposal=1, comment=OWN["Software"],
    )  # fmt: skip
    return file.getvalue()
