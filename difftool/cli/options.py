"""Rows of options as a Typer command: parameters, panels, completion; and the rows all share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from difftool.cli import console
from difftool.config.options import Option, read_options

EVERYWHERE = "Everywhere"
DTYPES = ("auto", "fp32", "fp16", "bf16")


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _help(row: Option) -> str:
    """The line of an option in a command's help, its values and default included."""
    text = row.help.rstrip(".")
    if row.choices is not None:
        text = f"{text}: {', '.join(row.choices())}"
    return _escaped(f"{text}." + (f"  [{row.default}]" if row.default else ""))


def _completion(row: Option) -> Callable[[str], Iterable[str]] | None:
    values = row.complete or row.choices
    if values is None:
        return None

    def complete(incomplete: str) -> Iterable[str]:
        return [value for value in values() if value.startswith(incomplete)]

    return complete


def _parameter(row: Option) -> inspect.Parameter:
    """Typer's parameter of an option."""
    kind: Any = list[row.type] if row.many else row.type
    if row.argument:
        info: Any = typer.Argument(
            metavar=row.metavar, help=_help(row), autocompletion=_completion(row)
        )
    else:
        info = typer.Option(
            *(row.flags or (row.flag,)),
            metavar=row.metavar,
            help=_help(row),
            rich_help_panel=row.panel,
            autocompletion=_completion(row),
            show_default=False,
        )
    default: Any = inspect.Parameter.empty if row.required else None
    annotation = kind if row.required else kind | None
    return inspect.Parameter(
        row.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, info],
    )


def command(
    rows: Sequence[Option], run: Callable[[dict[str, Any]], None], *, name: str, about: str
) -> Callable[..., None]:
    """A Typer command of these rows: `run` gets every option by name, read and checked.

    How the process talks (--json, --quiet, --debug, --verbose) is set before anything is checked.
    """

    def function(**given: Any) -> None:
        for flag in ("json", "quiet", "debug", "verbose"):
            if given.get(flag):
                setattr(console.mode, flag, True)
        if given.get("offline"):  # what the hub's own package goes by, in child processes too
            os.environ["HF_HUB_OFFLINE"] = "1"
        run(read_options(rows, given))

    parameters = [_parameter(row) for row in rows]
    function.__name__ = name
    function.__doc__ = about
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _switch(name: str, help: str, *flags: str) -> Option:
    return Option(name=name, type=bool, help=help, panel=EVERYWHERE, flags=flags)


SET = Option(
    name="set", many=True, metavar="KEY.PATH=VALUE", panel=EVERYWHERE,
    help="Change a value of the preset; repeatable",
)  # fmt: skip
PRINT_CONFIG = _switch("print_config", "Print the configuration, each value's origin, and stop")
DEVICE = Option(
    name="device", help="auto, cpu, cuda, cuda:1 or mps", panel=EVERYWHERE, default="auto",
    complete=lambda: ("auto", "cpu", "cuda", "mps"),
)  # fmt: skip
DTYPE = Option(
    name="dtype", help="Arithmetic of the networks", panel=EVERYWHERE, default="auto",
    choices=lambda: DTYPES,
)  # fmt: skip
OFFLINE = _switch("offline", "Never use the network: models of the hub from its cache only")
OVERWRITE = _switch("overwrite", "Replace existing output")
TALK = (
    _switch("json", "Results as JSON on stdout"),
    _switch("quiet", "No talk on stderr", "--quiet", "-q"),
    _switch("verbose", "All that was decided, on stderr", "--verbose", "-v"),
    _switch("debug", "Tracebacks with errors"),
)
"""How a command talks; every command ends with these rows."""
