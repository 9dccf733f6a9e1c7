"""YAML from files of others, read strictly: plain data and no traps. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from difftool.errors import InputError
from difftool.storage.read import read_text

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 30_000
MAX_DIGITS = 30


# The C parser where there is one: ten times as fast, which a preset with a table feels.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """SafeLoader without YAML 1.1's traps: no duplicate keys, yes/no/on/off and dates are strings,
    and 1e-4 is a number."""

    def construct_mapping(self, node, deep=False):  # type: ignore[override]
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not text", problem_mark=key_node.start_mark
                )
            if key in keys:
                raise yaml.MarkedYAMLError(
                    problem=f'duplicate key "{key}"', problem_mark=key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for tag, pattern, first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first)
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        problem = f"a number of {len(node.value)} digits"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return int(node.value)  # YAML 1.1 would read 0123 as octal and 1:30 as base 60


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _check_events(text: str) -> None:
    """YAMLError for aliases, nesting and lengths that no honest file has, before anything is built
    of it."""
    depth = nodes = 0
    for event in yaml.parse(text, _Base):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases are not allowed"
        elif depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH}"
        elif nodes > MAX_NODES:
            problem = f"more than {MAX_NODES} values"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document; InputError, naming source and line, if it is not sound."""
    if len(text) > MAX_BYTES:
        raise InputError(f"{source} is too large", f"{len(text)} bytes, the limit is {MAX_BYTES}")
    try:
        _check_events(text)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(
            f"cannot read {source}{where}", getattr(error, "problem", str(error))
        ) from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; InputError if it cannot be read or is not sound."""
    return parse_yaml(read_text(path, MAX_BYTES), str(path))


def dump_yaml(values: Any) -> str:
    """Plain values as YAML text, in their own order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
