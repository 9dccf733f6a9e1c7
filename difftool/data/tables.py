"""Captions in tables: Hugging Face's metadata.jsonl, .csv, .tsv, .parquet; kohya's JSON among them.

File names in a metadata file are relative to the file itself; it may lie beside the pictures or
above them, and the nearest one goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import PurePosixPath

from difftool.data.captions import Caption, add
from difftool.data.kohya import metadata
from difftool.data.listing import Listing, read_texts
from difftool.data.phrases import count, named
from difftool.data.rows import Table
from difftool.errors import InputError, suggestion

COLUMNS = ("text", "caption", "prompt", "additional_feature")
"""Columns of the metadata that captions are looked for in, in this order."""
METADATA = ("metadata.parquet", "metadata.tsv", "metadata.csv", "metadata.jsonl")
"""Of several in one folder the last goes."""
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
        listing.seen.add(name)
    folders = Counter(str(PurePosixPath(name).parent) for name in tables)
    for folder in (folder for folder, n in folders.items() if n > 1):
        used = [n for n in tables if str(PurePosixPath(n).parent) == folder][-1]
        listing.note(f"several metadata files in one folder: {used} goes before the others")
    for name in listing.around:
        if metadata.NAMES.fullmatch(base[name]) and (
            entries := metadata.read_entries(listing, name)
        ):
            found |= metadata.captions(listing, entries, name)
            listing.seen.add(name)
    return found


def _metadata(listing: Listing, name: str) -> dict[str, Caption]:
    """Captions from one metadata file; its file names are relative to the file itself."""
    folder, pictures = PurePosixPath(name).parent, set(listing.pictures)
    column = listing.config.caption_column
    wanted = (column,) if column else COLUMNS

    @cache  # as it is asked for several times a row
    def place(file: str) -> str:
        return (folder / file.replace("\\", "/").removeprefix("./")).as_posix()

    data = listing.table(name)
    table = Table(data, name, wanted, lambda file: place(file) in listing.files.sizes)
    found: dict[str, Caption] = {}
    absent: list[str] = []
    columns: dict[str, None] = {}
    rows: Counter[str] = Counter()
    captioned = 0
    for line, entry in table.rows():
        columns |= dict.fromkeys(entry)
        file = entry.get("file_name")
        if not isinstance(file, str):
            raise InputError(
                f'{name} line {line} has no "file_name"', hint=suggestion("file_name", entry)
            )
        used = next((c for c in wanted if entry.get(c) is not None), None)
        captioned += used is not None
        texts = read_texts(entry[used], f"{name} line {line}: {used}") if used else ()
        picture = place(file if place(file) in pictures else file.strip())
        rows[picture] += 1
        if picture in pictures:
            add(found, picture, Caption(texts, PurePosixPath(name).name))
        elif picture not in listing.files.sizes:
            absent.append(file)
    for note in table.notes:
        listing.note(note)
    if not rows:
        listing.note(f"{name} has no rows")
    elif not captioned:
        keys = [key for key in columns if key != "file_name"]
        why = f"its columns are {', '.join(keys) or 'none'}"
        hint = "captions are looked for in: " + ", ".join(wanted)
        raise InputError(f"{name} has no caption", why, hint)
    if absent:
        _absent(listing, name, absent, anything=bool(found))
    if again := [picture for picture in found if rows[picture] > 1]:
        where = f"{count(len(again), 'picture')} in several rows ({named(again)})"
        listing.note(f"{name} has {where}: all of their captions are used")
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
