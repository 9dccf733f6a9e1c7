"""Files and streams of prompts, read as they come: a line each, or an array of JSON. Torch-free."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

from difftool.errors import DifftoolError, UsageError
from difftool.sampling.requests import Request, located, parse_element, parse_line

MAX_LINE = 1 << 20
CHUNK = 1 << 16

Lines = Iterable[Request | DifftoolError | None]
"""Requests as they come: an error where one cannot be read, None where the next has to be waited
for."""
Chunks = Iterable[bytes | None]
"""Bytes as they come; None where the next have to be waited for."""
Entry = tuple[int, bytes | UsageError]
"""The line that it begins on, and a line, or an element of the array, or what is wrong there."""


NOTHING = Request()
"""Asks for nothing."""


def read_requests(where: str, base: Request = NOTHING) -> Lines:
    """The requests of a file, or of stdin for "-", each completed by `base`: one a line, or where
    the first thing in it is an array of JSON, one an element.

    One that cannot be read is its error. None means that nothing more is there yet, so that what
    was read can be worked on: a stream's first image does not wait for its last line.
    """
    try:
        # Not the sys.stdin object: a thread left waiting in it would hold its lock at exit.
        descriptor = 0 if where == "-" else os.open(where, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise UsageError(f"cannot read the prompts {where}", error.strerror) from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"the prompts {where} are a folder", hint="give a file, or - for stdin")
    chunks: Chunks = _chunks(descriptor)
    if not stat.S_ISREG(mode):
        chunks = _ahead(chunks)
    return _parsed(chunks, "stdin" if where == "-" else Path(where).name, base)


def _parsed(chunks: Chunks, source: str, base: Request) -> Lines:
    start, is_array = b"", None
    chunks = iter(chunks)
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        start += chunk
        if (is_array := _opens_array(start)) is not None or len(start) > MAX_LINE:
            break
    skipped = _blank(start)
    first, chunks = 1 + start[:skipped].count(b"\n"), chain([start[skipped:]], chunks)
    for entry in (_elements if is_array else _lines)(chunks, first):
        if entry is None:
            yield None
            continue
        number, text = entry
        at = replace(base, source=f"{source} line {number}", line=number)
        try:
            if isinstance(text, UsageError):
                raise text
            if len(text) > MAX_LINE:
                raise UsageError("it is too long", f"the limit is {MAX_LINE} bytes")
            read = parse_element if is_array else parse_line
            if (request := read(text.decode("utf-8"))) is not None:
                yield request.over(at)
        except UnicodeDecodeError:
            yield located(UsageError("not UTF-8 text"), at)
        except DifftoolError as error:
            yield located(error, at)


_BLANK = re.compile(rb"(?:\xef\xbb\xbf)?(?:[ \t\r]*(?:#[^\n]*)?\n)*[ \t\r]*")
"""Blank lines and comments."""
_ARRAY = re.compile(rb"""\[\s*(?:"|\{\s*["}\r\n]|\]\s*$|[\r\n])""")
"""How an array begins: prompts begin with brackets too, and with braces in them."""


def _blank(start: bytes) -> int:
    """How many bytes come before the first thing in a file."""
    found = _BLANK.match(start)
    return found.end() if found else 0


def _opens_array(start: bytes) -> bool | None:
    """Whether the first thing in a file is an array of JSON; None where more has to be read to
    tell."""
    first = start[_blank(start) :]
    if _ARRAY.match(first):
        return True
    return False if b"\n" in first or (first and not first.startswith((b"[", b"#"))) else None


# --- lines ------------------------------------------------------------------------------------


def _lines(chunks: Chunks, first: int) -> Iterator[Entry | None]:
    """Lines as they arrive. Of one that is too long only so much is kept as tells."""
    number, rest = first, b""
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield number, line
            number += 1
        rest = rest[: MAX_LINE + 1]
    if rest:
        yield number, rest


# --- an array ---------------------------------------------------------------------------------

_MARK = re.compile(rb'\\.|["{}\[\],\n]', re.S)
_ENDS_ESCAPED = re.compile(rb"\\*\Z")


def _elements(chunks: Chunks, first: int) -> Iterator[Entry | None]:
    """The elements of an array, each as soon as it is whole; what is wrong within one is its own
    matter."""
    array = _Array(first)
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        yield from array.feed(chunk)
        if array.is_over:
            return
    yield from array.end()


class _Array:
    """Cuts an array that comes in chunks into its elements."""

    def __init__(self, line: int) -> None:
        self.depth, self.line = 0, line
        self.is_over = self.quoted = False
        self.text, self.held = b"", b""
        self.begun = line
        """The line on which `text` begins."""

    def feed(self, chunk: bytes) -> Iterator[Entry]:
        chunk, begin = self.held + chunk, 0
        found = _ENDS_ESCAPED.search(chunk)
        self.held = found[0] if found else b""  # what it escapes is yet to come
        chunk = chunk.removesuffix(self.held)
        for mark in _MARK.finditer(chunk):
            char = mark[0]
            if char == b"\n":
                self.line += 1
                if self.quoted and self.depth > 1:  # a text that is not closed: so much is lost
                    yield from self._cut(chunk[begin : mark.start()])
                    begin, self.depth = mark.end(), 1
                self.quoted = False
            elif char == b'"':
                self.quoted = not self.quoted
            elif self.quoted or len(char) > 1 or self.depth < 0:
                continue
            elif char in b"[{":
                self.depth += 1
                begin = mark.end() if self.depth == 1 else begin
            elif char == b",":
                if self.depth == 1:
                    yield from self._cut(chunk[begin : mark.start()])
                    begin = mark.end()
            elif self.depth > 1 or char == b"]":
                self.depth -= 1
                if self.depth < 2:
                    end = mark.end() if self.depth else mark.start()
                    yield from self._cut(chunk[begin:end])
                    begin = mark.end()
                    self.depth = self.depth or -1
        self.text += chunk[begin:]
        if self.depth < 0 and self.text.strip():
            self.is_over = True
            yield self.line, UsageError("something follows the end of the array")
        elif len(self.text) > MAX_LINE:
            self.is_over = True
            yield from self._cut(b"")

    def _cut(self, rest: bytes) -> Iterator[Entry]:
        """The element that ends with that."""
        text, first = self.text + rest, self.begun
        self.text, self.begun = b"", self.line
        if text.strip():
            blank = len(text) - len(text.lstrip())
            yield first + text[:blank].count(b"\n"), text.strip()

    def end(self) -> Iterator[Entry]:
        """What is left where no more comes."""
        if self.depth >= 0:
            yield from self._cut(self.held)
            yield self.line, UsageError("the array has no end", hint="it is closed by ]")


# --- bytes ------------------------------------------------------------------------------------


def _chunks(descriptor: int) -> Iterator[bytes]:
    """Bytes as they arrive, without waiting for a full buffer."""
    try:
        while chunk := os.read(descriptor, CHUNK):
            yield chunk
    finally:
        if descriptor:
            os.close(descriptor)


def _ahead(chunks: Iterable[bytes | None]) -> Iterator[bytes | None]:
    """The same, read by a thread; None whenever the next have to be waited for."""
    queue: Queue[bytes | None] = Queue(maxsize=64)

    def read() -> None:
        try:
            for chunk in chunks:
                queue.put(chunk)
        finally:
            queue.put(None)

    Thread(target=read, daemon=True).start()
    while True:
        try:
            chunk = queue.get_nowait()
        except Empty:
            yield None
            chunk = queue.get()
        if chunk is None:
            return
        yield chunk
