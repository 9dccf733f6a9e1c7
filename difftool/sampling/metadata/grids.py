"""The chunk of a grid: those of its pictures, with what they have in common said once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EACH = "pictures"
"""Key of what each picture's own chunk says beside what all of them do."""


def folded(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What mappings have in common, once, with what each has beside it."""
    common = dict(chunks[0])
    for each in chunks[1:]:
        common = _common(common, each)
    return {**common, EACH: [_beside(each, common) for each in chunks]}


def unfolded(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mappings again."""
    common = {name: value for name, value in whole.items() if name != EACH}
    return [_laid(common, each) for each in whole[EACH]]


def _laid(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(common)
    for name, value in own.items():
        both = isinstance(value, Mapping) and isinstance(made.get(name), Mapping)
        made[name] = _laid(made[name], value) if both else value
    return made


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found[name] = _common(mine, theirs)
        elif mine == theirs and type(mine) is type(theirs):
            found[name] = mine
    return {name: found[name] for name in one if name in found}


def _beside(one: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in one.items():
        if name not in common:
            found[name] = value
        elif isinstance(value, Mapping) and (more := _beside(value, common[name])):
            found[name] = more
    return found
