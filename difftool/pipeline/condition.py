"""What conditions the network: prompts as contexts, pooled texts and sizes, labels, guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from difftool.config.schema import SampleConfig
from difftool.devices import on_device
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.samplers import Sampler
from difftool.errors import UsageError
from difftool.networks.layers import sinusoids
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.model import Model
from difftool.pipeline.texts import (
    EncodedPrompts,
    Told,
    chunk_count,
    encode_prompts,
    read_negative,
    read_prompt,
)

AESTHETIC, UNAESTHETIC = 6.0, 2.5
"""Aesthetic scores that SDXL's refiner is given: of what is wanted, and of what is not."""


def _zeroed(model: Model, texts: EncodedPrompts, prompts: Sequence[str]) -> EncodedPrompts:
    """The same with zeros for negative prompts that are empty, where the model has them so."""
    if not model.preset.zero_negative:
        return texts
    kept = [float(bool(prompt)) for prompt in prompts]

    def masked(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        mask = on_device(kept, tensor.device, tensor.dtype)
        return tensor * mask.view(-1, *[1] * (tensor.ndim - 1))

    return EncodedPrompts(masked(texts.context), masked(texts.pooled))


def pooled_texts(model: Model, prompts: Sequence[str]) -> list[Tensor]:
    """The pooled text [B,P] of prompts, of each text encoder."""
    pairs = zip(model.text, model.tokenizers, model.preset.text, strict=True)
    found = []
    for encoder, tokenizer, config in pairs:
        ids = on_device(tokenizer.encode(list(prompts), config.length), model.device)
        found.append(encoder.pooled(ids))
    return found


def token_count(model: Model, prompt: str) -> tuple[int, int]:
    """How many tokens a prompt has and how many are read, start and end marks left out."""
    pairs = zip(model.tokenizers, model.preset.text, strict=True)
    return max(((t.count(prompt), c.length - 2) for t, c in pairs), default=(0, 0))


def context_lengths(model: Model, prompts: Sequence[str]) -> Tensor | None:
    """How many tokens of prompts' contexts are theirs, marks included [B]; None for a network that
    is not told."""
    if not getattr(model.preset.unet, "masks_context", False):
        return None
    (tokenizer,), (config,) = model.tokenizers, model.preset.text
    counts = [min(tokenizer.count(prompt) + 2, config.length) for prompt in prompts]
    return on_device(counts, model.device)


def build_cond(
    model: Model,
    texts: EncodedPrompts,
    labels: Sequence[int | None],
    size: tuple[int, int],
    *,
    guidance: float = 1.0,
    aesthetic: float = AESTHETIC,
    vector: Tensor | None = None,
    length: Tensor | None = None,
) -> Cond:
    """What conditions the network for a batch; size (width, height) in pixels.

    labels: a class each, None for the one that means "none". guidance: of networks that are told
    their scale. vector [B,V]: the whole conditioning vector, in place of pooled texts and sizes.
    length [B]: see `context_lengths`.
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
        values = on_device(numbers, model.device, torch.float32)
        sizes = sinusoids(values, 256).flatten().expand(count, -1)
        vector = torch.cat([texts.pooled, sizes.to(texts.pooled.dtype)], dim=1)
    if unet.num_classes and model.concat != "low_res":  # whose label is a level of noise
        null = model.null_label
        filled = [null if value is None else value for value in labels]
        if None in filled:
            raise UsageError(f"the model {model.name} needs a class", hint="give --label")
        label = on_device(filled, model.device)
    if unet.guidance_dim:
        scale = torch.full((count,), guidance - 1.0, device=model.device)
    return Cond(context=texts.context, vector=vector, label=label, guidance=scale, length=length)


@dataclass
class Term:
    """A condition of a batch that counts in the guided output, as it is at each evaluation."""

    build: Callable[[EncodedPrompts], Cond]
    texts: EncodedPrompts
    """Of all texts of all prompts of the batch, one prompt after the other."""
    ends: Sequence[Sequence[int]]
    """Of each prompt, the last evaluation that each of its texts is for."""
    weight: float
    """In the guided output; the weights of all terms add up to 1."""
    unguided: float
    """In the output without guidance."""
    wanted: bool = True
    """Whether it is not what is guided away from."""
    _last: tuple[list[int], Cond] | None = field(default=None, init=False)

    def at(self, evaluation: int) -> Cond:
        """The condition at an evaluation of the network; the first is 0."""
        rows, first = [], 0
        for ends in self.ends:
            later = (i for i, end in enumerate(ends) if evaluation <= end)
            rows.append(first + next(later, len(ends) - 1))
            first += len(ends)
        if self._last is None or self._last[0] != rows:
            self._last = rows, self.build(self.texts.at(rows))
        return self._last[1]


def shape_of(model: Model, given: SampleInput, settings: SampleConfig, evaluations: int) -> object:
    """What the prompts of pictures have in common that one call of the network conditions: how many
    there are, how they are weighed, and how long they are."""
    syntax = settings.prompt_syntax
    told = read_prompt(given.prompt, syntax, evaluations)
    against = read_negative(given.negative, syntax, evaluations)
    counts = [(each.share, chunk_count(model, each, syntax)) for each in told]
    return tuple(counts), chunk_count(model, against, syntax)


def terms_of(
    model: Model,
    inputs: Sequence[SampleInput],
    settings: SampleConfig,
    vector: Tensor | None,
    evaluations: int,
    sampler: Sampler | None = None,
) -> list[Term]:
    """The conditions of a batch of pictures of one shape, the one that it is guided away from last.

    With shares w and guidance scale g that is  F = F_no + g sum w (F_yes - F_no).

    vector [B,V]: see `build_cond`; what is guided away from has zeros for it. evaluations: of the
    network, as many as prompts that change are planned for. sampler: what is guided away from is
    there at any guidance scale for one of CFG++, which has scales below 1.
    """
    model.load_part("text")
    labels, size, syntax = [each.label for each in inputs], settings.size, settings.prompt_syntax
    build = partial(build_cond, model, labels=labels, size=size, vector=vector)
    build = partial(build, guidance=settings.guidance)
    prompts = [read_prompt(each.prompt, syntax, evaluations) for each in inputs]
    cfg_pp = sampler is not None and bool(sampler.cfg_pp) and model.guidable
    scale = settings.guidance / (sampler.guidance_unit if sampler else 1.0)
    scale = scale if cfg_pp else max(scale, 1.0)
    if model.preset.unet.guidance_dim:
        cfg_pp, scale = False, 1.0
    terms = []
    for told in zip(*prompts, strict=True):
        texts, share = _encoded(model, told, settings), told[0].share
        terms.append(Term(build, texts, _ends(told), share * scale, share))
    _level(terms)
    shares = sum(term.unguided for term in terms)
    if scale * shares == 1 and not cfg_pp:
        return terms
    zeros = None if vector is None else torch.zeros_like(vector)
    build = _unwanted(model, len(inputs), size, zeros)
    negatives = [read_negative(each.negative, syntax, evaluations) for each in inputs]
    texts = _encoded(model, negatives, settings)
    texts = _zeroed(model, texts, [text for told in negatives for _, text in told.schedule])
    return [
        *terms,
        Term(build, texts, _ends(negatives), 1 - scale * shares, 1 - shares, wanted=False),
    ]


def _level(terms: Sequence[Term]) -> None:
    """Prompts that AND joins are as long as the longest, by their last vector again and again, as
    A1111 stacks them."""
    contexts = [(term, c) for term in terms if (c := term.texts.context) is not None]
    longest = max((context.shape[1] for _, context in contexts), default=0)
    for term, context in contexts:
        last = context[:, -1:].expand(-1, longest - context.shape[1], -1)
        term.texts = term.texts._replace(context=torch.cat([context, last], dim=1))


def _ends(prompts: Sequence[Told]) -> list[list[int]]:
    return [[end for end, _ in told.schedule] for told in prompts]


def _encoded(model: Model, prompts: Sequence[Told], settings: SampleConfig) -> EncodedPrompts:
    """All the texts of prompts, one prompt after the other."""
    texts = [(i, text) for i, told in enumerate(prompts) for _, text in told.schedule]
    return encode_prompts(
        model,
        [text for _, text in texts],
        settings.clip_skip,
        settings.prompt_syntax,
        weighting=settings.prompt_weighting,
        groups=[i for i, _ in texts],
    )


def unwanted_cond(
    model: Model, texts: EncodedPrompts, prompts: Sequence[str], size: tuple[int, int]
) -> Cond:
    """What a batch is guided away from; texts: of these negative prompts."""
    return _unwanted(model, len(prompts), size)(_zeroed(model, texts, prompts))


def _unwanted(
    model: Model, count: int, size: tuple[int, int], vector: Tensor | None = None
) -> Callable[[EncodedPrompts], Cond]:
    """The condition that so many pictures are guided away from, of its texts."""
    none: list[int | None] = [None] * count
    return partial(build_cond, model, labels=none, size=size, vector=vector, aesthetic=UNAESTHETIC)
