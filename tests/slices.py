"""Products of parameters of which a slice is tested each time, and the rest with -m slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], every: Sequence[Any]) -> list[Any]:
    """Every one; those that are not among the quick ones are slow."""
    quick = [*quick]
    return [
        each
        if each in quick
        else pytest.param(*(each if isinstance(each, tuple) else [each]), marks=pytest.mark.slow)
        for each in every
    ]


def in_turn(*columns: Sequence[Any]) -> list[Any]:
    """Every combination. Of those that are quick each value of the longest column has one, with the
    values of the others in turn."""
    longest = max(map(len, columns))
    quick = {tuple(i % len(column) for column in columns) for i in range(longest)}
    places: list[tuple[int, ...]] = [()]
    for column in columns:
        places = [(*place, i) for place in places for i in range(len(column))]
    return [
        pytest.param(
            *(column[i] for column, i in zip(columns, place, strict=True)),
            marks=() if place in quick else pytest.mark.slow,
        )
        for place in places
    ]
