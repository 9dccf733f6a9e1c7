"""Disks that fail, and processes that die, at a chosen call of the system."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

CALLS = (
    *("open", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync"),
    *("listdir", "scandir", "fdopen"),
)
"""What writing takes of `os`; writing itself, and closing, are of what `fdopen` gives."""


class Killed(BaseException):
    """The process is no more; what stands in `finally` does nothing either."""


class Faults:
    """In the block one call fails: number `turn`, counted from 1. Where an error is given, that
    once; else the process dies there, and no later call does anything."""

    def __init__(self, turn: int, error: int | None = None, calls: tuple[str, ...] = CALLS):
        self.turn, self.error, self.calls, self.patch = turn, error, calls, pytest.MonkeyPatch()
        self.count = 0
        self.log: list[str] = []
        """The calls that there were."""

    @property
    def happened(self) -> bool:
        """Whether there were as many calls."""
        return self.count >= self.turn

    def __enter__(self) -> Faults:
        for name in self.calls:
            self.patch.setattr(os, name, self.counted(name, getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **more: Any) -> Any:
            self.count += 1
            self.log.append(name)
            if self.error is None and self.count >= self.turn:
                raise Killed
            if self.error is not None and self.count == self.turn:
                raise OSError(self.error, os.strerror(self.error))
            if name == "fsync":  # slow, and nobody takes the power away
                return None
            made = call(*arguments, **more)
            return File(made, self) if name == "fdopen" else made

        return function


class File:
    """A file whose calls are counted too."""

    def __init__(self, file: Any, faults: Faults):
        self.file = file
        for name in ("write", "flush", "close"):
            setattr(self, name, faults.counted(name, getattr(file, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self.file.close()
