"""Prompts as ComfyUI reads them. Torch-free.

(x) times 1.1; (x:1.3) is 1.3 whatever is around it; [] is plain text; \\( is a bracket.
"""

from __future__ import annotations

from collections.abc import Iterator

from difftool.text.chunks import DEEPEST, Parts, TextPiece, joined, number_of

ROUND = 1.1
"""What a pair of brackets does to the weight of what is in it."""


def parts(prompt: str) -> Parts:
    """The weighted texts of a prompt, which has no breaks."""
    return [nested(prompt)]


def nested(prompt: str) -> list[TextPiece]:
    """The weighted texts of a prompt."""
    return joined(_nested(prompt, 1.0, 0))


def _nested(prompt: str, weight: float, within: int) -> Iterator[TextPiece]:
    if within > DEEPEST:
        yield prompt, weight
        return
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
                if colon and (given := number_of(number)) is not None:
                    inner, factor = before, given
                yield from _nested(inner, factor, within + 1)
        elif not depth:
            text += character
        position += 1
    yield (text if not depth else prompt[start - 1 :]), weight
