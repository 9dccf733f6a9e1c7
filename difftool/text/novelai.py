"""Prompts as NovelAI reads them. Torch-free.

{x} [x]         times 1.05, and divided by it; nested ones multiply
1.5::x::        times 1.5, up to the next ::
"""

from __future__ import annotations

import re

from difftool.text.chunks import DEEPEST, Parts, TextPiece, joined, number_of

STEP = 1.05
"""What a pair of braces does to the weight of what is in it."""
BRACKETS = {"{": ("}", STEP), "[": ("]", 1 / STEP)}

_TOKEN = re.compile(r"[{}\[\]]|([+-]?(?:\d+\.?\d*|\.\d+))::|::|[^{}\[\]:\d.+-]+|.", re.DOTALL)


def parts(prompt: str) -> Parts:
    """The weighted texts of a prompt, which has no breaks; brackets that are never closed run to
    the end."""
    found: list[TextPiece] = []
    opened: list[tuple[str, float]] = []
    """What closes each bracket, and the weight before it."""
    weight, number = 1.0, None
    for match in _TOKEN.finditer(prompt):
        token = match[0]
        if token in BRACKETS and len(opened) < DEEPEST:
            closing, factor = BRACKETS[token]
            opened.append((closing, weight))
            weight *= factor
        elif opened and token == opened[-1][0]:
            _, weight = opened.pop()
        elif match[1] is not None and (given := number_of(match[1])) is not None:
            number = given
        elif token == "::" and number is not None:
            number = None
        else:
            found.append((token, weight if number is None else weight * number))
    return [joined(found)]
