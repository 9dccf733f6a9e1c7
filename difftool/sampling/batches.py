"""Pictures cut into batches that are made together. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from difftool.config.schema import SampleConfig
from difftool.sampling.events import Failure, Note, Skipped
from difftool.sampling.picture import Picture

MAX_BATCH = 16
BATCH_PIXELS = 1 << 20

Entry = Picture | Failure | Skipped | Note


def default_batch(settings: SampleConfig) -> int:
    """How many images of that size are made together when nothing is asked for."""
    width, height = settings.size
    return max(1, min(MAX_BATCH, BATCH_PIXELS // (width * height)))


def batches(
    entries: Iterable[Entry | None], room: Callable[[SampleConfig], int]
) -> Iterator[list[Entry]]:
    """Entries in order, cut so that the pictures of each batch are made alike and are no more than
    `room` says. None says that the next entry has to be waited for, so what there is goes on."""
    batch: list[Entry] = []
    like: tuple[object, ...] = ()
    count = limit = 0
    for entry in entries:
        if isinstance(entry, Picture):
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


def _alike(picture: Picture) -> tuple[object, ...]:
    """What the pictures of a batch have in common."""
    given = (picture.input.init, picture.input.mask, picture.input.image)
    return (picture.plan.settings, *(image is not None for image in given))
