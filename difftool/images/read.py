"""Pictures that come in, all of them: files are read defensively into 8-bit sRGB.

The decoder is chosen from the content, among a short list; the size is checked before anything is
decoded; of every file that can be opened, colour is brought to plain RGB the way a viewer shows it.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from difftool.errors import DifftoolError, InputError, UsageError, unreadable
from difftool.images.formats import CHUNK, OWN, TEXT
from difftool.storage.read import open_file

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""The decoders in use; others (EPS, PSD, ...) are never run, whatever the file is called."""
ORIENTATION = 0x0112
"""EXIF's tag; from 5 on, width and height are exchanged."""
EXIF_FOLDER, EXIF_USER_COMMENT, EXIF_SOFTWARE = 0x8769, 0x9286, 0x0131
"""EXIF's sub-directory, its tag there for a text of any length, and its tag of what made it."""
EXIF_KEYWORDS = (0x010F, 0x0110)
"""Tags of EXIF's main directory, meant for cameras, in which tools write KEYWORD:TEXT."""
EXIF_PACKED = 0xD1FF
"""A private tag of the sub-directory: keyword, 0, and a text packed with zlib."""
HIDDEN = b"stealth_"
"""How a text begins that is hidden in pixels: then the bands, png or rgb, and info, or comp where
it is packed."""
LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")
MAX_TEXT = 1 << 20
MAX_BYTES = 256 << 20
MAX_PIXELS = 64_000_000
MAX_SIDE = 20_000

# Pillow's doubts about odd metadata are no news to the user; a decompression bomb is an error.
warnings.filterwarnings("ignore", module=r"PIL\b")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class DecodedPicture(NamedTuple):
    """A picture in 8-bit sRGB, and what was done to get there ("alpha over white", ...)."""

    image: Image.Image
    notes: tuple[str, ...]


class ProbedPicture(NamedTuple):
    """What is known of a picture without its pixels."""

    size: tuple[int, int]
    """Width and height, upright."""
    notes: tuple[str, ...]
    own: bool
    """Whether difftool made it, as far as it says."""


# --- reading ---------------------------------------------------------------------------------


def read_picture(
    source: str | Path | bytes | Image.Image, background: str = "white"
) -> DecodedPicture:
    """The picture in a file (or in a file's bytes, or in memory), upright, in RGB, above the
    background colour.

    Raises UsageError if the file is missing, InputError (its `why` is the reason alone) otherwise.
    """
    if isinstance(source, Image.Image):
        with _refusals("the picture"):
            return _to_rgb(_checked(source), background)
    name = "the picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    with _refusals(name), _open(data) as image:
        return _to_rgb(image, background)


def probe(data: bytes, background: str = "white") -> ProbedPicture:
    """What `read_picture` would give, but for the pixels.

    All of the file is read, but a JPEG is decoded at an eighth, at a fraction of the cost.
    """
    with _refusals("the picture"), _open(data) as image:
        size = image.size
        if drafted := image.format == "JPEG":
            image.draft(None, (max(size[0] // 8, 1), max(size[1] // 8, 1)))
            if image.getexif().get(ORIENTATION, 1) >= 5:
                size = size[1], size[0]
        own = _is_own(image)
        picture = _to_rgb(image, background)
        return ProbedPicture(size if drafted else picture.image.size, picture.notes, own)


def is_sheet(path: Path) -> bool:
    """Whether there is a picture of several of difftool's, or a figure, as far as it says."""
    try:
        with _refusals(str(path)), _open(_read_file(path)) as image:
            return _is_sheet(image)
    except DifftoolError:
        return False


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Whatever goes wrong in the block is an InputError."""
    try:
        yield
        return
    except _Refused as error:
        reason = str(error)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"more than {MAX_PIXELS // 10**6} megapixels"
    except Image.UnidentifiedImageError:
        reason = "not a picture in a supported format (" + ", ".join(FORMATS) + ")"
    except UsageError:
        raise
    except Exception as error:  # decoders raise nearly anything on malformed data
        reason = f"cannot be decoded ({error or type(error).__name__})"
    raise InputError(f"cannot read {name}", reason)


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """The same without the notes."""
    return read_picture(source).image


def read_mask(source: str | Path | Image.Image) -> Image.Image:
    """A mask in 8-bit grey, its transparent parts black. Raises as `read_picture` does."""
    return read_picture(source, "black").image.convert("L")


def probed(source: str | Path) -> tuple[str, tuple[int, int]]:
    """A picture's format, and its width and height as they are stored. Raises as `read_picture`
    does."""
    with _refusals(str(source)), _open(_read_file(Path(source))) as image:
        return str(image.format).lower(), image.size


def read_notes(source: str | Path) -> tuple[dict[str, str], str | None]:
    """What a picture's file says beside its pixels: texts by keyword, of a PNG's chunks, a JPEG's
    comment ("comment") and EXIF, and the EXIF user comment where there is one. Nothing is decoded.
    Raises as `read_picture` does."""
    with _refusals(str(source)), _open(_read_file(Path(source))) as image:
        exif = image.getexif()
        texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
        if isinstance(told := image.info.get("comment"), bytes):
            texts["comment"] = _text(told)
        for tag in EXIF_KEYWORDS:  # "prompt:{...}": ComfyUI's way in WebP
            keyword, colon, value = str(exif.get(tag, "")).partition(":")
            if colon:
                texts.setdefault(keyword, value.rstrip("\0"))
        if isinstance(told := exif.get_ifd(EXIF_FOLDER).get(EXIF_PACKED), bytes):
            keyword, _, packed = told.partition(b"\0")
            texts[_text(keyword)] = _text(zlib.decompressobj().decompress(packed, MAX_TEXT))
        comment = _comment(image)
        if max(map(len, [*texts.values(), comment or ""])) > MAX_TEXT:
            raise _Refused(f"a text in it is longer than {MAX_TEXT} characters")
        return texts, comment


def read_hidden(source: str | Path) -> str | None:
    """The text in the lowest bits of a picture's pixels, of alpha or of red, green and blue, column
    by column, as NovelAI and others write it; None if there is none. Raises as `read_picture`
    does."""
    with _refusals(str(source)), _open(_read_file(Path(source))) as image:
        if image.format not in LOSSLESS or image.mode not in ("RGB", "RGBA"):
            return None
        pixels = np.asarray(image).swapaxes(0, 1)
        for bands, kind in ((pixels[..., 3:], b"png"), (pixels[..., :3], b"rgb")):
            data = _Bits(bands.reshape(-1))
            name = data.take(len(HIDDEN) + 7)
            if name not in (HIDDEN + kind + b"info", HIDDEN + kind + b"comp"):
                continue
            length = int.from_bytes(data.take(4), "big") // 8
            if length > MAX_TEXT:
                raise _Refused(f"the text in its pixels is longer than {MAX_TEXT} bytes")
            told = data.take(length)
            if name.endswith(b"comp"):
                told = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(told, MAX_TEXT)
            return told.decode("utf-8", "replace")
    return None


class _Bits:
    """The lowest bits of bytes, as bytes, the highest first."""

    def __init__(self, values: np.ndarray):
        self._values, self._place = values, 0

    def take(self, count: int) -> bytes:
        """The next bytes, or what there is of them."""
        start, self._place = self._place, self._place + 8 * count
        bits = self._values[start : self._place] & 1
        return np.packbits(bits[: len(bits) // 8 * 8]).tobytes()


def _is_own(image: Image.Image) -> bool:
    """Whether a picture says that difftool made it."""
    if CHUNK in image.info or _is_sheet(image):
        return True
    return f"Version: {OWN['Software']}-" in f"{image.info.get(TEXT)} {_comment(image)}"


def _is_sheet(image: Image.Image) -> bool:
    info, name = image.info, OWN["Software"]
    if info.get("comment") == name.encode():
        return True
    return name in (info.get("Software"), image.getexif().get(EXIF_SOFTWARE))


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace").strip("\0")


def _comment(image: Image.Image) -> str | None:
    """The EXIF user comment, whose first eight bytes name its encoding."""
    value = image.getexif().get_ifd(EXIF_FOLDER).get(EXIF_USER_COMMENT)
    if not isinstance(value, bytes):
        return value
    name, rest = value[:8].rstrip(b"\0 ").upper(), value[8:]
    if name == b"JIS":
        return rest.decode("iso2022_jp", "replace")
    if name not in (b"UNICODE", b"ASCII", b""):
        return _text(value)  # no encoding is named
    if name != b"UNICODE" or b"\0" not in rest.rstrip(b"\0"):
        with suppress(UnicodeDecodeError):  # whatever it is called
            return rest.rstrip(b"\0").decode("utf-8")
    # The standard has no byte order; of what is written in Latin letters every other byte is 0.
    little = rest[1::2].count(0) > rest[::2].count(0)
    if rest[:2] in (b"\xff\xfe", b"\xfe\xff"):
        little, rest = rest[:2] == b"\xff\xfe", rest[2:]
    return rest.decode("utf-16-le" if little else "utf-16-be", "replace").rstrip("\0")


class _Refused(Exception):
    """A picture that could perhaps be decoded but must not be."""


def _read_file(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _open(data: bytes) -> Image.Image:
    """The picture with its header read and its size found acceptable, not decoded yet."""
    if not data:
        raise _Refused("0 bytes")
    if len(data) > MAX_BYTES:
        raise _Refused(f"larger than {MAX_BYTES >> 20} MiB")
    return _checked(Image.open(BytesIO(data), formats=FORMATS))


def _checked(image: Image.Image) -> Image.Image:
    """The picture, if its size is acceptable."""
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise _Refused(f"{width}x{height}, sides are limited to {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise _Refused(f"{width}x{height}, more than {MAX_PIXELS // 10**6} megapixels")
    return image


def _to_rgb(image: Image.Image, background: str) -> DecodedPicture:
    notes = []
    if getattr(image, "is_animated", False):
        notes.append("first frame of several")
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        notes.append("turned upright as its EXIF says")
    profile = image.info.get("icc_profile")

    if image.mode.startswith(("I", "F")):
        image = _to_8bit(image)
        notes.append("16 bits scaled to 8")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")

    alpha = image.getchannel("A") if "A" in image.getbands() and image.mode != "LAB" else None
    if alpha is not None:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if profile and (converted := _to_srgb(image, profile)) is not None:
        image = converted
        notes.append("colour profile converted to sRGB")
    elif image.mode == "CMYK":
        notes.append("CMYK without a usable profile")
    elif image.mode == "LAB":
        raise _Refused("LAB colour without a usable profile")
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        below = Image.new("RGB", image.size, colour(background))
        image = Image.composite(image, below, alpha)
        notes.append(f"alpha composited over {background}")
    image.info = {}  # a profile that was applied must not be written out again
    return DecodedPicture(image, tuple(notes))


def colour(text: str) -> tuple[int, int, int]:
    """A colour of a name or #rrggbb; UsageError if it is none."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
        return red, green, blue
    except (ValueError, IndexError):
        raise UsageError(f'there is no colour "{text}"', hint="a name, or #rrggbb") from None


def _to_8bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (which Pillow may hold in 32) as 8 bits, rounded; the shade that stands for
    transparency is made transparent."""
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise _Refused("32 bits a channel; 8 and 16 are supported")
    scaled = (values.astype(np.uint32) * 255 + 32767) // 65535
    grey = Image.fromarray(scaled.astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture taken from its colour profile to sRGB; None where there is nothing to do or the
    profile is unusable, in which case viewers show the numbers as they are too."""
    try:
        from PIL import ImageCms
    except ImportError:
        return None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
