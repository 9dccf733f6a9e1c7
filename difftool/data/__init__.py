"""Datasets: folders of pictures in the usual layouts, and built-in synthetic sets. Torch-free at
import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from difftool.config.schema import DataConfig
from difftool.data.buckets import Buckets, Schedule, Size
from difftool.data.dataset import Audit, DataKind, Dataset, OnProgress, SkippedFile, Subset
from difftool.data.folder import open_folder
from difftool.data.lines import SUFFIX, CaptionLines
from difftool.data.shapes import ShapesDataset
from difftool.errors import UsageError, suggestion
from difftool.registry import Registry

__all__ = [
    "BUILTIN",
    "Audit",
    "Buckets",
    "DataKind",
    "Dataset",
    "Schedule",
    "Size",
    "SkippedFile",
    "Subset",
    "open_dataset",
]

BUILTIN: Registry[Callable[[], Dataset]] = Registry("built-in dataset")
BUILTIN.add("shapes", ShapesDataset)


def open_dataset(
    where: str,
    config: DataConfig | None = None,
    *,
    workers: int | None = None,
    progress: OnProgress | None = None,
) -> Dataset:
    """The dataset in a folder, .zip, .tar or kohya .toml, the captions alone in a .txt, or the
    built-in one of that name; a path goes first.

    UsageError if there is neither, InputError if what is there cannot be used (see `open_folder`).
    """
    path = Path(where)
    if not path.exists():
        if where in BUILTIN:
            return BUILTIN[where]()
        hint = suggestion(where, BUILTIN).replace("choose from", "built in")
        raise UsageError(f'there is no folder and no built-in dataset "{where}"', hint=hint)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return CaptionLines(path, config)
    dataset = open_folder(path, config, workers=workers, progress=progress)
    if where in BUILTIN:
        dataset.audit.notes.append(
            f'the path {where} is used, not the built-in set "{BUILTIN.resolve(where)}"'
        )
    return dataset
