"""Options as rows: what a row says gives the flag, its help, completion, checks and the keyword of
the library. Torch-free.

A command is a list of rows (`cli.options` makes Typer's parameters of them); the library reads its
keywords by the same rows, so that both refuse the same values in the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftool.config.listed import Listed, Several
from difftool.config.numbers import FINITE, Within
from difftool.config.validate import within_of
from difftool.errors import UsageError, check_file, clash, suggestion, unknown

Choices = Callable[[], Iterable[str]]
"""Asked when help is shown, a word completed or a value checked: plugins may have added some."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command. None, everywhere, is an option that was not given."""

    name: str
    """Keyword in the library; the flag is --name with dashes, unless `flags` says otherwise."""
    type: Any = str
    """str, int, float, bool or Path, of one value."""
    many: bool = False
    """Whether it may be repeated, which makes a list of it; a mapping is a KEY=VALUE each."""
    argument: bool = False
    """Whether it is given by its place and not by a flag."""
    required: bool = False
    help: str
    panel: str
    flags: tuple[str, ...] = ()
    """Spellings of the flag, the one of messages first; "--a/--no-a" for a switch both ways."""
    metavar: str | None = None
    default: str | Callable[[], str] | None = None
    """What is shown as the default; asked when help is shown."""
    alone: str | None = None
    """The value that is meant by the flag without one."""
    blank: bool = False
    """Whether an empty text is a value: no prompt is one, no name is none."""
    file: str | None = None
    """What it is the path of, which must be there: "picture"."""
    folder: bool = False
    """Whether that may be a folder."""
    choices: Choices | None = None
    """The values that there are; `read` may take more (other tools' spellings)."""
    complete: Choices | None = None
    """Values to complete to where others are allowed too; None = `choices`."""
    read: Callable[[Any], Any] | None = None
    """From a value as it was typed to the value that is meant; UsageError if there is none."""
    listed: Listed | None = None
    """From what was given to its values, where several are tried in turn; None: it has one."""
    within: Within | None = None
    """What a number must be; None: what its key's must, which without a key is finite."""
    key: str | None = None
    """Path of the preset's value that it changes: "train.lr"."""
    excludes: tuple[str, ...] = ()
    """Names of options that cannot be given too; one side of a pair says it."""
    needs: tuple[str, ...] = ()
    """Names of options of which one must be given too."""
    why: str | None = None
    """What is said where `needs` is not met, after the flag: "is a LoRA's"."""

    @property
    def flag(self) -> str:
        """As it is named in messages."""
        if self.argument:
            return self.metavar or self.name.upper()
        return (self.flags[0] if self.flags else f"--{self.name.replace('_', '-')}").split("/")[0]

    @property
    def spellings(self) -> list[str]:
        """Every flag that gives it; none of an argument."""
        flags = () if self.argument else self.flags or (self.flag,)
        return [part for flag in flags for part in flag.split("/")]

    def shown_default(self) -> str | None:
        """What help shows as the default."""
        return self.default() if callable(self.default) else self.default

    def value(self, given: Any) -> Any:
        """The value that is meant by one as it was typed or passed; UsageError if it is not one."""
        _check_shown(given, self.flag)
        if self.many and isinstance(given, Mapping):
            given = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        if given is None or (self.many and isinstance(given, list | tuple) and not given):
            return None
        try:
            if not self.many:
                return self._each(given)
            return [self._each(g) for g in (given if isinstance(given, list | tuple) else [given])]
        except (TypeError, AttributeError) as error:
            if isinstance(given, str):
                raise
            raise UsageError(f"{self.flag} cannot be {given!r}", str(error)) from None

    def _each(self, given: Any) -> Any:
        """The value, or several that are to be tried in turn."""
        if self.listed is None or isinstance(given, bool) or given in ("", [], ()):
            return self.one(given)
        if isinstance(given, str):
            self._check_text(given, self.flag)
        found = Several((text, self.one(part)) for text, part in self.listed(given).items())
        return found if len(found) > 1 else next(iter(found.values()))

    def one(self, given: Any, called: str | None = None) -> Any:
        """The value that is meant by a single one; `called` is what messages call the option where
        it was not given by its flag (a key of JSON, say)."""
        called = called or self.flag
        _check_shown(given, called)
        if self.type in (int, float):
            if isinstance(given, str):
                self._check_text(given, called)
            self._check_number(given, called)
        elif self.type is bool and not isinstance(given, bool):
            raise UsageError(f"{called} {given!r} is neither true nor false")
        elif self.type in (str, Path) and isinstance(given, str | Path):
            self._check_text(str(given), called)
            given = self.type(given)
        if self.read is not None:
            return self.read(given)
        if self.type in (str, Path) and not isinstance(given, self.type):
            raise UsageError(f"{called} {given!r} is not a text")
        if self.choices is not None and given not in (names := list(self.choices())):
            known = suggestion(str(given), names)
            raise UsageError(f'{called} "{given}" is not one of its values', hint=known)
        return given

    def _check_text(self, given: str, called: str) -> None:
        if self.blank:
            return
        if not given.strip():
            hint = "leave it out, or see whether a variable of the shell has no value"
            raise UsageError(f"{called} is empty", hint=hint)
        if "\0" in given:
            raise UsageError(f"{called} has a NUL character", repr(given)[:80])

    def _check_number(self, given: object, called: str) -> None:
        if isinstance(given, bool) or not isinstance(given, int | float):
            kind = "whole number" if self.type is int and isinstance(given, str) else "number"
            raise UsageError(f"{called} {given!r} is not a {kind}")
        if self.type is int and not isinstance(given, int):
            raise UsageError(f"{called} {given} is not a whole number")
        (self.within or (within_of(self.key) if self.key else FINITE)).check(given, called)

    def check_files(self, value: Any) -> None:
        """UsageError if a file that it names is not there; what goes with a path may follow it."""
        if self.file is None:
            return
        for given in value if self.many else [value]:
            for each in given.values() if isinstance(given, Several) else [given]:
                path = each[0] if isinstance(each, tuple) else each
                check_file(self.file, Path(path), self.folder)


def _check_shown(given: object, called: str) -> None:
    """UsageError for what no message can show, as no value is: numbers of thousands of digits."""
    try:
        repr(given)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{called} cannot be read", str(error)) from None


def by_name(rows: Iterable[Option]) -> dict[str, Option]:
    """The rows of a command by their names; no two have one."""
    rows = list(rows)
    named = {row.name: row for row in rows}
    assert len(named) == len(rows), "a name that two options have"
    return named


def by_panels(rows: Iterable[Option], panels: Iterable[str] = ()) -> list[Option]:
    """Rows in the order of help, panel by panel: those named first, then as their first rows
    stand."""
    rows = [*rows]
    order = [*dict.fromkeys((*panels, *(row.panel for row in rows)))]
    return sorted(rows, key=lambda row: order.index(row.panel))


def read_options(rows: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a command by name: what was given, read and checked; None for the others.

    UsageError for an unknown name, a value that is not one, options that exclude each other and
    options whose company is missing, and files that are not there.
    """
    named = by_name(rows)
    for name in given:
        if name not in named:
            raise unknown("option", name, named)
    values = {name: row.value(given.get(name)) for name, row in named.items()}
    present = [name for name, value in values.items() if value is not None and value is not False]
    for row in map(named.__getitem__, present):
        for other in row.excludes:
            if other in present:
                raise clash(row.flag, named[other].flag)
        if row.needs and not any(other in present for other in row.needs):
            flags = " or ".join(named[other].flag for other in row.needs)
            why = row.why or "has nothing to apply to"
            raise UsageError(f"{row.flag} {why}", hint=f"add {flags}")
    for row in map(named.__getitem__, present):
        row.check_files(values[row.name])
    return values


def option_layers(
    rows: Iterable[Option], values: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """The values of options that are keys of a preset, each a flag and a nested mapping."""
    found: list[tuple[str, dict[str, Any]]] = []
    for row in rows:
        if row.key is None or values.get(row.name) is None:
            continue
        nested: Any = values[row.name]
        for key in reversed(row.key.split(".")):
            nested = {key: nested}
        found.append((row.flag, nested))
    return found


# --- rows that commands and the library share ------------------------------------------------

RUN = "Run"
"""The panel of what every command has, the last one."""
DTYPES = ("auto", "fp32", "fp16", "bf16")


def switch(name: str, help: str, *flags: str) -> Option:
    """An option without a value, in the panel of what every command has."""
    return Option(name=name, type=bool, help=help, panel=RUN, flags=flags)


def assignments(below: str = "", prefix: str = "") -> Mapping[str, str]:
    """What --set is completed to, and what it means: of the keys that begin with both; `below` is
    left out."""
    from difftool.config.keys import assignments

    found = assignments(below + prefix).items()
    return {text.removeprefix(below): meaning for text, meaning in found}


SET = Option(
    name="set", many=True, metavar="KEY.PATH=VALUE", panel=RUN,
    help="Change a value of the preset; repeatable", complete=assignments,
)  # fmt: skip
SAME = {
    "gpu": "cuda", "nvidia": "cuda", "half": "fp16", "float16": "fp16", "bfloat16": "bf16",
    "float32": "fp32", "float": "fp32", "full": "fp32",
}  # fmt: skip
"""Devices and arithmetic as other tools call them."""


def _device(given: Any) -> str:
    if not isinstance(given, str):
        raise UsageError(f"--device {given!r} is not a text")
    return SAME.get(given.lower(), given)


def _dtype(given: Any) -> str:
    word = SAME.get(str(given).lower(), given)
    if word not in DTYPES:
        hint = suggestion(str(given), DTYPES)
        raise UsageError(f'--dtype "{given}" is not one of its values', hint=hint)
    return word


DEVICE = Option(
    read=_device, name="device", help="auto, cpu, cuda, cuda:1 or mps", panel=RUN, default="auto",
    complete=lambda: ("auto", "cpu", "cuda", "mps"),
)  # fmt: skip
DTYPE = Option(
    read=_dtype, name="dtype", help="Arithmetic of the networks", panel=RUN, default="auto",
    choices=lambda: DTYPES,
)  # fmt: skip
OFFLINE = switch("offline", "Never use the network: models of the hub from its cache only")
OVERWRITE = switch("overwrite", "Replace existing output")
