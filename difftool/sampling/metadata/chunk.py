"""The `difftool` chunk: what was asked for, and the whole preset with the settings as they were
resolved. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from difftool.config.numbers import FINITE
from difftool.config.validate import to_values
from difftool.diffusion import GRIDS, PATHS, SAMPLERS, TARGETS
from difftool.errors import DifftoolError, InputError
from difftool.plugins import used
from difftool.sampling.requests import Request, from_json
from difftool.storage.strict_json import parse_json
from difftool.version import __version__

if TYPE_CHECKING:
    from difftool.sampling.sample import Sample

SCHEMA = 1
MAX_BYTES = 1 << 20
ASKED = ("prompt", "negative", "label", "seed")
"""What is asked for of any picture."""
IMAGES = ("init", "mask", "image_prompt")
"""Paths of pictures that one goes by."""


def chunk(sample: Sample) -> dict[str, Any]:
    """Plain values for JSON."""
    model, values = sample.plan.model, sample.values()
    request = {name: values[name] for name in ASKED}
    request |= {n: v for n in (*IMAGES, "refiner") if (v := values[n]) is not None}
    request |= {"embeddings": list(sample.embeddings)} if sample.embeddings else {}
    loras = [[str(applied.lora.path), applied.strength] for applied in model.loras]
    loras = loras or [list(lora) for lora in sample.request.loras]  # of latents that are decoded
    request |= {"loras": loras} if loras else {}
    if plugins := used(_components(sample)):
        request["plugins"] = [[plugin.name, plugin.sha256] for plugin in plugins]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": model.name,
        "model_hash": model.hash,
        "request": request,
        "preset": to_values(model.preset) | {"sample": to_values(sample.plan.settings)},
    }


def _components(sample: Sample) -> list[tuple[str, str]]:
    """The kinds and names of what it is made by, and plugins may have added."""
    preset, settings = sample.plan.model.preset, sample.plan.settings
    return [
        (SAMPLERS.kind, SAMPLERS.resolve(settings.sampler)),
        (GRIDS.kind, GRIDS.resolve(settings.schedule)),
        (PATHS.kind, PATHS.resolve(preset.path["kind"])),
        (TARGETS.kind, TARGETS.resolve(preset.target)),
    ]


def from_chunk(text: str, source: str) -> Request:
    """The request that a chunk holds; InputError if it is not sound."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} characters")
        values = parse_json(text, "it", infinite=True)
        request, settings = values["request"], values["preset"]["sample"]
        asked = {name: request[name] for name in ASKED}
        asked |= {name: request.get(name) for name in IMAGES}
        asked["image_prompt"] = asked["image_prompt"] or request.get("image")  # as it was called
        words = request.get("embeddings", [])
        if not isinstance(words, list) or not all(isinstance(path, str) for path in words):
            raise ValueError("embeddings of the wrong type")
        loras = tuple((str(path), float(weight)) for path, weight in request.get("loras", []))
        for path, weight in loras:
            FINITE.check(weight, f"{path}: the weight")
        plugins = tuple((str(name), str(digest)) for name, digest in request.get("plugins", []))
        if not isinstance(asked["label"], str | None) or not isinstance(settings, dict):
            raise ValueError("label or settings of the wrong type")
        found = from_json(asked)
    except (KeyError, TypeError, ValueError, DifftoolError) as error:
        raise InputError(f"the difftool chunk of {source} cannot be read", repr(error)) from None
    made_by = str(values.get("model_hash") or "")
    return replace(
        found, settings=settings, model_hash=made_by, embeddings=tuple(words), loras=loras,
        plugins=plugins,
    )  # fmt: skip
