"""Folders of the diffusers library <-> difftool's models. Torch-free; nothing named in a folder is
ever imported or run.

Tensors keep their names, but for the component that they lie in: unet/ is unet., vae/ is vae., the
text encoders are text.0. and text.1. What diffusers has no place for lies beside it in
difftool_extra.json and difftool_extra.safetensors, so that a model comes back as it was.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from difftool.config.networks import IdentityConfig, TextConfig, VaeConfig
from difftool.config.schema import Preset, SampleConfig, TrainConfig, build_preset, to_values
from difftool.diffusion.path import Discrete, build_path
from difftool.diffusion.path import Path as NoisePath
from difftool.errors import CheckError, DifftoolError, InputError
from difftool.formats import networks
from difftool.formats.detect import family_of
from difftool.formats.model_source import (
    EMA,
    EXTRA,
    FORMATS,
    LAYOUT,
    NOTHING_TOLD,
    Drop,
    Evidence,
    Format,
    ModelSource,
    Plan,
    Told,
    checked_values,
)
from difftool.formats.names import Rule
from difftool.formats.networks import VERSION
from difftool.formats.roundtrip import checked_extra, differing, make_extra, with_extra
from difftool.formats.schedulers import CLASSES as CLASSES_OF_SCHEDULERS
from difftool.formats.schedulers import read_scheduler, write_scheduler
from difftool.storage.strict_json import read_json
from difftool.storage.tensor_file import TensorSource, open_source
from difftool.storage.tensors import Located, piece_of_file
from difftool.text.tokenizer import CLIP_END, CLIP_START, clip_vocabulary

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
EXTRA_JSON, EXTRA_TENSORS = "difftool_extra.json", "difftool_extra.safetensors"
ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
WEIGHTS = {
    **dict.fromkeys(("unet", "vae", "unet_ema"), "diffusion_pytorch_model"),
    **dict.fromkeys(ENCODERS, "model"),
}
"""Components whose tensors are a model's, and the stems of their files."""
FOREIGN = {
    "image_encoder": ("model", ("transformers", "CLIPVisionModelWithProjection")),
    "image_normalizer": (
        *("diffusion_pytorch_model", ("stable_diffusion", "StableUnCLIPImageNormalizer")),
    ),
    "depth_estimator": ("model", ("transformers", "DPTForDepthEstimation")),
}
"""Components that difftool has no network for: the stem of their files, and their class. Their
tensors are kept beside the model."""
PLAIN_FILES = {
    "scheduler": "scheduler_config.json",
    "low_res_scheduler": "scheduler_config.json",
    "image_noising_scheduler": "scheduler_config.json",
    "feature_extractor": "preprocessor_config.json",
}
"""Components without tensors, and the file that describes each."""
IMAGE_PROCESSORS = {
    f"{kind}{name}"
    for kind in ("CLIP", "DPT")
    for name in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
"""Classes of the component feature_extractor."""
LEFT_OUT = {"safety_checker": "the safety checker is no part of a difftool model"}
"""Components whose tensors are dropped, and why."""
CLASSES = {
    "unet": ("UNet2DConditionModel", "UNet2DModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
} | {name: (names[1],) for name, (_, names) in FOREIGN.items()}


class Pipeline(NamedTuple):
    """What a pipeline class says of the models that it is for."""

    text: str = ""
    """How it reads its text encoders: "" (it has none), "sd" or "xl"."""
    guidance: float = 1.0
    steps: int = 50


PIPELINES = {
    "StableDiffusionPipeline": Pipeline("sd", 7.5),
    "StableDiffusionImg2ImgPipeline": Pipeline("sd", 7.5),
    "StableDiffusionInpaintPipeline": Pipeline("sd", 7.5),
    "StableDiffusionInstructPix2PixPipeline": Pipeline("sd", 7.5),
    "LatentConsistencyModelPipeline": Pipeline("sd", 8.5, 4),
    "LatentConsistencyModelImg2ImgPipeline": Pipeline("sd", 8.5, 4),
    "StableDiffusionXLPipeline": Pipeline("xl", 5.0),
    "StableDiffusionXLImg2ImgPipeline": Pipeline("xl", 5.0),
    "StableDiffusionXLInpaintPipeline": Pipeline("xl", 5.0),
    "StableDiffusionDepth2ImgPipeline": Pipeline("sd", 7.5),
    "StableDiffusionUpscalePipeline": Pipeline("sd", 9.0, 75),
    "StableUnCLIPImg2ImgPipeline": Pipeline("sd", 10.0, 20),
    "DDPMPipeline": Pipeline(),
    "DDIMPipeline": Pipeline(),
    "PNDMPipeline": Pipeline(),
}
"""The pipeline classes that difftool knows; no other is read."""

CLASSES_OF_FAMILIES = {
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "sd2-unclip": "StableUnCLIPImg2ImgPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
}
NEEDED = {
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    "StableUnCLIPImg2ImgPipeline": (
        *("image_encoder", "image_normalizer", "image_noising_scheduler", "feature_extractor"),
    ),
}
"""Components without which a pipeline class does not load, and that difftool does not make."""
LOW_RES_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
"""Fields of the DDPMScheduler with which the upscaler adds noise to the small picture."""

Configs = Mapping[str, Any]
"""Configuration files of a folder by their place in it."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a model's tensors by difftool's name."""


# --- what a folder's configuration files mean ------------------------------------------------


class Meaning(NamedTuple):
    """A preset derived from a folder's configuration files."""

    preset: Preset
    findings: tuple[Evidence, ...]
    warnings: tuple[str, ...]


def _derive(configs: Configs, pads: Mapping[str, int | None], shapes: Shapes, name: str) -> Meaning:
    """The preset that the configuration files mean; InputError if difftool has no such model.

    pads: the padding token of each tokenizer that is there, None for the end mark.
    """
    index = configs[INDEX]
    kind = index["_class_name"]
    pipeline = PIPELINES[kind]
    unet = networks.read_unet(configs["unet/config.json"], "unet/config.json")
    codec: VaeConfig | IdentityConfig = IdentityConfig(channels=unet.in_channels)
    if "vae/config.json" in configs:
        codec = networks.read_vae(configs["vae/config.json"], "vae/config.json")
    text = tuple(_derive_text(configs, pads, shapes, pipeline))
    scheduling = read_scheduler(configs[SCHEDULER], SCHEDULER)
    family = family_of(unet, codec, text)
    numbers = 0
    # No pipeline of pixels reads text: where there is some, EXTRA_JSON says how it is read.
    if unet.vector_dim and unet.vector_name == "add_embedding" and pipeline.text:
        pooled = sum(encoder.projection or 0 for encoder in text if encoder.pooled)
        numbers, rest = divmod(unet.vector_dim - pooled, 256)
        if rest or not 0 <= numbers <= 6:
            why = f"{unet.vector_dim} is not {pooled} and some numbers of 256 sinusoids each"
            raise InputError("unet/config.json does not fit the text encoders", why)
    size = _size(configs["unet/config.json"].get("sample_size"), codec)
    latent = isinstance(codec, VaeConfig)
    preset = Preset(
        name=name,
        about=f"a model of family {family}",
        family=family,
        codec=codec,
        unet=unet,
        text=text,
        size_numbers=numbers,
        path=scheduling.path,
        target=scheduling.target,
        sample=SampleConfig(
            size=size, steps=pipeline.steps, guidance=pipeline.guidance, **scheduling.sample
        ),
        scheduler=scheduling.scheduler,
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", False)),
        # A pretrained model is fine-tuned, which wants a small learning rate.
        train=TrainConfig(lr=1e-5, size=size[0]) if latent else TrainConfig(),
    )
    says = f"family {family}, {kind} with {configs['unet/config.json']['_class_name']}"
    findings = (Evidence(INDEX, says), Evidence(SCHEDULER, scheduling.says))
    return Meaning(preset, findings, scheduling.warnings)


def _derive_text(
    configs: Configs, pads: Mapping[str, int | None], shapes: Shapes, pipeline: Pipeline
) -> Iterator[TextConfig]:
    present = [name for name in ENCODERS if f"{name}/config.json" in configs]
    for i, name in enumerate(present):
        where = f"{name}/config.json"
        projection = shapes.get(f"text.{i}.text_projection.weight")
        named = configs[INDEX].get(name) or [None, None]
        xl = pipeline.text == "xl"
        projected = projection is not None or named[1] == "CLIPTextModelWithProjection"
        use: dict[str, Any] = {"pad_id": pads.get(TOKENIZERS[ENCODERS.index(name)])}
        if xl:
            use |= {"hidden": -2, "final_norm": False, "pooled": projected}
        config = networks.read_text(configs[where], where, projected=projected, **use)
        if projection:  # published configurations are wrong about it, the tensors are not
            config = replace(config, projection=projection[0])
        yield config


def _size(sample_size: Any, codec: VaeConfig | IdentityConfig) -> tuple[int, int]:
    """Width and height in pixels of the x0 size that a U-Net's file names."""
    factor = codec.factor
    match sample_size:
        case int(side):
            return side * factor, side * factor
        case [int(height), int(width)]:
            return width * factor, height * factor
    return (512, 512) if isinstance(codec, VaeConfig) else (64, 64)


# --- reading ---------------------------------------------------------------------------------


def _recognises(path: Path) -> bool:
    return (path / INDEX).is_file()


def open_diffusers(folder: Path, told: Told = NOTHING_TOLD) -> ModelSource:
    """A folder of diffusers as a source; InputError if it is malformed or not supported."""
    index = read_json(folder / INDEX)
    components = _components(index, folder)
    warnings = [
        f"{path.name} in {folder} is code, which difftool never runs"
        for path in sorted(folder.glob("**/*.py"))
    ]
    scheduler = read_json(folder / SCHEDULER, infinite=True)  # diffusers writes -Infinity
    configs: dict[str, Any] = {INDEX: index, SCHEDULER: scheduler}
    tensors: dict[str, Located] = {}
    dropped: list[Drop] = []
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
    for name in components & PLAIN_FILES.keys() - {"scheduler"}:
        if (folder / name / PLAIN_FILES[name]).is_file():
            file = f"{name}/{PLAIN_FILES[name]}"
            configs[file] = read_json(folder / file, infinite=True)
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
    pads = {n: _pad_id(folder / n) for n in TOKENIZERS if n in components}
    shapes = {name: place.info.shape for name, place in tensors.items()}
    meaning = _derive(configs, pads, shapes, _name(folder))
    values, notes = with_extra(to_values(meaning.preset), extra, EXTRA_JSON)
    values = checked_values(values, str(folder))
    for config, name in zip(meaning.preset.text, TOKENIZERS, strict=False):
        if name in pads and config.vocab_size != 49408:
            why = f"{config.vocab_size} embeddings, CLIP's vocabulary has 49408"
            raise InputError(f"the text encoder of {folder} does not fit its tokenizer", why)
    return ModelSource(
        kind="diffusers",
        path=folder,
        file=tensors["unet.conv_in.weight"].file if "unet.conv_in.weight" in tensors else folder,
        values=values,
        tensors=tensors,
        findings=(*meaning.findings, *notes),
        weights=(
            *extra.get("weights", ("live",))[:1],
            *(("ema",) if any(name.startswith(EMA) for name in tensors) else ()),
        ),
        tokenizer_json=extra.get("tokenizer"),
        metadata=extra.get("metadata", {}),
        configs=_foreign(configs, values) | {k: extra[k] for k in (LAYOUT,) if k in extra},
        dropped=tuple(dropped),
        warnings=(*warnings, *meaning.warnings),
    )


def _foreign(configs: Configs, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a folder's configuration files that difftool would write otherwise."""
    preset = build_preset(values)
    try:
        ours = _write_configs(preset, _encoder_names(preset))
    except CheckError:
        return dict(configs)
    ours["unet_ema/config.json"] = ours["unet/config.json"]
    ours[INDEX] |= _foreign_index(configs)
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


def stem_of(component: str) -> str:
    """The stem of a component's file of weights."""
    return WEIGHTS[component] if component in WEIGHTS else FOREIGN[component][0]


def our_name(component: str, name: str) -> str | None:
    """difftool's name of a component's tensor, without its prefix; None: it is no weight."""
    if component in ENCODERS:
        if name.endswith("embeddings.position_ids"):
            return None
        # Newer transformers leave the prefix out.
        known = name.startswith(("text_model.", "text_projection."))
        return name if known else f"text_model.{name}"
    if component == "image_encoder":
        known = name.startswith(("vision_model.", "visual_projection."))
        return name if known else f"vision_model.{name}"
    for old, new in LEGACY.items():
        if f".{old}." in name and ".attentions." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name


LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of plain attention's layers before diffusers 0.17."""


def _positions(place: Located, warnings: list[str]) -> str:
    """The rule that drops position_ids: 0, 1, 2, ... in any dtype; merges have spoilt some."""
    data = b"".join(piece_of_file(place.file, place.info).chunks())
    code = {"I64": "q", "I32": "i", "F32": "f", "F16": "e", "F64": "d"}.get(place.info.dtype)
    count = place.info.shape[-1] if place.info.shape else 0
    good = code and list(struct.unpack(f"<{count}{code}", data)) == [*range(count)]
    if not good:
        warnings.append(f"{place.name} in {place.file} is spoilt; positions are counted instead")
    return "position_ids are 0, 1, 2, ... and are not stored"


def weight_names(stem: str) -> Iterator[str]:
    """Names of the file, or of the index of shards, that a component's weights may have; the
    preferred ones first."""
    for start, suffix in ((stem, "safetensors"), (stem, "bin"), ("pytorch_model", "bin")):
        for variant in ("", ".fp16", ".bf16"):
            yield f"{start}{variant}.{suffix}"
            yield f"{start}.{suffix}.index{variant}.json"


def component_tensors(folder: Path, stem: str) -> TensorSource:
    """Tensors of a component, in one file or in shards, of full or of half precision."""
    for name in weight_names(stem):
        if (folder / name).is_file():
            return open_source(folder / name)
    raise InputError(f"{folder} has no weights", f"{stem}.safetensors is not there")


def _left_out(folder: Path) -> list[Located]:
    """The tensors of a component that is not read, as far as they are in one file."""
    for stem in ("model", "diffusion_pytorch_model"):
        if (folder / f"{stem}.safetensors").is_file():
            return [*component_tensors(folder, stem).tensors.values()]
    return []


# --- tokenizers ------------------------------------------------------------------------------


@cache
def _clip() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids, and the lines of its merges.txt."""
    vocabulary, merges = clip_vocabulary()
    return vocabulary, [" ".join(pair) for pair in merges]


def _pad_id(folder: Path) -> int | None:
    """The padding token of a tokenizer's folder (None: the end mark); InputError if it is not
    CLIP's vocabulary."""
    merges: list[str] = []
    if (folder / "merges.txt").is_file():
        text = (folder / "merges.txt").read_bytes().decode("utf-8", "replace")
        merges = [line for line in text.splitlines() if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        match read_json(folder / "tokenizer.json"):
            case {"model": {"merges": list(found)}}:
                merges = [" ".join(map(str, m)) if isinstance(m, list) else m for m in found]
    if merges != _clip()[1]:
        raise InputError(f"{folder} is not CLIP's vocabulary", "this version reads no other")
    added = folder / "added_tokens.json"
    if added.is_file() and any(not t.startswith("<|") for t in read_json(added)):
        raise InputError(f"{folder} has tokens added to CLIP's vocabulary", "this is not supported")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            pad = read_json(folder / name).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if pad == "!":
                return 0
            if pad == "<|endoftext|>":
                return None
            if pad is not None:
                raise InputError(f"{folder} pads with an unknown token", repr(pad))
    return None


def _tokenizer_files(config: TextConfig) -> dict[str, str]:
    """A tokenizer's folder that transformers reads as CLIP's."""
    vocabulary, merges = _clip()
    pad = CLIP_END if config.pad_id is None else next(
        token for token, i in vocabulary.items() if i == config.pad_id
    )  # fmt: skip
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END}
    special |= {"unk_token": CLIP_END, "pad_token": pad}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.length}
    about |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": _json(about | special),
        "special_tokens_map.json": _json(special),
    }


# --- what only difftool reads ----------------------------------------------------------------


def _read_extra(folder: Path) -> dict[str, Any]:
    """The content of difftool_extra.json; empty if it is not there."""
    path = folder / EXTRA_JSON
    return checked_extra(read_json(path, infinite=True), str(path)) if path.is_file() else {}


# --- writing ---------------------------------------------------------------------------------


def plan_diffusers(source: ModelSource, keep_metadata: bool) -> Plan:
    """Any model as a folder of diffusers; CheckError if its U-Net has no class there."""
    preset = build_preset(source.values, str(source.path))
    source = replace(source, values=to_values(preset))
    pixel = not isinstance(preset.codec, VaeConfig)
    names = _encoder_names(preset)
    files: dict[str, list[Rule]] = {}
    for name, component, theirs in _placed(source, names):
        file = f"{component}/{stem_of(component)}.safetensors" if component else EXTRA_TENSORS
        rule = Rule(theirs, (name,), source.tensors[name].info.shape)
        files.setdefault(file, []).append(rule)
    configs = _write_configs(preset, names)
    if "ema" in source.weights[1:]:
        configs["unet_ema/config.json"] = configs["unet/config.json"]
    configs |= _foreign_components(source, files)
    configs[INDEX] |= _foreign_index(configs)
    pads = {
        TOKENIZERS[ENCODERS.index(name)]: config.pad_id
        for name, config in zip(names, preset.text, strict=False)
    }
    shapes = {name: place.info.shape for name, place in source.tensors.items()}
    configs = _as_published(configs, source, pads, shapes)
    derived = to_values(_derive(configs, pads, shapes, preset.name).preset)
    texts = {path: _json(config) for path, config in configs.items()}
    for name, config in zip(names, preset.text, strict=False):
        if config.tokenizer == "clip":
            folder = TOKENIZERS[ENCODERS.index(name)]
            texts |= {f"{folder}/{file}": text for file, text in _tokenizer_files(config).items()}
    texts[EXTRA_JSON] = _json(make_extra(source, derived, keep_metadata))
    return Plan(
        files=files,
        metadata={"format": "pt"},
        texts=texts,
        sidecars=frozenset({EXTRA_TENSORS}),
        warnings=tuple(_losses(preset, derived, configs, pixel)),
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _encoder_names(preset: Preset) -> list[str]:
    """The components that the text encoders become; those beyond the second become none."""
    if len(preset.text) == 1 and preset.text[0].pooled:
        return [ENCODERS[1]]  # the refiner of Stable Diffusion XL
    return list(ENCODERS[: len(preset.text)])


def _placed(source: ModelSource, encoders: list[str]) -> Iterator[tuple[str, str, str]]:
    """(name, component, name there) of every tensor; one that fits no component keeps its name."""
    prefixes = {"unet.": "unet", "vae.": "vae", f"{EMA}unet.": "unet_ema"}
    prefixes |= {f"text.{i}.": name for i, name in enumerate(encoders)}
    prefixes |= {
        f"{EXTRA}diffusers.{n}.": n for n in FOREIGN if f"{n}/config.json" in source.configs
    }
    for name in source.tensors:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        yield (name, "", name) if prefix is None else (name, prefixes[prefix], name[len(prefix) :])


def _foreign_components(source: ModelSource, files: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files of the components that difftool has no network for, as they were."""
    there = {name for name in FOREIGN if any(file.startswith(f"{name}/") for file in files)}
    wanted = {f"{name}/config.json" for name in there}
    beside = {name for name in PLAIN_FILES if name != "scheduler"} if there else set()
    wanted |= {f"{name}/{PLAIN_FILES[name]}" for name in beside | {"low_res_scheduler"}}
    configs = {path: source.configs[path] for path in wanted if path in source.configs}
    return {path: config for path, config in configs.items() if isinstance(config, dict)}


def _foreign_index(configs: Configs) -> dict[str, list[str]]:
    """The index's lines on the components that difftool has no network for; known classes only."""
    lines = {
        name: list(names)
        for name, (_, names) in FOREIGN.items()
        if f"{name}/config.json" in configs
    }
    for name, file in PLAIN_FILES.items():
        config = configs.get(f"{name}/{file}", {})
        if config.get("_class_name") in CLASSES_OF_SCHEDULERS:
            lines[name] = ["diffusers", config["_class_name"]]
        elif config.get("image_processor_type") in IMAGE_PROCESSORS:
            lines[name] = ["transformers", config["image_processor_type"]]
    return lines


def _pipeline(preset: Preset) -> str:
    """The pipeline class that a model is for, or comes nearest to."""
    if not isinstance(preset.codec, VaeConfig) or not preset.text:
        return "DDPMPipeline"
    inpaints = preset.unet.in_channels == 2 * preset.codec.latent_channels + 1
    if any(encoder.pooled for encoder in preset.text):
        refiner = len(preset.text) == 1
        kind = "Img2Img" if refiner else "Inpaint" if inpaints else ""
        return f"StableDiffusionXL{kind}Pipeline"
    if preset.unet.guidance_dim:
        return "LatentConsistencyModelPipeline"
    family = family_of(preset.unet, preset.codec, preset.text)
    if family in CLASSES_OF_FAMILIES:
        return CLASSES_OF_FAMILIES[family]
    edits = preset.unet.in_channels == 2 * preset.codec.latent_channels
    kind = "Inpaint" if inpaints else "InstructPix2Pix" if edits else ""
    return f"StableDiffusion{kind}Pipeline"


def _write_configs(preset: Preset, encoders: list[str]) -> dict[str, Any]:
    """A folder's configuration files for a model."""
    width, height = preset.sample.size
    factor = preset.codec.factor
    configs: dict[str, Any] = {"unet/config.json": networks.write_unet(preset.unet)}
    if isinstance(preset.codec, VaeConfig):
        configs["vae/config.json"] = networks.write_vae(preset.codec, max(width, height))
    sides = [height // factor, width // factor]
    configs["unet/config.json"]["sample_size"] = sides[0] if sides[0] == sides[1] else sides
    for name, config in zip(encoders, preset.text, strict=False):
        configs[f"{name}/config.json"] = networks.write_text(config)
    configs[SCHEDULER] = write_scheduler(
        build_path(preset.path), preset.target, preset.sample, preset.scheduler
    )
    if _pipeline(preset) == CLASSES_OF_FAMILIES["x4-upscaler"]:
        fields = CLASSES_OF_SCHEDULERS["DDPMScheduler"].defaults | LOW_RES_SCHEDULER
        about = {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION}
        configs["low_res_scheduler/scheduler_config.json"] = about | dict(sorted(fields.items()))
    return {INDEX: _index(preset, encoders, configs)} | configs


def _index(preset: Preset, encoders: list[str], configs: Configs) -> dict[str, Any]:
    kind = _pipeline(preset)
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": VERSION}
    index["unet"] = ["diffusers", configs["unet/config.json"]["_class_name"]]
    index["scheduler"] = ["diffusers", configs[SCHEDULER]["_class_name"]]
    if "vae/config.json" in configs:
        index["vae"] = ["diffusers", "AutoencoderKL"]
    for name, config in zip(encoders, preset.text, strict=False):
        index[name] = ["transformers", configs[f"{name}/config.json"]["architectures"][0]]
        tokenizer = TOKENIZERS[ENCODERS.index(name)]
        clip = config.tokenizer == "clip"
        index[tokenizer] = ["transformers", "CLIPTokenizer"] if clip else [None, None]
    nothing: list[None] = [None, None]
    if kind == CLASSES_OF_FAMILIES["x4-upscaler"]:
        index |= {"safety_checker": nothing, "feature_extractor": nothing, "watermarker": nothing}
        index["max_noise_level"] = 350
    elif kind in NEEDED:
        index |= dict.fromkeys(NEEDED[kind], nothing)
    elif PIPELINES[kind].text == "sd":
        index |= {"safety_checker": nothing, "feature_extractor": nothing, "image_encoder": nothing}
        index["requires_safety_checker"] = False
    elif PIPELINES[kind].text == "xl":
        refiner = encoders == [ENCODERS[1]]
        if refiner:
            index |= {ENCODERS[0]: nothing, TOKENIZERS[0]: nothing}
            index["requires_aesthetics_score"] = True
        index |= {"feature_extractor": nothing, "image_encoder": nothing}
        index["force_zeros_for_empty_prompt"] = preset.zero_negative
    return index


def _as_published(
    configs: dict[str, Any], source: ModelSource, pads: Mapping[str, int | None], shapes: Shapes
) -> dict[str, Any]:
    """The same files, each as the folder that the model came from had it, where that file still
    means what the model is: fields that change no result survive a way there and back."""

    def mismatches(candidate: Configs) -> list[str]:
        derived = to_values(_derive(candidate, pads, shapes, "").preset)
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


def _losses(
    preset: Preset, derived: Mapping[str, Any], configs: Configs, pixel: bool
) -> Iterator[str]:
    """What diffusers will do otherwise with the folder, or cannot do."""
    values = to_values(preset)
    kept = f"it is kept in {EXTRA_JSON}, which diffusers does not read"
    if derived["codec"] != values["codec"]:
        yield f"diffusers has no codec {preset.codec.kind}: {kept}, and its pictures are bare x0"
    if derived["target"] != preset.target:
        yield f"no scheduler of diffusers has the target {preset.target}: {kept}"
    if not _same_path(build_path(preset.path), build_path(derived["path"])):
        yield f"no scheduler of diffusers has the noise path {preset.path['kind']}: {kept}"
    if preset.text and pixel:
        yield "diffusers has no pipeline from text to pixels: its components load one by one"
    elif derived["text"] != values["text"]:
        yield f"diffusers reads text encoders in another way than this model: {kept}"
    needed = NEEDED.get(configs[INDEX]["_class_name"], ())
    if missing := [name for name in needed if configs[INDEX].get(name) in (None, [None, None])]:
        yield f"diffusers' pipeline wants components that are not there: {', '.join(missing)}"
    if preset.unet.num_classes and configs[INDEX]["_class_name"] == "DDPMPipeline":
        yield "diffusers' DDPMPipeline asks for no class, which this model needs"


def _same_path(one: NoisePath, other: NoisePath) -> bool:
    """Whether two noise paths are the same at the entries of their tables."""
    if isinstance(one, Discrete) and isinstance(other, Discrete) and one.steps == other.steps:
        return all(one.level(t) == other.level(t) for t in range(one.steps))
    return one == other


FORMATS.add("diffusers", Format(recognises=_recognises, open=open_diffusers, plan=plan_diffusers))
