"""Pictures in shape: scaled, cut to a frame, as tensors and back, side by side on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from difftool.errors import ResourceError
from difftool.images.read import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

SEEN = 176
"""A side at which the pixels of a picture can be seen."""


class Fit(NamedTuple):
    """How a picture fills a frame: scaled to width x height, from which the frame is cut at (left,
    top). All in pixels."""

    width: int
    height: int
    left: int
    top: int


def fit(
    picture: tuple[int, int], frame: tuple[int, int], at: tuple[float, float] | None = None
) -> Fit:
    """How a picture of that size covers a frame; of what stands out, `at` (in [0, 1) across and
    down) of it is cut off before the frame, half where it is None."""
    scale = max(side / own for side, own in zip(frame, picture, strict=True))
    width, height = (
        max(side, round(own * scale)) for side, own in zip(frame, picture, strict=True)
    )
    spare = width - frame[0], height - frame[1]
    if at is None:
        return Fit(width, height, spare[0] // 2, spare[1] // 2)
    return Fit(width, height, int(at[0] * (spare[0] + 1)), int(at[1] * (spare[1] + 1)))


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at another size (Lanczos)."""
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def framed(
    image: Image.Image, frame: tuple[int, int], at: tuple[float, float] | None = None
) -> Image.Image:
    """The part of the picture, scaled, that fills a frame (width, height); see `fit`."""
    width, height, left, top = fit(image.size, frame, at)
    if width * height > MAX_PIXELS:  # a strip: only what is seen of it is ever scaled
        x, y = image.width / width, image.height / height
        box = left * x, top * y, (left + frame[0]) * x, (top + frame[1]) * y
        return image.resize(frame, Image.Resampling.LANCZOS, box=box)
    image = scaled(image, (width, height))
    box = left, top, left + frame[0], top + frame[1]
    return image if image.size == frame else image.crop(box)


def to_uint8(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3,H,W]."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def stretched(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures, uint8 [B,3,H,W] on the CPU, at another size (width, height), whatever their shape
    (Pillow's bicubic)."""
    import torch

    whole = (Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images)
    return torch.stack([to_uint8(each.resize(size, Image.Resampling.BICUBIC)) for each in whole])


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """A picture, or uint8 [..., H,W], as fp32 in [-1, 1] of shape [3,H,W] or the tensor's own."""
    pixels = to_uint8(image) if isinstance(image, Image.Image) else image
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Images in [-1, 1], clamped, as uint8 of the same shape. rounding: to the nearest shade, or
    "down" to the one below, as A1111 and ComfyUI cut off what is behind the point.

    ResourceError for values that are not finite, which no picture has.
    """
    if not images.isfinite().all():
        raise ResourceError("a picture has values that are not finite", hint="try --dtype fp32")
    images = images.detach().float()
    if rounding == "down":  # in the order of those tools, on which halves and whole ones depend
        return ((images + 1) / 2).clamp(0, 1).mul(255).byte()
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte()


def to_pil(image: Tensor, rounding: str = "nearest") -> Image.Image:
    """One image [3,H,W] in [-1, 1] as an RGB picture; rounding: see `to_pixels`."""
    return Image.fromarray(to_pixels(image, rounding).permute(1, 2, 0).cpu().contiguous().numpy())


def zoom_of(size: tuple[int, int], seen: int = SEEN) -> int:
    """How many times a picture of that size is enlarged, pixel by pixel, to be at least about so
    large."""
    return max(1, round(seen / min(size)))


def tile(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures in rows on one sheet, about as many across as down where it is not said."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
