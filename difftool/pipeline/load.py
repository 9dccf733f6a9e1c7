"""From a MODEL argument to a model with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from difftool.adapters.lora.algebra import apply, open_loras, sampled_by
from difftool.adapters.lora.file import changed_by
from difftool.config.families import family
from difftool.config.kinds import CodecConfig
from difftool.config.networks import VaeConfig
from difftool.config.schema import Preset
from difftool.engine.resident import hold
from difftool.errors import InputError, UsageError, first_line
from difftool.formats import open_model
from difftool.formats.autoencoder import open_autoencoder
from difftool.formats.model_source import EXTRA, UNKNOWN, ModelSource, Overrides
from difftool.formats.prior import open_prior, prior_within, steps_singly
from difftool.formats.unclip import read_vision
from difftool.hub.find import find_model
from difftool.networks.base import Network
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
    prior: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    allow_unused: bool = False,
    low_memory: bool = False,
) -> Model:
    """A model from wherever a MODEL argument points to; what was decided is in `.notes`.

    vae: an autoencoder, or another model with one, that stands in. prior: what makes an unCLIP
    model one of text, in place of its own if it has one. loras: files and their strengths, applied
    to the weights in order; allow_unused: though the model lacks some of their layers. low_memory:
    the weights of a network are there only while it is at work. UsageError if nothing is there,
    InputError if it is malformed or not supported.
    """
    target = pick_device(device)
    if dtype == "auto":
        dtype = "fp32" if target.type != "cuda" else "fp16"
    half = dtype != "fp32"
    path = find_model(where, half=half)
    other = None if vae is None else find_model(vae, half=half)
    # a model may have none of its own, whose structure is then that of the other
    codec = None if other is None else open_autoencoder(other, VaeConfig())[0]
    learned = codec if codec is not None and codec.learned else None
    source = open_model(path, Overrides(codec=learned))
    preset, vae_source = source.preset, source
    _check_whole(source, preset, path)
    if vae is not None and other is not None:
        codec, vae_source = open_autoencoder(other, preset.codec)
        preset = _with_codec(preset, codec, vae)
    model = Model(preset, source.tokenizer_json)
    model.device, model.file, model.low_memory = target, source.file, low_memory
    model.files = _files_of(source, vae_source)
    _build_vision(model, source)
    shapes = {name: place.info.shape for name, place in source.tensors.items()}
    model.open_loras = partial(
        open_loras, shapes=shapes, unet=preset.unet, name=model.name, allow_unused=allow_unused
    )
    model.loras = model.open_loras(loras)
    model.base_loras = tuple(model.loras)
    model.preset = sampled_by(preset, model.loras)
    theirs = prior_within(source) if prior is None else open_prior(find_model(prior, half=half))
    if theirs is not None:
        model.prior = _prior_of(model, theirs, prior)
        model.prior.single_steps = prior is None and steps_singly(source)
        _load_parts(model.prior, theirs, dtype, vae=theirs)
    _load_parts(model, source, dtype, vae=vae_source)
    model.notes = [f"model {model.name} ({path})", *source.evidence, f"{dtype} on {target}"]
    model.warnings = [*dict.fromkeys((*source.warnings, *vae_source.warnings))]
    model.notes += [f"autoencoder of {vae}"] if vae else []
    model.notes += map(str, model.loras)
    if model.preset.sample != preset.sample:
        own = model.preset.sample
        steps = f"{own.steps} step{'s' * (own.steps != 1)} of {own.sampler}"
        model.notes.append(f"sampled as its LoRA asks: {steps}, guidance {own.guidance:g}")
    if theirs is not None and model.prior is not None:
        model.notes.append(f"prior {model.prior.name} ({theirs.path})")
        model.warnings += [w for w in theirs.warnings if w not in model.warnings]
        model.warnings += [SINGLE_STEPS] if model.prior.single_steps else []
    return model


def _files_of(*sources: TensorSource) -> tuple[Path, ...]:
    return tuple({place.file for source in sources for place in source.tensors.values()})


def sample_as(model: Model, recipe: Preset) -> None:
    """Let a model be sampled as a preset is (Turbo's way, say, which no tensor shows)."""
    model.preset = replace(model.preset, sample=recipe.sample, scheduler=recipe.scheduler)
    model.notes.append(f"sampled as by preset {recipe.name}")


def _load_parts(model: Model, source: ModelSource, dtype: str, vae: TensorSource) -> None:
    """Give all parts their weights, or with little memory the means to them."""
    for prefix in model.all_parts():
        origin = vae if prefix == "vae" else source
        model.loaders[prefix] = partial(_load_weights, model, prefix, origin, DTYPES[dtype])
    if model.low_memory:
        for part in model.all_parts().values():
            part.to(DTYPES[dtype])
    else:
        for load in model.loaders.values():
            load()


SINGLE_STEPS = (
    "as in diffusers, the prior of this folder steps to the timestep before, whichever comes next, "
    "which leaves its embeddings noisy; --prior with the same folder steps as karlo does"
)


def _prior_of(model: Model, source: ModelSource, given: str | None) -> Model:
    """The prior of an unCLIP model, still without weights. given: the argument that names it; None:
    it is the model's own.

    UsageError for a model that is told no picture, or embeddings of another width.
    """
    network, where = source.preset.unet, given or str(source.path)
    if not family(model.preset.family).vision:
        raise UsageError(f"the model {model.name} takes no --prior", hint="unCLIP models do")
    if model.normalizer is None:
        why = "nothing says how noise is added to embeddings (image_noising_scheduler)"
        raise InputError(f"the model {model.name} cannot be used with a prior", why)
    width = (model.preset.unet.vector_dim or 0) // 2
    if network.in_channels != width:
        why = f"its embeddings are {network.in_channels} wide, and {model.name} is told {width}"
        hint = "a prior goes with the picture encoder that it was trained for"
        raise UsageError(f"the prior of {where} does not fit the model {model.name}", why, hint)
    prior = Model(source.preset, source.tokenizer_json)
    prior.device, prior.file, prior.low_memory = model.device, source.file, model.low_memory
    prior.files = _files_of(source)
    return prior


def load_part_from(model: Model, source: ModelSource, part: str) -> None:
    """Give a model the weights of a part ("vae", "text", "unet") of another one, or for a time its
    picture encoder ("vision"), which a prior learns from."""
    if part == "vision":
        model.vision = _encoder_of(model)
        _load_weights(model, ENCODER, source, torch.float32)
        return
    for prefix in model.parts():
        if prefix.partition(".")[0] == part:
            _load_weights(model, prefix, source, torch.float32, neutral=True)


def check_part_of(model: Model, source: ModelSource, part: str) -> None:
    """InputError if `load_part_from` would not find what it needs; no tensor is loaded."""
    if part == "vision":
        model.vision = _encoder_of(model)
        start = ENCODER.replace("vision.", f"{EXTRA}diffusers.") + "."
        found = {
            _vision_name(name.removeprefix(start)): place.info.shape
            for name, place in source.tensors.items()
            if name.startswith(start) and "position_ids" not in name
        }
        model.check_weights(ENCODER, found, str(source.path))
        return
    for prefix in model.parts():
        if prefix.partition(".")[0] == part:
            start = f"{prefix}."
            shapes = {
                name.removeprefix(start): place.info.shape
                for name, place in source.tensors.items()
                if name.startswith(start)
            }
            shapes = _neutral_shapes(model, prefix) | shapes
            model.check_weights(prefix, shapes, str(source.path))


ENCODER = "vision.image_encoder"


def _encoder_of(model: Model) -> ClipVision:
    """The picture encoder that a prior is trained by, which is no part of it."""
    encoder = model.codec.encoders()["vision"]
    assert isinstance(encoder, ClipVision)
    return encoder


def _check_whole(source: ModelSource, preset: Preset, path: Path) -> None:
    """InputError for a part of a model, or one with tensors that nobody knows."""
    if not any(name.startswith("unet.") for name in source.tensors):
        hint = "train the rest of the model with it: --vae, or --part unet"
        if base := preset.train.lora_base:
            run = path if path.is_dir() else path.parent
            hint = f"give -m {base} --lora {run / 'lora.safetensors'}"
        raise InputError(f"{path} holds a part of a model, without a U-Net", hint=hint)
    if preset.unet.kind == "prior":
        why = "it makes embeddings of pictures, and no pictures"
        raise InputError(f"{path} is a prior", why, "give it with --prior, to an unCLIP model")
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
    width = (model.preset.unet.vector_dim or 0) // 2
    with unwritten():
        if found.config is not None:
            model.vision = ClipVision(found.config)
            width = found.config.projection
        model.normalizer = Normalizer(width)
    model.vision_path = found.path


def _neutral_shapes(model: Model, prefix: str) -> dict[str, torch.Size]:
    """Shapes of the weights that a part may have beyond those of the model that it starts from."""
    part = model.all_parts()[prefix]
    names = part.neutral if isinstance(part, Network) else ()
    return {name: t.shape for name, t in part.state_dict().items() if name in names}


def _load_weights(
    model: Model, prefix: str, source: TensorSource, dtype: torch.dtype, neutral: bool = False
) -> None:
    """Give the part of that prefix its weights, LoRAs applied. neutral: those that change nothing
    while they are zero may be missing, and are zero."""
    part = model.all_parts()[prefix]
    theirs = prefix.replace("vision.", f"{EXTRA}diffusers.") + "."
    if prefix == "vision.image_normalizer":
        dtype = torch.float32
    # what LoRAs change they change before it is cast
    changed = changed_by(applied.lora for applied in model.loras)
    resident = model.low_memory and model.device.type == "cpu" and dtype == torch.float32
    kept = resident and isinstance(part, Network)
    tensors = source.load(theirs, str(model.device), None if kept else dtype, changed)
    if isinstance(part, Normalizer):  # OpenCLIP's embeddings are not normed
        tensors = tensors or part.nothing()
    if prefix == ENCODER:
        kept = (name for name in tensors if "position_ids" not in name)
        tensors = {_vision_name(name): tensors[name] for name in kept}
    if neutral:
        tensors = {n: torch.zeros(s) for n, s in _neutral_shapes(model, prefix).items()} | tensors
    apply(tensors, theirs, model.loras)
    model.set_weights(prefix, tensors, None if kept else dtype, str(source.path))
    if kept and isinstance(part, Network):
        hold(part)


def _vision_name(name: str) -> str:
    """Newer transformers leave the prefix out."""
    return name if name.startswith("vis") else f"vision_model.{name}"
