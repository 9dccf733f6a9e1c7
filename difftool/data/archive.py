"""A folder, .zip or .tar of files as names and bytes; nothing is ever unpacked to disk."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from difftool.data.dataset import Skipped
from difftool.errors import InputError, UsageError

SUFFIXES = (".zip", ".tar")


class Files(Protocol):
    """Files below one root, by their paths relative to it ("cats/1.png"). Thread-safe."""

    sizes: dict[str, int]
    """Sizes in bytes of what can be read, sorted by path; hidden files are left out."""
    skipped: list[Skipped]
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
    except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError, NotImplementedError) as e:
        raise InputError(f"cannot read {where}", str(e)) from None
    raise InputError(
        f"{where} is not a dataset", "a file of another kind", "give a folder, a .zip or a .tar"
    )


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


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
                    self.skipped.append(Skipped(shown, "a link that leads out of the folder"))
                elif path.is_dir():
                    self.skipped.append(Skipped(shown, "a link to a folder"))
                elif not path.exists():
                    self.skipped.append(Skipped(shown, "a link to nothing"))
                elif stat.S_ISREG((status := path.stat()).st_mode):
                    yield shown, status.st_size
                else:
                    self.skipped.append(Skipped(shown, "not a regular file"))

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        with open(self.root / name, "rb") as file:
            return file.read(limit + 1)


class Zip:
    """The members of a .zip."""

    def __init__(self, path: Path):
        self.skipped: list[Skipped] = []
        self._zip = zipfile.ZipFile(path)
        members = {}
        for info in self._zip.infolist():
            if info.is_dir() or _hidden(info.filename):
                continue
            if info.flag_bits & 1:
                self.skipped.append(Skipped(info.filename, "encrypted"))
            else:
                members[info.filename] = info
        self._members = members
        self.sizes = {name: members[name].file_size for name in sorted(members)}

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        try:
            with self._zip.open(self._members[name]) as file:  # members of one archive may be
                return file.read(limit + 1)  # read by several threads: ZipFile locks each access
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise OSError(str(error)) from None
        except Exception as error:  # zlib.error, lzma.LZMAError: malformed data
            raise OSError(f"malformed ({error})") from None


class Tar:
    """The members of an uncompressed .tar."""

    def __init__(self, path: Path):
        self.skipped: list[Skipped] = []
        members = {}
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isdir() or _hidden(name):
                    continue
                if info.isreg() and not info.issparse():
                    members[name] = (info.offset_data, info.size)
                else:
                    self.skipped.append(Skipped(name, "a link or special file"))
        self._path, self._members = path, members
        self.sizes = {name: members[name][1] for name in sorted(members)}

    def read(self, name: str, limit: int) -> bytes:
        """See Files."""
        offset, size = self._members[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(min(size, limit + 1))
