"""Networks whose convolutions go round: what they make repeats without a seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.engine.quick import convolve_padded
from difftool.networks.layers import Downsample

WAYS = {"none": "", "x": "x", "y": "y", "both": "xy"}
"""Which borders are gone round."""
MARGIN = 24
"""What is seen of the other end at least where a picture is made larger."""


@contextmanager
def tiled(network: nn.Module, tile: str) -> Iterator[None]:
    """In the block a network's convolutions see the other end of a picture beyond its border, and
    not zeros: of its rows ("x"), its columns ("y"), or "both"; "none" changes nothing.

    A picture moved round by what a network's last level is small by is then made as the picture,
    moved round.
    """
    changed = list[nn.Module]()
    for module in () if tile == "none" else network.modules():
        if isinstance(module, nn.Conv2d) and any(map(bool, module.padding)):
            module.forward = partial(_round, module, tile)
        elif isinstance(module, Downsample) and not any(map(bool, module.conv.padding)):
            module.forward = partial(_round_far, module, tile)
        else:
            continue
        module.__dict__["tile"] = tile
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            for name in ("forward", "tile"):
                module.__dict__.pop(name, None)


def tile_of(convolution: nn.Conv2d) -> str:
    """Which way a convolution goes round."""
    return convolution.__dict__.get("tile", "none")


def _round(convolution: nn.Conv2d, tile: str, input: Tensor) -> Tensor:
    height, width = (int(p) for p in convolution.padding)
    x = _bordered(input, tile, (width, width), (height, height))
    return convolve_padded(convolution, x)


def _round_far(down: Downsample, tile: str, x: Tensor, emb: Tensor | None = None) -> Tensor:
    return down.conv(_bordered(x, tile, (0, 1), (0, 1)))


def _bordered(x: Tensor, tile: str, across: tuple[int, int], along: tuple[int, int]) -> Tensor:
    """x with so many columns and rows more before and after: of its other end, or zeros."""
    for way, border in (("x", (*across, 0, 0)), ("y", (0, 0, *along))):
        x = F.pad(x, border, "circular" if way in WAYS[tile] else "constant")
    return x


def enlarged_round(
    x: Tensor,
    sides: tuple[int, int],
    tile: str,
    enlarge: Callable[[Tensor, tuple[int, int]], Tensor],
) -> Tensor:
    """x [B,C,h,w] at other sides (H, W), by what does that to any x, and does not see beyond its
    borders: it is given x with its other ends around it."""
    if tile == "none":
        return enlarge(x, sides)
    whole, cut = [*sides], [slice(None), slice(None)]
    for axis, way in enumerate("yx"):
        if way not in WAYS[tile]:
            continue
        small, large = x.shape[2 + axis], sides[axis]
        unit = small // gcd(small, large)  # that many become a whole number
        margin = unit * ceil(MARGIN / unit)
        there = torch.arange(-margin, small + margin, device=x.device) % small
        x, added = x.index_select(2 + axis, there), margin * large // small
        whole[axis], cut[axis] = large + 2 * added, slice(added, added + large)
    return enlarge(x, (whole[0], whole[1]))[:, :, cut[0], cut[1]]
