"""The parts of a model, trained one after the other into one run folder.

OUT/vae/ and OUT/clip/ are run folders of the parts that come first; OUT itself is the last one's.
A part that is done has its model.safetensors and is not trained again. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from difftool.config.families import family
from difftool.config.layers import Layer
from difftool.config.networks import EmbeddingConfig
from difftool.config.schema import Part, Preset
from difftool.config.validate import to_values
from difftool.diffusion.path import build_path
from difftool.errors import UsageError, missing
from difftool.formats import open_model
from difftool.formats.model_source import ModelSource
from difftool.formats.prior import open_prior
from difftool.formats.unclip import read_encoder
from difftool.storage.commit import sweep
from difftool.storage.runs import (
    CHECKPOINTS,
    CONFIG,
    FACTS,
    LOCK,
    MODEL,
    checkpoint_to_resume,
    checkpoints,
    nothing_to_resume,
    verify_checkpoint,
)
from difftool.storage.shards import written_at

CHANNELS = ("in_channels", "out_channels")
LCM_STEPS = 50
"""Of the grid "lcm" where nothing else is said."""


class Stage(NamedTuple):
    """One part of a run."""

    part: Part
    folder: Path
    checkpoint: Path | None
    """Where to go on from; None = from the start."""
    done: Path | None
    """Its finished model."""


def is_used(folder: Path) -> bool:
    """Whether a run folder already holds something."""
    if not folder.is_dir():
        return folder.exists()
    return any(p.name != FACTS and not p.name.startswith(".") for p in folder.iterdir())


def has_begun(folder: Path) -> bool:
    """Whether a run folder tells how the run in it was made; not if that was killed at once."""
    return is_used(folder) or not (folder / LOCK).exists()


def new_folder(data: str) -> Path:
    """The first free runs/DATA-NNN, created."""
    stem = Path(data).resolve().stem or "run"
    for number in range(1, 10_000):
        folder = Path("runs") / f"{stem}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UsageError(f"runs/{stem}-001 to -9999 all exist", hint="give --out")


def preset_of_run(folder: Path) -> str:
    """The configuration that a run folder was made with, as a preset file to resume with."""
    path = folder / CONFIG
    if not path.is_file():
        raise nothing_to_resume(folder, f"it has no {CONFIG}")
    return str(path)


def survey(
    out: Path, parts: Sequence[Part], *, resume: bool, resume_from: Path | None = None
) -> tuple[list[Stage], list[str]]:
    """How far each part of the run in `out` is, and notes on damaged checkpoints.

    UsageError if there is nothing to resume; a run that was stopped before its first checkpoint
    starts anew.
    """
    stages, notes = [], []
    for part in parts:
        last = part == parts[-1]
        folder = out if last else out / part
        model, checkpoint = folder / MODEL, None
        done = written_at(model) if resume and not last else None
        if resume_from is not None and last:
            checkpoint = _sound(resume_from)
        elif resume and not done:
            sweep(folder / CHECKPOINTS)
            if checkpoints(folder):  # if all are damaged, it does not start anew unasked
                checkpoint, more = checkpoint_to_resume(folder)
                notes += more
        stages.append(Stage(part, folder, checkpoint, done))
    if resume and not any(s.checkpoint or s.done for s in stages):
        if not (out / CONFIG).is_file():
            raise nothing_to_resume(out)
        notes.append("there is no checkpoint yet: the run starts anew")
    return stages, notes


def _sound(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise missing(f"checkpoint {checkpoint}")
    if problem := verify_checkpoint(checkpoint):
        raise UsageError(f"checkpoint {checkpoint} is damaged", problem)
    return checkpoint


def vocabulary(stages: Sequence[Stage]) -> str | None:
    """The learned vocabulary that the run already has."""
    for stage in stages:
        where = stage.done or (stage.checkpoint and stage.checkpoint / MODEL)
        if where and (text := open_model(where).tokenizer_json):
            return text
    return None


def with_codec_of(preset: Preset, model: Path) -> Preset:
    """The preset with the autoencoder of another model, as it describes itself."""
    return replace(preset, codec=open_model(model).preset.codec)


def vae_layer(flag: str, model: Path, source: ModelSource) -> Layer:
    """What --vae MODEL says: its autoencoder, and a U-Net with as many channels."""
    preset = source.preset
    if not preset.codec.learned:
        raise UsageError(f"{model} has no autoencoder", f"its codec is {preset.codec.kind}")
    channels = preset.codec.latent_channels
    values = {"codec": to_values(preset.codec), "unet": dict.fromkeys(CHANNELS, channels)}
    return Layer(flag, values)


def vision_layer(flag: str, model: Path, source: ModelSource) -> Layer:
    """What --vision MODEL says: the pictures that its encoder sees, and how wide embeddings are."""
    encoder = read_encoder(source.configs)
    if encoder is None:
        why = "models that vary a picture have one (StableUnCLIPImg2ImgPipeline)"
        raise UsageError(f"{model} has no picture encoder", why)
    width, side = encoder.projection, encoder.size
    values = {
        "codec": to_values(EmbeddingConfig(width=width, encoder=encoder)),
        "unet": {"in_channels": width},
        "train": {"size": side},
        "data": {"buckets": False},
    }
    return Layer(flag, values)


def open_start(model: Path, prior: bool) -> ModelSource:
    """A model that a run starts from. prior: it is the prior that lies there."""
    return open_prior(model) if prior else open_model(model)


def is_of_prior(part: str, preset: Preset) -> bool:
    """Whether a part that starts from a model takes it from the prior there."""
    return preset.unet.kind == "prior" and part != "vision"


def start_layers(model: Path, source: ModelSource) -> list[Layer]:
    """What --from MODEL says: everything about the model, whose U-Net alone goes on, with a gentler
    learning rate; how long and on what it was trained is its past."""
    values = dict(source.values)
    past = {"steps", "batch_size", "accumulate", "flip", "size", "validation", "distill"}
    train = {k: v for k, v in values.get("train", {}).items() if k not in past}
    part = "prior" if source.preset.unet.kind == "prior" else "unet"
    values |= {"train": train, "parts": [part], "data": {}}
    row = family(source.preset.family)
    lr = row.fine_tune_lr
    if row.fine_tune_share is not None:
        lr = row.fine_tune_share * float(train.get("lr", 1e-3))
    origin = "chosen: fine-tuning starts gently"
    return [Layer(f"--from {model}", values), Layer(origin, {"train": {"lr": lr}})]


DISTILLED = 0.25
"""Share of a recipe's learning rate by which a small model is distilled: its student learns to draw
otherwise, in a quarter of the steps."""
DRAWS = {"lcm": 4, "turbo": 1, "ect": 2}
"""Steps that a distilled model is sampled in, by how it was distilled."""
EMBEDDED = 2.0
"""The range of guidance scales that a student is told begins at 1, and ends at so many times the
model's own."""


def distill_layers(model: Path, source: ModelSource, asked: Preset) -> list[Layer]:
    """What --distill says: who teaches, what guidance is learned, and how the student is sampled.

    asked: the model as it is to be. UsageError for what it cannot be.
    """
    distill, own, preset = asked.train.distill, source.preset.sample, source.preset
    guidable = preset.text or len(preset.classes) == (preset.unet.num_classes or 0) - 1
    told = asked.unet.guidance_dim is not None
    if told and asked.train.lora_rank and not preset.unet.guidance_dim:
        why = "unet.guidance_dim is a layer of the model's own, which a LoRA has no room for"
        raise UsageError("a LoRA cannot be told the guidance scale", why, "leave --lora out")
    scale = own.guidance if guidable or told else 1.0
    scales, why = [scale, scale], "the model's own, which is learned with it"
    if told:
        scales, why = [1.0, EMBEDDED * scale], "the student is told the scale"
    elif distill.method == "ect":
        scales, why = [1.0, 1.0], "it learns from the pictures alone"
    steps = distill.ode_steps
    sample: dict[str, Any] = {
        **{"sampler": "lcm", "sampler_options": {}, "schedule": "lcm"},
        "schedule_options": {} if steps == LCM_STEPS else {"original_steps": steps},
        "steps": DRAWS[distill.method],
        "guidance": scale if told else 1.0,
        **{"guidance_rescale": 0.0, "guidance_interval": None},
    }
    if not build_path(preset.path).continuous:
        sample["start_noise"] = "unit"
    before = to_values(own)
    sample = {key: value for key, value in sample.items() if value != before[key]}
    scheduler = {"original_inference_steps": steps} if preset.scheduler else {}
    recipe: dict[str, Any] = {"drop": 0.0, "ema": 0.99}
    if family(preset.family).fine_tune_share is not None and not asked.train.lora_rank:
        recipe["lr"] = DISTILLED * preset.train.lr
    if distill.method == "ect":
        recipe |= {"time": "log_normal", "time_options": {"mean": -1.1, "std": 2.0}}
    return [
        Layer(f"--distill {distill.method}", {"train": {"distill": {"teacher": str(model)}}}),
        Layer(f"chosen: {why}", {"train": {"distill": {"guidance": scales}}}),
        Layer(
            f"chosen: usual of {distill.method}",
            {"sample": sample, "scheduler": scheduler, "train": recipe},
        ),
    ]


def lora_layers(model: Path, source: ModelSource, rank: int) -> list[Layer]:
    """What --lora says: small matrices are trained by AdamW, and the model stays as it is."""
    lr = family(source.preset.family).lora_lr
    values = {"lora_rank": rank, "lora_base": str(model)}
    gentle = {"optimizer": "adamw", "lr": lr}
    return [Layer("chosen: usual of a LoRA", {"train": gentle}), Layer("--lora", {"train": values})]
