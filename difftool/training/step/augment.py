"""Augmentation that does not leak (EDM, 2206.00364, appendix F): a picture is mirrored, scaled,
turned, stretched or moved, and the network is told how, so that it can be asked for pictures to
which none of it was done: it is told zeros then, as nothing at all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.devices import on_device
from difftool.training.step import rng
from difftool.training.step.rng import Stream

LABELS = 9
"""Mirrored, upside down, size, turn (2), stretch (2), place (2)."""
SCALE, STRETCH, MOVE = 0.2, 0.2, 0.125
"""Deviations: of sizes in octaves, of a stretch likewise, of a move in sides of the picture."""


def draw_labels(seed: int, slots: Tensor, share: float) -> Tensor:
    """What is done to each sample [B,LABELS], zeros where nothing is: each of the six changes
    with that probability, but mirroring, both ways, with half of it."""
    unit = rng.normal(seed, Stream.AUGMENT, 0, slots, (4,))
    words = rng.words(seed, Stream.AUGMENT, 1, slots, 8)
    uniform = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    shares = share * on_device([0.5, 0.5, 1.0, 1.0, 1.0, 1.0], slots.device)
    done = (uniform[:, :6] < shares).float()
    turn, axis = (2 * math.pi * (uniform[:, 6:] - 0.5)).unbind(1)
    mirrored, upside, size, turned, stretched, moved = done.unbind(1)
    stretch = stretched * unit[:, 1].abs()
    return torch.stack(
        [
            *(mirrored, upside, size * unit[:, 0]),
            *(turned * (turn.cos() - 1), turned * turn.sin()),
            *(stretch * axis.cos(), stretch * axis.sin()),
            *(moved * unit[:, 2], moved * unit[:, 3]),
        ],
        dim=1,
    )


def apply_labels(images: Tensor, labels: Tensor) -> Tensor:
    """Pictures [B,C,H,W] with that done to them, a function of the labels alone; those of zeros as
    they are. What comes in from beyond the edge is the picture mirrored there."""
    changed = labels.abs().sum(1) > 0
    height, width = images.shape[-2:]
    mirrored, upside, size, cos, sin, stretch_x, stretch_y, across, down = labels.float().unbind(1)
    zero = torch.zeros_like(size)

    def matrix(*rows: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    def turned(cos: Tensor, sin: Tensor) -> Tensor:
        return matrix((cos, -sin), (sin, cos))

    stretch, axis = torch.hypot(stretch_x, stretch_y), torch.atan2(stretch_y, stretch_x)
    longer = 2 ** (STRETCH * stretch)
    smaller = 2 ** (-SCALE * size)
    along = turned(axis.cos(), axis.sin())
    # From places in the new picture to places in the old one, both from the middle in pixels.
    back = matrix((1 - 2 * mirrored, zero), (zero, 1 - 2 * upside)) @ turned(cos + 1, -sin)
    back = back @ along @ matrix((1 / longer, zero), (zero, longer)) @ along.mT
    back = back * smaller[:, None, None]
    move = back @ torch.stack([-MOVE * across * width, -MOVE * down * height], 1)[..., None]
    # And in torch's units, where half a side is 1.
    sides = on_device([width / 2, height / 2], images.device)
    grid = torch.cat([back * sides / sides[:, None], move / sides[:, None]], dim=2)
    places = F.affine_grid(grid, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, places, padding_mode="reflection", align_corners=False)
    return torch.where(changed.view(-1, 1, 1, 1), moved, images)


class AugmentEmbedding(nn.Module):
    """What is told of labels [B,LABELS], which joins the time embedding: [B,E], zeros of zeros."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(LABELS, width, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        return self.linear(labels)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, a function of the generator's state."""
        self.linear.weight.normal_(0, LABELS**-0.5, generator=generator)
