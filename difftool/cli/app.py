"""The `difftool` command: its subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from typing import Any

import typer

from difftool.cli import completion, console, habits, lists
from difftool.cli.options import JSON, LIST, PLUGIN, Command, Group, command, with_rows
from difftool.config.options import RUN, Option
from difftool.errors import DifftoolError, UsageError, first_line, of_system, suggestion
from difftool.signals import code_of, ended_by_signals
from difftool.version import __version__

ABOUT = """
Train, sample, inspect and convert diffusion models.

difftool COMMAND --help says what a command takes, with examples.
"""
COMMANDS = {
    "train": "Train a diffusion model on a folder of pictures.",
    "sample": "Make pictures from prompts, classes or nothing.",
    "noise": "Show what the forward process does to a picture.",
    "convert": "Convert a model to another format, losing nothing, or say what is in it.",
}
"""The commands, each a module of its name, and a line about it."""
VERSION = Option(name="version", type=bool, panel=RUN, help="Show the version")
COMPLETION = (
    Option(name="install_completion", type=bool, panel=RUN, help="Teach your shell completion"),
    Option(name="show_completion", type=bool, panel=RUN, help="Show what would be installed"),
)
"""Typer's own."""


CONTEXT = inspect.Parameter(
    "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
)


class Root(Group):
    """What stands before a command."""

    rows = (VERSION, LIST, PLUGIN, JSON, *COMPLETION)


def build(words: Sequence[str], *, asked: bool = False) -> typer.Typer:
    """The tool for a command line of these words; asked: by a shell, for the rest of a word.

    Only the command that is meant is imported: the help of all needs their lines.
    """
    wanted = next((word for word in words if word in COMMANDS), None)
    first = asked or words[0] != wanted  # else nothing before the command has to be read: faster
    app = typer.Typer(
        name="difftool",
        help=ABOUT,
        add_help_option=first,
        add_completion=first,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    root = with_rows(_root, (VERSION, LIST, PLUGIN, JSON) if asked else (VERSION, JSON), CONTEXT)
    app.callback(cls=Root, invoke_without_command=True)(root)
    for name, about in COMMANDS.items():
        if name != wanted:
            app.command(name, help=about)(lambda: None)
            continue
        module = import_module(f"difftool.cli.{name}")
        kind = type(name, (Command,), {"rows": module.ROWS})
        made = command(module.ROWS, module.run, name=name, about=module.ABOUT)
        app.command(name, cls=kind)(made)
    return app


def _root(context: typer.Context, **given: Any) -> None:
    if given["version"]:
        console.emit(f"difftool {__version__}")
    elif context.invoked_subcommand is None:
        raise UsageError("no command was given", hint="choose from: " + ", ".join(COMMANDS))


def main() -> None:
    """Run the command line; every failure ends in the exit code that the contract names."""
    try:
        console.forgive()
        with ended_by_signals() as received:
            code = _run()
        if received and code == 128 + signal.SIGINT:  # as which Typer ends by any interrupt
            console.say("interrupted")
            code = 128 + received[0]
        sys.stdout.flush()
    except DifftoolError as error:
        code = _report(error)
    except typer.TyperException as error:
        code = _report_usage(error)
    except (typer.Abort, KeyboardInterrupt) as stop:
        with suppress(BrokenPipeError):
            console.say("interrupted")
        code = code_of(stop.__cause__ or stop)  # Typer's own is raised from what it stands for
    except BrokenPipeError:
        console.leave(sys.stdout, sys.stderr)  # a reader went away: `| head`
        code = 128 + int(getattr(signal, "SIGPIPE", 13))
    except Exception as error:
        code = _report(of_system(error) or _fault(error))
    sys.exit(code if isinstance(code, int) else 0)


def _run() -> int | None:
    completion.join_assignments()
    asked = completion.words()
    words = asked or sys.argv[1:] or ["--help"]
    console.mode.json = "--json" in words  # for what is wrong before options are read
    console.mode.debug = "--debug" in words
    kinds, words = _taken(words, LIST)
    plugins, words = _taken(words, PLUGIN)
    plugins = PLUGIN.value(plugins) or []
    if kinds or not COMMANDS.keys().isdisjoint(words):
        _load_plugins(plugins, quiet=asked is not None)
    if kinds and asked is None:
        return lists.show(kinds[0])
    named = next((word for word in words if not word.startswith("-")), None)
    if named not in (None, *COMMANDS) and asked is None:
        raise UsageError(f'there is no command "{named}"', hint=suggestion(str(named), COMMANDS))
    app = build(words, asked=asked is not None)
    return app(words, prog_name="difftool", standalone_mode=False)


def _taken(words: Sequence[str], row: Option) -> tuple[list[str], list[str]]:
    """The values of an option that is done with before a command's own are read; other words."""
    values: list[str] = []
    others: list[str] = []
    ahead = iter(words)
    for word in ahead:
        if word == row.flag:
            values.append(next(ahead, ""))
        elif word.startswith(f"{row.flag}="):
            values.append(word.partition("=")[2])
        else:
            others.append(word)
            if word == "--":
                others += ahead
    return values, others


def _load_plugins(paths: Sequence[str], quiet: bool) -> None:
    """Load what installed packages and the command line add, before help and choices need it;
    quiet: as far as can be."""
    from difftool.plugins import load_entry_points, load_plugins

    try:
        load_entry_points()
    except DifftoolError as error:  # which is no reason not to work without it
        if not quiet:
            console.warn(": ".join(part for part in (error.what, error.why) if part))
    try:
        load_plugins(paths)
    except DifftoolError:
        if not quiet:
            raise


def _report(error: DifftoolError) -> int:
    if console.mode.debug:
        import traceback

        traceback.print_exc()
    console.fail(error)
    return error.code


def _report_usage(error: typer.TyperException) -> int:
    """Typer's own complaints (unknown option, missing argument) in the shape of ours."""
    context = getattr(error, "ctx", None)
    called = context.command_path if context else "difftool"
    rows = getattr(context and context.command, "rows", ())
    if rows and hasattr(error, "possibilities"):  # flags of a similar name: there is no such one
        return _report(habits.answer(getattr(error, "option_name", ""), rows, called))
    message = getattr(error, "format_message", lambda: str(error))().rstrip(".")
    value = _value(getattr(getattr(error, "param", None), "opts", ()))
    why = f"got {value}" if value is not None and value not in message else None
    return _report(
        UsageError(message or "the command line cannot be read", why, f"see {called} --help")
    )


def _value(options: Sequence[str]) -> str | None:
    """The value that an option was given on the command line."""
    for word, following in pairwise([*sys.argv[1:], ""]):
        name, sign, value = word.partition("=")
        if name in options:
            return value if sign else following
    return None


def _fault(error: Exception) -> DifftoolError:
    """The user-facing form of a mistake of ours."""
    what, kind = first_line(error), type(error).__name__
    why = kind if what == kind else f"{kind}: {what}"
    return DifftoolError("something went wrong inside difftool", why, "--debug shows where")
