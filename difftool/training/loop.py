"""The training loop: a generator of TrainStep, so that progress, previews and stops live outside.

One optimiser step: pictures, times and noise drawn by coordinates (rng.py); x_t = alpha x0 +
sigma eps; the network's error against its target; AdamW; the moving average. A run that is stopped
and resumed continues bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from difftool.config import to_values
from difftool.data import Dataset
from difftool.diffusion.losses import TIMES, WEIGHTS, training_loss
from difftool.diffusion.path import call
from difftool.errors import InputError, ResourceError, UsageError
from difftool.model import Model
from difftool.training import rng
from difftool.training.checkpoint import save_checkpoint
from difftool.training.ema import Ema
from difftool.training.rng import Stream

LOG_EVERY = 10


class TrainStep(NamedTuple):
    """What one optimiser step did. `loss` and `grad_norm` are means since the last report, and
    None on the steps between reports, where they are not fetched from the device."""

    step: int
    lr: float
    loss: float | None
    grad_norm: float | None
    images_per_second: float


class Trainer:
    """Trains the networks of a model on a dataset; every choice is in its preset's TrainConfig.

    The U-Net is trained, and with it any text encoder whose vocabulary is the dataset's own.
    """

    def __init__(self, model: Model, dataset: Dataset):
        config = model.preset.train
        assert config.steps and config.batch_size and config.size
        self.model, self.dataset, self.config, self.seed = model, dataset, config, config.seed
        self.step = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.times = partial(TIMES[config.time], model.denoiser.path, **config.time_options)
        self.weight = partial(WEIGHTS[config.weight], **config.weight_options)
        call(f'time distribution "{config.time}"', self.times, torch.full((1,), 0.5))
        one, target = torch.ones(1, 1, 1, 1), model.denoiser.target
        call(f'loss weighting "{config.weight}"', self.weight, one, one, target)
        trained = {"unet"} | {
            f"text.{i}" for i, t in enumerate(model.preset.text) if t.tokenizer == "learned"
        }
        self.parameters: dict[str, Tensor] = {}
        for prefix, part in model.parts().items():
            part.requires_grad_(prefix in trained).train(prefix in trained)
            if prefix in trained:
                named = part.named_parameters()
                self.parameters |= {f"{prefix}.{name}": p for name, p in named}
        model.denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = Ema(self.parameters, config.ema) if config.ema else None
        precision = config.precision
        if precision == "auto":
            bf16 = model.device.type == "cuda" and torch.cuda.is_bf16_supported()
            precision = "bf16" if bf16 else "fp32"
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]

    # --- one step ----------------------------------------------------------------------------

    def lr(self, step: int) -> float:
        """Learning rate: a linear warm-up, then the decay to zero at the last step."""
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        rest = max(config.steps - config.warmup, 1)  # type: ignore[operator]
        left = min(1.0, max(0.0, 1 - (step - config.warmup) / rest))
        shape = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return config.lr * warm * shape[config.decay]

    def batch(self, first: int, count: int) -> tuple[Tensor, list[str], list[int | None]]:
        """Pictures [B,3,S,S] in [-1, 1], captions and labels of the samples first .. first + count.

        Sample n is the (n mod N)-th of epoch n // N, in that epoch's own order.
        """
        data, config, size = self.dataset, self.config, len(self.dataset)
        numbers = range(first, first + count)
        epochs = torch.tensor([n // size for n in numbers])
        orders = {e: rng.permutation(self.seed, e, size) for e in set(epochs.tolist())}
        indices = torch.stack([orders[n // size][n % size] for n in numbers])
        keys = rng.keys(self.seed, epochs, indices)
        slots = torch.arange(first, first + count)
        flips = (rng.uniform(self.seed, Stream.FLIP, 0, slots) < 0.5).tolist()
        drops = (rng.uniform(self.seed, Stream.DROP, 0, slots) < config.drop).tolist()
        chosen = indices.tolist()
        assert config.size
        pixels = data.images(chosen, config.size, flips if config.flip else None, keys)
        images = pixels.to(self.model.device).float().div_(127.5).sub_(1)
        captions = data.captions(chosen, keys) if self.model.text else [""] * count
        labels: list[int | None] = [None] * count
        if self.model.preset.unet.num_classes:
            labels = list(data.labels(chosen))
        drops = [d and self.model.guidable for d in drops]
        captions = ["" if d else c for c, d in zip(captions, drops, strict=True)]
        null = self.model.null_label
        labels = [null if d else v for v, d in zip(labels, drops, strict=True)]
        return images, captions, labels

    def loss(self, first: int, count: int) -> Tensor:
        """Mean loss of the samples first .. first + count."""
        model, config, seed = self.model, self.config, self.seed
        images, captions, labels = self.batch(first, count)
        slots = torch.arange(first, first + count, device=model.device)
        x0 = model.codec.encode(images)
        times = self.times(rng.uniform(seed, Stream.TIME, 0, slots))
        eps = rng.normal(seed, Stream.NOISE, 0, slots, tuple(x0.shape[1:]))
        size = (images.shape[-1], images.shape[-2])
        with torch.autocast(model.device.type, self.autocast, enabled=self.autocast is not None):
            cond = model.cond(captions, labels, size)
            losses = training_loss(
                model.denoiser, x0, cond, times=times, weight=self.weight, eps=eps, kind=config.loss
            )
        return losses.mean()

    def advance(self) -> None:
        """One optimiser step; its loss and gradient norm stay on the device."""
        config = self.config
        assert config.batch_size
        if self.model.preset.unet.dropout:
            torch.manual_seed(
                self.seed * 1_000_003 + self.step
            )  # dropout draws from the global one
        total = torch.zeros((), device=self.model.device)
        for part in range(config.accumulate):
            first = (self.step * config.accumulate + part) * config.batch_size
            loss = self.loss(first, config.batch_size) / config.accumulate
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        bound = config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), bound)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.losses.append(total)
        self.norms.append(norm.detach())
        self.step += 1

    def run(self) -> Iterator[TrainStep]:
        """Steps until the last; ResourceError if the loss or a gradient stops being finite."""
        config = self.config
        assert config.steps and config.batch_size
        began, images = time.monotonic(), 0
        while self.step < config.steps:
            lr = self.lr(self.step)
            self.advance()
            images += config.batch_size * config.accumulate
            loss = norm = None
            if self.step % LOG_EVERY == 0 or self.step == config.steps:
                loss = float(torch.stack(self.losses).mean())
                norm = float(torch.stack(self.norms).mean())
                self.losses, self.norms = [], []
                if not (math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())):
                    raise ResourceError(
                        f"training stopped at step {self.step}: the numbers are not finite",
                        f"loss {loss}, gradient norm {norm}",
                        "resume from the last checkpoint with a lower --lr",
                    )
            yield TrainStep(self.step, lr, loss, norm, images / (time.monotonic() - began))

    # --- state -------------------------------------------------------------------------------

    def save(self, folder: Path, *, keep: int) -> Path:
        """Write a checkpoint of everything that the next step depends on."""

        def write(where: Path) -> None:
            self.model.save(where / "model.safetensors")
            if self.ema:
                note = {"difftool.weights": "ema"}
                average = self.ema.average
                self.model.save(where / "ema.safetensors", weights=average, metadata=note)
            optimizer = {
                f"{name}.{key}": value.contiguous()
                for name, p in self.parameters.items()
                for key, value in self.optimizer.state.get(p, {}).items()
            }
            save_file(optimizer, where / "optimizer.safetensors")
            state = {
                "schema": 1,
                "step": self.step,
                "losses": [float(x) for x in self.losses],
                "norms": [float(x) for x in self.norms],
                "ema_updates": self.ema.updates if self.ema else 0,
                "scaler": self.scaler.state_dict(),
                "train": to_values(self.config),
                "dataset": self.dataset.fingerprint,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            (where / "state.json").write_text(json.dumps(state, indent=1))

        return save_checkpoint(folder, self.step, write, keep)

    def restore(self, checkpoint: Path) -> list[str]:
        """Continue from a checkpoint; returns notes on what differs from when it was made.

        UsageError if the run's seed, batches or networks are not the checkpoint's.
        """
        state = json.loads((checkpoint / "state.json").read_text())
        self._check_state(state, checkpoint)
        live = _tensors(checkpoint / "model.safetensors")
        _copy(self.parameters, live, checkpoint)
        if self.ema:
            _copy(self.ema.average, _tensors(checkpoint / "ema.safetensors"), checkpoint)
            self.ema.updates = state["ema_updates"]
        saved = _tensors(checkpoint / "optimizer.safetensors")
        for name, p in self.parameters.items():
            prefix = f"{name}."
            entry = {k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)}
            entry = {key: t for key, t in entry.items() if "." not in key}
            # In the parameter's own memory layout: the fused optimiser walks raw memory.
            laid_out = {
                k: t if k == "step" else torch.empty_like(p).copy_(t) for k, t in entry.items()
            }
            if laid_out:
                self.optimizer.state[p] = laid_out
        self.scaler.load_state_dict(state["scaler"])
        device = self.model.device
        self.losses = [torch.tensor(x, device=device) for x in state["losses"]]
        self.norms = [torch.tensor(x, device=device) for x in state["norms"]]
        self.step = state["step"]
        notes = []
        if state["dataset"] != self.dataset.fingerprint:
            notes.append("the dataset has changed since the checkpoint")
        if state["threads"] != torch.get_num_threads():
            notes.append(
                f"the checkpoint was made with {state['threads']} threads: sums may differ"
            )
        return notes

    def _check_state(self, state: dict[str, Any], checkpoint: Path) -> None:
        now, then = to_values(self.config), state["train"]
        for key in ("seed", "batch_size", "accumulate", "size", "ema"):
            if now[key] != then[key]:
                raise UsageError(
                    f"cannot resume {checkpoint} with another {key}",
                    f"it was {then[key]}, now {now[key]}",
                    "give the same value, or start a new run",
                )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise InputError(f"cannot read {path}", str(error)) from None


@torch.no_grad()
def _copy(targets: dict[str, Tensor], sources: dict[str, Tensor], checkpoint: Path) -> None:
    for name, target in targets.items():
        if name not in sources or sources[name].shape != target.shape:
            why = f"{name} is missing or has another shape"
            raise UsageError(f"{checkpoint} does not fit this model", why)
        target.copy_(sources[name])


@contextmanager
def graceful_stop() -> Iterator[list[int]]:
    """In the block a first SIGINT or SIGTERM is noted in the list; a second stops at once."""
    received: list[int] = []

    def note(signum: int, _frame: Any) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
