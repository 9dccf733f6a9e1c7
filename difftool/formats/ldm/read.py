"""One of LDM's single files as a source. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from difftool.config.families import family
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.errors import CheckError, InputError
from difftool.formats.ldm import detect
from difftool.formats.ldm.names import (
    AVERAGE,
    UNET,
    VAE,
    ema_rules,
    is_averaged,
    model_rules,
    text_places,
    usual_names,
)
from difftool.formats.ldm.prediction_type import yaml_beside
from difftool.formats.ldm.preset_of_file import derive, unknown_family
from difftool.formats.model_source import (
    EXTRA,
    LAYOUT,
    NO_OVERRIDES,
    UNKNOWN,
    Drop,
    ModelSource,
    Overrides,
    Place,
    free_metadata,
)
from difftool.formats.roundtrip import checked_extra, with_extra
from difftool.formats.rules import Rule
from difftool.formats.unclip import NO_VISION, vision_of_file
from difftool.formats.values import counts_up
from difftool.storage.strict_json import parse_json
from difftool.storage.tensor_file import TensorSource
from difftool.storage.tensors import Info, Located, rows_strides

KEPT = f"{EXTRA}ldm."
OURS, ADDED, SETTLED = "difftool.extra", "difftool.markers", "difftool.settled"
"""Metadata: what LDM's layout has no place for; markers that were added; what the user decided."""
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
POSITIONS = "embeddings.position_ids"
KNOWN = re.compile(
    r"[^.]+"  # tables of the noise schedule, markers
    r"|(model_ema|denoiser|edm_\w+|loss|first_stage_model\.loss)\..+"
    r"|(embedder|noise_augmentor|depth_model|low_scale_model|control_model)\..+"
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.(model\.)?"
    r"(logit_scale|text_projection|attn_mask|visual\..+|logit_bias)"
    r"|.+\.embeddings\.position_ids|difftool\.extra\..+"
)
"""Names of tensors that belong to no network of difftool's, and that other tools know."""


def recognises_ldm(place: Place) -> bool:
    """Whether a file has a U-Net, an autoencoder and a text encoder by such names."""
    return _parts(place) == {"unet", "text", "vae"}


def lacks_codec(place: Place) -> bool:
    """Whether it has the same but for an autoencoder."""
    return _parts(place) == {"unet", "text"}


def _parts(place: Place) -> set[str]:
    """Which networks a file holds by such names."""
    if isinstance(place, Path) or "difftool" in place.metadata:
        return set()
    first = {name.split(".")[0] for name in place.tensors}
    kinds = {"text": {"cond_stage_model", "conditioner"}, "vae": {"first_stage_model", "vae"}}
    blocks = tuple(f"{prefix}{way}" for prefix in (UNET, AVERAGE) for way in ("input", "out"))
    unet = any(name.startswith(blocks) for name in place.tensors)
    return {kind for kind, names in kinds.items() if names & first} | ({"unet"} if unet else set())


def open_ldm(header: TensorSource, overrides: Overrides = NO_OVERRIDES) -> ModelSource:
    """A single file as a source; InputError if it is malformed or of no known family."""
    path = header.path
    usual = usual_names(header.tensors)
    places = {usual[name]: place for name, place in header.tensors.items()}
    if len(places) != len(usual):
        raise InputError(f"{path} holds a tensor twice, under an old name and a new one")
    added = header.metadata.get(ADDED, "").split()
    shapes = {
        name: place.info.shape[:: -1 if _is_turned(name, place) else 1]
        for name, place in places.items()
    }
    extra = _read_extra(header.metadata, path)
    meaning = derive(
        str(path),
        shapes,
        header.metadata,
        places.get,
        name=path.stem,
        overrides=settled(header.metadata, overrides),
        params=yaml_beside(path),
    )
    if meaning.refusal is not None and not extra:
        raise meaning.refusal
    values, notes = with_extra(meaning.values, extra, f"metadata {OURS}")
    preset = build_preset(values, f"the preset in {path}", InputError)
    try:
        rules = model_rules(preset)
    except CheckError as error:
        raise InputError(f"{path} is malformed", error.what) from None
    if not any(name.startswith(VAE) for name in places):
        rules = [rule for rule in rules if not rule.theirs.startswith(VAE)]
    tensors, flat = mapped(rules, places, str(path))
    averaged = [*ema_rules(rules)]
    has_ema = averaged[0].theirs in places
    if has_ema:
        more, flatter = mapped(averaged, places, str(path))
        tensors, flat = tensors | more, [*flat, *flatter]
    vision = vision_of_file(shapes) if family(preset.family).vision else NO_VISION
    more, _ = mapped(vision.rules, places, str(path))
    tensors |= more
    dropped = [Drop(place, "no part of the model") for place in header.beside.values()]
    warnings = [*header.warnings, *vision.warnings]
    kept = "ema" if is_averaged(header.tensors) else "live"
    taken = (*rules, *(averaged if has_ema else ()), *vision.rules)
    used = {id(places[rule.theirs]) for rule in taken}
    for name, place in places.items():
        if id(place) in used:
            continue
        if rule := _drop_rule(name, place, preset, overrides, added):
            dropped.append(Drop(place, rule))
            if name.endswith(POSITIONS):
                warnings.append(f"{place.name} is spoilt; positions are counted instead")
        elif KNOWN.fullmatch(name) or _is_spare(name, preset):
            tensors[_kept_name(place.name)] = place
        else:
            tensors[f"{UNKNOWN}{place.name}"] = place
    return ModelSource(
        kind="ldm",
        path=path,
        file=path,
        preset=preset,
        tensors=tensors,
        findings=(*meaning.findings, *notes),
        weights=(*extra.get("weights", (kept,))[:1], *(("ema",) if has_ema else ())),
        tokenizer_json=extra.get("tokenizer"),
        metadata=free_metadata(header.metadata),
        configs=vision.configs
        | extra.get("configs", {})
        | {LAYOUT: _record(usual, flat, header, preset)},
        dropped=tuple(dropped),
        warnings=(*warnings, *meaning.warnings),
    )


def _read_extra(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if OURS not in metadata:
        return {}
    where = f"the metadata of {path}"
    extra = parse_json(metadata[OURS], where, infinite=True)
    if not isinstance(extra, dict) or not isinstance(extra.get("configs", {}), dict):
        raise InputError(f"{where} is malformed")
    return checked_extra(extra, where)


def settled(metadata: Mapping[str, str], overrides: Overrides) -> Overrides:
    """What the user says now, or has said when the file was written."""
    if overrides.decide or SETTLED not in metadata:
        return overrides
    target, _, zero_snr = metadata[SETTLED].partition(" ")
    return overrides._replace(prediction=target, zero_snr=zero_snr == "zero-snr")


def mapped(
    rules: Iterable[Rule], places: Mapping[str, Located], where: str
) -> tuple[dict[str, Located], list[str]]:
    """The tensors here, and names of those there that lie as they do here where others do not."""
    tensors: dict[str, Located] = {}
    flat: list[str] = []
    shapes = {name: place.info.shape for name, place in places.items()}
    for rule in rules:
        place = places.get(rule.theirs)
        given = None if place is None else place.info.shape
        turned = place is not None and _is_turned(rule.theirs, place)
        if (rule.op == "reshape" or turned) and given == rule.shape:
            flat.append(rule.theirs)
            rule = rule._replace(op="copy")
        if place is None or given != rule.their_shape:
            unet = {n.removeprefix(UNET): s for n, s in shapes.items() if n.startswith(UNET)}
            first = next(detect.differences({rule.theirs: given} if given else {},
                                            {rule.theirs: rule.their_shape}))  # fmt: skip
            raise (
                unknown_family(where, unet, first)
                if rule.theirs.startswith(UNET)
                else InputError(f"{where} is not a whole model", first)
            )
        tensors |= zip(rule.ours, parts_of(rule, place), strict=True)
    return tensors, flat


def _is_turned(name: str, place: Located) -> bool:
    """Whether OpenCLIP's text projection lies as in transformers, of which its name is the only
    evidence."""
    return name.endswith(".text_projection") and place.name.endswith(".weight")


def parts_of(rule: Rule, place: Located) -> list[Located]:
    """Where difftool's tensors of a rule lie."""
    dtype, _, start, end, strides = place.info
    if rule.op == "transpose":
        turned = (strides or rows_strides(place.info.shape))[::-1]
        return [place._replace(info=Info(dtype, rule.shape, start, end, turned), op=rule.op)]
    if rule.op != "stack":
        kept = None if strides is None else strides[: len(rule.shape)]
        return [place._replace(info=Info(dtype, rule.shape, start, end, kept), op=rule.op)]
    parts = []
    for i in range(len(rule.ours)):
        if strides is None:
            step = (end - start) // len(rule.ours)
            info = Info(dtype, rule.shape, start + i * step, start + (i + 1) * step)
        else:
            step = i * rule.shape[0] * strides[0] * place.info.size
            step //= max(1, prod(place.info.shape))
            info = Info(dtype, rule.shape, start + step, end, strides)
        parts.append(place._replace(info=info, op=rule.op))
    return parts


def _is_spare(name: str, preset: Preset) -> bool:
    """Whether a tensor is of the layer that SD2 does not use."""
    for config, (prefix, openclip) in zip(
        preset.text, text_places(preset.unet, preset.text), strict=True
    ):
        if openclip and name.startswith(f"{prefix}transformer.resblocks.{config.layers}."):
            return True
    return False


def _drop_rule(
    name: str, place: Located, preset: Preset, overrides: Overrides, added: list[str]
) -> str | None:
    """Why a tensor is left out."""
    if name in added:
        return "a marker that difftool adds"
    if name == "v_pred" and overrides.prediction and preset.target != "v":
        return f"--prediction {overrides.prediction}"
    if name == "ztsnr" and overrides.zero_snr is False:
        return "--no-zero-snr"
    if name.endswith(POSITIONS) and not (place.info.dtype == "I64" and counts_up(place)):
        return "position_ids that are not 0, 1, 2, ..."
    return None


def _kept_name(name: str) -> str:
    """difftool's name of a tensor that no network has."""
    theirs = f"difftool.{EXTRA}"
    return EXTRA + name.removeprefix(theirs) if name.startswith(theirs) else KEPT + name


def _record(
    usual: Mapping[str, str], flat: list[str], header: TensorSource, preset: Preset
) -> dict[str, Any]:
    """In what a file differs from those that difftool writes."""
    spec = {k: v for k, v in header.metadata.items() if k.startswith("modelspec.")}
    form = {k: v for k, v in header.metadata.items() if k in ("format", ADDED, SETTLED)}
    return {
        "names": {
            new: old
            for old, new in usual.items()
            if old != new and not old.startswith(AVERAGE)  # no tool reads these alone
        },
        "flat": flat,
        "metadata": spec | form,
        "target": preset.target,
        "path": to_values(preset)["path"],
    }
