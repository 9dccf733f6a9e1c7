"""A figure as one HTML file to play with: all of it is inside, no network. Torch-free.

What is a function of x0, z and the level is computed in the page, at all levels; other frames are
pictures in it.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from difftool.diffusion.path import Level
from difftool.forward.figures import Figure, Strip
from difftool.forward.plots import positions
from difftool.forward.process import Pixels
from difftool.images.pages import filled
from difftool.images.theme import COLORS

NOISE_STEP = 1 / 26
"""Precision of the noise in the page, one byte a number: good to two grey levels."""
DIGITS = 7
"""Of every number."""
QUALITY = 92


def page(figure: Figure) -> bytes:
    """The page of a figure."""
    data = json.dumps(_data(figure), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    title = escape(f"{figure.title} · difftool noise")
    parts = {"TITLE": title, "DATA": data.replace("<", "\\u003c")}
    return filled("difftool.forward", parts).encode()


def _data(figure: Figure) -> dict[str, Any]:
    """All that the page knows."""
    colors = zip(figure.strips, cycle(COLORS), strict=False)
    data: dict[str, Any] = {
        "title": figure.title,
        "note": figure.note,
        "caption": figure.caption,
        "comparison": figure.comparison,
        "strips": [_strip(strip, color) for strip, color in colors],
    }
    if figure.curves:  # all levels of the paths, on which a sampler's are dots
        for strip, about, curve in zip(figure.strips, data["strips"], figure.curves, strict=True):
            about["dots"] = _positions(curve, strip.levels)
            about |= {"visited": about["levels"], "levels": _levels(curve)}
    if figure.whole:
        data["whole"] = _levels(figure.whole)
        for strip, about in zip(figure.strips, data["strips"], strict=True):
            about["positions"] = _positions(figure.whole, strip.levels)
    if figure.computed_from:
        x0 = ((figure.computed_from.x0 + 1) * 127.5).round().astype(np.uint8)
        z = (figure.computed_from.z / NOISE_STEP).round().clip(-127, 127).astype(np.int8)
        data |= {"x0": _base64(x0.tobytes()), "z": _base64(z.tobytes()), "step": NOISE_STEP}
    width, height = figure.size
    return data | {"width": width, "height": height}


def _strip(strip: Strip, color: str) -> dict[str, Any]:
    return {
        "title": strip.title,
        "note": strip.note,
        "color": color,
        "levels": _levels(strip.levels),
        "visited": [],
        "dots": [],
        "errors": [round(error, DIGITS) for error in strip.errors],
        "frames": [_jpeg(frame) for frame in strip.frames],
    }


def _positions(curve: Sequence[Level], levels: Sequence[Level]) -> list[float]:
    return [round(position, DIGITS) for position in positions(curve, levels)]


def _levels(levels: Sequence[Level]) -> list[list[float]]:
    return [[float(f"{value:.{DIGITS}g}") for value in level] for level in levels]


def _jpeg(frame: Pixels) -> str:
    file = BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY, subsampling=0)  # noise has colours
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
