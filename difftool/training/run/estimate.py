"""What a run will take, said before it starts, and what follows from it: memory, time, disk."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from difftool.config.layers import Layer
from difftool.config.schema import DENOISING, RECIPES, OptimConfig, Part, Preset
from difftool.data import Dataset
from difftool.data.dataset import MEMORY_CAP
from difftool.engine.memory import free_memory
from difftool.errors import ResourceError
from difftool.storage.places import there
from difftool.training.run.costs import Costs, costs_of
from difftool.training.step import parallel

FP32 = 4
ROOM = 0.85
"""Of the memory that is free, what a run may need by its estimate."""
PROCESS = 1 << 29
"""Bytes that a process takes beside its networks."""
DAY = 86400.0


class Estimate(NamedTuple):
    """Bytes, but for the parameters; of the part of the run that needs most."""

    parameters: dict[str, int]
    weights: int
    """Weights, gradients, moments of the optimiser, moving average."""
    activations: int
    """What the backward pass needs of a batch."""
    batch: int
    checkpoint: int
    disk: int
    """All that the run will write."""

    @property
    def memory(self) -> int:
        """All that training needs."""
        return self.weights + self.activations + PROCESS

    def rows(self, free: int | None = None) -> list[tuple[str, str, str]]:
        """The same as (name, value, what it is)."""
        counts = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in self.parameters.items())
        memory = f"{size(self.weights)} for weights and optimiser, "
        memory += f"about {size(self.activations)} for a batch of {self.batch}"
        if free is not None:
            memory += f"; {size(free)} are free"
        disk = f"{size(self.checkpoint)} a checkpoint, {size(self.disk)} in all"
        return [
            ("parameters", f"{sum(self.parameters.values()) / 1e6:.2f} M", counts),
            ("memory", size(self.memory), memory),
            ("disk", size(self.disk), disk),
        ]


def estimate(preset: Preset, costs: Costs, keep: int, device: torch.device) -> Estimate:
    """The estimate for training the preset's parts."""
    total = sum(costs.parameters.values())
    most = (0, 0, 0)
    checkpoint = disk = 0
    for part, cost in costs.parts.items():
        recipe = preset.recipe(part)
        assert recipe.batch_size
        kept = total if part in DENOISING and not preset.train.lora_rank else cost.learning
        saved = FP32 * (kept * (1 + _averages(recipe)) + 2 * cost.learning)
        checkpoint = max(checkpoint, saved)
        disk += saved * (keep + 1) + FP32 * kept  # a new one is written before an old one goes
        own, each = _memory(preset, part, costs, device)
        most = max(
            most, (own, recipe.batch_size * each, recipe.batch_size), key=lambda m: m[0] + m[1]
        )
    return Estimate(costs.parameters, *most, checkpoint, disk)


def _memory(preset: Preset, part: Part, costs: Costs, device: torch.device) -> tuple[int, int]:
    """Bytes that a part's training needs whatever the batch, and for each picture of it."""
    recipe, cost = preset.recipe(part), costs.parts[part]
    half = recipe.precision in ("bf16", "fp16") or (
        recipe.precision == "auto" and device.type == "cuda"
    )
    total = sum(costs.parameters.values())
    own = FP32 * (total + cost.beside + cost.learning * (3 + _averages(recipe)))
    return own, cost.activations // (2 if half else 1)


def _averages(recipe: OptimConfig) -> int:
    """How many moving averages of the weights there are."""
    lengths = len(recipe.ema_lengths) if recipe.ema_profile == "power" else 1
    return lengths if recipe.ema else 0


def room_for(dataset: Dataset, preset: Preset, device: torch.device) -> int | None:
    """Bytes that are free on a device for a process and its networks; None = it does not say."""
    free = free_memory(device)
    if free is None or device.type == "cuda":
        return free
    size = preset.train.size or 0
    pictures = 3 * size**2 * len(dataset)
    free -= pictures if pictures <= MEMORY_CAP else 0
    return free // parallel.size()


# --- what follows ----------------------------------------------------------------------------

SAVINGS: tuple[tuple[str, Any, str], ...] = (
    ("checkpointing", True, "a third more time, for less memory"),
    ("ema", 0.0, "there is no memory for an average"),
)
"""What is done in turn where one picture is too much: key of a recipe, value, why."""


def fit(
    preset: Preset,
    tokenizer_json: str | None,
    given: Mapping[str, Collection[str]],
    free: int,
    device: torch.device,
    processes: int = 1,
) -> tuple[list[Layer], Costs]:
    """What makes a preset's training fit into the memory that is free, as layers, and its costs
    then: smaller batches, with accumulation for the rest, and SAVINGS.

    given: keys of each recipe that the user has said, which stand.
    """
    costs, layers = costs_of(preset, tokenizer_json), []
    room, why = ROOM * free - PROCESS, f"{size(free)} are free"
    for part in preset.parts:
        name, kept = RECIPES[part], given.get(RECIPES[part], ())
        batch, accumulate = preset.recipe(part).batch_size or 1, preset.recipe(part).accumulate
        least = batch if "batch_size" in kept or batch % processes else processes
        own, each = _memory(preset, part, costs, device)
        for key, value, words in SAVINGS:
            recipe = preset.recipe(part)
            saved = not hasattr(recipe, key) or getattr(recipe, key) == value
            if own + least * each <= room or saved or key in kept:
                continue
            layers.append(Layer(f"chosen: {words}: {why}", {name: {key: value}}))
            preset = replace(preset, **{name: replace(recipe, **{key: value})})
            costs = costs_of(preset, tokenizer_json)
            own, each = _memory(preset, part, costs, device)
        sizes = [n for n in range(least, batch + 1, least) if batch % n == 0]
        fits = max([n for n in sizes if own + n * each <= room], default=least)
        if fits == batch:
            continue
        words = f"{batch} would need about {size(own + batch * each)}, {why}"
        layers.append(Layer(f"chosen: {words}", {name: {"batch_size": fits}}))
        if "accumulate" not in kept:
            words = f"so that a step still has {batch * accumulate} pictures"
            more = {"accumulate": accumulate * batch // fits}
            layers.append(Layer(f"chosen: {words}", {name: more}))
    return layers, costs


def out_of_reach(estimate: Estimate, free: int | None, seconds: float) -> list[str]:
    """What of a run this machine will not do, and what to do about it."""
    notes = []
    if free is not None and estimate.memory > free:
        notes.append(
            f"training needs about {size(estimate.memory)} of memory and {size(free)} are free: "
            "give --lora, a smaller --size or a smaller --batch-size"
        )
    if seconds > DAY:
        notes.append(
            f"training takes about {seconds / DAY:,.1f} days here: give fewer --steps, a smaller "
            "--size or another --device"
        )
    return notes


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1000 or unit == "GiB":
            break
    return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"


def check_disk(folder: Path, needed: int) -> None:
    """ResourceError where the disk below a run folder has no room for the run."""
    free = shutil.disk_usage(there(folder)).free
    if free < needed:
        why = f"the run writes {size(needed)}, {size(free)} are free"
        raise ResourceError("the disk is too full for this run", why, "free some, or --keep 1")
