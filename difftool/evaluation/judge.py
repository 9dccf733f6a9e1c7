"""Pictures that were made beside those of a reference: described, compared, and what is kept.

Reference pictures are cut and scaled to the size of those that are made. Features are kept in files
of a folder, the user's cache where there is no better one: work that was stopped goes on where it
was, and a reference is described once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from difftool.config.schema import DataConfig
from difftool.data import Dataset, open_dataset
from difftool.errors import DifftoolError, UsageError
from difftool.evaluation.features import SIDE, Describer
from difftool.evaluation.measures import (
    Features,
    frechet_distance,
    kernel_distance,
    precision_recall,
    subset_size,
)
from difftool.evaluation.options import LEAST
from difftool.progress import Progress, silent
from difftool.storage.places import user_cache
from difftool.storage.safetensors import load_tensors, read_header, save_tensors
from difftool.version import __version__

CHUNK = 64
"""Pictures that are described together, and kept in a file."""
DIGEST = "difftool.features_sha256"
"""In the header of such a file."""


class Judgement(NamedTuple):
    """How near what is made is to the reference."""

    features: str
    """What pictures are described by."""
    weights: str
    """SHA-256 of the file of its weights, in hex; "" without one."""
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
        by = self.features + (f" ({self.weights[:12]})" if self.weights else "")
        kid = f"{self.kid:.5f} ± {self.kid_deviation:.5f}"
        return [
            ("Frechet distance", f"{self.frechet:.3f}", f"{count}, by {by}{bias}"),
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
        weights=describer.digest,
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
    """The pictures to compare with, difftool's own among them; as `open_dataset` raises, and
    UsageError for captions alone."""
    dataset = open_dataset(where, DataConfig(own_pictures=True))
    if not dataset.pictured:
        raise UsageError(f"{where} has captions and no pictures", hint="name a folder of pictures")
    return dataset


def cached() -> Path:
    """Where features are kept for whoever compares with the same pictures again."""
    return user_cache() / "difftool" / "features"


class Kept:
    """Features of a row of pictures in files of a folder, a chunk each."""

    def __init__(self, folder: Path, *key: object):
        """key: all that features depend on."""
        self.key = hashlib.sha256("\0".join(map(str, (__version__, *key))).encode()).hexdigest()
        self.folder, self.found = folder / self.key[:16], 0
        """What was found there, of how many pictures."""

    def features(
        self, count: int, describe: Callable[[range], Tensor], done: Callable[[int], None]
    ) -> Features:
        """Those of pictures 0 .. count, by `describe`, or as they were kept."""
        found = []
        for first in range(0, count, CHUNK):
            some = range(first, min(first + CHUNK, count))
            found.append(self.chunk(some, describe))
            done(some.stop)
        return np.concatenate(found)

    def chunk(self, some: range, describe: Callable[[range], Tensor]) -> Features:
        """Those of some, CHUNK of them at most."""
        path = self.folder / f"{some.start:06d}-{len(some)}.safetensors"
        with suppress(DifftoolError, OSError):  # a damaged file is made anew
            if path.exists():
                features = load_tensors(path, ["features"])["features"].numpy().copy()
                if read_header(path).metadata.get(DIGEST) == _digest(features):
                    self.found += len(some)
                    return features
        features = describe(some).contiguous()
        with suppress(DifftoolError, OSError):  # what cannot be kept is made again
            path.parent.mkdir(parents=True, exist_ok=True)
            notes = {DIGEST: _digest(features.numpy())}
            save_tensors(path, {"features": features}, notes, overwrite=True)
        return features.numpy()


def _digest(features: Features) -> str:
    return hashlib.sha256(repr(features.shape).encode() + features.tobytes()).hexdigest()


def reference_features(
    dataset: Dataset,
    size: tuple[int, int],
    describer: Describer,
    folder: Path | None = None,
    progress: Progress = silent,
    told: Callable[[str], None] = lambda words: None,
) -> Features:
    """Features of a reference, its pictures at that size (width, height). folder: where they are
    kept; None = in the user's cache. told: is told where they were there."""
    key = "reference", dataset.fingerprint, size, describer.name, describer.digest
    kept = Kept(folder or cached(), *key)

    def describe(some: range) -> Tensor:
        return describer.describe(dataset.images([*some], size))

    with progress("describing the reference", len(dataset)) as shown:
        features = kept.features(len(dataset), describe, shown.update)
    if kept.found:
        told(f"{kept.found} of {len(dataset)} reference pictures were described before")
    return features


class Collected:
    """Features of pictures as they come. What a network made of them is kept in the user's cache:
    pictures that are there already are not described again."""

    def __init__(self, describer: Describer):
        self.describer, self.count = describer, 0
        self.sizes: dict[tuple[int, int], int] = {}
        """(width, height), and of how many pictures."""
        self._waiting: list[Tensor] = []
        self._found: list[Features] = []

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

    def add_all(self, pictures: Dataset) -> None:
        """Describe those of a set, each at its own size."""
        for index in range(len(pictures)):
            size = pictures.picture_size(index) or pictures.native_size or SIDE
            self.add(pictures.images([index], size)[0])

    def _describe(self) -> None:
        if not self._waiting:
            return
        describer, pictures = self.describer, torch.stack(self._waiting)
        self._waiting = []
        if not describer.digest:  # which takes no longer than to look it up
            self._found.append(describer.describe(pictures).numpy())
            return
        content = hashlib.sha256(pictures.numpy().tobytes()).hexdigest()
        key = "pictures", content, pictures.shape, describer.name, describer.digest
        kept = Kept(cached(), *key)
        self._found.append(kept.chunk(range(len(pictures)), lambda _: describer.describe(pictures)))

    def features(self) -> Features:
        """Of all of them, [N,D]."""
        self._describe()
        return np.concatenate([np.empty((0, self.describer.dimensions), "f4"), *self._found])

    @property
    def size(self) -> tuple[int, int]:
        """The size of most."""
        return max(self.sizes, key=self.sizes.__getitem__)

    def judged(self, reference: Dataset, told: Callable[[str, bool], None]) -> Judgement:
        """All of them beside a reference; see `judge`. told: is told what else is to be known, and
        whether that is a warning."""
        if len(self.sizes) > 1:
            width, height = self.size
            told(f"pictures of several sizes; the reference is compared at {width}x{height}", True)
        known = reference_features(
            reference, self.size, self.describer, told=lambda words: told(words, False)
        )
        return judge(self.features(), known, self.describer)
