"""Pictures with what they say about themselves. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.errors import InputError, check_file
from difftool.images import write
from difftool.images.formats import CHUNK, TEXT
from difftool.images.read import read_hidden, read_notes
from difftool.sampling.expand import final
from difftool.sampling.metadata.a1111 import from_parameters
from difftool.sampling.metadata.chunk import each_chunk, from_chunk
from difftool.sampling.metadata.comfy import from_graph
from difftool.sampling.metadata.others import (
    from_dream,
    from_fooocus,
    from_invoke,
    from_novelai,
    from_swarm,
    object_in,
)
from difftool.sampling.requests import Request
from difftool.storage.strict_json import to_json

if TYPE_CHECKING:
    from PIL.Image import Image

COMMENT = "EXIF comment"
Notes = Mapping[str, str]
Reader = Callable[[str, str, Notes], Request | None]


def texts(text: str | None, values: Mapping[str, Any] | None) -> dict[str, str]:
    """The text chunks of a picture, by keyword."""
    chunks = {} if text is None else {TEXT: text}
    return chunks | ({CHUNK: to_json(values)} if values else {})


def encode(image: Image, format: str, chunks: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a picture's file with these text chunks; a format that has none has A1111's
    text for all to read, and the chunk packed."""
    chunks = chunks or {}
    return write.encode(image, format, chunks, chunks.get(TEXT, ""))


def read(path: Path) -> Request:
    """The request that makes a picture again, from its `difftool` chunk or what other tools write.

    UsageError if there is no such file, InputError if it is no picture or says nothing.
    """
    request, _ = told_by(path)
    if request is None:
        hint = "it was saved without metadata"
        raise InputError(f"{path} does not say how it was made", hint=hint)
    return request


def told_by(path: Path) -> tuple[Request | None, dict[str, str]]:
    """That request, None where there is none, and the texts of a picture's file by keyword.

    Raises as `read` does.
    """
    check_file("picture", path)
    notes, comment = read_notes(path)
    texts = notes if comment is None else {**notes, COMMENT: comment}
    if (request := _first(texts, str(path))) is None and (hidden := read_hidden(path)):
        texts |= _unfolded(hidden, str(path))
        request = _first(texts, str(path))
    return None if request is None else final(request), texts


def _first(texts: Notes, source: str) -> Request | None:
    """What the surest of a picture's texts says."""
    for keywords, reader in DIALECTS:
        for keyword in keywords:
            text = texts.get(keyword)
            if text and (request := _read(reader, text, source, texts)) is not None:
                return request
    return None


def _unfolded(text: str, source: str) -> dict[str, str]:
    """The texts in one that is hidden in a picture's pixels: NovelAI's by keyword, or A1111's."""
    if not text.lstrip().startswith("{"):
        return {TEXT: text}
    values = object_in(text, source)
    return {str(key): v if isinstance(v, str) else to_json(v) for key, v in values.items()}


def read_all(path: Path) -> list[Request]:
    """The requests that make the pictures of a grid again, or the one of a picture; see `read`."""
    check_file("picture", path)
    chunks = each_chunk(read_notes(path)[0].get(CHUNK) or "")
    if len(chunks) == 1:
        return [read(path)]
    return [final(from_chunk(each, str(path))) for each in chunks]


def _read(reader: Reader, text: str, source: str, notes: Notes) -> Request | None:
    """What a reader makes of a text, which may hold anything."""
    try:
        return reader(text, source, notes)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"what {source} says of itself cannot be read", repr(error)) from None


def _text(text: str, source: str, notes: Notes) -> Request | None:
    """A1111's text, or the JSON that others write in its place."""
    if not text.lstrip().startswith("{"):
        return from_parameters(text, source)
    values = object_in(text, source)
    if isinstance(swarm := values.get("sui_image_params"), dict):
        return from_swarm(swarm, source)
    if isinstance(graph := values.get("prompt"), dict):
        return from_graph(to_json(graph), source)
    return from_fooocus(values, source)


def _remark(text: str, source: str, notes: Notes) -> Request | None:
    """The same in a comment, which may well be about something else."""
    return _text(text, source, notes) if re.search(r"\bSteps:|^\s*\{", text) else None


def _novelai(text: str, source: str, notes: Notes) -> Request | None:
    if "NovelAI" not in notes.get("Software", ""):
        return None
    return from_novelai(text, source, notes.get("Description", ""), notes.get("Source", ""))


DIALECTS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    ((CHUNK,), lambda text, source, _: from_chunk(text, source)),
    (("invokeai_metadata", "sd-metadata"), lambda text, source, _: from_invoke(text, source)),
    (("Dream",), lambda text, source, _: from_dream(text, source)),
    (("Comment",), _novelai),
    ((COMMENT,), _remark),
    ((TEXT,), _text),
    (("prompt",), lambda text, source, _: from_graph(text, source)),
    (("comment",), _remark),
)
"""Where a picture may say how it was made, the surest first, and what reads it."""
