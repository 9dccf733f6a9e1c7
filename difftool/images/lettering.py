"""Text on sheets and tables of pictures: in fonts that have its characters, cut into lines.
Torch-free."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from difftool.images.fonts import font_of, has, opened, own_path

LONGEST = 2000
"""Characters of a text that are looked at."""
MARKS = ("Mn", "Me")
"""Categories of marks on the character before them."""
TONES = "🏻🏼🏽🏾🏿"
JOINER = "\u200d"
PLAIN = 0x250
"""Below, DejaVu Sans has every character."""
WIDE = "WF"
"""Of characters that make lines without spaces, as Chinese and Japanese."""


class FontRun(NamedTuple):
    """A part of a text in one font."""

    text: str
    font: ImageFont.FreeTypeFont
    scale: float
    """How many times too large the font is."""

    @property
    def width(self) -> float:
        return self.font.getlength(self.text) / self.scale


class Face(NamedTuple):
    """Text of a size in pixels."""

    size: int
    bold: bool = False

    def runs(self, text: str) -> Iterator[FontRun]:
        """The text by fonts. What no font has is there by its name or its number."""
        own = own_path(self.bold)
        shown = [("", own)]
        missing = False
        for character in text:
            if _joins(character):
                path = shown[-1][1]
                mark = unicodedata.category(character) in MARKS
                if not missing and not (mark and not has(path, character)):
                    shown.append((character, path))
                continue
            path = _path(character, self.bold)
            missing = path is None
            shown.append((substitute(character) if missing else character, path or own))
        for path, part in groupby(shown, lambda each: each[1]):
            if joined := "".join(text for text, _ in part):
                yield FontRun(joined, *opened(path, self.size))

    def length(self, text: str) -> float:
        """How wide a text is, in pixels."""
        return sum(run.width for run in self.runs(text))

    def write(
        self, picture: Image.Image, at: tuple[float, float], text: str, fill: str, middle=False
    ) -> None:
        """Write a text on its baseline, from there or with its middle there."""
        runs = list(self.runs(text))
        x, y = at[0] - middle * sum(run.width for run in runs) / 2, at[1]
        draw = ImageDraw.Draw(picture)
        for run in runs:
            if run.scale == 1:
                draw.text((x, y), run.text, fill, run.font, anchor="ls", embedded_color=True)
            else:
                _paste(picture, run, (round(x), round(y)), fill)
            x += run.width


@cache
def face(size: int, bold: bool = False) -> Face:
    return Face(size, bold)


def _paste(picture: Image.Image, run: FontRun, at: tuple[int, int], fill: str) -> None:
    """Write in a font that has other sizes alone."""
    left, top, right, bottom = run.font.getbbox(run.text, anchor="ls")
    whole = Image.new("RGBA", (max(1, round(right - left)), max(1, round(bottom - top))))
    draw = ImageDraw.Draw(whole)
    draw.text((-left, -top), run.text, fill, run.font, anchor="ls", embedded_color=True)
    size = [max(1, round(side / run.scale)) for side in whole.size]
    small = whole.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    place = at[0] + round(left / run.scale), at[1] + round(top / run.scale)
    picture.paste(small, place, small)


def substitute(character: str) -> str:
    """What stands for a character that no font has: ":fox face:" for a symbol, else its escape."""
    name = unicodedata.name(character, "").lower()
    if name and unicodedata.category(character) == "So":
        return f":{name}:"
    return character.encode("unicode_escape").decode()


def without_font(texts: Iterable[str]) -> str:
    """The characters of texts that no font has, each once."""
    long = (text[:LONGEST] for text in texts if not text.isascii())
    found = dict.fromkeys(character for text in long for character in text)
    seen = (c for c in found if c.isprintable() and not _joins(c))
    return "".join(character for character in seen if _path(character) is None)


def _path(character: str, bold: bool = False) -> str | None:
    """The font of a character; None if it has none."""
    if character.isspace() or (ord(character) < PLAIN and character.isprintable()):
        return own_path(bold)
    return font_of(character, bold) if character.isprintable() else None


def _joins(character: str) -> bool:
    """Whether a character only changes the one before it."""
    return character in TONES or unicodedata.category(character) in (*MARKS, "Cf")


def wrapped(text: str, width: float, lines: int, face: Face) -> list[str]:
    """The text in at most so many lines that fit; an ellipsis says that there was more."""
    made, left = [""], _pieces(text[:LONGEST])
    while left:
        piece = left[0] if made[-1] else left[0].lstrip()
        if face.length(made[-1] + piece) <= width:
            made[-1] += piece
            left.pop(0)
        elif len(made) == lines:
            made[-1] = _cut(made[-1] + piece + "".join(left[1:]), width, face)
            break
        elif made[-1]:
            made.append("")
        else:  # longer than a line
            end = max(1, len(_fitting(piece, width, face)))
            made[-1], left[0] = piece[:end], piece[end:]
            made.append("")
    return [line for line in made if line]


def _pieces(text: str) -> list[str]:
    """Words, each with the space before it, between which a line may end; wide characters are one
    each, with what changes them."""
    made = list[str]()
    for number, word in enumerate(text.split()):
        made.append(" " if number else "")
        alone = False
        for character in word:
            joins = _joins(character) or made[-1].endswith(JOINER)
            wide = unicodedata.east_asian_width(character) in WIDE
            if (wide or alone) and made[-1].strip() and not joins:
                made.append("")
            made[-1] += character
            alone = wide or (joins and alone)
    return made


def _fitting(text: str, width: float, face: Face) -> str:
    while text and face.length(text) > width:
        text = text[:-1]
    return text


def _cut(text: str, width: float, face: Face) -> str:
    return _fitting(text, width - face.length("…"), face).rstrip() + "…"
