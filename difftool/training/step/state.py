"""Checkpoints: all that the next step depends on, written and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftool.config.schema import OptimConfig
from difftool.config.validate import to_values
from difftool.errors import UsageError
from difftool.storage import runs
from difftool.storage.commit import write_whole
from difftool.storage.safetensors import load_tensors, save_tensors
from difftool.training.step import parallel
from difftool.training.step.loop import Trainer, not_finite


def check_finite(trainer: Trainer) -> None:
    """ResourceError if a weight, an average or a moment of the optimiser is not finite."""
    groups: dict[str, Mapping[str, Tensor]] = {"weights": trainer.learning | _beside(trainer)}
    if trainer.ema:
        groups |= {f"averaged weights ({k})": track for k, track in trainer.ema.tracks.items()}
    groups["state of the optimiser"] = _moments(trainer)
    for what, tensors in groups.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise not_finite(trainer.step, f"of the {what} {name}")


def _moments(trainer: Trainer) -> dict[str, Tensor]:
    """The state of the optimiser, by the names of parameters."""
    return {
        f"{name}.{key}": value
        for name, p in trainer.learning.items()
        for key, value in _state_of(trainer, name).get(p, {}).items()
    }


def _state_of(trainer: Trainer, name: str) -> MutableMapping[Any, Any]:
    """The state of the optimiser that moves the parameter of that name."""
    return next(o.state for o, parameters in trainer.optimizers if name in parameters)


def _beside(trainer: Trainer) -> dict[str, Tensor]:
    """What is left behind at the end."""
    return trainer.helper_parameters | trainer.objective.tensors()


def save_state(trainer: Trainer, run: Path, *, keep: int) -> Path:
    """Write a checkpoint of everything that the next step depends on, and averages to choose
    from, into a run folder. Of several processes all call it and the first writes."""
    trainer.record.reduce()
    path = run / runs.CHECKPOINTS / runs.step_name(trainer.step)
    try:
        if parallel.is_main():
            runs.save_checkpoint(run, trainer.step, lambda where: _write(trainer, where), keep)
            if trainer.ema and trainer.config.ema_profile == "power":
                trainer.ema.snapshot(run / runs.AVERAGES)
    finally:
        parallel.wait()
    return path


def _write(trainer: Trainer, where: Path) -> None:
    parts = trainer.kept_parts()
    trainer.model.save(where / runs.MODEL, parts=parts)
    if trainer.ema:
        note, path = {"difftool.weights": "ema"}, where / runs.AVERAGED
        trainer.model.save(path, parts=parts, weights=trainer.ema.average, metadata=note)
        for rule, track in list(trainer.ema.tracks.items())[:-1]:
            save_tensors(where / f"ema-{rule}.safetensors", track)
    save_tensors(where / runs.OPTIMIZER, _moments(trainer))
    if beside := _beside(trainer):
        save_tensors(where / runs.HELPERS, beside)
    state = {
        "schema": 1,
        "step": trainer.step,
        "record": trainer.record.state(),
        "ema_updates": trainer.ema.updates if trainer.ema else 0,
        "scaler": trainer.scaler.state_dict(),
        "train": to_values(trainer.config),
        "dataset": trainer.dataset.fingerprint,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_whole(where / runs.STATE, json.dumps(state, indent=1))


def restore_state(trainer: Trainer, checkpoint: Path) -> list[str]:
    """Continue from a checkpoint; returns notes on what differs from when it was made.

    UsageError if the run's seed, batches or networks are not the checkpoint's.
    """
    state = json.loads((checkpoint / runs.STATE).read_text(encoding="utf-8"))
    _check_state(trainer, state, checkpoint)
    kept = tuple(f"{part}." for part in trainer.kept_parts())
    mine = {n: t for n, t in trainer.model.tensors().items() if n.startswith(kept)}
    _copy(mine, load_tensors(checkpoint / runs.MODEL), checkpoint)
    if beside := _beside(trainer):
        _copy(beside, load_tensors(checkpoint / runs.HELPERS), checkpoint)
    if trainer.ema:
        for rule, track in trainer.ema.tracks.items():
            name = "ema" if track is trainer.ema.average else f"ema-{rule}"
            _copy(track, load_tensors(checkpoint / f"{name}.safetensors"), checkpoint)
        trainer.ema.updates = state["ema_updates"]
    saved = load_tensors(checkpoint / runs.OPTIMIZER)
    for name, p in trainer.learning.items():
        prefix = f"{name}."
        entry = {k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)}
        entry = {key: t for key, t in entry.items() if "." not in key}
        # In the parameter's own memory layout: the fused optimiser walks raw memory.
        laid_out = {
            key: torch.empty_like(t if key == "step" else p).copy_(t) for key, t in entry.items()
        }
        if laid_out:
            _state_of(trainer, name)[p] = laid_out
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.record.restore(state["record"])
    trainer.step = state["step"]
    notes = []
    if state["dataset"] != trainer.dataset.fingerprint:
        notes.append("the dataset has changed since the checkpoint")
    if state["threads"] != torch.get_num_threads():
        notes.append(f"the checkpoint was made with {state['threads']} threads: sums may differ")
    return notes


def _check_state(trainer: Trainer, state: dict[str, Any], checkpoint: Path) -> None:
    now, then = to_values(trainer.config), state["train"]
    fixed = ("seed", "batch_size", "accumulate", "size", "ema")
    for key in (*fixed, "optimizer", "ema_profile", "ema_lengths"):
        before = then.get(key, OptimConfig.__dataclass_fields__[key].default)
        before = list(before) if isinstance(before, tuple) else before
        if now[key] != before:
            raise UsageError(
                f"cannot resume {checkpoint} with another {key}",
                f"it was {before}, now {now[key]}",
                "give the same value, or start a new run",
            )


@torch.no_grad()
def _copy(targets: dict[str, Tensor], sources: dict[str, Tensor], checkpoint: Path) -> None:
    for name, target in targets.items():
        if name not in sources or sources[name].shape != target.shape:
            why = f"{name} is missing or has another shape"
            raise UsageError(f"{checkpoint} does not fit this model", why)
        target.copy_(sources[name])
