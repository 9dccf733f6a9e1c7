"""Pictures that are never trained on, and what the averaged weights make of them.

Their times and noise are drawn by coordinates and are the same at every measure, so that the losses
of two steps differ by the weights alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difftool.data import Dataset
from difftool.training.step.loop import Trainer
from difftool.training.step.record import Record

SAMPLES = 256
"""Samples in a measure, at least: few pictures are seen at several noise levels each."""


def hold_out(dataset: Dataset, wanted: float | None) -> tuple[Dataset, Dataset | None]:
    """The pictures to learn from, and those that are only measured: the same whatever the seed.

    `wanted`: a share below 1, or a count; None = the set's own validation split, if it has one.
    UsageError if nothing would be left to learn from.
    """
    if wanted:
        return dataset.split(wanted)
    held = dataset.held_out if wanted is None else None
    if held is not None and len(held) > SAMPLES:
        held = held.split(SAMPLES)[1]
    return dataset, held


class Validation:
    """Measures a trainer's loss on held-out pictures."""

    def __init__(self, trainer: Trainer, dataset: Dataset):
        self.trainer, self.dataset = trainer, dataset
        whole = trainer.batches.conditioning._replace(drop=0.0)
        self.batches = replace(trainer.batches, dataset=dataset, flip=False, conditioning=whole)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Loss, its terms and the loss by noise level, for metrics.jsonl, of the weights as they
        are: the caller puts the averaged ones and evaluation mode in place."""
        trainer, model = self.trainer, self.trainer.model
        size = trainer.config.batch_size
        assert size
        record = Record(model.device)
        count = max(len(self.dataset), SAMPLES)
        for first in range(0, count, size):
            # Whole batches, wrapping around: a contrast depends on how many there are.
            batch = self.batches.draw(first, size)
            with torch.autocast(model.device.type, trainer.autocast, trainer.autocast is not None):
                record.add(trainer.objective.held_out(batch))
        report = record.report()
        levels = {"levels": report["levels"]} if report["levels"] else {}
        return {"loss": report["loss"], **report["terms"], **levels}


# --- colours ---------------------------------------------------------------------------------


def channel_statistics(images: Tensor) -> dict[str, list[float]]:
    """Of pictures [B,3,H,W] in [-1, 1], for each channel: mean, deviation, and how far the means of
    single pictures spread."""
    images = images.float().cpu()
    means = images.mean(dim=(2, 3))
    return {
        "mean": means.mean(0).tolist(),
        "std": images.std(dim=(0, 2, 3)).tolist(),
        "spread": means.std(0, correction=0).tolist(),
    }
