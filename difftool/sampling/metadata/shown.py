"""What a picture says of how it was made, as it is shown. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from difftool.config.schema import SampleConfig
from difftool.config.validate import to_values
from difftool.images.read import probed
from difftool.sampling.metadata.files import told_by
from difftool.sampling.metadata.named import described
from difftool.sampling.requests import Request
from difftool.sampling.settings import ALWAYS, KEYS

SCHEMA = 1


def shown(path: Path) -> dict[str, Any]:
    """What a picture's file says, as the JSON object of `convert PICTURE --inspect`; nothing is
    sampled, and no file that it names is opened.

    UsageError if there is no such file, InputError if it is no picture or says what is malformed.
    """
    format, (width, height) = probed(path)
    request, texts = told_by(path)
    told = {"schema": SCHEMA, "format": format, "width": width, "height": height}
    if request is None:
        nothing = dict.fromkeys(("made_by", "model", "model_hash", "request"))
        return told | nothing | {"loras": [], "files": [], "missed": [], "texts": texts}
    return told | {
        "made_by": request.made_by or None,
        "model": request.model or None,
        "model_hash": request.model_hash or None,
        "request": dict(asked(request)),
        "loras": [[Path(name).stem, weight] for name, weight in request.loras],
        "files": [described(file) for file in request.named],
        "missed": [text for _, text in request.missed],
        "texts": texts,
    }


def asked(request: Request) -> Iterator[tuple[str, Any]]:
    """A request as a line of JSON of --prompts has it, whole."""
    settings = dict(request.settings)
    if request.template == request.prompt:
        request = replace(request, template=None)
    if request.negative_template == request.negative:
        request = replace(request, negative_template=None)
    if "size" in settings:
        settings["width"], settings["height"] = settings.pop("size")
    for key, row in KEYS.items():
        if key != row.json[0]:
            continue
        value = settings.get(row.name) if row.field is None else getattr(request, row.field)
        if row.field == "seeds" and value:
            value = value[0] if len(value) == 1 else list(value)
        if value not in (None, (), {}, []):
            yield key, list(value) if isinstance(value, tuple) else value


def lines(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is shown for people to read: a word and what is said of it. Settings that are what they
    are where nothing is asked for are left out."""
    yield "format", f"{told['format']}, {told['width']}x{told['height']}"
    if told["request"] is None:
        yield "made by", "it does not say how it was made"
        return
    yield "made by", told["made_by"] or "not said"
    named = filter(None, (told["model"], told["model_hash"]))
    yield "model", " ".join(named) or "not said"
    usual, always = to_values(SampleConfig()), {row.json[0] for row in ALWAYS}
    for key, value in told["request"].items():
        if value != "" and (key in always or value != usual.get(key)):
            yield key, value if isinstance(value, str) else str(value)
    for name, weight in told["loras"]:
        yield "lora", f"{name} at {weight:g}"
    for file in told["files"]:
        yield "file", file
    for text in told["missed"]:
        yield "not taken", text
