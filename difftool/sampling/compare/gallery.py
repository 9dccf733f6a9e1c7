"""The pictures of a run gathered, and the grid of them written."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from PIL import Image

from difftool.errors import DifftoolError
from difftool.images.fonts import VARIABLE
from difftool.images.formats import OWN
from difftool.images.lettering import without_font
from difftool.images.read import read_picture
from difftool.images.tables import drawn
from difftool.sampling.compare.layout import Arrangement, Exhibit, arranged, facts_of, pages
from difftool.sampling.compare.page import Embedded, page
from difftool.sampling.events import Event, Existing, Failure, Finishing, Note, Result, Sheet
from difftool.sampling.metadata.a1111 import parameters
from difftool.sampling.metadata.chunk import chunk
from difftool.sampling.metadata.files import encode, texts
from difftool.sampling.metadata.grids import folded
from difftool.sampling.output import Output
from difftool.sampling.sample import Sample

ONE_PAGE = 1 << 30
"""A side that no grid has."""
SAID = 20
"""Characters without a font that are said."""


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
        self._failed = 0

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, event: Event) -> None:
        """Put the picture of an event on the grid, if it is one of a picture."""
        self._failed += isinstance(event, Failure)
        if isinstance(event, Result):
            # Of what a file has that may be lossy, as of a picture that was there already.
            kept = event.path if self.output.skip_existing else None
            self._add(event.sample, read_picture(kept).image if kept else event.image)
        elif isinstance(event, Existing) and event.path:
            self._add(event.sample, read_picture(event.path).image)

    def _add(self, sample: Sample, image: Image.Image) -> None:
        text = parameters(sample.values()) if self.metadata else None
        told = chunk(sample, self.output.root) if self.metadata else None
        if told and not self.output.page:
            self._text = self._text or text
            self._chunks.append(told)
        self._reports.append(sample.report())
        size = image.size
        if self.output.page:
            data = encode(image, self.output.format, texts(text, told))
        else:
            data = zlib.compress(image.tobytes(), 1)
        start = self._file.seek(0, 2)
        self._file.write(data)
        self._places.append((start, len(data)))
        number = len(self._shown)
        self._shown.append(Exhibit(facts_of(sample), size, lambda: self._opened(number, size)))

    def _read(self, number: int) -> bytes:
        start, length = self._places[number]
        self._file.seek(start)
        return self._file.read(length)

    def _opened(self, number: int, size: tuple[int, int]) -> Image.Image:
        return Image.frombytes("RGB", size, zlib.decompress(self._read(number)))

    def written(self) -> Iterator[Event]:
        """Write the grid, page by page."""
        if not self._shown:
            return
        what = "a page" if self.output.page else "a grid"
        yield Finishing(f"drawing {what} of {len(self._shown)} pictures")
        arrangement = arranged(self._shown, self._failed)
        if self.output.page:
            yield self._page(arrangement)
            return
        if lacking := without_font(t for shown in self._shown for t in shown.facts.values()):
            hint = f"{VARIABLE}=FILE names a font that has them"
            few = lacking if len(lacking) <= SAID else f"{lacking[:SAID]} and others"
            yield Note(f"no font here has {few}: a grid shows their names or numbers; {hint}")
        made = pages(arrangement, ONE_PAGE if self.output.stdout else None)
        for number, each in enumerate(made, 1):
            try:
                image = drawn(each)
                told = {**OWN, **texts(self._text or None, self._chunk() or None)}
                data = encode(image, self.output.format, told)
                path, existing = self.output.write_sheet(data, number)
            except DifftoolError as error:
                yield Failure(len(self._shown), error)
                return
            reports = self._numbered() if self.output.only_sheet and number == 1 else ()
            yield Sheet(path, each.pictures, reports, existing)

    def _page(self, arrangement: Arrangement) -> Event:
        """Write the page in which pictures are compared."""
        reads = (partial(self._read, number) for number in range(len(self._places)))
        embedded = [Embedded(*each) for each in zip(reads, self._reports, strict=True)]
        try:
            data = page(arrangement, embedded, self.output.format)
            path, _ = self.output.write_sheet(data)
        except DifftoolError as error:
            return Failure(len(self._shown), error)
        return Sheet(path, len(self._shown), self._numbered())

    def _numbered(self) -> list[dict[str, Any]]:
        return [{"index": i} | report for i, report in enumerate(self._reports)]

    def _chunk(self) -> dict[str, Any]:
        """What all the pictures say of themselves."""
        return folded(self._chunks) if self._chunks else {}
