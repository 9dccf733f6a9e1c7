"""When a run measures and shows what it has learned, and by how much. Torch-free.

What is no step takes a small share of the run's time: the first sheet comes early, the next ones at
growing intervals, and they are small where a picture costs as much as steps do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from difftool.config.schema import Part
from difftool.devices import ByDevice

SHARE = 0.05
"""Of a run's work, for all measures and sheets together."""
FIRST, FIRST_SECONDS = 50, 60.0
"""The first sheet comes after so many steps, or so much training if that is earlier."""
NOMINAL = ByDevice(cpu=5e10, cuda=2e13, mps=2e12)
"""Floating-point operations a second that a slow device of a kind does, so that what is chosen does
not depend on how fast this one happens to be."""
WITHOUT_SHEETS: tuple[Part, ...] = ("clip", "prior")
"""Parts that make no pictures."""
FREE_SECONDS = 2.0
"""What takes no longer, all together, on such a device needs no share."""


class Evaluation(NamedTuple):
    """How often a run is measured and shown, and by how much."""

    every: int | None = None
    """Steps between two; 0 = never, None = at growing intervals."""
    growth: float = 1.5
    """The step of each, relative to that of the one before, where `every` is None."""
    pictures: int = 16
    """On a sheet; 0 = there is none."""
    samples: int = 256
    """Of held-out pictures in a measure, at least; 0 = nothing is measured."""
    share: float = 0.0
    """What they are expected to take of the run's time."""

    def is_due(self, step: int, last: int, shown: int, seconds: float) -> bool:
        """Whether to measure and show after a step of a run of `last`. shown: the step of the one
        before, 0 = there was none; seconds: how long training has gone on."""
        if self.every is not None:
            return bool(self.every) and (step % self.every == 0 or step == last)
        if step == last:
            return True
        if not shown:
            return step >= FIRST or seconds >= FIRST_SECONDS
        return step >= self.growth * shown

    def count(self, steps: int, first: int = FIRST) -> int:
        """How many there are in a run of that many steps; the first after `first` of them."""
        if self.every is not None:
            return math.ceil(steps / self.every) if self.every else 0
        if first >= steps:
            return 1
        return 2 + math.floor(math.log(steps / first) / math.log(self.growth))

    def words(self, held: int) -> str:
        """What is planned, for the user."""
        if self.every == 0:
            return "no sheets and no measures"
        parts = []
        if self.pictures:
            parts.append(f"sheets of {self.pictures}")
        if held and self.samples:
            parts.append(f"measures of {self.samples} held-out samples")
        if not parts and self.samples:
            return "nothing: it makes no pictures, and none are held out"
        if not parts:
            return "none: one would take longer than they may"
        when = f"every {self.every} steps" if self.every else "soon, then at growing intervals"
        return f"{' and '.join(parts)}, {when}; {self.share:.0%} of the time"


class Work(NamedTuple):
    """Floating-point operations."""

    step: float
    """Of a step of the optimiser."""
    picture: float
    """Of a picture on a sheet."""
    sample: float
    """Of a held-out sample."""


SIZES = (
    (1, 1, 1.5), (1, 1, 2), (1 / 2, 1 / 2, 2), (1 / 4, 1 / 4, 2), (1 / 4, 1 / 4, 4),
    (1 / 8, 1 / 8, 4), (1 / 16, 1 / 16, 4), (1 / 16, 1 / 16, 16), (1 / 16, 1 / 16, 1e9),
)  # fmt: skip
"""What is tried in turn: pictures and samples relative to all, growth."""


def plan_evaluation(
    steps: int,
    work: Work,
    device: str,
    *,
    every: int | None = None,
    held: int = 0,
    growth: float | None = None,
) -> Evaluation:
    """The most that takes no more than SHARE of a run of that many steps. `every`, where it is
    given, stands, and at least a picture is shown. held: how many pictures are held out. growth:
    of intervals, at most; measures by which a run is stopped are made in any case."""
    full = Evaluation(every)
    free = FREE_SECONDS * NOMINAL[device]
    first = round(max(1, min(FIRST, FIRST_SECONDS * NOMINAL[device] / max(work.step, 1))))
    total = max(steps * work.step, 1)
    chosen = full
    for chosen in _sizes(full, held, growth):
        sides = chosen.pictures * work.picture + (chosen.samples * work.sample if held else 0)
        cost = chosen.count(steps, first) * sides
        chosen = chosen._replace(share=cost / (total + cost))
        if cost <= max(SHARE * total, free):
            return chosen
    return chosen if every or growth else full._replace(pictures=0, samples=0)


def _sizes(full: Evaluation, held: int, most: float | None) -> Iterator[Evaluation]:
    for pictures, samples, growth in SIZES:
        yield full._replace(
            pictures=max(1, round(pictures * full.pictures)),
            samples=max(full.samples, held) if samples == 1 else round(samples * full.samples),
            growth=min(growth, most or growth),
        )
