"""What the commands share at the terminal: results on stdout, talk on stderr, errors in one shape.

Everything that came from a file or a user is printed through `plain`, so that no control character
and no markup of theirs reaches the terminal.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from difftool.errors import DifftoolError, Stopped, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA = 1


@dataclass
class Mode:
    """How this process talks; set once from the command's flags."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    follower: bool = int(os.environ.get("WORLD_SIZE") or 1) > 1 and os.environ.get("RANK") != "0"
    """Another process of a parallel run speaks for this one."""
    moving: Any = None
    """The console of a line that moves in place: what is said meanwhile goes above it."""


mode = Mode()


MIN_COLUMN = 24
"""The narrowest column that text is wrapped in."""


def plain(value: object) -> str:
    """Text that is safe to print: control characters are shown as escapes."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(value)
    )


def interactive() -> bool:
    """Whether stderr is a terminal that can show moving progress."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ


def blind() -> str:
    """Why no picture can be shown; "" where one can."""
    if not interactive():
        return "shows on terminals alone"
    return "shows in colours, which NO_COLOR forbids" if "NO_COLOR" in os.environ else ""


def _print(text: str, style: str | None = None) -> None:
    try:
        if style is None or not interactive():
            print(plain(text), file=sys.stderr, flush=True)
            return
        from rich.console import Console

        shell = mode.moving or Console(stderr=True)
        shell.print(plain(text), style=style, markup=False, highlight=False)
    except BrokenPipeError:
        raise
    except OSError:
        pass  # a log on a full disk: no reason to end the work that it tells of


def say(text: str) -> None:
    """Talk: what was decided, what happens. Silent under --quiet."""
    if not (mode.quiet or mode.follower):
        _print(text)


def detail(text: str) -> None:
    """Talk that only --verbose shows: evidence, files, all that was decided."""
    if mode.verbose:
        say(text)


def warn(text: str) -> None:
    """A warning; shown under --quiet too."""
    if not mode.follower:
        _print(f"warning: {text}", "yellow")


def emit(result: str | Mapping[str, Any]) -> None:
    """A result on stdout, at once: a line of text, or a JSON object. What is read by programs is
    left as it is, what is shown on a terminal is made safe."""
    from difftool.storage.strict_json import to_json

    if mode.follower:
        return
    if isinstance(result, str):
        text = plain(result) if sys.stdout.isatty() else result
    else:
        text = to_json(result, ensure_ascii=False)
        text = text if _encodes(text) else to_json(result)
    print(text, file=sys.stdout, flush=True)


def _encodes(text: str) -> bool:
    """Whether stdout can show every character."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def forgive() -> None:
    """Let no character that the terminal cannot show end a command: it is shown as an escape. What
    goes to a stream that was closed before the start goes nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave(*streams: TextIO) -> None:
    """Nothing more is said there: the reader went away, or what is written to is full."""
    for stream in streams:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(error: DifftoolError, index: int | None = None) -> None:
    """An error in up to three lines on stderr, or as JSON on stdout under --json; index: of what
    was not made because of it."""
    if mode.follower and isinstance(error, UsageError | Stopped):
        return  # the first process says the same
    if mode.json:
        message = ": ".join(part for part in (error.what, error.why) if part)
        detail = {"code": error.code, "message": message, "hint": error.hint}
        where = {"index": index, "line": error.line}
        detail |= {name: number for name, number in where.items() if number is not None}
        try:
            emit({"schema": SCHEMA, "error": detail})
            return
        except OSError:
            leave(sys.stdout)  # said below to who still listens
    try:
        _print(f"error: {error.what}", "bold red")
        for line in (error.why, error.hint):
            if line:
                _print(f"  {line}")
    except BrokenPipeError:
        leave(sys.stderr)


class Alike:
    """Tells what is said for the first time from what is said again and again."""

    MOST = 5
    """Of a kind, how many are shown."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}

    def is_news(self, text: str) -> bool:
        """Whether a text is to be shown: it is none that was, nor one of many of its kind, which
        differ in numbers, names and what is quoted."""
        kind = re.sub(r'"[^"]*"|\S*[\d/\\.]\S*', "*", text)
        known = self._kinds.setdefault(kind, [])
        known.append(text)
        return text not in known[:-1] and len({*known}) <= self.MOST

    def rest(self) -> list[str]:
        """What is said in the end of those that were not shown."""
        left = {
            known[0]: len(known) - min(len({*known}), self.MOST) for known in self._kinds.values()
        }
        return [f"{n} more like this: {text}" for text, n in left.items() if n]


def table(rows: Iterable[Sequence[str]]) -> None:
    """Talk in columns: all but the last are as wide as their widest text; on a terminal the last
    one is wrapped under itself."""
    rows = [[plain(cell) for cell in row] for row in rows]
    if not rows:
        return
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    room = shutil.get_terminal_size().columns - indent if sys.stderr.isatty() else 0
    for *cells, last in rows:
        head = "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        if sys.stderr.isatty() and room < MIN_COLUMN:  # no room beside them: below, a little in
            say(head.rstrip())
            lines = textwrap.wrap(last, max(room + indent - 4, MIN_COLUMN))
            for line in lines:
                say(f"    {line}")
            continue
        lines = textwrap.wrap(last, room) if room else [last]
        for i, line in enumerate(lines or [""]):
            say(((head if i == 0 else " " * indent) + line).rstrip())


def print_config(rows: Iterator[tuple[str, Any, str]]) -> None:
    """Each value of a resolved configuration with its origin, aligned; JSON under --json."""
    rows = list(rows)  # type: ignore[assignment]
    if mode.json:
        emit({"schema": SCHEMA, "config": {k: {"value": v, "origin": o} for k, v, o in rows}})
        return
    texts = [(key, json.dumps(value, ensure_ascii=False), origin) for key, value, origin in rows]
    key_width = max((len(key) for key, _, _ in texts), default=0)
    value_width = min(40, max((len(value) for _, value, _ in texts), default=0))
    for key, value, origin in texts:
        emit(plain(f"{key:<{key_width}}  {value:<{value_width}}  # {origin}"))


class Pace:
    """How far a work is, how fast it goes, and how long it will take."""

    def __init__(self, description: str, total: int | None, unit: str = ""):
        self.description, self.total, self.unit = description, total, unit
        self.now = description
        """What is being done."""
        self.done, self.fields = 0.0, {}
        self.began = time.monotonic()
        self.first: tuple[float, float] | None = None

    def update(self, done: float, **fields: Any) -> None:
        """Count what is done; a resumed work starts where its first update says."""
        self.done, self.fields, self.now = done, fields, self.description
        if self.first is None:
            self.first = time.monotonic(), done

    def count(self) -> str:
        """ "  400/2000" """
        if not self.total:
            return f"{self.done:g} {self.unit}".rstrip()
        return f"{self.done:>{len(str(self.total))}g}/{self.total}"

    def elapsed(self) -> str:
        """Since the beginning."""
        return clock(time.monotonic() - self.began)

    def each(self) -> float | None:
        """Seconds for each, so far; None before that is known."""
        if self.first is None or self.done <= self.first[1]:
            return None
        return (time.monotonic() - self.first[0]) / (self.done - self.first[1])

    def left(self) -> str | None:
        """What is left, at the pace so far; None before there is one, and in the end."""
        each = self.each()
        if not self.total or self.done == self.total or each is None:
            return None
        return clock(each * (self.total - self.done))

    def rate(self) -> str | None:
        """ "3.2 it/s" or "1.6 s/it"; None where it is not counted, or not yet known."""
        each = self.each() if self.unit else None
        if not each:
            return None
        return f"{1 / each:.1f} {self.unit}/s" if each < 1 else f"{each:.1f} s/{self.unit}"


class PlainProgress:
    """Progress in a log: a line every tenth of the work (not more than one a second), and every ten
    seconds; as a work gets long, rarer."""

    def __init__(self, description: str, total: int | None, unit: str = ""):
        self.pace = Pace(description, total, unit)
        self.said_at, self.said_share = self.pace.began, 0.0
        self.said: tuple[float, dict[str, Any]] | None = None

    def update(self, done: float, **fields: Any) -> None:
        pace, now = self.pace, time.monotonic()
        pace.update(done, **fields)
        share = done / pace.total if pace.total else 0.0
        waited = now - self.said_at >= max(10, 0.02 * (now - pace.began))
        tenth = share - self.said_share >= 0.1 and now - self.said_at >= 1
        news = done == pace.total and (done, fields) != self.said
        if not (waited or tenth or news):
            return
        self.said = done, fields
        self.said_at, self.said_share = now, share
        left, rate = pace.left(), pace.rate()
        words = [f"{name} {value}" for name, value in fields.items()]
        words += [pace.elapsed(), *([rate] if rate else []), *([f"eta {left}"] if left else [])]
        say("  ".join([f"{pace.description} {pace.count()}", *words]))

    def show(self, picture: Image) -> None:
        """A log shows no pictures."""

    def during(self, text: str) -> None:
        """Say what is done beside what is counted, where all of that is done."""
        if self.pace.done == self.pace.total:
            say(f"{text} ...")


class RichProgress:
    """Progress on a terminal: a bar that moves in place, with the fields that there is room for,
    and above it a picture, if there is one to show."""

    BAR = (8, 40)
    """Shortest and longest bar, in columns."""

    def __init__(self, description: str, total: int | None, unit: str = ""):
        from rich.console import Console
        from rich.live import Live

        self.pace = Pace(description, total, unit)
        self.picture: tuple[Image, tuple[int, int], str] | None = None
        self.bar = Live(
            self,
            console=mode.moving or Console(stderr=True),  # one draws all the lines that move
            refresh_per_second=4,
            # Results that go into a pipe must not be drawn above the bar, on stderr, instead.
            redirect_stdout=sys.stdout.isatty(),
        )

    def update(self, done: float, **fields: Any) -> None:
        self.pace.update(done, **fields)

    def during(self, text: str) -> None:
        """Show what is done beside what is counted."""
        self.pace.now = text

    def show(self, picture: Image) -> None:
        """Show a picture above the bar."""
        from difftool.images.terminal import cells, escapes, protocol

        if "NO_COLOR" in os.environ:
            return
        how, shell = protocol(os.environ), self.bar.console
        size = cells(picture.size, (shell.width - 1, shell.height - 4))
        self.picture = picture, size, how
        if how == "blocks":
            return
        self.bar.auto_refresh = False  # which would draw over the picture
        self.bar.refresh()
        shell.file.write(f"\x1b7\x1b[{size[1]}A\r{escapes(picture, size, how)}\x1b8")
        shell.file.flush()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        if self.picture is not None:
            yield self._lines(*self.picture)
        yield self.line(options.max_width)

    def _lines(self, picture: Image, size: tuple[int, int], how: str) -> Any:
        """A picture as half blocks, or room for it."""
        from rich.text import Text

        from difftool.images.terminal import BLOCK, blocks

        if how != "blocks":
            return Text("\n" * (size[1] - 1))
        text = Text(no_wrap=True, overflow="crop")
        for row in blocks(picture, size):
            text.append("\n" if text else "")
            for upper, lower in row:
                text.append(BLOCK, f"{upper} on {lower}")
        return text

    def line(self, width: int) -> Any:
        """The line in that many columns: what matters most, then a bar if there is room."""
        from rich.text import Text

        pace, gap = self.pace, 2
        left = pace.left()
        first, *rest = [f"{name} {value}" for name, value in pace.fields.items()] or [""]
        # Name, text, style, in the order of the line; below, in that of what is kept longest.
        pieces = {
            "description": (pace.now, ""),
            "bar": (" " * self.BAR[0], ""),
            "count": (pace.count(), "green"),
            "first": (first, "cyan"),
            **{f"rest {i}": (text, "cyan") for i, text in enumerate(rest)},
            "rate": (pace.rate() or "", "dim"),
            "elapsed": (pace.elapsed(), "dim"),
            "eta": (f"eta {left}" if left else "", "yellow"),
        }
        if not pace.total:
            del pieces["bar"]
        others = [name for name in pieces if name.startswith("rest")]
        kept, used = set(), -gap
        for name in ("count", "first", "eta", "description", *others, "rate", "bar", "elapsed"):
            text = pieces.get(name, ("", ""))[0]
            if text and used + gap + len(text) <= width:
                kept.add(name)
                used += gap + len(text)
        line = Text(no_wrap=True, overflow="crop")
        for name, (text, style) in pieces.items():
            if name in kept:
                line.append(" " * gap if line else "")
                if name == "bar":
                    self._append_bar(line, min(self.BAR[1], self.BAR[0] + width - used))
                else:
                    line.append(plain(text), style)
        return line

    def _append_bar(self, line: Any, length: int) -> None:
        full = round(length * min(1.0, self.pace.done / (self.pace.total or 1)))
        line.append("━" * full, "green").append("─" * (length - full), "dim")


def clock(seconds: float) -> str:
    """ "3:05", "1:03:05", "2d 01:03" """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@contextmanager
def progress(
    description: str, total: int | None, unit: str = ""
) -> Iterator[PlainProgress | RichProgress]:
    """A progress display; call `.update(done, field=value, ...)` on what it yields. unit: of what
    is counted, where its speed is shown."""
    if mode.quiet or mode.follower or not interactive():
        yield PlainProgress(description, total, unit)
        return
    display = RichProgress(description, total, unit)
    with display.bar:
        before, mode.moving = mode.moving, display.bar.console
        try:
            yield display
        finally:
            mode.moving = before
        display.bar.transient = display.pace.first is None  # of no work no trace is left
