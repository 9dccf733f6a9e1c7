"""Text on sheets and tables of pictures: its font, and how it is cut into lines."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont

LONGEST = 2000
"""Characters of a text that are looked at."""


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in the copy that comes with matplotlib: legible when small, and it has Greek,
    Cyrillic and Arabic too."""
    import matplotlib

    name = f"DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def wrapped(text: str, width: float, lines: int, face: ImageFont.FreeTypeFont) -> list[str]:
    """The text in at most so many lines that fit; an ellipsis says that there was more."""
    words, made = text[:LONGEST].split(), [""]
    while words:
        line = f"{made[-1]} {words[0]}".lstrip()
        if face.getlength(line) <= width:
            made[-1] = line
            words.pop(0)
        elif made[-1] and len(made) < lines:
            made.append("")
        else:
            whole = line if not made[-1] else f"{made[-1]} {' '.join(words)}"
            made[-1] = _cut(whole, width, face)
            break
    return [line for line in made if line]


def _cut(text: str, width: float, face: ImageFont.FreeTypeFont) -> str:
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
