"""Networks that A1111's prompts name: <lora:name:0.8>. Torch-free."""

from __future__ import annotations

import re
from typing import NamedTuple

from difftool.text.chunks import number_of

_TAG = re.compile(r"\s*<(lora|lyco):([^<>:]+)((?::[^<>:]*)*)>", re.IGNORECASE)


class NamedLora(NamedTuple):
    """A LoRA by its name, with its weights in the U-Net and in the text encoders."""

    name: str
    unet: float
    text: float
    rest: str = ""
    """What its tag says beside, which is not read."""


def named_loras(prompt: str) -> tuple[str, list[NamedLora]]:
    """A prompt without its tags, and the LoRAs that they name."""
    found = [_named(match[2].strip(), match[3]) for match in _TAG.finditer(prompt)]
    return (_TAG.sub("", prompt).strip() if found else prompt), found


def _named(name: str, rest: str) -> NamedLora:
    """<lora:name:text:unet> or te= and unet=, each the other where it is not said."""
    said: dict[str, float] = {}
    others = []
    for place, part in enumerate(rest.split(":")[1:]):
        key, _, value = part.rpartition("=")
        key = key.strip().lower() or ("te", "unet")[min(place, 1)]
        number = number_of(value)
        if number is not None and key in ("te", "unet") and key not in said:
            said[key] = number
        elif part.strip():
            others.append(part.strip())
    text = said.get("te", said.get("unet", 1.0))
    return NamedLora(name, said.get("unet", text), text, ":".join(others))
