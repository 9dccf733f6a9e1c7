"""Tables of pictures: rows and columns with headings, several beside and below each other on a
page, captions where they say more. Text is in proportion to the pictures. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image, ImageDraw

from difftool.images.fit import zoom_of
from difftool.images.lettering import face, wrapped
from difftool.images.theme import CAPTION, INK, MUTED, PAPER, RULE

TEXT = (13, 44)
"""The smallest and the largest text, in pixels; within, a share of the pictures."""
SHARE = 15
CAPTION_LINES, TITLE_LINES = 2, 4


class TableCell(NamedTuple):
    """A picture, opened when it is drawn, and words below it."""

    picture: Callable[[], Image.Image]
    size: tuple[int, int]
    caption: str = ""
    """Its lines are wrapped each."""


class PictureTable(NamedTuple):
    """Pictures in rows, with what each column and each row has in common; "" = nothing."""

    cells: Sequence[Sequence[TableCell | None]]
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Tables in rows, below a title."""

    tables: Sequence[Sequence[PictureTable]]
    title: str = ""
    about: str = ""
    """A line below it."""
    columns: str = ""
    """What the columns of the tables differ in."""
    rows: str = ""
    """What their rows differ in."""

    @property
    def pictures(self) -> int:
        """How many there are on it."""
        tables = (table for row in self.tables for table in row)
        return sum(cell is not None for t in tables for line in t.cells for cell in line)


@dataclass
class _Measures:
    """The measures of a page, in pixels."""

    page: Page
    cell: tuple[int, int] = (0, 0)
    text: int = 0
    small: int = 0
    gap: int = 0
    margin: int = 0
    captions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        tables = [table for row in self.page.tables for table in row]
        cells = [cell for table in tables for row in table.cells for cell in row if cell]
        sizes = [tuple(side * zoom_of(cell.size) for side in cell.size) for cell in cells]
        self.cell = max(s[0] for s in sizes), max(s[1] for s in sizes)
        self.text = max(TEXT[0], min(TEXT[1], round(sum(self.cell) / 2 / SHARE)))
        self.small = max(TEXT[0] - 1, round(self.text * 0.85))
        self.gap, self.margin = max(6, round(self.text * 0.55)), round(self.text * 1.7)
        lines = max(len(self.caption(cell)) for cell in cells)
        self.below = round(lines * self.small * 1.3 + (self.small * 0.4 if lines else 0))
        self.left = self._left(tables)
        self.above = (
            round(self.text * (1.3 * self._heads(tables) + 0.45)) if self._heads(tables) else 0
        )
        if self.page.columns and self.above:
            self.above += round(self.small * 1.4)
        self.titled = round(self.text * 2) if any(table.title for table in tables) else 0

    def caption(self, cell: TableCell) -> list[str]:
        small = face(self.small)
        parts = cell.caption.split("\n")
        return [ln for part in parts for ln in wrapped(part, self.cell[0], CAPTION_LINES, small)]

    def column(self, text: str) -> list[str]:
        return wrapped(text, self.cell[0], 3, face(self.text))

    def row(self, text: str) -> list[str]:
        most = max(1, int(self.cell[1] / (self.text * 1.3)))
        return wrapped(text, self.text * 11, min(8, most), face(self.text))

    def _heads(self, tables: Sequence[PictureTable]) -> int:
        return max((len(self.column(text)) for t in tables for text in t.columns), default=0)

    def _left(self, tables: Sequence[PictureTable]) -> int:
        """Width of the headings of rows."""
        lines = [line for t in tables for text in t.rows for line in self.row(text)]
        if not lines:
            return 0
        wide = max(face(self.text).length(line) for line in lines)
        return round(max(wide, face(self.small).length(self.page.rows)) + self.text)

    def table(self, table: PictureTable) -> tuple[int, int]:
        """Width and height of a table."""
        columns = max(map(len, table.cells))
        width = self.left + columns * (self.cell[0] + self.gap) - self.gap
        each = self.cell[1] + self.below + self.gap
        return width, self.titled + self.above + len(table.cells) * each - self.gap


def page_size(page: Page) -> tuple[int, int]:
    """Width and height of a page in pixels, without its title."""
    measures = _Measures(page)
    width, height, _ = _extent(measures)
    return width, height


def _extent(m: _Measures) -> tuple[int, int, int]:
    """Width, height without the title, and the gap between tables."""
    between = round(m.text * 2)
    rows = [[m.table(table) for table in row] for row in m.page.tables]
    width = max(sum(w for w, _ in row) + between * (len(row) - 1) for row in rows)
    height = sum(max(h for _, h in row) for row in rows) + between * (len(rows) - 1)
    return width + 2 * m.margin, height + 2 * m.margin, between


def drawn(page: Page) -> Image.Image:
    """The page."""
    m = _Measures(page)
    width, height, between = _extent(m)
    width = max(width, round(m.text * 18))
    inner = width - 2 * m.margin
    large, small = face(round(m.text * 1.45), bold=True), face(m.small)
    title = wrapped(page.title, inner, TITLE_LINES, large)
    about = wrapped(page.about, inner, 3, small)
    head = round(len(title) * m.text * 1.85 + len(about) * m.small * 1.4)
    head += round(m.text * 0.9) if head else 0
    picture = Image.new("RGB", (width, height + head), PAPER)
    y = m.margin
    for line in title:
        large.write(picture, (m.margin, y + m.text * 1.3), line, INK)
        y += round(m.text * 1.85)
    for line in about:
        small.write(picture, (m.margin, y + m.small), line, MUTED)
        y += round(m.small * 1.4)
    y = m.margin + head
    for row in page.tables:
        x = m.margin
        for table in row:
            _draw_table(picture, m, table, (x, y))
            x += m.table(table)[0] + between
        y += max(m.table(table)[1] for table in row) + between
    return picture


def _draw_table(
    picture: Image.Image, m: _Measures, table: PictureTable, at: tuple[int, int]
) -> None:
    text, small = face(m.text), face(m.small)
    x, y = at
    if table.title:
        bold = face(m.text, bold=True)
        width = m.table(table)[0]
        (line,) = wrapped(table.title, width, 1, bold) or [""]
        bold.write(picture, (x, y + m.text), line, INK)
    y += m.titled
    left, step = x + m.left, (m.cell[0] + m.gap, m.cell[1] + m.below + m.gap)
    if m.above and m.page.columns:
        small.write(picture, (left, y + m.small), m.page.columns, MUTED)
    if m.left and m.page.rows:
        base = y + m.above - round(m.text * 0.45) if m.above else y - m.gap
        small.write(picture, (x, base), m.page.rows, MUTED)
    for number, heading in enumerate(table.columns):
        lines = m.column(heading)
        base = y + m.above - round(m.text * 0.45)
        middle = left + number * step[0] + m.cell[0] / 2
        for i, line in enumerate(reversed(lines)):
            text.write(picture, (middle, base - i * m.text * 1.3), line, INK, middle=True)
    y += m.above
    for number, cells in enumerate(table.cells):
        top = y + number * step[1]
        if number < len(table.rows):
            lines = m.row(table.rows[number])
            first = top + m.cell[1] / 2 - (len(lines) - 1) * m.text * 0.65 + m.text * 0.35
            for i, line in enumerate(lines):
                text.write(picture, (x, first + i * m.text * 1.3), line, INK)
        for column, cell in enumerate(cells):
            _draw_cell(picture, m, cell, (left + column * step[0], top))


def _draw_cell(
    picture: Image.Image, m: _Measures, cell: TableCell | None, at: tuple[int, int]
) -> None:
    draw, (x, y) = ImageDraw.Draw(picture), at
    if cell is None:
        return
    zoom = zoom_of(cell.size)
    size = cell.size[0] * zoom, cell.size[1] * zoom
    left, top = x + (m.cell[0] - size[0]) // 2, y + (m.cell[1] - size[1]) // 2
    made = cell.picture()
    picture.paste(made.resize(size, Image.Resampling.NEAREST) if zoom > 1 else made, (left, top))
    draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=RULE)
    for i, line in enumerate(m.caption(cell)):
        base = y + m.cell[1] + m.small * 1.35 + i * m.small * 1.3
        face(m.small).write(picture, (x + m.cell[0] / 2, base), line, CAPTION, middle=True)
