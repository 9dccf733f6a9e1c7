"""LDM's single files (CompVis, Stability, A1111, kohya, ComfyUI) <-> difftool's models. Torch-free.

What no network of difftool's has (noise tables, counters, logit_scale, SD2's unused last layer,
image encoders) is kept under extra.ldm. and comes back. In what a file differs from those that are
written here, in names, shapes and metadata, is remembered too: every way there and back is exact.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from difftool.config.networks import TextConfig, UNetConfig, VaeConfig
from difftool.config.schema import Preset, build_preset, to_values
from difftool.errors import CheckError, DifftoolError, InputError
from difftool.formats import detect
from difftool.formats.model_source import (
    EMA,
    EXTRA,
    FORMATS,
    LAYOUT,
    NOTHING_TOLD,
    UNKNOWN,
    Drop,
    Format,
    ModelSource,
    Plan,
    Told,
    checked_values,
    free_metadata,
)
from difftool.formats.names import (
    Rule,
    Shape,
    clip_rules,
    openclip_rules,
    placed,
    unet_rules,
    vae_rules,
)
from difftool.formats.native import modelspec
from difftool.formats.prediction_type import yaml_beside
from difftool.formats.preset_of_file import UNET, VAE, derive, unknown_family
from difftool.formats.roundtrip import checked_extra, make_extra, with_extra
from difftool.formats.unclip import NOTHING, rules_back, seen_in
from difftool.storage.strict_json import parse_json
from difftool.storage.tensor_file import TensorSource, is_source, open_source
from difftool.storage.tensors import Info, Located, piece_of_file, rows_strides

AVERAGED = "model_ema."
KEPT = f"{EXTRA}ldm."
OURS, ADDED, SETTLED = "difftool.extra", "difftool.markers", "difftool.settled"
"""Metadata: what LDM's layout has no place for; markers that were added; what the user decided."""
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
POSITIONS = "embeddings.position_ids"
OLD_TEXT = re.compile(
    r"((?:cond_stage_model|conditioner\.embedders\.\d)\.transformer\.)"
    r"(?:embeddings|encoder|final_layer_norm)\."
)
"""Names of text encoders from before, and after, transformers put text_model. there."""
KNOWN = re.compile(
    r"[^.]+"  # tables of the noise schedule, markers
    r"|(model_ema|denoiser|edm_\w+|loss|first_stage_model\.loss)\..+"
    r"|(embedder|noise_augmentor|depth_model|low_scale_model|control_model)\..+"
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\.(model\.)?"
    r"(logit_scale|text_projection|attn_mask|visual\..+|logit_bias)"
    r"|.+\.embeddings\.position_ids|difftool\.extra\..+"
)
"""Names of tensors that belong to no network of difftool's, and that other tools know."""


# --- names -----------------------------------------------------------------------------------


def usual_names(names: Iterable[str]) -> dict[str, str]:
    """The names that difftool writes, by those that other tools have written."""
    names = list(names)
    bare_vae = not any(name.startswith(VAE) for name in names)
    vector = f"{UNET}label_emb.0.0.weight" in names
    found = {}
    for name in names:
        usual = name
        if bare_vae and usual.startswith("vae."):
            usual = VAE + usual.removeprefix("vae.")
        for side in ("encoder.quant_conv", "decoder.post_quant_conv"):
            if usual.startswith(f"{VAE}{side}."):
                usual = VAE + usual.removeprefix(VAE).partition(".")[2]
        if not vector and usual.startswith("conditioner.embedders.0."):
            usual = "cond_stage_model." + usual.removeprefix("conditioner.embedders.0.")
        if found_old := OLD_TEXT.match(usual):
            usual = f"{found_old[1]}text_model.{usual.removeprefix(found_old[1])}"
        usual = usual.replace("text_projection.weight.weight", "text_projection.weight")
        if usual.endswith(".model.text_projection.weight"):
            usual = usual.removesuffix(".weight")
        found[name] = usual
    return found


def ema_name(name: str) -> str:
    """The averaged tensor's name in LDM's files, which has no dots left."""
    return AVERAGED + name.removeprefix("model.").replace(".", "")


def text_places(unet: UNetConfig, text: tuple[TextConfig, ...]) -> list[tuple[str, bool]]:
    """The prefix of each text encoder, and whether its names are OpenCLIP's."""
    xl = bool(unet.vector_dim) and unet.vector_name == "add_embedding"
    if len(text) == 1 and not xl:
        openclip = text[0].activation == "gelu"
        return [(f"cond_stage_model.{'model' if openclip else 'transformer'}.", openclip)]
    return [
        (f"conditioner.embedders.{i}.{'model' if t.pooled else 'transformer'}.", t.pooled)
        for i, t in enumerate(text)
    ]


def model_rules(preset: Preset) -> list[Rule]:
    """The table of a whole model; CheckError if LDM's layout cannot hold it."""
    what = "LDM's single files cannot hold this model"
    if not isinstance(preset.codec, VaeConfig):
        raise CheckError(what, f"its codec is {preset.codec.kind}", "use --to diffusers")
    if preset.codec.patch > 1:
        raise CheckError(what, "its autoencoder folds pixels into channels")
    rules = [*placed(unet_rules(preset.unet), UNET, "unet.")]
    rules += placed(vae_rules(preset.codec), VAE, "vae.")
    for i, (prefix, openclip) in enumerate(text_places(preset.unet, preset.text)):
        table = openclip_rules if openclip else clip_rules
        rules += placed(table(preset.text[i]), prefix, f"text.{i}.")
    return rules


def ema_rules(rules: Iterable[Rule]) -> Iterator[Rule]:
    """The table of the U-Net's averaged weights."""
    for rule in rules:
        if rule.there.startswith(UNET):
            names = tuple(f"{EMA}{name}" for name in rule.here)
            yield rule._replace(there=ema_name(rule.there), here=names)


# --- reading ---------------------------------------------------------------------------------


def _recognises(path: Path) -> bool:
    if not path.is_file() or not is_source(path):
        return False
    source = open_source(path)
    if "difftool" in source.metadata:
        return False
    there = {name.split(".")[0] for name in source.tensors}
    text = {"cond_stage_model", "conditioner"} & there
    vae = {"first_stage_model", "vae"} & there
    unet = any(name.startswith((f"{UNET}input", f"{UNET}out")) for name in source.tensors)
    return bool(text and vae) and unet


def open_ldm(path: Path, told: Told = NOTHING_TOLD) -> ModelSource:
    """A single file as a source; InputError if it is malformed or of no known family."""
    header = open_source(path)
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
        told=_settled(header.metadata, told),
        params=yaml_beside(path),
    )
    values, notes = with_extra(to_values(meaning.preset), extra, f"metadata {OURS}")
    preset = build_preset(checked_values(values, str(path)))
    try:
        rules = model_rules(preset)
    except CheckError as error:
        raise InputError(f"{path} is malformed", error.what) from None
    tensors, flat = mapped(rules, places, str(path))
    averaged = [*ema_rules(rules)]
    has_ema = averaged[0].there in places
    if has_ema:
        more, flatter = mapped(averaged, places, str(path))
        tensors, flat = tensors | more, [*flat, *flatter]
    seen = seen_in(shapes) if values["family"] == "sd2-unclip" else NOTHING
    more, _ = mapped(seen.rules, places, str(path))
    tensors |= more
    dropped = [Drop(place, "no part of the model") for place in header.beside.values()]
    warnings = [*header.warnings, *seen.warnings]
    taken = (*rules, *(averaged if has_ema else ()), *seen.rules)
    used = {id(places[rule.there]) for rule in taken}
    for name, place in places.items():
        if id(place) in used:
            continue
        if rule := _drop_rule(name, place, preset, told, added):
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
        values=to_values(preset),
        tensors=tensors,
        findings=(*meaning.findings, *notes),
        weights=(*extra.get("weights", ("live",))[:1], *(("ema",) if has_ema else ())),
        tokenizer_json=extra.get("tokenizer"),
        metadata=free_metadata(header.metadata),
        configs=seen.configs
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


def _settled(metadata: Mapping[str, str], told: Told) -> Told:
    """What the user says now, or has said when the file was written."""
    if told != NOTHING_TOLD or SETTLED not in metadata:
        return told
    target, _, zero_snr = metadata[SETTLED].partition(" ")
    return Told(target, zero_snr == "zero-snr")


def mapped(
    rules: Iterable[Rule], places: Mapping[str, Located], where: str
) -> tuple[dict[str, Located], list[str]]:
    """The tensors here, and names of those there that lie as they do here where others do not."""
    tensors: dict[str, Located] = {}
    flat: list[str] = []
    shapes = {name: place.info.shape for name, place in places.items()}
    for rule in rules:
        place = places.get(rule.there)
        given = None if place is None else place.info.shape
        turned = place is not None and _is_turned(rule.there, place)
        if (rule.op == "reshape" or turned) and given == rule.shape:
            flat.append(rule.there)
            rule = rule._replace(op="copy")
        if place is None or given != rule.shape_there:
            unet = {n.removeprefix(UNET): s for n, s in shapes.items() if n.startswith(UNET)}
            first = next(detect.differences({rule.there: given} if given else {},
                                            {rule.there: rule.shape_there}))  # fmt: skip
            raise (
                unknown_family(where, unet, first)
                if rule.there.startswith(UNET)
                else InputError(f"{where} is not a whole model", first)
            )
        tensors |= zip(rule.here, parts_of(rule, place), strict=True)
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
    for i in range(len(rule.here)):
        if strides is None:
            step = (end - start) // len(rule.here)
            info = Info(dtype, rule.shape, start + i * step, start + (i + 1) * step)
        else:
            step = i * rule.shape[0] * strides[0] * place.info.size
            step //= max(1, _count(place.info.shape))
            info = Info(dtype, rule.shape, start + step, end, strides)
        parts.append(place._replace(info=info, op=rule.op))
    return parts


def _count(shape: Shape) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _is_spare(name: str, preset: Preset) -> bool:
    """Whether a tensor is of the layer that SD2 does not use."""
    for config, (prefix, openclip) in zip(
        preset.text, text_places(preset.unet, preset.text), strict=True
    ):
        if openclip and name.startswith(f"{prefix}transformer.resblocks.{config.layers}."):
            return True
    return False


def _drop_rule(
    name: str, place: Located, preset: Preset, told: Told, added: list[str]
) -> str | None:
    """Why a tensor is left out."""
    if name in added:
        return "a marker that difftool adds"
    if name == "v_pred" and told.prediction and preset.target != "v":
        return f"--prediction {told.prediction}"
    if name == "ztsnr" and told.zero_snr is False:
        return "--no-zero-snr"
    if name.endswith(POSITIONS) and not _counts(place):
        return "position_ids that are not 0, 1, 2, ..."
    return None


def _counts(place: Located) -> bool:
    """Whether positions are whole numbers that count up; merges have spoilt some."""
    count = place.info.shape[-1] if place.info.shape else 0
    data = b"".join(piece_of_file(place.file, place.info).chunks())
    return place.info.dtype == "I64" and data == struct.pack(f"<{count}q", *range(count))


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
        "names": {new: old for old, new in usual.items() if old != new},
        "flat": flat,
        "metadata": spec | form,
        "target": preset.target,
        "path": to_values(preset)["path"],
    }


# --- writing ---------------------------------------------------------------------------------


def plan_ldm(source: ModelSource, keep_metadata: bool) -> Plan:
    """Any model as a single file; CheckError if LDM's layout cannot hold it."""
    preset = build_preset(source.values, str(source.path))
    source = replace(source, values=to_values(preset))
    record = _checked_record(source.configs.get(LAYOUT))
    same = all(record.get(key) == source.values[key] for key in ("target", "path"))
    rules = model_rules(preset)
    if "ema" in source.weights[1:]:
        rules += ema_rules(rules)
    kept, dropped = _kept_rules(source, preset, same)
    names, flat = record.get("names", {}), set(record.get("flat", ()))
    written = [
        rule._replace(
            there=names.get(rule.there, rule.there), op="copy" if rule.there in flat else rule.op
        )
        for rule in rules
    ]
    there = {rule.there for rule in kept}
    added = record["metadata"].get(ADDED, "").split() if same else _markers(source)
    markers = [Rule(name, (), (0,)) for name in added if name not in there]
    metadata = _metadata(source, record if same and keep_metadata else {}, keep_metadata)
    if markers:
        metadata[ADDED] = " ".join(marker.there for marker in markers)
    warnings = [*_complete(source, metadata, rules, kept, markers, keep_metadata)]
    if any(rule.there.endswith(".resblocks.22.ln_1.weight") for rule in rules) and not any(
        ".resblocks.23." in rule.there for rule in (*rules, *kept)
    ):
        warnings.append("the text encoder has its 23 layers; strict loaders want an unused 24th")
    if preset.unet.guidance_dim:
        warnings.append("no other tool reads LCM's guidance layer in a single file")
    return Plan(
        files={"": [*written, *kept, *markers]},
        metadata=metadata,
        dropped=dropped,
        warnings=tuple(warnings),
    )


def _checked_record(record: Any) -> dict[str, Any]:
    """What `_record` has noted; empty if it is not that."""
    match record:
        case {
            "names": dict(names), "flat": list(flat), "metadata": dict(metadata),
            "target": str(), "path": dict(),
        }:  # fmt: skip
            if all(isinstance(text, str) for text in (*names.values(), *flat, *metadata.values())):
                return record
    return {}


def _kept_rules(
    source: ModelSource, preset: Preset, same: bool
) -> tuple[list[Rule], dict[str, str]]:
    """Places of the tensors beside the model, and those that would now say something wrong."""
    shapes = {name: place.info.shape for name, place in source.tensors.items()}
    rules, dropped = rules_back(shapes, source.configs), {}
    placed_already = {name for rule in rules for name in rule.here}
    wrong = set()
    if not same:
        wrong = {"v_pred"} if preset.target != "v" else set()
        wrong |= set() if preset.path.get("zero_snr") else {"ztsnr"}
    for name, place in source.tensors.items():
        if name in placed_already:
            continue
        if name.removeprefix(KEPT) in wrong:
            dropped[name] = "the model predicts otherwise now"
        elif name.startswith(KEPT):
            rules.append(Rule(name.removeprefix(KEPT), (name,), place.info.shape))
        elif name.startswith(EXTRA):
            rules.append(Rule(f"difftool.{name}", (name,), place.info.shape))
    return rules, dropped


def _markers(source: ModelSource) -> Iterator[str]:
    """Names of the empty tensors by which other tools know SDXL's v-models."""
    if source.values["family"] in ("sdxl", "sdxl-inpaint", "ssd-1b"):
        if source.values["target"] == "v":
            yield "v_pred"
        if source.values["path"].get("zero_snr"):
            yield "ztsnr"


def _metadata(
    source: ModelSource, record: Mapping[str, Any], keep_metadata: bool
) -> dict[str, str]:
    """The header's metadata: as the file that the model is from had it, else modelspec's."""
    free = source.metadata if keep_metadata else {}
    if record:
        notes = {k: v for k, v in free.items() if not k.startswith("modelspec.")}
        return notes | record["metadata"]
    spec = modelspec(source.values, IMPLEMENTATION)
    title = {k: v for k, v in free.items() if k == "modelspec.title"}
    return {"format": "pt"} | free | spec | title


def _complete(
    source: ModelSource,
    metadata: dict[str, str],
    rules: list[Rule],
    kept: list[Rule],
    markers: list[Rule],
    keep_metadata: bool,
) -> Iterator[str]:
    """Add to the metadata what reading the file would not give back; say what others will miss."""
    shapes = {rule.there: rule.shape_there for rule in (*rules, *kept, *markers)}
    by_name = {rule.there: rule.here for rule in (*rules, *kept, *markers)}

    def find(name: str) -> Located | None:
        here = by_name.get(name)
        if here is None:
            return None
        return source.tensors[here[0]] if here else Located(Path(), name, Info("F32", (0,), 0, 0))

    def derived() -> dict[str, Any]:
        told = _settled(metadata, NOTHING_TOLD)
        name = source.values["name"]
        return to_values(derive("it", shapes, metadata, find, name=name, told=told).preset)

    zero = bool(source.values["path"].get("zero_snr"))
    target = source.values["target"]
    try:
        found = derived()
    except InputError:
        found = {}
    decided = (found.get("target"), bool(found.get("path", {}).get("zero_snr")))
    if decided != (target, zero):
        spec = modelspec(source.values, IMPLEMENTATION)
        keys = ("modelspec.prediction_type", "modelspec.architecture")
        metadata |= {key: spec[key] for key in keys if key in spec and key in metadata}
        metadata[SETTLED] = f"{target}{' zero-snr' * zero}"
        try:
            found = derived()
        except DifftoolError as error:
            what = "LDM's single files cannot hold this model"
            raise CheckError(what, error.why or error.what) from None
    extra = make_extra(source, found, keep_metadata=False)
    same = not extra["sections"] and all(found[k] == v for k, v in extra["plain"].items())
    told = seen_in(shapes).configs if source.values["family"] == "sd2-unclip" else {}
    configs = {k: v for k, v in source.configs.items() if k != LAYOUT and v != told.get(k)}
    configs = configs if keep_metadata else {}
    if same and not configs and source.tokenizer_json is None and source.weights[0] == "live":
        return
    metadata[OURS] = json.dumps(extra | {"configs": configs}, ensure_ascii=False)
    if found["target"] != target or found["path"]["kind"] != source.values["path"]["kind"]:
        yield f"other tools take it for target {found['target']}: a single file has no other word"


FORMATS.add("ldm", Format(recognises=_recognises, open=open_ldm, plan=plan_ldm))
