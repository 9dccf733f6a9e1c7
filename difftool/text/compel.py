"""Prompts as compel reads them, which diffusers and InvokeAI use. Torch-free.

word+ word-- (a b)++ "a b"- (a b)1.3 word.attend(1.3)     weights; a plus is 1.1, a minus 0.9
("a fox", "a hill").and()                                 prompts that share no chunk
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from difftool.text.chunks import DEEPEST, Parts, TextPiece, joined

PLUS, MINUS = 1.1, 0.9
"""What a plus and a minus do to the weight of what is before them."""

_SPECIAL = r"""()",.+\-="""
_WORD = re.compile(rf"(?:\\.|[^\s{_SPECIAL}\\]|\\|[+-](?=[^\s{_SPECIAL}]))+")
_SIGNS = r"(\++|-+)(?![^\s()\",.+\-=])"
_NUMBER = r"([+-]?(?:\d+\.\d*|\d+|\.\d+))"
_OF_WORD = re.compile(rf"{_SIGNS}|\.attend\(\s*(?:(\++|-+)|{_NUMBER})\s*\)")
_OF_GROUP = re.compile(rf"(\++|-+)|{_NUMBER}|\.attend\(\s*(?:(\++|-+)|{_NUMBER})\s*\)")
_PARTED = re.compile(r"^\s*\((.*)\)\.(?:and|add)\(\s*\)\s*$", re.DOTALL)
_QUOTED = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPED = re.compile(r"\\([()\",.+\-=\\])")


def parts(prompt: str) -> Parts:
    """The weighted texts of a prompt, or of each that .and() joins."""
    if (parted := _PARTED.match(prompt)) and (texts := _quoted(parted[1])):
        return [_pieces(text) for text in texts]
    return [_pieces(prompt)]


def _quoted(text: str) -> list[str]:
    """The texts of a list of quoted ones; none where it is none."""
    found, position = [], 0
    while position < len(text):
        quoted = _QUOTED.match(text, position)
        if quoted is None:
            return []
        found.append(quoted[1])
        position = quoted.end()
    return found


def _pieces(prompt: str) -> list[TextPiece]:
    spaced = re.sub(r",(\S)", r", \1", prompt)
    read = _read(spaced, (0, len(spaced)), _closings(spaced), 1.0, 0)
    found = [(_ESCAPED.sub(r"\1", text) + " ", weight) for text, weight in read]
    return [(text.rstrip(), weight) for text, weight in joined(found)]


def _closings(text: str) -> dict[int, int]:
    """Where each bracket and each quote that is closed opens, and where it ends."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[()\"]", text, re.DOTALL):
        letter, at = match[0], match.start()
        same = [i for i in opened[-1:] if text[i] == {")": "(", '"': '"'}.get(letter)]
        if same:
            found[opened.pop()] = at
        elif letter in '("':
            opened.append(at)
    return found


def _read(
    text: str, span: tuple[int, int], closings: Mapping[int, int], weight: float, depth: int
) -> Iterator[TextPiece]:
    """The words of a span of a text with their weights."""
    position, stop = span
    while position < stop:
        if position in closings and depth < DEEPEST:
            closing = closings[position]
            operator = _OF_GROUP.match(text, closing + 1, stop)
            factor = _factor(operator) if operator else 1.0
            inner = (position + 1, closing)
            yield from _read(text, inner, closings, weight * factor, depth + 1)
            position = operator.end() if operator else closing + 1
        elif word := _WORD.match(text, position, stop):
            operator = _OF_WORD.match(text, word.end(), stop)
            yield word[0], weight * (_factor(operator) if operator else 1.0)
            position = operator.end() if operator else word.end()
        else:
            if not text[position].isspace():
                yield text[position], weight
            position += 1


def _factor(operator: re.Match[str]) -> float:
    signs = next((group for group in operator.groups() if group), "")
    if signs.strip("+-"):
        return float(signs)
    return PLUS ** len(signs) if signs[0] == "+" else MINUS ** len(signs)
