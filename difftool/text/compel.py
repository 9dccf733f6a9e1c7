"""Prompts as compel reads them, which diffusers and InvokeAI use. Torch-free.

word+ word-- (a b)++ "a b"- (a b)1.3 word.attend(1.3)     weights; a plus is 1.1, a minus 0.9
("a fox", "a hill").and()  .and(1, 0.5)                   prompts that share no chunk
("a fox", "a hill").blend(0.7, 0.3)                       one prompt between them
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isfinite

from difftool.errors import UsageError
from difftool.text.chunks import DEEPEST, Blend, Parts, TextPiece, joined

PLUS, MINUS = 1.1, 0.9
"""What a plus and a minus do to the weight of what is before them."""

_SPECIAL = r"""()",.+\-="""
_WORD = re.compile(rf"(?:\\.|[^\s{_SPECIAL}\\]|\\|[+-](?=[^\s{_SPECIAL}]))+")
_SIGNS = r"(\++|-+)(?![^\s()\",.+\-=])"
_NUMBER = r"([+-]?(?:\d+\.\d*|\d+|\.\d+))"
_OF_WORD = re.compile(rf"{_SIGNS}|\.attend\(\s*(?:(\++|-+)|{_NUMBER})\s*\)")
_OF_GROUP = re.compile(rf"(\++|-+)|{_NUMBER}|\.attend\(\s*(?:(\++|-+)|{_NUMBER})\s*\)")
_PARTED = re.compile(r"^\s*\((.*)\)\.(?:and|add)\(\s*\)\s*$", re.DOTALL)
_COMPOSED = re.compile(r"^\s*\((.*)\)\.(and|add|blend)\(([^()\"]*)\)\s*$", re.DOTALL)
_QUOTED = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPED = re.compile(r"\\([()\",.+\-=\\])")


def parts(prompt: str) -> Parts:
    """The weighted texts of a prompt, or of each that .and() joins."""
    if (parted := _PARTED.match(prompt)) and (texts := _quoted(parted[1])):
        return [_pieces(text) for text in texts]
    return [_pieces(prompt)]


def composition(prompt: str) -> list[Blend]:
    """The prompts that one is composed of, which share no chunk, each of the texts that are blended
    in it. UsageError for weights that do not fit."""
    whole = [Blend(((prompt, 1.0),))]
    composed = _COMPOSED.match(prompt)
    if composed is None or (_PARTED.match(prompt) and _quoted(composed[1])):
        return whole  # whose parts, if it has some, have no weights
    inner, how, options = composed.groups()
    if how == "blend":
        return [Blend(_blended(prompt, _quoted(inner), options))] if _quoted(inner) else whole
    elements = _elements(inner)
    weights = _weights(prompt, options, len(elements))
    found = []
    for element, weight in zip(elements, weights, strict=True):
        if nested := _COMPOSED.match(element):
            texts = _blended(prompt, _quoted(nested[1]), nested[3]) if nested[2] == "blend" else ()
        else:
            texts = tuple((text, 1.0) for text in _quoted(element))
        if not texts:
            return whole
        found.append(Blend(texts, weight))
    return found or whole


def _elements(text: str) -> list[str]:
    """What commas part that stand within no brackets and no quotes."""
    closings, found, start, position = _closings(text), [], 0, 0
    while position < len(text):
        if text[position] == ",":
            found.append(text[start:position])
            start = position + 1
        position = closings.get(position, position) + 1
    return [each for each in (*found, text[start:]) if each.strip()]


def _weights(prompt: str, options: str, count: int) -> list[float]:
    """The numbers of .and(1, 0.5), one for each of so many; 1 each where there are none."""
    texts = [text.strip() for text in options.split(",") if text.strip()]
    try:
        weights = [float(text) for text in texts] or [1.0] * count
    except ValueError:
        raise UsageError(f"the weights ({options}) are no numbers", prompt[:100]) from None
    if len(weights) != count or not all(map(isfinite, weights)):
        raise UsageError(f"{count} prompts have {len(weights)} weights", prompt[:100])
    return weights


def _blended(prompt: str, texts: list[str], options: str) -> tuple[TextPiece, ...]:
    """Texts with their shares, which add up to 1 unless that is not wanted."""
    options, kept = re.subn(r",?\s*no_normalize\s*$", "", options)
    weights = _weights(prompt, options, len(texts))
    total = 1.0 if kept else sum(weights)
    if not total:
        why = "they add up to 0"
        raise UsageError(f"the weights ({options}) cannot be shares", why, "add no_normalize")
    return tuple((text, weight / total) for text, weight in zip(texts, weights, strict=True))


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
