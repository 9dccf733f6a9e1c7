"""CONSTRUCTS: what the tools read in a prompt beside words, as a row each. Torch-free.

A prompt that has one which its syntax does not read is drawn with it as words, so it is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from difftool.errors import UsageError


class Construct(NamedTuple):
    """Something in a prompt that is not meant as words."""

    pattern: str
    """What it looks like; a group "name" is a name that is read where something is called so."""
    what: str
    hint: str | None = None
    read: tuple[str, ...] = ()
    """The syntaxes that read it."""
    refused: tuple[str, ...] = ()
    """Those that have it in the tool they are of, and not here."""

    def refusal(self, text: str) -> UsageError:
        """What is said where the syntax has it and it is not supported."""
        return UsageError(f"{self.what} are not supported", text, self.hint)


A1111, COMFY, COMPEL, NOVELAI = "a1111", "comfy", "compel", "novelai"
NUMBER = r"\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*"
FILES = "give --embedding FILE, or --embedding-dir"
READS = "--prompt-syntax {} reads them"
# fmt: off
CONSTRUCTS = (
    Construct(r"<(?:lora|lyco):[^<>]*>", "networks named in prompts", "give --lora",
              read=(A1111, COMFY, COMPEL)),
    Construct(r"<hypernet:[^<>]*>?", "hypernetworks", "LoRAs are read", refused=(A1111,)),
    Construct(r"\bAND\b", "AND between prompts", READS.format(A1111), read=(A1111,)),
    Construct(r"(?<!\\)\[(?:[^\[\]:|\\]|\\.)*[:|][^\[\]]*\]", "prompts that change with the step",
              READS.format(A1111), read=(A1111,)),
    Construct(rf"(?<!\\)\((?:[^()]|\([^()]*\))*:{NUMBER}\)|(?<!\\)\(\([^()]+\)\)",
              "weights in round brackets", READS.format("a1111 or comfy"), read=(A1111, COMFY)),
    Construct(r"(?<!\\)\[[^\[\]:|]+(?<!\\)\]", "weights in square brackets", READS.format(A1111),
              read=(A1111, NOVELAI)),
    Construct(r"\bBREAK\b", "breaks between chunks", READS.format(A1111), read=(A1111,)),
    Construct(r"\{[^{}|]*\|[^{}]*\}", "alternatives", "write the one that is meant"),
    Construct(r"\{[^{}|]+\}", "weights in braces", "(word:1.05), or " + READS.format(NOVELAI),
              read=(NOVELAI,)),
    Construct(r"(?<!\w)__[\w./*-]+?__(?!\w)", "wildcards", "--wildcard-dir has none of that name"),
    Construct(r"\bembedding:(?P<name>[^\s,:()]+)", "embeddings", FILES),
    Construct(r"<(?P<name>[^\s<>|:]+)>", "words of embeddings", FILES),
    Construct(r"(?:^|(?<=\s))--[A-Za-z][\w-]*(?:\s+[\d.:]+)?", "flags within a prompt",
              "give them beside it: --size 768x512"),
    Construct(r"(?<=\w)::(?=\s|$|-?[\d.])[-\d.]*|\b\d[\d.]*::", "weights after ::",
              "(word:1.2)", read=(NOVELAI,)),
    Construct(r"\.swap\(", "compel's swaps, which no pipeline of diffusers draws either,",
              "[cat:dog:0.3] changes after a share of the steps: " + READS.format(A1111),
              refused=(COMPEL,)),
    Construct(r"\)\.blend\(|\)\.(?:and|add)\(\s*[^\s)]", "compel's blends", READS.format(COMPEL),
              read=(COMPEL,)),
    Construct(r"(?:\)|\b[a-z]{2,})(?:\+{2,4}|-{2,4})(?![\w+-])|\)[+-](?![\w+-])|\)\d*\.\d+"
              r"|\)\.and\(\s*\)", "compel's weights", READS.format(COMPEL), read=(COMPEL,)),
)
# fmt: on


def unread(
    prompt: str, syntax: str, words: Collection[str] = ()
) -> Iterator[tuple[Construct, str]]:
    """What a prompt has that its syntax does not read, each kind once, as it stands there; words:
    those of embeddings, which are read."""
    known = {word.lower() for word in words}
    for construct in CONSTRUCTS:
        if syntax in construct.read:
            continue
        for match in re.finditer(construct.pattern, prompt):
            name = match.groupdict().get("name", "").lower()
            if not (name and name in known):
                yield construct, match[0].strip()
                break


def check(prompt: str, syntax: str) -> None:
    """UsageError for what the syntax has in the tool that it is of, and not here."""
    for construct, text in unread(prompt, syntax):
        if syntax in construct.refused:
            raise construct.refusal(text)
