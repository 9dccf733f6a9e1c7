"""Pictures that are never trained on, and what the averaged weights make of them.

Their times and noise are drawn by coordinates and are the same at every measure, so that the losses
of two steps differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difftool.data import Dataset
from difftool.training.step.loop import Trainer
from difftool.training.step.record import Record

MEASURES = 256
"""Samples in a measure, at least: few pictures are seen at several noise levels each."""
RISE, PATIENCE = 1.05, 3
"""Overfitting: this much above the best validation loss, this many measures in a row."""
CAST, CONTRAST = 0.1, 1.6
"""Colours are far off where a mean is off by more than this (of a range of 2) and by more than
chance, or a deviation by more than this factor."""


def hold_out(dataset: Dataset, wanted: float | None) -> tuple[Dataset, Dataset | None]:
    """The pictures to learn from, and those that are only measured: the same whatever the seed.

    `wanted`: a share below 1, or a count; None = the set's own validation split, if it has one.
    UsageError if nothing would be left to learn from.
    """
    if wanted:
        return dataset.split(wanted)
    held = dataset.held_out if wanted is None else None
    if held is not None and len(held) > MEASURES:
        held = held.split(MEASURES)[1]
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
        count = max(len(self.dataset), MEASURES)
        for first in range(0, count, size):
            # Whole batches, wrapping around: a contrast depends on how many there are.
            batch = self.batches.draw(first, size)
            with torch.autocast(model.device.type, trainer.autocast, trainer.autocast is not None):
                record.add(trainer.objective.held_out(batch))
        report = record.report()
        levels = {"levels": report["levels"]} if report["levels"] else {}
        return {"loss": report["loss"], **report["terms"], **levels}


def overfits(validation: Sequence[float], training: Sequence[float]) -> bool:
    """Whether what is held out gets worse while what is learned still gets better.

    Both are losses at the same measures, in order.
    """
    if len(validation) <= PATIENCE:
        return False
    best = min(range(len(validation)), key=validation.__getitem__)
    since = validation[best + 1 :]
    worse = len(since) >= PATIENCE and min(since[-PATIENCE:]) > RISE * validation[best]
    return worse and training[-1] < training[best]


# --- colours ---------------------------------------------------------------------------------


def colours(images: Tensor) -> dict[str, list[float]]:
    """Of pictures [B,3,H,W] in [-1, 1], for each channel: mean, deviation, and how far the means of
    single pictures spread."""
    images = images.float().cpu()
    means = images.mean(dim=(2, 3))
    return {
        "mean": means.mean(0).tolist(),
        "std": images.std(dim=(0, 2, 3)).tolist(),
        "spread": means.std(0, correction=0).tolist(),
    }


def cast(samples: Mapping[str, Sequence[float]], data: Mapping[str, Sequence[float]], count: int
         ) -> str | None:  # fmt: skip
    """What is wrong with the colours of `count` samples, in words; None if nothing is."""
    names, wrong = ("red", "green", "blue"), []
    off = [made - real for made, real in zip(samples["mean"], data["mean"], strict=True)]
    far = [abs(d) > max(CAST, 3 * s / count**0.5) for d, s in zip(off, data["spread"], strict=True)]
    if all(far) and (min(off) > 0 or max(off) < 0):
        shift = sum(off) / len(off)
        wrong.append(f"{'lighter' if shift > 0 else 'darker'} (by {abs(shift):.2f} of 2)")
    else:
        channels = zip(names, off, far, strict=True)
        wrong += [
            f"{'more' if d > 0 else 'less'} {name} ({d:+.2f})" for name, d, f in channels if f
        ]
    made, real = (sum(values) / len(values) for values in (samples["std"], data["std"]))
    if not real / CONTRAST <= made <= real * CONTRAST:
        wrong.append(f"{'more' if made > real else 'less'} varied ({made:.2f}, data {real:.2f})")
    return f"samples are {', '.join(wrong)} than the data" if wrong else None
