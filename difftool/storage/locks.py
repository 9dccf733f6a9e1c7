"""Locks against other processes. Torch-free.

A process that ends lets go of its locks, however it ends. Where the system has none (what is not
POSIX, some network disks) everything here locks against nobody.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from difftool.errors import UsageError

LONG_AGO = 86_400.0
"""Seconds after which nobody is thought to be at work on a file that cannot be locked."""


class Lock:
    """A folder, or a file made for that, held against other processes until `close` or the
    process's end."""

    def __init__(self, path: Path, busy: str | None = None, *, make: bool = True):
        """busy: the UsageError where another process holds it; None: it is waited for. make: the
        file, if there is none; else FileNotFoundError."""
        self._descriptor: int | None = None
        try:
            import fcntl

            flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | (os.O_CREAT if make else 0)
            self._descriptor = os.open(path, flags, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            self.close()
            raise UsageError(busy or f"{path} is locked") from None
        except FileNotFoundError:
            if not make:
                raise
        except (ImportError, OSError):
            self.close()
        if self.held and not make and not self._is_there(path):
            self.close()
            raise FileNotFoundError(path)

    @property
    def held(self) -> bool:
        """False where there is no lock to be had."""
        return self._descriptor is not None

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_there(self, path: Path) -> bool:
        """Whether what is locked still has its name: who held it before may have removed it."""
        assert self._descriptor is not None
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        return False


def abandoned(path: Path) -> Lock | None:
    """The lock of what no living process holds; None for what one does, or what is gone. Where
    nothing can be locked, what is old counts as abandoned."""
    try:
        lock = Lock(path, busy="at work", make=False)
    except (UsageError, FileNotFoundError):
        return None
    with suppress(OSError):
        if lock.held or time.time() - path.lstat().st_mtime > LONG_AGO:
            return lock
    lock.close()
    return None
