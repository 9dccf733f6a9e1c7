"""What a picture costs in training: memory and arithmetic, counted on networks without weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from difftool.adapters.lora.train import Adapters
from difftool.config.schema import DENOISING, Part, Preset, TrainConfig
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.path import Level
from difftool.pipeline.model import Model
from difftool.training.run.evaluation import Work
from difftool.training.step.loop import objective_class

DRAWING = 50
"""Forward passes that a teacher's picture is taken to need: 25 steps, guided."""
REACHED = 0.75
"""Share of a single convolution's speed that whole training steps have."""


class Cost(NamedTuple):
    """What one picture takes in the training of a part."""

    learning: int = 0
    """Parameters that learn."""
    beside: int = 0
    """Parameters of networks that are held beside them: teachers, targets."""
    activations: int = 0
    """Bytes that autograd keeps, fp32."""
    forward: float = 0.0
    """Floating-point operations of a forward pass."""
    encode: float = 0.0
    """The same of the autoencoder's encoder, where there is one."""
    decode: float = 0.0
    """And of its decoder."""


class Costs(NamedTuple):
    """Of a preset."""

    parameters: dict[str, int]
    """By part of the model."""
    parts: dict[Part, Cost]
    """By part that is trained."""


def costs_of(preset: Preset, tokenizer_json: str | None = None) -> Costs:
    """Counted by running the networks, without weights, on no memory at all."""
    model = Model(preset, tokenizer_json)
    model.adapters = Adapters.of(model.network, preset.train)
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.parts().items()}
    return Costs(counts, {part: _cost(model, part, counts) for part in preset.parts})


def _cost(model: Model, part: Part, counts: dict[str, int]) -> Cost:
    recipe = model.preset.recipe(part)
    objective = objective_class(part, recipe)
    names, side = objective.learned_parts(model.preset), recipe.size
    learning = sum(counts.get(name, 0) for name in names)
    if part == "clip" or side is None:
        return Cost(learning)  # a text encoder alone keeps little
    beside = 0 if "lora" in names else objective.copies * learning
    for name, network in model.parts().items():
        network.requires_grad_(name in names)
    if isinstance(recipe, TrainConfig):
        model.network.checkpoint(recipe.checkpointing)
    with saved_for_backward() as tensors:
        forward = _operations(partial(_reconstruct if part == "vae" else _denoise, model, side))
    activations = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    if not model.codec.encoders():
        return Cost(learning, beside, activations, forward)
    encode = _operations(lambda: model.codec.posterior(torch.empty(1, 3, side, side)))
    if not model.codec.learned:  # nothing goes back from what a prior makes
        return Cost(learning, beside, activations, forward, encode)
    both = _operations(lambda: _reconstruct(model, side))
    return Cost(learning, beside, activations, forward, encode, both - encode)


def _operations(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        run()
    return float(counter.get_total_flops())


def _reconstruct(model: Model, side: int) -> None:
    """The autoencoder on one picture."""
    mean, _ = model.codec.posterior(torch.empty(1, 3, side, side))
    model.codec.pictures(mean)


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


# --- work and time ---------------------------------------------------------------------------


def is_cached(preset: Preset, images: int) -> bool:
    """Whether the latents of so many pictures are made before the first step: where it goes through
    all of them."""
    config = preset.train
    learned = (config.steps or 0) * (config.batch_size or 0) * config.accumulate
    encodes = preset.codec.learned or "prior" in preset.parts
    enough = learned >= images * (1 + bool(config.flip))
    return encodes and enough and not config.augment


def work_of(preset: Preset, part: Part, cost: Cost, *, cached: bool) -> Work:
    """Of a part's step, its sheets and its measures. cached: whether latents are made before."""
    recipe, settings = preset.recipe(part), preset.sample
    passes = objective_class(part, recipe).passes
    if isinstance(recipe, TrainConfig):
        passes += recipe.checkpointing - bool(recipe.lora_rank)
    batch = (recipe.batch_size or 1) * recipe.accumulate
    if part not in DENOISING:
        return Work(batch * passes * cost.forward, cost.forward, cost.forward)
    guided = settings.guidance != 1 and bool(preset.text or preset.classes)
    drawn = settings.steps * (1 + guided) * cost.forward + cost.decode
    step = batch * (passes * cost.forward + (0 if cached else cost.encode))
    return Work(step, drawn, cost.forward)


def speed(device: torch.device) -> float:
    """Floating-point operations a second of training on a device as it is now, about: measured on a
    convolution, forward and back."""
    half = device.type == "cuda"
    batch, width, side = (4, 64, 32) if device.type == "cpu" else (32, 256, 32)
    layer = nn.Conv2d(width, width, 3, padding=1, device=device)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(batch, width, side, side, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            layer(x.contiguous(memory_format=torch.channels_last)).float().sum().backward()
        float(layer.bias.grad[0])  # type: ignore[index]  # which waits for the device
        best = min(best, time.perf_counter() - began)
    return REACHED * 3 * 2 * 9 * width**2 * batch * side**2 / best
