"""Captions in tables: Hugging Face's metadata.jsonl, .csv and .parquet; kohya's JSON among them.

File names in a metadata file are relative to the file itself; it may lie beside the pictures or
above them, and the nearest one goes.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from difftool.data.captions import Caption
from difftool.data.kohya import metadata
from difftool.data.listing import MAX_METADATA, Listing, read_json, read_texts, sound_text
from difftool.data.phrases import count, named
from difftool.errors import InputError, suggestion

COLUMNS = ("text", "caption", "prompt", "additional_feature")
"""Columns of the metadata that captions are looked for in, in this order."""
METADATA = ("metadata.parquet", "metadata.csv", "metadata.jsonl")
"""Of several in one folder the last goes."""
MISNAMED = re.compile(r"metadata\.(json|json1|jsonlines|ndjson|jsonl\.txt|csv\.txt)", re.I)
UNDESERVED = 5
"""How many unused columns are named."""


def captions(listing: Listing) -> dict[str, Caption]:
    """Captions by picture from all metadata files around the pictures."""
    found: dict[str, Caption] = {}
    base = {name: PurePosixPath(name).name.lower() for name in listing.around}
    tables = [name for name in listing.around if base[name] in METADATA]
    tables.sort(key=lambda name: (name.count("/"), METADATA.index(base[name]), name))
    for name in tables:
        found |= _metadata(listing, name)
    folders = Counter(str(PurePosixPath(name).parent) for name in tables)
    for folder in (folder for folder, n in folders.items() if n > 1):
        used = [n for n in tables if str(PurePosixPath(n).parent) == folder][-1]
        listing.note(f"several metadata files in one folder: {used} goes before the others")
    for name in listing.around:
        if metadata.NAMES.fullmatch(base[name]) and (
            entries := metadata.read_entries(listing, name)
        ):
            found |= metadata.captions(listing, entries, name)
    return found


def check_misnamed(listing: Listing, captioned: bool) -> None:
    """Captions that would be overlooked for their file's name: InputError if there are no others
    and captions are looked for."""
    for name in listing.around:
        base = PurePosixPath(name).name
        if not MISNAMED.fullmatch(base) or metadata.read_entries(listing, name):
            continue
        if captioned or listing.config.labels not in ("auto", "text"):
            listing.note(f"{name} is ignored")
            continue
        hint = "call it metadata.jsonl or metadata.csv, or move it away"
        raise InputError(f"{name} is not read, and there are no other captions", hint=hint)


def _metadata(listing: Listing, name: str) -> dict[str, Caption]:
    """Captions from one metadata file; its file names are relative to the file itself."""
    data = listing.data(name, MAX_METADATA)
    suffix = PurePosixPath(name).suffix.lower()
    rows = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[suffix](data, name)
    folder, pictures = PurePosixPath(name).parent, set(listing.pictures)
    column = listing.config.caption_column
    wanted = (column,) if column else COLUMNS
    found: dict[str, Caption] = {}
    absent: list[str] = []
    columns: dict[str, None] = {}
    captioned = read = 0
    for line, entry in rows:
        read += 1
        columns |= dict.fromkeys(entry)
        if not isinstance(entry.get("file_name"), str):
            raise InputError(
                f'{name} line {line} has no "file_name"', hint=suggestion("file_name", entry)
            )
        used = next((c for c in wanted if entry.get(c) is not None), None)
        captioned += used is not None
        texts = read_texts(entry[used], f"{name} line {line}: {used}") if used else ()
        file = entry["file_name"].replace("\\", "/").removeprefix("./")
        picture = (folder / file).as_posix()
        if picture in pictures:
            if texts:
                found[picture] = Caption(texts, PurePosixPath(name).name)
        elif picture not in listing.files.sizes:
            absent.append(file)
    if read and not captioned:
        keys = [key for key in columns if key != "file_name"]
        why = f"its columns are {', '.join(keys) or 'none'}"
        hint = "captions are looked for in: " + ", ".join(wanted)
        raise InputError(f"{name} has no caption", why, hint)
    if absent:
        _absent(listing, name, absent, anything=bool(found))
    unused = [key for key in columns if key != "file_name" and key not in wanted]
    if unused:
        listing.note(f"{name}: columns not used: {named(unused, UNDESERVED)}")
    return found


def _absent(listing: Listing, name: str, absent: Sequence[str], anything: bool) -> None:
    """Entries without a file: an error if they are all that there is."""
    folder = PurePosixPath(name).parent.name
    hint = "file names are relative to the metadata file"
    if folder and absent[0].startswith(f"{folder}/"):
        hint += f': write "{absent[0].removeprefix(f"{folder}/")}"'
    if not anything:
        raise InputError(f"{name} names no picture that is there", f'"{absent[0]}"', hint)
    listing.note(
        f'{name} names {count(len(absent), "picture")} that are not there: "{absent[0]}", ...'
    )


def _jsonl(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(sound_text(data, name).split("\n"), 1):
        if not line.strip():
            continue
        entry = read_json(line, f"{name} line {number}")
        if not isinstance(entry, dict):
            raise InputError(f"{name} line {number} is not a JSON object", line[:60])
        yield number, entry


def _csv(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(sound_text(data, name), newline=""))
    try:
        for entry in reader:
            yield reader.line_num, {k: v or None for k, v in entry.items() if k}
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num} is not CSV", str(error)) from None


def _parquet(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        hint = "pip install pyarrow, or save the table as metadata.jsonl"
        raise InputError(f"cannot read {name}", "pyarrow is not installed", hint) from None
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        line = 0
        for batch in file.iter_batches():
            for entry in batch.to_pylist():
                line += 1
                yield line, entry
    except InputError:
        raise
    except Exception as error:  # pyarrow raises many kinds on malformed data
        raise InputError(f"{name} is not Parquet", str(error).splitlines()[0]) from None
