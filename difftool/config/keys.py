"""The keys of a preset: type, default, meaning and values of each, read from the configuration's
own source. Torch-free."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from difftool.config.kinds import Kinds
from difftool.config.schema import Preset

WORDS = {int: "integer", float: "number", str: "text", dict: "mapping"}
"""Types as a user knows them."""


class Key(NamedTuple):
    """A key of a preset."""

    path: str
    """As --set takes it: "train.lr"; [] is a list's entry."""
    type: str
    default: str
    """JSON text; "" where a preset must say it."""
    about: str
    values: tuple[str, ...] = ()
    """All that there are; () where they have no names."""


def keys() -> list[Key]:
    """Every key of a preset, in the order of the configuration."""
    return list(_of(Preset, ""))


def values_of(path: str) -> tuple[str, ...]:
    """The values of a key that have names."""
    if path in NAMED:
        return tuple(NAMED[path]())
    return next((key.values for key in keys() if key.path == path), ())


def assignments(prefix: str = "") -> dict[str, str]:
    """KEY=VALUE, and what the key means, of every value that has a name; and of the defaults."""
    found: dict[str, str] = {}
    for key in keys():
        if key.path.startswith(prefix) and "[]" not in key.path:
            others = ("", key.default.replace(" ", ""))
            found |= {f"{key.path}={value}": key.about for value in key.values or others}
    return found


def _names(module: str, table: str) -> Callable[[], Iterable[str]]:
    return lambda: getattr(import_module(f"difftool.diffusion.{module}"), table)


NAMED = {
    "path.kind": _names("path", "PATHS"), "path.schedule": _names("path", "SCHEDULES"),
    "target": _names("prediction", "TARGETS"),
    "sample.sampler": _names("samplers", "SAMPLERS"), "sample.schedule": _names("grids", "GRIDS"),
    "train.loss": _names("losses", "LOSSES"), "train.time": _names("losses", "TIMES"),
    "train.weight": _names("losses", "WEIGHTS"),
}  # fmt: skip
"""Keys whose values are the names in a table."""


def _of(cls: type, prefix: str) -> Iterator[Key]:
    """The keys of a dataclass, and of those in it."""
    hints, meanings = get_type_hints(cls, include_extras=True), _meanings(cls)
    for field in dataclasses.fields(cls):
        hint, path = hints[field.name], prefix + field.name
        about = meanings.get(field.name, "")
        if path == "path":
            yield from _path_keys(about)
            continue
        inner = [p for p in _members(hint) if isinstance(p, type) and dataclasses.is_dataclass(p)]
        if not inner:
            values = NAMED[path]() if path in NAMED else _literals(hint)
            yield Key(path, _type(hint), _default(field), about, tuple(values))
        entry = "[]" if get_origin(hint) is tuple else ""
        found = [key for part in inner for key in _of(part, f"{path}{entry}.")]
        yield from _merged(found)


def _path_keys(about: str) -> Iterator[Key]:
    """The kind of a noise path, and the options of all kinds."""
    from difftool.diffusion.path import Discrete, Edm, Flow

    yield Key("path.kind", "text", "", about, tuple(NAMED["path.kind"]()))
    yield from _merged([key for part in (Discrete, Flow, Edm) for key in _of(part, "path.")])


def _merged(found: Iterable[Key]) -> Iterator[Key]:
    """One key of those that several alternatives have; its values are all of theirs."""
    by_path: dict[str, Key] = {}
    for key in found:
        first = by_path.setdefault(key.path, key)
        values = dict.fromkeys((*first.values, *key.values))
        by_path[key.path] = first._replace(values=tuple(values))
    return iter(by_path.values())


def _members(hint: Any) -> list[Any]:
    """The types that a union, a list or a table of kinds is of."""
    if isinstance(hint, Kinds):
        return [*hint.values()]
    if get_origin(hint) in (Union, UnionType, tuple, Annotated):
        return [each for part in get_args(hint) for each in _members(part)]
    return [hint]


def _literals(hint: Any) -> list[str]:
    found = [value for part in _members(hint) for value in get_args(part) if _is_literal(part)]
    return ["true", "false"] if bool in _members(hint) else [str(value) for value in found]


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _type(hint: Any, s: str = "") -> str:
    """A type in a user's words: "number or null", "list of 2 integers"; s: the plural's."""
    if get_origin(hint) is Annotated:
        return _type(get_args(hint)[0], s)
    if get_origin(hint) in (Union, UnionType):
        parts = sorted(get_args(hint), key=lambda part: part is NoneType)
        return " or ".join(dict.fromkeys(_type(part, s) for part in parts))
    if get_origin(hint) in (tuple, Sequence):
        of = get_args(hint)
        many = "" if ... in of or len(of) == 1 else f"{len(of)} "
        return f"list{s} of {many}{_type(of[0], 's')}"
    if hint in (bool, NoneType):
        return "null" if hint is NoneType else "true or false"
    return ("text" if _is_literal(hint) else WORDS[get_origin(hint) or hint]) + s


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    return ""


@cache
def _meanings(cls: type) -> dict[str, str]:
    """What the texts below a class's fields, and those of its bases, say; in a line each."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        body = _classes(base.__module__).get(base.__name__, [])
        for node, after in pairwise(body):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[ast.unparse(node.target)] = " ".join(str(text.value).split())
    return found


@cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """The bodies of the classes of a module of ours, by name."""
    if not module.startswith("difftool."):
        return {}
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    return {n.name: n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
