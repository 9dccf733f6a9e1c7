"""Pictures in less time that are nearly the same: deep features that are kept for some steps
(DeepCache, 2312.00858), and tokens that join others alike (ToMe, 2303.17604)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from difftool.devices import on_device
from difftool.networks.layers import Attention, TransformerBlock
from difftool.networks.unet import Deep, UNet

CELL = 2
"""Of each square of CELL x CELL tokens one is joined to and never joins."""


class DeepFeatures:
    """Of a picture's steps: the deep features of each call of the network in an evaluation."""

    def __init__(self, every: int):
        """every: so many evaluations apart they are computed."""
        self.every, self.calls = every, list[tuple[torch.Size, Deep]]()

    def of_call(self, number: int, shape: torch.Size, fresh: bool) -> Deep:
        """Those of a call in an evaluation; empty where they are computed, as they are for
        pictures or conditions of another count."""
        if fresh or number >= len(self.calls) or self.calls[number][0] != shape:
            self.calls[number:] = [(shape, Deep())]
        return self.calls[number][1]


@contextmanager
def deep_features_kept(network: nn.Module, kept: DeepFeatures, evaluation: int) -> Iterator[None]:
    """In the block, which is one evaluation of a step, a U-Net computes its deep features anew or
    takes those that were kept."""
    if kept.every == 1 or not isinstance(network, UNet):
        yield
        return
    numbers = count()

    def forward(x: Tensor, t: Tensor, **told: Tensor | None) -> Tensor:
        deep = kept.of_call(next(numbers), x.shape, evaluation % kept.every == 0)
        return UNet.forward(network, x, t, **told, deep=deep)

    vars(network)["forward"] = forward
    try:
        yield
    finally:
        del vars(network)["forward"]


@contextmanager
def tokens_joined(
    network: nn.Module, share: float, sides: Sequence[int], evaluation: int
) -> Iterator[None]:
    """In the block that share of the tokens of latents of those sides [h,w] is joined to others
    for self-attention, at the finest level that has it."""
    found = finest_attention(network) if share else []
    places = _places(sides, evaluation) if found else {}
    for attention in found:
        vars(attention)["forward"] = partial(_attend_joined, attention, share, places)
    try:
        yield
    finally:
        for attention in found:
            del vars(attention)["forward"]


def finest_attention(network: nn.Module) -> list[Attention]:
    """The self-attentions of a U-Net's transformers where its pictures are largest."""
    if not isinstance(network, UNet):
        return []
    levels = zip(network.down_blocks, reversed(list(network.up_blocks)), strict=True)
    for down, up in levels:
        layers = [layer for level in (down, up) for layer in level.modules()]
        both = [each for each in layers if isinstance(each, TransformerBlock)]
        if both:
            return [block.attn1 for block in both]
    return []


def _attend_joined(
    attention: Attention,
    share: float,
    places: dict[int, tuple[Tensor, Tensor]],
    x: Tensor,
    context: Tensor | None = None,
) -> Tensor:
    """Attention of tokens [B,N,C] that are fewer meanwhile."""
    forward = type(attention).forward
    if context is not None or x.shape[1] not in places:
        return forward(attention, x, context)
    fixed, movable = (on_device(each, x.device) for each in places[x.shape[1]])
    places[x.shape[1]] = fixed, movable  # sent once an evaluation
    joined = Joined(x, share, fixed, movable)
    return joined.apart(forward(attention, joined.together(x)))


class Joined:
    """Which tokens join which: those of `movable` that are likest to one of `fixed`."""

    def __init__(self, x: Tensor, share: float, fixed: Tensor, movable: Tensor):
        """x [B,N,C]; fixed and movable: indices of tokens, N in all."""
        normed = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
        alike, to = (normed[:, movable] @ normed[:, fixed].transpose(1, 2)).max(dim=2)
        order = alike.argsort(dim=1, descending=True, stable=True)
        least = min(round(share * x.shape[1]), len(movable))
        joins, stays = order[:, :least], order[:, least:]
        self.count, self.fixed = x.shape[1], fixed.expand(len(x), -1)
        self.joins, self.stays = movable[joins], movable[stays]
        self.to = to.gather(1, joins)

    def together(self, x: Tensor) -> Tensor:
        """The tokens that are left, [B,N - joined,C]: the fixed ones, means of what joined them,
        and those that stay by themselves."""
        mean = _picked(x, self.fixed).scatter_reduce(
            1, _wide(self.to, x), _picked(x, self.joins), "mean"
        )
        return torch.cat([mean, _picked(x, self.stays)], dim=1)

    def apart(self, y: Tensor) -> Tensor:
        """[B,N,C]: all tokens again, those that joined others as these."""
        mean, stayed = y.split([self.fixed.shape[1], self.stays.shape[1]], dim=1)
        whole = y.new_empty(len(y), self.count, y.shape[2])
        parts = (self.fixed, mean), (self.stays, stayed), (self.joins, _picked(mean, self.to))
        for at, part in parts:
            whole.scatter_(1, _wide(at, y), part)
        return whole


def _picked(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, _wide(at, x))


def _wide(at: Tensor, x: Tensor) -> Tensor:
    return at[:, :, None].expand(-1, -1, x.shape[2])


def _places(sides: Sequence[int], evaluation: int) -> dict[int, tuple[Tensor, Tensor]]:
    """By the count of tokens of latents of those sides and halves of them: the fixed tokens, one
    of each square, drawn anew for each evaluation, and the movable ones."""
    found = {}
    height, width = sides
    drawn = torch.Generator().manual_seed(evaluation)
    while height >= CELL and width >= CELL:
        rows, columns = height // CELL, width // CELL
        y, x = (torch.randint(CELL, (rows, columns), generator=drawn) for _ in "yx")
        y += CELL * torch.arange(rows)[:, None]
        x += CELL * torch.arange(columns)
        fixed = (y * width + x).flatten()
        movable = torch.ones(height * width, dtype=torch.bool)
        movable[fixed] = False
        found[height * width] = fixed, movable.nonzero()[:, 0]
        height, width = -(-height // 2), -(-width // 2)
    return found
