"""Pictures that were made beside those of a reference: described, compared, and what is kept.

Reference pictures are cut and scaled to the size of those that are made. Features are kept in files
of a folder, where there is one, so that work that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from difftool.config.schema import DataConfig
from difftool.data import Dataset, open_dataset
from difftool.errors import InputError, UsageError
from difftool.evaluation.features import Describer
from difftool.evaluation.measures import (
    Features,
    frechet_distance,
    kernel_distance,
    precision_recall,
    subset_size,
)
from difftool.evaluation.options import LEAST
from difftool.progress import Progress, silent
from difftool.storage.safetensors import load_tensors, save_tensors

CHUNK = 64
"""Pictures that are described together, and kept in a file."""


class Judgement(NamedTuple):
    """How near what is made is to the reference."""

    features: str
    """What pictures are described by."""
    dimensions: int
    made: int
    """Pictures that it rests on."""
    reference: int
    """And those of the reference."""
    frechet: float
    kid: float
    kid_deviation: float
    """Between subsets."""
    kid_subset: int
    """Pictures of each."""
    precision: float
    """Share of what is made that lies among the reference."""
    recall: float
    """Share of the reference that lies among what is made."""

    def lines(self) -> list[tuple[str, str, str]]:
        """Lines of a readable table: what, how much, and what it rests on."""
        few = min(self.made, self.reference) < 2 * self.dimensions
        bias = f"; too high by being few: {self.dimensions} features" if few else ""
        count = f"{self.made} pictures beside {self.reference}"
        kid = f"{self.kid:.5f} ± {self.kid_deviation:.5f}"
        return [
            ("Frechet distance", f"{self.frechet:.3f}", f"{count}, by {self.features}{bias}"),
            ("KID", kid, f"100 subsets of {self.kid_subset}, unbiased"),
            ("precision", f"{self.precision:.3f}", "of what is made lies among the reference"),
            ("recall", f"{self.recall:.3f}", "of the reference lies among what is made"),
        ]


def judge(made: Features, reference: Features, describer: Describer) -> Judgement:
    """Compare features [N,D] with those of the reference [M,D]; UsageError for too few pictures."""
    for what, each in (("made", made), ("the reference has", reference)):
        if len(each) < LEAST:
            raise UsageError(f"{LEAST} pictures are the least to compare", f"{what} {len(each)}")
    kid, deviation = kernel_distance(made, reference)
    precision, recall = precision_recall(made, reference)
    return Judgement(
        features=describer.name,
        dimensions=describer.dimensions,
        made=len(made),
        reference=len(reference),
        frechet=frechet_distance(made, reference),
        kid=kid,
        kid_deviation=deviation,
        kid_subset=subset_size(len(made), len(reference)),
        precision=precision,
        recall=recall,
    )


def open_reference(where: str) -> Dataset:
    """The pictures to compare with, difftool's own among them; as `open_dataset` raises."""
    return open_dataset(where, DataConfig(own_pictures=True))


class Kept:
    """Features of a row of pictures in files of a folder, a chunk each."""

    def __init__(self, folder: Path | None, *key: object):
        """folder: None keeps nothing. key: all that features depend on."""
        digest = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()[:16]
        self.folder = None if folder is None else folder / digest

    def features(
        self, count: int, describe: Callable[[range], Tensor], done: Callable[[int], None]
    ) -> Features:
        """Those of pictures 0 .. count, by `describe`, or as they were kept."""
        found = []
        for first in range(0, count, CHUNK):
            some = range(first, min(first + CHUNK, count))
            found.append(self._chunk(some, describe))
            done(some.stop)
        return np.concatenate(found)

    def _chunk(self, some: range, describe: Callable[[range], Tensor]) -> Features:
        path = self.folder and self.folder / f"{some.start:06d}-{len(some)}.safetensors"
        if path and path.exists():
            try:
                return load_tensors(path)["features"].numpy().copy()
            except InputError:
                pass  # a damaged file is made anew
        features = describe(some).contiguous()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {"features": features}, overwrite=True)
        return features.numpy()


def reference_features(
    dataset: Dataset,
    size: tuple[int, int],
    describer: Describer,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Features:
    """Features of a reference, its pictures at that size (width, height)."""
    kept = Kept(folder, "reference", dataset.fingerprint, size, describer.name, describer.digest)

    def describe(some: range) -> Tensor:
        return describer.describe(dataset.images([*some], size))

    with progress("describing the reference", len(dataset)) as shown:
        return kept.features(len(dataset), describe, shown.update)


class Collected:
    """Features of pictures as they come."""

    def __init__(self, describer: Describer):
        self.describer, self.count = describer, 0
        self.sizes: dict[tuple[int, int], int] = {}
        """(width, height), and of how many pictures."""
        self._waiting: list[Tensor] = []
        self._found: list[Tensor] = []

    def add(self, picture: Tensor) -> None:
        """Describe a picture, uint8 [3,H,W]."""
        size = picture.shape[2], picture.shape[1]
        self.sizes[size] = self.sizes.get(size, 0) + 1
        if self._waiting and self._waiting[0].shape != picture.shape:
            self._describe()
        self._waiting.append(picture)
        self.count += 1
        if len(self._waiting) == CHUNK:
            self._describe()

    def _describe(self) -> None:
        if self._waiting:
            self._found.append(self.describer.describe(torch.stack(self._waiting)))
        self._waiting = []

    def features(self) -> Features:
        """Of all of them, [N,D]."""
        self._describe()
        dimensions = self.describer.dimensions
        return torch.cat([torch.empty(0, dimensions), *self._found]).numpy()

    @property
    def size(self) -> tuple[int, int]:
        """The size of most."""
        return max(self.sizes, key=self.sizes.__getitem__)
