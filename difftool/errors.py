"""Errors a user can act on: what went wrong, why, and what to do. Torch-free.

The exit code of each class is part of the command-line contract.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DifftoolError(Exception):
    """A failure that is told to the user in up to three lines, without a traceback.

    what: what happened. why: the reason, with the value. hint: what to do about it.
    """

    code = 1

    def __init__(self, what: str, why: str | None = None, hint: str | None = None):
        super().__init__(what)
        self.what, self.why, self.hint = what, why, hint

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.hint) if line)


class UsageError(DifftoolError):
    """A wrong option, value, name or combination; a named file that does not exist."""

    code = 2


class InputError(DifftoolError):
    """A file that is there but malformed, unsafe, unknown or unsupported."""

    code = 3


class CheckError(DifftoolError):
    """A check failed: a conversion would lose data, or a verification differs."""

    code = 4


class ResourceError(DifftoolError):
    """Memory, disk or numbers gave out: out of memory, disk full, non-finite values."""

    code = 5


class Stopped(DifftoolError):
    """A signal ended the work after its state was saved; the exit code is 128 + signal."""

    def __init__(self, signum: int, what: str, hint: str | None = None):
        super().__init__(what, hint=hint)
        self.code = 128 + signum


def suggestion(name: str, options: Iterable[str]) -> str:
    """'Did you mean "x"?' for the nearest option, followed by the full list."""
    options = list(options)
    close = get_close_matches(name.lower(), options, n=1, cutoff=0.5)
    listed = "choose from: " + ", ".join(options)
    return f'did you mean "{close[0]}"? ({listed})' if close else listed
