"""What the tensors and metadata of a single file mean: a preset. Torch-free.

Structure comes from the tensors, target and zero SNR from collected evidence, and the way of
sampling from the family's published preset, for no tensor says how it wants to be sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from difftool.config import families
from difftool.config.families import PUBLISHED, Family, Verdict
from difftool.config.kinds import NetworkConfig
from difftool.config.layers import load_preset
from difftool.config.networks import TextConfig, VaeConfig
from difftool.config.validate import to_values
from difftool.errors import InputError
from difftool.formats.layouts import NETWORKS, network_rules
from difftool.formats.ldm import detect
from difftool.formats.ldm.names import UNET, VAE
from difftool.formats.ldm.prediction_type import Find, decide, network_of
from difftool.formats.model_source import NO_OVERRIDES, Evidence, Overrides
from difftool.formats.rules import Shape
from difftool.formats.values import numbers


@dataclass(frozen=True, kw_only=True)
class FileMeaning:
    """A preset derived from a file's tensors and metadata."""

    values: dict[str, Any]
    """The preset's, complete but not checked."""
    findings: tuple[Evidence, ...]
    warnings: tuple[str, ...]
    refusal: InputError | None = None
    """Why that is doubtful: for files that do not themselves say how they are meant."""


def derive(
    where: str,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    find: Find,
    *,
    name: str,
    overrides: Overrides = NO_OVERRIDES,
    params: Mapping[str, Any] | None = None,
) -> FileMeaning:
    """The preset that tensors under their usual names mean; InputError if difftool has no such.

    params: of the configuration file beside it.
    """
    params = params or {}
    made = _networks(where, shapes, overrides, network_of(params))
    unet, text, family = made.unet, made.text, made.family
    noise = decide(where, family, metadata, params, find, overrides)
    base = load_preset(_base(family, unet, noise.target, metadata))
    codec = _codec(made.codec, family, params, find)
    path = noise.path if "kind" in noise.path else base.path | noise.path
    if family.path:
        path = {**family.path, **noise.path}
    sample, scheduler = to_values(base.sample), dict(base.scheduler)
    if noise.path.get("zero_snr"):  # other spacings never visit the last time
        sample |= {"schedule": "trailing", "schedule_options": {}, "guidance_rescale": 0.7}
        scheduler["timestep_spacing"] = "trailing"
    elif path["kind"] == "edm":
        sample |= {"schedule": "karras", "schedule_options": {}, "start_noise": "hypot"}
        scheduler = {}  # which are of discrete paths
    if size := _size(metadata.get("modelspec.resolution", ""), codec):
        sample["size"] = list(size)
    pooled = sum(t.projection or 0 for t in text if t.pooled)
    numbered, rest = divmod((unet.vector_dim or 0) - pooled, 256)
    if not any(t.pooled for t in text):
        numbered = rest = 0
    if rest or not 0 <= numbered <= 6:
        takes = f"takes {unet.vector_dim}" if unet.vector_dim else "is missing"
        why = f"label_emb {takes}: SDXL's is of {pooled} and some sizes of 256"
        raise InputError(f"{where} does not fit together", why)
    layer = metadata.get("modelspec.encoder_layer", "")
    if family.encoders == ("clip",) and layer.isdecimal():
        hidden = -min(max(1, int(layer)), text[0].layers)
        text = (replace(text[0], hidden=hidden), *text[1:])
    values = to_values(base) | {
        "name": metadata.get("modelspec.title") or name,
        "about": f"a model of family {family.id}",
        "family": family.id,
        "codec": to_values(codec),
        "unet": to_values(unet),
        "text": [to_values(encoder) for encoder in text],
        "size_numbers": numbered,
        "path": path,
        "target": noise.target,
        "scheduler": scheduler,
        "sample": sample,
    }
    says = f"family {family.id}, {len(shapes)} tensors"
    return FileMeaning(
        values=values,
        findings=(Evidence("tensor names and shapes", says), *noise.findings),
        warnings=(*noise.warnings, *made.warnings),
        refusal=made.refusal,
    )


class _Networks(NamedTuple):
    unet: NetworkConfig
    codec: VaeConfig
    text: tuple[TextConfig, ...]
    family: Family
    warnings: list[str]
    refusal: InputError | None


def _networks(
    where: str, shapes: Mapping[str, Shape], overrides: Overrides, told: Mapping[str, Any]
) -> _Networks:
    """The networks that the tensors make, and of which family they are.

    told: what a configuration file beside it says of the U-Net.
    """

    def part(prefix: str) -> dict[str, Shape]:
        return {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}

    try:
        text, tensors, autoencoder = _text(shapes), part(UNET), part(VAE)
        layout = next((n for n in NETWORKS.values() if n.mark in tensors), NETWORKS["unet"])
        unet = layout.detect(tensors, any(t.pooled for t in text))
        codec: Any = overrides.codec
        if autoencoder or codec is None:
            codec = detect.vae_config(autoencoder)
        verdict = families.judge(unet, codec, text)
        family = families.family(verdict.id)
        unet, guesses = layout.settle(unet, family, told)
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise unknown_family(where, part(UNET), str(error)) from None
    _check_text(where, shapes)
    refusal = _refusal(where, verdict, tensors, unet, told)
    heads = {"num_heads", "num_head_channels"} & told.keys()
    warnings = [*guesses, *(verdict.conflicts if heads else ())]
    if verdict.odd and not heads:
        as_many = f"that {where} attends by as many heads as {verdict.id} is a guess"
        warnings.append(f"{as_many}: {'; '.join(verdict.odd)}, unlike that")
    return _Networks(unet, codec, text, family, warnings, refusal)


def _text(shapes: Mapping[str, Shape]) -> tuple[TextConfig, ...]:
    """The text encoders, in their order."""
    found = []
    for stage in ("cond_stage_model", *(f"conditioner.embedders.{i}" for i in range(3))):
        for kind in ("transformer", "model"):
            prefix, openclip = f"{stage}.{kind}.", kind == "model"
            part = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
            if not any(name.endswith("token_embedding.weight") for name in part):
                continue
            xl = stage != "cond_stage_model"
            spare = int(openclip and not xl and _has_spare_layer(part))
            config = detect.text_config(part, openclip, spare)
            if xl:
                pooled = openclip and config.projection is not None
                config = replace(config, hidden=-2, final_norm=False, pooled=pooled)
            elif openclip:
                config = replace(config, projection=None)
            found.append(config)
    return tuple(found)


def _check_text(where: str, shapes: Mapping[str, Shape]) -> None:
    """InputError for SDXL's text encoders where they are not whole: without the second one, or its
    projection, nothing tells what they are of."""
    stage = "conditioner.embedders."
    names = [name for name in shapes if name.startswith(stage)]
    last = 0 if any(name.startswith(f"{stage}0.model.") for name in names) else 1
    needed = f"{stage}{last}.model.text_projection"
    if names and needed not in shapes:
        raise InputError(f"{where} is not a whole model", f"{needed} is missing")


def _refusal(
    where: str,
    verdict: Verdict,
    tensors: Mapping[str, Shape],
    unet: NetworkConfig,
    told: Mapping[str, Any],
) -> InputError | None:
    """Why it is doubtful which model a file holds; None where it is not."""
    if verdict.id == families.OWN:
        return unknown_family(where, tensors, "no family has networks like these together")
    what = f"{where} contradicts itself about its family"
    for name, ours in (("context_dim", "context_dim"), ("in_channels", "in_channels"),
                       ("adm_in_channels", "vector_dim")):  # fmt: skip
        wanted, there = told.get(name), getattr(unet, ours, None)
        if isinstance(wanted, int) and wanted != there:
            hint = "the .yaml is another model's: remove it"
            return InputError(what, f"{name} is {there}, and {wanted} in the .yaml beside it", hint)
    if verdict.conflicts and not {"num_heads", "num_head_channels"} & told.keys():
        why = f"it is most like {verdict.id}, but {'; '.join((*verdict.conflicts, *verdict.odd))}"
        hint = "a .yaml of the same name beside it, with num_heads or num_head_channels, settles it"
        return InputError(what, why, hint)
    return None


def _has_spare_layer(shapes: Mapping[str, Shape]) -> bool:
    """Whether a text encoder's last layer is there but not used, as in SD2's complete files."""
    whole = {"text_projection", "logit_scale"} & shapes.keys()
    return bool(whole) or "transformer.resblocks.23.ln_1.weight" in shapes


def _base(family: Family, unet: NetworkConfig, target: str, metadata: Mapping[str, str]) -> str:
    """The preset whose way of sampling a model has."""
    turbo = "turbo" in metadata.get("modelspec.architecture", "")
    traits = {"turbo": turbo, "guidance": bool(unet.guidance_dim), "v": target == "v"}
    return family.preset_for(*(trait for trait, has in traits.items() if has))


def _codec(codec: VaeConfig, family: Family, params: Mapping[str, Any], find: Find) -> VaeConfig:
    """The autoencoder with the scale that its family's latents have."""
    scale = family.scale
    if isinstance(params.get("scale_factor"), float):
        scale = params["scale_factor"]
    mean, std = find("edm_mean"), find("edm_std")
    moments: dict[str, Any] = {}
    if mean and std:  # Playground 2.5
        moments = {"latents_mean": tuple(numbers(mean)), "latents_std": tuple(numbers(std))}
        scale = 0.5
    return replace(codec, scale=scale, force_upcast=family.force_upcast, **moments)


def _size(text: str, codec: VaeConfig) -> tuple[int, int] | None:
    """Width and height of modelspec.resolution."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    return sides if all(side and side % codec.factor == 0 for side in sides) else None


def unknown_family(where: str, unet: Mapping[str, Shape], why: str) -> InputError:
    """The refusal of what is no model of a known structure."""
    family, first = nearest(unet)
    why = f"nearest family: {family}, but " + "; ".join(first) if first else why
    return InputError(f"{where} is not of a family known to this version", why)


@cache
def _published(family: str) -> dict[str, Shape]:
    config = load_preset(PUBLISHED[family].preset).unet
    return {rule.theirs: rule.their_shape for rule in network_rules(config)}


def nearest(shapes: Mapping[str, Shape]) -> tuple[str, list[str]]:
    """The family whose network has most in common with some tensors, and the first differences."""

    def common(family: str) -> int:
        return sum(shapes.get(there) == shape for there, shape in _published(family).items())

    best = max(PUBLISHED, key=common)
    return best, [*detect.differences(shapes, _published(best))][:3]
