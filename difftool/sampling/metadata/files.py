"""Pictures with what they say about themselves. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.errors import InputError, check_file
from difftool.images import write
from difftool.images.formats import CHUNK, TEXT
from difftool.images.read import read_notes
from difftool.sampling.metadata.a1111 import from_parameters
from difftool.sampling.metadata.chunk import from_chunk
from difftool.sampling.requests import Request
from difftool.storage.strict_json import to_json

if TYPE_CHECKING:
    from PIL.Image import Image


def texts(text: str | None, values: Mapping[str, Any] | None) -> dict[str, str]:
    """The text chunks of a picture, by keyword."""
    chunks = {} if text is None else {TEXT: text}
    return chunks | ({CHUNK: to_json(values)} if values else {})


def encode(image: Image, format: str, chunks: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a picture's file with these text chunks; a format that has none has A1111's
    text."""
    chunks = chunks or {}
    return write.encode(image, format, chunks, chunks.get(TEXT, ""))


def read(path: Path) -> Request:
    """The request that makes a picture again, from its `difftool` chunk or its A1111 text.

    UsageError if there is no such file, InputError if it is no picture or says nothing.
    """
    check_file("picture", path)
    info, comment = read_notes(path)
    if isinstance(values := info.get(CHUNK), str):
        return from_chunk(values, str(path))
    text = info.get(TEXT) if comment is None else comment
    if isinstance(text, str):
        return from_parameters(text, str(path))
    raise InputError(f"{path} does not say how it was made", hint="it was saved without metadata")
