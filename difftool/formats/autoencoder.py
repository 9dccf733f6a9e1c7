"""Autoencoders on their own: a file of one, in LDM's or diffusers' names, with or without a prefix,
or diffusers' folder of one. Torch-free.

No tensor says how large latents are meant to be: that is the configuration's, or the model's that
the autoencoder is for.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from difftool.config.kinds import CodecConfig
from difftool.config.networks import VaeConfig
from difftool.errors import InputError
from difftool.formats.diffusers.components import WEIGHTS, component_tensors, our_name
from difftool.formats.diffusers.networks import read_vae
from difftool.formats.kinds import kind_of
from difftool.formats.ldm import detect
from difftool.formats.ldm.names import VAE, usual_names
from difftool.formats.ldm.read import mapped
from difftool.formats.ldm.tables import vae_rules
from difftool.formats.model_source import model_at, open_place
from difftool.storage.strict_json import read_json
from difftool.storage.tensor_file import TensorSource

PREFIXES = ("first_stage_model.", "vae.", "")
BESIDE = re.compile(r"(loss|model_ema)\..+|(decay|num_updates|global_step)")
"""What training an autoencoder leaves beside it."""
LDM_NAMES = (
    (r"^(encoder|decoder)\.(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.\3.block."),
    (r"^encoder\.mid_block\.attentions\.0\.to_q\.", "encoder.mid.attn_1.q."),
)
"""From diffusers' names to LDM's, as far as they tell an autoencoder's structure."""


def open_autoencoder(path: Path, like: CodecConfig) -> tuple[CodecConfig, TensorSource]:
    """The autoencoder of a model of any format, or in a file or a folder of its own; its tensors
    are the source's vae.*.

    like: whose latents a file's are taken to be. UsageError if there is nothing at the path,
    InputError if there is no sound autoencoder.
    """
    opened = open_place(path)
    path, place = opened.path, opened.place
    config = path / "config.json"
    if isinstance(place, TensorSource) and opened.format is None:
        codec, source = None, place
    elif opened.format is None and config.is_file():
        codec = read_vae(read_json(config), str(config))
        source = component_tensors(path, WEIGHTS["vae"])
    else:  # or what is no model either, which it says
        model = model_at(opened)
        return model.preset.codec, model
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in source.tensors)), "")
    places = {n.removeprefix(prefix): p for n, p in source.tensors.items() if n.startswith(prefix)}
    places = {name: place for name, place in places.items() if not BESIDE.fullmatch(name)}
    theirs = any(".down_blocks." in name for name in places)
    if theirs:
        places = {our_name("vae", name) or name: place for name, place in places.items()}
    else:
        usual = usual_names(VAE + name for name in places)
        places = {usual[VAE + n].removeprefix(VAE): place for n, place in places.items()}
    if codec is None:
        shapes = {_ldm_name(name): place.info.shape for name, place in places.items()}
        try:
            codec = _like(detect.vae_config(shapes), like)
        except (KeyError, IndexError, ValueError, StopIteration):
            what, hint = f"{path} is not an autoencoder", "difftool convert FILE --inspect"
            raise InputError(what, kind_of(source.tensors)[1], hint) from None
    if not theirs:
        known = {rule.theirs for rule in vae_rules(codec)}
        if strange := [name for name in places if name not in known]:
            why = f"its tensor {places[strange[0]].name} is not known"
            raise InputError(f"{path} is not an autoencoder", why)
        places, _ = mapped(vae_rules(codec), places, str(path))
    tensors = {f"vae.{name}": place for name, place in places.items()}
    return codec, replace(source, tensors=tensors)


def _ldm_name(name: str) -> str:
    for pattern, new in LDM_NAMES:
        name = re.sub(pattern, new, name)
    return name


def _like(codec: VaeConfig, model: CodecConfig) -> VaeConfig:
    """An autoencoder with a model's scale of latents, where it has as many channels."""
    if model.kind != codec.kind or model.latent_channels != codec.latent_channels:
        return codec
    scaling = ("scale", "shift", "force_upcast", "latents_mean", "latents_std")
    return replace(codec, **{name: getattr(model, name) for name in scaling})
