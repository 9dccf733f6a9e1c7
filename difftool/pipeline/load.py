"""From a MODEL argument to a model with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from difftool.adapters.lora.algebra import apply, open_loras
from difftool.adapters.lora.file import changed_by
from difftool.config.families import family
from difftool.config.kinds import CodecConfig
from difftool.config.layers import load_preset
from difftool.config.networks import VaeConfig
from difftool.config.schema import Preset
from difftool.errors import InputError, UsageError, first_line
from difftool.formats import open_model
from difftool.formats.autoencoder import open_autoencoder
from difftool.formats.model_source import EXTRA, UNKNOWN, ModelSource, Overrides
from difftool.formats.unclip import read_vision
from difftool.hub.find import find_model
from difftool.networks.vision import ClipVision, Normalizer
from difftool.pipeline.model import DTYPES, Model, unwritten
from difftool.storage.tensor_file import TensorSource


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of that name; "auto" is the first of cuda, mps, cpu that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
        raise UsageError(f'device "{name}" cannot be used', why, "try --device cpu") from None
    return device


def load_model(
    where: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    vae: str | None = None,
    recipe: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    allow_unused: bool = False,
    low_memory: bool = False,
) -> Model:
    """A model from wherever a MODEL argument points to; what was decided is in `.notes`.

    vae: an autoencoder, or another model with one, that stands in. recipe: a preset, by whose way
    of sampling it is sampled (Turbo's, say, which no tensor shows). loras: files and their
    strengths, applied to the weights in order; allow_unused: though the model lacks some of their
    layers. low_memory: the weights of a network are there only while it is at work. UsageError if
    nothing is there, InputError if it is malformed or not supported.
    """
    target = pick_device(device)
    if dtype == "auto":
        dtype = "fp32" if target.type != "cuda" else "fp16"
    half = dtype != "fp32"
    path = find_model(where, half=half)
    theirs = None if vae is None else find_model(vae, half=half)
    # a model may have none of its own, whose structure is then that of the other
    codec = None if theirs is None else open_autoencoder(theirs, VaeConfig())[0]
    learned = codec if codec is not None and codec.learned else None
    source = open_model(path, Overrides(codec=learned))
    preset, vae_source = source.preset, source
    _check_whole(source, preset, path)
    if vae is not None and theirs is not None:
        codec, vae_source = open_autoencoder(theirs, preset.codec)
        preset = _with_codec(preset, codec, vae)
    if recipe is not None:
        chosen = load_preset(recipe)
        preset = replace(preset, sample=chosen.sample, scheduler=chosen.scheduler)
    model = Model(preset, source.tokenizer_json)
    model.device, model.file, model.low_memory = target, source.file, low_memory
    _build_vision(model, source)
    shapes = {name: place.info.shape for name, place in source.tensors.items()}
    model.loras = open_loras(loras, shapes, preset.unet, model.name, allow_unused=allow_unused)
    for prefix in model.all_parts():
        origin = vae_source if prefix == "vae" else source
        model.loaders[prefix] = partial(_load_weights, model, prefix, origin, DTYPES[dtype])
    if not low_memory:
        for load in model.loaders.values():
            load()
    model.notes = [f"model {model.name} ({path})", *source.evidence, f"{dtype} on {target}"]
    model.warnings = [*dict.fromkeys((*source.warnings, *vae_source.warnings))]
    model.notes += [f"sampled as by preset {recipe}"] if recipe else []
    model.notes += [f"autoencoder of {vae}"] if vae else []
    model.notes += map(str, model.loras)
    return model


def load_part_from(model: Model, source: ModelSource, part: str) -> None:
    """Give a model the weights of a part ("vae", "text", "unet") of another one."""
    for prefix in model.parts():
        if prefix.partition(".")[0] == part:
            _load_weights(model, prefix, source, torch.float32)


def check_part_of(model: Model, source: ModelSource, part: str) -> None:
    """InputError if `load_part_from` would not find what it needs; no tensor is loaded."""
    for prefix in model.parts():
        if prefix.partition(".")[0] == part:
            start = f"{prefix}."
            shapes = {
                name.removeprefix(start): place.info.shape
                for name, place in source.tensors.items()
                if name.startswith(start)
            }
            model.check_weights(prefix, shapes, str(source.path))


def _check_whole(source: ModelSource, preset: Preset, path: Path) -> None:
    """InputError for a part of a model, or one with tensors that nobody knows."""
    if not any(name.startswith("unet.") for name in source.tensors):
        hint = "train the rest of the model with it: --vae, or --part unet"
        if base := preset.train.lora_base:
            run = path if path.is_dir() else path.parent
            hint = f"give -m {base} --lora {run / 'lora.safetensors'}"
        raise InputError(f"{path} holds a part of a model, without a U-Net", hint=hint)
    if strange := [name for name in source.tensors if name.startswith(UNKNOWN)]:
        name = source.tensors[strange[0]].name
        raise InputError(f"{path} has an unknown tensor {name}", f"and {len(strange)} in all")


def _with_codec(preset: Preset, theirs: CodecConfig, where: str) -> Preset:
    """A preset with another autoencoder; UsageError if their latents differ."""
    ours = preset.codec
    if not theirs.learned or (
        (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor)
    ):
        why = f"{theirs.latent_channels} channels, {theirs.factor} times smaller"
        raise UsageError(f"the autoencoder of {where} does not fit the model {preset.name}", why)
    return replace(preset, codec=theirs)


def _build_vision(model: Model, source: ModelSource) -> None:
    """Build the picture encoder that an unCLIP model comes with."""
    found = read_vision(source.configs)
    if found is None or not family(model.preset.family).vision:
        return
    with unwritten():
        model.vision = ClipVision(found.config)
        model.normalizer = Normalizer(found.config.projection)
    model.vision_path = found.path


def _load_weights(model: Model, prefix: str, source: TensorSource, dtype: torch.dtype) -> None:
    """Give the part of that prefix its weights, LoRAs applied."""
    part = model.all_parts()[prefix]
    theirs = prefix.replace("vision.", f"{EXTRA}diffusers.") + "."
    if prefix == "vision.image_normalizer":
        dtype = torch.float32
    # what LoRAs change they change before it is cast
    changed = changed_by(applied.lora for applied in model.loras)
    tensors = source.load(theirs, str(model.device), dtype, changed)
    if isinstance(part, Normalizer):  # OpenCLIP's embeddings are not normed
        tensors = tensors or part.nothing()
    if prefix == "vision.image_encoder":
        kept = (name for name in tensors if "position_ids" not in name)
        tensors = {_vision_name(name): tensors[name] for name in kept}
    apply(tensors, theirs, model.loras)
    model.set_weights(prefix, tensors, dtype, str(source.path))


def _vision_name(name: str) -> str:
    """Newer transformers leave the prefix out."""
    return name if name.startswith("vis") else f"vision_model.{name}"
