"""A folder, .zip or .tar of files as names and bytes; nothing is ever unpacked to disk."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from difftool.data.dataset import SkippedFile
from difftool.errors import InputError, UsageError
from difftool.storage.read import open_file

MAX_MEMBERS = 2_000_000
MAX_NAME = 1024
SMALL = 16 << 20
"""Bytes of which a packed file may have more than its archive."""
MAX_GROWTH = 16
"""How many times its size an archive may unpack to: pictures hardly shrink."""
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".gz", ".7z", ".rar")
JUNK = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"}
"""What Macs, network disks and Windows leave behind; so are names that begin with a dot."""


class Files(Protocol):
    """Files below one root, by their paths relative to it ("cats/1.png"). Thread-safe."""

    sizes: dict[str, int]
    """Sizes in bytes of what can be read, sorted by path; hidden files are left out."""
    skipped: list[SkippedFile]
    """What cannot be followed safely."""

    def read(self, name: str, limit: int) -> bytes:
        """The contents of a file, cut off after limit + 1 bytes; OSError if it cannot be read."""
        ...


def open_files(where: Path) -> Files:
    """The files in a folder or archive; UsageError if it is missing, InputError if malformed."""
    if not where.exists():
        raise UsageError(f"{where} does not exist", hint="give a folder of pictures")
    if where.is_dir():
        return Folder(where)
    try:
        if where.suffix.lower() == ".zip":
            return Zip(where)
        if where.suffix.lower() == ".tar":
            return Tar(where)
    except Exception as error:  # of malformed archives the readers raise nearly anything
        raise InputError(f"cannot read {where}", str(error) or type(error).__name__) from None
    if where.name.lower().endswith(COMPRESSED):
        why = "pictures cannot be read from the middle of it"
        hint = "unpack it, or make it a .zip or a plain .tar: pictures do not shrink any further"
        raise InputError(f"{where} is not a dataset", why, hint)
    raise InputError(
        f"{where} is not a dataset", "a file of another kind", "give a folder, a .zip or a .tar"
    )


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part in JUNK for part in name.split("/"))


class _Members:
    """Names of an archive's members, made sound: relative, within the root, once each."""

    def __init__(self) -> None:
        self.skipped: list[SkippedFile] = []
        self._seen: set[str] = set()

    def accept(self, raw: str) -> str | None:
        """The member's name; None if it is to be left out, said if that is news."""
        path = raw.replace("\\", "/")  # which is what some packers on Windows write
        parts = [part for part in path.split("/") if part not in ("", ".")]
        name = "/".join(parts)
        drive = name[1:2] == ":"
        if ".." in parts or path.startswith("/") or drive or not name or not name.isprintable():
            self.skipped.append(SkippedFile(raw[:MAX_NAME], "an unsafe path"))
        elif len(name) > MAX_NAME or len(parts) > 64:
            self.skipped.append(SkippedFile(f"{name[:80]}...", "a name that is too long"))
        elif name in self._seen:
            self.skipped.append(SkippedFile(name, "a second file of this name"))
        elif not _hidden(name):
            self._seen.add(name)
            if len(self._seen) > MAX_MEMBERS:
                raise ValueError(f"more than {MAX_MEMBERS:,} files")
            return name
        return None


class Folder:
    """The files of a folder. Links are followed to files inside the folder only."""

    def __init__(self, root: Path):
        self.root, self.skipped = root, []
        found = dict(self._walk())
        self.sizes = {name: found[name] for name in sorted(found)}
        self.skipped.sort()

    def _walk(self) -> Iterator[tuple[str, int]]:
        real_root = self.root.resolve()
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not _hidden(name)]
            for name in (*folders, *files):
                path = Path(folder, name)
                shown = path.relative_to(self.root).as_posix()
                if _hidden(name) or (name in folders and not path.is_symlink()):
                    continue
                if path.is_symlink() and not path.resolve().is_relative_to(real_root):
                    self.skipped.append(SkippedFile(shown, "a link that leads out of the folder"))
                elif path.is_dir():
                    self.skipped.append(SkippedFile(shown, "a link to a folder"))
                elif not path.exists():
                    self.skipped.append(SkippedFile(shown, "a link to nothing"))
                elif stat.S_ISREG((status := path.stat()).st_mode):
                    yield shown, status.st_size
                else:
                    self.skipped.append(SkippedFile(shown, "not a regular file"))

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        with open_file(self.root / name) as file:
            return file.read(limit + 1)


class Zip:
    """The members of a .zip."""

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path)
        names, members, packed, size = _Members(), {}, 0, path.stat().st_size
        for info in self._zip.infolist():
            packed += info.compress_size
            if info.filename.endswith("/") or (name := names.accept(info.filename)) is None:
                continue
            if info.flag_bits & 1:
                names.skipped.append(SkippedFile(name, "encrypted"))
            elif stat.S_ISLNK(info.external_attr >> 16):
                names.skipped.append(SkippedFile(name, "a link"))
            elif info.file_size > max(SMALL, size):
                names.skipped.append(SkippedFile(name, "larger than the archive that it is in"))
            else:
                members[name] = info
        if packed > size:
            raise ValueError("its files overlap, as in a decompression bomb")
        if sum(info.file_size for info in members.values()) > MAX_GROWTH * size + SMALL:
            raise ValueError(f"it unpacks to more than {MAX_GROWTH} times its size, as a bomb does")
        self._members, self.skipped = members, names.skipped
        self.sizes = {name: members[name].file_size for name in sorted(members)}

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        try:
            with self._zip.open(self._members[name]) as file:  # members of one archive may be
                return file.read(limit + 1)  # read by several threads: ZipFile locks each access
        except Exception as error:  # BadZipFile, zlib.error, LZMAError, EOFError: malformed data
            raise OSError(f"malformed ({error})") from None


class Tar:
    """The members of an uncompressed .tar."""

    def __init__(self, path: Path):
        names, members = _Members(), {}
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would otherwise pile up
                if info.isdir() or (name := names.accept(info.name)) is None:
                    continue
                if info.isreg() and not info.issparse():
                    members[name] = (info.offset_data, info.size)
                else:
                    names.skipped.append(SkippedFile(name, "a link or special file"))
        self._path, self._members, self.skipped = path, members, names.skipped
        self.sizes = {name: members[name][1] for name in sorted(members)}

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        offset, size = self._members[name]
        with open_file(self._path) as file:
            file.seek(offset)
            return file.read(min(size, limit + 1))


class Folders:
    """Several folders as one: the files directly in each, below a name of its own."""

    def __init__(self, roots: Mapping[str, Path]):
        self._roots = {name: Folder(root) for name, root in roots.items()}
        self.sizes = {
            f"{name}/{file}": size
            for name, folder in self._roots.items()
            for file, size in folder.sizes.items()
        }
        self.skipped = [
            SkippedFile(f"{name}/{file}", reason)
            for name, folder in self._roots.items()
            for file, reason in folder.skipped
        ]

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        root, _, file = name.partition("/")
        return self._roots[root].read(file, limit)
