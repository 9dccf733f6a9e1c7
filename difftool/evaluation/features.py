"""What pictures are described by when sets of them are compared.

`gradients` needs no file: of a picture of 64 x 64, how much the brightness rises in each of eight
directions, at three scales, and the mean and the deviation of three colours, all in 4 x 4 places.
It sees layout, contours, texture and colour, and nothing of what is meant. `inception` is the
network of FID, `dinov2` that of FD-DINOv2 (2306.04675), each by its published weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.errors import InputError
from difftool.evaluation.options import DINOV2, GRADIENTS, INCEPTION, Weights, open_weights
from difftool.images.fit import stretched
from difftool.networks.dino import SIDE as SQUARE
from difftool.networks.dino import DinoVision, normed, read_dino
from difftool.networks.inception import FEATURES, Inception

SIDE, PLACES, DIRECTIONS, SCALES = 64, 4, 8, (1, 2, 4)
BRIGHTNESS = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601)."""
SCALE = 10.0
"""Of all of them, so that those of photos have a variance of about 1."""


class DescribingNetwork(NamedTuple):
    """What describes pictures by weights."""

    name: str
    dimensions: int
    module: nn.Module
    """From pictures, uint8 [B,3,H,W], to features [B,D]."""


class Describer(NamedTuple):
    """What describes pictures."""

    name: str
    dimensions: int
    describe: Callable[[Tensor], Tensor]
    """Pictures, uint8 [B,3,H,W], to features [B,D], fp32 on the CPU."""
    digest: str = ""
    """SHA-256 of the weights, if it has any, in hex."""


def open_describer(weights: Path | None, device: str = "cpu") -> Describer:
    """The network of a file of weights, or of a folder; without one, `gradients`. InputError for
    what has none that is known, or not all of it."""
    if weights is None:
        return Describer(GRADIENTS, len(SCALES) * DIRECTIONS * PLACES**2 + 6 * PLACES**2, gradients)
    found = open_weights(weights)
    name, dimensions, network = NETWORKS[found.kind](found)
    network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def describe(pictures: Tensor) -> Tensor:
        return network(pictures.to(device)).float().cpu()

    return Describer(name, dimensions, describe, found.digest)


def _inception(weights: Weights) -> DescribingNetwork:
    network = Inception()
    wanted, found = network.state_dict(), weights.source.load(weights.prefix)
    for name, tensor in wanted.items():
        counted = name.endswith("num_batches_tracked")
        if not counted and (name not in found or found[name].shape != tensor.shape):
            path = weights.source.path
            raise InputError(f"{path} lacks the tensor {name}, or it is misshapen")
        if counted:
            found[name] = tensor
    network.load_state_dict({name: found[name] for name in wanted})
    return DescribingNetwork(weights.kind, FEATURES, network)


def _dino(weights: Weights) -> DescribingNetwork:
    found = weights.source.load(weights.prefix, dtype=torch.float32)
    try:
        network = read_dino(found, weights.heads)
    except InputError as error:
        raise InputError(f"cannot read {weights.source.path}", error.what, error.hint) from None
    return DescribingNetwork(network.name, network.norm.weight.numel(), _Seen(network))


class _Seen(nn.Module):
    """A network that is given pictures, uint8 [B,3,H,W] of any size, as FD-DINOv2 gives them: made
    squares by Pillow's bicubic, without a cut."""

    def __init__(self, network: DinoVision):
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        squares = stretched(pictures.cpu(), (SQUARE, SQUARE))
        return self.network(normed(squares).to(pictures.device))


NETWORKS: dict[str, Callable[[Weights], DescribingNetwork]] = {INCEPTION: _inception, DINOV2: _dino}
"""By the kind of their weights."""


@torch.no_grad()
def gradients(pictures: Tensor) -> Tensor:
    """Features [B,480] of pictures, uint8 [B,3,H,W]."""
    small = (SIDE, SIDE)
    x = F.interpolate(pictures.float() / 255, small, mode="bilinear", antialias=True)
    bright = (x * torch.tensor(BRIGHTNESS).view(1, 3, 1, 1)).sum(1, keepdim=True)
    angles = torch.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)
    found = []
    for scale in SCALES:
        y = F.pad(F.avg_pool2d(bright, scale), (1, 1, 1, 1), mode="replicate")
        across = (y[..., 1:-1, 2:] - y[..., 1:-1, :-2]) / 2
        down = (y[..., 2:, 1:-1] - y[..., :-2, 1:-1]) / 2
        rising = across * angles.cos().view(-1, 1, 1) + down * angles.sin().view(-1, 1, 1)
        found.append(F.adaptive_avg_pool2d(rising.clamp(min=0), PLACES))
    red, green, blue = x.unbind(1)
    colours = torch.stack([bright[:, 0], (red - green) / 2, (red + green - 2 * blue) / 4], 1)
    means = F.adaptive_avg_pool2d(colours, PLACES)
    squares = F.adaptive_avg_pool2d(colours**2, PLACES)
    found += [means, (squares - means**2).clamp(min=0).sqrt()]
    return SCALE * torch.cat([part.flatten(1) for part in found], 1)
