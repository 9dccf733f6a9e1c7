"""Numbers from outside: finite, and within their range. One check of flags, lines of JSON, presets
and configurations of models. Torch-free.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

from difftool.errors import UsageError


class Within(NamedTuple):
    """What a number must be. In the annotation of a field it says so of every number there."""

    low: float | None = None
    """The smallest value."""
    high: float | None = None
    """The largest value."""
    above: float | None = None
    """What it must be greater than."""
    below: float | None = None
    """What it must be less than."""
    infinite: bool = False
    """Whether infinities are values too; NaN is none."""

    def check(self, given: int | float, called: str) -> None:
        """UsageError, in which the number is called so, if it is not finite or not within."""
        if isinstance(given, float) and not math.isfinite(given):
            if math.isnan(given) or not self.infinite:
                raise UsageError(f"{called} {given} is not a finite number")
        low, high = self.low, self.high
        text = _text(given)
        if self.above is not None and given <= self.above:
            what = "positive" if self.above == 0 else f"above {_text(self.above)}"
            raise UsageError(f"{called} {text} is not {what}")
        if self.below is not None and given >= self.below:
            raise UsageError(f"{called} {text} is not below {_text(self.below)}")
        if low is not None and high is not None and not low <= given <= high:
            raise UsageError(f"{called} {text} is not a number from {_text(low)} to {_text(high)}")
        if low is not None and given < low:
            counts = low == 1 and isinstance(given, int)
            what = "a positive number" if counts else f"at least {_text(low)}"
            raise UsageError(f"{called} {text} is not {what}")
        if high is not None and given > high:
            raise UsageError(f"{called} {text} is more than {_text(high)}")


def _text(number: int | float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def annotated(hint: Any) -> Within:
    """What an annotation says of its numbers."""
    return next((said for said in get_args(hint) if isinstance(said, Within)), FINITE)


FINITE = Within()
INFINITE = Within(infinite=True)
COUNT = Within(low=1)
NOT_NEGATIVE = Within(low=0)
POSITIVE = Within(above=0)
SHARE = Within(low=0, high=1)
SIDE = Within(low=1, high=16_384)
"""Of a picture, in pixels."""
WIDTH = Within(low=1, high=1 << 20)
"""Of a layer of a network."""
DEPTH = Within(low=0, high=1000)
"""Of a network, in blocks or layers."""
SEED = Within(low=0, high=2**64 - 1)
