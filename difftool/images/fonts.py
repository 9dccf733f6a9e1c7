"""Fonts of what DejaVu Sans lacks, Chinese and emoji among it: those of the system. Torch-free."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import chain

from PIL import Image, ImageDraw, ImageFont

VARIABLE = "DIFFTOOL_FONTS"
"""Of the environment: files of fonts that come before the system's."""
STRIKES = (109, 160, 136, 128, 96, 64, 48, 40, 32, 20)
"""Sizes of fonts that are pictures of one size, as those of emoji may be."""
NO_CHARACTER = "\U0010ffff"
SEEN_AT = 24
"""A size at which it is seen whether a font has a character."""
NAMES = (
    *("msyh.ttc", "YuGothM.ttc", "msgothic.ttc", "malgun.ttf", "simsun.ttc", "Nirmala.ttf"),
    *("Nirmala.ttc", "seguiemj.ttf", "seguisym.ttf", "Hiragino Sans GB.ttc", "PingFang.ttc"),
    *("AppleSDGothicNeo.ttc", "Apple Color Emoji.ttc", "Apple Symbols.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoColorEmoji.ttf", "DroidSansFallbackFull.ttf"),
)
"""Fonts of many characters that systems have, where Pillow looks for fonts."""


@cache
def opened(path: str, size: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """A font, and how many times larger than that size it is: 1 unless it has its own sizes alone.
    OSError if it cannot be read."""
    for own in (size, *STRIKES):
        try:
            return ImageFont.truetype(path, own), own / size
        except OSError as error:
            if "resource" in str(error):  # which cannot be opened, in any size
                break
    raise OSError(f"{path} is no font")


@cache
def own_path(bold: bool) -> str:
    """DejaVu Sans in the copy that comes with matplotlib: legible when small, and it has Greek,
    Cyrillic and Arabic too."""
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf"


@cache
def _drawn(path: str, character: str) -> bytes:
    """What a font shows for a character; nothing where that is empty."""
    font, _ = opened(path, SEEN_AT)
    side = round(2 * font.size)
    picture = Image.new("RGBA", (side, side))
    at = side // 4, side * 3 // 4
    with suppress(OSError, ValueError):
        ImageDraw.Draw(picture).text(at, character, "black", font, anchor="ls", embedded_color=True)
    return picture.tobytes() if picture.getbbox() else b""


def has(path: str, character: str) -> bool:
    """Whether a font shows a character, and not what stands for those that it lacks."""
    try:
        shown = _drawn(path, character)
        return bool(shown) and shown != _drawn(path, NO_CHARACTER)
    except OSError:
        return False


@cache
def font_of(character: str, bold: bool = False) -> str | None:
    """The file of the first font that shows a character; None if there is none."""
    own = own_path(bold)
    if has(own, character):
        return own
    for path in chain(_named(), _asked(character), known()):
        if has(path, character):
            return path
    return None


def _named() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


@cache
def known() -> tuple[str, ...]:
    """Those of NAMES that are here."""
    found = []
    for name in NAMES:
        with suppress(OSError):
            opened(name, SEEN_AT)
            found.append(name)
    return tuple(found)


def _asked(character: str) -> Iterator[str]:
    """What fontconfig, if it is there, holds to be the font of a character."""
    if command := shutil.which("fc-match"):
        asked = [command, "--format", "%{file}", f":charset={ord(character):x}"]
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(asked, capture_output=True, timeout=10, check=True).stdout
            yield os.fsdecode(found)
