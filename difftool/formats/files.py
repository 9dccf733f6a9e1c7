"""Files of tensors of any kind, opened the same way: safetensors and pickled checkpoints.

Torch-free until tensors are loaded; nothing in a file is ever run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from difftool.errors import InputError, UsageError
from difftool.formats.checkpoints import looks_like_checkpoint, read_checkpoint
from difftool.formats.safetensors import looks_like_safetensors, read_header
from difftool.formats.tensors import Located, load_located

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """An opened file, or set of shards, of tensors: everything but their bytes."""

    path: Path
    kind: str
    """safetensors or pickle."""
    tensors: dict[str, Located]
    """By name."""
    beside: dict[str, Located] = field(default_factory=dict)
    """Tensors of a checkpoint that are no model's: of optimisers and the like."""
    metadata: dict[str, str] = field(default_factory=dict)
    """A header's notes, or a checkpoint's numbers and texts, such as global_step."""
    warnings: tuple[str, ...] = ()

    def load(self, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, by the rest of the name; memory-mapped."""
        places = {n[len(prefix) :]: p for n, p in self.tensors.items() if n.startswith(prefix)}
        return load_located(places, device)


def is_source(path: Path) -> bool:
    """Whether `open_source` may have a word to say of a file; says nothing of its soundness."""
    return path.is_file() and (looks_like_safetensors(path) or looks_like_checkpoint(path))


def open_source(path: Path) -> TensorSource:
    """The tensors of a file; no tensor is loaded, nothing is run.

    UsageError if there is nothing at the path, InputError if it is malformed or not safe.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file of tensors")
    if looks_like_safetensors(path):
        header = read_header(path)
        tensors = {name: Located(path, name, info) for name, info in header.tensors.items()}
        return TensorSource(
            path=path, kind="safetensors", tensors=tensors, metadata=header.metadata
        )
    found = read_checkpoint(path)
    return TensorSource(
        path=path,
        kind="pickle",
        tensors={name: Located(path, name, info) for name, info in found.tensors.items()},
        beside={name: Located(path, name, info) for name, info in found.beside.items()},
        metadata=found.metadata,
        warnings=tuple(f"{path.name}: {warning}" for warning in found.warnings),
    )
