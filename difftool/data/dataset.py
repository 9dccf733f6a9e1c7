"""What every dataset offers the trainer, and the audit that is printed before any training."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from difftool.data.buckets import Buckets, Size
from difftool.data.phrases import count
from difftool.errors import UsageError
from difftool.text.dice import uniforms

if TYPE_CHECKING:
    from torch import Tensor

DataKind = Literal["none", "class", "text"]
"""What the pictures are conditioned on."""

OnProgress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""

MEMORY_CAP = 2 << 30
"""Decoded sets up to this many bytes are held in memory."""

LISTED = 10
"""How many skipped files the audit names."""


class SkippedFile(NamedTuple):
    """A file that is left out of training, and why."""

    name: str
    reason: str


@dataclass
class Audit:
    """What was found and what was left out; `lines` is what the user reads."""

    source: str
    images: int = 0
    captions: dict[str, int] = field(default_factory=dict)
    """Images by where their caption comes from; "" counts those without one."""
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None
    """Smallest, median and largest picture by area, each (width, height)."""
    skipped: list[SkippedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The audit as text, one fact a line."""
        lines = [f"{self.source}: {count(self.images, 'image')}"]
        if self.captions:
            parts = [f"{n} from {where}" for where, n in self.captions.items() if where]
            if bare := self.captions.get(""):
                parts.append(f"{bare} without")
            lines.append("captions: " + ", ".join(parts))
        if self.sizes:
            low, median, high = (f"{w}x{h}" for w, h in self.sizes)
            lines.append(f"sizes: {low}" + (f" to {high}, median {median}" if low != high else ""))
        if self.skipped:
            lines.append(f"skipped: {count(len(self.skipped), 'file')}")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped[:LISTED]]
            if len(self.skipped) > LISTED:
                lines.append(f"  and {len(self.skipped) - LISTED} more")
        return lines + [f"note: {note}" for note in self.notes]


class Dataset(ABC):
    """Pictures by index, with captions or labels.

    Whatever is random about a sample is a function of its index and its key alone; the trainer
    derives the key from (seed, epoch, index), so nothing depends on order, batches or workers.
    """

    kind: DataKind
    classes: tuple[str, ...] = ()
    """Names of the classes by label, where kind is "class"."""
    pictured: bool = True
    """Whether it has pictures, and not captions alone."""
    native_size: int | None = None
    """The typical short side in pixels; None = made for any size."""
    fixed: bool = True
    """Whether a picture is the same whatever its key, so that its latent can be kept."""
    held_out: Dataset | None = None
    """The set's own validation or test split; see also `split`."""
    background: str = ""
    """The colour that shows through transparent pictures."""
    asked: Mapping[str, Any] = {}
    """What the set's own configuration file asks of the training, by the keys of OptimConfig."""
    audit: Audit

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one epoch."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what the set consists of: equal for equal data, wherever it lies."""

    @abstractmethod
    def draw(self, indices: Sequence[int], size: int | Size, keys: Sequence[int]) -> Tensor:
        """The pictures of these samples, by `images`, which mirrors them; a new tensor."""

    @abstractmethod
    def caption(self, index: int, key: int) -> str:
        """The caption of a sample; "" for a picture that has none."""

    def label(self, index: int) -> int:
        """The class label of a sample, an index into `classes`."""
        raise TypeError(f"a dataset of kind {self.kind!r} has no labels")

    def images(
        self,
        indices: Sequence[int],
        size: int | Size,
        flips: Sequence[bool] | None = None,
        keys: Sequence[int] | None = None,
    ) -> Tensor:
        """Pictures that fill a square or a (width, height), uint8 [B,3,height,width]; those with a
        true flip are mirrored."""
        batch = self.draw(indices, size, _keys(indices, keys))
        if flips is not None:
            chosen = [row for row, flip in enumerate(flips) if flip]
            batch[chosen] = batch[chosen].flip(-1)
        return batch

    def captions(self, indices: Sequence[int], keys: Sequence[int] | None = None) -> list[str]:
        """The captions of the pictures that `images` gives for these keys."""
        return [self.caption(*each) for each in zip(indices, _keys(indices, keys), strict=True)]

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The class labels, indices into `classes`."""
        return [self.label(index) for index in indices]

    def prepare(self, size: int | Buckets, progress: OnProgress | None = None) -> None:
        """Get ready for `images` at this size or in these buckets; `progress` is told (done,
        total)."""
        return

    def name(self, index: int) -> str:
        """What the picture is called; repeats of a picture share its name."""
        return str(index)

    def picture_size(self, index: int) -> Size | None:
        """Width and height of the picture itself; None = it is made for any size."""
        return None

    def content(self, index: int) -> str:
        """SHA-256 of the picture's own bytes, whatever it is called: the key for what is made of
        it."""
        return hashlib.sha256(f"{self.fingerprint}/{self.name(index)}".encode()).hexdigest()

    def bucket(self, index: int, buckets: Buckets) -> Size:
        """The bucket that the picture goes to."""
        size = self.picture_size(index)
        return buckets.of(size) if size else buckets.of((buckets.size, buckets.size))

    def split(self, amount: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """The set to learn from, and pictures held out of it.

        `amount`: a share below 1, or how many pictures. By the hash of each picture's name, so
        pictures that are added move none of the others (of a count, the last few).
        UsageError if nothing would be left on one of the sides.
        """
        names = dict.fromkeys(self.name(index) for index in range(len(self)))
        places = {name: uniforms("split", seed, name)[0] for name in names}
        order = sorted(names, key=lambda name: (places[name], name))
        if amount < 1:
            wanted = sum(place < amount for place in places.values()) or 1
        else:
            wanted = int(amount)
        if amount <= 0 or wanted >= len(order):
            why = f"{amount:g} of {count(len(order), 'picture')}"
            hint = "give a share such as 0.05, or fewer pictures than there are"
            raise UsageError("cannot hold out that much of the data", why, hint)
        chosen = set(order[:wanted])
        sides: tuple[list[int], list[int]] = ([], [])
        for index in range(len(self)):
            sides[self.name(index) in chosen].append(index)
        return Subset(self, sides[0]), Subset(self, sides[1])


class Subset(Dataset):
    """Some samples of a set."""

    def __init__(self, whole: Dataset, indices: Sequence[int]):
        self.whole, self.indices = whole, list(indices)
        self.kind, self.classes = whole.kind, whole.classes
        self.pictured = whole.pictured
        self.native_size, self.fixed, self.asked = whole.native_size, whole.fixed, whole.asked
        self.background = whole.background
        names = {whole.name(index) for index in self.indices}
        self.audit = Audit(f"a part of {whole.audit.source}", len(names))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """Hash of the whole set's and of which samples these are."""
        return hashlib.sha256(f"{self.whole.fingerprint}/{self.indices}".encode()).hexdigest()

    def draw(self, indices: Sequence[int], size: int | Size, keys: Sequence[int]) -> Tensor:
        """As the whole set's."""
        return self.whole.draw([self.indices[index] for index in indices], size, keys)

    def caption(self, index: int, key: int) -> str:
        """As the whole set's."""
        return self.whole.caption(self.indices[index], key)

    def label(self, index: int) -> int:
        """As the whole set's."""
        return self.whole.label(self.indices[index])

    def prepare(self, size: int | Buckets, progress: OnProgress | None = None) -> None:
        """Prepares the whole set, which other parts of it share."""
        self.whole.prepare(size, progress)

    def name(self, index: int) -> str:
        """As the whole set's."""
        return self.whole.name(self.indices[index])

    def picture_size(self, index: int) -> Size | None:
        """As the whole set's."""
        return self.whole.picture_size(self.indices[index])

    def content(self, index: int) -> str:
        """As the whole set's."""
        return self.whole.content(self.indices[index])


def _keys(indices: Sequence[int], keys: Sequence[int] | None) -> list[int]:
    return [0] * len(indices) if keys is None else [int(key) for key in keys]
