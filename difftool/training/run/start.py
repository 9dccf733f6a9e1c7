"""`train`, whole and without talk: from its options to a run that is under way.

Torch-free until the data is read and all that can be refused without torch is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.config.layers import (
    Layer,
    data_config,
    load_preset,
    origins,
    override_layers,
    preset_layers,
)
from difftool.config.schema import RECIPES, Part, Preset
from difftool.data import BUILTIN, Audit, Dataset, open_dataset
from difftool.errors import UsageError, clash
from difftool.formats import open_model
from difftool.hub.find import find_model, place_of_model
from difftool.storage import runs
from difftool.training.metrics import Metrics
from difftool.training.options import RunOptions, option_layers
from difftool.training.progress import Progress, silent
from difftool.training.run import stages as staged
from difftool.training.run.plan import complete, outline
from difftool.training.run.stages import Stage

if TYPE_CHECKING:
    import torch

    from difftool.training.run.estimate import Estimate
    from difftool.training.run.run import Run

LORA_RANK = 16
PARTS = ("unet", "text", "vae")
"""What a model gives another to start from."""


class Sources(NamedTuple):
    """What a run is made from, beside its data."""

    layers: list[Layer]
    """What the preset says, if one is named."""
    preset: str | None
    base: str | None
    """The model to fine-tune."""
    overrides: list[Layer]
    """What --set says."""


def find_sources(values: Mapping[str, Any]) -> Sources:
    """What the options of `train` name, as `read_options` gives them; UsageError for what is not
    there, and for a run folder that is not the one to begin or to go on with. Downloads nothing.
    """
    preset, base, out = values["preset"], values["from_"], values["out"] or Path()
    data, resumes = values["data"], values["resume"] or values["resume_from"]
    if not Path(data).exists() and data not in BUILTIN:
        open_dataset(data)  # which refuses it
    if values["lora"] and values["part"] not in (None, "unet"):
        raise clash("--lora", f"--part {values['part']}")
    if not resumes and values["out"] and staged.is_used(out):
        hint = "give --resume to continue it, or another --out"
        raise UsageError(f"the run folder {out} is not empty", hint=hint)
    if resumes and preset is None:
        preset, base = staged.preset_of_run(out), None
    for model in (base, values["vae"]):
        if model is not None:
            place_of_model(model)
    layers = preset_layers(preset) if preset is not None else []
    return Sources(layers, preset, base, override_layers(values["set"] or []))


def prepare(
    values: Mapping[str, Any],
    progress: Progress = silent,
    audited: Callable[[Audit], None] = lambda audit: None,
) -> Prepared:
    """Check the options of `train`, as `read_options` gives them, read the data, choose the rest.

    audited: called with what the data is found to be, before anything is made of it. Raises
    UsageError for what is wrong with the options or does not go together, InputError for data or
    models that cannot be used.
    """
    sources, out = find_sources(values), values["out"] or Path()
    part: Part | None = values["part"]
    given = option_layers(values, part or "unet")
    config = data_config([*sources.layers, *given, *sources.overrides])
    with progress("looking at files", None) as shown:
        dataset = open_dataset(values["data"], config, progress=lambda done, _: shown.update(done))
    audited(dataset.audit)
    if values["ema"] is not None:
        given.append(_ema_layer(values["ema"], sources.preset, RECIPES[part or "unet"]))
    adopt: dict[str, Path] = {}
    begin: list[Layer] = []
    tokenizer, odd = None, ()
    if sources.base is not None:
        base = find_model(sources.base)
        opened = open_model(base)
        begin, tokenizer, odd = staged.start_layers(base), opened.tokenizer_json, opened.warnings
        adopt = dict.fromkeys(PARTS, base)
        if values["lora"]:
            begin += staged.lora_layers(base, values["rank"] or LORA_RANK)
    elif values["rank"]:  # of a run that goes on
        given.append(Layer("--rank", {"train": {"lora_rank": values["rank"]}}))
    if values["vae"] is not None:
        adopt["vae"] = find_model(values["vae"])
        given.append(staged.vae_layer(f"--vae {values['vae']}", adopt["vae"]))
        part = part or "unet"
    outlined = outline(dataset, sources.preset, [*given, *sources.overrides], part, begin)
    stages, notes = staged.survey(
        out,
        outlined.preset.parts,
        resume=bool(values["resume"]),
        resume_from=values["resume_from"],
    )
    if base := outlined.preset.train.lora_base:
        adopt = dict.fromkeys(PARTS, find_model(base))

    from difftool.pipeline.load import pick_device
    from difftool.training.step import parallel

    device = parallel.join(pick_device(values["device"] or "auto"))
    tokenizer = staged.vocabulary(stages) or tokenizer
    preset, tokenizer, layers = complete(outlined, dataset, device.type, tokenizer)
    return Prepared(
        values=values,
        dataset=dataset,
        device=device,
        preset=preset,
        tokenizer_json=tokenizer,
        origins=list(origins(preset, layers)),
        stages=stages,
        adopt=adopt,
        notes=[*odd, *notes],
    )


def _ema_layer(wanted: bool, preset: str | None, recipe: str) -> Layer:
    """What --ema and --no-ema say: the preset's average, or one, or none."""
    decay = getattr(load_preset(preset), recipe).ema if preset else 0.999
    return Layer("--ema/--no-ema", {recipe: {"ema": (decay or 0.999) if wanted else 0.0}})


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin: everything is decided, nothing is written."""

    values: Mapping[str, Any]
    dataset: Dataset
    device: torch.device
    preset: Preset
    tokenizer_json: str | None
    """The learned vocabulary."""
    origins: list[tuple[str, Any, str]]
    """(key, value, origin) of every value of the preset."""
    stages: list[Stage]
    adopt: dict[str, Path]
    """The models that parts start from."""
    notes: list[str]

    @cached_property
    def estimate(self) -> Estimate:
        """What the run will take."""
        from difftool.pipeline.model import Model
        from difftool.training.run.estimate import estimate

        keep = self.values["keep"] or RunOptions.keep
        return estimate(Model(self.preset, self.tokenizer_json), keep, self.device)

    def buckets(self) -> list[str]:
        """Which frames how many pictures are trained in, a line each; none for squares."""
        from difftool.training.step.frames import buckets_of

        frames = buckets_of(self.preset, self.preset.train.size or 0)
        if frames is None:
            return []
        sizes = map(self.dataset.picture_size, range(len(self.dataset)))
        return frames.lines(size for size in sizes if size)

    def start(self, progress: Progress = silent, stopping: Callable[[], None] = lambda: None
              ) -> Training:  # fmt: skip
        """Begin in the run folder. stopping: see RunOptions. ResourceError if the disk has no room,
        UsageError if another run has the folder."""
        from difftool.training.run.estimate import check_disk
        from difftool.training.step import parallel
        from difftool.training.step.loop import compiler_problem

        values, out = self.values, self.values["out"]
        check_disk(out or Path("runs"), self.estimate.disk)
        folder = parallel.from_first(lambda: out or staged.new_folder(values["data"]))
        notes, compiled = [], bool(values["compile"])
        if compiled and (problem := compiler_problem(self.device)):
            notes.append(f"going on without --compile: {problem}")
            compiled = False
        asked = {
            "workers": values["workers"],
            "save_every": values["save_every"],
            "keep": values["keep"],
            "shard_size": values["max_shard_size"],
            "sample_every": values["sample_every"],
            "prompts": values["sample_prompt"],
        }
        options = RunOptions(
            **{name: value for name, value in asked.items() if value is not None},
            device=str(self.device),
            compiled=compiled,
            argument=values["data"],
            choices=[row for row in self.origins if not row[2].startswith(("default", "preset"))],
            progress=progress,
            stopping=stopping,
        )
        stages = [
            stage._replace(folder=folder / stage.folder.relative_to(out or Path()))
            for stage in self.stages
        ]
        return Training(self, folder, stages, options, notes)


class Training:
    """A run under way: its parts one after the other, in its folder."""

    def __init__(
        self,
        prepared: Prepared,
        folder: Path,
        stages: list[Stage],
        options: RunOptions,
        notes: list[str],
    ):
        from difftool.training.run.folder import RunFolder
        from difftool.training.step import parallel

        self.folder, self.notes = folder, notes
        self.preset = prepared.preset
        """Of the last part."""
        self.path = folder
        """Of the model, once it is written."""
        self.facts: dict[str, Any] | None = None
        """What is known of the last part (run.json)."""
        self._prepared, self._stages, self._options = prepared, stages, options
        resumes = prepared.values["resume"] or prepared.values["resume_from"]
        self._files = RunFolder(folder, fresh=not resumes)
        if not resumes and stages[0].folder != folder:  # to resume by before there is more
            self._files.write_config(prepared.preset)
        parallel.wait()  # nobody writes into the folder before it is found to be empty

    def parts(self) -> Iterator[Run]:
        """The run of each part that is not done, to be taken to its end before the next is asked
        for. What a part has learned goes to those after it."""
        from difftool.training.run.folder import RunFolder
        from difftool.training.run.run import Run

        adopt, folder = dict(self._prepared.adopt), self.folder
        try:
            for stage in self._stages:
                if stage.done is None:
                    run = Run(
                        self._files if stage.folder == folder else RunFolder(stage.folder),
                        self.preset,
                        self._prepared.dataset,
                        self._options,
                        part=stage.part,
                        tokenizer_json=self._prepared.tokenizer_json,
                        adopt={} if stage.checkpoint and not self.preset.train.lora_rank else adopt,
                        resume=stage.checkpoint,
                    )
                    try:
                        yield run
                    finally:
                        run.close()
                    self.path, self.facts = run.path or folder, run.facts
                model = stage.folder / runs.MODEL
                adopt["text" if stage.part == "clip" else stage.part] = model
                if stage.part == "vae":
                    self.preset = staged.with_codec_of(self.preset, model)
        finally:
            self._files.close()

    def run(self) -> Training:
        """Train all parts to their ends; itself. Stopped after a first SIGINT or SIGTERM, once the
        state is saved."""
        for run in self.parts():
            for _ in run.steps():
                pass
            run.finish()
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the last part."""
        return self.preset.recipe(self._stages[-1].part).steps or 0

    @property
    def metrics(self) -> Metrics:
        """What the last part has measured."""
        return Metrics.read(self.folder / runs.METRICS)

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.folder / runs.REPORT


def train(values: Mapping[str, Any]) -> Training:
    """Train to the end by the options of `train`, as `read_options` gives them; see `prepare` and
    `Training.run` for what is raised."""
    return prepare(values).start().run()
