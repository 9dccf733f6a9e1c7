"""Pictures that are never trained on, and what the averaged weights make of them.

Their times and noise are drawn by coordinates and are the same at every measure, so that the losses
of two steps differ by the weights alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftool.data import Dataset, Subset
from difftool.diffusion.likelihood import mean_bits
from difftool.progress import Progress, silent
from difftool.training.step import rng
from difftool.training.step.cache import Latents
from difftool.training.step.loop import Trainer
from difftool.training.step.record import Record

MOST_OWN = 256
"""Pictures that are measured of a set's own validation split, at most."""


def hold_out(dataset: Dataset, wanted: float | None) -> tuple[Dataset, Dataset | None]:
    """The pictures to learn from, and those that are only measured: the same whatever the seed.

    `wanted`: a share below 1, or a count; None = the set's own validation split, if it has one.
    UsageError if nothing would be left to learn from.
    """
    if wanted:
        return dataset.split(wanted)
    held = dataset.held_out if wanted is None else None
    if held is not None and len(held) > MOST_OWN:
        held = held.split(MOST_OWN)[1]
    return dataset, held


def count_held_out(dataset: Dataset, wanted: float | None) -> int:
    """How many pictures `hold_out` sets apart, of a share about; none of them is looked at."""
    if wanted is not None:
        return round(wanted if wanted >= 1 else wanted * len(dataset))
    return min(len(dataset.held_out or ()), MOST_OWN)


class Validation:
    """Measures a trainer's loss on held-out pictures."""

    def __init__(self, trainer: Trainer, held: Dataset, samples: int, cache: Path):
        """samples: of a measure; of few pictures several each, at other noise levels, of many only
        so many of them. cache: a folder for their latents."""
        self.trainer, self.cache = trainer, cache
        if samples < len(held):
            held = Subset(held, sorted(rng.permutation(0, 0, len(held))[:samples].tolist()))
        self.dataset, self.samples = held, samples
        whole = trainer.batches.conditioning._replace(drop=0.0)
        self.batches = replace(trainer.batches, dataset=held, flip=False, conditioning=whole)
        self.latents: Latents | None = None
        """Of the held-out pictures, once they are encoded."""

    @torch.no_grad()
    def measure(self, progress: Progress = silent) -> dict[str, Any]:
        """Loss, its terms and the loss by noise level, for metrics.jsonl, of the weights as they
        are: the caller puts the averaged ones and evaluation mode in place."""
        trainer, model = self.trainer, self.trainer.model
        objective, size = trainer.objective, trainer.config.batch_size
        assert size
        if self.latents is None:
            self.latents = objective.encode(self.dataset, self.cache, progress, flip=False)
        record, wanted = Record(model.device), self.latents is None
        with progress("measuring held-out pictures", self.samples) as shown:
            for first in range(0, self.samples, size):
                # Whole batches, wrapping around: a contrast depends on how many there are.
                batch = self.batches.draw(first, size, pictures=wanted)
                enabled = trainer.autocast is not None
                with torch.autocast(model.device.type, trainer.autocast, enabled):
                    record.add(objective.held_out(batch, self.latents))
                shown.update(min(first + size, self.samples))
        report = record.report()
        levels = {"levels": report["levels"]} if report["levels"] else {}
        return {"loss": report["loss"], **report["terms"], **levels}

    def bits(self, progress: Progress = silent) -> dict[str, Any] | None:
        """Bits per dimension of as many, after `measure`; None where the part has none."""
        model, size, found = self.trainer.model, self.trainer.config.batch_size, []
        assert size
        with progress("measuring the likelihood", self.samples) as shown:
            for first in range(0, self.samples, size):
                batch = self.batches.draw(first, size, pictures=self.latents is None)
                if (some := self.trainer.objective.bits(batch, self.latents)) is None:
                    return None
                found.append(some)
                shown.update(min(first + size, self.samples))
        mean, error = mean_bits(found)
        if not math.isfinite(mean + error):
            return None  # of too few pictures for any level to be known
        return {"mean": mean, "error": error, "of": "latents" if model.codec.learned else "pixels"}


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
