"""The components of a diffusers folder: their files, their classes, the names of their tensors.
Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difftool.errors import InputError
from difftool.formats.layouts import NETWORKS
from difftool.storage.tensor_file import TensorSource, open_source

INDEX = "model_index.json"
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
    "prior": ("diffusion_pytorch_model", ("diffusers", "PriorTransformer")),
    "prior_text_encoder": ("model", ("transformers", "CLIPTextModelWithProjection")),
}
"""Components that are no part of a preset: the stem of their files, and their class. Their tensors
are kept beside the model's."""
PLAIN_FILES = {
    "scheduler": "scheduler_config.json",
    "low_res_scheduler": "scheduler_config.json",
    "image_noising_scheduler": "scheduler_config.json",
    "feature_extractor": "preprocessor_config.json",
    "prior_scheduler": "scheduler_config.json",
    "prior_tokenizer": "tokenizer_config.json",
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
    "unet": tuple(name for row in NETWORKS.values() for name in row.classes),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "prior_tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
} | {name: (names[1],) for name, (_, names) in FOREIGN.items()}


def stem_of(component: str) -> str:
    """The stem of a component's file of weights."""
    return WEIGHTS[component] if component in WEIGHTS else FOREIGN[component][0]


def our_name(component: str, name: str) -> str | None:
    """difftool's name of a component's tensor, without its prefix; None: it is no weight."""
    if component in (*ENCODERS, "prior_text_encoder"):
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


def json_text(value: Any) -> str:
    """A configuration file, as diffusers and transformers write it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
