"""Midjourney's parameters, as they stand in prompts: a fox --ar 3:2 --no hills. Torch-free."""

from __future__ import annotations

import re
from typing import NamedTuple

MEANT = {
    **dict.fromkeys(("ar", "aspect"), "ar"), **dict.fromkeys(("chaos", "c"), "chaos"),
    **dict.fromkeys(("repeat", "r"), "repeat"),
    "no": "no", "tile": "tile", "seed": "seed", "stop": "stop",
}  # fmt: skip
"""Those that mean something here, by the setting that they are."""
OTHERS = frozenset(
    "stylize s iw weird w quality q style v version niji sref sw cref cw oref ow sv p profile raw "
    "draft exp motion video fast relax turbo hd test testp creative upbeta uplight upanime vibe "
    "sameseed public stealth personalize".split()
)
"""Those that do not."""
ALONE = ("tile",)
"""Those that need no value."""
# A dash that a keyboard makes of two is one where a number follows: it may be prose.
_DASHED = r"\u2014(?=(?:ar|aspect|chaos|seed|stop|repeat|stylize|iw|v)\s+\d)"
_PARAMETER = re.compile(rf"(?:^|(?<=\s))(?:--|{_DASHED})([A-Za-z]+)(?![\w-])")
_NEXT = re.compile(r"\s(?:--|\u2014)[A-Za-z]")
_VALUE = re.compile(r"\s+([^\s{}|]+)")
_COMMAND = re.compile(r"^\s*/imagine\s+(?:prompt\s*:\s*)?")
"""By which a prompt is given to it."""
_WAY = re.compile(r"\s+(x|y|both|none)(?!\S)")


class Parameters(NamedTuple):
    """A prompt without its parameters, and what they say."""

    prompt: str
    values: dict[str, str]
    """By setting, as texts; the last of several."""
    others: tuple[str, ...]
    """Those that mean nothing here, as they stand there."""


def parameters(prompt: str) -> Parameters:
    """What the parameters of a prompt say; those within braces are left, for what is chosen."""
    prompt = _COMMAND.sub("", prompt)
    values: dict[str, str] = {}
    others: list[str] = []
    kept, position = list[str](), 0
    for match in _PARAMETER.finditer(prompt):
        name = match[1].lower()
        if match.start() < position or _depth(prompt[: match.start()]):
            continue
        if name not in MEANT and name not in OTHERS:
            continue
        kept.append(prompt[position : match.start()].strip())
        text, position = _value(prompt, match.end(), name)
        if name in OTHERS:
            others.append(f"--{name} {text}".rstrip())
        elif MEANT[name] == "no" and "no" in values:
            values["no"] += f", {text}"
        else:
            values[MEANT[name]] = text
    if not (values or others):
        return Parameters(prompt, {}, ())
    kept.append(prompt[position:].strip())
    return Parameters(" ".join(filter(None, kept)), values, tuple(others))


def _value(prompt: str, start: int, name: str) -> tuple[str, int]:
    """The value that begins there, and where it ends."""
    following = _NEXT.search(prompt, start)
    end = following.start() if following else len(prompt)
    if name == "no":
        return prompt[start:end].strip(), end
    value = (_WAY if name in ALONE else _VALUE).match(prompt, start, end)
    if value is None or (name in OTHERS and not re.fullmatch(r"[\d.:]+|raw|https?:\S+", value[1])):
        return "", start
    return value[1], value.end()


def _depth(text: str) -> int:
    return text.count("{") - text.count("}")
