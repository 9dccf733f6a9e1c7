"""Priors, as diffusers has them: PriorTransformer with its own text encoder and scheduler.
Torch-free.

One lies in a folder of StableUnCLIPPipeline, beside the U-Net that it says pictures to, or of
UnCLIPPipeline (karlo), or is a model of difftool's own. In a model that was read from the first its
tensors are kept beside the model's, under diffusers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from difftool.config.networks import EmbeddingConfig, PriorConfig
from difftool.config.schema import Preset, SampleConfig
from difftool.config.validate import build_preset, to_values
from difftool.errors import InputError
from difftool.formats.diffusers import networks
from difftool.formats.diffusers.components import component_tensors, our_name
from difftool.formats.diffusers.fields import INT, Fields, Row, build, read_rows
from difftool.formats.diffusers.schedulers import read_scheduler
from difftool.formats.diffusers.tokenizers import pad_id, read_pad
from difftool.formats.model_source import EXTRA, Evidence, ModelSource, open_model
from difftool.storage.strict_json import read_json
from difftool.storage.tensors import Located

PRIOR, SCHEDULER = "prior/config.json", "prior_scheduler/scheduler_config.json"
TEXT, TOKENIZER = "prior_text_encoder/config.json", "prior_tokenizer/tokenizer_config.json"
PREFIXES = {f"{EXTRA}diffusers.prior.": "unet.", f"{EXTRA}diffusers.prior_text_encoder.": "text.0."}
"""Of a prior's tensors beside a model, and in a model of its own."""
STEPS, GUIDANCE = 25, 4.0
"""Of StableUnCLIPPipeline."""
CLASS = "PriorTransformer"
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "embedding_dim": 768,
    "num_embeddings": 77, "additional_embeddings": 4, "dropout": 0.0, "time_embed_act_fn": "silu",
    "norm_in_type": None, "embedding_proj_norm_type": None, "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd", "time_embed_dim": None, "embedding_proj_dim": None,
    "clip_embed_dim": None,
}  # fmt: skip
"""Of that class."""
ROWS = (
    Row("num_attention_heads", "heads", INT),
    Row("num_layers", "layers", INT),
    Row("embedding_dim", "in_channels", INT),
    Row("embedding_dim", "context_dim", INT),
    Row("num_embeddings", "length", INT),
)
UNCLIP_CLASS = "UnCLIPScheduler"
UNCLIP: dict[str, Any] = {
    "num_train_timesteps": 1000, "variance_type": "fixed_small_log", "clip_sample": True,
    "clip_sample_range": 1.0, "prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2",
}  # fmt: skip
"""Its defaults. It is DDPM's on timesteps from the last to the first."""


def open_prior(path: Path) -> ModelSource:
    """The prior of a folder of diffusers, of its sub-folder prior/, or in a model; InputError if
    there is none, or one that difftool does not have."""
    if path.is_dir():
        config = path / "config.json"
        if config.is_file() and read_json(config).get("_class_name") == CLASS:
            path = path.parent
        if (path / PRIOR).is_file():
            return _of_folder(path)
    source = open_model(path)
    if source.preset.unet.kind == "prior":
        return source
    if found := prior_within(source):
        return found
    hint = "give a folder of UnCLIPPipeline or StableUnCLIPPipeline, or what --part prior trained"
    raise InputError(f"{path} holds no prior", f"it is of family {source.preset.family}", hint)


def steps_singly(source: ModelSource) -> bool:
    """Whether diffusers steps a model's own prior to the timestep before, whichever comes next:
    StableUnCLIPPipeline does not tell an UnCLIPScheduler where the next step begins."""
    scheduler = source.configs.get(SCHEDULER, {})
    return PRIOR in source.configs and scheduler.get("_class_name") == UNCLIP_CLASS


def prior_within(source: ModelSource) -> ModelSource | None:
    """The prior that a model came with; None if there is none. InputError if difftool does not
    have it."""
    if PRIOR not in source.configs:
        return None
    for file in (SCHEDULER, TEXT):
        if file not in source.configs:
            raise InputError(f"{source.path} has a prior without {file.partition('/')[0]}")
    tensors = {
        ours + name.removeprefix(theirs): place
        for theirs, ours in PREFIXES.items()
        for name, place in source.tensors.items()
        if name.startswith(theirs)
    }
    pad = read_pad(source.configs.get(TOKENIZER, {}), TOKENIZER)
    files = {file: source.configs[file] for file in (PRIOR, SCHEDULER, TEXT)}
    return _source(source.path, files, tensors, pad)


def _of_folder(folder: Path) -> ModelSource:
    """The prior of a folder, with the text encoder that is called its own if there is one."""
    parts = []
    for name in ("text_encoder", "tokenizer"):
        where = next((n for n in (f"prior_{name}", name) if (folder / n).is_dir()), None)
        if where is None:
            raise InputError(f"the prior in {folder} has no {name}", f"there is no {name}/")
        parts.append(where)
    encoder, tokenizer = parts
    files = {}
    for file, place in ((PRIOR, PRIOR), (SCHEDULER, SCHEDULER), (TEXT, f"{encoder}/config.json")):
        if not (folder / place).is_file():
            name = place.partition("/")[0]
            raise InputError(f"the prior in {folder} has no {name}", f"there is no {place}")
        files[file] = read_json(folder / place, infinite=True)
    prior = component_tensors(folder / "prior", "diffusion_pytorch_model").tensors
    text = component_tensors(folder / encoder, "model").tensors
    tensors = {f"unet.{name}": place for name, place in prior.items()}
    for name, place in text.items():
        if ours := our_name("text_encoder", name):
            tensors[f"text.0.{ours}"] = place
    return _source(folder, files, tensors, pad_id(folder / tokenizer), f"{encoder}/config.json")


def _source(
    path: Path,
    files: Mapping[str, Any],
    tensors: dict[str, Located],
    pad: int | None,
    encoder: str = TEXT,
) -> ModelSource:
    """The model that a prior is, of its configuration files. encoder: where that of the text
    encoder lies."""
    network = read_prior(files[PRIOR], f"{path}/{PRIOR}")
    where = f"{path}/{encoder}"
    use: dict[str, Any] = {"pad_id": pad, "pooled": True}
    text = networks.read_text(files[TEXT], where, projected=True, **use)
    if (projection := tensors.get("text.0.text_projection.weight")) is None:
        raise InputError(f"the prior's text encoder in {path} has no projection")
    text = replace(text, projection=projection.info.shape[0])
    where = f"{path}/{SCHEDULER}"
    scheduling = read_scheduler(_as_ddpm(files[SCHEDULER], where), where)
    codec = EmbeddingConfig(width=network.in_channels)
    preset = Preset(
        name=path.resolve().name,
        about="text to the embedding of a picture",
        family="unclip-prior",
        codec=codec,
        unet=network,
        text=(text,),
        path=scheduling.path,
        target=scheduling.target,
        sample=SampleConfig(
            size=(codec.factor, codec.factor), steps=STEPS, guidance=GUIDANCE, **scheduling.sample
        ),
    )
    return ModelSource(
        kind="diffusers",
        path=path,
        file=tensors["unet.prd_embedding"].file if "unet.prd_embedding" in tensors else path,
        preset=build_preset(to_values(preset), f"the prior of {path}", InputError),
        tensors=tensors,
        findings=(Evidence(SCHEDULER, scheduling.says),),
        warnings=scheduling.warnings,
    )


def _as_ddpm(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A scheduler's file, that of UnCLIPScheduler as DDPM's: the same steps."""
    if config.get("_class_name") != UNCLIP_CLASS:
        return dict(config)
    known = UNCLIP | {name: value for name, value in config.items() if name in UNCLIP}
    f = Fields(known, UNCLIP, where)
    f.one_of("beta_schedule", "squaredcos_cap_v2")
    f.one_of("prediction_type", "epsilon", "sample")
    return known | {"_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}


def read_prior(config: Mapping[str, Any], where: str) -> PriorConfig:
    """The network of a config.json; InputError if difftool does not have it."""
    if (name := config.get("_class_name")) != CLASS:
        what = f"{where} is of a class that difftool does not have"
        raise InputError(what, f"_class_name = {name}")
    f = Fields(config, DEFAULTS, where)
    f.ignore("dropout")  # of training
    values = read_rows(f, ROWS)
    width = values["heads"] * f.get("attention_head_dim", int)
    f.one_of("time_embed_dim", None, width)
    f.one_of("clip_embed_dim", None, values["in_channels"])
    pooled = f.get("embedding_proj_dim", (int, type(None)))
    f.finish()
    vector = values["in_channels"] if pooled is None else pooled
    return build(PriorConfig, where, width=width, vector_dim=vector, **values)
