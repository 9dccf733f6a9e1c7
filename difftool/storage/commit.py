"""Files and folders that appear under their names whole, or not at all. Torch-free.

One protocol for a file, a set of files and a folder: what is new is written beside its place, under
a hidden name; its bytes are brought to the disk; then it takes its name. What had the name makes
way first, and has it back if that fails.

What is hidden is locked while it is written, so that what a killed process has left is known: who
next writes into the same folder removes it, or brings to its end what was under way.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeVar

from difftool.errors import ResourceError, UsageError, taken
from difftool.storage.locks import Lock, abandoned
from difftool.storage.read import Stamped, open_file, stamped

T = TypeVar("T")

HIDDEN = re.compile(r"\.difftool-[0-9a-f]{16}\.part")
"""The names of what is being written."""
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between trials to rename what another program has open."""
FORMER, MOVING = ".former", ".moving"
"""Where, beside what is new, that lies which makes way: until all of it does, and from then on."""


def refuse_existing(path: Path, overwrite: bool) -> None:
    """UsageError if something is at the path and is not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise taken(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """The same, of a file that is asked for again only read again if it has changed."""
    return _known_sha256(stamped(path))


@lru_cache(maxsize=256)
def _known_sha256(file: Stamped) -> str:
    return sha256_of(file.path)


# --- a file ----------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name when it is whole, and never otherwise.

    Its mode follows the umask. UsageError if the name is taken and not to be replaced, also when it
    is taken in the meantime, or cannot be written; ResourceError if the disk is full.
    """
    refuse_existing(path, overwrite)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with _told(path):
        part, descriptor, lock = _begin(path, lambda part: os.open(part, flags, 0o666))
    with lock:
        try:
            with _told(path, full_disk_only=True), os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _move(part, path, overwrite)
        finally:
            with suppress(OSError):  # else it is left, and removed by who next writes here
                part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str, overwrite: bool = False) -> None:
    """Write a file of these bytes, or of a text as UTF-8; see `atomic_file`."""
    with atomic_file(path, overwrite) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def _move(what: Path, path: Path, overwrite: bool = False) -> None:
    """Give a file or a folder its name; UsageError if somebody has taken the name meanwhile."""
    with _told(path):
        if what.is_dir():
            _patiently(os.rename, what, path)
        elif overwrite:
            _patiently(os.replace, what, path)
        else:
            _link(what, path)
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
        _patiently(os.replace, file, path)
    except OSError:
        path.unlink()
        raise


# --- a set of files --------------------------------------------------------------------------


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new folder beside a path, for what is to be there; removed in the end with what is left."""
    with _told(path):
        place, _, lock = _begin(path, Path.mkdir)
    with lock:
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def move_files(place: Path, names: Sequence[str], former: Sequence[Path]) -> None:
    """Move files or folders from a hidden folder to beside it, where the former ones make way for
    them; all, or none. UsageError if one of the names is taken by anything else."""
    folder = place.parent
    if list(former) in ([], [folder / names[0]]) and len(names) == 1:
        new, path = place / names[0], folder / names[0]
        if not former or not (new.is_dir() or path.is_dir()):
            _move(new, path, overwrite=bool(former))
            return
        if _exchange(new, path):  # what was there goes with the hidden folder
            _sync_folder(folder)
            return
    aside = place / FORMER
    aside.mkdir()
    gone: list[Path] = []
    done: list[Path] = []
    try:
        for file in former:
            _patiently(os.replace, file, aside / file.name)
            gone.append(file)
        aside = _patiently(Path.rename, aside, place / MOVING)
        for name in names:
            _move(place / name, folder / name)
            done.append(folder / name)
    except BaseException:
        for file in done:
            _patiently(os.replace, file, place / file.name)
        aside = _patiently(Path.rename, aside, place / FORMER)
        for file in reversed(gone):
            _patiently(os.replace, aside / file.name, file)
        raise
    _sync_folder(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "renamex_np"):  # macOS
            return libc.renamex_np(*names, 2) == 0
        return libc.renameat2(-100, names[0], -100, names[1], 2) == 0  # -100: the current folder
    return False


# --- a folder --------------------------------------------------------------------------------


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to be filled, that appears under its name when the block ends well, and never
    otherwise. What is put into it is written by `write_whole` and the like.

    Errors as of `atomic_file`; whatever is at the path is replaced, if anything is to be.
    """
    refuse_existing(path, overwrite)
    with hidden_folder(path) as place:
        new = place / path.name
        with _told(path):
            new.mkdir()
        yield new
        for folder in (place, *(found for found in place.rglob("*") if found.is_dir())):
            sweep(folder)
            _sync_folder(folder)
        refuse_existing(path, overwrite)
        with _told(path):
            move_files(place, [path.name], [path] if os.path.lexists(path) else [])


def remove_folder(path: Path) -> None:
    """Remove a folder, which loses its name first: half of one must not look like a whole one."""
    with hidden_folder(path) as place:
        _patiently(os.replace, path, place / path.name)


# --- what killed processes have left ---------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove what killed processes have left in a folder. Where they were giving things their
    names, those have them back that had to make way, or, where all had, the new ones get them."""
    with suppress(OSError):
        for name in os.listdir(folder):
            place = folder / name
            if HIDDEN.fullmatch(name) and (lock := abandoned(place)):
                with lock, suppress(OSError):
                    _settle(place)
                    shutil.rmtree(place) if place.is_dir() else place.unlink()


def _settle(place: Path) -> None:
    """Bring to its end, either way, what `move_files` was at."""
    if (place / FORMER).is_dir():
        left = [*(place / FORMER).iterdir()]
    elif (place / MOVING).is_dir():
        left = [file for file in place.iterdir() if file.name != MOVING]
        left.sort(key=lambda file: file.name.endswith(".json"))  # an index after what it names
    else:
        return
    for file in left:
        if not os.path.lexists(place.parent / file.name):
            _patiently(os.replace, file, place.parent / file.name)
    _sync_folder(place.parent)


@lru_cache(maxsize=1024)
def _sweep_once(folder: str) -> None:
    sweep(Path(folder))


# --- the system ------------------------------------------------------------------------------


def _begin(path: Path, make: Callable[[Path], T]) -> tuple[Path, T, Lock]:
    """Something hidden beside a path, what `make` gave when it made it, and its lock."""
    _sweep_once(os.path.abspath(path.parent))
    while True:
        place = path.with_name(f".difftool-{secrets.token_hex(8)}.part")
        made = make(place)
        with suppress(FileNotFoundError):  # swept away by another process before it was locked
            return place, made, Lock(place, make=False)


def _patiently(rename: Callable[[Path, Path], T], old: Path, new: Path) -> T:
    """Give a file or folder another name. On Windows neither it nor what it replaces may be open in
    another program, a virus scanner for one, which mostly lets go of it soon."""
    for pause in PAUSES:
        try:
            return rename(old, new)
        except PermissionError as error:
            if not _in_use(error):
                raise
            time.sleep(pause)
    return rename(old, new)


def _in_use(error: OSError) -> bool:
    """Whether it is Windows' access denied or sharing violation."""
    return getattr(error, "winerror", None) in (5, 32)


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
        if _in_use(error):
            why = "another program has it open, or it may not be changed"
            raise UsageError(f"cannot write {path}", why, "close it there") from None
        missing = isinstance(error, FileNotFoundError)
        why = f"the folder {path.parent} does not exist" if missing else error.strerror
        raise UsageError(f"cannot write {path}", why) from None
