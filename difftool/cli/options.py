"""Rows of options as a Typer command: parameters, panels, completion; and the rows all share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from difftool.cli import console, help
from difftool.cli.completion import completer
from difftool.cli.lists import KINDS
from difftool.config.options import RUN, Option, read_options, switch
from difftool.errors import UsageError
from difftool.signals import code_of


class Command(TyperCommand):
    """A command of rows, with a help of its own."""

    rows: ClassVar[Sequence[Option]] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _completed(args, self.rows))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        help.show(ctx.command_path, self.help or "", [*self.rows, HELP])


def _completed(args: Sequence[str], rows: Sequence[Option]) -> list[str]:
    """Arguments with the value of each flag that may stand alone."""
    alone = {flag: row for row in rows if row.alone is not None for flag in row.spellings}
    made, end = list[str](), args.index("--") if "--" in args else len(args)
    for i, arg in enumerate(args):
        row = alone.get(arg) if i < end else None
        following = args[i + 1 : i + 2]
        if row is None or any(_is_value(value, row) for value in following):
            made.append(arg)
        else:
            made.append(f"{arg}={row.alone}")
    return made


def _is_value(text: str, row: Option) -> bool:
    """Whether it is one of the few values that an option has."""
    try:
        return not text or (row.read is not None and row.read(text) is not None)
    except UsageError:
        return False


class Group(TyperGroup):
    """The tool itself, with its commands."""

    rows: ClassVar[Sequence[Option]] = ()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = {name: command.help or "" for name, command in self.commands.items()}
        help.show(ctx.command_path, self.help or "", [*self.rows, HELP], commands)


def _escaped(text: str) -> str:
    """As text for Typer, which reads brackets as markup where it shows a completion's meaning."""
    return text.replace("[", "\\[")


def parameter(row: Option) -> inspect.Parameter:
    """Typer's parameter of an option."""
    # As texts: a Path of "" would be the working folder, and what is no number is ours to say.
    one: Any = bool if row.type is bool else str
    kind: Any = list[one] if row.many else one
    if row.argument:
        info: Any = typer.Argument(
            metavar=help.metavar(row), help=_escaped(row.help), autocompletion=completer(row)
        )
    else:
        info = typer.Option(
            *(row.flags or (row.flag,)),
            metavar=row.metavar,
            help=_escaped(row.help),
            autocompletion=completer(row),
            show_default=False,
        )
    default: Any = inspect.Parameter.empty if row.required else None
    annotation = kind if row.required else kind | None
    if _is_switch(row):
        annotation, default = bool, False
    return inspect.Parameter(
        row.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, info],
    )


def _is_switch(row: Option) -> bool:
    return row.type is bool and not any("/" in flag for flag in row.flags)


def _number(kind: type[int] | type[float], text: Any) -> Any:
    """The number that a text is, or the texts of a list are; as they stand where they are none."""
    if isinstance(text, list):
        return [_number(kind, each) for each in text]
    try:
        return text if text is None else kind(text)
    except ValueError:
        return text


F = TypeVar("F", bound=Callable[..., Any])


def with_rows(function: F, rows: Sequence[Option], *first: inspect.Parameter) -> F:
    """Let Typer see these rows, after what comes first, as the parameters of a function."""
    parameters = [*first, *map(parameter, rows)]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def command(
    rows: Sequence[Option], run: Callable[[dict[str, Any]], int | None], *, name: str, about: str
) -> Callable[..., int | None]:
    """A Typer command of these rows: `run` gets every option by name, read and checked, and gives
    the exit code; None = 0.

    How the process talks (--json, --quiet, --debug, --verbose) is set before anything is checked.
    """

    def function(**given: Any) -> int | None:
        for flag in ("json", "quiet", "debug", "verbose"):
            if given.get(flag):
                setattr(console.mode, flag, True)
        if given.get("offline"):  # what the hub's own package goes by, in child processes too
            os.environ["HF_HUB_OFFLINE"] = "1"
        switches = {row.name for row in rows if _is_switch(row)}
        given = {
            n: None if value is False and n in switches else value for n, value in given.items()
        }
        numbers = {row.name: row.type for row in rows if row.type in (int, float)}
        given |= {n: _number(kind, given[n]) for n, kind in numbers.items() if n in given}
        try:
            return run(read_options(rows, given))
        except KeyboardInterrupt as stop:  # which Typer would end in silence
            console.say("interrupted")
            return code_of(stop)

    function.__name__ = name
    function.__doc__ = about
    return with_rows(function, rows)


PRINT_CONFIG = switch("print_config", "Print the configuration, each value's origin, and stop")
HELP = switch("help", "Show this and stop", "--help", "-h")
JSON = switch("json", "Results as JSON on stdout")
LIST = Option(
    name="list", panel=RUN, metavar="KIND", choices=lambda: KINDS,
    help="List what there is, and stop",
)  # fmt: skip
PLUGIN = Option(
    name="plugin", type=Path, many=True, panel=RUN, metavar="FILE.py",
    help="Add the samplers, schedules, ... of a file of your own; repeatable",
)  # fmt: skip
TALK = (
    PLUGIN,
    LIST,
    JSON,
    switch("quiet", "No talk on stderr", "--quiet", "-q"),
    switch("verbose", "All that was decided, on stderr", "--verbose", "-v"),
    switch("debug", "Tracebacks with errors"),
)
"""What every command has; each ends with these rows."""
