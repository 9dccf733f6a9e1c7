"""Dataset folders built for a test, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from difftool.config.schema import DataConfig
from difftool.data import open_dataset


def shade(name: str) -> int:
    return sum(name.encode()) * 7 % 200


def lay(root: Path, files: Mapping[str, str | bytes | None]) -> str:
    """Files below a root: text, bytes, or None for a small picture whose shade tells its name."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (12, 10), (shade(name), 0, 0)).save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
    return str(root)


def solid(folder: Path, colours: Iterable[tuple[int, int, int]]) -> str:
    """A new folder of pictures of 16 by 16 pixels, each of a colour."""
    folder.mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    return str(folder)


def caption_by_picture(where: str, **options) -> dict[int, str]:
    """The caption of each picture, pictures told by their shade."""
    data = open_dataset(where, DataConfig(**options))
    everything = range(len(data))
    shades = data.images(everything, 8)[:, 0, 0, 0].tolist()
    return dict(zip(shades, data.captions(everything), strict=True))


def pictures(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def lines(*entries: object) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def audit(where: str, **options) -> str:
    """What the user is told about a set, as one text."""
    return "\n".join(open_dataset(where, DataConfig(**options)).audit.lines())


def captions_of(where: str, **options) -> dict[str, str]:
    """The caption of each picture by its name."""
    data = open_dataset(where, DataConfig(**options))
    everything = range(len(data))
    return dict(zip(map(data.name, everything), data.captions(everything), strict=True))
