"""Any model as a folder of diffusers. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from difftool.config.networks import TextConfig
from difftool.config.schema import Preset
from difftool.config.validate import to_values
from difftool.diffusion.path import build_path
from difftool.errors import DifftoolError
from difftool.formats.diffusers.components import (
    ENCODERS,
    EXTRA_JSON,
    EXTRA_TENSORS,
    FOREIGN,
    IMAGE_PROCESSORS,
    INDEX,
    PLAIN_FILES,
    TOKENIZERS,
    json_text,
    stem_of,
)
from difftool.formats.diffusers.configs import (
    SCHEDULER,
    Configs,
    Shapes,
    derive_preset,
    encoder_names,
    needed_components,
    with_foreign,
    write_configs,
)
from difftool.formats.diffusers.tokenizers import read_pad, tokenizer_files
from difftool.formats.model_source import (
    EMA,
    EXTRA,
    ModelSource,
    Plan,
)
from difftool.formats.roundtrip import differing, make_extra, same_path
from difftool.formats.rules import Rule


def plan_diffusers(source: ModelSource, keep_metadata: bool) -> Plan:
    """Any model as a folder of diffusers; CheckError if its U-Net has no class there."""
    preset = source.preset
    names = encoder_names(preset)
    files: dict[str, list[Rule]] = {}
    for name, component, theirs in _placed(source, names):
        file = f"{component}/{stem_of(component)}.safetensors" if component else EXTRA_TENSORS
        rule = Rule(theirs, (name,), source.tensors[name].info.shape)
        files.setdefault(file, []).append(rule)
    configs = write_configs(preset, names)
    if "ema" in source.weights[1:]:
        configs["unet_ema/config.json"] = configs["unet/config.json"]
    configs |= _foreign_components(source, files)
    configs[INDEX] = with_foreign(configs[INDEX], configs)
    pads = {
        TOKENIZERS[ENCODERS.index(name)]: config.pad_id
        for name, config in zip(names, preset.text, strict=False)
    }
    shapes = {name: place.info.shape for name, place in source.tensors.items()}
    configs = _as_published(configs, source, pads, shapes)
    derived = to_values(derive_preset(configs, pads, shapes, preset.name).preset)
    texts = {path: json_text(config) for path, config in configs.items()}
    for name, config in zip(names, preset.text, strict=False):
        if config.tokenizer == "clip":
            folder = TOKENIZERS[ENCODERS.index(name)]
            texts |= {f"{folder}/{file}": text for file, text in tokenizer_files(config).items()}
    if (own := configs.get("prior_tokenizer/tokenizer_config.json")) is not None:
        files_of = tokenizer_files(TextConfig(pad_id=read_pad(own, "prior_tokenizer")))
        texts |= {f"prior_tokenizer/{file}": text for file, text in files_of.items()}
    texts[EXTRA_JSON] = json_text(make_extra(source, derived, keep_metadata))
    return Plan(
        files=files,
        metadata={"format": "pt"},
        texts=texts,
        sidecars=frozenset({EXTRA_TENSORS}),
        warnings=tuple(_losses(preset, derived, configs)),
    )


def _placed(source: ModelSource, encoders: list[str]) -> Iterator[tuple[str, str, str]]:
    """(name, component, name there) of every tensor; one that fits no component keeps its name."""
    prefixes = {"unet.": "unet", "vae.": "vae", f"{EMA}unet.": "unet_ema"}
    prefixes |= {f"text.{i}.": name for i, name in enumerate(encoders)}
    prefixes |= {
        f"{EXTRA}diffusers.{n}.": n for n in FOREIGN if f"{n}/config.json" in source.configs
    }
    unused = {f"text.{i}.text_projection.weight" for i, t in enumerate(source.preset.text)
              if not t.pooled}  # fmt: skip
    for name in source.tensors:
        found = (p for p in prefixes if name.startswith(p) and name not in unused)
        prefix = next(found, None)
        yield (name, "", name) if prefix is None else (name, prefixes[prefix], name[len(prefix) :])


def _foreign_components(source: ModelSource, files: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files of the components that difftool has no network for, as they were."""
    there = {name for name in FOREIGN if any(file.startswith(f"{name}/") for file in files)}
    wanted = {f"{name}/config.json" for name in there}
    beside = {name for name in PLAIN_FILES if name != "scheduler"} if there else set()
    wanted |= {f"{name}/{PLAIN_FILES[name]}" for name in beside | {"low_res_scheduler"}}
    configs = {path: source.configs[path] for path in wanted if path in source.configs}
    return {path: config for path, config in configs.items() if isinstance(config, dict)}


def _as_published(
    configs: dict[str, Any], source: ModelSource, pads: Mapping[str, int | None], shapes: Shapes
) -> dict[str, Any]:
    """The same files, each as the folder that the model came from had it, where that file still
    means what the model is: fields that change no result survive a way there and back."""

    def mismatches(candidate: Configs) -> list[str]:
        derived = to_values(derive_preset(candidate, pads, shapes, "").preset)
        return differing(derived, source.values)

    for path, config in sorted(source.configs.items(), key=lambda item: item[0] == INDEX):
        if path not in configs or not isinstance(config, dict):
            continue
        if path == INDEX:
            config = _published_index(config, configs)
        try:
            if len(mismatches(configs | {path: config})) <= len(mismatches(configs)):
                configs = configs | {path: config}
        except (DifftoolError, KeyError, TypeError):
            continue  # the model has changed since: its own description stands
    return configs


def _published_index(published: Mapping[str, Any], configs: Configs) -> dict[str, Any]:
    """The index that a folder had, of which only what does not name code is taken over."""
    ours = configs[INDEX] | {"scheduler": ["diffusers", configs[SCHEDULER]["_class_name"]]}
    components = {name: value for name, value in ours.items() if isinstance(value, list)}
    processor = published.get("feature_extractor")
    if components.get("feature_extractor", [None])[0] and _is_processor(processor):
        components["feature_extractor"] = processor
    gone = {name: [None, None] for name, value in published.items() if isinstance(value, list)}
    plain = {
        name: value
        for name, value in published.items()
        if isinstance(value, str | bool | int | float)
    }
    index = ours | gone | plain | components
    if "requires_safety_checker" in published:
        index["requires_safety_checker"] = False
    return index


def _is_processor(line: Any) -> TypeGuard[list[str]]:
    """Whether an index's line names an image processor, of which there are several spellings."""
    return isinstance(line, list) and len(line) == 2 and line[1] in IMAGE_PROCESSORS


def _losses(preset: Preset, derived: Mapping[str, Any], configs: Configs) -> Iterator[str]:
    """What diffusers will do otherwise with the folder, or cannot do."""
    values = to_values(preset)
    kept = f"it is kept in {EXTRA_JSON}, which diffusers does not read"
    if derived["codec"] != values["codec"]:
        yield f"diffusers has no codec {preset.codec.kind}: {kept}, and its pictures are bare x0"
    if derived["target"] != preset.target:
        yield f"no scheduler of diffusers has the target {preset.target}: {kept}"
    if not same_path(build_path(preset.path), build_path(derived["path"])):
        yield f"no scheduler of diffusers has the noise path {preset.path['kind']}: {kept}"
    if preset.text and not preset.codec.learned:
        yield "diffusers has no pipeline from text to pixels: its components load one by one"
    elif derived["text"] != values["text"]:
        yield f"diffusers reads text encoders in another way than this model: {kept}"
    needed = needed_components(preset, configs[INDEX])
    if missing := [name for name in needed if configs[INDEX].get(name) in (None, [None, None])]:
        yield f"diffusers' pipeline wants components that are not there: {', '.join(missing)}"
    if preset.unet.num_classes and configs[INDEX]["_class_name"] == "DDPMPipeline":
        yield "diffusers' DDPMPipeline asks for no class, which this model needs"
