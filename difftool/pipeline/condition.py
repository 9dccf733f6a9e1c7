"""What conditions the U-Net: prompts as contexts, pooled texts and sizes, labels, guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difftool.config.schema import SampleConfig
from difftool.diffusion.denoiser import Cond
from difftool.errors import UsageError
from difftool.networks.layers import sinusoids
from difftool.text.syntax import Chunk, chunks

if TYPE_CHECKING:
    from difftool.pipeline.model import Model

Embed = Callable[[Sequence[str]], tuple[Tensor | None, Tensor | None]]
"""Prompts to context [B,L,D] and pooled text [B,P]."""
AESTHETICS = (6.0, 2.5)
"""Aesthetic scores that SDXL's refiner is told: of what is wanted, and of what is not."""


def embed(
    model: Model, prompts: Sequence[str], clip_skip: int | None = None, syntax: str = "none"
) -> tuple[Tensor | None, Tensor | None]:
    """Context [B,L,D] and pooled [B,P] of prompts; None where the model has none.

    L is a multiple of the encoders' length where a syntax makes chunks of long prompts.
    """
    if not model.text:
        return None, None
    contexts, pooled = [], None
    encoders = zip(model.text, model.tokenizers, model.preset.text, strict=True)
    for encoder, tokenizer, config in encoders:
        rows = [chunks(tokenizer, prompt, config.length, syntax) for prompt in prompts]
        (empty,) = chunks(tokenizer, "", config.length)
        most = max(map(len, rows))
        rows = [row + [empty] * (most - len(row)) for row in rows]
        flat = [chunk for row in rows for chunk in row]
        hidden = None if clip_skip is None else -clip_skip
        if hidden is not None and not 1 <= -hidden <= config.layers:
            why = f"the text encoder has {config.layers} layers"
            raise UsageError(f"--clip-skip {clip_skip} is not usable", why, "1 is the last layer")
        ids = torch.tensor([chunk.ids for chunk in flat], device=model.device)
        context, pool = encoder(ids, hidden)
        if any(weight != 1 for chunk in flat for weight in chunk.weights):
            ids = torch.tensor([empty.ids], device=model.device)
            nothing = encoder(ids, hidden)[0] if syntax == "comfy" else None
            context = _weighted(context, flat, nothing)
        contexts.append(context.reshape(len(rows), -1, context.shape[-1]))
        if pool is not None and pooled is None:
            pooled = pool.reshape(len(rows), most, -1)[:, 0]
    return torch.cat(contexts, dim=-1), pooled


def _weighted(context: Tensor, flat: Sequence[Chunk], nothing: Tensor | None) -> Tensor:
    """Contexts [N,L,D] of chunks with their tokens' weights, by ComfyUI's arithmetic if the context
    of an empty prompt is given, else by A1111's, which sets the mean back to what it was."""
    weights = torch.tensor([chunk.weights for chunk in flat], device=context.device)
    weights = weights[..., None].to(context.dtype)
    if nothing is not None:
        return (context - nothing) * weights + nothing
    scaled = context * weights
    means = (part.mean(dim=(1, 2), keepdim=True) for part in (context, scaled))
    return scaled * (next(means) / next(means))


def cond(
    model: Model,
    prompts: Sequence[str],
    labels: Sequence[int | None],
    size: tuple[int, int],
    guidance: float = 1.0,
    embed: Embed | None = None,
    *,
    settings: SampleConfig | None = None,
    negative: bool = False,
    vector: Tensor | None = None,
) -> Cond:
    """What conditions the U-Net for a batch; size (width, height) in pixels.

    embed: stands in for the model's own (a cache of it, say). settings: how prompts are read.
    negative: whether it is what to keep away from. vector [B,V]: the whole conditioning vector.
    """
    if embed is not None:
        context, pooled = embed(prompts)
    elif settings is not None:
        context, pooled = model.embed(prompts, settings.clip_skip, settings.prompt_syntax)
    else:
        context, pooled = model.embed(prompts)
    unet, count = model.preset.unet, len(prompts)
    label = scale = None
    if negative and model.preset.zero_negative:
        told = torch.tensor([float(bool(prompt)) for prompt in prompts], device=model.device)
        context = None if context is None else context * told[:, None, None].to(context.dtype)
        pooled = None if pooled is None else pooled * told[:, None].to(pooled.dtype)
    if vector is None and unet.vector_dim and pooled is not None:
        width, height = size
        # SDXL: original size, crop, target size. The refiner: its aesthetic score comes last.
        numbers = [float(n) for n in (height, width, 0, 0, height, width)]
        numbers = numbers[: model.preset.size_numbers]
        if model.preset.size_numbers == 5:
            numbers[4] = AESTHETICS[negative]
        values = torch.tensor(numbers, device=model.device, dtype=torch.float32)
        sizes = sinusoids(values, 256).flatten().expand(count, -1)
        vector = torch.cat([pooled, sizes.to(pooled.dtype)], dim=1)
    if unet.num_classes:
        null = model.null_label
        filled = [null if value is None else value for value in labels]
        if None in filled:
            raise UsageError(f"the model {model.name} needs a class", hint="give --label")
        label = torch.tensor(filled, device=model.device)
    if unet.guidance_dim:
        scale = torch.full((count,), guidance - 1.0, device=model.device)
    return Cond(context=context, vector=vector, label=label, guidance=scale)
