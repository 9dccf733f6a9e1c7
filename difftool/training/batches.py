"""What a training step is made from: samples drawn by coordinates, so that a resumed run is exact.

Sample n is the (n mod N)-th of epoch n // N, in that epoch's own order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difftool.data import Dataset
from difftool.model import Model
from difftool.training import rng
from difftool.training.rng import Stream


class Batch(NamedTuple):
    """Samples of a step."""

    slots: Tensor
    """[B] int64: the number of each sample in the whole run, the coordinate of what is drawn."""
    indices: list[int]
    """Which pictures of the dataset."""
    flips: list[bool]
    """Whether each is mirrored."""
    pictures: Tensor | None
    """uint8 [B,3,S,S], mirrored; None where they are not asked for."""
    captions: list[str]
    labels: list[int | None]
    """Both with the dropped ones emptied."""


@dataclass(frozen=True)
class Batches:
    """Draws the batches of a run. `drop` is the share of captions or labels left out."""

    model: Model
    dataset: Dataset
    seed: int
    size: int
    flip: bool
    drop: float = 0.0

    def draw(self, first: int, count: int, *, pictures: bool = True) -> Batch:
        """The samples first .. first + count of the run."""
        data, seed, size, model = self.dataset, self.seed, len(self.dataset), self.model
        slots = torch.arange(first, first + count)
        epochs = slots // size
        orders = {e: rng.permutation(seed, e, size) for e in set(epochs.tolist())}
        indices = torch.stack([orders[n // size][n % size] for n in range(first, first + count)])
        keys, chosen = rng.keys(seed, epochs, indices), indices.tolist()
        flips = (rng.uniform(seed, Stream.FLIP, 0, slots) < 0.5).tolist()
        flips = flips if self.flip else [False] * count
        drops = (rng.uniform(seed, Stream.DROP, 0, slots) < self.drop).tolist()
        drops = [d and model.guidable for d in drops]
        captions = data.captions(chosen, keys) if model.text else [""] * count
        labels: list[int | None] = [None] * count
        if model.preset.unet.num_classes:
            labels = list(data.labels(chosen))
        return Batch(
            slots=slots.to(model.device),
            indices=chosen,
            flips=flips,
            pictures=data.images(chosen, self.size, flips, keys) if pictures else None,
            captions=["" if d else c for c, d in zip(captions, drops, strict=True)],
            labels=[model.null_label if d else v for v, d in zip(labels, drops, strict=True)],
        )


def to_signal(pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures to fp32 in [-1, 1] on the device."""
    return pictures.to(device, non_blocking=True).float().div_(127.5).sub_(1)
