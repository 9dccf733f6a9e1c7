"""Files of others, opened so that nothing waits and nothing is read without end. Torch-free."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from difftool.errors import InputError, unreadable


def open_file(path: Path | str) -> BufferedReader:
    """A file, opened to read its bytes. OSError if it is not there, or is a folder, a pipe or a
    device: a pipe's other end would be waited for, and a device may have no end."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return os.fdopen(descriptor, "rb")


class Stamped(NamedTuple):
    """A file and what tells whether it has changed: a key of what was read of it."""

    path: Path
    modified: int
    size: int


def stamped(path: Path) -> Stamped:
    """A file as it is now."""
    found = os.stat(path)
    return Stamped(path, found.st_mtime_ns, found.st_size)


def read_bytes(path: Path, limit: int) -> bytes:
    """What is in a file; InputError if it cannot be read or is larger than so many bytes."""
    try:
        with open_file(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(data) > limit:
        raise InputError(f"{path} is too large", f"the limit is {limit} bytes")
    return data


def read_text(path: Path, limit: int) -> str:
    """The text in a file of UTF-8, without a byte order mark, which Windows' editors put before it;
    InputError as `read_bytes`, and if it is none."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}", "it is not UTF-8") from None
