"""What conditions the network: prompts as contexts, pooled texts and sizes, labels, guidance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from difftool.config.schema import SampleConfig
from difftool.diffusion.denoiser import Cond
from difftool.errors import UsageError
from difftool.networks.layers import sinusoids
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.model import Model
from difftool.text.syntax import Chunk, chunks

AESTHETIC, UNAESTHETIC = 6.0, 2.5
"""Aesthetic scores that SDXL's refiner is given: of what is wanted, and of what is not."""


class EncodedPrompts(NamedTuple):
    """What text encoders put out for a batch of prompts; None where the model has none."""

    context: Tensor | None
    """[B,L,D], those of several encoders side by side along D; L is a multiple of their length
    where a syntax makes chunks of long prompts."""
    pooled: Tensor | None
    """[B,P]."""


def encode_prompts(
    model: Model, prompts: Sequence[str], clip_skip: int | None = None, syntax: str = "none"
) -> EncodedPrompts:
    """Prompts as the network is given them.

    clip_skip: the hidden state that is the context, counted from the end (1 = the last); None = the
    model's own. syntax: whose weights and chunks prompts have. UsageError for a layer that no
    encoder has.
    """
    if not model.text:
        return EncodedPrompts(None, None)
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
            of_empty = encoder(ids, hidden)[0] if syntax == "comfy" else None
            context = _weighted(context, flat, of_empty)
        contexts.append(context.reshape(len(rows), -1, context.shape[-1]))
        if pool is not None and pooled is None:
            pooled = pool.reshape(len(rows), most, -1)[:, 0]
    return EncodedPrompts(torch.cat(contexts, dim=-1), pooled)


def _weighted(context: Tensor, flat: Sequence[Chunk], of_empty: Tensor | None) -> Tensor:
    """Contexts [N,L,D] of chunks with their tokens' weights, by ComfyUI's arithmetic if the context
    of an empty prompt is given, else by A1111's, which sets the mean back to what it was."""
    weights = torch.tensor([chunk.weights for chunk in flat], device=context.device)
    weights = weights[..., None].to(context.dtype)
    if of_empty is not None:
        return (context - of_empty) * weights + of_empty
    scaled = context * weights
    means = (part.mean(dim=(1, 2), keepdim=True) for part in (context, scaled))
    return scaled * (next(means) / next(means))


def _without_empty(texts: EncodedPrompts, prompts: Sequence[str]) -> EncodedPrompts:
    """The same with zeros for prompts that are empty."""
    kept = [float(bool(prompt)) for prompt in prompts]

    def masked(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        mask = torch.tensor(kept, device=tensor.device).to(tensor.dtype)
        return tensor * mask.view(-1, *[1] * (tensor.ndim - 1))

    return EncodedPrompts(masked(texts.context), masked(texts.pooled))


def pooled_texts(model: Model, prompts: Sequence[str]) -> list[Tensor]:
    """The pooled text [B,P] of prompts, of each text encoder."""
    pairs = zip(model.text, model.tokenizers, model.preset.text, strict=True)
    found = []
    for encoder, tokenizer, config in pairs:
        ids = torch.tensor(tokenizer.encode(list(prompts), config.length), device=model.device)
        found.append(encoder.pooled(ids))
    return found


def token_count(model: Model, prompt: str) -> tuple[int, int]:
    """How many tokens a prompt has and how many are read, start and end marks left out."""
    pairs = zip(model.tokenizers, model.preset.text, strict=True)
    return max(((t.count(prompt), c.length - 2) for t, c in pairs), default=(0, 0))


def build_cond(
    model: Model,
    texts: EncodedPrompts,
    labels: Sequence[int | None],
    size: tuple[int, int],
    *,
    guidance: float = 1.0,
    aesthetic: float = AESTHETIC,
    vector: Tensor | None = None,
) -> Cond:
    """What conditions the network for a batch; size (width, height) in pixels.

    labels: a class each, None for the one that means "none". guidance: of networks that are told
    their scale. vector [B,V]: the whole conditioning vector, in place of pooled texts and sizes.
    UsageError if the model needs a class that is missing.
    """
    unet, count = model.preset.unet, len(labels)
    label = scale = None
    if vector is None and unet.vector_dim and texts.pooled is not None:
        width, height = size
        # SDXL: original size, crop, target size. The refiner: its aesthetic score comes last.
        numbers = [float(n) for n in (height, width, 0, 0, height, width)]
        numbers = numbers[: model.preset.size_numbers]
        if model.preset.size_numbers == 5:
            numbers[4] = aesthetic
        values = torch.tensor(numbers, device=model.device, dtype=torch.float32)
        sizes = sinusoids(values, 256).flatten().expand(count, -1)
        vector = torch.cat([texts.pooled, sizes.to(texts.pooled.dtype)], dim=1)
    if unet.num_classes:
        null = model.null_label
        filled = [null if value is None else value for value in labels]
        if None in filled:
            raise UsageError(f"the model {model.name} needs a class", hint="give --label")
        label = torch.tensor(filled, device=model.device)
    if unet.guidance_dim:
        scale = torch.full((count,), guidance - 1.0, device=model.device)
    return Cond(context=texts.context, vector=vector, label=label, guidance=scale)


def conds_of(
    model: Model, inputs: Sequence[SampleInput], settings: SampleConfig, vector: Tensor | None
) -> list[Cond]:
    """The condition of a batch of pictures and, with guidance, the one it is guided away from.

    vector [B,V]: see `build_cond`; what is guided away from has zeros for it.
    """
    model.load_part("text")
    encode = partial(
        encode_prompts, model, clip_skip=settings.clip_skip, syntax=settings.prompt_syntax
    )
    labels, size = [each.label for each in inputs], settings.size
    texts = encode([each.prompt for each in inputs])
    wanted = build_cond(model, texts, labels, size, guidance=settings.guidance, vector=vector)
    if settings.guidance <= 1 or model.preset.unet.guidance_dim:
        return [wanted]
    negatives = [each.negative for each in inputs]
    texts = encode(negatives)
    if model.preset.zero_negative:
        texts = _without_empty(texts, negatives)
    zeros = None if vector is None else torch.zeros_like(vector)
    none: list[int | None] = [None] * len(inputs)
    unwanted = build_cond(model, texts, none, size, aesthetic=UNAESTHETIC, vector=zeros)
    return [wanted, unwanted]
