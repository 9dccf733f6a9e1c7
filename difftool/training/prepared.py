"""A run of which everything is decided: what it will take, and its way from part to part.

Torch-free until its costs are asked for, or it begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.config.schema import DENOISING, RECIPES, Part, Preset
from difftool.data import Dataset
from difftool.errors import Stopped, UsageError
from difftool.progress import Progress, silent
from difftool.storage import runs
from difftool.storage.locks import Lock
from difftool.storage.runs import checkpoints
from difftool.training.metrics import Metrics
from difftool.training.options import RunOptions
from difftool.training.run import stages as staged
from difftool.training.run.evaluation import WITHOUT_SHEETS, Evaluation, Work, plan_evaluation
from difftool.training.run.resume import START, SettingChange
from difftool.training.run.stages import Stage
from difftool.training.run.stop import Stopping, interrupt_again
from difftool.training.step.frames import buckets_of

if TYPE_CHECKING:
    import torch

    from difftool.evaluation.judge import Judgement
    from difftool.training.run.costs import Costs
    from difftool.training.run.estimate import Estimate
    from difftool.training.run.folder import RunFolder
    from difftool.training.run.run import Run

STOP_GROWTH = 1.2
"""At most, of the steps of measures that tell when to stop."""
TOLD = ("size", "batch_size", "steps", "lr", "warmup")
"""Of each recipe, what is told whoever said it."""
CHOSEN = ("chosen", "data")
"""How the origins of what is chosen begin."""


@dataclass(kw_only=True)
class Training:
    """A run of which everything is decided; nothing is written before it begins."""

    values: Mapping[str, Any]
    dataset: Dataset
    device: torch.device
    preset: Preset
    """Of the part that is trained last, with what those before it have measured."""
    tokenizer_json: str | None
    """The learned vocabulary."""
    origins: list[tuple[str, Any, str]]
    """(key, value, origin) of every value of the preset."""
    stages: list[Stage]
    adopt: dict[str, Path]
    """The models that parts start from."""
    costs: Costs
    """What a picture takes in training each part."""
    notes: list[str]
    """What the user should be told."""
    resumes: bool
    """Whether a run goes on."""
    seen: list[list[Path]]
    """The checkpoints that each part had."""
    changes: list[SettingChange]
    """What it does otherwise than until now."""
    folder: Path | None = None
    """Of the run, once it has begun."""
    path: Path | None = None
    """Of the model, once it is written."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the report tells of the part that was trained last."""
    _files: RunFolder | None = None
    _options: RunOptions = field(default_factory=RunOptions)

    @cached_property
    def estimate(self) -> Estimate:
        """What it will take, as far as it is known beforehand."""
        from difftool.training.run.estimate import estimate

        keep = self.values["keep"] or RunOptions.keep
        return estimate(self.preset, self.costs, keep, self.device)

    @cached_property
    def evaluations(self) -> dict[Part, Evaluation]:
        """How often each part is measured and shown, and by how much."""
        made = {}
        for part, work in self.work.items():
            steps, held = self.preset.recipe(part).steps or 1, self._held_out(part)
            every = self.values["sample_every"]
            growth = STOP_GROWTH if self.preset.recipe(part).stop_when_worse else None
            chosen = plan_evaluation(
                steps, work, self.device.type, every=every, held=held, growth=growth
            )
            made[part] = chosen._replace(pictures=0) if part in WITHOUT_SHEETS else chosen
        return made

    @cached_property
    def work(self) -> dict[Part, Work]:
        """Arithmetic of each part."""
        from difftool.training.run.costs import is_cached, work_of

        cached = is_cached(self.preset, len(self.dataset))
        costs = self.costs.parts.items()
        made: dict[Part, Work] = {
            part: work_of(self.preset, part, cost, cached=cached) for part, cost in costs
        }
        if self.values["likelihood"] and "unet" in made:  # which takes two evaluations a sample
            made["unet"] = made["unet"]._replace(sample=3 * made["unet"].sample)
        return made

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """About how long it will take on this device, as fast as it is now: to encode pictures
        first, and in all."""
        from difftool.training.run.costs import DRAWING, is_cached, speed

        total, beforehand, rate = 0.0, 0.0, speed(self.device)
        if "unet" in self.costs.parts:
            beforehand += self.preset.train.distill.samples * DRAWING * self.work["unet"].sample
        for part, work in self.work.items():
            steps = self.preset.recipe(part).steps or 1
            total += steps * work.step / (1 - self.evaluations[part].share)
        made: list[Part] = [part for part in DENOISING if part in self.costs.parts]
        network = made[0] if made else None
        if network and is_cached(self.preset, len(self.dataset)):
            pictures = len({self.dataset.name(index) for index in range(len(self.dataset))})
            sides = 1 + bool(self.preset.train.flip)
            beforehand += pictures * sides * self.costs.parts[network].encode
        return beforehand / rate, (beforehand + total) / rate

    @cached_property
    def free(self) -> int | None:
        """Bytes of memory that it may take; None = the device does not say."""
        from difftool.training.run.estimate import room_for

        return room_for(self.dataset, self.preset, self.device)

    def forecast(self) -> list[tuple[str, str, str]]:
        """What it will take, as (name, value, what it is)."""
        from difftool.training.report.page import duration

        sums = [f"{part}: {e.words(self._held_out(part))}" for part, e in self.evaluations.items()]
        beforehand, seconds = self.seconds
        words = "as fast as the device is now"
        if beforehand >= 1:
            drawn = self.preset.train.distill.samples
            made = "the teacher draws" if drawn else "encode the pictures"
            words += f"; {duration(beforehand)} of it {made}, before the first step"
        time = ("time", f"about {duration(seconds)}", words)
        return [*self.estimate.rows(self.free), time, ("shown", "", "; ".join(sums))]

    def out_of_reach(self) -> list[str]:
        """What of it this machine will not do."""
        from difftool.training.run.estimate import out_of_reach

        return out_of_reach(self.estimate, self.free, self.seconds[1])

    def _held_out(self, part: Part) -> int:
        """How many pictures are measured and never trained on."""
        from difftool.training.run.validation import count_held_out

        return count_held_out(self.dataset, self.preset.recipe(part).validation)

    def choices(self) -> list[tuple[str, Any, str]]:
        """(key, value, why) of what was chosen, and of what a run is told by in any case."""
        recipes, native = {RECIPES[part] for part in self.preset.parts}, self.dataset.native_size
        rows = []
        for key, value, origin in self.origins:
            recipe, _, name = key.rpartition(".")
            told = key in ("name", "target") or recipe == "path"
            if told or (recipe in recipes and name in TOLD) or origin.startswith(CHOSEN):
                source, _, reason = origin.partition("chosen: ")
                why = (reason if reason and (key == "name" or not source) else source).rstrip(", ")
                if name == "size" and native is not None and native < value:
                    why += f"; pictures of about {native} are enlarged"
                rows.append((key, value, why))
        return rows

    def buckets(self) -> list[str]:
        """Which frames how many pictures are trained in, a line each; none for squares."""
        frames = buckets_of(self.preset, self.preset.train.size or 0)
        sizes = map(self.dataset.picture_size, range(len(self.dataset)))
        return frames.lines(size for size in sizes if size) if frames else []

    def check(self) -> None:
        """ResourceError if the disk has no room, UsageError if another run has the folder."""
        from difftool.training.run.estimate import check_disk

        out = self.values["out"]
        check_disk(out or Path("runs"), self.estimate.disk)
        if out and (out / runs.LOCK).exists():
            Lock(out / runs.LOCK, f"another run is at work in {out}").close()

    def begin(self, progress: Progress = silent, stopping: Stopping = interrupt_again) -> Path:
        """Create and lock the run folder; its path. progress, stopping: see RunOptions.

        ResourceError if the disk has no room, UsageError if another run has the folder.
        """
        from difftool.training.run.folder import RunFolder
        from difftool.training.step import parallel
        from difftool.training.step.loop import compiler_problem

        data, out = self.values["data"], self.values["out"]
        names = {each.name for each in fields(RunOptions)}
        given = {k: v for k, v in self.values.items() if k in names and v is not None}
        choices = [row for row in self.origins if not row[2].startswith(("default", "preset"))]
        given |= {"device": str(self.device), "choices": choices}
        given |= {"evaluations": self.evaluations, "changes": self.changes}
        if given.get("compile") and (problem := compiler_problem(self.device)):
            self.notes.append(f"going on without --compile: {problem}")
            given["compile"] = False
        self._options = RunOptions(**given, progress=progress, stopping=stopping)
        self.check()
        self.folder = folder = parallel.from_first(lambda: out or staged.new_folder(data))
        self.stages = [
            stage._replace(folder=folder / stage.folder.relative_to(out or Path()))
            for stage in self.stages
        ]
        self._files = files = RunFolder(folder, fresh=not self.resumes)
        if self.resumes and self.seen != [checkpoints(stage.folder) for stage in self.stages]:
            files.close()
            raise UsageError(f"another run was at work in {folder}", hint="run again")
        if not self.resumes:
            start = {part: str(path.absolute()) for part, path in self.adopt.items()}
            files.write_facts({"schema": 1, START: start})
        files.write_config(self.preset)  # to resume by, whatever comes
        parallel.wait()  # nobody writes into the folder before it is found to be empty
        return folder

    def parts(self) -> Iterator[Run]:
        """The run of each part that is not done, to be taken to its end before the next is asked
        for. What a part has learned goes to those after it."""
        from difftool.training.run.run import Run

        if self._files is None:
            self.begin()
        assert self._files
        adopt = dict(self.adopt)
        with self._files as files:
            for stage in self.stages:
                if stage.done is None:
                    whole = stage.checkpoint and not self.preset.train.lora_rank
                    with self._folder_of(stage, files) as own:
                        run = Run(
                            own,
                            self.preset,
                            self._data(stage, own),
                            self._options,
                            part=stage.part,
                            tokenizer_json=self.tokenizer_json,
                            adopt={k: v for k, v in adopt.items() if not whole or k == "vision"},
                            resume=stage.checkpoint,
                        )
                        yield run
                    self.path, self.facts = run.path, run.facts
                    if run.stopped and stage is not self.stages[-1]:
                        hint = f"continue with --out {files.path} --resume"
                        raise Stopped(run.stopped, f"stopped after the {stage.part}", hint)
                model = stage.folder / runs.MODEL
                adopt["text" if stage.part == "clip" else stage.part] = model
                if stage.part == "vae":
                    self.preset = staged.with_codec_of(self.preset, model)

    def evaluate(self, progress: Progress = silent) -> Judgement | None:
        """Compare samples of the finished model with the reference of --evaluate, in metrics.jsonl
        and the report too; None where none is asked for, and in processes that do not write."""
        from difftool.evaluation.judge import open_reference
        from difftool.training.judging import judge_model
        from difftool.training.run.folder import RunFolder

        if not self.values["evaluate"] or self.path is None:
            return None
        with RunFolder(self.path.parent) as files:
            if not files.writes:
                return None
            found = judge_model(
                self.path,
                open_reference(self.values["evaluate"]),
                self.dataset,
                count=self.values["evaluate_num"],
                weights=self.values["features"],
                device=str(self.device),
                folder=files.path / runs.CACHE,
                progress=progress,
            )
            files.append({"step": self.steps, "evaluation": found._asdict()})
            files.write_report()
        return found

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._files is not None:
            self._files.close()

    def _data(self, stage: Stage, folder: RunFolder) -> Dataset:
        """What a part learns from: the data, or what the teacher draws of it."""
        from difftool.training.run.teaching import drawn

        if stage.part != "unet":
            return self.dataset
        progress = self._options.progress
        return drawn(self.preset, self.dataset, folder.path, self.device, progress)

    def _folder_of(self, stage: Stage, files: RunFolder) -> RunFolder:
        from difftool.training.run.folder import RunFolder

        if stage.folder == files.path:
            return files
        return RunFolder(stage.folder, root=files.path)

    def run(self) -> Training:
        """Train all parts to their ends; itself. Raises Stopped after a first SIGINT or SIGTERM,
        once the state is saved, and KeyboardInterrupt after a second."""
        for run in self.parts():
            for _ in run.steps():
                pass
            run.finish()
        self.evaluate()
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the part that is trained last: those done, once it is."""
        if self.path is not None and self.facts.get("sessions"):
            return self.facts["sessions"][-1]["to"]
        return self.preset.recipe(self.stages[-1].part).steps or 0

    @property
    def metrics(self) -> Metrics:
        """What the part that was trained last has measured."""
        assert self.folder
        return Metrics.read(self.folder / runs.METRICS)

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        assert self.folder
        return self.folder / runs.REPORT
