"""Pictures cut into batches that are made together. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from difftool.config.schema import SampleConfig
from difftool.pipeline.upscale import enlarged
from difftool.sampling.events import Existing, Failure, Note
from difftool.sampling.sample import Sample

MAX_BATCH = 16
BATCH_PIXELS = 1 << 20
WINDOW = 4.0
"""So many batches' worth of pictures wait for each other at most."""
OTHER = 1 / 256
"""What an entry that is no picture to make counts for of a batch."""

Planned = Sample | Failure | Existing | Note


def default_batch(settings: SampleConfig) -> int:
    """How many images of that size are made together when nothing is asked for."""
    width, height = enlarged(settings.size, settings.hires)
    return max(1, min(MAX_BATCH, BATCH_PIXELS // (width * height)))


@dataclass(eq=False)
class _Group:
    """Pictures that are made alike, and how many of them are made together."""

    like: tuple[object, ...]
    limit: int
    samples: list[Sample]


Together = tuple[list[Sample], list[Planned]]
"""Pictures to make together; and the entries, in their order, that wait for no other then."""


def batches(
    entries: Iterable[Planned | None], room: Callable[[SampleConfig], int]
) -> Iterator[Together]:
    """The pictures among entries in batches, each made alike and no more than `room` says.

    Pictures of one kind are gathered from among others, as far ahead as WINDOW says, and what is
    made waits for what comes before it. None says that the next entry has to be waited for, so what
    there is goes on.
    """
    queue: deque[tuple[float, Planned]] = deque()
    groups: list[_Group] = []  # that of the first picture that is to be made comes first

    def batch(group: _Group | None = None) -> Together:
        if group:
            groups.remove(group)
        first, due = groups[0].samples[0] if groups else None, []
        while queue and queue[0][1] is not first:
            due.append(queue.popleft()[1])
        return group.samples if group else [], due

    for entry in entries:
        if entry is None:
            while groups:
                yield batch(groups[0])
        elif isinstance(entry, Sample):
            like = _alike(entry)
            group = next((group for group in groups if group.like == like), None)
            if group is None:
                groups.append(group := _Group(like, room(entry.plan.settings), []))
            group.samples.append(entry)
            queue.append((1 / group.limit, entry))
            if len(group.samples) >= group.limit:
                yield batch(group)
        else:
            queue.append((OTHER, entry))
            if not groups:
                yield batch()
        while sum(share for share, _ in queue) > WINDOW:
            yield batch(groups[0])
    while groups:
        yield batch(groups[0])


def _alike(sample: Sample) -> tuple[object, ...]:
    """What the pictures of a batch have in common."""
    given = (sample.input.init, sample.input.mask, sample.input.depth, sample.input.image)
    loras = [(each.lora.path, each.strength, each.text) for each in sample.loras]
    return (sample.plan.settings, loras, *(image is not None for image in given))
