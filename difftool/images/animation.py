"""Pictures one after the other, as a GIF or a WebP. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from difftool.images.formats import OWN

PACE, LAST = 90, 1600
"""Milliseconds of a frame, and of the last one."""
MAX_SIDE = 512
"""Of frames."""
GIF: dict[str, object] = {"optimize": False, "disposal": 1, "comment": OWN["Software"]}
"""How a GIF is saved whose frames have palettes of their own."""


def gif(frames: Sequence[Image.Image]) -> bytes:
    """A GIF that plays for ever, each frame at the last one's size, cut down to MAX_SIDE."""
    scale = min(1.0, MAX_SIDE / max(frames[-1].size))
    size = tuple(max(1, round(side * scale)) for side in frames[-1].size)
    made = [
        frame.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC).quantize(256)
        for frame in frames
    ]
    return animated(made, [PACE] * (len(made) - 1) + [LAST], "GIF", **GIF)


def animated(
    frames: Sequence[Image.Image], durations: Sequence[int], format: str, **options: object
) -> bytes:
    """Frames as they are, each for so many milliseconds, for ever; one alone stands still."""
    file, (first, *rest) = BytesIO(), frames
    if rest:
        options |= {"save_all": True, "append_images": rest, "duration": [*durations], "loop": 0}
    first.save(file, format, **options)
    return file.getvalue()
