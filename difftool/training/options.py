"""The options of `train`, and what they say of a run. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftool.config import options
from difftool.config.keys import NAMED, values_of
from difftool.config.layers import Layer, preset_names
from difftool.config.numbers import COUNT, Within
from difftool.config.options import DEVICE, OFFLINE, SET, Option
from difftool.config.schema import RECIPES, Part
from difftool.evaluation.options import EVALUATION, LEAST, MADE
from difftool.evaluation.options import PANEL as EVALUATION_PANEL
from difftool.progress import Progress, silent
from difftool.storage.shards import MAX_SHARD_SIZE, parse_size
from difftool.training.run.evaluation import Evaluation
from difftool.training.run.stop import Stopping, interrupt_again
from difftool.training.step.optim import OPTIMIZERS

NAMED.update({f"{recipe}.optimizer": lambda: OPTIMIZERS for recipe in RECIPES.values()})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is computed, kept and shown, as the options have it; none of it changes what is
    learned."""

    device: str = "cpu"
    workers: int | None = None
    """Threads that prepare batches ahead; None = as many as the device can use."""
    compile: bool = False
    """Run the U-Net through torch's compiler."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_minutes: float = 10.0
    """Minutes of work that a kill may cost, at most."""
    keep: int = 2
    """Checkpoints that are kept."""
    max_shard_size: int = parse_size(MAX_SHARD_SIZE)
    """Bytes beyond which the finished model is split into shards."""
    sample_every: int | None = None
    """Steps between sample sheets, with measures; 0 = none, None = at growing intervals."""
    evaluations: Mapping[Part, Evaluation] = field(default_factory=dict)
    """The same for each part, and how much it is, as it was planned."""
    sample_prompt: Sequence[str] = ()
    """Of the samples, in place of captions of the data."""
    likelihood: bool = False
    """Whether bits per dimension of held-out pictures are measured too."""
    data: str = ""
    """For the report: what the user calls the data."""
    choices: Sequence[tuple[str, Any, str]] = ()
    """For the report: (key, value, origin) of the configuration that is not the preset's."""
    changes: Sequence[tuple[str, Any, Any]] = ()
    """For run.json: (key, value before, value now) of what a resumed run does otherwise."""
    progress: Progress = silent
    """Shows how pictures are read and encoded."""
    stopping: Stopping = interrupt_again
    """Answers signals, while the step is finished and saved."""


def _row(name: str, panel: str, help: str, **more: Any) -> Option:
    return Option(name=name, panel=panel, help=help, **more)


def _values(key: str) -> Callable[[], Sequence[str]]:
    return lambda: values_of(key)


MODEL, TRAINING, DATA, LORA, FOLDER = "Model", "Training", "Data", "LoRA", "Run folder"
DISTILL = "Distillation"
RESUMES = ("resume", "resume_from")

# fmt: off
OPTIONS = (
    _row("data", DATA, 'A folder of pictures, "shapes", or a .txt of captions to distil on',
         argument=True, required=True, metavar="DATA"),
    _row("labels", DATA, "What pictures are conditioned on", key="data.labels",
         choices=_values("data.labels"), default="auto"),
    _row("caption_column", DATA, "Column of the metadata with the captions",
         key="data.caption_column", default="text, caption, prompt"),
    _row("shuffle_captions", DATA, "Shuffle captions that are tags between commas", type=bool,
         key="data.shuffle_captions"),
    _row("keep_tokens", DATA, "Shuffled tags that stay in front", type=int,
         key="data.keep_tokens"),
    _row("crop", DATA, "Part of a picture that is used", key="data.crop",
         choices=_values("data.crop"), default="centre"),
    _row("background", DATA, "Below transparent pixels: a name, #rrggbb", metavar="COLOUR",
         key="data.background", default="white"),
    _row("buckets", DATA, "Frames of the pictures' own shapes, not squares", type=bool,
         flags=("--buckets/--no-buckets",), key="data.buckets", default="chosen"),
    _row("validation", DATA, "Pictures that are measured and never trained on; 0 = none",
         type=float, metavar="SHARE|COUNT", key="train.validation", default="chosen"),
    _row("allow_bad", DATA, "Go on with many unusable pictures", type=bool,
         key="data.allow_bad"),
    _row("allow_uncaptioned", DATA, "Go on where many pictures lack a caption", type=bool,
         key="data.allow_uncaptioned"),

    _row("preset", MODEL, "Model and recipe, a .yaml file or one of", choices=preset_names,
         read=str, metavar="PRESET", default="chosen"),
    _row("from_", MODEL, "Fine-tune this model", flags=("--from",), metavar="MODEL",
         excludes=("preset",)),
    _row("vae", MODEL, "Work in this model's latents, as they are", metavar="MODEL"),
    _row("vision", MODEL, "Picture encoder of this unCLIP model: a prior learns what it says",
         metavar="MODEL", excludes=("vae", "lora", "distill")),
    _row("part", MODEL, "Train this part alone", choices=lambda: RECIPES, default="the preset's"),
    _row("size", MODEL, "Side of the pictures", type=int, key="train.size",
         default="chosen"),

    _row("steps", TRAINING, "Optimiser steps", type=int, key="train.steps",
         default="chosen"),
    _row("batch_size", TRAINING, "Pictures a batch", type=int,
         key="train.batch_size", default="chosen"),
    _row("accumulate", TRAINING, "Batches an optimiser step", type=int,
         key="train.accumulate", default="1"),
    _row("lr", TRAINING, "Peak learning rate", type=float, key="train.lr",
         default="the preset's"),
    _row("optimizer", TRAINING, "Optimiser", key="train.optimizer", choices=lambda: OPTIMIZERS,
         default="adamw"),
    _row("stop_when_worse", TRAINING, "Stop where held-out pictures get worse; keep the best",
         type=bool, key="train.stop_when_worse"),
    _row("augment", TRAINING, "How often pictures are changed, and the network told so; 0.12",
         type=float, metavar="SHARE", key="train.augment", default="0"),
    _row("ema", TRAINING, "Moving average of the weights", type=bool, flags=("--ema/--no-ema",)),
    _row("precision", TRAINING, "Arithmetic", key="train.precision",
         choices=_values("train.precision"), default="auto"),
    _row("seed", TRAINING, "Seed of everything random", type=int, key="train.seed",
         default="0"),
    _row("workers", TRAINING, "Threads that prepare batches ahead", type=int,
         within=Within(low=0, high=256), default="0 on CPU, up to 4 on GPU"),
    _row("compile", TRAINING, "Run the U-Net through torch's compiler", type=bool),

    _row("distill", DISTILL, "Distil --from into a model of few steps", key="train.distill.method",
         choices=lambda: values_of("train.distill.method")[1:], needs=("from_", *RESUMES),
         why="needs the model that is to be distilled"),
    _row("teacher_samples", DISTILL, "Pictures that the teacher draws, in place of the data's",
         type=int, key="train.distill.samples", needs=("distill", *RESUMES),
         why="are drawn by the model that is distilled", default="0; of captions alone chosen"),

    _row("lora", LORA, "Train a LoRA of --from, not the model itself", type=bool,
         needs=("from_", *RESUMES), why="needs the model that it is to be a LoRA of"),
    _row("rank", LORA, "Size of the LoRA's matrices", type=int, within=COUNT,
         needs=("lora", *RESUMES), why="is a LoRA's", default="16"),

    _row("out", FOLDER, "Run folder", type=Path, default="runs/DATA-NNN"),
    _row("resume", FOLDER, "Continue the run in --out from its newest checkpoint", type=bool,
         needs=("out",), why="needs the run to continue"),
    _row("resume_from", FOLDER, "Continue from this checkpoint", type=Path, needs=("out",),
         why="needs the run to continue"),
    _row("allow_change", FOLDER, "Continue with settings that change what is learned", type=bool,
         needs=RESUMES, why="needs a run to continue"),
    _row("save_every", FOLDER, "Steps between checkpoints", type=int, within=COUNT,
         default=str(RunOptions.save_every)),
    _row("save_minutes", FOLDER, "Minutes of work that a kill may cost, at most", type=float,
         within=Within(above=0), default=f"{RunOptions.save_minutes:g}"),
    _row("keep", FOLDER, "Checkpoints kept", type=int, within=COUNT, default=str(RunOptions.keep)),
    _row("sample_every", FOLDER, "Steps between sample sheets, with measures; 0 = none", type=int,
         within=Within(low=0), default="growing, about 5 % of the time"),
    _row("sample_prompt", FOLDER, "Prompt of the sample sheets; repeatable", many=True,
         blank=True, default="captions of the data"),
    _row("likelihood", FOLDER, "Measure bits per dimension of held-out pictures too", type=bool),
    _row("max_shard_size", FOLDER, "Split a larger model: 500MB", metavar="SIZE",
         read=parse_size, default=MAX_SHARD_SIZE),
    *EVALUATION,
    _row("evaluate_num", EVALUATION_PANEL, "Pictures made for it", type=int,
         within=Within(low=LEAST), needs=("evaluate",), why="is how many are compared",
         default=f"as many as the reference has, at most {MADE}"),
    DEVICE, SET, OFFLINE,
)
"""Those that the command and the library have."""
# fmt: on
SHARED = {"seed", "precision", "validation"}
"""Values of the recipes of all parts; others are those of the part that is trained."""


def option_layers(values: Mapping[str, Any], part: Part) -> list[Layer]:
    """What the options say of a preset, a layer each, where that part is trained."""
    layers = []
    for flag, nested in options.option_layers(OPTIONS, values):
        if recipe := nested.get("train"):
            names = RECIPES.values() if recipe.keys() <= SHARED else [RECIPES[part]]
            nested = dict.fromkeys(names, recipe)
        layers.append(Layer(flag, nested))
    return layers
