"""Prompts that stand for many, in the grammar of A1111's dynamic prompts. Torch-free.

    {a|b}  {0.7::a|b}              one of them, as likely as its weight says
    {2$$a|b|c}  {1-2$$ and $$a|b}  several, each once, with a comma or another text between them
    __name__  __dir/*__            a line of the files of wildcards that match
    ${x={a|b}}  ${x=!{a|b}}        a variable, which is read anew each time, or once for all
    ${x}  ${x:otherwise}           what it is read as

A backslash before a brace or a bar makes it a word's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import NamedTuple

from difftool.errors import UsageError
from difftool.text.chunks import DEEPEST

ENDLESS = "wildcards and variables that name each other without end"
Weighted = list[tuple[float, str]]
"""Texts with their weights."""


class _Choice(NamedTuple):
    """{...}"""

    options: list[tuple[float, Template]]
    low: int = 1
    high: int = 1
    separator: str = ","


class _Wildcard(NamedTuple):
    """__name__"""

    name: str
    text: str
    """As it stands there, which it stays where there is none of that name."""


class _Variable(NamedTuple):
    """${name=value}, or ${name:otherwise} where it is read."""

    name: str
    value: Template
    sets: bool
    once: bool


Template = Sequence["str | _Choice | _Wildcard | _Variable"]

_NUMBER = r"\d+\.\d+|\d+\.|\.\d+|\d+"
_COUNTS = re.compile(r"\s*(?:(\d+)-(\d+)|-(\d+)|(\d+)-|(\d+))\$\$(?:([^${}]*)\$\$)?")
_SPACE = re.compile(r"\s*")
_WEIGHT = re.compile(rf"({_NUMBER})::")
_WILDCARD = re.compile(r"__[~!@]?((?:(?!__)[^(){}$#|\n])+)__")
_ASSIGNED = re.compile(r"\$\{\s*([A-Za-z_-][\w-]*)\s*(=|:)(!?)\s*")
_READ = re.compile(r"\$\{\s*([A-Za-z_-][\w-]*)\s*\}")
_PLAIN = re.compile(r"(?:[^\\{}|$_]|\\.|_(?!_))+", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}|])")


# --- reading ----------------------------------------------------------------------------------


def is_dynamic(prompt: str) -> bool:
    """Whether there may be something to choose in a prompt."""
    return "{" in prompt or "__" in prompt or bool(_ESCAPED.search(prompt))


@lru_cache(maxsize=4096)
def _parsed(prompt: str) -> Template:
    """The nodes of a prompt; a brace without its fellow is text."""
    nodes: list = []
    position = 0
    while position < len(prompt):
        found, position = _read(prompt, position, 0)
        nodes += found
        if position < len(prompt):
            nodes.append(prompt[position])
            position += 1
    return nodes


def _read(text: str, position: int, depth: int) -> tuple[Template, int]:
    """The nodes from a position on, and where what is none of an option begins."""
    nodes: list = []
    while position < len(text):
        if plain := _PLAIN.match(text, position):
            nodes.append(_ESCAPED.sub(r"\1", plain[0]))
            position = plain.end()
        elif made := _special(text, position, depth):
            nodes.append(made[0])
            position = made[1]
        elif text[position] in "{}|" or text.startswith("${", position):
            break
        else:
            nodes.append(text[position])
            position += 1
    return nodes, position


def _special(text: str, position: int, depth: int) -> tuple | None:
    """A choice, a wildcard or a variable that begins there, and where it ends."""
    if wildcard := _WILDCARD.match(text, position):
        return _Wildcard(wildcard[1], wildcard[0]), wildcard.end()
    if read := _READ.match(text, position):
        return _Variable(read[1], [], sets=False, once=False), read.end()
    if depth >= DEEPEST or text.find("}", position) < 0:
        return None
    if variable := _ASSIGNED.match(text, position):
        value, end = _read(text, variable.end(), depth + 1)
        made = _Variable(variable[1], value, variable[2] == "=", bool(variable[3]))
        return (made, end + 1) if text.startswith("}", end) else None
    return _choice(text, position + 1, depth + 1) if text[position] == "{" else None


def _choice(text: str, start: int, depth: int) -> tuple[_Choice, int] | None:
    position = start + 1 if text[start : start + 1] in ("~", "!", "@") else start
    counts = _COUNTS.match(text, position)
    position = counts.end() if counts else position
    options: list[tuple[float, Template]] = []
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        weight = _WEIGHT.match(text, position)
        position = weight.end() if weight else position
        nodes, position = _read(text, position, depth)
        options.append((float(weight[1]) if weight else 1.0, nodes))
        if not text.startswith("|", position):
            break
        position += 1
    if not text.startswith("}", position):
        return None
    if counts is None:
        return _Choice(options), position + 1
    low, high, to, since, exactly = (None if n is None else int(n) for n in counts.groups()[:5])
    low, high = low or since or exactly or (1 if exactly is None and low is None else 0), high or to
    high = exactly if exactly is not None else len(options) if high is None else high
    separator = "," if counts[6] is None else counts[6]
    return _Choice(options, min(low, high), max(low, high), separator), position + 1


# --- choosing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dynamic:
    """Chooses in prompts."""

    lines: Callable[[str], Weighted]
    """The lines of the wildcards of a name, or of names that a pattern matches; none where there
    are none, and the wildcard stays as it stands."""

    def one(self, prompt: str, roll: Callable[[], float]) -> str:
        """What a prompt comes to; roll: numbers in [0, 1), one a choice."""
        return _Random(self, roll).text(_parsed(prompt), {}, 0)

    def all(self, prompt: str) -> Iterator[str]:
        """Every prompt that it can come to, the last choice changing first."""
        return (text for text, _ in self._all(_parsed(prompt), {}, 0))

    def choice(self, node: _Choice) -> _Choice:
        """The same with the lines of a wildcard that is its only option as its options, and no more
        of them asked for than there are."""
        (_, first), *others = node.options
        options = node.options
        if not others and len(first) == 1 and isinstance(first[0], _Wildcard):
            options = [(w, _parsed(line)) for w, line in self.lines(first[0].name)] or options
        low, high = (min(n, len(options)) for n in (node.low, node.high))
        return node._replace(options=options, low=low, high=high)

    def _all(
        self, nodes: Template, variables: Mapping[str, Template], depth: int
    ) -> Iterator[tuple[str, Mapping[str, Template]]]:
        """Every text of nodes, with the variables that are set behind it."""
        if depth > DEEPEST:
            raise UsageError(ENDLESS)
        if not nodes:
            yield "", variables
            return
        texts, open_ = list[str](), [self._each(nodes[0], variables, depth)]
        while open_:  # one for each node, the last one changing first
            found = next(open_[-1], None)
            if found is None:
                open_.pop()
                del texts[len(open_) - 1 :]
            elif len(open_) == len(nodes):
                yield "".join(texts) + found[0], found[1]
            else:
                texts.append(found[0])
                open_.append(self._each(nodes[len(open_)], found[1], depth))

    def _each(
        self, node: object, variables: Mapping[str, Template], depth: int
    ) -> Iterator[tuple[str, Mapping[str, Template]]]:
        match node:
            case _Variable(name, value, sets=True, once=once):
                texts = ([text] for text, _ in self._all(value, variables, depth + 1))
                for one in texts if once else [value]:
                    yield "", {**variables, name: one}
            case _Variable(name, otherwise):
                inner = variables.get(name, otherwise)
                yield from ((t, variables) for t, _ in self._all(inner, variables, depth + 1))
            case _Wildcard(name, as_it_stands):
                lines = self.lines(name)
                for _, line in lines:
                    found = self._all(_parsed(line), variables, depth + 1)
                    yield from ((text, variables) for text, _ in found)
                if not lines:
                    yield as_it_stands, variables
            case _Choice():
                yield from ((text, variables) for text in self._several(node, variables, depth))
            case _:
                yield str(node), variables

    def _several(
        self, node: _Choice, variables: Mapping[str, Template], depth: int
    ) -> Iterator[str]:
        node, seen = self.choice(node), set[tuple[str, ...]]()
        for count in range(node.low, node.high + 1):
            for order in permutations([nodes for _, nodes in node.options], count):
                if any(one == other for one, other in combinations(order, 2)):
                    continue
                for texts in self._product(order, variables, depth):
                    if len(set(texts)) == count and texts not in seen:
                        seen.add(texts)
                        yield node.separator.join(filter(None, texts))

    def _product(
        self, options: Sequence[Template], variables: Mapping[str, Template], depth: int
    ) -> Iterator[tuple[str, ...]]:
        if not options:
            yield ()
            return
        for text, _ in self._all(options[0], variables, depth + 1):
            for rest in self._product(options[1:], variables, depth):
                yield (text, *rest)


class _Random(NamedTuple):
    """Chooses by numbers in [0, 1)."""

    dynamic: Dynamic
    roll: Callable[[], float]

    def text(self, nodes: Template, variables: dict[str, Template], depth: int) -> str:
        """What nodes come to; variables are set in it."""
        if depth > DEEPEST:
            raise UsageError(ENDLESS)
        return "".join(self._one(node, variables, depth) for node in nodes)

    def _one(self, node: object, variables: dict[str, Template], depth: int) -> str:
        match node:
            case _Variable(name, value, sets=True, once=once):
                variables[name] = [self.text(value, variables, depth + 1)] if once else value
                return ""
            case _Variable(name, otherwise):
                return self.text(variables.get(name, otherwise), variables, depth + 1)
            case _Wildcard(name, as_it_stands):
                lines = self.dynamic.lines(name)
                if not lines:
                    return as_it_stands
                line = lines[self._pick([weight for weight, _ in lines])][1]
                return self.text(_parsed(line), dict(variables), depth + 1)
            case _Choice():
                node = self.dynamic.choice(node)
                count = node.low + int(self.roll() * (node.high - node.low + 1))
                left, texts = list(node.options), []
                for _ in range(count):
                    _, nodes = left.pop(self._pick([weight for weight, _ in left]))
                    texts.append(self.text(nodes, variables, depth + 1))
                return node.separator.join(filter(None, texts))
            case _:
                return str(node)

    def _pick(self, weights: Sequence[float]) -> int:
        """The place of one of them, as likely as it is heavy; of nothing but zeros any."""
        total = sum(weights)
        if not total:
            return int(self.roll() * len(weights))
        left = self.roll() * total
        for place, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return place
        return max(place for place, weight in enumerate(weights) if weight)
