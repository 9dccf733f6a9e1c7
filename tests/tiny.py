"""Models that are small enough to be made, trained and converted in a test."""

from __future__ import annotations

from typing import Any

import torch

from difftool.config.layers import load_preset, merged
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.pipeline.model import Model

UNET = {"channels": [8, 8], "blocks": 1, "groups": 4, "head_dim": 4}
"""For any preset, and the smallest that there are."""
ATTENTION_UNET = {
    "channels": [16, 16], "blocks": 1, "depth": [0, 1], "groups": 8, "head_dim": 8,
}  # fmt: skip
TEXT_UNET = ATTENTION_UNET | {"context_dim": 16, "vector_dim": 8}
"""One that reads TEXT."""
TEXT = {
    "width": 16, "layers": 1, "heads": 2, "mlp": 32, "activation": "gelu", "vocab_size": 300,
    "length": 16, "tokenizer": "learned", "pooled": True, "projection": 8,
}  # fmt: skip
VAE = {"kind": "vae", "widths": [8, 8], "blocks": 1, "groups": 4}
LATENT = {
    "extends": "ldm-small",
    "about": "for tests",
    "codec": VAE | {"patch": 1, "latent_channels": 4, "widths": [8, 16, 16]},
    "unet": TEXT_UNET | {"in_channels": 4, "out_channels": 4},
    "text": [TEXT],
}
"""A preset's file of three parts to train, but for how they are trained."""
BLOCKS = {"kind": "space_to_depth", "block": 2}
"""A codec without weights, from 3 channels to 12."""
TRAIN = {"size": 16, "batch_size": 4, "steps": 12, "warmup": 2}


def settings(**parts: dict[str, Any]) -> list[str]:
    """The values of parts of a preset as --set takes them: settings(unet=UNET)."""
    return [f"{part}.{key}={value}" for part in parts for key, value in parts[part].items()]


def small(name: str, *values: dict[str, Any]) -> Preset:
    """The preset of that name with values laid over it."""
    return build_preset(merged([to_values(load_preset(name)), *values]))


def preset(channels: int = 3, **values: Any) -> Preset:
    """A preset of its own: a U-Net of so many channels that predicts eps on a discrete path."""
    base = {
        "name": "tiny",
        "about": "for tests",
        "unet": {**UNET, "depth": [0, 0], "in_channels": channels, "out_channels": channels},
        "path": {"kind": "sd15"},
        "target": "eps",
    }
    return build_preset(merged([base, values]))


def model(preset: Preset, seed: int = 0, deviation: float = 0.1, **options: Any) -> Model:
    """Fresh but for noise on all weights: a fresh network's last layer is zero, and so is what it
    says."""
    made = Model.fresh(preset, seed=seed, **options)
    generator = torch.Generator().manual_seed(0)
    for part in made.parts().values():
        for parameter in part.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += deviation * noise
    return made
