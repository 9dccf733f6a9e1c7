"""JSON from files of others, read strictly, and JSON for others, which has no NaN. Torch-free."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from difftool.errors import InputError
from difftool.storage.read import read_bytes

MAX_BYTES = 16 << 20
MAX_VALUES = 1_000_000


def parse_json(
    text: str | bytes, source: str, *, infinite: bool = False, lenient: bool = False
) -> Any:
    """The value of a JSON text; InputError, naming the source, if it is not sound.

    Refused: duplicate keys, NaN (and, unless `infinite`, infinities), nesting without end, more
    values than any honest file has, text that is not Unicode. lenient: NaN is null, as in what
    ComfyUI writes.
    """

    def constant(name: str) -> float | None:
        if infinite and name != "NaN":
            return float(name)
        if lenient:
            return None
        raise ValueError(f"{name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not (infinite or math.isfinite(value)):
            raise ValueError(f"{text} is too large a number")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # as Windows' editors save it
        if sum(map(text.count, "[{,")) > MAX_VALUES:  # at least: those within texts count too
            raise ValueError(f"it holds more than {MAX_VALUES} values")
        value = json.loads(
            text, object_pairs_hook=unique, parse_float=number, parse_constant=constant
        )
        escaped = json.dumps(value, ensure_ascii=False) if "\\u" in text else ""
        if not (is_unicode(text) and is_unicode(escaped)):
            raise ValueError("it holds half of a surrogate pair")
    except RecursionError:
        raise InputError(f"{source} is malformed", "it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{source} is malformed", str(error)) from None
    return value


def read_json(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a JSON file; InputError if it is not there, too large or malformed."""
    value = parse_json(read_bytes(path, MAX_BYTES), str(path), infinite=infinite)
    if not isinstance(value, dict):
        raise InputError(f"{path} is malformed", "it is not a JSON object")
    return value


def to_json(value: Any, **how: Any) -> str:
    """A value as JSON text, where a number that is not finite, which JSON lacks, is its name:
    "NaN", "Infinity". how: of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=str), **how)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: halves of surrogate pairs, which JSON can spell and
    which stand for undecodable bytes of command lines, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key that it has twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name!r}")
    return value
