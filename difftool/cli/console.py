"""What the commands share at the terminal: results on stdout, talk on stderr, errors in one shape.

Everything that came from a file or a user is printed through `plain`, so that no control character
and no markup of theirs reaches the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from difftool.errors import DifftoolError, UsageError, suggestion

SCHEMA = 1


@dataclass
class Mode:
    """How this process talks; set once from the command's flags."""

    json: bool = False
    quiet: bool = False
    debug: bool = False


mode = Mode()


def _set(name: str) -> Callable[[bool], bool]:
    def callback(value: bool) -> bool:
        setattr(mode, name, value)
        return value

    return callback


def choices(kind: str, names: Mapping[str, Any] | list[str]) -> str:
    """Help text that lists the values of a choice option."""
    return f"{kind}: {', '.join(names)}."


def choice(names: list[str]) -> Callable[[str | None], str | None]:
    """Callback that accepts one of a fixed list of values and suggests the nearest on a typo."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise UsageError(
                f'"{plain(value)}" is not a choice here', hint=suggestion(value, names)
            )
        return value

    return check


PANEL = "Everywhere"
DTYPES = ["auto", "fp32", "fp16", "bf16"]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_set("json"),
        is_eager=True,
        help="Results as JSON on stdout.",
        rich_help_panel=PANEL,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_set("quiet"),
        is_eager=True,
        help="No talk on stderr.",
        rich_help_panel=PANEL,
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=_set("debug"),
        is_eager=True,
        help="Tracebacks with errors.",
        rich_help_panel=PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=PANEL),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        callback=choice(DTYPES),
        help=choices("Arithmetic of the networks", DTYPES),
        rich_help_panel=PANEL,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Change a value of the preset; repeatable.",
        rich_help_panel=PANEL,
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Print the resolved configuration, each value with its origin, and stop.",
        rich_help_panel=PANEL,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


def plain(value: object) -> str:
    """Text that is safe to print: control characters are shown as escapes."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(value)
    )


def interactive() -> bool:
    """Whether stderr is a terminal that can show moving progress."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ


def _print(text: str, style: str | None = None) -> None:
    if style is None or not interactive():
        print(plain(text), file=sys.stderr, flush=True)
        return
    from rich.console import Console

    Console(stderr=True).print(plain(text), style=style, markup=False, highlight=False)


def say(text: str) -> None:
    """Talk: what was decided, what happens. Silent under --quiet."""
    if not mode.quiet:
        _print(text)


def warn(text: str) -> None:
    """A warning; shown under --quiet too."""
    _print(f"warning: {text}", "yellow")


def emit(result: str | Mapping[str, Any]) -> None:
    """A result on stdout, at once: a line of text, or a JSON object."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    print(text, file=sys.stdout, flush=True)


def fail(error: DifftoolError) -> None:
    """An error in up to three lines on stderr, or as JSON on stdout under --json."""
    if mode.json:
        message = ": ".join(part for part in (error.what, error.why) if part)
        detail = {"code": error.code, "message": message, "hint": error.hint}
        emit({"schema": SCHEMA, "error": detail})
        return
    _print(f"error: {error.what}", "bold red")
    for line in (error.why, error.hint):
        if line:
            _print(f"  {line}")


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


class PlainProgress:
    """Progress without a terminal: one line every ten seconds, or every tenth of the work."""

    def __init__(self, description: str, total: int | None):
        self.description, self.total = description, total
        self.said_at, self.said_share = time.monotonic(), 0.0

    def update(self, done: float, **fields: Any) -> None:
        share = done / self.total if self.total else 0.0
        now = time.monotonic()
        if now - self.said_at < 10 and share - self.said_share < 0.1 and done != self.total:
            return
        self.said_at, self.said_share = now, share
        of = f"/{self.total}" if self.total else ""
        rest = "".join(f"  {name} {value}" for name, value in fields.items())
        say(f"{self.description} {done:g}{of}{rest}")


class RichProgress:
    """Progress on a terminal: a bar that updates in place, with the fields given."""

    def __init__(self, description: str, total: int | None):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rest]}", style="cyan", markup=False),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # Results that go into a pipe must not be drawn above the bar, on stderr, instead.
            redirect_stdout=sys.stdout.isatty(),
            expand=True,
        )
        self.task = self.bar.add_task(description, total=total, rest="")

    def update(self, done: float, **fields: Any) -> None:
        rest = " ".join(f"{name} {value}" for name, value in fields.items())
        self.bar.update(self.task, completed=done, rest=rest)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[PlainProgress | RichProgress]:
    """A progress display; call `.update(done, field=value, ...)` on what it yields."""
    if mode.quiet or not interactive():
        yield PlainProgress(description, total)
        return
    display = RichProgress(description, total)
    with display.bar:
        yield display
