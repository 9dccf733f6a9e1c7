"""A sheet as one HTML file to play with: all of it is inside, no network. Torch-free.

What is a function of x0, z and the level is computed in the page, at all levels; other frames are
pictures in it.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from difftool.diffusion.path import Level
from difftool.forward.plots import ways
from difftool.forward.process import Pixels
from difftool.forward.sheets import Band, Sheet
from difftool.images.theme import COLORS

NOISE_STEP = 1 / 26
"""Precision of the noise in the page, one byte a number: good to two grey levels."""
DIGITS = 7
"""Of every number."""
QUALITY = 92


def page(sheet: Sheet) -> bytes:
    """The page of a sheet."""
    source = files("difftool.forward")
    text = (source / "page.html").read_text(encoding="utf-8")
    data = json.dumps(_data(sheet), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "TITLE": escape(f"{sheet.title} · difftool noise"),
        "STYLE": (source / "page.css").read_text(encoding="utf-8"),
        "DATA": data.replace("<", "\\u003c"),
        "SCRIPT": (source / "page.js").read_text(encoding="utf-8"),
    }
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text.encode()


def _data(sheet: Sheet) -> dict[str, Any]:
    """All that the page knows."""
    colors = zip(sheet.bands, cycle(COLORS), strict=False)
    data: dict[str, Any] = {
        "title": sheet.title,
        "note": sheet.note,
        "caption": sheet.caption,
        "rivals": sheet.rivals,
        "bands": [_band(band, color) for band, color in colors],
    }
    if sheet.curves:  # all levels of the paths, on which a sampler's are dots
        for band, about, curve in zip(sheet.bands, data["bands"], sheet.curves, strict=True):
            about["dots"] = _ways(curve, band.levels)
            about |= {"visited": about["levels"], "levels": _levels(curve)}
    if sheet.whole:
        data["whole"] = _levels(sheet.whole)
        for band, about in zip(sheet.bands, data["bands"], strict=True):
            about["ways"] = _ways(sheet.whole, band.levels)
    if sheet.live:
        x0 = ((sheet.live.x0 + 1) * 127.5).round().astype(np.uint8)
        z = (sheet.live.z / NOISE_STEP).round().clip(-127, 127).astype(np.int8)
        data |= {"x0": _base64(x0.tobytes()), "z": _base64(z.tobytes()), "step": NOISE_STEP}
    width, height = sheet.size
    return data | {"width": width, "height": height}


def _band(band: Band, color: str) -> dict[str, Any]:
    return {
        "title": band.title,
        "note": band.note,
        "color": color,
        "levels": _levels(band.levels),
        "visited": [],
        "dots": [],
        "errors": [round(error, DIGITS) for error in band.errors],
        "frames": [_jpeg(frame) for frame in band.frames],
    }


def _ways(curve: Sequence[Level], levels: Sequence[Level]) -> list[float]:
    return [round(way, DIGITS) for way in ways(curve, levels)]


def _levels(levels: Sequence[Level]) -> list[list[float]]:
    return [[float(f"{value:.{DIGITS}g}") for value in level] for level in levels]


def _jpeg(frame: Pixels) -> str:
    file = BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY, subsampling=0)  # noise has colours
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
