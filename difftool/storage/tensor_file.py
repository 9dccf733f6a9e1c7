"""Files of tensors of any kind, opened the same way: safetensors, pickled checkpoints, shards.

Torch-free until tensors are loaded; nothing in a file is ever run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from difftool.errors import InputError, missing
from difftool.storage.read import open_file
from difftool.storage.safetensors import DATA_HASH, looks_like_safetensors, read_header
from difftool.storage.strict_json import read_json
from difftool.storage.tensors import Located, load_located
from difftool.storage.torch_archive import looks_like_checkpoint, read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """An opened file, or set of shards, of tensors: everything but their bytes."""

    path: Path
    kind: str
    """Of the file: safetensors or pickle."""
    tensors: dict[str, Located]
    """By name."""
    beside: dict[str, Located] = field(default_factory=dict)
    """Tensors of a checkpoint that are no model's: of optimisers and the like."""
    metadata: dict[str, str] = field(default_factory=dict)
    """A header's notes, or a checkpoint's numbers and texts, such as global_step."""
    warnings: tuple[str, ...] = ()

    def load(
        self,
        prefix: str = "",
        device: str = "cpu",
        dtype: Dtype | None = None,
        as_is: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, by the rest of the name; memory-mapped, or
        cast, but those whose whole names are in as_is."""
        places = {n[len(prefix) :]: p for n, p in self.tensors.items() if n.startswith(prefix)}
        exact = {name.removeprefix(prefix) for name in as_is}
        return load_located(places, device, dtype, exact)


def is_source(path: Path) -> bool:
    """Whether `open_source` may have a word to say of a file; says nothing of its soundness."""
    if is_index(path) or stand_in(path):
        return True
    return path.is_file() and (looks_like_safetensors(path) or looks_like_checkpoint(path))


STAND_INS = {
    b"version https://git-lfs": ("a pointer of git-lfs lies in its place", "run git lfs pull"),
    b"<!doctype html": ("a page of the web lies in its place", "download it again, logged in"),
    b"<html": ("a page of the web lies in its place", "download it again, logged in"),
}
"""Beginnings, in small letters, of what downloads leave: what it is, and what to do."""


def stand_in(path: Path) -> tuple[str, str] | None:
    """What lies in the place of a file that was not downloaded, and what to do."""
    if not path.is_file():
        return None
    try:
        with open_file(path) as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return None
    return next((told for begin, told in STAND_INS.items() if start.startswith(begin)), None)


def is_index(path: Path) -> bool:
    """Whether a file is, by its name, the index of shards."""
    return path.suffix == ".json" and ".index." in path.name and path.is_file()


def open_source(path: Path) -> TensorSource:
    """The tensors of a file, or of all shards of an index or of a folder that has one.

    No tensor is loaded and nothing is run. UsageError if there is nothing at the path, InputError
    if it is malformed or not safe.
    """
    if not path.exists():
        raise missing(path)
    if path.is_dir():
        indices = [file for file in sorted(path.iterdir()) if is_index(file)]
        if len(indices) != 1:
            why = f"it has {len(indices)} indices of shards, not one"
            raise InputError(f"{path} is not a folder of tensors", why, "name one of its files")
        return _open_shards(indices[0])
    return _open_shards(path) if is_index(path) else _open_file(path)


def _open_file(path: Path) -> TensorSource:
    if not path.is_file():  # to read a pipe is to wait for it
        raise InputError(f"cannot read {path}", "it is not a file" if path.exists() else None)
    if told := stand_in(path):
        raise InputError(f"{path} was not downloaded", *told)
    if looks_like_safetensors(path):
        header = read_header(path)
        tensors = {name: Located(path, name, info) for name, info in header.tensors.items()}
        notes = header.metadata
        return TensorSource(path=path, kind="safetensors", tensors=tensors, metadata=notes)
    found = read_checkpoint(path)
    return TensorSource(
        path=path,
        kind="pickle",
        tensors={name: Located(path, name, info) for name, info in found.tensors.items()},
        beside={name: Located(path, name, info) for name, info in found.beside.items()},
        metadata=found.metadata,
        warnings=tuple(f"{path.name}: {warning}" for warning in found.warnings),
    )


def _open_shards(index: Path) -> TensorSource:
    """Tensors of shards, checked against their index in every respect."""
    content = read_json(index)
    places, notes = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(places, dict) or not all(isinstance(s, str) for s in places.values()):
        raise InputError(f"{index} is malformed", "it has no weight_map")
    if not isinstance(notes, dict | None):
        raise InputError(f"{index} is malformed", "its metadata is no object")
    suffix = ".bin" if ".bin.index." in index.name else ".safetensors"
    tensors: dict[str, Located] = {}
    beside: dict[str, Located] = {}
    metadata: dict[str, str] = {}
    warnings: list[str] = []
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(suffix):
            why = f"{shard!r} is not the name of a file beside it"
            raise InputError(f"{index} is not safe", why)
    for shard in shards:
        found = _open_file(index.parent / shard)
        for name in found.tensors:
            if places.get(name) != shard:
                why = f"it does not place {name!r} there"
                raise InputError(f"{index} does not fit {shard}", why)
        tensors |= found.tensors
        beside |= {f"{shard}.{name}": place for name, place in found.beside.items()}
        metadata = {k: v for k, v in found.metadata.items() if k != DATA_HASH} | metadata
        warnings += found.warnings
    if missing := [name for name in places if name not in tensors]:
        raise InputError(f"{index} does not fit its shards", f"{missing[0]!r} is in none of them")
    size = sum(place.info.size for place in tensors.values())
    told = (notes or {}).get("total_size", size)
    if told != size:
        if suffix == ".safetensors":
            raise InputError(f"{index} does not fit its shards", f"{size} bytes, not {told!r:.50}")
        warnings.append(f"{index.name} says {told!r:.50} bytes, its shards have {size}")
    kind = "safetensors" if suffix == ".safetensors" else "pickle"
    return TensorSource(
        path=index,
        kind=kind,
        tensors=tensors,
        beside=beside,
        metadata=metadata,
        warnings=tuple(warnings),
    )
