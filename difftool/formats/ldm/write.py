"""Any model as one of LDM's single files. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from difftool.config.families import family
from difftool.config.schema import Preset
from difftool.diffusion.path import build_path
from difftool.errors import CheckError, DifftoolError, InputError
from difftool.formats.ldm.names import (
    ema_rules,
    model_rules,
)
from difftool.formats.ldm.preset_of_file import FileMeaning, derive
from difftool.formats.ldm.read import ADDED, IMPLEMENTATION, KEPT, OURS, SETTLED, settled
from difftool.formats.model_source import (
    EXTRA,
    LAYOUT,
    NO_OVERRIDES,
    ModelSource,
    Plan,
)
from difftool.formats.native import modelspec
from difftool.formats.roundtrip import make_extra, same_path
from difftool.formats.rules import Rule
from difftool.formats.unclip import vision_of_file, vision_rules_of
from difftool.storage.tensors import Info, Located


def plan_ldm(source: ModelSource, keep_metadata: bool) -> Plan:
    """Any model as a single file; CheckError if LDM's layout cannot hold it."""
    preset = source.preset
    record = _checked_record(source.configs.get(LAYOUT))
    same = all(record.get(key) == source.values[key] for key in ("target", "path"))
    rules = model_rules(preset)
    if "ema" in source.weights[1:]:
        rules += ema_rules(rules)
    kept, dropped = _kept_rules(source, preset, same)
    names, flat = record.get("names", {}), set(record.get("flat", ()))
    written = [
        rule._replace(
            theirs=names.get(rule.theirs, rule.theirs),
            op="copy" if rule.theirs in flat else rule.op,
        )
        for rule in rules
    ]
    there = {rule.theirs for rule in kept}
    added = record["metadata"].get(ADDED, "").split() if same else _markers(source)
    markers = [Rule(name, (), (0,)) for name in added if name not in there]
    metadata = _metadata(source, record if same and keep_metadata else {}, keep_metadata)
    if markers:
        metadata[ADDED] = " ".join(marker.theirs for marker in markers)
    warnings = [*_complete(source, metadata, rules, kept, markers, keep_metadata)]
    if any(rule.theirs.endswith(".resblocks.22.ln_1.weight") for rule in rules) and not any(
        ".resblocks.23." in rule.theirs for rule in (*rules, *kept)
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
    rules, dropped = vision_rules_of(shapes, source.configs), {}
    placed_already = {name for rule in rules for name in rule.ours}
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
    if family(source.preset.family).v_markers:
        if source.preset.target == "v":
            yield "v_pred"
        if source.preset.path.get("zero_snr"):
            yield "ztsnr"


def _metadata(
    source: ModelSource, record: Mapping[str, Any], keep_metadata: bool
) -> dict[str, str]:
    """The header's metadata: as the file that the model is from had it, else modelspec's."""
    free = source.metadata if keep_metadata else {}
    if record:
        notes = {k: v for k, v in free.items() if not k.startswith("modelspec.")}
        return notes | record["metadata"]
    spec = modelspec(source.preset, IMPLEMENTATION)
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
    shapes = {rule.theirs: rule.their_shape for rule in (*rules, *kept, *markers)}
    by_name = {rule.theirs: rule.ours for rule in (*rules, *kept, *markers)}

    def find(name: str) -> Located | None:
        here = by_name.get(name)
        if here is None:
            return None
        return source.tensors[here[0]] if here else Located(Path(), name, Info("F32", (0,), 0, 0))

    def derived() -> FileMeaning:
        overrides, name = settled(metadata, NO_OVERRIDES), source.preset.name
        return derive("it", shapes, metadata, find, name=name, overrides=overrides)

    zero, target = bool(source.preset.path.get("zero_snr")), source.preset.target
    try:
        meaning = derived()
        found = meaning.values
    except InputError:
        meaning, found = None, {}
    decided = (found.get("target"), bool(found.get("path", {}).get("zero_snr")))
    if decided != (target, zero):
        spec = modelspec(source.preset, IMPLEMENTATION)
        keys = ("modelspec.prediction_type", "modelspec.architecture")
        metadata |= {key: spec[key] for key in keys if key in spec and key in metadata}
        metadata[SETTLED] = f"{target}{' zero-snr' * zero}"
        try:
            meaning = derived()
        except DifftoolError as error:
            what = "LDM's single files cannot hold this model"
            raise CheckError(what, error.why or error.what) from None
    assert meaning is not None
    found = meaning.values
    extra = make_extra(source, found, keep_metadata=False)
    same = not extra["sections"] and all(found[k] == v for k, v in extra["plain"].items())
    same = same and meaning.refusal is None
    usual = vision_of_file(shapes).configs if family(source.preset.family).vision else {}
    configs = {k: v for k, v in source.configs.items() if k != LAYOUT and v != usual.get(k)}
    configs = configs if keep_metadata else {}
    if same and not configs and source.tokenizer_json is None and source.weights[0] == "live":
        return
    metadata[OURS] = json.dumps(extra | {"configs": configs}, ensure_ascii=False)
    for section, other in (
        ("target", found["target"] != target),
        ("path", not same_path(build_path(found["path"]), build_path(source.preset.path))),
    ):
        if other:
            word = found[section] if section == "target" else found[section]["kind"]
            yield f"other tools take it for {section} {word}: a single file has no other word"
