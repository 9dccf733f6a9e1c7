"""Aspect buckets: pictures of many shapes, trained in batches of one shape each. Torch-free.

As NovelAI and kohya's trainer do it: every bucket has about the area of a square picture, sides
are multiples of a step, and a picture goes to the bucket of the nearest aspect ratio, is scaled to
cover it and loses what stands out. Nearest by the ratio's logarithm, so that upright and lying
pictures are treated alike (theirs is the plain difference).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from difftool.errors import UsageError

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Buckets:
    """The buckets of about size x size pixels.

    step: sides are multiples of it. max_aspect: longest side over shortest. upscale: whether
    pictures smaller than their bucket are enlarged (kohya's default); otherwise such a picture has
    a bucket of its own size, rounded down to the step.
    """

    size: int
    step: int = 64
    max_aspect: float = 4.0
    upscale: bool = True

    def __post_init__(self) -> None:
        if self.step < 1 or self.size < self.step:
            why = f"size {self.size}, step {self.step}"
            raise UsageError("there are no buckets smaller than their step", why)
        if not 1 <= self.max_aspect <= 64:
            raise UsageError(
                f"the longest aspect ratio of buckets is 1 to 64, not {self.max_aspect}"
            )

    @cached_property
    def table(self) -> tuple[Size, ...]:
        """All buckets, from upright to lying: for each side, the largest other one that keeps the
        area."""
        found = set()
        for short in range(self.step, self.size + 1, self.step):
            long = self.size**2 // short // self.step * self.step
            if long <= short * self.max_aspect:
                found |= {(short, long), (long, short)}
        square = self.size // self.step * self.step
        best: dict[float, Size] = {}
        for width, height in sorted(found | {(square, square)}):
            best[width / height] = width, height  # of equal shapes the largest
        return tuple(best[ratio] for ratio in sorted(best))

    @cached_property
    def _ratios(self) -> list[float]:
        return [math.log(width / height) for width, height in self.table]

    def of(self, picture: Size) -> Size:
        """The bucket of a picture of that size."""
        width, height = picture
        ratio = math.log(width / height)
        above = bisect_left(self._ratios, ratio)
        near = range(max(above - 1, 0), min(above + 1, len(self.table)))
        best = self.table[min(near, key=lambda i: abs(self._ratios[i] - ratio))]
        if self.upscale or (width >= best[0] and height >= best[1]):
            return best
        own = [max(side // self.step * self.step, self.step) for side in picture]
        return min(own[0], best[0]), min(own[1], best[1])

    def lines(self, pictures: Iterable[Size]) -> list[str]:
        """How pictures of these sizes are spread, for the user: a line a bucket that is used."""
        pictures = list(pictures)
        members = Counter(map(self.of, pictures))
        lines = [
            f"buckets: {len(members)} of about {self.size}x{self.size}, "
            f"sides in multiples of {self.step}"
        ]
        for (width, height), n in sorted(members.items(), key=lambda item: item[0][0] / item[0][1]):
            lines.append(f"  {width}x{height}: {n} image{'s' if n > 1 else ''}")
        small = sum(w < b[0] or h < b[1] for w, h in pictures for b in (self.of((w, h)),))
        if small:
            fate = "are enlarged" if self.upscale else f"are smaller than {self.step} and enlarged"
            lines.append(f"  {small} of {len(pictures)} {fate}")
        return lines


class Drawn(NamedTuple):
    """One batch: pictures of one bucket."""

    bucket: Size
    passes: list[int]
    """How often each picture's bucket had been gone through before: the epoch of the sample."""
    indices: list[int]


class Schedule:
    """The batches of an endless run by their number, each of one bucket and full.

    Every bucket is an endless stream of its own pictures, in a new order each pass, cut into
    batches: no remainder is dropped or padded, a last half batch is filled from the next pass. The
    streams are merged so that each is as far along as the others: batch j of a bucket of n pictures
    is due at (j + 1/2) * batch_size / n passes. So at any time every picture has been seen equally
    often, to one pass and half a batch, however small its bucket, and any batch can be had without
    those before it.

    buckets: of every sample of the set. permute(pass, n): the order, of n, of that pass.
    """

    def __init__(
        self,
        buckets: Sequence[Size],
        batch_size: int,
        permute: Callable[[int, int], Sequence[int]],
    ):
        self.batch_size, self._total = batch_size, len(buckets)
        members: dict[Size, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self._members = {bucket: members[bucket] for bucket in sorted(members)}
        keep = 2 * len(members) + 2
        self._order = lru_cache(keep)(lambda number, n: list(permute(number, n)))
        self._batches = lru_cache(2)(self._due)

    def before(self, epoch: int) -> int:
        """Batches due before that epoch begins; an epoch is a pass of the whole set."""
        return sum(self._begun(epoch, len(members)) for members in self._members.values())

    def __getitem__(self, number: int) -> Drawn:
        epoch = number * self.batch_size // self._total  # to within half a batch of each bucket
        while self.before(epoch) > number:
            epoch -= 1
        while self.before(epoch + 1) <= number:
            epoch += 1
        bucket, batch = self._batches(epoch)[number - self.before(epoch)]
        members = self._members[bucket]
        places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        passes = [place // len(members) for place in places]
        orders = {n: self._order(n, len(members)) for n in dict.fromkeys(passes)}
        chosen = [orders[place // len(members)][place % len(members)] for place in places]
        return Drawn(bucket, passes, [members[i] for i in chosen])

    def _begun(self, epoch: int, n: int) -> int:
        """Batches of a bucket of n pictures with (j + 1/2) * batch_size / n < epoch."""
        return max(0, -((self.batch_size - 2 * n * epoch) // (2 * self.batch_size)))

    def _due(self, epoch: int) -> list[tuple[Size, int]]:
        """The batches that are due in an epoch, in order."""
        due = [
            ((2 * batch + 1) / len(members), bucket, batch)
            for bucket, members in self._members.items()
            for batch in range(
                self._begun(epoch, len(members)), self._begun(epoch + 1, len(members))
            )
        ]
        return [(bucket, batch) for _, bucket, batch in sorted(due)]
