"""Captions without pictures: a text file, a caption a line. Torch-free at import."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from difftool.config.schema import DataConfig
from difftool.data.buckets import Size
from difftool.data.captions import Syntax
from difftool.data.dataset import Audit, Dataset
from difftool.data.listing import MAX_CAPTION, MAX_METADATA, sound_text
from difftool.errors import InputError
from difftool.storage.read import read_bytes
from difftool.text.dice import Dice

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".txt"


class CaptionLines(Dataset):
    """What a model can be distilled on: its teacher draws the pictures."""

    kind = "text"
    pictured = False

    def __init__(self, path: Path, config: DataConfig | None = None):
        """InputError for a file that cannot be read, or has no caption, or one that is too long."""
        config = config or DataConfig()
        text = sound_text(read_bytes(path, MAX_METADATA), str(path))
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not self.lines:
            raise InputError(f"{path} has no captions", hint="write one a line")
        for number, line in enumerate(text.splitlines(), 1):
            if len(line.encode()) > MAX_CAPTION:
                raise InputError(f"{path} line {number} is too long for a caption")
        self.syntax = Syntax(config.wildcards, config.shuffle_captions, config.keep_tokens)
        self.audit = Audit(str(path), 0, {path.name: len(self.lines)})
        self.audit.notes.append("captions alone: the model that is distilled draws the pictures")

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def fingerprint(self) -> str:
        """Hash of the captions."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def draw(self, indices: Sequence[int], size: int | Size, keys: Sequence[int]) -> Tensor:
        """There are none."""
        raise TypeError("captions alone have no pictures")

    def caption(self, index: int, key: int) -> str:
        """A line, wildcards drawn by the key."""
        return self.syntax.draw((self.lines[index],), Dice("caption", index, key))
