"""Errors a user can act on: what went wrong, why, and what to do. Torch-free.

The exit code of each class is part of the command-line contract.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class DifftoolError(Exception):
    """A failure that is told to the user in up to three lines, without a traceback.

    what: what happened. why: the reason, with the value. hint: what to do about it.
    """

    code = 1
    line: int | None = None
    """Of a file of many things, where it is about one of them."""

    def __init__(self, what: str, why: str | None = None, hint: str | None = None):
        super().__init__(what)
        self.what, self.why, self.hint = shortened(what), why and shortened(why), hint

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.hint) if line)


def shortened(text: str) -> str:
    """A text for a message, in lines of at most 400 characters: what a file says of itself may be
    megabytes long."""
    return "\n".join(
        line if len(line) <= 400 else f"{line[:280]} ... {line[-100:]}" for line in text.split("\n")
    )


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


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory gave out, of the machine or of a device."""
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text
    return said or isinstance(error, MemoryError)


# --- the same words for the same trouble -----------------------------------------------------


def suggestion(name: str, options: Iterable[str]) -> str:
    """'Did you mean "x"?' for the nearest option, followed by the full list."""
    options = list(options)
    close = get_close_matches(name.lower(), options, n=1, cutoff=0.5)
    listed = "choose from: " + ", ".join(options)
    return f'did you mean "{close[0]}"? ({listed})' if close else listed


def missing(what: object, hint: str | None = None) -> UsageError:
    """Nothing is at a path that the user named."""
    return UsageError(f"{what} does not exist", hint=hint)


def check_file(kind: str, path: Path, folder: bool = False) -> None:
    """UsageError if there is no file, or where it may be one no folder, of that kind at a path."""
    if path.is_dir() and not folder:
        raise UsageError(f"{path} is a folder and no {kind}", hint="name a file in it")
    if not path.exists():
        raise UsageError(f"there is no {kind} {path}")


def taken(path: object) -> UsageError:
    """Something is at a path that is to be written."""
    return UsageError(f"{path} is there already", hint="--overwrite replaces it")


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A name that none of its kind has; the nearest one is suggested."""
    return UsageError(f'there is no {kind} "{name}"', hint=suggestion(name, known))


def clash(one: object, other: object, why: str | None = None) -> UsageError:
    """Two options, or values of them, that cannot be given together."""
    return UsageError(f"{one} and {other} exclude each other", why, "leave one of them out")


def unreadable(what: object, error: OSError) -> InputError:
    """The system does not give a file's bytes."""
    return InputError(f"cannot read {what}", error.strerror or str(error) or type(error).__name__)


def of_system(error: Exception) -> DifftoolError | None:
    """The user-facing form of memory and disk giving out, and of what the system refuses to do with
    a file; None for anything else."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("the disk is full", str(error), "free some space and run again")
    if out_of_memory(error):
        hint = "use a smaller --batch-size or --size"
        return ResourceError("out of memory", first_line(error), hint)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f'there can be no file "{error.filename}"', "its name is too long")
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        why = f"names of files are {error.encoding} here"
        return UsageError(f'there can be no file "{error.object}"', why, "set LC_ALL=C.UTF-8")
    if isinstance(error, OSError) and error.filename is not None:
        return unreadable(error.filename, error)
    return None


@contextmanager
def in_words() -> Iterator[None]:
    """What the system refuses within is one of our errors, in words; also a decorator."""
    try:
        yield
    except Exception as error:
        if (worded := of_system(error)) is None:
            raise
        raise worded from error
