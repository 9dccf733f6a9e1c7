"""A run folder: configuration, metrics, sample sheets, checkpoints, loss plot, and the model.

config.yaml   metrics.jsonl   samples/step-000500.png   checkpoints/step-000500/
loss.png      model.safetensors at the end: the averaged weights, self-describing
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from difftool.config import Preset, to_yaml
from difftool.data import Dataset
from difftool.data.images import tile, to_pil, write_png
from difftool.errors import Stopped, UsageError
from difftool.model import Item, Model
from difftool.training import rng
from difftool.training.checkpoint import newest_good, verify_checkpoint
from difftool.training.loop import Trainer, TrainStep, graceful_stop

PREVIEWS = 16
SHEET_TILE = 128


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
    """One training run in its folder."""

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        dataset: Dataset,
        *,
        device: torch.device,
        tokenizer_json: str | None,
        resume: Path | None = None,
        save_every: int,
        keep: int,
        sample_every: int,
        prompts: Sequence[str] = (),
    ):
        """Build the model and trainer, from nothing or (resume) from a checkpoint folder."""
        self.folder, self.preset, self.dataset = folder, preset, dataset
        self.save_every, self.keep, self.sample_every = save_every, keep, sample_every
        self.prompts = list(prompts)
        self.notes: list[str] = []
        self.metrics = folder / "metrics.jsonl"
        self.lock = _lock(folder)
        try:
            model = Model.fresh(
                preset, seed=preset.train.seed, tokenizer_json=tokenizer_json, device=str(device)
            )
            self.trainer = Trainer(model, dataset)
            if resume is not None:
                self.notes += self.trainer.restore(resume)
            else:
                (folder / "config.yaml").write_text(to_yaml(preset))
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
        trainer, last = self.trainer, self.preset.train.steps
        with self.metrics.open("a", buffering=1) as metrics, graceful_stop() as signals:
            for step in trainer.run():
                if step.loss is not None:
                    line = {"step": step.step, "loss": step.loss}
                    line |= {"grad_norm": step.grad_norm, "lr": step.lr}
                    metrics.write(json.dumps(line) + "\n")
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
        self.model.save(path, weights=weights, metadata=note, overwrite=True)
        plot(self.metrics, self.folder / "loss.png")
        self.close()
        return path

    def close(self) -> None:
        """Let other runs have the folder."""
        self.lock.close()

    def sheet(self) -> Path:
        """A sheet of samples on fixed seeds, made with the averaged weights, and the loss plot."""
        model, step = self.model, self.trainer.step
        names = len(self.preset.classes)
        items = [
            Item(prompt, "", index % names if names else None, index)
            for index, prompt in enumerate(self._prompts())
        ]
        if self.trainer.ema:
            with self.trainer.ema.swapped():
                images = sample(model, items)
        else:
            images = sample(model, items)
        path = self.folder / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        enlarged = max(1, SHEET_TILE // images.shape[-1])  # so that small pictures can be seen
        large = images.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
        write_png(tile([to_pil(image) for image in large]), path, overwrite=True)
        plot(self.metrics, self.folder / "loss.png")
        return path

    def _prompts(self) -> list[str]:
        if not self.model.text:
            return [""] * PREVIEWS
        shown = rng.permutation(0, 0, len(self.dataset))[:PREVIEWS].tolist()
        texts = self.prompts or self.dataset.captions(shown)
        return [texts[i % len(texts)] for i in range(max(PREVIEWS, len(texts)))]


def sample(model: Model, items: Sequence[Item]) -> torch.Tensor:
    """Images [B,3,H,W] in [-1, 1] with the preset's own settings; the weights' mode is kept."""
    training = {name: part.training for name, part in model.parts().items()}
    for part in model.parts().values():
        part.eval()
    try:
        *_, last = model.generate(items, model.settings())
        return model.decode(last.x)
    finally:
        for name, part in model.parts().items():
            part.train(training[name])


def open_run(folder: Path, resume_from: Path | None) -> tuple[Path, list[str]]:
    """The checkpoint to resume a run from, and notes; UsageError where there is none."""
    if resume_from is not None:
        if not resume_from.is_dir():
            raise UsageError(f"checkpoint {resume_from} does not exist")
        problem = verify_checkpoint(resume_from)
        if problem:
            raise UsageError(f"checkpoint {resume_from} is damaged", problem)
        return resume_from, []
    return newest_good(folder / "checkpoints")


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
