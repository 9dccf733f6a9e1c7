"""The pictures of a run gathered, and the grid of them written."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from PIL import Image

from difftool.errors import DifftoolError
from difftool.images.formats import OWN
from difftool.images.tables import drawn
from difftool.sampling.compare.layout import Arrangement, Exhibit, arranged, facts_of, pages
from difftool.sampling.compare.page import Embedded, page
from difftool.sampling.events import Event, Existing, Failure, Note, Result, Sheet
from difftool.sampling.metadata.a1111 import parameters
from difftool.sampling.metadata.chunk import chunk
from difftool.sampling.metadata.files import encode, texts
from difftool.sampling.output import Output

PICTURES = "pictures"
"""Key of a grid's chunk: what each picture's own chunk says beside what all of them do."""


class Gallery:
    """Takes the pictures of a run as they are made, onto the disk, and makes a grid of them."""

    def __init__(self, output: Output, metadata: bool):
        self.output, self.metadata = output, metadata
        self._file = TemporaryFile()
        self._shown: list[Exhibit] = []
        self._chunks: list[dict[str, Any]] = []
        self._reports: list[dict[str, Any]] = []
        self._places: list[tuple[int, int]] = []
        self._text: str | None = None
        self._failed = self._there = 0

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, event: Event) -> None:
        """Put the picture of an event on the grid, if it is one of a picture."""
        self._failed += isinstance(event, Failure)
        self._there += isinstance(event, Existing)
        if not isinstance(event, Result):
            return
        text = parameters(event.sample.values()) if self.metadata else None
        told = chunk(event.sample, self.output.root) if self.metadata else None
        if told and not self.output.page:
            self._text = self._text or text
            self._chunks.append(told)
        self._reports.append(event.sample.report())
        size = event.image.size
        if self.output.page:
            data = encode(event.image, self.output.format, texts(text, told))
        else:
            data = zlib.compress(event.image.tobytes(), 1)
        start = self._file.seek(0, 2)
        self._file.write(data)
        self._places.append((start, len(data)))
        number = len(self._shown)
        self._shown.append(
            Exhibit(facts_of(event.sample), size, lambda: self._opened(number, size))
        )

    def _read(self, number: int) -> bytes:
        start, length = self._places[number]
        self._file.seek(start)
        return self._file.read(length)

    def _opened(self, number: int, size: tuple[int, int]) -> Image.Image:
        return Image.frombytes("RGB", size, zlib.decompress(self._read(number)))

    def written(self) -> Iterator[Event]:
        """Write the grid, page by page."""
        if self._there:
            yield Note(f"{self._there} pictures that were there already are not on the grid")
        if not self._shown:
            return
        arrangement = arranged(self._shown, self._failed)
        if self.output.page:
            yield self._page(arrangement)
            return
        made = pages(arrangement)
        for number, each in enumerate(made, 1):
            try:
                image = drawn(each)
                told = {**OWN, **texts(self._text or None, self._chunk() or None)}
                path = self.output.sheet_path(number)
                data = encode(image, self.output.format, told)
                path = self.output.write(data, path, "grid")
            except DifftoolError as error:
                yield Failure(len(self._shown), error)
                return
            reports = self._numbered() if self.output.only_sheet and number == 1 else ()
            yield Sheet(path, each.pictures, reports)

    def _page(self, arrangement: Arrangement) -> Event:
        """Write the page in which pictures are compared."""
        reads = (partial(self._read, number) for number in range(len(self._places)))
        embedded = [Embedded(*each) for each in zip(reads, self._reports, strict=True)]
        try:
            data = page(arrangement, embedded, self.output.format)
            path = self.output.write(data, self.output.sheet_path(), "grid")
        except DifftoolError as error:
            return Failure(len(self._shown), error)
        return Sheet(path, len(self._shown), self._numbered())

    def _numbered(self) -> list[dict[str, Any]]:
        return [{"index": i} | report for i, report in enumerate(self._reports)]

    def _chunk(self) -> dict[str, Any]:
        """What all the pictures say of themselves."""
        return folded(self._chunks) if self._chunks else {}


def folded(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What mappings have in common, once, with what each has beside it."""
    common = dict(chunks[0])
    for each in chunks[1:]:
        common = _common(common, each)
    return {**common, PICTURES: [_beside(each, common) for each in chunks]}


def unfolded(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mappings again."""
    common = {name: value for name, value in whole.items() if name != PICTURES}
    return [_laid(common, each) for each in whole[PICTURES]]


def _laid(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(common)
    for name, value in own.items():
        both = isinstance(value, Mapping) and isinstance(made.get(name), Mapping)
        made[name] = _laid(made[name], value) if both else value
    return made


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found[name] = _common(mine, theirs)
        elif mine == theirs and type(mine) is type(theirs):
            found[name] = mine
    return {name: found[name] for name in one if name in found}


def _beside(one: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in one.items():
        if name not in common:
            found[name] = value
        elif isinstance(value, Mapping) and (more := _beside(value, common[name])):
            found[name] = more
    return found
