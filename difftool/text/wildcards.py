"""Files of wildcards: what __name__ stands for in a prompt. Torch-free.

    colours.txt           a text a line, of which {a|b}, __other__ and 0.5::weights are read
    animals/wild.txt      __animals/wild__
    all.yaml, all.json    lists by name, or by names within names: __animals/wild__ too

Blank lines and lines that # opens are left out. A name may be a pattern: __animals/*__.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from difftool.storage.read import read_text
from difftool.storage.yaml import parse_yaml
from difftool.text.dynamic import Weighted

MAX_BYTES = 1 << 26
_WEIGHT = re.compile(r"(\d+\.\d+|\d+\.|\.\d+|\d+)::(.*)", re.DOTALL)


class Wildcards:
    """The wildcards below a folder; None: there are none."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._read: dict[str, Weighted] = {}

    def lines(self, name: str) -> Weighted:
        """The texts of a name or a pattern, sorted, each once; a file's weights go with them.

        InputError for a file that cannot be read.
        """
        name = re.sub(r"[\\/]+", "/", name.strip()).strip("/")
        if name not in self._read:
            found: dict[str, float] = {}
            for known, where in self.names.items():
                if known == name or fnmatchcase(known, name):
                    for weight, text in self._texts(known, where):
                        found.setdefault(text, weight)
            self._read[name] = [(found[text], text) for text in sorted(found)]
        return self._read[name]

    @cached_property
    def names(self) -> dict[str, Any]:
        """What there is: the file of each name, or its list in one."""
        found: dict[str, Any] = {}
        for path in self._files():
            relative = path.relative_to(self.folder or Path()).with_suffix("")
            name = relative.as_posix()
            if path.suffix == ".txt":
                found[name] = path
                continue
            values = parse_yaml(read_text(path, MAX_BYTES), str(path))
            above = name.rpartition("/")[0]
            found |= dict(_lists(values, [above] if above else [], name))
        return found

    def _files(self) -> Iterator[Path]:
        for folder, folders, files in os.walk(self.folder) if self.folder else ():
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if name.endswith((".txt", ".yaml", ".yml", ".json")):
                    yield Path(folder, name)

    def _texts(self, name: str, where: Any) -> Iterator[tuple[float, str]]:
        lines = where
        if isinstance(where, Path):
            lines = read_text(where, MAX_BYTES).splitlines()
        for line in map(str.strip, lines):
            if line and not line.startswith("#"):
                weighted = _WEIGHT.fullmatch(line)
                yield (float(weighted[1]), weighted[2].strip()) if weighted else (1.0, line)


def _lists(values: Any, above: list[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """The lists in a structure by their names; a list that has no key is called as its file."""
    if isinstance(values, dict):
        for key, value in values.items():
            inner = [*above, str(key)]
            yield from _lists(value, inner, "/".join(inner))
    elif isinstance(values, list):
        yield name, [text for value in values if (text := _text(value))]
    elif values is not None:
        yield name, [str(values)]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        text = str(value.get("text") or value.get("content") or "")
        return f"{value['weight']}::{text}" if "weight" in value and text else text
    return "" if value is None else str(value)
