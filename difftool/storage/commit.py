"""Files that appear under their names whole, or not at all. Torch-free."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from difftool.errors import ResourceError, UsageError, taken


@contextmanager
def atomic_file(path: Path, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name when it is whole, and never otherwise.

    Its bytes are on the disk before its name is; its mode follows the umask. UsageError if the name
    is taken and not to be replaced, also when it is taken in the meantime, or cannot be written;
    ResourceError if the disk is full.
    """
    refuse_existing(path, overwrite)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with _told(path):
        descriptor = os.open(part, flags, 0o666)
    try:
        with _told(path, full_disk_only=True), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(part, path, overwrite)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Write a file of these bytes; see `atomic_file`."""
    with atomic_file(path, overwrite) as file:
        file.write(data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder in one that is there; UsageError if that cannot be."""
    with _told(path):
        path.mkdir()


def refuse_existing(path: Path, overwrite: bool) -> None:
    """UsageError if something is at the path and is not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise taken(path)


def move(file: Path, path: Path, overwrite: bool) -> None:
    """Give a file its name; UsageError if somebody has taken the name meanwhile."""
    with _told(path):
        if overwrite:
            os.replace(file, path)
        else:
            _link(file, path)
    sync_folder(path.parent)


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


def sync_folder(folder: Path) -> None:
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
