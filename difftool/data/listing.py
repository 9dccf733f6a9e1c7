"""The pictures of one split of a dataset and the files around them. Torch-free."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from difftool.config.schema import DataConfig
from difftool.data.archive import Files
from difftool.data.dataset import Audit
from difftool.data.phrases import count
from difftool.errors import InputError, unreadable
from difftool.storage.strict_json import is_unicode, unique

MAX_CAPTION = 64 << 10
MAX_METADATA = 1 << 30
MAX_ROWS, ROWS_EACH = 100_000, 20
"""Lines that a table may have, or so many a picture that is there if that is more."""
MAX_VALUES, VALUES_EACH = 1_000_000, 1000
"""Values that a JSON file of captions may have, likewise."""


@dataclass
class Listing:
    """Usable pictures below one folder of the files, and what is said about them."""

    files: Files
    pictures: Sequence[str]
    root: str
    """"" or "train/": where the folders begin that mean something."""
    audit: Audit
    config: DataConfig = field(default_factory=DataConfig)
    seen: set[str] = field(default_factory=set)
    """Files that were read for captions, or of which it was said why not."""

    @cached_property
    def around(self) -> list[str]:
        """Files in the root, below it or in a folder above it; those nearest to the top first."""
        names = []
        for name in self.files.sizes:
            folder = name[: name.rfind("/") + 1]
            if folder.startswith(self.root) or self.root.startswith(folder):
                names.append(name)
        return sorted(names, key=lambda name: (name.count("/"), name))

    def folders(self, picture: str) -> tuple[str, ...]:
        """The names of the folders that a picture lies in, below the root, outermost first."""
        return tuple(picture[len(self.root) :].split("/")[:-1])

    def top(self, picture: str) -> str | None:
        """The outermost of them; None for a picture that lies in no folder."""
        return next(iter(self.folders(picture)), None)

    def text(self, name: str, limit: int) -> str:
        """A text file's contents; InputError if it is not sound text within the limit."""
        return sound_text(self.data(name, limit), name)

    def table(self, name: str) -> bytes:
        """A table's bytes; InputError, before it is parsed, if it has more lines than the pictures
        that are there can need."""
        data = self.data(name, MAX_METADATA)
        lines, pictures = data.count(b"\n"), len(self.files.sizes)
        if lines > max(MAX_ROWS, ROWS_EACH * pictures):
            raise _out_of_proportion(name, f"{lines} lines", pictures)
        return data

    def json(self, text: str, name: str) -> Any:
        """The value of a JSON file on pictures; InputError if it is not sound, or has more than the
        pictures that are there can need."""
        values, pictures = sum(map(text.count, "[{,")), len(self.files.sizes)
        if values > max(MAX_VALUES, VALUES_EACH * pictures):
            raise _out_of_proportion(name, f"{values} values", pictures)
        return read_json(text, name)

    def data(self, name: str, limit: int) -> bytes:
        """A file's bytes; InputError if it cannot be read or is larger than the limit."""
        try:
            data = self.files.read(name, limit)
        except OSError as error:
            raise unreadable(name, error) from None
        if len(data) > limit:
            raise InputError(f"{name} is too large", f"the limit is {limit} bytes")
        return data

    def note(self, text: str) -> None:
        """Tell the user."""
        self.audit.notes.append(text)


def _out_of_proportion(name: str, what: str, pictures: int) -> InputError:
    hint = "keep what is said of the pictures that are there"
    return InputError(f"{name} has {what} for {count(pictures, 'file')}", hint=hint)


def sound_text(data: bytes, name: str) -> str:
    """UTF-8 text, with or without a byte order mark, or UTF-16 with one, which PowerShell writes;
    InputError if it is anything else."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked and len(data) % 2 == 0 else "utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8"
        raise InputError(f"{name} is not UTF-8 text", f"byte {error.start}", hint) from None
    if "\0" in text:
        raise InputError(f"{name} is not text", "it has a NUL character")
    return text


def read_json(text: str, where: str) -> Any:
    """A JSON value; InputError if it is not sound."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", str(error)) from None


def read_texts(value: Any, where: str) -> tuple[str, ...]:
    """One caption, or a list of them."""
    texts = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} is not text", json.dumps(value, default=str)[:60])
    size = max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=0)
    if size > MAX_CAPTION or any("\0" in text for text in texts):
        raise InputError(f"{where} is too long or has a NUL character")
    if not all(map(is_unicode, texts)):
        raise InputError(f"{where} is not sound Unicode")
    return tuple(text.strip() for text in texts if text.strip())


def stem(name: str) -> str:
    """A path without its suffix."""
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name
