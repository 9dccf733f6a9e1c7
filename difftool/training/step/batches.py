"""What a training step is made from: samples drawn by coordinates, so that a resumed run is exact.

Sample n is the (n mod N)-th of epoch n // N, in that epoch's own order; in buckets, where a batch
is of one shape, batches follow data.buckets.Schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from difftool.data import DataKind, Dataset
from difftool.data.buckets import Buckets, Schedule, Size
from difftool.pipeline.model import Model
from difftool.training.step import rng
from difftool.training.step.rng import Stream


class Batch(NamedTuple):
    """Samples of a step."""

    slots: Tensor
    """[B] int64: the number of each sample in the whole run, the coordinate of what is drawn."""
    times: Tensor
    """[B], fp32 in (0, 1): at which quantile of the training times each is looked at. Drawn by the
    host, for which so few numbers are less work than for a GPU to be told of it."""
    indices: list[int]
    """Which pictures of the dataset."""
    flips: list[bool]
    """Whether each is mirrored."""
    pictures: Tensor | None
    """uint8 [B,3,H,W], mirrored; None where they are not asked for."""
    captions: list[str]
    labels: list[int | None]
    """Both with the dropped ones emptied."""


class Conditioning(NamedTuple):
    """What a model is conditioned on, and how much of it is left out for guidance's sake."""

    kind: DataKind
    null_label: int | None = None
    """The label that means "none"; None = there is no such label."""
    drop: float = 0.0
    """Share of the captions or labels that are left out."""

    @classmethod
    def of(cls, model: Model, drop: float) -> Conditioning:
        """A model's own."""
        kind: DataKind = "class" if model.preset.unet.num_classes else "none"
        guidable = bool(model.text) or model.null_label is not None
        return cls("text" if model.text else kind, model.null_label, drop if guidable else 0.0)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Draws the batches of a run."""

    dataset: Dataset
    conditioning: Conditioning
    seed: int
    size: int
    flip: bool
    buckets: Buckets | None = None
    batch_size: int = 0
    """Samples of one shape in a row, where there are buckets."""
    device: torch.device

    @cached_property
    def _order(self) -> Callable[[int], Tensor]:
        """The order of an epoch; sorting a large set anew for every batch would cost most of it."""
        return lru_cache(maxsize=4)(lambda e: rng.permutation(self.seed, e, len(self.dataset)))

    @cached_property
    def _schedule(self) -> Schedule:
        assert self.buckets
        sizes = [self.dataset.bucket(i, self.buckets) for i in range(len(self.dataset))]
        return Schedule(
            sizes, self.batch_size, lambda e, n: rng.permutation(self.seed, e, n).tolist()
        )

    def _samples(self, slots: Tensor) -> tuple[Tensor, Tensor, int | Size]:
        """Indices and epochs [B] of those samples of the run, and the size of their pictures."""
        if self.buckets:
            number, offset = divmod(int(slots[0]), self.batch_size)
            drawn = self._schedule[number]
            some = slice(offset, offset + len(slots))
            return torch.tensor(drawn.indices[some]), torch.tensor(drawn.passes[some]), drawn.bucket
        epochs, place = slots // len(self.dataset), slots % len(self.dataset)
        ordered = [self._order(e)[place[epochs == e]] for e in epochs.unique().tolist()]
        return torch.cat(ordered), epochs, self.size

    def draw(self, first: int, count: int, *, pictures: bool = True) -> Batch:
        """The samples first .. first + count of the run, in buckets within one batch. Safe to call
        in any thread."""
        data, seed, (kind, null_label, drop) = self.dataset, self.seed, self.conditioning
        slots = torch.arange(first, first + count)
        indices, epochs, size = self._samples(slots)
        keys, chosen = rng.keys(seed, epochs, indices), indices.tolist()
        flips = (rng.uniform(seed, Stream.FLIP, 0, slots) < 0.5).tolist()
        flips = flips if self.flip else [False] * count
        drops = (rng.uniform(seed, Stream.DROP, 0, slots) < drop).tolist()
        captions = data.captions(chosen, keys) if kind == "text" else [""] * count
        labels: list[int | None] = [None] * count
        if kind == "class":
            labels = list(data.labels(chosen))
        images = data.images(chosen, size, flips, keys) if pictures else None
        return Batch(
            slots=self._sent(slots),
            times=self._sent(rng.uniform(seed, Stream.TIME, 0, slots)),
            indices=chosen,
            flips=flips,
            pictures=None if images is None else self._pinned(images),
            captions=["" if d else c for c, d in zip(captions, drops, strict=True)],
            labels=[null_label if d else v for v, d in zip(labels, drops, strict=True)],
        )

    def _sent(self, tensor: Tensor) -> Tensor:
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Where a copy to the GPU is not waited for."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


class Prefetcher:
    """Batches by position, prepared ahead in background threads; the same whatever their number.

    Decoders and tensor operations let go of Python's lock. Without workers a batch is made when it
    is asked for.
    """

    def __init__(self, draw: Callable[[int], Batch], workers: int, end: int):
        self._draw, self._workers, self._end = draw, workers, end
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[int, Future[Batch]] = {}

    def __getitem__(self, position: int) -> Batch:
        if not self._workers:
            return self._draw(position)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, "batches")
        for later in range(position, min(position + 2 * self._workers + 1, self._end)):
            if later not in self._waiting:
                self._waiting[later] = self._pool.submit(self._draw, later)
        return self._waiting.pop(position).result()

    def close(self) -> None:
        """Stop preparing."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._waiting = None, {}


def to_signal(pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures to fp32 in [-1, 1] on the device."""
    return pictures.to(device, non_blocking=True).float().div_(127.5).sub_(1)
