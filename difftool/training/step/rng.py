"""Random numbers by coordinates: each is a pure function of (seed, stream, step, slot, position).

Nothing is carried from one draw to the next, so what a training step draws does not depend on how
many steps, workers or processes came before it, and a resumed run draws the same numbers.
They are Philox's, a whole batch in one go, and the same integers on every device.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from difftool.diffusion.philox import MASK, philox

GOLDEN = 0x9E3779B97F4A7C15
"""The golden ratio's fraction in units of 2^-64."""


class Stream(IntEnum):
    """What a number is for; numbers of different streams are independent."""

    ORDER = 1
    SAMPLE = 2
    DROP = 3
    FLIP = 4
    TIME = 5
    NOISE = 6
    LATENT = 7
    VALIDATION = 8
    LIKELIHOOD = 9
    GUIDANCE = 10
    JUDGED_TIME = 11
    JUDGED_NOISE = 12
    AUGMENT = 13


def words(seed: int, stream: Stream, step: int, slots: Tensor, count: int) -> Tensor:
    """Random 32-bit words [B, count] as int64, for each slot [B] of a step."""
    blocks = -(-count // 4)
    position = torch.arange(blocks, device=slots.device)
    shape = (len(slots), blocks)
    counter = (
        position.expand(shape),
        slots.to(torch.int64)[:, None].expand(shape),
        torch.full((1, 1), step & MASK, device=slots.device).expand(shape),
        torch.full((1, 1), int(stream), device=slots.device).expand(shape),
    )
    drawn = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    return torch.stack(drawn, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, stream: Stream, step: int, slots: Tensor) -> Tensor:
    """Uniform numbers [B] in the open interval (0, 1), fp32, for each slot [B] of a step."""
    drawn = words(seed, stream, step, slots, 1)[:, 0]
    return ((drawn >> 9).to(torch.float32) + 0.5) * 2.0**-23


def spread(slots: Tensor) -> Tensor:
    """Fractions [B] of (slot + 1/2) times the golden ratio, fp32: any run of slots covers (0, 1)
    evenly. In integers that wrap, since not every device has float64."""
    wrapped = slots.to(torch.int64) * (GOLDEN - 2**64) + GOLDEN // 2
    return (((wrapped >> 40) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24


def normal(seed: int, stream: Stream, step: int, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers [B, *shape], fp32, by Box and Muller."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    drawn = words(seed, stream, step, slots, 2 * pairs)
    unit = (drawn.to(torch.float32) + 0.5) * 2.0**-32  # never 0; may round to 1, where log is 0
    radius = (-2.0 * unit[:, :pairs].clamp(max=1.0).log()).sqrt()
    angle = (2.0 * math.pi) * unit[:, pairs:]
    drawn_normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return drawn_normal[:, :count].reshape(len(slots), *shape)


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order [count] in which an epoch visits the samples."""
    slots = torch.arange(count)
    low, high = words(seed, Stream.ORDER, epoch, slots, 2).unbind(1)
    return ((high << 31) ^ low).argsort(stable=True)


def keys(seed: int, epochs: Tensor, indices: Tensor) -> list[int]:
    """One integer a sample for everything random about it; a function of (seed, epoch, index)."""
    counter = (indices, epochs, torch.zeros_like(indices), torch.full_like(indices, Stream.SAMPLE))
    low, high, _, _ = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    return ((high << 31) ^ low).tolist()
