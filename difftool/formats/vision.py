"""What an unCLIP model sees pictures with: its encoder and the noise of embeddings. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from difftool.config.networks import VisionConfig
from difftool.diffusion.path import Path, build_path
from difftool.errors import InputError
from difftool.formats.schedulers import read_scheduler

ENCODER, NOISING = "image_encoder/config.json", "image_noising_scheduler/scheduler_config.json"
FIELDS = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "mlp", "image_size": "size", "patch_size": "patch",
    "projection_dim": "projection",
}  # fmt: skip
DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12} | {
    "intermediate_size": 3072, "image_size": 224, "patch_size": 32, "projection_dim": 512
}  # fmt: skip
"""transformers' for CLIPVisionConfig."""


class Vision(NamedTuple):
    """The encoder, and the noise path of its embeddings."""

    config: VisionConfig
    path: Path


def read_vision(configs: Mapping[str, Any]) -> Vision | None:
    """What the configuration files of a diffusers folder say of it; None if there is none.

    InputError if it is of another kind.
    """
    if ENCODER not in configs or NOISING not in configs:
        return None
    told = DEFAULTS | configs[ENCODER]
    values = {ours: told[theirs] for theirs, ours in FIELDS.items()}
    activation = told.get("hidden_act", "quick_gelu")
    if not all(type(v) is int for v in values.values()) or activation not in ("quick_gelu", "gelu"):
        raise InputError(f"{ENCODER} is not a picture encoder of CLIP's kind")
    try:
        config = VisionConfig(**values, activation=activation)
    except ValueError as error:
        raise InputError(f"{ENCODER} contradicts itself", str(error)) from None
    return Vision(config, build_path(read_scheduler(configs[NOISING], NOISING).path))
