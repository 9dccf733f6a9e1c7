"""Files that a picture's metadata name: how they are written, and where they are found again.

A file is named by its path from the folder of the picture, or by its bare name, and by its hash;
never by an absolute path. What lies in that folder is opened. The path of anything else may be a
stranger's choice: it is refused, and nothing of it is read, until the user trusts the picture.
Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PureWindowsPath

from difftool.config.options import by_name
from difftool.errors import DifftoolError, UsageError
from difftool.sampling.requests import NamedFile, Request
from difftool.sampling.settings import PICTURES, SETTINGS
from difftool.storage.commit import sha256_of

LORA_FOLDERS = ("", "lora", "loras", "models/Lora", "models/loras")
"""Where files of LoRAs are looked for, below the working folder and the picture's."""
ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")
MAX_HASHED = 64
"""So many files are looked through for one of another name."""
MAX_SHOWN = 200


# --- written ----------------------------------------------------------------------------------


def written(path: str | Path, folder: Path) -> str:
    """How a picture in a folder names a file: from there, with /, if the file lies below it or both
    lie below the working folder; else by its bare name."""
    file = Path(path)
    place, own, here = (os.path.realpath(each) for each in (file.parent, folder, "."))
    if not (_below(place, own) or (_below(place, here) and _below(own, here))):
        return file.name
    return (Path(os.path.relpath(place, own)) / file.name).as_posix()


def digest_of(option: str, path: str | Path) -> str:
    """12 hexadecimal digits of SHA-256: of a LoRA as other tools know it, of any other file's
    bytes; "" if it cannot be read."""
    try:
        return _digest(option == "lora", Path(path), os.stat(path).st_mtime_ns)
    except (OSError, ValueError, DifftoolError):
        return ""


@lru_cache(maxsize=256)
def _digest(lora: bool, path: Path, _stamp: int) -> str:
    from difftool.adapters.lora.file import lora_hash

    return lora_hash(path) if lora else sha256_of(path)[:12]


# --- found again ------------------------------------------------------------------------------


def locate(
    request: Request,
    picture: Path,
    opened: Collection[str],
    *,
    trusted: bool,
    places: Sequence[Path] = (),
) -> Request:
    """The request of a picture's metadata with paths from here in place of the names that it has.

    opened: the options whose files are going to be opened; others get a path that is not looked
    at. A file that is nowhere gets the one that it should have. places: folders of the user's, in
    which files are looked for by name too.

    UsageError for files to be opened that lie outside of the picture's folder, unless the picture
    is trusted.
    """
    search = _Search(picture.parent, trusted, places)
    paths = [search.path(file, file.option in opened) for file in request.named]
    if search.outside:
        rows = by_name(SETTINGS)
        flags = " or ".join(dict.fromkeys(rows[file.option].flag for file in search.outside))
        hint = f"--trust-image opens them, {flags} gives another"
        listed = "\n  ".join(map(described, search.outside))
        raise UsageError(f"{picture} names files outside of its folder", listed, hint)
    changed, hashes, told = [], {}, []
    for file, path in zip(request.named, paths, strict=True):
        now = file.digest
        if file.option in opened and os.path.exists(path):
            told.append(described(file._replace(name=path, digest="")))
            now = file.digest and digest_of(file.option, path)
        if now != file.digest:
            changed.append(f"{path} is not as it was when {picture} was made")
        if now or file.option not in opened:
            hashes[path] = now
    found = list(zip(request.named, paths, strict=True))
    images = {file.option: path for file, path in found if file.option in PICTURES}
    words = [path for file, path in found if file.option == "embedding"]
    loras = [(path, file.weight) for file, path in found if file.option == "lora"]
    return replace(
        request, **images, embeddings=(*request.embeddings, *words), named=(), hashes=hashes,
        loras=(*request.loras, *loras), changed=(*request.changed, *changed),
        opened=f"opened because {picture} names them: {', '.join(told)}" if told else "",
    )  # fmt: skip


def lacking(file: NamedFile) -> str:
    """What is said of a LoRA that is not found."""
    known = f" ({file.digest})" if file.digest else ""
    return f"the LoRA {file.name}{known} at {file.weight:g}, which is not here: --lora"


def sought_in(request: Request, folder: Path) -> Request:
    """A request with the LoRAs that it seeks and that are below a folder of the user's: of the name
    and the hash, else of the hash, else of the name, which is said."""
    there = [path for _, path in files_below(folder)]
    found, missed, changed = list(request.loras), list(request.missed), list(request.changed)
    for file in request.sought:
        named = [path for path in there if path.stem.casefold() == file.name.casefold()]
        same = (
            path
            for path in (*named, *there[:MAX_HASHED])
            if file.digest and digest_of("lora", path).startswith(file.digest[:12])
        )
        if (path := next(same, None) or next(iter(named), None)) is None:
            continue
        found.append((str(path), file.weight))
        missed.remove(("lora", lacking(file)))
        if file.digest and not digest_of("lora", path).startswith(file.digest[:12]):
            told = f"its hash is {digest_of('lora', path)}, and not {file.digest}"
            changed.append(f"{path} is not the LoRA that the picture was made with: {told}")
    return replace(
        request, loras=tuple(found), missed=tuple(missed), changed=tuple(changed), sought=()
    )


def described(file: NamedFile) -> str:
    """A file as a message lists it: its kind, its name, its option, its hash."""
    name = file.name if file.name.isprintable() else repr(file.name)
    name = name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN - 60]} ... {name[-50:]}"
    row = by_name(SETTINGS)[file.option]
    return f"{row.file} {name} ({', '.join(filter(None, (row.flag, file.digest)))})"


@dataclass
class _Search:
    """Looks for the files that a picture in a folder names."""

    folder: Path
    trusted: bool
    places: Sequence[Path] = ()

    def __post_init__(self) -> None:
        self.outside: list[NamedFile] = []
        """What would be opened and may not be."""
        self._listed: dict[tuple[str, bool], list[Path]] = {}

    def path(self, file: NamedFile, opened: bool) -> str:
        """Where a file is, or would be."""
        absolute = _is_absolute(file.name)
        if not opened:
            return str(self.folder / (_bare(file.name) if absolute else file.name))
        first, *others = self._places(file)
        found = outside = None
        for place in (first, *others):
            if self._allowed(place):
                found = place if os.path.exists(place) else None
            # Of an absolute path it is not even asked whether there is one: it may be a server's.
            elif absolute or os.path.exists(place):
                outside = place
            if found:
                break
        if file.digest and (found is None or digest_of(file.option, found) != file.digest):
            found = self._of_hash(file) or found
        if found is None and outside is not None:
            self.outside.append(file)
        return _from_here(found) if found else str(file.name if absolute else first)

    def _places(self, file: NamedFile) -> Iterator[Path]:
        """Where it may be by its name; older versions named files from the working folder, without
        a hash."""
        names = dict.fromkeys((file.name, file.name.replace("\\", "/")))
        yield from (self.folder / name for name in names)
        yield from (place / _bare(file.name) for place in self.places)
        if file.digest:
            yield from (place / _bare(file.name) for place in (self.folder, Path()))
        else:
            yield from map(Path, names)

    def _of_hash(self, file: NamedFile) -> Path | None:
        """A file of another name that is the same."""
        kind = ending, is_lora = PureWindowsPath(file.name).suffix, file.option == "lora"
        if kind not in self._listed:
            places = [self.folder, Path()] if self.trusted else [self.folder]
            there = files_in(places, LORA_FOLDERS if is_lora else ("",), ending)
            self._listed[kind] = list(islice(filter(self._allowed, there), MAX_HASHED))
        same = (p for p in self._listed[kind] if digest_of(file.option, p) == file.digest)
        return next(same, None)

    def _allowed(self, path: Path) -> bool:
        return self.trusted or any(lies_in(path, place) for place in (self.folder, *self.places))


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path leads to a place in a folder, links followed; to tell, nothing outside of it
    is looked at."""
    apart = _below(os.path.abspath(path), os.path.abspath(folder))
    return apart and _below(os.path.realpath(path), os.path.realpath(folder))


def files_in(places: Iterable[Path], folders: Iterable[str], ending: str) -> list[Path]:
    """The files of that ending in these folders of each place."""
    there = [place / folder for place in dict.fromkeys(places) for folder in folders]
    return [
        path
        for each in there
        for path in sorted(each.glob("*"))
        if path.suffix == ending and path.is_file()
    ]


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder that may be LoRAs or words, by their paths in it without an
    ending."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.endswith(ENDINGS):
                path = Path(place, name)
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def _below(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _is_absolute(name: str) -> bool:
    return bool(PureWindowsPath(name).anchor)  # which has / for a root too


def _bare(name: str) -> str:
    return PureWindowsPath(name).name


def _from_here(path: Path) -> str:
    """The path without the ways back that it has, if that leads to the same."""
    plain = os.path.normpath(path)
    try:
        return plain if os.path.samefile(plain, path) else str(path)
    except OSError:
        return str(path)
