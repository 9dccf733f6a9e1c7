"""A1111's `parameters` text: prompt, negative prompt, and one line of settings. Torch-free."""

from __future__ import annotations

import json
import re
from typing import Any

from difftool.errors import InputError
from difftool.sampling.requests import Request, request_of
from difftool.sampling.settings import A1111_WORDS, Values, spelled
from difftool.version import __version__

ORDER = (
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model"),
    *("Image CFG scale", "Denoising strength", "Clip skip", "Refiner", "Lora hashes", "RNG"),
    *("Class", "Version"),
)
"""Of the words on the line; any other comes after them."""
NEGATIVE = "Negative prompt:"


def parameters(values: Values) -> str:
    """The text of a picture of these values."""
    words: dict[str, Any] = {
        "Model hash": values["model_hash"] or None,
        "RNG": "CPU",
        "Version": f"difftool-{__version__}",
    }
    for word, (row, dialect) in A1111_WORDS.items():
        value = values.get(row.name)
        if value is not None and (row.effect is None or row.effect(values)):
            words[word] = dialect.write(value)
    known = [word for word in ORDER if word in words]
    known += [word for word in words if word not in ORDER]
    line = ", ".join(f"{word}: {_quoted(v)}" for word in known if (v := words[word]) is not None)
    negative = f"{NEGATIVE} {values['negative']}" if values["negative"] else ""
    return "\n".join(part for part in (values["prompt"], negative, line) if part)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


# The expression by which A1111 reads the line back.
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse_parameters(text: str) -> dict[str, str]:
    """The text as values by word; "Prompt" and "Negative prompt" are among them."""
    *lines, last = text.strip().split("\n")
    pairs = _PARAMETER.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    cut = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    values = {
        "Prompt": "\n".join(lines[:cut]).strip(),
        "Negative prompt": "\n".join(lines[cut:]).removeprefix(NEGATIVE).strip(),
    }
    return values | {word: _unquoted(value.strip()) for word, value in pairs}


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value


def from_parameters(text: str, source: str) -> Request:
    """The request in the text, as far as it is understood here; InputError if it is not sound."""
    words = parse_parameters(text)
    read: dict[str, Any] = {}
    try:
        for word, (row, dialect) in A1111_WORDS.items():
            if dialect.read is None or word not in words:
                continue
            if (value := dialect.read(words[word])) is not None:
                read[row.name] = value
        if "seed" not in read:
            raise ValueError("it has no seed")
    except ValueError as error:
        raise InputError(f"the parameters of {source} cannot be read", str(error)) from None
    read |= {"prompt": words["Prompt"], "negative": words["Negative prompt"]}
    return request_of(spelled(read), model_hash=words.get("Model hash", ""))
