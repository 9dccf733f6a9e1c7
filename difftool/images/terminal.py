"""Pictures in a terminal: half blocks of two colours each, or the pictures themselves where the
environment says that the terminal shows them. Nothing is asked of the terminal. Torch-free."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from PIL import Image

from difftool.images.write import encode_png

BLOCK = "▀"
MAX_CELLS = (64, 28)
"""Columns and rows that a picture takes, at most."""
CHUNK = 4096
"""Bytes of one of kitty's escape sequences."""


def protocol(environment: Mapping[str, str]) -> str:
    """How a terminal shows pictures: "kitty", "iterm", or "blocks"."""
    if "TMUX" in environment or environment.get("TERM", "").startswith(("screen", "tmux")):
        return "blocks"  # which passes no pictures on
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") in (
        "xterm-kitty",
        "xterm-ghostty",
    ):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "blocks"


def cells(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of a picture of a size (width, height) in a terminal with that room: a row
    is twice as high as a column is wide."""
    columns, rows = (max(1, min(a, b)) for a, b in zip(room, MAX_CELLS, strict=True))
    scale = min(columns / size[0], 2 * rows / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale / 2))


def blocks(picture: Image.Image, size: tuple[int, int]) -> list[list[tuple[str, str]]]:
    """Rows of (upper, lower) colours "#rrggbb" of so many columns and rows of half blocks."""
    columns, rows = size
    small = picture.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    data = small.tobytes()
    colour = [f"#{data[i : i + 3].hex()}" for i in range(0, len(data), 3)]
    lines = [colour[i : i + columns] for i in range(0, len(colour), columns)]
    return [[*zip(*pair, strict=True)] for pair in zip(lines[::2], lines[1::2], strict=True)]


def escapes(picture: Image.Image, size: tuple[int, int], how: str) -> str:
    """What shows a picture in so many columns and rows from where the cursor is, which stays."""
    columns, rows = size
    data = base64.b64encode(encode_png(picture)).decode()
    if how == "iterm":
        place = f"width={columns};height={rows};preserveAspectRatio=1;doNotMoveCursor=1"
        return f"\x1b]1337;File=inline=1;{place}:{data}\a"
    parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    first = f"a=T,f=100,i=1,p=1,q=2,C=1,c={columns},r={rows},"  # q: answers are not wanted
    made = []
    for number, part in enumerate(parts):
        more = int(number < len(parts) - 1)
        made.append(f"\x1b_G{first if number == 0 else ''}m={more};{part}\x1b\\")
    return "".join(made)
