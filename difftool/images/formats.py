"""The formats that pictures are written in. Needs no other package: help lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftool.registry import Registry

CHUNK, TEXT = "difftool", "parameters"
"""Keywords of the text chunks of a picture that was sampled: ours, and A1111's."""
SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
)
"""Endings of files that are read as pictures."""
OWN = {"Software": "difftool"}
"""The text chunk of figures and sheets, by which they are not taken for data."""


@dataclass(frozen=True)
class OutputFormat:
    """A format that pictures are written in: a row is all there is to add."""

    name: str
    pillow: str
    """Pillow's name of it."""
    endings: tuple[str, ...]
    """Of file names, the usual one first."""
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of Pillow's encoder."""
    chunks: bool = False
    """Whether it has text chunks by keyword; without, they go into its EXIF data."""
    room: int | None = None
    """Bytes that its EXIF data may have."""


OUTPUT_FORMATS: Registry[OutputFormat] = Registry("format of pictures")

for row in (
    OutputFormat("png", "PNG", (".png",), "lossless, with all metadata", chunks=True),
    OutputFormat(
        *("jpg", "JPEG", (".jpg", ".jpeg"), "quality 95, all metadata in EXIF"),
        options={"quality": 95, "subsampling": 0},
        room=65_000,
    ),
    OutputFormat(
        *("webp", "WEBP", (".webp",), "quality 95, all metadata in EXIF"),
        options={"quality": 95},
    ),
):
    OUTPUT_FORMATS.add(row.name, row, *(ending[1:] for ending in row.endings))


def is_picture(path: str | Path) -> bool:
    """Whether a file's name is a picture's."""
    return Path(path).suffix.lower() in SUFFIXES


def format_of(ending: str) -> str | None:
    """The name of the format that an ending (".JPG") promises; None if it is none of ours."""
    rows = OUTPUT_FORMATS.values()
    return next((row.name for row in rows if ending.lower() in row.endings), None)
