"""Files and folders that appear under their names whole, or not at all; and locks. Torch-free.

One protocol for a file, a set of files and a folder: what is new is written beside its place, under
a hidden name; its bytes are brought to the disk; then it takes its name. What had the name makes
way first, and has it back if that fails.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from difftool.errors import ResourceError, UsageError, taken


def refuse_existing(path: Path, overwrite: bool) -> None:
    """UsageError if something is at the path and is not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise taken(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- a file ----------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name when it is whole, and never otherwise.

    Its mode follows the umask. UsageError if the name is taken and not to be replaced, also when it
    is taken in the meantime, or cannot be written; ResourceError if the disk is full.
    """
    refuse_existing(path, overwrite)
    part = _hidden(path)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with _told(path):
        descriptor = os.open(part, flags, 0o666)
    try:
        with _told(path, full_disk_only=True), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _move(part, path, overwrite)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str, overwrite: bool = False) -> None:
    """Write a file of these bytes, or of a text as UTF-8; see `atomic_file`."""
    with atomic_file(path, overwrite) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def _move(file: Path, path: Path, overwrite: bool) -> None:
    """Give a file its name; UsageError if somebody has taken the name meanwhile."""
    with _told(path):
        if overwrite:
            os.replace(file, path)
        else:
            _link(file, path)
    _sync_folder(path.parent)


def _link(file: Path, path: Path) -> None:
    """Move a file to a name that is free, or to none."""
    try:
        os.link(file, path)
        return
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: claim the name, then replace the claim
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(file, path)
    except OSError:
        path.unlink()
        raise


# --- a set of files --------------------------------------------------------------------------


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new folder beside a path, for what is to be there; removed in the end with what is left."""
    place = _hidden(path)
    with _told(path):
        place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def move_files(place: Path, folder: Path, names: Sequence[str], former: Sequence[Path]) -> None:
    """Move files from a hidden folder to another, in which the former ones make way for them; all,
    or none. UsageError if one of the names is taken by anything else."""
    if len(names) == 1 and len(former) <= 1:
        _move(place / names[0], folder / names[0], overwrite=bool(former))
        return
    aside = place / "former"
    aside.mkdir()
    gone: list[Path] = []
    done: list[Path] = []
    try:
        for file in former:
            os.replace(file, aside / file.name)
            gone.append(file)
        for name in names:
            _move(place / name, folder / name, overwrite=False)
            done.append(folder / name)
    except BaseException:
        for file in done:
            file.unlink()
        for file in reversed(gone):
            os.replace(aside / file.name, file)
        raise
    _sync_folder(folder)


# --- a folder --------------------------------------------------------------------------------


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to be filled, that appears under its name when the block ends well, and never
    otherwise. What is put into it is written by `write_whole` and the like.

    Errors as of `atomic_file`; whatever is at the path is replaced, if anything is to be.
    """
    refuse_existing(path, overwrite)
    with hidden_folder(path) as place:
        yield place
        for folder in (place, *(found for found in place.rglob("*") if found.is_dir())):
            _sync_folder(folder)
        refuse_existing(path, overwrite)
        with _told(path):
            _rename(place, path)


def _rename(place: Path, path: Path) -> None:
    """Give a folder its name, for which whatever has it makes way."""
    former = _hidden(path, "old") if os.path.lexists(path) else None
    if former:
        path.rename(former)
    try:
        place.rename(path)
    except BaseException:
        if former:
            former.rename(path)
        raise
    _sync_folder(path.parent)
    if former and former.is_dir() and not former.is_symlink():
        shutil.rmtree(former, ignore_errors=True)
    elif former:
        former.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder, which loses its name first: half of one must not look like a whole one."""
    former = _hidden(path, "old")
    path.rename(former)
    shutil.rmtree(former, ignore_errors=True)


# --- a lock ----------------------------------------------------------------------------------


class Lock:
    """A folder, or a file made for that, held against other processes until `close` or the
    process's end; where the system has no locks, against nobody."""

    def __init__(self, path: Path, busy: str | None = None):
        """busy: the UsageError where another process holds it; None: it is waited for."""
        self._descriptor: int | None = None
        try:
            import fcntl

            flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
            self._descriptor = os.open(path, flags, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            self.close()
            raise UsageError(busy or f"{path} is locked") from None
        except (ImportError, OSError):
            pass

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- the system ------------------------------------------------------------------------------


def _hidden(path: Path, kind: str = "part") -> Path:
    """A name beside a path that nothing has; it tells what it was to a person who finds it."""
    name = path.name[:40] if kind == "old" else ""
    return path.with_name(f".{name}{secrets.token_hex(8)}.{kind}")


def _sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _told(path: Path, full_disk_only: bool = False) -> Iterator[None]:
    """What keeps a place from being written to is the user's to know."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and run again"
            why = f"while writing {path}: {error.strerror}"
            raise ResourceError("the disk is full", why, hint) from error
        if full_disk_only:
            raise
        if isinstance(error, FileExistsError):
            refuse_existing(path, overwrite=False)
        missing = isinstance(error, FileNotFoundError)
        why = f"the folder {path.parent} does not exist" if missing else error.strerror
        raise UsageError(f"cannot write {path}", why) from None
