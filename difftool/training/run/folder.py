"""A run folder: configuration, metrics, sample sheets, checkpoints, plots, report, and the model.

config.yaml   metrics.jsonl (see record.py)   samples/step-000500.png   checkpoints/step-000500/
loss.png      report.html    run.json: what the report tells beside (data, device, time)
model.safetensors at the end: the averaged weights, self-describing
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from difftool import __version__
from difftool.adapters.lora.train import Adapters
from difftool.config.schema import Part, Preset
from difftool.config.validate import to_yaml
from difftool.data import Dataset
from difftool.data.dataset import count
from difftool.errors import Stopped, UsageError
from difftool.images.sheets import Cell, enlarged, sheet
from difftool.images.write import write_png
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_part_from
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.storage.commit import Lock, write_whole
from difftool.storage.shards import MAX_SHARD_SIZE, parse_size, written_at
from difftool.training.report.page import FACTS, warnings, write_report
from difftool.training.report.plots import Metrics, loss_figure, png
from difftool.training.run.validation import Validation, colours, hold_out
from difftool.training.step import parallel, rng
from difftool.training.step.batches import buckets_of, to_signal
from difftool.training.step.cache import Embeddings, Latents
from difftool.training.step.loop import Trainer, TrainStep, graceful_stop
from difftool.training.step.objectives import DenoisingObjective

PREVIEWS = 16
COLUMNS = range(3, 9)
"""Prompts asked for by the user, where they are so many, are a column of the sheets each."""
MEASURED = 4096
"""Pictures by which the latents' mean and deviation are measured."""
COLOURED = 256
"""Pictures by which the data's colours are measured."""
DRAWN_EVERY = 10.0
"""Seconds between two drawings of plot and report, at least, until the last."""


Progress = Callable[[str, int | None], AbstractContextManager[Any]]


class _Silent:
    def update(self, done: int) -> None:
        """Show nothing."""


def _silent(name: str, total: int | None) -> AbstractContextManager[Any]:
    return nullcontext(_Silent())


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


class Run:
    """One training run in its folder: of the U-Net, or of another part of a model alone."""

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        dataset: Dataset,
        *,
        device: torch.device,
        tokenizer_json: str | None,
        part: Part = "unet",
        adopt: Mapping[str, Path] | None = None,
        resume: Path | None = None,
        save_every: int,
        keep: int,
        sample_every: int,
        prompts: Sequence[str] = (),
        argument: str = "",
        choices: Sequence[tuple[str, Any, str]] = (),
        workers: int | None = None,
        compiled: bool = False,
        shard_size: int | None = None,
        progress: Progress = _silent,
    ):
        """Build the model and trainer, from nothing or (resume) from a checkpoint folder.

        adopt: the models that parts ("vae", "text", "unet") take their first weights from.
        argument, choices: for the report, what the user calls the data, and (key, value, origin)
        of the configuration's values that are not the preset's.
        workers, compiled: see Trainer. shard_size: bytes beyond which the finished model is split
        into shards; None: 5 GB.
        progress: shows (name, total) as a context whose `update(done)` is called, while pictures
        are read and encoded.
        """
        self.folder, self.preset, self.part, self.audit = folder, preset, part, dataset.audit
        self.save_every, self.keep, self.sample_every = save_every, keep, sample_every
        self.shard_size = shard_size or parse_size(MAX_SHARD_SIZE)
        self.prompts = list(prompts)
        self.resumed = resume
        self.notes: list[str] = []
        """What the user should be told; whoever tells it takes it out."""
        self.worries: set[str] = set()
        self.drawn = -math.inf
        self.metrics = folder / "metrics.jsonl"
        self.leads = parallel.is_main()
        """Of several processes the first writes; the others only train."""
        busy = f"another run is at work in {folder}"
        self.lock = Lock(folder / ".lock", busy) if self.leads else None
        try:
            recipe = preset.recipe(part)
            self.dataset, self.held = hold_out(dataset, recipe.validation)
            model = Model.fresh(
                preset, seed=recipe.seed, tokenizer_json=tokenizer_json, device=str(device)
            )
            for name, path in (adopt or {}).items():
                load_part_from(model, path, name)
            if rank := preset.train.lora_rank:
                model.adapters = Adapters(model.denoiser.network, rank, preset.train.lora_alpha)
                model.adapters.init_weights(torch.Generator().manual_seed(recipe.seed))
            if resume is None and self.leads:
                write_whole(folder / "config.yaml", to_yaml(preset).encode(), overwrite=True)
            assert recipe.size
            frame = buckets_of(preset, recipe.size) or recipe.size
            with progress("reading pictures", len(dataset)) as shown:
                dataset.prepare(frame, lambda done, _: shown.update(done))
            if self.held:
                self.held.prepare(frame)
            self.trainer = Trainer(model, self.dataset, part, workers=workers, compiled=compiled)
            self.validation = Validation(self.trainer, self.held) if self.held else None
            if resume is not None:
                self.notes += self.trainer.restore(resume)
            objective = self.trainer.objective
            if (
                isinstance(objective, DenoisingObjective)
                and preset.text
                and not objective.learns_text()
            ):
                objective.embeddings = Embeddings(model, folder / "cache")
            latent = preset.codec.kind == "vae" and self.dataset.fixed
            if isinstance(objective, DenoisingObjective) and latent:
                with (
                    parallel.first_before_others(),
                    progress("encoding pictures", len(self.dataset)) as shown,
                ):
                    objective.latents = Latents.make(
                        model, self.dataset, frame, flip=bool(recipe.flip),
                        folder=folder / "cache", progress=lambda done, _: shown.update(done),
                    )  # fmt: skip
            if self.leads:
                _truncate(self.metrics, self.trainer.step)
            self.facts = self._facts(argument or dataset.audit.source, choices)
            self.began, self.session = time.monotonic(), {"from": self.trainer.step}
            self.facts["sessions"].append(self.session)
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> Model:
        return self.trainer.model

    def steps(self) -> Iterator[TrainStep]:
        """Train to the last step, writing metrics, sheets and checkpoints on the way.

        Raises Stopped after a first SIGINT or SIGTERM, once the state is saved.
        """
        trainer, last = self.trainer, self.trainer.config.steps
        if trainer.step and trainer.step % self.sample_every == 0 and not self._is_shown():
            self.show()  # it was stopped between the checkpoint and this
        with graceful_stop() as signals:
            for step in trainer.run():
                if step.loss is not None:
                    self._write(_line(step))
                yield step
                if signum := parallel.max_over_ranks(signals[0] if signals else 0):
                    where = self.save()
                    self._state(finished=False)
                    hint = f"continue with --out {self.folder} --resume"
                    raise Stopped(signum, f"stopped after step {step.step}, saved {where}", hint)
                if step.step % self.sample_every == 0 or step.step == last:
                    self.show()
                if step.step % self.save_every == 0 and step.step != last:
                    self.save()

    def save(self) -> Path:
        """Write a checkpoint."""
        return self.trainer.save(self.folder / "checkpoints", keep=self.keep)

    def finish(self) -> Path:
        """Write the last checkpoint, the model, the plot and the report; the model's path."""
        self.save()
        path = self.folder / ("lora.safetensors" if self.model.adapters else "model.safetensors")
        if self.leads:
            self._finish(path)
        parallel.wait()
        return written_at(path) or path

    def _finish(self, path: Path) -> None:
        ema = self.trainer.ema
        note = {"difftool.weights": "ema" if ema else "live"}
        weights = ema.average if ema else None
        if self.part == "vae":
            self.model.preset = self._measured()
        if isinstance(self.model.adapters, Adapters):
            self.model.adapters.save(path, self.preset, weights)
        else:
            parts, limit = self.trainer.kept_parts(), self.shard_size
            self.model.save(
                path, weights=weights, parts=parts, metadata=note, overwrite=True, limit=limit
            )
        self._state(finished=True)
        self._draw()
        self.close()

    def _measured(self) -> Preset:
        """The preset with the latents' own mean and deviation, by which x0 has unit variance."""
        recipe = self.preset.train_vae
        assert recipe.size
        with self.averaged():
            some = Latents.make(self.model, self.dataset, recipe.size, flip=False, limit=MEASURED)
        mean, std = (tuple(round(v, 6) for v in values) for values in some.moments())
        codec = replace(self.preset.codec, scale=1.0, shift=0.0, latents_mean=mean, latents_std=std)
        return replace(self.preset, codec=codec)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self.lock is not None:
            self.lock.close()

    # --- what it shows -----------------------------------------------------------------------

    def show(self) -> None:
        """Measure the held-out pictures, make a sample sheet, draw the plot and the report; all
        with the averaged weights."""
        if not self.leads:
            return
        lines: list[dict[str, Any]] = []
        with self.averaged():
            if self.validation is not None:
                lines.append({"validation": self.validation.measure()})
            lines += self._sheet()
        self._write(*({"step": self.trainer.step, **line} for line in lines))
        self._state(finished=False)
        if time.monotonic() - self.drawn > DRAWN_EVERY:
            self._draw()
        for kind, words in warnings(Metrics.read(self.metrics), self.facts).items():
            if kind not in self.worries:
                self.worries.add(kind)
                self.notes.append(words)

    def _sheet(self) -> list[dict[str, Any]]:
        """A sheet of what the model makes of fixed seeds, and what was measured of it."""
        columns, measured = None, []
        if self.part == "clip":
            return []
        if self.part == "vae":
            pictures, back = self._reconstructions()
            errors = ((pictures - back) ** 2).mean(dim=(1, 2, 3)).clamp(min=1e-12)
            psnr = (10 * (4 / errors).log10()).tolist()  # the range of 2, squared
            pairs = zip(pictures, back, psnr, strict=True)
            cells = [Cell([enlarged(a), enlarged(b)], f"{p:.1f} dB") for a, b, p in pairs]
            measured, columns = [{"psnr": sum(psnr) / len(psnr)}], min(4, len(cells))
        else:
            items = self._items()
            images = self.samples(items)
            pairs = zip(images, items, strict=True)
            cells = [Cell([enlarged(image)], self._caption(item)) for image, item in pairs]
            made = {"samples": colours(images), "data": self._data_colours, "count": len(items)}
            measured = [{"colours": made}]
            columns = len(self.prompts) if len(self.prompts) in COLUMNS else None
        path = self.folder / "samples" / f"step-{self.trainer.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(sheet(cells, columns), path, overwrite=True)
        return measured

    def _caption(self, item: SampleInput) -> str:
        return item.prompt if item.label is None else self.preset.classes[item.label]

    @cached_property
    def _data_colours(self) -> dict[str, list[float]]:
        size = self.trainer.config.size
        assert size
        some = rng.permutation(0, 0, len(self.dataset))[:COLOURED].tolist()
        return colours(to_signal(self.dataset.images(some, size), torch.device("cpu")))

    def _draw(self) -> None:
        figure = loss_figure(Metrics.read(self.metrics), self.folder.resolve().name)
        if figure is not None:
            write_whole(self.folder / "loss.png", png(figure), overwrite=True)
        write_report(self.folder)
        self.drawn = time.monotonic()

    def _write(self, *lines: dict[str, Any]) -> None:
        """Lines into metrics.jsonl, all at once."""
        if not self.leads:
            return
        with self.metrics.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _is_shown(self) -> bool:
        """Whether the present step has been shown."""
        lines = Metrics.read(self.metrics)
        shown = (*lines.validation, *lines.colours, *lines.psnr)
        return any(line["step"] == self.trainer.step for line in shown)

    def _facts(self, argument: str, choices: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
        """What run.json holds; of a resumed run, its time and first choices as well."""
        recipe, preset, model = self.trainer.config, self.preset, self.model
        assert recipe.batch_size
        device = f"{model.device}, {count(torch.get_num_threads(), 'thread')}"
        if model.device.type == "cuda":
            device = torch.cuda.get_device_name(model.device)
        facts = {
            "schema": 1,
            "part": self.part,
            "data": self.audit.source,
            "argument": argument,
            "example": next((item.prompt for item in self._items() if item.prompt), ""),
            "kind": "text" if preset.text else "class" if preset.classes else "none",
            "audit": self.audit.lines(),
            "images": len(self.dataset),
            "held_out": len(self.held) if self.held else 0,
            "size": recipe.size,
            "steps": recipe.steps,
            "batch": recipe.batch_size * recipe.accumulate,
            "parameters": {
                name: sum(p.numel() for p in part.parameters())
                for name, part in model.parts().items()
                if name in self.trainer.kept_parts()
            },
            "device": device,
            "version": __version__,
            "torch": torch.__version__,
            "choices": [list(choice) for choice in choices],
            "sessions": [],
            "finished": False,
        }
        path = self.folder / FACTS
        if self.trainer.step and path.exists():
            before = json.loads(path.read_text())
            facts |= {key: before[key] for key in ("choices", "sessions")}
        return facts

    def _state(self, *, finished: bool) -> None:
        """Write run.json."""
        if not self.leads:
            return
        seconds = time.monotonic() - self.began
        self.session |= {"to": self.trainer.step, "seconds": round(seconds, 1)}
        self.facts["finished"] = finished
        text = json.dumps(self.facts, indent=1, ensure_ascii=False)
        write_whole(self.folder / FACTS, text.encode(), overwrite=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the model is in evaluation and computes with the averaged weights."""
        ema, parts = self.trainer.ema, self.model.parts()
        training = {name: part.training for name, part in parts.items()}
        for part in parts.values():
            part.eval()
        try:
            with ema.swapped() if ema else nullcontext(), self.trainer.eager():
                yield
        finally:
            for name, part in parts.items():
                part.train(training[name])

    def samples(self, items: Sequence[SampleInput]) -> torch.Tensor:
        """Images [B,3,H,W] in [-1, 1] with the preset's own settings."""
        *_, last = generate(plan_sampling(self.model, resolve_settings(self.model)), items)
        return decode(self.model, last.x)

    @torch.no_grad()
    def _reconstructions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures, held-out ones where there are, and what the autoencoder gives back."""
        codec, size = self.model.codec, self.trainer.config.size
        assert size
        shown = rng.permutation(0, 0, len(self._shown))[: PREVIEWS // 2].tolist()
        pictures = to_signal(self._shown.images(shown, size), self.model.device)
        return pictures, decode(self.model, codec.encode(pictures))

    @property
    def _shown(self) -> Dataset:
        """What the sheets take their captions and pictures from."""
        return self.held if self.held and len(self.held) >= PREVIEWS else self.dataset

    def _items(self) -> list[SampleInput]:
        """What the sheets show, the same all through the run."""
        names, texts = len(self.preset.classes), [""]
        if self.model.text:
            shown = rng.permutation(0, 0, len(self._shown))[:PREVIEWS].tolist()
            texts = self.prompts or self._shown.captions(shown)
        number = max(PREVIEWS // len(texts), 1) * len(texts)
        return [
            SampleInput(texts[i % len(texts)], label=i % names if names else None, seed=i)
            for i in range(number)
        ]


def is_used(folder: Path) -> bool:
    """Whether a run folder already holds something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _line(step: TrainStep) -> dict[str, Any]:
    """What a step leaves in metrics.jsonl."""
    line = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
    return line | step.terms | ({"levels": step.levels} if step.levels else {})


def _truncate(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be run again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break  # half a line, written as the process was killed
        kept.append(line + "\n")
    write_whole(metrics, "".join(kept), overwrite=True)
