"""Values that are to be tried in turn: "10,20", "10-30:10", "euler,heun". Torch-free.

Each function takes what was typed or passed and gives one or more values, each by the text that
tells it from the others.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from difftool.errors import UsageError

MAX_VALUES = 1000
"""Of one range."""

Listed = Callable[[Any], Mapping[str, Any]]


class Several(dict[str, Any]):
    """The values of an option that are to be tried in turn, two or more, by the texts that tell
    them from each other."""


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(
    rf"({_NUMBER})\s*-\s*({_NUMBER})\s*(?::\s*({_NUMBER})|\(\s*({_NUMBER})\s*\)|\[\s*(\d+)\s*\])?"
)
"""1-9, 1-9:2, and as A1111 writes it 1-9 (+2) and 1-9 [5], which is five values."""


def numbers(given: Any) -> dict[str, Any]:
    """Numbers of "10,20", of the ranges "1-5", "1-9:2" and "0-1[5]", or of a list."""
    parts = given if isinstance(given, list | tuple) else [given]
    if isinstance(given, str) and ("," in given or _RANGE.fullmatch(given.strip())):
        parts = [value for part in given.split(",") for value in _values(part.strip())]
    return {f"{part:g}" if isinstance(part, float) else str(part): part for part in parts}


def _values(text: str) -> Iterator[Any]:
    """The numbers of one part; the text where it is none."""
    match = _RANGE.fullmatch(text)
    if _is_number(text):
        yield _plain(Decimal(text)) if math.isfinite(float(text)) else float(text)
    elif match is None:
        yield text
    else:
        yield from map(_plain, _ranged(match))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ranged(match: re.Match[str]) -> Iterator[Decimal]:
    first, last = Decimal(match[1]), Decimal(match[2])
    count = int(match[5]) if match[5] else None
    step = Decimal(match[3] or match[4] or 1)
    hint = "give 10,20, or 10-30:10, which is 10,20,30"
    if last < first or step <= 0 or count == 0:
        raise UsageError(f'"{match[0]}" is no range', hint=hint)
    if first % 1 and not (match[3] or match[4] or match[5]):
        raise UsageError(f'the range "{match[0]}" has no step', hint="0.2-0.8:0.2 has one")
    if count is None:
        count = int((last - first) / step) + 1
    elif count > 1:
        step = (last - first) / (count - 1)
    if count > MAX_VALUES:
        raise UsageError(f'"{match[0]}" is {count} values', f"the limit is {MAX_VALUES}")
    return (first + step * i for i in range(count))


def _plain(value: Decimal) -> int | float:
    return int(value) if value % 1 == 0 else round(float(value), 12)


def names(given: Any) -> dict[str, Any]:
    """Values of "euler, heun", or of a list; whole where it is the path of something."""
    if isinstance(given, str) and not os.path.exists(given):
        given = [part.strip() for part in given.split(",")]
    return {str(part): part for part in (given if isinstance(given, list | tuple) else [given])}


def sizes(given: Any) -> dict[str, Any]:
    """Values of "512x512,768x512", or of a list of pairs; a pair of numbers is one of them."""
    if isinstance(given, list | tuple) and all(isinstance(side, int | float) for side in given):
        return {str(given): given}
    found = names(given)
    return found if isinstance(given, str) else {_pair(part): part for part in found.values()}


def _pair(part: Any) -> str:
    return "x".join(map(str, part)) if isinstance(part, list | tuple) else str(part)


def weighted(given: Any) -> dict[str, Any]:
    """A file at several weights, "ink.safetensors:0.4,0.8", or several files; "none" is none."""
    if not isinstance(given, str) or os.path.exists(given):
        return {str(given): given}
    found: dict[str, Any] = {}
    file = ""
    for part in map(str.strip, given.split(",")):
        head, _, weight = part.rpartition(":")
        file = head if head and _is_number(weight) else file
        whole = f"{file}:{part}" if file and _is_number(part) else part
        found[whole] = whole
    return found


def replacements(given: Any) -> dict[str, Any]:
    """What is looked for and what takes its place, pairs of "red,blue,green": the first is looked
    for, and is one of the values too. Quotes keep a comma, as in CSV."""
    hint = 'give "red,blue,green": the first is in the prompt, the others take its place'
    if isinstance(given, str):
        try:
            given = next(csv.reader([given], skipinitialspace=True), [])
        except csv.Error as error:
            raise UsageError(f'--replace "{given}" is no list', str(error), hint) from None
    first, *others = [text.strip() for text in map(str, given)] or [""]
    if not first or not others:
        raise UsageError(f'--replace "{first}" has nothing to put in its place', hint=hint)
    return {text: (first, text) for text in (first, *others)}
