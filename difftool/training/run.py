"""A run folder: configuration, metrics, sample sheets, checkpoints, loss plot, and the model.

config.yaml   metrics.jsonl   samples/step-000500.png   checkpoints/step-000500/
loss.png      model.safetensors at the end: the averaged weights, self-describing
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from difftool.config import Part, Preset, to_yaml
from difftool.data import Dataset
from difftool.data.images import tile, to_pil, write_png, write_whole
from difftool.errors import Stopped, UsageError
from difftool.model import Item, Model
from difftool.training import rng
from difftool.training.batches import to_signal
from difftool.training.cache import Embeddings, Latents
from difftool.training.loop import Trainer, TrainStep, graceful_stop
from difftool.training.objectives import Denoising

PREVIEWS = 16
SHEET_TILE = 128
MEASURED = 4096
"""Pictures by which the latents' mean and deviation are measured."""


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
        progress: Progress = _silent,
    ):
        """Build the model and trainer, from nothing or (resume) from a checkpoint folder.

        adopt: the models that parts ("vae", "text", "unet") take their first weights from.
        progress: shows (name, total) as a context whose `update(done)` is called, while pictures
        are read and encoded.
        """
        self.folder, self.preset, self.dataset, self.part = folder, preset, dataset, part
        self.save_every, self.keep, self.sample_every = save_every, keep, sample_every
        self.prompts = list(prompts)
        self.notes: list[str] = []
        self.metrics = folder / "metrics.jsonl"
        self.lock = _lock(folder)
        try:
            recipe = preset.recipe(part)
            model = Model.fresh(
                preset, seed=recipe.seed, tokenizer_json=tokenizer_json, device=str(device)
            )
            for name, path in (adopt or {}).items():
                model.adopt(path, name)
            if resume is None:
                write_whole(folder / "config.yaml", to_yaml(preset).encode(), overwrite=True)
            assert recipe.size
            with progress("reading pictures", len(dataset)) as shown:
                dataset.prepare(recipe.size, lambda done, _: shown.update(done))
            self.trainer = Trainer(model, dataset, part)
            if resume is not None:
                self.notes += self.trainer.restore(resume)
            objective = self.trainer.objective
            if isinstance(objective, Denoising) and preset.text and not objective.reads():
                objective.embeddings = Embeddings(model, folder / "cache")
            if isinstance(objective, Denoising) and preset.codec.kind == "vae":
                with progress("encoding pictures", len(dataset)) as shown:
                    objective.latents = Latents.make(
                        model, dataset, recipe.size, flip=bool(recipe.flip),
                        folder=folder / "cache", progress=lambda done, _: shown.update(done),
                    )  # fmt: skip
            _truncate(self.metrics, self.trainer.step)
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
        with self.metrics.open("a", buffering=1) as metrics, graceful_stop() as signals:
            for step in trainer.run():
                if step.loss is not None:
                    metrics.write(json.dumps(_line(step)) + "\n")
                yield step
                if signals:
                    where = self.save()
                    hint = f"continue with --out {self.folder} --resume"
                    raise Stopped(
                        signals[0], f"stopped after step {step.step}, saved {where}", hint
                    )
                if step.step % self.sample_every == 0 or step.step == last:
                    self.sheet()
                if step.step % self.save_every == 0 and step.step != last:
                    self.save()

    def save(self) -> Path:
        """Write a checkpoint."""
        return self.trainer.save(self.folder / "checkpoints", keep=self.keep)

    def finish(self) -> Path:
        """Write the last checkpoint, the plot and the model; the model's path."""
        self.save()
        path = self.folder / "model.safetensors"
        ema = self.trainer.ema
        note = {"difftool.weights": "ema" if ema else "live"}
        weights = ema.average if ema else None
        if self.part == "vae":
            self.model.preset = self._measured()
        parts = self.trainer.kept_parts()
        self.model.save(path, weights=weights, parts=parts, metadata=note, overwrite=True)
        plot(self.metrics, self.folder / "loss.png")
        self.close()
        return path

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
        self.lock.close()

    def sheet(self) -> Path | None:
        """A sheet of what the averaged weights make of fixed seeds, and the loss plot; for an
        autoencoder pictures and, below them, their reconstructions."""
        plot(self.metrics, self.folder / "loss.png")
        if self.part == "clip":
            return None
        with self.averaged():
            vae = self.part == "vae"
            images = self._reconstructions() if vae else self.samples(self._items())
        path = self.folder / "samples" / f"step-{self.trainer.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        enlarged = max(1, SHEET_TILE // images.shape[-1])  # so that small pictures can be seen
        large = images.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
        columns = len(images) // 2 if self.part == "vae" else None
        write_png(tile([to_pil(image) for image in large], columns), path, overwrite=True)
        return path

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the model is in evaluation and computes with the averaged weights."""
        ema, parts = self.trainer.ema, self.model.parts()
        training = {name: part.training for name, part in parts.items()}
        for part in parts.values():
            part.eval()
        try:
            with ema.swapped() if ema else nullcontext():
                yield
        finally:
            for name, part in parts.items():
                part.train(training[name])

    def samples(self, items: Sequence[Item]) -> torch.Tensor:
        """Images [B,3,H,W] in [-1, 1] with the preset's own settings."""
        *_, last = self.model.generate(items, self.model.settings())
        return self.model.decode(last.x)

    @torch.no_grad()
    def _reconstructions(self) -> torch.Tensor:
        codec, size = self.model.codec, self.trainer.config.size
        assert size
        shown = rng.permutation(0, 0, len(self.dataset))[: PREVIEWS // 2].tolist()
        pictures = to_signal(self.dataset.images(shown, size), self.model.device)
        return torch.cat([pictures, self.model.decode(codec.encode(pictures))])

    def _items(self) -> list[Item]:
        """What the sheets show, the same all through the run."""
        names, texts = len(self.preset.classes), [""]
        if self.model.text:
            shown = rng.permutation(0, 0, len(self.dataset))[:PREVIEWS].tolist()
            texts = self.prompts or self.dataset.captions(shown)
        return [
            Item(texts[i % len(texts)], label=i % names if names else None, seed=i)
            for i in range(max(PREVIEWS, len(texts)))
        ]


def is_used(folder: Path) -> bool:
    """Whether a run folder already holds something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def plot(metrics: Path, path: Path) -> None:
    """loss.png: the training loss and its running mean over the steps, both axes logarithmic."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    window = max(1, len(losses) // 50)
    means = [
        sum(losses[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1))
        for i in range(len(losses))
    ]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="loss")
    axes.plot(steps, means, color="#08519c", linewidth=1.8, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=path.parent.name)
    axes.grid(True, which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, path)


def _line(step: TrainStep) -> dict[str, Any]:
    """What a step leaves in metrics.jsonl."""
    line = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
    return line | step.terms | ({"levels": step.levels} if step.levels else {})


def _lock(folder: Path) -> IO[str]:
    """Held for the life of the run: two runs in one folder would destroy each other."""
    handle = (folder / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise UsageError(f"another run is at work in {folder}") from None
    return handle


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
    temporary = metrics.with_name(f".{metrics.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, metrics)


def estimate(preset: Preset, model: Model) -> list[str]:
    """What a run will take: parameters, memory of weights and optimiser, disk a checkpoint."""
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.parts().items()}
    total = sum(parts.values())
    counts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items())
    copies = 5 if preset.train.ema else 4  # weights, gradients, two moments, moving average
    return [
        f"parameters: {counts}",
        f"memory: {total * 4 * copies / 2**20:.0f} MiB for weights and optimiser, plus activations",
        f"disk: {total * 4 * (copies - 1) / 2**20:.0f} MiB a checkpoint",
    ]
