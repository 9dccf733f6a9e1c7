"""Pictures that a request goes by: to start from, to repaint, to vary."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from difftool.errors import UsageError
from difftool.images.fit import scaled, to_tensor
from difftool.images.read import read_image, read_mask

if TYPE_CHECKING:
    from torch import Tensor


class File(NamedTuple):
    """A file and what tells whether it has changed."""

    path: Path
    stamp: int


def _file(path: str) -> File:
    where = Path(path).resolve()
    if not where.is_file():
        raise UsageError(f"there is no picture {path}")
    return File(where, where.stat().st_mtime_ns)


def size_of(path: str) -> tuple[int, int]:
    """Width and height of a picture."""
    return _read(_file(path)).size


def picture(path: str, size: tuple[int, int]) -> Tensor:
    """A picture at that size (Lanczos, its shape not kept), [3,H,W] in [-1, 1]."""
    return _picture(_file(path), size)


def mask(path: str, size: tuple[int, int]) -> Tensor:
    """A mask at that size, [H,W]: white 1, black 0, transparent as black."""
    return _mask(_file(path), size)


def seen(path: str, side: int) -> Tensor:
    """A picture as CLIP sees it: the shorter side scaled to that (bicubic), the middle, normed;
    [3,side,side]."""
    return _seen(_file(path), side)


# Many images may go by one picture, which is read once.


@lru_cache(maxsize=4)
def _read(file: File) -> Image.Image:
    return read_image(file.path)


@lru_cache(maxsize=4)
def _picture(file: File, size: tuple[int, int]) -> Tensor:
    image = _read(file)
    return to_tensor(image if image.size == size else scaled(image, size))


@lru_cache(maxsize=4)
def _mask(file: File, size: tuple[int, int]) -> Tensor:
    import numpy as np
    import torch

    flat = read_mask(file.path)
    values = torch.from_numpy(np.array(flat if flat.size == size else scaled(flat, size)))
    if not values.any():
        raise UsageError(f"the mask {file.path} is all black", "nothing would be repainted")
    return values.float() / 255


@lru_cache(maxsize=4)
def _seen(file: File, side: int) -> Tensor:
    import torch

    from difftool.config.networks import CLIP_MEAN, CLIP_STD

    image = _read(file)
    short = min(image.size)
    width, height = (int(edge * side / short) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return ((to_tensor(image) + 1) / 2 - mean) / std
