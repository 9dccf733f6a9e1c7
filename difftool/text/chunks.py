"""Weighted texts cut into chunks, which a text encoder reads one at a time. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from typing import NamedTuple

from difftool.text.tokenizer import Tokenizer

BACKTRACK = 20
"""So many tokens may follow a comma into the next chunk, rather than be parted from each other."""
LONG_WORD = 8
"""ComfyUI parts no word of fewer tokens."""

DEEPEST = 100
"""Brackets within each other; beyond, they are text."""

TextPiece = tuple[str, float]
"""A text and its weight."""
Parts = list[list[TextPiece]]
"""The pieces of a prompt, a list for each of the parts that share no chunk."""


class Blend(NamedTuple):
    """Texts whose encodings are added up, each times its factor, and the factor of the sum's way
    from the empty prompt's."""

    texts: tuple[TextPiece, ...]
    weight: float = 1.0


class Token(NamedTuple):
    """A token with the weight of its text, and that text's number in the prompt."""

    id: int
    weight: float
    piece: int


class Chunk(NamedTuple):
    """What a text encoder reads at once: `length` tokens, marks and filling included."""

    ids: list[int]
    weights: list[float]
    pieces: list[int]
    """The number of the text that each token is of; -1 for marks and filling."""


def number_of(text: str) -> float | None:
    """The finite number that a text is."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None


def joined(pieces: Iterable[TextPiece]) -> list[TextPiece]:
    """Neighbours of one weight as one text."""
    found: list[TextPiece] = []
    for text, weight in pieces:
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + text, weight)
        elif text:
            found.append((text, weight))
    return found


def marked(tokenizer: Tokenizer, tokens: Sequence[Token], length: int) -> Chunk:
    """A chunk of at most length - 2 tokens."""
    fill = length - 2 - len(tokens)
    ids = [tokenizer.start_id, *(token.id for token in tokens), tokenizer.end_id]
    weights = [1.0, *(token.weight for token in tokens), 1.0]
    pieces = [-1, *(token.piece for token in tokens), -1]
    return Chunk(ids + [tokenizer.pad_id] * fill, weights + [1.0] * fill, pieces + [-1] * fill)


def _units(tokenizer: Tokenizer, pieces: Sequence[TextPiece], first: int) -> Iterator[list[Token]]:
    """The tokens of pieces, by what must not be parted."""
    for number, (text, weight) in enumerate(pieces, first):
        for unit in tokenizer.units(text):
            yield [Token(token, weight, number) for token in unit]


def whole(tokenizer: Tokenizer, parts: Parts, room: int) -> list[list[Token]]:
    """One chunk, of what there is room for."""
    tokens = [token for unit in _units(tokenizer, parts[0], 0) for token in unit]
    return [tokens[:room]]


def by_commas(tokenizer: Tokenizer, parts: Parts, room: int) -> list[list[Token]]:
    """As A1111 does: chunks are parted after a comma, if one is near the end."""
    (comma,) = tokenizer.tokens(",")[-1:]
    made: list[list[Token]] = []
    first = 0
    for pieces in parts:
        chunk: list[Token] = []
        last = -1  # the last comma's place
        for unit in _units(tokenizer, pieces, first):
            if unit[0].id == comma:
                last = len(chunk)
            elif len(chunk) == room and last >= 0 and room - last <= BACKTRACK:
                made.append(chunk[: last + 1])
                chunk, last = chunk[last + 1 :], -1
            if len(chunk) + len(unit) > room:
                made.append(chunk)
                chunk, last = [], -1
            chunk = chunk + unit
        first += len(pieces)
        if chunk or not made or pieces is not parts[-1]:
            made.append(chunk)
    return made


def by_words(tokenizer: Tokenizer, parts: Parts, room: int) -> list[list[Token]]:
    """As ComfyUI does: no short word is parted."""
    made: list[list[Token]] = []
    first = 0
    for pieces in parts:
        chunk: list[Token] = []
        for number, (text, weight) in enumerate(pieces, first):
            for word in text.split():
                tokens = [Token(token, weight, number) for token in tokenizer.tokens(word)]
                while len(chunk) + len(tokens) > room:
                    cut = room - len(chunk) if len(tokens) >= LONG_WORD else 0
                    made.append(chunk + tokens[:cut])
                    chunk, tokens = [], tokens[cut:]
                chunk += tokens
        first += len(pieces)
        made.append(chunk)
    return made


def by_sentences(tokenizer: Tokenizer, parts: Parts, room: int) -> list[list[Token]]:
    """As compel does where it cuts nothing: after a sentence, else a phrase, else a word."""
    stop, *others = ((tokenizer.tokens(mark) or [-1])[-1] for mark in ".,;:")
    made: list[list[Token]] = []
    first = 0
    for pieces in parts:
        tokens = [token for unit in _units(tokenizer, pieces, first) for token in unit]
        first += len(pieces)
        while len(tokens) > room:
            ends = (
                [i for i, token in enumerate(tokens[:room]) if token.id == stop],
                [i for i, token in enumerate(tokens[:room]) if token.id in (stop, *others)],
                [i for i, token in enumerate(tokens[:room]) if tokenizer.ends_word(token.id)],
                [room - 1],
            )
            cut = next(found for found in ends if found)[-1] + 1
            made.append(tokens[:cut])
            tokens = tokens[cut:]
        made.append(tokens)
    return made
