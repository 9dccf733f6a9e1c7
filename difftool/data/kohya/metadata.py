"""JSON metadata: {"a.png": {"caption": ..., "tags": ...}}. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from difftool.data.captions import Caption, add
from difftool.data.listing import MAX_METADATA, Listing, read_texts, sound_text, stem
from difftool.data.phrases import count, named
from difftool.errors import InputError, missing
from difftool.images.formats import SUFFIXES
from difftool.storage.read import read_bytes

NAMES = re.compile(r"meta(data)?([_-]\w+)*\.json", re.I)
"""meta_cap.json, meta_clean.json, metadata.json, ..., if that is what they hold."""


def read_entries(listing: Listing, name: str) -> dict[str, Mapping[str, Any]]:
    """The entries of kohya's JSON metadata, {path: {"caption": ..., "tags": ...}}; empty where a
    file holds anything else."""
    try:
        return _of_paths(listing.json(listing.text(name, MAX_METADATA), name))
    except InputError:
        return {}


def _of_paths(content: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        return {}
    return content if any({"caption", "tags"} & set(v) for v in content.values()) else {}


def read_file(listing: Listing, path: Path) -> dict[str, Caption]:
    """Captions from a JSON file that was named by its path; InputError if it holds none."""
    if not path.exists():
        raise missing(path)
    text = sound_text(read_bytes(path, MAX_METADATA), str(path))
    entries = _of_paths(listing.json(text, str(path)))
    if not entries:
        why = 'it is not of the form {"a.png": {"caption": ..., "tags": ...}}'
        raise InputError(f"{path} has no captions", why)
    return captions(listing, entries, path.name)


def captions(
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
    several: dict[str, list[str]] = {}
    pictures, absent = set(listing.pictures), []
    for key, entry in entries.items():
        texts = _entry_texts(entry, f'{name} "{key[:60]}"')
        picture = _match(key, places)
        if picture is None:
            absent.append(key)
        elif picture in pictures:
            several.setdefault(picture, []).append(key)
            add(found, picture, Caption(texts, PurePosixPath(name).name))
    if again := [picture for picture, keys in several.items() if len(keys) > 1]:
        where = f"{count(len(again), 'picture')} under several keys ({named(again)})"
        listing.note(f"{name} has {where}: all of their captions are used")
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


def _entry_texts(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The caption's lines, each with the tags behind it; the tags alone where there is none."""
    caption, tags = entry.get("caption"), entry.get("tags")
    lines = [line for text in read_texts(caption or "", where) for line in _lines(text)]
    behind = ", ".join(t for text in read_texts(tags or "", where) for t in _lines(text))
    if not behind:
        return tuple(lines)
    return tuple(f"{line}, {behind}" for line in lines) or (behind,)


def _lines(text: str) -> Iterable[str]:
    return (line.strip() for line in text.splitlines() if line.strip())
