"""Pictures that go out, with what they say of themselves."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image, PngImagePlugin

from difftool.errors import UsageError
from difftool.images.formats import CHUNK, OUTPUT_FORMATS, OWN
from difftool.images.read import EXIF_FOLDER, EXIF_PACKED, EXIF_SOFTWARE, EXIF_USER_COMMENT
from difftool.storage.commit import write_whole


def encode(
    image: Image.Image, format: str, chunks: Mapping[str, str] | None = None, text: str = ""
) -> bytes:
    """The bytes of a picture's file, with the texts by keyword; or where the format has no room
    for these the one text, that it carries, and difftool's own packed, if that fits too, and
    whether it is a sheet.
    UsageError where the text does not."""
    row = OUTPUT_FORMATS[format]
    if row.chunks:
        return encode_png(image, chunks)
    exif = Image.Exif()
    if text:
        comment = b"UNICODE\0" + text.encode("utf-16-be")
        exif.get_ifd(EXIF_FOLDER)[EXIF_USER_COMMENT] = comment
    if chunks and OWN.items() <= chunks.items():
        exif[EXIF_SOFTWARE] = OWN["Software"]
    if chunks and CHUNK in chunks:
        packed = CHUNK.encode() + b"\0" + zlib.compress(chunks[CHUNK].encode(), 9)
        if row.room is None or 2 * len(text) + len(packed) < row.room:
            exif.get_ifd(EXIF_FOLDER)[EXIF_PACKED] = packed
    file = BytesIO()
    try:
        image.save(file, row.pillow, exif=exif, **row.options)
    except ValueError as error:
        hint = "--format png has room for the metadata, --no-metadata leaves it out"
        raise UsageError(f"cannot write a {row.name} picture", str(error), hint) from None
    return file.getvalue()


def encode_png(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file's bytes; text chunks are tEXt where Latin-1 suffices, else iTXt."""
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def write_png(
    image: Image.Image,
    where: str | Path | BinaryIO,
    text: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PNG with text chunks; see `write_whole` for paths."""
    data = encode_png(image, text)
    if isinstance(where, str | Path):
        write_whole(Path(where), data, overwrite)
    else:
        where.write(data)
