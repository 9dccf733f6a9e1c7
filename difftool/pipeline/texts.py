"""What prompts say to the network: which texts, at which of its evaluations, in which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from difftool.devices import on_device
from difftool.errors import UsageError
from difftool.networks.base import TextEncoder
from difftool.pipeline.model import Model
from difftool.pipeline.weighting import WEIGHTINGS, EncodeChunks, Encoded
from difftool.text.chunks import Blend, Chunk
from difftool.text.syntax import SYNTAXES, chunks


class Told(NamedTuple):
    """One of the prompts that AND joins."""

    share: float
    """Of the guidance."""
    schedule: tuple[tuple[int, str], ...]
    """Its texts, each with the last evaluation that it is for; the first evaluation is 0.

    A schedule's steps are counted from 1, and its last one is compared with a number counted from
    0, as A1111 does: with [a:b:0.5] of 10 steps, the sixth evaluation is still of a.
    """


def read_prompt(prompt: str, syntax: str, evaluations: int) -> list[Told]:
    """The prompts that a prompt is made of."""
    row = SYNTAXES[syntax]
    return [
        Told(share, tuple(row.schedule(text, evaluations)))
        for text, share in row.conjunction(prompt)
    ]


def read_negative(prompt: str, syntax: str, evaluations: int) -> Told:
    """A negative prompt, in which AND is a word."""
    return Told(1.0, tuple(SYNTAXES[syntax].schedule(prompt, evaluations)))


def chunk_count(model: Model, told: Told, syntax: str) -> int:
    """In how many chunks it is read, at most."""
    row = SYNTAXES[syntax]
    texts = [text for _, text in told.schedule] if model.text else []
    return max((sum(_lengths(model, row.composition(text), syntax)) for text in texts), default=0)


def _lengths(model: Model, composition: Sequence[Blend], syntax: str) -> list[int]:
    """In how many chunks each of a prompt's blends is read, by the encoder that needs most."""
    pairs = list(zip(model.tokenizers, model.preset.text, strict=True))
    return [
        max(len(chunks(t, text, c.length, syntax)) for t, c in pairs for text, _ in blend.texts)
        for blend in composition
    ]


class EncodedPrompts(NamedTuple):
    """What text encoders put out for a batch of prompts; None where the model has none."""

    context: Tensor | None
    """[B,L,D], those of several encoders side by side along D; L is a multiple of their length
    where a syntax makes chunks of long prompts."""
    pooled: Tensor | None
    """[B,P]."""

    def at(self, rows: Sequence[int]) -> EncodedPrompts:
        """Some of them, in another order."""
        if list(rows) == list(range(len(self.context if self.context is not None else rows))):
            return self
        chosen = (None if t is None else t[on_device(list(rows), t.device)] for t in self)
        return EncodedPrompts(*chosen)


def encode_prompts(
    model: Model,
    prompts: Sequence[str],
    clip_skip: int | None = None,
    syntax: str = "none",
    *,
    weighting: str | None = None,
    groups: Sequence[int] | None = None,
) -> EncodedPrompts:
    """Prompts as the network is given them; short ones are filled to the chunks of the longest.

    clip_skip: the hidden state that is the context, counted from the end (1 = the last); None = the
    model's own. syntax: whose weights and chunks prompts have. weighting: by whose arithmetic; None
    = the syntax's own. groups: which of them are texts of one prompt; None = each its own.
    UsageError for a layer that no encoder has.
    """
    if not model.text:
        return EncodedPrompts(None, None)
    apply = WEIGHTINGS[weighting or SYNTAXES[syntax].weighting]
    compositions = [SYNTAXES[syntax].composition(prompt) for prompt in prompts]
    if any(len(each) > 1 or len(each[0].texts) > 1 for each in compositions):
        return _composed(model, compositions, clip_skip, syntax, weighting)
    pairs = list(zip(model.tokenizers, model.preset.text, strict=True))
    read = [[chunks(t, prompt, c.length, syntax) for prompt in prompts] for t, c in pairs]
    most = max(len(row) for rows in read for row in rows)
    contexts, pooled = [], None
    for encoder, (tokenizer, config), rows in zip(model.text, pairs, read, strict=True):
        (empty,) = chunks(tokenizer, "", config.length)
        rows = [row + [empty] * (most - len(row)) for row in rows]
        run = _runner(model, encoder, _hidden(config.layers, clip_skip))
        context, pool = run([chunk for row in rows for chunk in row])
        context = context.unflatten(0, (len(rows), most))
        if any(weight != 1 for row in rows for chunk in row for weight in chunk.weights):
            numbers = range(len(rows)) if groups is None else groups
            context = apply(Encoded(context, rows, numbers, run, empty))
        contexts.append(context.flatten(1, 2))
        if pool is not None and pooled is None:
            pooled = pool.unflatten(0, (len(rows), most))[:, 0]
    return EncodedPrompts(torch.cat(contexts, dim=-1), pooled)


def _composed(
    model: Model,
    compositions: Sequence[Sequence[Blend]],
    clip_skip: int | None,
    syntax: str,
    weighting: str | None,
) -> EncodedPrompts:
    """The same of prompts that are composed: texts are encoded alone, blended, moved from the empty
    prompt by the weight of their blend, and laid side by side. The pooled text is the first
    blend's."""
    texts = [text for each in compositions for blend in each for text, _ in blend.texts]
    found = encode_prompts(model, ["", *texts], clip_skip, syntax, weighting=weighting)
    assert found.context is not None
    (empty, *_), *contexts = found.context.unflatten(1, (-1, model.preset.text[0].length))
    pools = () if found.pooled is None else found.pooled[1:]
    whole, pooled, first = [], [], 0
    for each in compositions:
        sides = []
        for blend, length in zip(each, _lengths(model, each, syntax), strict=True):
            shares = [share for _, share in blend.texts]
            own = slice(first, first + len(shares))
            mean = _sum(shares, [context[:length] for context in contexts[own]])
            mean = mean if blend.weight == 1 else empty + (mean - empty) * blend.weight
            if not sides and len(pools):
                pooled.append(_sum(shares, list(pools[own])))
            sides.append(mean)
            first = own.stop
        whole.append(torch.cat(sides))
    most = max(map(len, whole))
    filled = [torch.cat([side, empty.expand(most - len(side), -1, -1)]) for side in whole]
    context = torch.stack(filled).flatten(1, 2)
    return EncodedPrompts(context, torch.stack(pooled) if pooled else None)


def _sum(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * t for share, t in zip(shares, tensors, strict=True)]).sum(0)


def _hidden(layers: int, clip_skip: int | None) -> int | None:
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        why = f"the text encoder has {layers} layers"
        raise UsageError(f"--clip-skip {clip_skip} is not usable", why, "1 is the last layer")
    return None if clip_skip is None else -clip_skip


def _runner(model: Model, encoder: TextEncoder, hidden: int | None) -> EncodeChunks:
    """What a text encoder makes of chunks."""

    def run(given: Sequence[Chunk], seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        ids = on_device([chunk.ids for chunk in given], model.device)
        return encoder(ids, hidden, None if seen is None else seen.to(model.device))

    return run
