"""What every dataset offers the trainer, and the audit that is printed before any training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["none", "class", "text"]
"""What the pictures are conditioned on."""

MEMORY_CAP = 2 << 30
"""Decoded sets up to this many bytes are held in memory."""

LISTED = 10
"""How many skipped files the audit names."""


class Skipped(NamedTuple):
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
    skipped: list[Skipped] = field(default_factory=list)
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


def count(n: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class Dataset(ABC):
    """Pictures by index, with captions or labels.

    Whatever is random about a sample is a function of its index and its key alone; the trainer
    derives the key from (seed, epoch, index), so nothing depends on order, batches or workers.
    """

    kind: Kind
    classes: tuple[str, ...] = ()
    """Names of the classes by label, where kind is "class"."""
    native_size: int | None = None
    """The typical short side in pixels; None = made for any size."""
    audit: Audit

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one epoch."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what the set consists of: equal for equal data, wherever it lies."""

    @abstractmethod
    def images(
        self,
        indices: Sequence[int],
        size: int,
        flips: Sequence[bool] | None = None,
        keys: Sequence[int] | None = None,
    ) -> Tensor:
        """Square pictures, uint8 [B,3,size,size]; those with a true flip are mirrored."""

    @abstractmethod
    def captions(self, indices: Sequence[int], keys: Sequence[int] | None = None) -> list[str]:
        """The captions; "" for a picture that has none."""

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The class labels, indices into `classes`."""
        raise TypeError(f"a dataset of kind {self.kind!r} has no labels")

    def prepare(self, size: int, progress: Callable[[int, int], None] | None = None) -> None:  # noqa: B027
        """Get ready for `images` at this size; `progress` is told (done, total)."""
