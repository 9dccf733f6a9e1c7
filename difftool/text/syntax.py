"""SYNTAXES: how prompts are read, as a row each. Torch-free.

A row says what of a prompt are weights and breaks, how it is cut into chunks, and by whose
arithmetic weights are applied, a name from the pipeline's WEIGHTINGS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from difftool.registry import Registry
from difftool.text import a1111, comfy, compel, novelai
from difftool.text.chunks import (
    Blend,
    Chunk,
    Parts,
    TextPiece,
    Token,
    by_commas,
    by_sentences,
    by_words,
    marked,
    whole,
)
from difftool.text.tokenizer import Tokenizer


def _alone(prompt: str) -> list[TextPiece]:
    return [(prompt, 1.0)]


def _whole(prompt: str) -> list[Blend]:
    return [Blend(((prompt, 1.0),))]


def _always(prompt: str, steps: int) -> list[tuple[int, str]]:
    return [(steps, prompt)]


@dataclass(frozen=True)
class PromptSyntax:
    """A row of SYNTAXES."""

    name: str
    about: str
    weighting: str
    """By whose arithmetic weights are applied where nothing else is asked for."""
    parts: Callable[[str], Parts]
    cut: Callable[[Tokenizer, Parts, int], list[list[Token]]]
    """(tokenizer, parts, tokens that a chunk has room for) -> the tokens of each chunk."""
    conjunction: Callable[[str], list[TextPiece]] = _alone
    """The prompts that it is made of, each with its share of the guidance."""
    schedule: Callable[[str, int], list[tuple[int, str]]] = _always
    """(prompt, steps) -> its texts, each with the last step that it is for; the first step is 1."""
    composition: Callable[[str], list[Blend]] = _whole
    """A text -> what it is composed of, which share no chunk, each of texts that are blended."""
    stands: bool = True
    """Whether {a|b}, __wildcards__, <lora:name:1> and Midjourney's parameters mean something."""
    plain: bool = False
    """Whether every character is a word's, and nothing in a prompt stands for anything else."""


SYNTAXES: Registry[PromptSyntax] = Registry("syntax of prompts")

for row in (
    PromptSyntax(
        *("a1111", "(x:1.3), [x], BREAK, AND, [a:b:0.5], [a|b]", "a1111", a1111.parts, by_commas),
        conjunction=a1111.conjunction,
        schedule=a1111.schedule,
    ),
    PromptSyntax("comfy", "(x:1.3); [] is text", "comfy", comfy.parts, by_words),
    PromptSyntax(
        *("compel", "(a b)1.3, word++, .and(), .blend()", "compel", compel.parts, by_sentences),
        composition=compel.composition,
    ),
    PromptSyntax(
        *("novelai", "{x}, [x], 1.5::x::", "a1111", novelai.parts, by_commas),
        stands=False,
    ),
    PromptSyntax(
        *("none", "every character as it stands, and what is too long is cut", "none"),
        *(lambda prompt: [[(prompt, 1.0)]], whole),
        stands=False,
        plain=True,
    ),
):
    SYNTAXES.add(row.name, row, *(("automatic1111",) if row.name == "a1111" else ()))


def chunks(tokenizer: Tokenizer, prompt: str, length: int, syntax: str = "none") -> list[Chunk]:
    """The chunks of a prompt, at least one; what changes with the step and what AND joins are read
    before."""
    row = SYNTAXES[syntax]
    return [marked(tokenizer, tokens, length) for tokens in row.cut(
        tokenizer, row.parts(prompt), length - 2)]  # fmt: skip
