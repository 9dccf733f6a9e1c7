"""What is written beside a picture, made into the caption of one sample. Torch-free.

Several lines are several captions, of which one is drawn; of {a|b} one alternative is drawn, {{ and
}} are braces; tags between commas are put in another order where that is asked for. kohya's syntax;
all decided by the sample's key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from difftool.errors import InputError
from difftool.text.dice import Dice

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}|]*(?:\|[^{}|]*)+)\}")


class Caption(NamedTuple):
    """The captions of one picture, one of which is drawn each time, and where they come from."""

    texts: tuple[str, ...]
    source: str


MAX_CAPTIONS = 1000
"""Of one picture."""


def add(found: dict[str, Caption], picture: str, caption: Caption) -> None:
    """Give a picture captions beside those that it has, each once; InputError for too many."""
    before = found[picture].texts if picture in found else ()
    if len(before) > MAX_CAPTIONS:
        raise InputError(f"{picture} has more than {MAX_CAPTIONS} captions", caption.source)
    if texts := tuple(dict.fromkeys((*before, *caption.texts))):
        found[picture] = caption._replace(texts=texts)


@dataclass(frozen=True)
class Syntax:
    """How the caption of a sample is made from what is written."""

    wildcards: bool = True
    shuffle: bool = False
    keep: int = 0
    """Of shuffled tags, the first so many stay in front."""
    separator: str = ","
    keep_separator: str = ""
    """What stands between tags that stay in front, tags that are shuffled and, the second time,
    tags that stay behind ("|||"); goes before `keep`."""
    secondary: str = ""
    """What stands between tags that stay together when others are shuffled (";;;")."""
    prefix: str = ""
    suffix: str = ""
    dropout: float = 0.0
    """Share of captions left out."""
    tag_dropout: float = 0.0
    """Share of tags left out, of those that do not stay in front or behind."""

    def draw(self, texts: tuple[str, ...], dice: Dice) -> str:
        """The caption of one sample."""
        text = texts[dice.pick(len(texts))]
        text = " ".join(part for part in (self.prefix, text, self.suffix) if part)
        if self.dropout and dice.roll() < self.dropout:
            return ""
        if self.wildcards and ("{" in text or "}" in text):
            text = self._alternatives(text, dice)
        if self.shuffle or self.keep_separator or self.tag_dropout:
            text = self._tags(text, dice)
        return text.replace(self.secondary, self.separator) if self.secondary else text

    @staticmethod
    def varied(text: str) -> bool:
        """Whether a text has wildcards."""
        return any(match[1] is not None for match in _BRACES.finditer(text))

    @staticmethod
    def _alternatives(text: str, dice: Dice) -> str:
        def drawn(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            choices = match[1].split("|")
            return choices[dice.pick(len(choices))]

        return _BRACES.sub(drawn, text)

    def _tags(self, text: str, dice: Dice) -> str:
        front, loose, back = self._parts(text)
        if self.shuffle:
            loose = [tag for _, tag in sorted((dice.roll(), tag) for tag in loose)]
        if self.tag_dropout:
            loose = [tag for tag in loose if dice.roll() >= self.tag_dropout]
        return f"{self.separator} ".join([*front, *loose, *back])

    def _parts(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """The tags that stay in front, those that move, and those that stay behind."""

        def tags(part: str) -> list[str]:
            return [tag.strip() for tag in part.split(self.separator) if tag.strip()]

        if self.keep_separator and self.keep_separator in text:
            front, loose, *back = text.split(self.keep_separator, 2)
            return tags(front), tags(loose), tags(back[0]) if back else []
        found = tags(text)
        return found[: self.keep], found[self.keep :], []
