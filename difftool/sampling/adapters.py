"""LoRAs and learned words that prompts name, found in folders and opened when they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from difftool.adapters.lora.algebra import Applied
from difftool.errors import InputError, UsageError, suggestion
from difftool.pipeline.model import Model
from difftool.pipeline.words import add_embeddings
from difftool.sampling.metadata.named import LORA_FOLDERS, files_below
from difftool.text.networks import NamedLora


class PromptAdapters:
    """What prompts may name beside what a model was loaded with."""

    def __init__(self, model: Model, lora_dir: Path | None, embedding_dir: Path | None):
        self.model, self.lora_dir, self.embedding_dir = model, lora_dir, embedding_dir
        self._opened: dict[tuple[Path, float, float | None], Applied] = {}
        self._refused: set[str] = set()

    # --- LoRAs -------------------------------------------------------------------------------

    def loras(
        self, named: Sequence[NamedLora], own: Sequence[tuple[Path, float]] | None = None
    ) -> tuple[Applied, ...]:
        """The LoRAs of a picture: its own, or else those of the model, and those that its prompt
        names.

        UsageError for one that is nowhere, InputError for one that does not fit.
        """
        base = self.model.base_loras
        if own is not None and list(own) != [(each.lora.path, each.strength) for each in base]:
            base = tuple(self._applied(path, strength, None) for path, strength in own)
        found = ((self._path(each.name), each.unet, each.text) for each in named)
        return (*base, *(self._applied(*each) for each in found))

    def _applied(self, path: Path, strength: float, text: float | None) -> Applied:
        key = path, strength, text
        if key not in self._opened:
            (opened,) = self.model.open_loras([(path, strength)])
            self._opened[key] = replace(opened, text=text)
        return self._opened[key]

    def _path(self, name: str) -> Path:
        """The file of a LoRA: of that path below a folder, else of that name, capitals aside."""
        for wanted in (name, name.casefold()):
            for known, path in self._files:
                if wanted in (known, Path(known).name, known.casefold(), path.stem.casefold()):
                    return path
        hint = suggestion(name, [path.stem for _, path in self._files]) if self._files else None
        where = f"{self.lora_dir}" if self.lora_dir else "lora, loras or models/Lora"
        what = f'there is no LoRA "{name}"'
        raise UsageError(what, f"it is not in {where}", hint or "--lora-dir DIR says where")

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        """The files that may be LoRAs, by their paths within their folder without an ending."""
        folders = [Path(name) for name in LORA_FOLDERS if name]
        return [
            pair for folder in (self.lora_dir, *folders) if folder for pair in files_below(folder)
        ]

    # --- words -------------------------------------------------------------------------------

    def add_words(self, *prompts: str) -> Iterator[str]:
        """Give the model the words of its folder that prompts have; what is to be said of them."""
        for path in self._new(" ".join(prompts)):
            given, alone = self.model.word_files
            try:
                add_embeddings(self.model, given, [*alone, path])
            except InputError as error:
                self._refused.add(path.stem.casefold())
                yield f"{path.stem} is drawn as words: {error.what}"

    def _new(self, text: str) -> Iterator[Path]:
        if self._pattern is None:
            return
        for name in dict.fromkeys(match[0].casefold() for match in self._pattern.finditer(text)):
            names = {known.casefold() for word in self.model.words for known in word.names}
            if name not in names | self._refused:
                yield self._words[name]

    @cached_property
    def _words(self) -> dict[str, Path]:
        files = files_below(self.embedding_dir) if self.embedding_dir else ()
        return {path.stem.casefold(): path for _, path in reversed([*files])}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        names = "|".join(map(re.escape, sorted(self._words, key=len, reverse=True)))
        return re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE) if names else None
