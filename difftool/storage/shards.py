"""Models in several files: safetensors shards and the index that the field has for them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from difftool.errors import InputError, UsageError
from difftool.storage.commit import hidden_folder, move_files, refuse_existing, write_whole
from difftool.storage.safetensors import write_pieces
from difftool.storage.strict_json import read_json
from difftool.storage.tensors import Piece, byte_size

MAX_SHARD_SIZE = "5GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB; UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMG]I?)?B?", str(text).strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if not size:
        raise UsageError(f"{text!r} is not a size", hint="write it as 5GB, 500MB or 2GiB")
    return size


def index_of(path: Path) -> Path:
    """The index of the shards that stand for a file."""
    return path.parent / f"{path.name}.index.json"  # a folder may have no name: / and .


def split(pieces: Mapping[str, Piece], limit: int) -> list[dict[str, Piece]]:
    """Tensors in groups of at most `limit` bytes each, or of one tensor that is larger."""
    groups: list[dict[str, Piece]] = [{}]
    filled = 0
    for name, piece in pieces.items():
        size = byte_size(piece.dtype, piece.shape)
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = piece
        filled += size
    return groups


def write_shards(
    path: Path,
    pieces: Mapping[str, Piece],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    limit: int | None = None,
) -> dict[str, str]:
    """Write tensors as a safetensors file or, beyond a limit in bytes (None: 5 GB), as shards with
    their index; SHA-256 of each tensor, by name.

    All files appear when each of them is whole, the index last; or none does. UsageError if one of
    them exists and is not to be replaced.
    """
    limit = parse_size(MAX_SHARD_SIZE) if limit is None else limit
    with atomic_set(path, overwrite) as place:
        return write_set(place, pieces, metadata, limit)


@contextmanager
def atomic_set(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden place for what `write_set` writes, from where it all moves to `path` when the block
    ends well, the index last; or nothing does. Errors as of `write_shards`."""
    for file in (path, index_of(path)):
        refuse_existing(file, overwrite)
    if path.is_dir():
        raise UsageError(f"{path} cannot be replaced", "it is a folder, and a file is to be there")
    with hidden_folder(path) as place:
        yield place / path.name
        _move_set(place, path, overwrite)


def write_set(
    path: Path,
    pieces: Mapping[str, Piece],
    metadata: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> dict[str, str]:
    """The same into a folder where nobody looks yet, file by file; None: no limit."""
    groups = [dict(pieces)] if limit is None else split(pieces, limit)
    if len(groups) == 1:
        return write_pieces(path, pieces, metadata)
    many = f"{len(groups):05}"
    names = [f"{path.stem}-{k:05}-of-{many}{path.suffix}" for k in range(1, len(groups) + 1)]
    hashes: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        hashes |= write_pieces(path.with_name(name), group, metadata)
    places = {n: name for name, group in zip(names, groups, strict=True) for n in group}
    size = sum(byte_size(piece.dtype, piece.shape) for piece in pieces.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(index_of(path), text.encode())
    return hashes


def _move_set(place: Path, path: Path, overwrite: bool) -> None:
    index = index_of(path)
    names = sorted(file.name for file in place.iterdir() if file.name != index.name)
    for name in (*names, path.name, index.name):
        refuse_existing(path.with_name(name), overwrite)
    names += [index.name] if (place / index.name).is_file() else []
    move_files(place, names, _former(path, index) if overwrite else [])


def written_at(path: Path) -> Path | None:
    """What is read where a file was asked for: that, or the index of its shards, if one is there;
    for one of the shards their index."""
    whole = re.sub(r"-\d{5}-of-\d{5}(?=\.\w+$)", "", path.name)
    for file in (index_of(path), index_of(path.parent / whole)):
        if file.is_file() and (whole != path.name or not path.exists()):
            return file
    return path if path.exists() else None


def _former(path: Path, index: Path) -> list[Path]:
    """The files that a new set stands for: of one without its index, nothing can be read."""
    files = [path] if os.path.lexists(path) else []
    if index.is_file():
        try:
            shards = read_json(index).get("weight_map", {})
            names = {name for name in shards.values() if isinstance(name, str)}
        except (InputError, AttributeError):
            names = set()
        own = re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
        files = [index, *(path.with_name(n) for n in sorted(names) if own.fullmatch(n)), *files]
    return [file for file in files if not file.is_dir()]
