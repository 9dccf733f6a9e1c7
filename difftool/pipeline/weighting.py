"""WEIGHTINGS: by whose arithmetic the weights of a prompt's tokens are applied. Torch-free at
import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi, tan
from typing import TYPE_CHECKING, NamedTuple, Protocol

from difftool.devices import on_device
from difftool.registry import Registry
from difftool.text.chunks import Chunk

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = 1e-5
"""The smallest weight that compel tells from none."""


class EncodeChunks(Protocol):
    """A text encoder at work."""

    def __call__(
        self, given: Sequence[Chunk], seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Contexts [K,L,D] and pooled texts [K,P] of chunks; seen [K,L]: which of their tokens
        others attend to, None = all."""
        ...


class Encoded(NamedTuple):
    """Texts as one text encoder reads them."""

    context: Tensor
    """[N,K,L,D]: N texts of K chunks."""
    rows: Sequence[Sequence[Chunk]]
    prompts: Sequence[int]
    """The number of the prompt that each text is of: one that changes with the step has several."""
    run: EncodeChunks
    empty: Chunk

    @property
    def weights(self) -> Tensor:
        """[N,K,L,1]."""
        values = [[chunk.weights for chunk in row] for row in self.rows]
        return on_device(values, self.context.device, self.context.dtype)[..., None]


Weighting = Callable[[Encoded], "Tensor"]
"""Texts -> their contexts [N,K,L,D] with the weights applied."""
WEIGHTINGS: Registry[Weighting] = Registry("weighting of prompts")


@WEIGHTINGS.register("a1111", "original")
def a1111(texts: Encoded) -> Tensor:
    """A token's state times its weight, then the mean of the chunk set back to what it was; of
    texts of one prompt a mean for all."""
    context = texts.context
    scaled = context * texts.weights
    for prompt in set(texts.prompts):
        numbers = [row for row, of in enumerate(texts.prompts) if of == prompt]
        rows = on_device(numbers, context.device)
        before, after = (t[rows].transpose(0, 1).flatten(1).mean(1) for t in (context, scaled))
        scaled[rows] *= (before / after).view(1, -1, 1, 1)
    return scaled


@WEIGHTINGS.register("comfy", "comfyui")
def comfy(texts: Encoded) -> Tensor:
    """A token's state moved along the line from its place in the empty prompt, by its weight."""
    return _from_empty(texts.context, texts.weights, texts)


def _from_empty(context: Tensor, weights: Tensor, texts: Encoded) -> Tensor:
    empty = texts.run([texts.empty])[0]
    return context.where(weights == 1, (context - empty) * weights + empty)


@WEIGHTINGS.register("compel")
def compel(texts: Encoded) -> Tensor:
    """The same, and for each text of a weight below 1 blended with the prompt in which it is not
    seen: tan((1 - weight) pi / 2) parts of that to one of the other."""
    import torch

    weighted = _from_empty(texts.context, texts.weights, texts)
    for row, chunks in enumerate(texts.rows):
        below = {
            piece: weight
            for chunk in chunks
            for piece, weight in zip(chunk.pieces, chunk.weights, strict=True)
            if piece >= 0 and weight < 1
        }
        blended, total = weighted[row], 1.0
        for piece, weight in below.items():
            seen = torch.tensor([[of != piece for of in chunk.pieces] for chunk in chunks])
            without = texts.run(chunks, seen)[0][None]
            share = tan((1 - max(weight, NOTHING)) * pi / 2)
            other = _from_empty(without, texts.weights[row : row + 1], texts)[0]
            blended, total = blended + share * other, total + share
        weighted[row] = blended / total
    return weighted


@WEIGHTINGS.register("none", "ignore")
def none(texts: Encoded) -> Tensor:
    """Weights are read, and change nothing."""
    return texts.context
