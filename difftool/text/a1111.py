"""Prompts as A1111's web interface reads them: weights, breaks, schedules, AND. Torch-free.

(x) [x] (x:1.3)     weights of 1.1, 1/1.1 and 1.3; nested ones multiply; \\( is a bracket
BREAK               what follows begins a new chunk
[a:b:0.5] [a|b]     the prompt changes at a step, or from step to step
a AND b:0.8         two prompts, whose guidance is added
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from difftool.text.chunks import DEEPEST, Parts, TextPiece, joined, number_of

ROUND, SQUARE = 1.1, 1 / 1.1
"""What a pair of brackets does to the weight of what is in it."""

_TOKEN = re.compile(r"\\[\\()\[\]]?|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_CONJUNCTION = re.compile(r"\bAND\b")
_SHARE = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\]")
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")


# --- weights ----------------------------------------------------------------------------------


def parts(prompt: str) -> Parts:
    """The weighted texts between breaks."""
    pieces = _Pieces()
    for match in _TOKEN.finditer(prompt):
        pieces.add(match[0], match[1])
    return pieces.closed()


def weighted(prompt: str) -> list[TextPiece]:
    """The weighted texts of a prompt without breaks."""
    return [piece for part in parts(prompt) for piece in part]


class _Pieces:
    """Weighted texts as they come, and the brackets that are open."""

    def __init__(self) -> None:
        self.found: list[list] = []
        """[text, weight]; None is the text of a break."""
        self.round: list[int] = []
        self.square: list[int] = []

    def add(self, token: str, number: str | None) -> None:
        """A token; number: the weight that it ends a bracket with."""
        if token[0] == "\\":
            self.found.append([token[1:], 1.0])
        elif token == "(" and len(self.round) < DEEPEST:
            self.round.append(len(self.found))
        elif token == "[" and len(self.square) < DEEPEST:
            self.square.append(len(self.found))
        elif number is not None and self.round and (weight := number_of(number)) is not None:
            self._times(self.round.pop(), weight)
        elif number is not None and self.round:  # which is no number after all
            self.found.append([token[:-1], 1.0])
            self._times(self.round.pop(), ROUND)
        elif token == ")" and self.round:
            self._times(self.round.pop(), ROUND)
        elif token == "]" and self.square:
            self._times(self.square.pop(), SQUARE)
        else:
            for i, text in enumerate(_BREAK.split(token)):
                self.found += ([[None, 1.0]] if i else []) + [[text, 1.0]]

    def _times(self, start: int, factor: float) -> None:
        for piece in self.found[start:]:
            piece[1] *= factor

    def closed(self) -> Parts:
        """The parts; brackets that are never closed run to the end."""
        for starts, factor in ((self.round, ROUND), (self.square, SQUARE)):
            for start in starts:
                self._times(start, factor)
        made: list[list[TextPiece]] = [[]]
        for text, weight in self.found:
            if text is None:
                made.append([])
            else:
                made[-1].append((text, weight))
        return [joined(part) for part in made]


# --- AND --------------------------------------------------------------------------------------


def conjunction(prompt: str) -> list[TextPiece]:
    """The prompts between AND, each with its share of the guidance, a number after a colon.

    A prompt alone has none: in "a clock at 10:30" the number is a word, which to A1111 it is not.
    """
    found = []
    for text in (texts := _CONJUNCTION.split(prompt)):
        share = _SHARE.search(text) if len(texts) > 1 and ":" in text else None
        found.append((text[: share.start()], float(share[1])) if share else (text, 1.0))
    return found


# --- schedules --------------------------------------------------------------------------------

Nodes = list["str | _Change"]
"""A prompt as texts that stand there at every step, and what changes between them."""


class _Change(NamedTuple):
    """[before:after:when], or [a|b|c]."""

    options: list[Nodes]
    when: str | None = None
    """None: the options take turns."""

    def last(self, steps: int) -> int:
        """The last step of what is before: a number with a point is a share of the steps."""
        number = float(self.when or 0)
        number = number * steps if "." in str(self.when) else number
        return int(min(max(number, 0.0), float(steps)))

    def ends(self, steps: int) -> Iterator[int]:
        """Steps at whose end something changes, in its options too."""
        yield from range(1, steps + 1) if self.when is None else (self.last(steps),)
        yield from (end for nodes in self.options for end in _ends(nodes, steps))

    def at(self, step: int, steps: int) -> str:
        """What stands there at a step; the first is 1."""
        turn = (step - 1) % len(self.options) if self.when is None else step > self.last(steps)
        return _text(self.options[turn], step, steps)


def _ends(nodes: Nodes, steps: int) -> Iterator[int]:
    yield from (end for n in nodes if isinstance(n, _Change) for end in n.ends(steps))


def _text(nodes: Nodes, step: int, steps: int) -> str:
    return "".join(n if isinstance(n, str) else n.at(step, steps) for n in nodes)


def schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """The texts of a prompt, each with the last step that it is for; the first step is 1."""
    nodes = _nodes(prompt) if "[" in prompt else None
    if nodes is None:
        return [(steps, prompt)]
    ends = {steps, *_ends(nodes, steps)} - {0}
    return [(end, _text(nodes, end, steps)) for end in sorted(ends)]


@lru_cache(maxsize=64)
def _nodes(prompt: str) -> Nodes | None:
    """What the prompt is made of; None where all of it is text: a bar between no brackets, or a
    backslash that ends it, is in the grammar of no schedule."""
    nodes: Nodes = []
    position = 0
    while True:
        found, position = _read(prompt, position, 0)
        nodes += found
        if position == len(prompt):
            return nodes
        if prompt[position] in "|\\":
            return None
        nodes.append(prompt[position])  # a bracket without its fellow, or a colon
        position += 1


def _read(text: str, position: int, depth: int) -> tuple[Nodes, int]:
    """The nodes from a position on, and where what is none begins."""
    nodes: Nodes = []
    while position < len(text):
        if plain := _PLAIN.match(text, position):
            nodes.append(plain[0])
            position = plain.end()
            continue
        read, closing = {"(": (_round, ")"), "[": (_square, "]")}.get(text[position], (None, ""))
        closes = read and depth < DEEPEST and text.find(closing, position) > 0
        made = read(text, position + 1, depth + 1) if read and closes else None
        if made is None:
            break
        nodes += made[0]
        position = made[1]
    return nodes, position


def _round(text: str, start: int, depth: int) -> tuple[Nodes, int] | None:
    """Round brackets, which stay text; None where they are not closed."""
    nodes, end = _read(text, start, depth)
    if text.startswith(":", end):
        more, end = _read(text, end + 1, depth)
        nodes = [*nodes, ":", *more]
    return (["(", *nodes, ")"], end + 1) if text.startswith(")", end) else None


def _square(text: str, start: int, depth: int) -> tuple[Nodes, int] | None:
    """Square brackets; None where they are not closed."""
    first, end = _read(text, start, depth)
    if text.startswith("]", end):
        return ["[", *first, "]"], end + 1
    if text.startswith("|", end):
        options = [first]
        while text.startswith("|", end):
            option, end = _read(text, end + 1, depth)
            options.append(option)
        return ([_Change(options)], end + 1) if text.startswith("]", end) else None
    if not text.startswith(":", end):
        return None
    if when := _WHEN.match(text, end + 1):
        return [_Change([[], first], when[1])], when.end()
    after, end = _read(text, end + 1, depth)
    when = _WHEN.match(text, end + 1) if text.startswith(":", end) else None
    return ([_Change([first, after], when[1])], when.end()) if when else None
