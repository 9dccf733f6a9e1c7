"""What a run will take, said before it starts: parameters, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from difftool.adapters.lora.train import Adapters
from difftool.config.schema import Part, TrainConfig
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.path import Level
from difftool.errors import ResourceError
from difftool.pipeline.model import Model
from difftool.training.step.objectives import OBJECTIVES

FP32 = 4


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

    def rows(self) -> list[tuple[str, str, str]]:
        """The same as (name, value, what it is)."""
        counts = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in self.parameters.items())
        memory = f"{size(self.weights)} for weights and optimiser, "
        memory += f"about {size(self.activations)} for a batch of {self.batch}"
        disk = f"{size(self.checkpoint)} a checkpoint, {size(self.disk)} in all"
        return [
            ("parameters", f"{sum(self.parameters.values()) / 1e6:.2f} M", counts),
            ("memory", size(self.weights + self.activations), memory),
            ("disk", size(self.disk), disk),
        ]


def estimate(model: Model, keep: int, device: torch.device) -> Estimate:
    """The estimate for training the preset's parts; the model needs no weights yet."""
    preset = model.preset
    if rank := preset.train.lora_rank:
        model.adapters = Adapters(model.network, rank, preset.train.lora_alpha)
    parts = model.parts()
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in parts.items()}
    total = sum(counts.values())
    weights = activations = batch = checkpoint = disk = 0
    for part in preset.parts:
        recipe = preset.recipe(part)
        assert recipe.batch_size
        learning = sum(counts.get(name, 0) for name in OBJECTIVES[part].learned_parts(preset))
        averages = len(recipe.ema_lengths) if recipe.ema_profile == "power" else 1
        averages = averages if recipe.ema else 0
        kept = total if part == "unet" and not rank else learning
        saved = FP32 * (kept * (1 + averages) + 2 * learning)
        checkpoint = max(checkpoint, saved)
        disk += saved * (keep + 1) + FP32 * kept  # a new one is written before an old one goes
        half = recipe.precision in ("bf16", "fp16") or (
            recipe.precision == "auto" and device.type == "cuda"
        )
        held = recipe.batch_size * activation_bytes(model, part) // (2 if half else 1)
        own = FP32 * (total + learning * (3 + averages))
        if own + held > weights + activations:
            weights, activations, batch = own, held, recipe.batch_size
    return Estimate(counts, weights, activations, batch, checkpoint, disk)


def activation_bytes(model: Model, part: Part) -> int:
    """What autograd keeps of one fp32 sample, counted by running the networks, still without
    weights, on no memory at all; 0 for a text encoder alone, which keeps little."""
    recipe = model.preset.recipe(part)
    side = recipe.size
    if part == "clip" or side is None:
        return 0
    for name, network in model.parts().items():
        network.requires_grad_(name in OBJECTIVES[part].learned_parts(model.preset))
    if isinstance(recipe, TrainConfig):
        model.network.checkpoint(recipe.checkpointing)
    with saved_for_backward() as tensors, torch.device("meta"):
        if part == "vae":
            mean, _ = model.codec.posterior(torch.empty(1, 3, side, side))
            model.codec.pictures(mean)
        else:
            _denoise(model, side)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _denoise(model: Model, side: int) -> None:
    """The U-Net on one sample, conditioned as it is in training."""
    unet, denoiser = model.preset.unet, model.denoiser
    contexts = [
        encoder(torch.zeros(1, config.length, dtype=torch.long))[0]
        for encoder, config in zip(model.text, model.preset.text, strict=True)
    ]
    cond = Cond(
        context=torch.cat(contexts, dim=-1) if contexts else None,
        vector=torch.empty(1, unet.vector_dim) if unet.vector_dim else None,
        label=torch.zeros(1, dtype=torch.long) if unet.num_classes else None,
        guidance=torch.empty(1) if unet.guidance_dim else None,
    )
    latent = side // model.codec.factor
    level = Level(*(torch.empty(1) for _ in range(3)))  # type: ignore[arg-type]
    denoiser(torch.empty(1, unet.in_channels, latent, latent), level, cond)


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """In the block, the tensors that the backward pass would need, one a storage."""
    storages: set[int] = set()
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if not isinstance(tensor, nn.Parameter) and storage not in storages:
            storages.add(storage)
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield tensors


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1000 or unit == "GiB":
            break
    return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"


def check_disk(folder: Path, needed: int) -> None:
    """ResourceError where the disk below a run folder has no room for the run."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        why = f"the run writes {size(needed)}, {size(free)} are free"
        raise ResourceError("the disk is too full for this run", why, "free some, or --keep 1")
