"""The picture that is started from, as the model is given it, and how what it draws is put back.

    whole picture    fitted to the size that is drawn; what is not masked stays to the byte
    outpaint         on a larger canvas, whose new parts are masked
    only masked      the masked region and what is around it, enlarged; put back in its own size

What stays is the backdrop. Masks are grown and softened in its pixels. What is masked may be filled
with the colours around it before it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from difftool.errors import UsageError
from difftool.images.fit import framed, scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sides = tuple[int, int]
"""Width and height."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""
SOFT = 2.5
"""Deviations of a Gaussian after which it is cut off, as A1111's are."""


class Backdrop(NamedTuple):
    """Where what is drawn goes."""

    picture: Image.Image
    """What stays."""
    mask: NDArray[np.float32]
    """[H,W]: what is repainted, 1 = wholly, 0 = not at all."""
    box: Box
    """What is drawn of it; more may be drawn on the right and at the bottom than it has."""

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The picture with what was drawn put in; where the mask is 0 it has its own bytes."""
        left, top, right, bottom = self.box
        layer = self.picture.copy()
        layer.paste(scaled(drawn, (right - left, bottom - top)), (left, top))
        old, new = (np.asarray(image, np.float32) for image in (self.picture, layer))
        mixed = old + self.mask[..., None] * (new - old)
        return Image.fromarray(mixed.round().astype(np.uint8))


class Start(NamedTuple):
    """What the model is given."""

    picture: Image.Image
    """Of the size that is drawn."""
    mask: NDArray[np.float32] | None
    """[H,W] of that size."""
    backdrop: Backdrop | None
    """None where all of it is drawn anew."""


class Fitting(NamedTuple):
    """How a picture is fitted: settings of SampleConfig."""

    size: Sides
    factor: int = 1
    """Of which sides that are drawn are multiples."""
    fit: str = "stretch"
    outpaint: Box | None = None
    mask_invert: bool = False
    mask_grow: int = 0
    mask_blur: float = 0.0
    mask_content: str = "original"
    only_masked: bool = False
    mask_padding: int = 0


def started(picture: Image.Image, mask: Image.Image | None, settings: Fitting) -> Start:
    """A picture and maybe its mask, in grey and of any size, as settings say; UsageError where
    nothing is masked."""
    start = _started(picture, mask, settings)
    if start.mask is None or settings.mask_content != "fill":
        return start
    return start._replace(picture=filled(start.picture, start.mask))


def _started(picture: Image.Image, mask: Image.Image | None, settings: Fitting) -> Start:
    size = settings.size
    if settings.outpaint is not None:
        picture, mask = _extended(picture, mask, settings.outpaint)
        if size == rounded_up(picture.size, settings.factor):
            return _on_larger(picture, _mask(mask, settings), size)
    if mask is None:
        return Start(FITS[settings.fit](picture, size), None, None)
    if settings.only_masked:
        return _region(picture, _mask(scaled(mask, picture.size), settings), settings)
    picture, mask = (FITS[settings.fit](image, size) for image in (picture, mask))
    values = _mask(mask, settings)
    return Start(picture, values, Backdrop(picture, values, (0, 0, *size)))


def canvas_size(picture: Sides, outpaint: Box) -> Sides:
    """Width and height of a picture with what is added on each side."""
    left, top, right, bottom = outpaint
    return picture[0] + left + right, picture[1] + top + bottom


def rounded_up(size: Sides, factor: int) -> Sides:
    """The least multiples of a factor that hold a size."""
    width, height = (-(-side // factor) * factor for side in size)
    return width, height


# --- whole pictures ---------------------------------------------------------------------------


def _padded(image: Image.Image, size: Sides) -> Image.Image:
    """All of it in the middle of the frame, its edges drawn out to fill the rest."""
    pairs = [*zip(image.size, size, strict=True)]
    scale = min(side / own for own, side in pairs)
    width, height = (max(1, min(round(own * scale), side)) for own, side in pairs)
    inner = scaled(image, (width, height))
    left, top = ((side - own) // 2 for side, own in zip(size, inner.size, strict=True))
    rest = size[0] - inner.width - left, size[1] - inner.height - top
    return _drawn_out(inner, (left, top, *rest))


FITS: Mapping[str, Callable[[Image.Image, Sides], Image.Image]] = {
    "stretch": scaled,
    "crop": framed,
    "pad": _padded,
}
"""How a picture is fitted to another size: its shape not kept, or cut, or filled up."""


def _drawn_out(image: Image.Image, sides: Box) -> Image.Image:
    """The picture with its edges repeated by so many pixels on each side."""
    left, top, right, bottom = sides
    values = np.asarray(image)
    around = ((top, bottom), (left, right), (0, 0))[: values.ndim]
    return Image.fromarray(np.pad(values, around, mode="edge"))


# --- larger ones ------------------------------------------------------------------------------


def _extended(
    picture: Image.Image, mask: Image.Image | None, sides: Box
) -> tuple[Image.Image, Image.Image]:
    """The picture on a larger canvas, and a mask of what is new on it beside what was masked."""
    inner = Image.new("L", picture.size) if mask is None else scaled(mask, picture.size)
    outer = Image.new("L", canvas_size(picture.size, sides), 255)
    outer.paste(inner, sides[:2])
    return _drawn_out(picture, sides), outer


def _on_larger(picture: Image.Image, mask: NDArray[np.float32], size: Sides) -> Start:
    """What is drawn of a canvas whose sides are no multiples: more, which is cut off again."""
    more = size[0] - picture.width, size[1] - picture.height
    backdrop = Backdrop(picture, mask, (0, 0, *size))
    drawn = np.pad(mask, ((0, more[1]), (0, more[0])), constant_values=1.0)
    return Start(_drawn_out(picture, (0, 0, *more)), drawn, backdrop)


# --- the masked region alone ------------------------------------------------------------------


def _region(picture: Image.Image, mask: NDArray[np.float32], settings: Fitting) -> Start:
    box = region_of(mask, settings.mask_padding, settings.size)
    backdrop = Backdrop(picture, mask, box)
    shades = Image.fromarray((mask * 255).round().astype(np.uint8))
    inner, inner_mask = (scaled(image.crop(box), settings.size) for image in (picture, shades))
    return Start(inner, np.asarray(inner_mask, np.float32) / np.float32(255), backdrop)


def region_of(mask: NDArray[np.float32], padding: int, size: Sides) -> Box:
    """The box of what a mask [H,W] masks, with so many pixels around it, then made longer one way
    until it has the shape of a size, as far as there is room in the picture."""
    height, width = mask.shape
    spans = []
    for axis, whole in ((0, width), (1, height)):
        masked = np.flatnonzero(mask.any(axis))
        spans.append((max(0, masked[0] - padding), min(whole, masked[-1] + 1 + padding)))
    (left, right), (top, bottom) = spans
    ratio = size[0] / size[1]
    left, right = _longer(left, right, round((bottom - top) * ratio), width)
    top, bottom = _longer(top, bottom, round((right - left) / ratio), height)
    return left, top, right, bottom


def _longer(first: int, last: int, length: int, whole: int) -> tuple[int, int]:
    """A span made as long as that around its middle, within a whole; never shorter."""
    length = min(max(length, last - first), whole)
    first = min(max(0, int(first - (length - (last - first)) // 2)), whole - length)
    return first, first + length


# --- masks ------------------------------------------------------------------------------------


def _mask(image: Image.Image, settings: Fitting) -> NDArray[np.float32]:
    """The values of a mask, turned over, grown and softened; UsageError for one of nothing."""
    values = np.asarray(image, np.float32) / np.float32(255)
    values = np.float32(1) - values if settings.mask_invert else values
    values = softened(grown(values, settings.mask_grow), settings.mask_blur)
    if not values.any():
        raise UsageError("the mask is all black", "nothing would be repainted")
    return values


FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radii of the blurs that fill what is masked, from far to near, and how often each is laid on."""


def filled(picture: Image.Image, mask: NDArray[np.float32]) -> Image.Image:
    """A picture with the colours around what is masked drawn into it, as A1111's "fill" does."""
    kept = picture.convert("RGBA")
    kept.putalpha(Image.fromarray(((1 - mask) * 255).round().astype(np.uint8)))
    kept, whole = kept.convert("RGBa"), Image.new("RGBA", picture.size)
    for radius, times in FILLS:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            whole.alpha_composite(layer)
    return whole.convert("RGB")


def grown(mask: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    """A mask [H,W] that reaches so many pixels further every way, or, below 0, less far."""
    if not pixels:
        return mask
    pick = np.maximum if pixels > 0 else np.minimum
    for axis in (0, 1):
        mask = pick.reduce(_windows(mask, abs(pixels), axis), axis=-1)
    return mask


def softened(mask: NDArray[np.float32], deviation: float) -> NDArray[np.float32]:
    """A mask [H,W] with the edges of a Gaussian of that deviation in pixels."""
    reach = int(SOFT * deviation + 0.5)
    if not reach:
        return mask
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        mask = (_windows(mask, reach, axis) @ weights).clip(0, 1)
    return mask


def _windows(mask: NDArray[np.float32], reach: int, axis: int) -> NDArray[np.float32]:
    """What is within reach of each place along an axis, its edges repeated: [H,W,2 reach + 1]."""
    around = [(0, 0), (0, 0)]
    around[axis] = (reach, reach)
    padded = np.pad(mask, around, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis)
