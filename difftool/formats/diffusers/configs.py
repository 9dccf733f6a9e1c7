"""The configuration files of a diffusers folder <-> a preset. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from difftool.config.families import family as family_row
from difftool.config.families import family_of
from difftool.config.kinds import CodecConfig
from difftool.config.networks import IdentityConfig, TextConfig
from difftool.config.schema import Preset, SampleConfig, TrainConfig
from difftool.diffusion.path import build_path
from difftool.errors import InputError
from difftool.formats.diffusers import networks
from difftool.formats.diffusers.components import (
    CLASSES,
    ENCODERS,
    FOREIGN,
    IMAGE_PROCESSORS,
    INDEX,
    PLAIN_FILES,
    TOKENIZERS,
)
from difftool.formats.diffusers.fields import VERSION
from difftool.formats.diffusers.pipelines import (
    PIPELINES,
    PipelineClass,
    pipeline_class,
    pipeline_family,
)
from difftool.formats.diffusers.schedulers import CLASSES as CLASSES_OF_SCHEDULERS
from difftool.formats.diffusers.schedulers import kept, read_scheduler, write_scheduler
from difftool.formats.layouts import read_network, write_codec, write_encoder, write_network
from difftool.formats.model_source import Evidence

SCHEDULER = "scheduler/scheduler_config.json"
LOW_RES_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
"""Fields of the DDPMScheduler with which the upscaler adds noise to the small picture."""

Configs = Mapping[str, Any]
"""Configuration files of a folder by their place in it."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a model's tensors by difftool's name."""


# --- reading ---------------------------------------------------------------------------------


class Meaning(NamedTuple):
    """A preset derived from a folder's configuration files."""

    preset: Preset
    findings: tuple[Evidence, ...]
    warnings: tuple[str, ...]


def derive_preset(
    configs: Configs,
    pads: Mapping[str, int | None],
    shapes: Shapes,
    name: str,
    stand_in: CodecConfig | None = None,
) -> Meaning:
    """The preset that the configuration files mean; InputError if difftool has no such model.

    pads: the padding token of each tokenizer that is there, None for the end mark. stand_in: an
    autoencoder, where a pipeline that has one lacks it.
    """
    index = configs[INDEX]
    kind = index["_class_name"]
    pipeline = PIPELINES[kind]
    unet = read_network(configs["unet/config.json"], "unet/config.json")
    codec: CodecConfig = IdentityConfig(channels=unet.in_channels)
    if pipeline.text and stand_in is not None:
        codec = stand_in
    if "vae/config.json" in configs:
        codec = networks.read_vae(configs["vae/config.json"] | pipeline.vae, "vae/config.json")
    text = tuple(_derive_text(configs, pads, shapes, pipeline))
    said = configs[SCHEDULER]
    scheduling = read_scheduler({**said, **pipeline.scheduler}, SCHEDULER)
    family = family_of(unet, codec, text)
    sees = family_row(family).vision
    numbers = 0
    # No pipeline of pixels reads text: where there is some, EXTRA_JSON says how it is read.
    if unet.vector_dim and not sees and pipeline.text:
        pooled = sum(encoder.projection or 0 for encoder in text if encoder.pooled)
        numbers, rest = divmod(unet.vector_dim - pooled, 256)
        if rest or not 0 <= numbers <= 6:
            why = f"{unet.vector_dim} is not {pooled} and some numbers of 256 sinusoids each"
            raise InputError("unet/config.json does not fit the text encoders", why)
    size = _size(configs["unet/config.json"], codec, pipeline)
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
        # What is not said is left open: see scheduler_switch.
        scheduler=kept({name: pipeline.scheduler.get(name, said[name]) for name in said}),
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", False)),
        # A pretrained model is fine-tuned, which wants a small learning rate.
        train=TrainConfig(lr=1e-5, size=size[0]) if codec.learned else TrainConfig(),
    )
    says = f"family {family}, {kind} with {configs['unet/config.json']['_class_name']}"
    findings = (Evidence(INDEX, says), Evidence(SCHEDULER, scheduling.says))
    return Meaning(preset, findings, scheduling.warnings)


def check_pipeline(preset: Preset, index: Mapping[str, Any], where: str) -> None:
    """InputError where a pipeline could not run the networks that its folder holds."""
    kind, what = index["_class_name"], f"{where} contradicts itself"
    reads = PIPELINES[kind].text
    if not reads:
        return
    unet, count = preset.unet, len(preset.text)
    sized = unet.vector_dim is not None and getattr(unet, "vector_name", "") == "add_embedding"
    if sized != (reads == "xl"):
        has = "has" if sized else "lacks"
        raise InputError(what, f"{kind} is for another network: its U-Net {has} SDXL's vector")
    if reads == "sd" and count != 1:
        raise InputError(what, f"{kind} reads one text encoder, and there are {count}")
    if unet.in_channels < preset.codec.latent_channels:
        channels = preset.codec.latent_channels
        why = f"the U-Net takes {unet.in_channels} channels, and its latents have {channels}"
        raise InputError(what, why)


def _derive_text(
    configs: Configs, pads: Mapping[str, int | None], shapes: Shapes, pipeline: PipelineClass
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
            # a projection of the first of two is of no use, and stops diffusers' pipeline
            pooled = projected and i == len(present) - 1
            use |= {"hidden": -2, "final_norm": False, "pooled": pooled}
        config = networks.read_text(configs[where], where, projected=projected, **use)
        if projection:  # published configurations are wrong about it, the tensors are not
            config = replace(config, projection=projection[0])
        yield config


def _size(unet: Mapping[str, Any], codec: CodecConfig, pipeline: PipelineClass) -> tuple[int, int]:
    """Width and height in pixels of the x0 size that a U-Net's file names."""
    factor = codec.factor
    match unet.get("sample_size"):
        case int(side):
            old = re.match(r"0\.[0-8]\.", str(unet.get("_diffusers_version")))
            if pipeline.old_sizes and old:
                side = max(side, 64)
            return side * factor, side * factor
        case [int(height), int(width)]:
            return width * factor, height * factor
    return (512, 512) if codec.learned else (64, 64)


# --- writing ---------------------------------------------------------------------------------


def write_configs(preset: Preset, encoders: list[str]) -> dict[str, Any]:
    """A folder's configuration files for a model."""
    width, height = preset.sample.size
    factor = preset.codec.factor
    configs: dict[str, Any] = {"unet/config.json": write_network(preset.unet)}
    if preset.codec.learned:
        configs["vae/config.json"] = write_codec(preset.codec, max(width, height))
    sides = [height // factor, width // factor]
    configs["unet/config.json"]["sample_size"] = sides[0] if sides[0] == sides[1] else sides
    for name, config in zip(encoders, preset.text, strict=False):
        configs[f"{name}/config.json"] = write_encoder(config)
    configs[SCHEDULER] = write_scheduler(
        build_path(preset.path), preset.target, preset.sample, preset.scheduler
    )
    if pipeline_family(preset).concat == "low_res":
        fields = CLASSES_OF_SCHEDULERS["DDPMScheduler"].defaults | LOW_RES_SCHEDULER
        about = {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION}
        configs["low_res_scheduler/scheduler_config.json"] = about | dict(sorted(fields.items()))
    return {INDEX: _index(preset, encoders, configs)} | configs


def _index(preset: Preset, encoders: list[str], configs: Configs) -> dict[str, Any]:
    kind = pipeline_class(preset)
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
    if pipeline_family(preset).concat == "low_res":
        index |= {"safety_checker": nothing, "feature_extractor": nothing, "watermarker": nothing}
        index["max_noise_level"] = 350
    elif needs := pipeline_family(preset).needs:
        index |= dict.fromkeys(needs, nothing)
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


def encoder_names(preset: Preset) -> list[str]:
    """The components that the text encoders become; those beyond the second become none."""
    if len(preset.text) == 1 and preset.text[0].pooled:
        return [ENCODERS[1]]  # the refiner of Stable Diffusion XL
    return list(ENCODERS[: len(preset.text)])


TEXT_TO_EMBEDDING = ("prior", "prior_text_encoder", "prior_tokenizer", "prior_scheduler")
"""What StableUnCLIPPipeline has in place of the picture encoder of its Img2Img form."""


def with_foreign(index: Mapping[str, Any], configs: Configs) -> dict[str, Any]:
    """An index with the components that are no part of a preset, and of the pipeline for them."""
    index = {**index, **_foreign_lines(configs)}
    if "prior" in index and "image_encoder/config.json" not in configs:
        index["_class_name"] = "StableUnCLIPPipeline"
        for name in ("image_encoder", "feature_extractor"):
            index.pop(name, None)
    return index


def needed_components(preset: Preset, index: Mapping[str, Any]) -> list[str]:
    """Components without which an index's pipeline does not load, and that no preset has."""
    needs = list(pipeline_family(preset).needs)
    if index["_class_name"] != "StableUnCLIPPipeline":
        return needs
    needs = [name for name in needs if name not in ("image_encoder", "feature_extractor")]
    return [*TEXT_TO_EMBEDDING, *needs]


def _foreign_lines(configs: Configs) -> dict[str, list[str]]:
    """The index's lines on the components that are no part of a preset; known classes only."""
    lines = {
        name: list(names)
        for name, (_, names) in FOREIGN.items()
        if f"{name}/config.json" in configs
    }
    for name, file in PLAIN_FILES.items():
        config = configs.get(f"{name}/{file}", {})
        if config.get("_class_name") in (*CLASSES_OF_SCHEDULERS, "UnCLIPScheduler"):
            lines[name] = ["diffusers", config["_class_name"]]
        elif config.get("tokenizer_class") in CLASSES["prior_tokenizer"]:
            lines[name] = ["transformers", config["tokenizer_class"]]
        elif config.get("image_processor_type") in IMAGE_PROCESSORS:
            lines[name] = ["transformers", config["image_processor_type"]]
    return lines
