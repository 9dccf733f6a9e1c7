"""Which pictures a folder has, by what decides them: from their metadata, and from an index beside
them. Torch-free."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from difftool.errors import DifftoolError
from difftool.images.formats import CHUNK, format_of
from difftool.images.read import read_notes, read_picture
from difftool.sampling.files.names import patterns
from difftool.sampling.metadata.grids import EACH
from difftool.storage.read import read_bytes
from difftool.storage.strict_json import parse_json, to_json

MAX_INDEX = 256 << 20
INDEX = ".difftool-pictures.jsonl"
"""The index, a line a picture. It saves looking into each picture again, and is all that there is
where they say nothing of themselves."""


@dataclass(frozen=True)
class Recorded:
    """A line of the index."""

    path: str
    """From its folder, with /."""
    bytes: int
    """How large the picture is, by which a line about another one of its name is known."""
    content: str
    series: str
    seed: int
    vary_seed: int | None = None


Seeds = tuple[int, int | None]
"""Of a picture, and of its variation."""


class Inventory:
    """The pictures that are where those of a run go."""

    def __init__(self, root: Path, template: str, format: str):
        """root, template and format: of `Output`."""
        self.root, self.format = root, format
        self.template = template or f"[none].{format}"
        self._entries: dict[str, Recorded] = {}
        self._of_content: dict[str, list[str]] = {}
        self._of_series: dict[str, list[Recorded]] = {}
        self._asked: set[tuple[str, Path | None]] = set()
        """Contents, and the names that they are wanted by, that this run has come to."""
        self._drawn: set[str] = set()
        """Contents that its requests with drawn seeds have come to."""
        self._keep(self._read())
        self._append(self._unknown())

    # --- what is there ------------------------------------------------------------------------

    def find(self, content: str, name: Path | None = None) -> Path | None:
        """Where a picture of that content is; name: the only path that counts."""
        self._drawn.add(content)
        paths = self._of_content.get(content, [])
        if name is not None:
            path = name.relative_to(self.root).as_posix()
            if path not in self._entries and (found := self._described(name)):
                self._append([found])
            paths = [path]
        for path in paths:
            entry = self._entries.get(path)
            if not entry or format_of(Path(path).suffix) != self.format:
                continue
            if entry.content == content and self._is_there(entry):
                return self.root / path
        return None

    def is_new(self, content: str, name: Path | None = None) -> bool:
        """Whether such a picture is asked for for the first time in this run."""
        asked = content, name
        new = asked not in self._asked
        self._asked.add(asked)
        return new

    def begun(
        self, series: str, seed: int | None, vary_seed: int | None
    ) -> tuple[int, int | None] | None:
        """The seeds of the first picture that an earlier run drew for such a request, and that no
        other request of this run has come to; seeds: those that are given."""
        left = [
            entry
            for entry in self._of_series.get(series, ())
            if entry.content not in self._drawn and self._is_there(entry)
            if seed in (None, entry.seed) and vary_seed in (None, entry.vary_seed)
        ]
        if not left:
            return None
        seeds, (first, other) = (
            {(e.seed, e.vary_seed) for e in left},
            (left[0].seed, left[0].vary_seed),
        )
        if other is None:
            while (first - 1, None) in seeds:
                first -= 1
        else:
            while (first, other - 1) in seeds:
                other -= 1
        return first, other

    # --- what comes ---------------------------------------------------------------------------

    def add(self, path: Path, data: bytes, content: tuple[str, str], seeds: Seeds) -> None:
        """Say what is about to be written. Said before it is, so that no picture is there of which
        nothing is known: a line about one that is not there means nothing."""
        name = path.relative_to(self.root).as_posix()
        self._append([Recorded(name, len(data), *content, *seeds)])
        self._drawn.add(content[0])

    def _append(self, entries: list[Recorded]) -> None:
        self._keep(entries)
        if not entries:
            return
        lines = "".join(f"{to_json(asdict(entry))}\n" for entry in entries)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.root / INDEX, flags, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                if size and (os.lseek(descriptor, size - 1, 0), os.read(descriptor, 1))[1] != b"\n":
                    lines = f"\n{lines}"  # of a process that was killed while it wrote
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)
        except OSError:
            return  # the pictures themselves say what they are

    # --- files --------------------------------------------------------------------------------

    def _keep(self, entries: list[Recorded]) -> None:
        for entry in entries:
            self._entries[entry.path] = entry
            self._of_content.setdefault(entry.content, []).append(entry.path)
            self._of_series.setdefault(entry.series, []).append(entry)

    def _is_there(self, entry: Recorded) -> bool:
        try:
            return os.stat(self.root / entry.path).st_size == entry.bytes
        except OSError:
            return False

    def _read(self) -> list[Recorded]:
        """The lines of the index that are sound, of pictures that are still there."""
        try:
            lines = read_bytes(self.root / INDEX, MAX_INDEX).splitlines()
        except (OSError, DifftoolError):
            return []
        found: dict[str, Recorded] = {}
        for line in lines:
            with suppress(DifftoolError, TypeError, ValueError):
                entry = Recorded(**parse_json(line, INDEX))
                if _is_sound(entry):
                    found[entry.path] = entry
        return [entry for entry in found.values() if self._is_there(entry)]

    def _unknown(self) -> list[Recorded]:
        """What pictures say of themselves that the index does not have, the oldest first."""
        files = {file for pattern in patterns(self.template) for file in self.root.glob(pattern)}
        new = [f for f in files if f.relative_to(self.root).as_posix() not in self._entries]
        with suppress(OSError):
            new.sort(key=lambda file: (file.stat().st_mtime_ns, file))
        return [entry for file in new if (entry := self._described(file)) is not None]

    def _described(self, file: Path) -> Recorded | None:
        """What a whole picture says of itself; None if it says nothing."""
        try:
            texts, _ = read_notes(file)
            chunk = parse_json(texts[CHUNK], str(file), infinite=True)
            if EACH in chunk:  # a grid, which is none of its pictures
                return None
            asked, name = chunk["request"], file.relative_to(self.root).as_posix()
            hashes = chunk["content"], chunk["series"]
            seeds = asked["seed"], asked.get("vary_seed")
            entry = Recorded(name, file.stat().st_size, *hashes, *seeds)
            if _is_sound(entry) and read_picture(file):
                return entry
        except (OSError, DifftoolError, LookupError, TypeError, ValueError):
            pass
        return None


def _is_sound(entry: Recorded) -> bool:
    """Whether it is what a line may be, of a picture below its folder."""
    path = PurePosixPath(entry.path)
    texts = all(isinstance(each, str) for each in (entry.path, entry.content, entry.series))
    numbers = isinstance(entry.bytes, int) and isinstance(entry.seed, int)
    numbers = numbers and isinstance(entry.vary_seed, int | None)
    return texts and numbers and not path.is_absolute() and ".." not in path.parts
