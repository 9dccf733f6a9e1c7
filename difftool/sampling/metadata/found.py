"""From what another tool's picture says to a request: what is understood is taken over, the rest is
listed. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from difftool.config.numbers import FINITE
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import spelled, split_spelling
from difftool.errors import InputError, UsageError
from difftool.registry import canonical
from difftool.sampling.metadata.named import (
    LORA_FOLDERS,
    MAX_HASHED,
    digest_of,
    files_in,
    lacking,
    lies_in,
)
from difftool.sampling.requests import NamedFile, Request, from_json
from difftool.sampling.settings import KEYS

NO_HASHES = ("e3b0c44298fc", "000000000000")
"""What tools write that could not read the file: the first is the hash of nothing."""


@dataclass
class Found:
    """What is found in a picture's metadata."""

    source: str
    """The picture."""
    asked: dict[str, Any] = field(default_factory=dict)
    """By keys of a line of JSON."""
    missed: list[tuple[str, str]] = field(default_factory=list)
    """See `Request.missed`."""
    loras: list[tuple[str, float]] = field(default_factory=list)
    made_by: str = ""
    """The tool."""
    model: str = ""
    """Name of the model."""
    named: list[NamedFile] = field(default_factory=list)
    """LoRAs of the name that links lead to, out of the folders that are looked through."""
    sought: list[NamedFile] = field(default_factory=list)
    """Those that are not there."""

    def miss(self, text: str, option: str = "") -> None:
        """List what is not taken over; `option` would ask for it."""
        self.missed.append((option, text))

    def lora(self, name: str, weight: float, digest: str = "") -> None:
        """A LoRA by its name and, where that is known, its hash."""
        stem = Path(name.replace("\\", "/")).name.removesuffix(".safetensors")
        digest = "" if digest in NO_HASHES else digest
        if path := self._file(stem, digest.lower()[:12]):
            self.loras.append((str(path), weight))
        elif path := next((path for path in self.links if path.stem == stem), None):
            self.named.append(NamedFile("lora", os.path.abspath(path), weight=weight))
        else:
            self.sought.append(NamedFile("lora", stem, digest.lower(), weight))
            self.miss(lacking(self.sought[-1]), "lora")

    def _file(self, stem: str, digest: str) -> Path | None:
        """The file of a LoRA: of that name, unless its hash is another, else of that hash."""
        for path in self.files:
            if path.stem == stem and (not digest or digest_of("lora", path).startswith(digest)):
                return path
        others = self.files[:MAX_HASHED] if digest else []
        return next((p for p in others if digest_of("lora", p).startswith(digest)), None)

    @cached_property
    def files(self) -> list[Path]:
        """The files that may be LoRAs, those of the working folder first."""
        return [path for path in self._there if self._lies_here(path)]

    @cached_property
    def links(self) -> list[Path]:
        """Of those, the links out of both folders."""
        return [path for path in self._there if not self._lies_here(path)]

    @cached_property
    def _there(self) -> list[Path]:
        return files_in(self._places, LORA_FOLDERS, ".safetensors")

    @property
    def _places(self) -> tuple[Path, Path]:
        return Path(), Path(self.source).parent

    def _lies_here(self, path: Path) -> bool:
        return any(lies_in(path, place) for place in self._places)

    def started_from(self, strength: Any = None) -> None:
        """It was made from a picture, which the metadata do not hold."""
        if strength is not None:
            self.asked["denoising_strength"] = strength
        self.miss("the picture that it was started from: --init", "init")

    def request(self) -> Request:
        """The request; InputError for values that are not sound."""
        asked = {key: _whole(key, value) for key, value in self.asked.items()}
        for key, known in (("sampler_name", split_spelling), ("scheduler", _schedule)):
            try:
                known(str(asked.get(key) or "euler"))
            except UsageError:
                self.miss(f"{key.removesuffix('_name')} {asked.pop(key)}")
        try:
            if asked.get("seed") is None:
                raise UsageError("it has no seed")
            for path, weight in self.loras:
                FINITE.check(weight, f"{path}: the weight")
            request = from_json(asked)
        except UsageError as error:
            what = f"what {self.source} says of itself cannot be read"
            raise InputError(what, ": ".join(filter(None, (error.what, error.why)))) from None
        missed, settings = tuple(dict.fromkeys(self.missed)), spelled(request.settings)
        sides = [settings.pop(side) for side in ("width", "height") if side in settings]
        if len(sides) == 2:
            settings["size"] = tuple(sides)
        return replace(
            request, settings=settings, missed=missed, loras=tuple(self.loras),
            named=tuple(self.named), sought=tuple(self.sought), made_by=self.made_by,
            model=self.model,
        )  # fmt: skip


def _schedule(name: str) -> None:
    if canonical(name) != "automatic" and name != "euler":
        GRIDS.resolve(name)


def _whole(key: str, value: Any) -> Any:
    """Whole numbers as such: some tools write 20.0, or "20"."""
    number = KEYS[key].type in (int, float) or key == "seed"
    if number and isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.\d*)?\s*", value):
        value = float(value) if "." in value else int(value)
    whole = KEYS[key].type is int or key == "seed"
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def needs_a1111(*prompts: str) -> bool:
    """Whether prompts read otherwise by A1111's syntax than without one: brackets, escapes, breaks
    and whatever may be longer than a text encoder reads at once."""
    return any(len(p.encode()) > 75 or re.search(r"[()\[\]\\]|\bBREAK\b", p) for p in prompts)


def table(found: Found, values: Mapping[str, Any], names: Mapping[str, str], ignored: str) -> None:
    """Take over values by their names: {theirs: a key of a line of JSON}; what has no name is
    listed, unless it is ignored (names with spaces between) or says nothing."""
    for name, value in values.items():
        if name in names:
            if value is not None and value != "":
                found.asked.setdefault(names[name], value)
        elif value not in (None, "", 0, False, [], {}) and name not in ignored.split():
            found.miss(f"{name} {value if isinstance(value, int | float) else str(value)[:40]}")
