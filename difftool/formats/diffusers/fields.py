"""Fields of diffusers' configuration files <-> difftool's, in tables read both ways. Torch-free.

A field that is missing has its class's default. A field that difftool has no answer for and that
does not have its default is refused by name, so that nothing is read as what it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from difftool.config.validate import check_numbers
from difftool.errors import InputError, UsageError

T = TypeVar("T")

VERSION = "0.42.1"
"""Of diffusers, whose configuration files are written."""


class Fields:
    """A configuration over its class's defaults, that knows which of its fields were understood."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        self.values, self.defaults, self.where = {**defaults, **given}, defaults, where
        self.seen: set[str] = set()

    def get(self, name: str, kind: type[T] | tuple[type, ...]) -> Any:
        """A field's value; InputError if it is of another type."""
        self.seen.add(name)
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.refuse(name)
        return value

    def number(self, name: str) -> float:
        """A number, with a point or without."""
        return float(self.get(name, (int, float)))

    def ints(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        return tuple(self._int(name, item) for item in self.get(name, list))

    def one_of(self, name: str, *known: Any) -> Any:
        """A field that must have one of these values."""
        self.seen.add(name)
        value = self.values[name]
        if value not in known:
            self.refuse(name)
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change no result."""
        self.seen.update(names)

    def finish(self) -> None:
        """InputError for the first field that was not understood and is not at its default."""
        for name, value in self.values.items():
            if name not in self.seen and value != self.defaults.get(name) and value is not False:
                self.refuse(name)

    def refuse(self, name: str) -> NoReturn:
        why = f"{name} = {str(self.values.get(name))[:80]}"
        raise InputError(f"{self.where} describes what difftool does not have", why)

    def _int(self, name: str, value: Any) -> int:
        if type(value) is not int:
            self.refuse(name)
        return value


def build(cls: type[T], where: str, **values: Any) -> T:
    """A configuration of difftool's; InputError if its values do not fit together."""
    what = f"{where} describes what difftool does not have"
    try:
        made = cls(**values)
        check_numbers(made, "it")
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(what, str(error)) from None
    except UsageError as error:
        raise InputError(what, error.what.removeprefix("it: ")) from None
    return made


class FieldKind(NamedTuple):
    """What values a field has, there and here."""

    read: Callable[[Fields, str], Any]
    write: Callable[[Any], Any] = lambda value: value
    words: tuple[Any, ...] = ()
    """The values that there are, if they are few; the first is for what has no other."""


class Row(NamedTuple):
    """A field of a configuration file, and what it is called here."""

    name: str
    ours: str
    kind: FieldKind


def choice(words: Mapping[Any, Any]) -> FieldKind:
    """One of these values there, each of which is that one here; the first such is written."""
    theirs = {ours: word for word, ours in reversed([*words.items()])}
    first, *_ = words
    return FieldKind(
        lambda f, name: words[f.one_of(name, *words)],
        lambda value: theirs.get(value, first),
        tuple(words),
    )


def _numbers(f: Fields, name: str) -> tuple[float, ...] | None:
    value = f.get(name, (list, type(None)))
    if value is not None and not all(type(number) in (int, float) for number in value):
        f.refuse(name)
    return None if value is None else tuple(map(float, value))


def _per_level(f: Fields, name: str) -> Any:
    value = f.get(name, (int, list))
    return tuple(value) if isinstance(value, list) else value


def compact(values: Iterable[Any]) -> Any:
    """A list by level as one value where all are the same."""
    listed = list(values)
    return listed[0] if all(value == listed[0] for value in listed) else listed


def _uniform(f: Fields, name: str) -> int:
    value = f.get(name, (int, list))
    if isinstance(value, list) and (not value or value != [value[0]] * len(value)):
        f.refuse(name)
    return value[0] if isinstance(value, list) else value


INT = FieldKind(lambda f, name: f.get(name, int))
INT_OR_NONE = FieldKind(lambda f, name: f.get(name, (int, type(None))))
BOOL = FieldKind(lambda f, name: f.get(name, bool))
FLOAT = FieldKind(lambda f, name: f.number(name))
WHOLE = FieldKind(FLOAT.read, lambda value: int(value) if value == int(value) else value)
"""A number that is written without a point where it has no fraction."""
ZERO_OR_NONE = FieldKind(
    lambda f, name: float(f.get(name, (int, float, type(None))) or 0.0), lambda value: value or None
)
INTS = FieldKind(lambda f, name: f.ints(name), list)
PER_LEVEL = FieldKind(
    _per_level, lambda value: compact(value) if isinstance(value, tuple) else value
)
"""A whole number, or one for each level."""
UNIFORM = FieldKind(_uniform)
"""A whole number, or the same one for each level."""
NUMBERS = FieldKind(_numbers, lambda value: None if value is None else list(value))


def read_rows(f: Fields, rows: Iterable[Row]) -> dict[str, Any]:
    """What fields of a configuration are here; InputError for the first that is none, or that
    contradicts another one."""
    values: dict[str, Any] = {}
    for name, ours, kind in rows:
        value = kind.read(f, name)
        if values.setdefault(ours, value) != value:
            f.refuse(name)
    return values


def write_rows(values: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """The fields of a configuration file for values of difftool's."""
    return {name: kind.write(values[ours]) for name, ours, kind in rows}


def write_config(name: str, defaults: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A configuration file with all of its class's fields, sorted as diffusers sorts them."""
    values = dict(sorted({**defaults, **fields}.items()))
    return {"_class_name": name, "_diffusers_version": VERSION, **values}
