"""What InvokeAI, NovelAI, SwarmUI and Fooocus write into their pictures, all of them JSON.
Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from difftool.errors import InputError
from difftool.sampling.metadata.found import Found, table
from difftool.sampling.requests import Request
from difftool.storage.strict_json import parse_json

INVOKE = {
    "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed",
    "width": "width", "height": "height", "steps": "steps", "cfg_scale": "cfg_scale",
    "cfg_rescale_multiplier": "guidance_rescale", "scheduler": "sampler_name",
    "sampler": "sampler_name", "prompt": "prompt",
}  # fmt: skip
DREAM = {
    "s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler_name",
}  # fmt: skip
NOVELAI = {
    "prompt": "prompt", "uc": "negative_prompt", "seed": "seed", "width": "width",
    "height": "height", "steps": "steps", "scale": "cfg_scale", "cfg_rescale": "guidance_rescale",
    "sampler": "sampler_name", "noise_schedule": "scheduler",
}  # fmt: skip
SWARM = {
    "prompt": "prompt", "negativeprompt": "negative_prompt", "seed": "seed", "width": "width",
    "height": "height", "steps": "steps", "cfgscale": "cfg_scale", "sampler": "sampler_name",
    "scheduler": "scheduler",
}  # fmt: skip
FOOOCUS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps",
    "guidance_scale": "cfg_scale", "sampler": "sampler_name", "scheduler": "scheduler",
    "clip_skip": "clip_skip",
}  # fmt: skip


def object_in(text: str, source: str) -> dict[str, Any]:
    """The object of JSON that a picture says of itself; InputError if it is none."""
    values = parse_json(text, f"what {source} says of itself", infinite=True, lenient=True)
    if not isinstance(values, dict):
        raise InputError(f"what {source} says of itself is malformed", "it is not a JSON object")
    return values


def from_invoke(text: str, source: str) -> Request:
    """The request in InvokeAI's text, of version 3 on or (`sd-metadata`) before."""
    values = object_in(text, source)
    found = Found(source, {"prompt_syntax": "compel"})
    found.made_by = f"InvokeAI {values.get('app_version') or ''}".strip()
    model = values.get("model")
    if isinstance(model, dict):
        found.model = str(model.get("name") or model.get("model_name") or "")
    elif isinstance(values.get("model_weights"), str):  # version 2
        found.model = values.pop("model_weights")
    values = dict(values["image"]) if isinstance(values.get("image"), dict) else values
    if isinstance(values.get("prompt"), list):  # version 2: parts with weights
        parts = [part for part in values["prompt"] if isinstance(part, dict)]
        values["prompt"] = " ".join(str(part.get("prompt", "")) for part in parts)
    for lora in values.pop("loras", None) or ():
        lora = lora if isinstance(lora, dict) else {}
        model = lora.get("model", lora.get("lora"))
        name = model.get("name", model.get("model_name")) if isinstance(model, dict) else model
        found.lora(str(name), float(lora.get("weight", 1)))
    if (skip := values.pop("clip_skip", None)) and isinstance(skip, int):
        found.asked["clip_skip"] = skip + 1  # which counts the layers that are left out
    if values.pop("init_image", None) or "img2img" in str(values.get("generation_mode")):
        found.started_from(values.pop("strength", None))
    if values.pop("vae", None):
        found.miss("its VAE: --vae", "vae")
    device = values.pop("rand_device", "cpu")
    if device == "cuda":
        found.asked["rng"] = "gpu"
    elif device != "cpu":
        found.miss(f"noise of {device}")
    for part in ("positive", "negative"):  # SDXL's second encoder may be told more
        if values.get(f"{part}_style_prompt") == values.get(f"{part}_prompt"):
            values.pop(f"{part}_style_prompt", None)
    table(
        found,
        values,
        INVOKE,
        "app_version generation_mode model type ui canvas_v2_metadata strength",
    )
    return found.request()


def from_dream(text: str, source: str) -> Request:
    """The request in the command that InvokeAI wrote before: "a fox" -s50 -S 7 -W512 -C7.5."""
    prompt, _, rest = text.strip().removeprefix('"').rpartition('"')
    asked = {"prompt": prompt, "prompt_syntax": "compel"}
    found = Found(source, asked, made_by="InvokeAI")
    options = dict(re.findall(r"(?:^|\s)-([A-Za-z])\s*([^\s-]\S*)", rest))
    if options.pop("I", None):
        found.started_from(options.pop("f", None))
    table(found, options, DREAM, "n b f")
    return found.request()


def from_novelai(text: str, source: str, described: str = "", model: str = "") -> Request:
    """The request in NovelAI's `Comment`; the prompt of older ones is the `Description`."""
    values, found = object_in(text, source), Found(source, {"prompt_syntax": "novelai"})
    found.made_by, found.model = "NovelAI", model
    values.setdefault("prompt", described)
    for role in ("v4_prompt", "v4_negative_prompt"):
        for caption in _characters(values.get(role)):
            found.miss(f'{role}, of a character: "{caption[:40]}"')
    sampler = str(values.get("sampler", ""))
    values["sampler"] = "ddim" if sampler.startswith("ddim") else sampler
    if values.get("noise_schedule") == "native":
        values["noise_schedule"] = "normal"
    strength, _ = values.pop("strength", None), values.pop("noise", None)  # always there
    if "Img2Img" in str(values.get("request_type")):
        found.started_from(strength)
    skipped = (
        "request_type signed_hash version n_samples v4_prompt v4_negative_prompt legacy "
        "legacy_v3_extend uncond_scale prefer_brownian hide_debug_overlay params_version"
    )
    table(found, values, NOVELAI, skipped)
    return found.request()


def _characters(prompt: Any) -> list[str]:
    """The captions of characters in a prompt of version 4."""
    captions = prompt.get("caption", {}).get("char_captions") if isinstance(prompt, dict) else None
    captions = captions if isinstance(captions, list) else []
    return [str(each.get("char_caption", "")) for each in captions if isinstance(each, dict)]


def from_swarm(values: Mapping[str, Any], source: str) -> Request:
    """The request in SwarmUI's `sui_image_params`."""
    found, values = Found(source, made_by="SwarmUI"), dict(values)
    found.model = str(values.get("model") or "")
    names, weights = values.pop("loras", None) or [], values.pop("loraweights", None) or []
    for i, name in enumerate(names if isinstance(names, list) else []):
        found.lora(str(name), float(weights[i]) if i < len(weights) else 1.0)
    if values.pop("initimage", None):
        found.started_from(values.pop("initimagecreativity", None))
    table(found, values, SWARM, "model swarm_version date generation_time aspectratio images")
    return found.request()


def from_fooocus(values: Mapping[str, Any], source: str) -> Request:
    """The request in Fooocus' `parameters`, where that is JSON."""
    values = dict(values)
    found = Found(source, made_by=str(values.get("version") or "Fooocus"))
    found.model = str(values.get("base_model") or "")
    sides = re.findall(r"\d+", str(values.pop("resolution", "")))
    if len(sides) == 2:
        found.asked |= {"width": int(sides[0]), "height": int(sides[1])}
    for lora in values.pop("loras", None) or ():
        name, weight, digest, *_ = (*lora, 1.0, "") if isinstance(lora, list) else (lora, 1.0, "")
        found.lora(str(name), float(weight), str(digest))
    table(
        found, values, FOOOCUS, "base_model base_model_hash metadata_scheme version created_by user"
    )
    return found.request()
