"""One training run in its folder: of the U-Net, or of another part of a model alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftool.adapters.lora.train import Adapters
from difftool.config.schema import Part, Preset
from difftool.data import Dataset
from difftool.errors import ResourceError, Stopped
from difftool.pipeline.load import load_part_from
from difftool.pipeline.model import Model
from difftool.progress import Progress, silent
from difftool.storage import runs
from difftool.storage.safetensors import load_tensors, read_header, save_tensors
from difftool.storage.shards import written_at
from difftool.training.metrics import Metrics
from difftool.training.options import RunOptions
from difftool.training.run.evaluation import SHARE, Evaluation
from difftool.training.run.facts import facts_of
from difftool.training.run.folder import RunFolder
from difftool.training.run.previews import Previews
from difftool.training.run.resume import START
from difftool.training.run.saving import TRIES, Saves
from difftool.training.run.stages import is_of_prior, open_start
from difftool.training.run.stop import Abandoned, graceful_stop, heeding
from difftool.training.run.validation import hold_out
from difftool.training.step import parallel
from difftool.training.step.cache import Latents
from difftool.training.step.frames import buckets_of
from difftool.training.step.loop import Trainer, TrainStep
from difftool.training.step.state import restore_state

FEWEST_ENCODED, ENCODED = 256, 4096
"""Pictures by which the latents' mean and deviation are measured: at least, at most."""
DRAWN_EVERY = 10.0
"""Seconds between two drawings of plot and report, at least, until the last."""


class Run:
    """One training run in its folder."""

    def __init__(
        self,
        folder: RunFolder,
        preset: Preset,
        dataset: Dataset,
        options: RunOptions,
        *,
        part: Part = "unet",
        tokenizer_json: str | None = None,
        adopt: Mapping[str, Path] | None = None,
        resume: Path | None = None,
    ):
        """Build the model and trainer, from nothing or (resume) from a checkpoint folder.

        adopt: the models that parts ("vae", "text", "unet") take their first weights from, and
        that whose picture encoder ("vision") a prior learns from.
        """
        self.folder, self.preset, self.part, self.options = folder, preset, part, options
        self.resumed = resume
        self.notes: list[str] = []
        """What the user should be told; whoever tells it takes it out."""
        self.path: Path | None = None
        """Of the model, once it is written."""
        self.stopped = 0
        """The signal that came while it was written; 0 = none."""
        self._warned: set[str] = set()
        self._drawn = -math.inf
        recipe = preset.recipe(part)
        assert recipe.size
        self.dataset, self.held = hold_out(dataset, recipe.validation)
        model = _model(preset, recipe.seed, tokenizer_json, options.device, adopt or {})
        own = preset if folder.root == folder.path else replace(preset, parts=(part,))
        folder.write_config(own)
        frame = buckets_of(preset, recipe.size) or recipe.size
        with options.progress("reading pictures", len(dataset)) as shown:
            dataset.prepare(frame, lambda done, _: shown.update(done))
        if self.held:
            self.held.prepare(frame)
        self.trainer = Trainer(
            model, self.dataset, part, workers=options.workers, compiled=options.compile
        )
        self.evaluation = options.evaluations.get(part) or Evaluation(options.sample_every)
        cache = folder.path / runs.CACHE
        self.previews = Previews(
            self.trainer,
            self.held,
            self.evaluation,
            prompts=options.sample_prompt,
            cache=cache,
            likelihood=options.likelihood,
        )
        self.saves = Saves(self.trainer, folder.path, options, self.notes)
        if resume is not None:
            self.notes += restore_state(self.trainer, resume)
            if resume.parent.parent == folder.path:
                self.saves.saved = self.trainer.step
        self.trainer.objective.precompute(self.dataset, cache, options.progress)
        folder.forget_after(self.trainer.step)
        self._shown = folder.last_shown()
        self.facts = facts_of(self.previews, dataset.audit, self.held, options)
        before = folder.facts() or {}
        self.facts[START] = before.get(START, {})
        if self.trainer.step:
            rows = {key: row for row in before.get("choices", []) for key in row[:1]}
            rows |= {key: row for row in self.facts["choices"] for key in row[:1]}
            self.facts |= {"choices": [*rows.values()], "sessions": before.get("sessions", [])}
        self._began = time.monotonic()
        self._session: dict[str, Any] = {"from": self.trainer.step}
        if options.changes:
            self._session["changes"] = [list(change) for change in options.changes]
        self.facts["sessions"].append(self._session)

    @property
    def model(self) -> Model:
        return self.trainer.model

    def steps(self) -> Iterator[TrainStep]:
        """Train to the last step, writing metrics, sheets and checkpoints on the way.

        Raises Stopped after a first SIGINT, SIGTERM or SIGHUP, once the state is saved;
        ResourceError if it cannot be, and where numbers are not finite.
        """
        trainer = self.trainer
        with graceful_stop(self.options.stopping) as signals:
            if trainer.step and trainer.step != self._shown and self._is_due():
                self._show_unless(signals)  # it was stopped between the checkpoint and this
                self._stop_at(signals)
            if self._is_worse():
                return  # it had stopped, and is asked to go on
            for step in trainer.run():
                if step.loss is not None:
                    self._measured(_line(step))
                yield step
                self._stop_at(signals)
                ends, shows = step.step == trainer.config.steps, self._is_due()
                if ends or shows or parallel.max_over_ranks(self.saves.due()):
                    self.saves.save(TRIES if ends else 1)
                if shows:
                    self._show_unless(signals)
                    self._stop_at(signals)
                    if self._is_worse():
                        return

    def _is_due(self) -> bool:
        """Whether to measure and show now; all processes agree."""
        step, last = self.trainer.step, self.trainer.config.steps or 0
        seconds = time.monotonic() - self._began
        due = self.evaluation.is_due(step, last, self._shown, seconds)
        return bool(parallel.max_over_ranks(due)) if self._shown == 0 else due

    def _show_unless(self, signals: list[int]) -> None:
        """Measure and show, unless a signal comes."""
        with suppress(Abandoned):
            self.show(heeding(self.options.progress, signals))
        self._shown = self.trainer.step
        parallel.wait()

    def _is_worse(self) -> bool:
        """Whether to stop because held-out pictures get worse; all processes agree."""
        if not self.trainer.config.stop_when_worse:
            return False
        return bool(parallel.max_over_ranks(Metrics.read(self.folder.metrics).worse))

    def _stop_at(self, signals: list[int]) -> None:
        """Save and raise Stopped if a signal has come to any process."""
        if not (signum := parallel.max_over_ranks(signals[0] if signals else 0)):
            return
        saved, step = self.saves.save(TRIES), self.trainer.step
        self._write_facts(finished=False)
        hint = f"continue with --out {self.folder.root} --resume"
        if not saved:
            newest, what = self.saves.saved, f"stopped after step {step}, which could not be saved"
            why = "there is no checkpoint" if newest is None else f"the newest is of step {newest}"
            raise ResourceError(what, why, hint)
        raise Stopped(signum, f"stopped after step {step}, saved {self.saves.path}", hint)

    def show(self, progress: Progress = silent) -> None:
        """Measure the held-out pictures, make a sample sheet, draw the plot and the report; all
        with the averaged weights."""
        if not self.folder.writes:
            return
        step = self.trainer.step
        image, measures = self.previews.make(progress)
        if image is not None:
            self.saves.attempt("a sheet of samples", lambda: self.folder.write_sheet(step, image))
        elif self.previews.pictures:
            self.notes.append(f"step {step}: samples are not finite, there is no sheet of them")
        lines = [{"step": step, **measure} for measure in measures]
        if self.trainer.config.stop_when_worse:  # before its measure, should it be killed between
            known = Metrics([*Metrics.read(self.folder.metrics).lines, *lines])
            if known.best == step:
                self.saves.attempt("the best weights", self._write_best)
        self._measured(*lines)
        self._write_facts(finished=False)
        if time.monotonic() - self._drawn > DRAWN_EVERY:
            self.saves.attempt("the report", self.folder.write_report)
            self._drawn = time.monotonic()
        warnings = Metrics.read(self.folder.metrics).warnings(self.facts["steps"])
        self.notes += [words for key, words in warnings.items() if key not in self._warned]
        self._warned |= warnings.keys()

    def finish(self) -> Path:
        """Write the last checkpoint, the model, the plot and the report; the model's path.

        Stopped if a signal comes before the model is written, ResourceError if it cannot be.
        """
        path = self.folder.path / (runs.LORA if self.model.adapters else runs.MODEL)
        with graceful_stop(self.options.stopping) as signals:
            self.saves.save(TRIES)
            self._take_best()
            written, left = not self.folder.writes, False
            try:
                for _ in range(TRIES):
                    written = written or self.saves.attempt(
                        "the model",
                        lambda: self._write_model(path, heeding(self.options.progress, signals)),
                    )
            except Abandoned:
                left = True
            if parallel.max_over_ranks(left):
                self._stop_at(signals)
            if parallel.max_over_ranks(not written):
                hint = f"once there is room, --out {self.folder.root} --resume writes it"
                raise ResourceError(f"the model cannot be written to {path}", hint=hint)
            self._write_facts(finished=True)
            if self.folder.writes:
                self.saves.attempt("the report", self.folder.write_report)
            parallel.wait()
        self.stopped = parallel.max_over_ranks(signals[0] if signals else 0)
        self.path = written_at(path) or path
        return self.path

    def _write_best(self) -> None:
        """Write the weights of this step, averaged where they are, for the end."""
        note = {"step": str(self.trainer.step)}
        tensors = {name: t.detach().contiguous().cpu() for name, t in self._kept().items()}
        save_tensors(self.folder.path / runs.BEST, tensors, note, overwrite=True)

    def _kept(self) -> Mapping[str, Tensor]:
        """The weights that the model is written with."""
        ema = self.trainer.ema
        return ema.average if ema else self.trainer.parameters

    def _take_best(self) -> None:
        """Go back to the weights by which held-out pictures were best, if that is wanted and they
        are not the last ones."""
        path, best = self.folder.path / runs.BEST, Metrics.read(self.folder.metrics).best
        if not self.trainer.config.stop_when_worse or best in (None, self.trainer.step):
            return
        if not path.exists() or read_header(path).metadata.get("step") != str(best):
            self.notes.append(f"the weights of step {best}, the best ones, are not there any more")
            return
        kept = self._kept()
        with torch.no_grad():
            for name, tensor in load_tensors(path).items():
                kept[name].copy_(tensor)
        self.facts["best"] = best
        self.notes.append(
            f"held-out pictures were best at step {best}, whose weights are the model's; "
            f"it ended at step {self.trainer.step}"
        )

    def _write_model(self, path: Path, progress: Progress) -> None:
        ema = self.trainer.ema
        weights = ema.average if ema else None
        if self.part == "vae":
            self.model.preset = self._with_measured_latents(progress)
        if isinstance(self.model.adapters, Adapters):
            self.model.adapters.save(path, self.preset, weights)
            return
        note = {"difftool.weights": "ema" if ema else "live"}
        parts, limit = self.trainer.kept_parts(), self.options.max_shard_size
        self.model.save(
            path, weights=weights, parts=parts, metadata=note, overwrite=True, limit=limit
        )

    def _with_measured_latents(self, progress: Progress) -> Preset:
        """The preset with the latents' own mean and deviation, by which x0 has unit variance."""
        config, data = self.preset.train_vae, self.dataset
        assert config.size and config.steps and config.batch_size
        learned = config.steps * config.batch_size * config.accumulate
        limit = min(len(data), max(FEWEST_ENCODED, min(ENCODED, round(SHARE * learned))))
        with self.previews.averaged(), progress("measuring latents", limit) as shown:
            some = Latents.make(
                self.model, data, config.size, flip=False, limit=limit,
                progress=lambda done, _: shown.update(done),
            )  # fmt: skip
        mean, std = (tuple(round(v, 6) for v in values) for values in some.moments())
        codec = replace(self.preset.codec, scale=1.0, shift=0.0, latents_mean=mean, latents_std=std)
        return replace(self.preset, codec=codec)

    def _write_facts(self, *, finished: bool) -> None:
        seconds = time.monotonic() - self._began
        self._session |= {"to": self.trainer.step, "seconds": round(seconds, 1)}
        self.facts["finished"] = finished
        self.saves.attempt(runs.FACTS, lambda: self.folder.write_facts(self.facts))

    def _measured(self, *lines: dict[str, Any]) -> None:
        self.saves.attempt(runs.METRICS, lambda: self.folder.append(*lines))


def _model(
    preset: Preset,
    seed: int,
    tokenizer_json: str | None,
    device: torch.device | str,
    adopt: Mapping[str, Path],
) -> Model:
    """The model that a run begins with."""
    model = Model.fresh(preset, seed=seed, tokenizer_json=tokenizer_json, device=str(device))
    opened = cache(open_start)
    for name, path in adopt.items():
        load_part_from(model, opened(path, is_of_prior(name, preset)), name)
    if adapters := Adapters.of(model.network, preset.train):
        adapters.init_weights(torch.Generator().manual_seed(seed))
        model.adapters = adapters
    return model


def _line(step: TrainStep) -> dict[str, Any]:
    """What a step leaves in metrics.jsonl."""
    line = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
    return line | step.terms | ({"levels": step.levels} if step.levels else {})
