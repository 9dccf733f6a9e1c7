"""Pictures cut into batches that are made together. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from difftool.config.schema import SampleConfig
from difftool.pipeline.upscale import enlarged
from difftool.sampling.events import Existing, Failure, Note
from difftool.sampling.sample import Sample

MAX_BATCH = 16
BATCH_PIXELS = 1 << 20

Planned = Sample | Failure | Existing | Note


def default_batch(settings: SampleConfig) -> int:
    """How many images of that size are made together when nothing is asked for."""
    width, height = enlarged(settings.size, settings.hires)
    return max(1, min(MAX_BATCH, BATCH_PIXELS // (width * height)))


def batches(
    entries: Iterable[Planned | None], room: Callable[[SampleConfig], int]
) -> Iterator[list[Planned]]:
    """Entries in order, cut so that the pictures of each batch are made alike and are no more than
    `room` says. None says that the next entry has to be waited for, so what there is goes on."""
    batch: list[Planned] = []
    like: tuple[object, ...] = ()
    count = limit = 0
    for entry in entries:
        if isinstance(entry, Sample):
            if count and _alike(entry) != like:
                yield batch
                batch, count = [], 0
            like, limit = _alike(entry), room(entry.plan.settings)
            count += 1
        if entry is not None:
            batch.append(entry)
        if batch and (not count or count >= limit or entry is None):
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _alike(sample: Sample) -> tuple[object, ...]:
    """What the pictures of a batch have in common."""
    given = (sample.input.init, sample.input.mask, sample.input.depth, sample.input.image)
    loras = [(each.lora.path, each.strength, each.text) for each in sample.loras]
    return (sample.plan.settings, loras, *(image is not None for image in given))
