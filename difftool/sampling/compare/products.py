"""Every combination of settings of which several were given. Torch-free.

A setting is in turn each of its values if its row of SETTINGS has `listed`, the later rows the
faster. What a model is loaded by goes slowest, so that each one is loaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from math import prod
from typing import Any, NamedTuple

from difftool.config.listed import Several
from difftool.errors import DifftoolError, UsageError
from difftool.sampling.expand import TEMPLATES, applied, is_plain
from difftool.sampling.files.prompts import Lines
from difftool.sampling.requests import Request, located
from difftool.sampling.settings import SETTINGS, Setting, Values

MAX_COMBINATIONS = 100_000
Combination = tuple[tuple[str, str], ...]
"""Where in a product a picture is: the text of its value on each axis, by the axis' name."""


class Axis(NamedTuple):
    """A setting, and the values that it has in turn."""

    row: Setting
    name: str
    values: Several
    entry: int | None = None
    """Which one it is of a setting that may be repeated."""

    @property
    def loads(self) -> bool:
        """Whether another model is loaded for each."""
        return self.row.key is None and self.row.field is None

    def set(self, values: dict[str, Any], text: str) -> None:
        """Give the setting the value of that text, among the values of all options."""
        value = self.values[text]
        if self.entry is not None:
            whole = list(values[self.row.name])
            whole[self.entry] = value
            value = whole
        values[self.row.name] = value


def axes_of(values: Values) -> tuple[Axis, ...]:
    """The settings of which several are given, the slowest first; UsageError for too many
    combinations."""
    found = []
    for row in SETTINGS:
        given = values.get(row.name)
        if isinstance(given, Several):
            found.append(Axis(row, row.name, given))
        elif row.many and isinstance(given, list):
            several = [(i, each) for i, each in enumerate(given) if isinstance(each, Several)]
            found += (Axis(row, _name(row, each, len(several)), each, i) for i, each in several)
    count = prod(len(axis.values) for axis in found)
    if count > MAX_COMBINATIONS:
        raise UsageError(f"{count} combinations are too many", f"the limit is {MAX_COMBINATIONS}")
    return tuple(sorted(found, key=lambda axis: not axis.loads))


def _name(row: Setting, values: Several, count: int) -> str:
    return row.name if count == 1 else f"{row.name} {next(iter(values))}"


def single(values: Values, axes: Iterable[Axis]) -> dict[str, Any]:
    """The values of all options with the first of each that has several."""
    made = dict(values)
    for axis in axes:
        axis.set(made, next(iter(axis.values)))
    return made


@dataclass(frozen=True)
class Product:
    """The combinations of what was given. A line's own value on an axis, or one in its prompt,
    takes the places of all of the axis'."""

    values: Values
    """Of all options, each the first where there are several."""
    axes: tuple[Axis, ...]
    ask: Callable[[Values, Request | None], Request]
    """What every picture is asked for by values of all options, over what one says of itself."""
    pictures: Sequence[Request | None] = (None,)
    """What pictures to be made again say of themselves; None = there are none."""

    @cached_property
    def base(self) -> Request:
        """What every picture is asked for, in the first combination."""
        return self.ask(self.values, self.pictures[0])

    def loads(self) -> Iterator[tuple[dict[str, Any], Combination]]:
        """What each model is loaded by: the values of all options, and which one it is."""
        yield from self._combined([axis for axis in self.axes if axis.loads])

    def requests(self, lines: Lines, place: Combination = ()) -> Lines:
        """Each of these requests in all its combinations, completed by what is asked for of every
        picture; errors and None, the next has to be waited for, as they are."""
        for line in lines:
            if not isinstance(line, Request):
                yield line
                continue
            at = {"source": line.source, "line": line.line}
            try:
                own, told = self._own(line)
                for base in self._bases(own):
                    made, where = replaced(line.over(base)), (*place, *base.place)
                    yield replace(made, **at, place=where, changed=(*made.changed, *told))
            except DifftoolError as error:
                yield located(error, line)

    def _own(self, line: Request) -> tuple[frozenset[str], list[str]]:
        """The axes on which a line has a value of its own, so that none of theirs changes it; and
        what is said of values that the parameters in its prompt take the places of."""
        own, told = set(), []
        for axis, bases in self._firsts:
            one, other = (line.over(base) for base in bases)
            if one == other:
                own.add(axis.name)
                continue
            one, other = (self._read(each) for each in (one, other))
            if one == other:
                own.add(axis.name)
                told.append(_overruled(line, f"{axis.row.flag} {','.join(axis.values)}"))
        if line.seeds is None and len(seeds := self.base.seeds or ()) > 1:
            if len(self._read(line.over(self.base)).seeds or ()) == 1:
                told.append(_overruled(line, f"the {len(seeds)} seeds of --seed"))
        return frozenset(own), told

    def _read(self, request: Request) -> Request:
        """A request with what the parameters in its prompt ask for."""
        request = replaced(request)
        return request if is_plain(request, self.values["match"]) else applied(request)

    def _bases(self, own: frozenset[str]) -> Iterable[Request]:
        """What is asked for of every picture, of each combination; own: axes on which a line has a
        value of its own."""
        if own:
            axes = [axis for axis in self._free if axis.name not in own]
            return self._asked(axes)
        return self._all

    @cached_property
    def _firsts(self) -> list[tuple[Axis, list[Request]]]:
        """What is asked for with the first two values of each axis, the others at their first."""
        return [
            (axis, [self.ask(values, self.pictures[0]) for values, _ in two])
            for axis in self._free
            if len(two := list(islice(self._combined([axis]), 2))) == 2
        ]

    def _asked(self, axes: Iterable[Axis]) -> list[Request]:
        axes = list(axes)
        return [
            replace(self.ask(values, picture), place=place)
            for picture in self.pictures
            for values, place in self._combined(axes)
        ]

    @cached_property
    def _free(self) -> list[Axis]:
        return [axis for axis in self.axes if not axis.loads]

    @cached_property
    def _all(self) -> list[Request]:
        return self._asked(self._free)

    def _combined(self, axes: Iterable[Axis]) -> Iterator[tuple[dict[str, Any], Combination]]:
        axes = list(axes)
        for texts in product(*(axis.values for axis in axes)):
            values = dict(self.values)
            for axis, text in zip(axes, texts, strict=True):
                axis.set(values, text)
            yield values, tuple((a.name, t) for a, t in zip(axes, texts, strict=True))

    def each(self) -> Iterator[Request]:
        """What is asked for with each value of each axis, the other axes at their first."""
        for axis in self._free:
            for values, _ in self._combined([axis]):
                yield self.ask(values, self.pictures[0])

    def said(self, count: int | None, lines: Sequence[Request]) -> str:
        """How many pictures there will be of lines and why, for people; "" where nothing is
        multiplied."""
        factors = [f"{axis.name.replace('_', ' ')} {len(axis.values)}" for axis in self.axes]
        if not factors:
            return ""
        made = prod(len(axis.values) for axis in self.axes)
        if count is None:
            return f"{made} pictures in place of each: {' x '.join(factors)}"
        if sum(1 for _ in self.requests(lines)) < len(lines) * len(self._all):
            few = f"{count} picture{'s' if count > 1 else ''}"
            return f"{few}: {' x '.join(factors)}, where prompts leave these open"
        factors += [f"images {count // made}"] if count != made else []
        return f"{count} pictures: {' x '.join(factors)}"


def _overruled(line: Request, values: str) -> str:
    prompt = f"{line.prompt or ''}"
    prompt = prompt if len(prompt) <= 60 else f"{prompt[:30]}...{prompt[-27:]}"
    return f'"{prompt}" is drawn as it says itself, not with {values}'[:200]


def replaced(request: Request) -> Request:
    """A request with the texts in its prompts replaced; UsageError for one that is not there."""
    prompts = {name: getattr(request, name) for name in (*TEMPLATES, *TEMPLATES.values())}
    for sought, text in request.replaced or ():
        if not any(sought in (each or "") for each in prompts.values()):
            why = f'it is "{request.prompt or ""}"'[:100]
            raise UsageError(f'the prompt has no "{sought}" to replace', why)
        prompts = {name: each and each.replace(sought, text) for name, each in prompts.items()}
    return replace(request, **prompts, replaced=None)


class Replayed:
    """Requests that may be gone through again."""

    def __init__(self, lines: Lines):
        self._ahead, self._seen = iter(lines), list[Request | DifftoolError]()
        self._ended = False

    def __iter__(self) -> Iterator[Request | DifftoolError | None]:
        yield from list(self._seen)
        if self._ended:
            return
        for line in self._ahead:
            if line is not None:
                self._seen.append(line)
            yield line
        self._ended = True
