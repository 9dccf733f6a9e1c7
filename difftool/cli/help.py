"""The help of a command: how it is called, what it does, and its options, a panel a task."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from difftool.config.options import Option

WIDTH = 100
"""Lines are not longer than that, however wide the terminal is."""
HEADING = "Examples"
"""A line of a command's description that heads what follows."""
METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}


def show(
    called: str, about: str, rows: Sequence[Option], commands: Mapping[str, str] | None = None
) -> None:
    """Print the help of a command of these options, or of the tool with its commands."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    width = min(console.width, WIDTH)
    usage = " ".join(map(_place, filter(lambda row: row.argument, rows))) or "COMMAND ..."
    for line in ("", f"Usage: {called} [OPTIONS] {usage}", "", *_wrapped(about.strip(), width), ""):
        heads = line == HEADING or line.startswith("Usage: ")
        console.print(Text(line, style="bold" if heads else ""))
    panels: dict[str, list[tuple[Text, Text]]] = {}
    if commands:
        panels["Commands"] = [(Text(name, "bold cyan"), Text(a)) for name, a in commands.items()]
    for row in rows:
        start = Text(" ").join(
            Text(*each) for each in ((names(row), "bold cyan"), (metavar(row), "yellow")) if each[0]
        )
        default = row.shown_default()
        end = Text.assemble(meaning(row), (f"  [{default}]" if default else "", "dim"))
        panels.setdefault(row.panel, []).append((start, end))
    first = max(len(start) for lines in panels.values() for start, _ in lines)
    for title, lines in panels.items():
        console.print(_panel(title, lines, first), width=width)


def _panel(title: str, lines: Sequence[tuple[Any, Any]], first: int) -> Any:
    """Two columns in a frame, the first of a given width."""
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(width=first, no_wrap=True)
    grid.add_column(ratio=1)
    for start, end in lines:
        grid.add_row(start, end)
    return Panel(grid, title=title, title_align="left", border_style="dim")


_wrap = partial(textwrap.wrap, break_on_hyphens=False, break_long_words=False)


def _wrapped(text: str, width: int) -> Iterator[str]:
    """The lines of a text: paragraphs filled; what is indented stays, and goes on further in."""
    for indented, lines in groupby(text.splitlines(), key=lambda line: line[:1] in ("", " ")):
        if indented:
            for line in lines:
                inner = " " * (len(line) - len(line.lstrip()) + 4)
                yield from _wrap(line, width, subsequent_indent=inner) or [""]
        else:
            *_, last = lines = list(lines)
            heading = [last] if last == HEADING else []
            yield from _wrap(" ".join(lines[: -1 if heading else None]), width)
            yield from heading


def _place(row: Option) -> str:
    """Where an argument stands on the command line: "[PROMPT]..."."""
    place = metavar(row) if row.required else f"[{metavar(row)}]"
    return f"{place}..." if row.many else place


def names(row: Option) -> str:
    """How an option is spelled: "-m, --model", "--[no-]ema", "PROMPT"."""
    if row.argument:
        return ""
    flags = sorted(row.flags or (row.flag,), key=len)
    return ", ".join(
        flag.partition("/")[0].replace("--", "--[no-]" if "/" in flag else "--") for flag in flags
    )


def metavar(row: Option) -> str:
    """What stands for the value of an option; nothing for a switch."""
    if row.argument:
        return row.flag.strip("[].")
    if row.metavar is not None or row.type is bool:
        return row.metavar or ""
    return "NAME" if row.choices is not None else METAVARS.get(row.type, "PATH")


def meaning(row: Option) -> str:
    """What an option does, and the values that there are."""
    said = row.help if row.choices is None else f"{row.help}: {', '.join(row.choices())}"
    return said if said.endswith(".") else f"{said}."
