"""Networks whose convolutions go round: what they make repeats without a seam."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def tiled(network: nn.Module, tile: str) -> Iterator[None]:
    """In the block a network's convolutions see the other end of a picture beyond its border, and
    not zeros: of its rows ("x"), its columns ("y"), or "both"; "none" changes nothing.

    A picture moved round by what a network's last level is small by is then made as the picture,
    moved round.
    """
    modules = () if tile == "none" else network.modules()
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d) and any(map(bool, m.padding))]
    for convolution in convolutions:
        convolution.forward = partial(_round, convolution, tile)
        convolution.__dict__["tile"] = tile
    try:
        yield
    finally:
        for convolution in convolutions:
            for name in ("forward", "tile"):
                convolution.__dict__.pop(name, None)


def tile_of(convolution: nn.Conv2d) -> str:
    """Which way a convolution goes round."""
    return convolution.__dict__.get("tile", "none")


def _round(convolution: nn.Conv2d, tile: str, input: Tensor) -> Tensor:
    height, width = (int(p) for p in convolution.padding)
    x = F.pad(input, (width, width, 0, 0), "circular" if tile in ("x", "both") else "constant")
    x = F.pad(x, (0, 0, height, height), "circular" if tile in ("y", "both") else "constant")
    weight, bias, stride = convolution.weight, convolution.bias, convolution.stride
    return F.conv2d(x, weight, bias, stride, 0, convolution.dilation, convolution.groups)
