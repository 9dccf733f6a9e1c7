"""Captions in tables: Hugging Face's metadata.jsonl, .csv and .parquet, and kohya's JSON.

File names in a metadata file are relative to the file itself; it may lie beside the pictures or
above them, and the nearest one goes.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from difftool.data.captions import Caption
from difftool.data.dataset import count, named
from difftool.data.listing import MAX_CAPTION, MAX_METADATA, Listing, sound_text, stem
from difftool.errors import InputError, UsageError, suggestion
from difftool.images.read import SUFFIXES
from difftool.storage.strict_json import is_unicode

COLUMNS = ("text", "caption", "prompt", "additional_feature")
"""Columns of the metadata that captions are looked for in, in this order."""
METADATA = ("metadata.parquet", "metadata.csv", "metadata.jsonl")
"""Of several in one folder the last goes."""
MISNAMED = re.compile(r"metadata\.(json|json1|jsonlines|ndjson|jsonl\.txt|csv\.txt)", re.I)
KOHYA = re.compile(r"meta(data)?([_-]\w+)*\.json", re.I)
"""meta_cap.json, meta_clean.json, metadata.json, ..., if that is what they hold."""
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
        if KOHYA.fullmatch(base[name]) and (entries := _kohya_entries(listing, name)):
            found |= kohya(listing, entries, name)
    return found


def check_misnamed(listing: Listing, captioned: bool) -> None:
    """Captions that would be overlooked for their file's name: InputError if there are no others
    and captions are looked for."""
    for name in listing.around:
        base = PurePosixPath(name).name
        if not MISNAMED.fullmatch(base) or _kohya_entries(listing, name):
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
        texts = _texts(entry[used], f"{name} line {line}: {used}") if used else ()
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


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """One caption, or a list of them."""
    texts = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} is not text", json.dumps(value, default=str)[:60])
    size = max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=0)
    if size > MAX_CAPTION or any("\0" in text for text in texts):
        raise InputError(f"{where} is too long or has a NUL character")
    if not all(map(is_unicode, texts)):
        raise InputError(f"{where} is not sound Unicode")
    return tuple(text.strip() for text in texts if text.strip())


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


def read_json(text: str, where: str) -> Any:
    """A JSON value; InputError if it is not sound."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", str(error)) from None


# --- kohya -----------------------------------------------------------------------------------


def _kohya_entries(listing: Listing, name: str) -> dict[str, Mapping[str, Any]]:
    """The entries of kohya's JSON metadata, {path: {"caption": ..., "tags": ...}}; empty where a
    file holds anything else."""
    try:
        return _of_paths(read_json(listing.text(name, MAX_METADATA), name))
    except InputError:
        return {}


def _of_paths(content: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        return {}
    return content if any({"caption", "tags"} & set(v) for v in content.values()) else {}


def kohya_file(listing: Listing, path: Path) -> dict[str, Caption]:
    """Captions from a JSON file that was named by its path; InputError if it holds none."""
    try:
        text = sound_text(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}", error.strerror) from None
    entries = _of_paths(read_json(text, str(path)))
    if not entries:
        why = 'it is not of the form {"a.png": {"caption": ..., "tags": ...}}'
        raise InputError(f"{path} has no captions", why)
    return kohya(listing, entries, path.name)


def kohya(
    listing: Listing, entries: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, Caption]:
    """Captions from kohya's JSON metadata; its keys are paths from wherever it was made, with or
    without a suffix, and are matched by as much of their end as can be found."""
    places: dict[str, list[str]] = {}
    for picture in listing.files.sizes:
        if PurePosixPath(picture).suffix.lower() not in SUFFIXES:
            continue
        for key in (picture, stem(picture)):
            parts = key.split("/")
            for first in range(len(parts)):
                places.setdefault("/".join(parts[first:]), []).append(picture)
    found: dict[str, Caption] = {}
    pictures, absent = set(listing.pictures), []
    for key, entry in entries.items():
        texts = _kohya_texts(entry, f'{name} "{key[:60]}"')
        picture = _match(key, places)
        if picture is None:
            absent.append(key)
        elif picture in pictures and texts:
            found[picture] = Caption(texts, PurePosixPath(name).name)
    if absent:
        if len(absent) == len(entries):
            why = f'"{absent[0]}", the first of {len(absent)}'
            raise InputError(f"{name} names no picture that is there", why)
        listing.note(f"{name} names {count(len(absent), 'picture')} that are not there")
    return found


def _match(key: str, places: Mapping[str, Sequence[str]]) -> str | None:
    """The one picture whose path ends as the key does; None if none or several do."""
    parts = [part for part in key.replace("\\", "/").split("/") if part not in ("", ".")]
    for first in range(len(parts)):
        if found := places.get("/".join(parts[first:])):
            return found[0] if len(found) == 1 else None
    return None


def _kohya_texts(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The caption's lines, each with the tags behind it; the tags alone where there is none."""
    caption, tags = entry.get("caption"), entry.get("tags")
    lines = [line for text in _texts(caption or "", where) for line in _lines(text)]
    behind = ", ".join(t for text in _texts(tags or "", where) for t in _lines(text))
    if not behind:
        return tuple(lines)
    return tuple(f"{line}, {behind}" for line in lines) or (behind,)


def _lines(text: str) -> Iterable[str]:
    return (line.strip() for line in text.splitlines() if line.strip())
