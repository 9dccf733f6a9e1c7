"""What a picture says about itself: A1111's `parameters` text, and a `difftool` JSON chunk from
which it can be made again. Torch-free.

The text is what other tools read; the chunk is exact. JPEG and WebP carry the text only, as an EXIF
user comment.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from difftool import __version__
from difftool.config.schema import SampleConfig
from difftool.config.validate import to_values
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import SAMPLERS, split_spelling
from difftool.errors import InputError, UsageError
from difftool.images import write
from difftool.images.read import read_notes
from difftool.sampling.requests import Request

if TYPE_CHECKING:
    from difftool.pipeline.model import Model

SCHEMA = 1
MAX_BYTES = 1 << 20


class Recipe(NamedTuple):
    """All that one picture was made from."""

    prompt: str
    negative: str
    label: str | None
    seed: int | None
    settings: SampleConfig
    init: str | None = None
    mask: str | None = None
    image: str | None = None
    refiner: str | None = None
    embeddings: tuple[str, ...] = ()
    """Paths of the learned words that its prompts have."""


PICTURES = ("init", "mask", "image")
"""Paths of pictures that a recipe goes by."""


def parameters(recipe: Recipe, model: Model) -> str:
    """A1111's text: the prompt, the negative prompt, and one line of settings."""
    settings = recipe.settings
    edits = model.preset.family == "pix2pix"
    sampler, schedule = SAMPLERS.resolve(settings.sampler), GRIDS.resolve(settings.schedule)
    values = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[sampler].a1111 or sampler,
        "Schedule type": GRIDS[schedule].a1111 or schedule,
        "CFG scale": settings.guidance,
        "Seed": recipe.seed,
        "Size": "x".join(map(str, settings.size)),
        "Model hash": model.hash or None,
        "Model": model.name,
        "Image CFG scale": settings.image_guidance if edits else None,
        "Denoising strength": settings.strength if recipe.init and not edits else None,
        "Clip skip": settings.clip_skip if settings.clip_skip not in (None, 1) else None,
        "Refiner": recipe.refiner,
        "Lora hashes": ", ".join(f"{a.lora.path.stem}: {a.lora.hash}" for a in model.loras) or None,
        "RNG": "CPU",
        "Class": recipe.label,
        "Version": f"difftool-{__version__}",
    }
    line = ", ".join(f"{key}: {_quoted(v)}" for key, v in values.items() if v is not None)
    negative = f"Negative prompt: {recipe.negative}" if recipe.negative else ""
    return "\n".join(part for part in (recipe.prompt, negative, line) if part)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


# The expression by which A1111 reads the line back.
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse_parameters(text: str) -> dict[str, str]:
    """A1111's text as values by name; "Prompt" and "Negative prompt" are among them."""
    *lines, last = text.strip().split("\n")
    found = _PARAMETER.findall(last)
    if len(found) < 3:
        lines, found = [*lines, last], []
    cut = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), None)
    prompt, negative = (lines, []) if cut is None else (lines[:cut], lines[cut:])
    values = {
        "Prompt": "\n".join(prompt).strip(),
        "Negative prompt": "\n".join(negative).removeprefix("Negative prompt:").strip(),
    }
    for key, value in found:
        values[key] = _unquoted(value.strip())
    return values


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value


def chunk(recipe: Recipe, model: Model) -> dict[str, Any]:
    """Plain values for JSON: the request, and the whole preset with the settings as resolved."""
    request = {name: getattr(recipe, name) for name in ("prompt", "negative", "label", "seed")}
    request |= {n: v for n in (*PICTURES, "refiner") if (v := getattr(recipe, n)) is not None}
    request |= {"embeddings": list(recipe.embeddings)} if recipe.embeddings else {}
    loras = [[str(applied.lora.path), applied.strength] for applied in model.loras]
    request |= {"loras": loras} if loras else {}
    preset = to_values(model.preset) | {"sample": to_values(recipe.settings)}
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": model.name,
        "model_hash": model.hash,
        "request": request,
        "preset": preset,
    }


# --- into and out of files -------------------------------------------------------------------


def encode(image: Image.Image, format: str, text: str | None = None, values: Any = None) -> bytes:
    """The bytes of a picture file, with the text and the JSON values that it carries."""
    chunks = {"parameters": text} if text is not None else {}
    chunks |= {"difftool": json.dumps(values)} if values else {}
    return write.encode(image, format, chunks, text or "")


def read(path: Path) -> Request:
    """The request that makes a picture again, from its `difftool` chunk or its A1111 text.

    UsageError if there is no such file, InputError if it is no picture or says nothing.
    """
    if not path.is_file():
        raise UsageError(f"there is no picture {path}")
    info, comment = read_notes(path)
    if isinstance(values := info.get("difftool"), str):
        return from_chunk(values, str(path))
    text = info.get("parameters") if comment is None else comment
    if isinstance(text, str):
        return from_parameters(text, str(path))
    raise InputError(f"{path} does not say how it was made", hint="it was saved without metadata")


def from_chunk(text: str, source: str) -> Request:
    """The request that a `difftool` chunk holds; InputError if it is not sound."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} characters")
        values = json.loads(text)
        request, settings = values["request"], values["preset"]["sample"]
        own = {
            "prompt": request["prompt"],
            "negative": request["negative"],
            "label": request["label"],
        }
        own |= {name: request.get(name) for name in PICTURES}
        for name, value in own.items():
            optional = name in ("label", *PICTURES)
            if not isinstance(value, str) and not (optional and value is None):
                raise ValueError(f"{name} is {type(value).__name__}")
        words = request.get("embeddings", [])
        if not isinstance(words, list) or not all(isinstance(path, str) for path in words):
            raise ValueError("embeddings of the wrong type")
        loras = tuple((str(path), float(weight)) for path, weight in request.get("loras", []))
        seed, made_by = request["seed"], str(values.get("model_hash") or "")
        if type(seed) not in (int, type(None)) or not isinstance(settings, dict):
            raise ValueError("seed or settings of the wrong type")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the difftool chunk of {source} cannot be read", repr(error)) from None
    seeds = None if seed is None else (seed,)
    return Request(
        **own, seeds=seeds, settings=settings, model_hash=made_by, embeddings=tuple(words),
        loras=loras,
    )  # fmt: skip


def from_parameters(text: str, source: str) -> Request:
    """The request in A1111's text, as far as it is understood here."""
    values = parse_parameters(text)
    try:
        settings: dict[str, Any] = {}
        if "Steps" in values:
            settings["steps"] = int(values["Steps"])
        for key, name in (
            ("CFG scale", "guidance"),
            ("Image CFG scale", "image_guidance"),
            ("Denoising strength", "strength"),
        ):
            if key in values:
                settings[name] = float(values[key])
        if "Clip skip" in values:
            settings["clip_skip"] = int(values["Clip skip"])
        if "Size" in values:
            width, height = values["Size"].split("x")
            settings["size"] = (int(width), int(height))
        seed = int(values["Seed"])
    except (KeyError, ValueError) as error:
        raise InputError(f"the parameters of {source} cannot be read", repr(error)) from None
    if "Sampler" in values:
        settings["sampler"], schedule = split_spelling(values["Sampler"])
        schedule = values.get("Schedule type", schedule)
        if schedule in GRIDS:
            settings["schedule"] = schedule
    return Request(
        prompt=values["Prompt"],
        negative=values["Negative prompt"],
        label=values.get("Class"),
        seeds=(seed,),
        settings=settings,
        model_hash=values.get("Model hash", ""),
    )
