"""A folder of diffusers as a source. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difftool.config.networks import TextConfig
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.errors import CheckError, InputError
from difftool.formats.diffusers.components import (
    CLASSES,
    ENCODERS,
    EXTRA_JSON,
    EXTRA_TENSORS,
    FOREIGN,
    INDEX,
    LEFT_OUT,
    PLAIN_FILES,
    TOKENIZERS,
    WEIGHTS,
    component_tensors,
    our_name,
    stem_of,
)
from difftool.formats.diffusers.configs import (
    SCHEDULER,
    Configs,
    check_pipeline,
    derive_preset,
    encoder_names,
    with_foreign,
    write_configs,
)
from difftool.formats.diffusers.pipelines import PIPELINES
from difftool.formats.diffusers.tokenizers import pad_id, tokenizer_config
from difftool.formats.model_source import (
    EMA,
    EXTRA,
    LAYOUT,
    NO_OVERRIDES,
    Drop,
    ModelSource,
    Overrides,
    Place,
)
from difftool.formats.roundtrip import checked_extra, with_extra
from difftool.formats.values import counts_up
from difftool.storage.strict_json import read_json
from difftool.storage.tensor_file import open_source
from difftool.storage.tensors import Located


def recognises_diffusers(place: Place) -> bool:
    """Whether it is a folder with an index of components."""
    return isinstance(place, Path) and (place / INDEX).is_file()


def open_diffusers(folder: Path, overrides: Overrides = NO_OVERRIDES) -> ModelSource:
    """A folder of diffusers as a source; InputError if it is malformed or not supported."""
    index = read_json(folder / INDEX)
    components = _components(index, folder)
    if PIPELINES[index["_class_name"]].text and "vae" not in components and not overrides.codec:
        hint = "--vae FILE gives it one to sample with"
        raise InputError(f"{folder} has no autoencoder", f"{INDEX} names none", hint)
    warnings = [
        f"{path.name} in {folder} is code, which difftool never runs"
        for path in sorted(folder.glob("**/*.py"))
    ]
    scheduler = read_json(folder / SCHEDULER, infinite=True)  # diffusers writes -Infinity
    configs: dict[str, Any] = {INDEX: index, SCHEDULER: scheduler}
    tensors, dropped, odd = _tensors(folder, components, configs)
    warnings += odd
    for name in components & PLAIN_FILES.keys() - {"scheduler"}:
        if (folder / name / PLAIN_FILES[name]).is_file():
            file = f"{name}/{PLAIN_FILES[name]}"
            configs[file] = read_json(folder / file, infinite=True)
    if "prior_tokenizer" in components:
        own = TextConfig(pad_id=pad_id(folder / "prior_tokenizer"))
        configs[f"prior_tokenizer/{PLAIN_FILES['prior_tokenizer']}"] = tokenizer_config(own)
    for name, rule in LEFT_OUT.items():
        found = _left_out(folder / name)
        dropped += [Drop(place, rule) for place in found]
        if found:
            warnings.append(f"{len(found)} tensors of {name}/ are left out: {rule}")
    extra = _read_extra(folder)
    if extra and (folder / EXTRA_TENSORS).is_file():
        file = folder / EXTRA_TENSORS
        for name, place in open_source(file).tensors.items():
            if name in tensors:
                raise InputError(f"{file} holds the tensor {name} a second time")
            tensors[name] = place
    pads = {n: pad_id(folder / n) for n in TOKENIZERS if n in components}
    shapes = {name: place.info.shape for name, place in tensors.items()}
    meaning = derive_preset(configs, pads, shapes, _name(folder), overrides.codec)
    if not extra:
        check_pipeline(meaning.preset, index, str(folder))
    values, notes = with_extra(to_values(meaning.preset), extra, EXTRA_JSON)
    preset = build_preset(values, f"the preset in {folder}", InputError)
    for config, name in zip(meaning.preset.text, TOKENIZERS, strict=False):
        if name in pads and config.vocab_size != 49408:
            why = f"{config.vocab_size} embeddings, CLIP's vocabulary has 49408"
            raise InputError(f"the text encoder of {folder} does not fit its tokenizer", why)
    return ModelSource(
        kind="diffusers",
        path=folder,
        file=tensors["unet.conv_in.weight"].file if "unet.conv_in.weight" in tensors else folder,
        preset=preset,
        tensors=tensors,
        findings=(*meaning.findings, *notes),
        weights=(
            *extra.get("weights", ("live",))[:1],
            *(("ema",) if any(name.startswith(EMA) for name in tensors) else ()),
        ),
        tokenizer_json=extra.get("tokenizer"),
        metadata=extra.get("metadata", {}),
        configs=_foreign(configs, preset) | {k: extra[k] for k in (LAYOUT,) if k in extra},
        dropped=tuple(dropped),
        warnings=(*warnings, *meaning.warnings),
    )


def _tensors(
    folder: Path, components: set[str], configs: dict[str, Any]
) -> tuple[dict[str, Located], list[Drop], list[str]]:
    """The tensors of all components by difftool's names, those that are no part of a model, and
    warnings; each component's configuration file joins `configs`."""
    tensors: dict[str, Located] = {}
    dropped: list[Drop] = []
    warnings: list[str] = []
    encoders = 0
    if (folder / "unet_ema" / "config.json").is_file():
        components.add("unet_ema")  # diffusers' training scripts put it there, and in no index
    for name in (n for n in (*WEIGHTS, *FOREIGN) if n in components):
        configs[f"{name}/config.json"] = read_json(folder / name / "config.json")
        prefix = f"{name}."
        if name == "unet_ema":
            prefix = f"{EMA}unet."
        elif name in FOREIGN:
            prefix = f"{EXTRA}diffusers.{name}."
        if name in ENCODERS:
            prefix, encoders = f"text.{encoders}.", encoders + 1
        source = component_tensors(folder / name, stem_of(name))
        warnings += source.warnings
        dropped += [Drop(place, "no part of the model") for place in source.beside.values()]
        for their, place in source.tensors.items():
            ours = our_name(name, their)
            if ours is None:
                dropped.append(Drop(place, _positions(place, warnings)))
            elif prefix + ours in tensors:
                raise InputError(f"{place.file} holds the tensor {ours} under two names")
            else:
                tensors[prefix + ours] = place
    return tensors, dropped, warnings


def _foreign(configs: Configs, preset: Preset) -> dict[str, Any]:
    """Those of a folder's configuration files that difftool would write otherwise."""
    try:
        ours = write_configs(preset, encoder_names(preset))
    except CheckError:
        return dict(configs)
    ours["unet_ema/config.json"] = ours["unet/config.json"]
    ours[INDEX] = with_foreign(ours[INDEX], configs)
    return {path: config for path, config in configs.items() if config != ours.get(path)}


def _name(folder: Path) -> str:
    folder = folder.resolve()
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    if repository.startswith("models--"):  # in the hub's cache, where folders are called by hashes
        return repository.rpartition("--")[2]
    return folder.name or "model"


def _components(index: Mapping[str, Any], folder: Path) -> set[str]:
    """The components that are there; InputError for a pipeline or a component that is unknown."""
    where, kind = folder / INDEX, index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        hint = "this version knows " + ", ".join(PIPELINES)
        if "prior" in index:
            hint = f"sample -m MODEL --prior {folder} takes its prior"
        raise InputError(f"{where} names a pipeline unknown to this version", str(kind), hint)
    present = set()
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise InputError(f"{where} is malformed", f"{name} = {value}")
        if name in CLASSES and value[1] not in CLASSES[name]:
            what = f"{where} names a class that difftool does not have"
            raise InputError(what, f"{name}: {value[1]}")
        if name not in (*CLASSES, *LEFT_OUT, *PLAIN_FILES, "watermarker"):
            raise InputError(f"{where} names a component that difftool does not have", name)
        present.add(name)
    if missing := [name for name in ("unet", "scheduler") if name not in present]:
        raise InputError(f"{where} lacks a component", missing[0])
    return present


def _positions(place: Located, warnings: list[str]) -> str:
    """The rule that drops position_ids: 0, 1, 2, ... in any dtype; merges have spoilt some."""
    if not counts_up(place):
        warnings.append(f"{place.name} in {place.file} is spoilt; positions are counted instead")
    return "position_ids are 0, 1, 2, ... and are not stored"


def _left_out(folder: Path) -> list[Located]:
    """The tensors of a component that is not read, as far as they are in one file."""
    for stem in ("model", "diffusion_pytorch_model"):
        if (folder / f"{stem}.safetensors").is_file():
            return [*component_tensors(folder, stem).tensors.values()]
    return []


def _read_extra(folder: Path) -> dict[str, Any]:
    """The content of difftool_extra.json; empty if it is not there."""
    path = folder / EXTRA_JSON
    return checked_extra(read_json(path, infinite=True), str(path)) if path.is_file() else {}
