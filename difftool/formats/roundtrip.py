"""What another format has no place for, kept beside it as JSON for difftool alone. Torch-free.

A preset that is derived from another format's files is completed by it, section by section, and
only while those files still say what they said when it was written: whoever has edited them is
right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difftool.diffusion.path import Discrete
from difftool.diffusion.path import Path as NoisePath
from difftool.errors import InputError
from difftool.formats.model_source import LAYOUT, Evidence, ModelSource
from difftool.version import __version__

SCHEMA = 1
NO_COUNTERPART = ("name", "about", "classes", "train")
"""Sections of a preset that no other tool's file speaks of."""


def make_extra(
    source: ModelSource, derived: Mapping[str, Any], keep_metadata: bool
) -> dict[str, Any]:
    """What is kept of a model from whose other files `derived` will be read."""
    values = source.values
    extra = {
        "schema": SCHEMA,
        "version": __version__,
        "plain": {name: values[name] for name in NO_COUNTERPART},
        "sections": {
            name: {"was": derived[name], "value": values[name]}
            for name in differing(derived, values)
        },
        "weights": list(source.weights[:1]),
        "tokenizer": source.tokenizer_json,
        "metadata": source.metadata if keep_metadata else {},
    }
    if keep_metadata and LAYOUT in source.configs:
        extra[LAYOUT] = source.configs[LAYOUT]
    return extra


def differing(derived: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Sections that other files give, and give otherwise."""
    return [n for n in derived if n not in NO_COUNTERPART and derived[n] != values[n]]


def same_path(one: NoisePath, other: NoisePath) -> bool:
    """Whether two noise paths are the same at the entries of their tables."""
    if isinstance(one, Discrete) and isinstance(other, Discrete) and one.steps == other.steps:
        return all(one.level(t) == other.level(t) for t in range(one.steps))
    return one == other


def checked_extra(extra: dict[str, Any], where: str) -> dict[str, Any]:
    """The same content; InputError if it is not what `make_extra` makes."""
    match extra:
        case {"schema": int(schema), **_rest} if schema > SCHEMA:
            raise InputError(f"{where} needs a newer difftool", f"schema {schema}")
        case {
            "schema": 1, "plain": dict(), "sections": dict(sections), "metadata": dict(metadata),
            "weights": list(weights), "tokenizer": str() | None,
        }:  # fmt: skip
            texts = all(isinstance(text, str) for text in (*weights, *metadata.values()))
            if texts and weights and all(_is_section(section) for section in sections.values()):
                return extra
    raise InputError(f"{where} is malformed")


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"was", "value"}


def with_extra(
    values: dict[str, Any], extra: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[Evidence]]:
    """Derived values, completed by what is kept beside them."""
    if not extra:
        return values, []
    values = values | extra["plain"]
    notes = [Evidence(where, f"preset {values['name']}")]
    for name, section in extra["sections"].items():
        if values.get(name) == section["was"]:
            values[name] = section["value"]
        else:
            notes.append(Evidence(where, f"its {name} was passed over: the model was edited"))
    return values, notes
