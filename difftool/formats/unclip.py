"""What a single file of SD2 unCLIP sees pictures with, as diffusers has it. Torch-free.

The encoder is OpenCLIP's ViT-H, or OpenAI's ViT-L, under embedder.model.visual.; the statistics of
its embeddings are under noise_augmentor. where a file has them. Nothing says how embeddings are
noised: as the published configurations do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from difftool.config.networks import CLIP_MEAN, CLIP_STD, VisionConfig
from difftool.diffusion.path import Path, build_path
from difftool.errors import InputError
from difftool.formats.diffusers.fields import VERSION, build
from difftool.formats.diffusers.schedulers import CLASSES, read_scheduler
from difftool.formats.ldm import detect
from difftool.formats.ldm.tables import vision_rules
from difftool.formats.model_source import EXTRA
from difftool.formats.rules import Rule, Shape, placed

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
    """How a model is told of pictures by their embeddings."""

    config: VisionConfig | None
    """Of the encoder; None where a prior takes its place."""
    path: Path
    """Of the embeddings' noise."""


def read_vision(configs: Mapping[str, Any]) -> Vision | None:
    """What the configuration files of a diffusers folder say of it; None if they say nothing.

    InputError if the encoder is of another kind.
    """
    if NOISING not in configs:
        return None
    encoder = read_encoder(configs)
    return Vision(encoder, build_path(read_scheduler(configs[NOISING], NOISING).path))


def read_encoder(configs: Mapping[str, Any]) -> VisionConfig | None:
    """The picture encoder among the configuration files; None if there is none, InputError if it
    is of another kind."""
    if ENCODER not in configs:
        return None
    given = DEFAULTS | configs[ENCODER]
    values = {ours: given[theirs] for theirs, ours in FIELDS.items()}
    activation = given.get("hidden_act", "quick_gelu")
    if not all(type(v) is int for v in values.values()) or activation not in ("quick_gelu", "gelu"):
        raise InputError(f"{ENCODER} is not a picture encoder of CLIP's kind")
    return build(VisionConfig, ENCODER, **values, activation=activation)


VISUAL, AUGMENTOR = "embedder.model.visual.", "noise_augmentor.data_"
ENCODER_PREFIX, NORMALIZER_PREFIX = (
    f"{EXTRA}diffusers.image_encoder.",
    f"{EXTRA}diffusers.image_normalizer.",
)
NORMALIZER = "image_normalizer/config.json"
PROCESSOR = "feature_extractor/preprocessor_config.json"


class FileVision(NamedTuple):
    """The picture encoder of a file."""

    rules: list[Rule]
    configs: dict[str, Any]
    """diffusers' configuration files of it, by their place in a folder."""
    warnings: tuple[str, ...] = ()


NO_VISION = FileVision([], {})


def vision_of_file(shapes: Mapping[str, Shape]) -> FileVision:
    """The picture encoder among the tensors of a single file; nothing if it is not whole."""
    part = {n.removeprefix(VISUAL): s for n, s in shapes.items() if n.startswith(VISUAL)}
    try:
        config = detect.vision_config(part)
    except (KeyError, IndexError, ValueError, StopIteration):
        return NO_VISION
    rules = [*placed(vision_rules(config), VISUAL, ENCODER_PREFIX)]
    if any(shapes.get(rule.theirs) != rule.their_shape for rule in rules):
        return NO_VISION
    statistics = _statistics(config.projection)
    if all(shapes.get(rule.theirs) == rule.shape for rule in statistics):
        return FileVision([*rules, *statistics], _configs(config, statistics=True))
    if config.activation == "gelu":  # OpenCLIP's embeddings are not normed
        return FileVision(rules, _configs(config, statistics=False))
    configs = {name: c for name, c in _configs(config, False).items() if name != NOISING}
    lacks = "the statistics of its pictures' embeddings (ViT-L-14_stats.th) are not in the file"
    return FileVision(rules, configs, (lacks,))


def vision_rules_of(shapes: Mapping[str, Shape], configs: Mapping[str, Any]) -> list[Rule]:
    """The table of a picture encoder that a model has, for a single file; empty if it has none, or
    one of another kind."""
    try:
        found = read_encoder(configs)
    except InputError:
        return []
    if found is None:
        return []
    rules = [*placed(vision_rules(found), VISUAL, ENCODER_PREFIX)]
    statistics = _statistics(found.projection)
    if any(shapes.get(rule.ours[0]) != rule.shape for rule in rules):
        return []
    there = all(shapes.get(rule.ours[0]) == rule.shape for rule in statistics)
    return rules + statistics * there


def _statistics(width: int) -> list[Rule]:
    return [
        Rule(f"{AUGMENTOR}{n}", (f"{NORMALIZER_PREFIX}{n}",), (1, width)) for n in ("mean", "std")
    ]


def _configs(config: VisionConfig, statistics: bool) -> dict[str, Any]:
    size = config.size
    configs: dict[str, Any] = {
        ENCODER: {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
            "hidden_act": config.activation,
            "num_channels": 3,
            "layer_norm_eps": 1e-5,
        },
        NOISING: _noising(),
        PROCESSOR: {
            "image_processor_type": "CLIPImageProcessor",
            **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize"), True),
            **dict.fromkeys(("do_rescale", "do_resize"), True),
            "crop_size": {"height": size, "width": size},
            "size": {"shortest_edge": size},
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "resample": 3,
        },
    }
    if statistics:
        about = {"_class_name": "StableUnCLIPImageNormalizer", "_diffusers_version": VERSION}
        configs[NORMALIZER] = about | {"embedding_dim": config.projection}
    return configs


def _noising() -> dict[str, Any]:
    fields = CLASSES["DDPMScheduler"].defaults | {"beta_schedule": "squaredcos_cap_v2"}
    about = {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION}
    return about | dict(sorted(fields.items()))
