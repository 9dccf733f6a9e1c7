"""Closed tables of named components. Torch-free.

A component is added by one registration; the command line's help, the presets' validation and
the tests read the tables, so nothing else has to be told.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from difftool.errors import UsageError, suggestion

S = TypeVar("S")
T = TypeVar("T")

ADDITIONS: list[tuple[Registry[Any], str]] = []
"""Every registry and name that a component was added under in this process, in order: by which
plugins know what a file of a user's has added."""


def canonical(name: object) -> str:
    """The form in which names are compared: lower case, "+" spelled "p", no separators."""
    return re.sub(r"[\s_\-./()]+", "", str(name).lower().replace("+", "p"))


class Registry(Mapping[str, T], Generic[T]):
    """Names (and other tools' spellings of them) to components.

    Lookups ignore case, spaces, "_", "-" and read "+" as "p", so "DPM++ 2M" finds "dpmpp_2m".
    An unknown name raises UsageError with the nearest known one.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._names: dict[str, str] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._abouts: dict[str, str] = {}
        self._answers: dict[str, str] = {}

    def add(self, name: str, component: T, *aliases: str, about: str = "") -> T:
        """Register a component under its name and further spellings; each must be new. about: the
        line on it in lists, of a component that has no such text itself."""
        for spelling in (name, *aliases):
            key = canonical(spelling)
            if self._names.get(key, name) != name or (spelling == name and name in self._entries):
                raise ValueError(f"{self.kind} {spelling!r} is registered twice")
            self._names[key] = name
        self._entries[name] = component
        self._aliases[name], self._abouts[name] = aliases, about
        ADDITIONS.append((self, name))
        return component

    def answer(self, names: str, hint: str) -> None:
        """Say that of names of other tools' components, with spaces between, that there are none
        of."""
        self._answers |= {canonical(name): hint for name in names.split()}

    def remove(self, name: str) -> None:
        """Take a component back, with all spellings of its name."""
        del self._entries[name], self._aliases[name], self._abouts[name]
        self._names = {key: own for key, own in self._names.items() if own != name}

    def register(self, name: str, *aliases: str) -> Callable[[S], S]:
        """Decorator form of `add`; what it decorates keeps its own type."""

        def add(component: S) -> S:
            self.add(name, cast(T, component), *aliases)
            return component

        return add

    def about(self, name: str) -> str:
        """What it is, in a line: as its row, its registration or its docstring says."""
        component = self[name]
        text = getattr(component, "about", None) or self._abouts[self.resolve(name)]
        if not text and inspect.isroutine(component) | inspect.isclass(component):
            text = (inspect.getdoc(component) or "").partition("\n\n")[0]
        return " ".join(text.split())

    def aliases(self, name: str) -> list[str]:
        """Its further spellings, as they were given, without those that differ by case or
        separators only."""
        name = self.resolve(name)
        found = {canonical(alias): alias for alias in self._aliases[name]}
        return [alias for key, alias in found.items() if key != canonical(name)]

    def resolve(self, name: str) -> str:
        """The registered name behind any spelling of it."""
        try:
            return self._names[canonical(name)]
        except KeyError:
            what = f'there is no {self.kind} "{name}"'
            hint = self._answers.get(canonical(name)) or suggestion(str(name), self._entries)
            raise UsageError(what, hint=hint) from None

    def __getitem__(self, name: str) -> T:
        return self._entries[self.resolve(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and canonical(name) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def call(what: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """function(*args, **options), where a wrong option is the user's error and names `what`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[len(args) :]
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        for name in options:
            if name not in known and len(known) == len(parameters):
                hint = suggestion(name, known) if known else None
                raise UsageError(f'{what} has no option "{name}"', hint=hint)
        return function(*args, **options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{what} has a wrong option", str(error)) from error
