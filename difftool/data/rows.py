"""Rows of tables, each with its line: JSON lines, CSV, TSV, Parquet. Torch-free.

What a table clearly means is read, and said; what it may mean in two ways is refused by its line.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from difftool.data.listing import read_json, sound_text
from difftool.data.phrases import count
from difftool.errors import InputError, first_line

SEPARATORS = ";\t|"
"""What stands between columns where no comma does: Europe's spreadsheets write semicolons."""

TableRow = tuple[int, dict[str, Any]]
"""A line, the first is 1, and its values by column."""


@dataclass
class Table:
    """A file of rows; `notes` is what had to be made of it."""

    data: bytes
    name: str
    wanted: Sequence[str]
    """The columns that text is looked for in."""
    is_picture: Callable[[str], bool]
    """Whether a text is the file name of a picture that is there."""
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[TableRow]:
        """The rows; InputError names a line that is not sound."""
        ending = self.name.lower().rpartition(".")[2]
        return {"jsonl": self._jsonl, "parquet": self._parquet}.get(ending, self._csv)()

    def _jsonl(self) -> Iterator[TableRow]:
        for number, line in enumerate(sound_text(self.data, self.name).split("\n"), 1):
            if not line.strip():
                continue
            entry = read_json(line, f"{self.name} line {number}")
            if not isinstance(entry, dict):
                raise InputError(f"{self.name} line {number} is not a JSON object", line[:60])
            yield number, entry

    def _parquet(self) -> Iterator[TableRow]:
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            hint = "pip install pyarrow, or save the table as metadata.jsonl"
            raise InputError(f"cannot read {self.name}", "pyarrow is not installed", hint) from None
        try:
            file = parquet.ParquetFile(io.BytesIO(self.data))
            line = 0
            for batch in file.iter_batches():
                for entry in batch.to_pylist():
                    line += 1
                    yield line, entry
        except InputError:
            raise
        except Exception as error:  # pyarrow raises many kinds on malformed data
            raise InputError(f"{self.name} is not Parquet", first_line(error)) from None

    # --- CSV ---------------------------------------------------------------------------------

    def _csv(self) -> Iterator[TableRow]:
        text = sound_text(self.data, self.name)
        separator = self._separator(text)
        # Quotes after a space are none to CSV; where there are any, the space means nothing.
        spaced = re.search(re.escape(separator) + ' +"', text) is not None
        rows = self._lines(text, separator, spaced)
        columns = [column.strip() for column in next(rows, (1, []))[1]]
        if any(map(self.is_picture, columns)):
            hint = 'let the first line be "file_name,text"'
            raise InputError(f"{self.name} has no header", f"{separator.join(columns)}"[:60], hint)
        for column in columns:
            if column and columns.count(column) > 1:
                raise InputError(f'{self.name} has the column "{column}" twice')
        joined = 0
        for line, values in rows:
            while len(values) > len(columns) and not values[-1].strip():
                values.pop()
            if len(values) > len(columns):
                values = self._joined(columns, values, line, separator + " " * spaced)
                joined += 1
            if any(value.strip() for value in values):
                found = dict(zip(columns, values, strict=False))
                yield line, {column: found.get(column) or None for column in columns if column}
        if joined:
            kept = f'"{separator}" and no quotes: read as part of the text'
            self.notes.append(f"{self.name}: {count(joined, 'row')} with {kept}")

    def _separator(self, text: str) -> str:
        if self.name.lower().endswith(".tsv"):
            return "\t"
        header = text.lstrip().partition("\n")[0]
        found = next((s for s in SEPARATORS if s in header and "," not in header), ",")
        if found != ",":
            self.notes.append(
                f'{self.name}: columns are separated by "{found}"'.replace("\t", "tab")
            )
        return found

    def _lines(self, text: str, separator: str, spaced: bool) -> Iterator[tuple[int, list[str]]]:
        """The values of each row that has any, and the line that it begins in."""
        file = io.StringIO(text, newline="")
        reader = csv.reader(file, delimiter=separator, strict=True, skipinitialspace=spaced)
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = 'a text with quotes is written "a ""fine"" fox"'
                raise InputError(f"{self.name} line {line} is not CSV", str(error), hint) from None
            for value in values:
                for swallowed in value.splitlines()[1:]:
                    if any(self.is_picture(each.strip()) for each in swallowed.split(separator)):
                        what = f"{self.name} line {line}: a quote takes in the rows below"
                        hint = "close the quote, or take it out"
                        raise InputError(what, f'"{swallowed[:60]}"', hint)
            if values:
                yield line, values

    def _joined(
        self, columns: Sequence[str], values: Sequence[str], line: int, separator: str
    ) -> list[str]:
        """Values of a row that has more than there are columns: the text, where it is the last,
        has separators in it."""
        text = next((column for column in self.wanted if column in columns), None)
        last = len(columns) - 1
        if text != columns[last] or not any(map(self.is_picture, values[:last])):
            what = f"{self.name} line {line} has {len(values)} values in {len(columns)} columns"
            hint = f'put a text with "{separator.strip() or "tabs"}" in it between quotes'
            raise InputError(what, separator.join(values)[:60], hint)
        return [*values[:last], separator.join(values[last:])]
