"""Prompts as chunks of weighted tokens, in the syntax of A1111's web interface or of ComfyUI.

Torch-free. Without a syntax a prompt is one chunk, cut where it is too long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from difftool.text.constructs import check
from difftool.text.tokenizer import Tokenizer

ROUND, SQUARE = 1.1, 1 / 1.1
"""What a pair of brackets does to the weight of what is in it."""
BACKTRACK = 20
"""So many tokens may follow a comma into the next chunk, rather than be parted from each other."""
LONG_WORD = 8
"""ComfyUI parts no word of fewer tokens."""


class Chunk(NamedTuple):
    """What a text encoder reads at once: ids and weights of `length` tokens, marks included."""

    ids: list[int]
    weights: list[float]


TextPiece = tuple[str, float]
"""A text and its weight."""


def chunks(tokenizer: Tokenizer, prompt: str, length: int, syntax: str = "none") -> list[Chunk]:
    """The chunks of a prompt, at least one; UsageError for syntax that is not supported."""
    if syntax == "none":
        return [Chunk(row, [1.0] * length) for row in tokenizer.encode([prompt], length)]
    if syntax == "a1111":
        found = [
            part for pieces in _breaks(prompt) for part in _by_commas(tokenizer, pieces, length - 2)
        ]
    else:
        found = [*_by_words(tokenizer, nested(prompt), length - 2)]
    return [_marked(tokenizer, tokens, length) for tokens in found]


def _marked(tokenizer: Tokenizer, tokens: list[tuple[int, float]], length: int) -> Chunk:
    fill = length - 2 - len(tokens)
    ids = [tokenizer.start_id, *(i for i, _ in tokens), tokenizer.end_id]
    weights = [1.0, *(w for _, w in tokens), 1.0]
    return Chunk(ids + [tokenizer.pad_id] * fill, weights + [1.0] * fill)


# --- A1111 -----------------------------------------------------------------------------------


def _breaks(prompt: str) -> Iterator[list[TextPiece]]:
    check(prompt, "a1111")
    for part in re.split(r"\s*\bBREAK\b\s*", prompt):
        yield weighted(part)


def weighted(prompt: str) -> list[TextPiece]:
    """A1111's weights: (x) 1.1, [x] 1/1.1, (x:1.3); nested ones multiply, \\( is a bracket."""
    pieces: list[list] = []
    opened: list[tuple[str, int]] = []

    def times(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for token in re.findall(r"\\[\\()\[\]]|[()\[\]]|[^\\()\[\]]+|\\", prompt):
        if token in "([":
            opened.append((token, len(pieces)))
        elif token in ")]" and opened and opened[-1][0] == {")": "(", "]": "["}[token]:
            _, start = opened.pop()
            factor = ROUND if token == ")" else SQUARE
            number = re.search(r":\s*([+-]?[.\d]+)\s*$", pieces[-1][0]) if pieces[start:] else None
            if token == ")" and number and (given := _number(number[1])) is not None:
                pieces[-1][0], factor = pieces[-1][0][: number.start()], given
            times(start, factor)
        else:
            pieces.append([token[1:] if token[0] == "\\" and token[1:] else token, 1.0])
    for bracket, start in opened:  # those that are never closed run to the end
        times(start, ROUND if bracket == "(" else SQUARE)
    return _joined((text, weight) for text, weight in pieces)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _joined(pieces: Iterator[TextPiece]) -> list[TextPiece]:
    """Neighbours of one weight are one text."""
    joined: list[TextPiece] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined


def _by_commas(
    tokenizer: Tokenizer, pieces: list[TextPiece], room: int
) -> Iterator[list[tuple[int, float]]]:
    """Chunks that are parted after a comma, if one is near the end."""
    (comma,) = tokenizer.tokens(",")[-1:]
    chunk: list[tuple[int, float]] = []
    for text, weight in pieces:
        for unit in tokenizer.units(text):
            if len(chunk) == room:
                commas = [i for i, (id, _) in enumerate(chunk) if id == comma]
                cut = commas[-1] + 1 if commas else 0
                near = unit[0] != comma and commas and room - commas[-1] <= BACKTRACK
                cut = cut if near else room
                yield chunk[:cut]
                chunk = chunk[cut:]
            if len(chunk) + len(unit) > room:
                yield chunk
                chunk = []
            chunk += [(token, weight) for token in unit]
    yield chunk


# --- ComfyUI ---------------------------------------------------------------------------------


def nested(prompt: str) -> list[TextPiece]:
    """ComfyUI's weights: (x) times 1.1, (x:1.3) is 1.3 whatever is around it; [] is plain text."""
    return _joined(_nested(prompt, 1.0))


def _nested(prompt: str, weight: float) -> Iterator[TextPiece]:
    depth, text, start = 0, "", 0
    position = 0
    while position < len(prompt):
        character = prompt[position]
        if character == "\\" and prompt[position + 1 : position + 2] in ("(", ")"):
            text += prompt[position + 1] if not depth else ""
            position += 2
            continue
        if character == "(":
            if not depth:
                yield text, weight
                text, start = "", position + 1
            depth += 1
        elif character == ")" and depth:
            depth -= 1
            if not depth:
                inner, factor = prompt[start:position], weight * ROUND
                before, colon, number = inner.rpartition(":")
                if colon and (given := _number(number)) is not None:
                    inner, factor = before, given
                yield from _nested(inner, factor)
        elif not depth:
            text += character
        position += 1
    yield (text if not depth else prompt[start - 1 :]), weight


def _by_words(
    tokenizer: Tokenizer, pieces: list[TextPiece], room: int
) -> Iterator[list[tuple[int, float]]]:
    """Chunks that part no short word."""
    chunk: list[tuple[int, float]] = []
    for text, weight in pieces:
        for word in text.split():
            tokens = [(token, weight) for token in tokenizer.tokens(word)]
            while len(chunk) + len(tokens) > room:
                cut = room - len(chunk) if len(tokens) >= LONG_WORD else 0
                yield chunk + tokens[:cut]
                chunk, tokens = [], tokens[cut:]
            chunk += tokens
    yield chunk
