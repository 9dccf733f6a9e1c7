"""Tiny decoders of latents: TAESD (Boer Bohan, 2023) and its kin, for pictures while they are made.

3 tanh(x / 3), conv, ReLU; then stages of residual blocks, each ended by doubling the sides and
a convolution without a bias; then a block and a convolution to RGB in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.errors import InputError


class TinyBlock(nn.Module):
    """relu(conv3(relu(conv2(relu(conv1(x))))) + skip(x))."""

    def __init__(self, width: int, out: int):
        super().__init__()
        convs = [nn.Conv2d(first, out, 3, padding=1) for first in (width, out, out)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.skip(x))


class TinyDecoder(nn.Module):
    """From x0 [B,c,h,w] to pictures [B,3,H,W] in [-1, 1].

    Its layers are those of a checkpoint, whose shapes say all: see `tiny_decoder`.
    """

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def channels(self) -> int:
        """Of x0."""
        first = self.layers[0]
        assert isinstance(first, nn.Conv2d)
        return first.in_channels

    @property
    def factor(self) -> int:
        """How many times larger its pictures are."""
        doubling = (1 for each in self.layers if isinstance(each, nn.Conv2d) and each.bias is None)
        return 2 ** sum(doubling)

    def forward(self, x0: Tensor) -> Tensor:
        first, *rest = self.layers
        x = F.relu(first(3 * torch.tanh(x0 / 3)))
        for layer in rest:
            if isinstance(layer, nn.Conv2d) and layer.bias is None:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = layer(x)
        return x * 2 - 1


_PREFIXES = ("decoder.layers.", "taesd_decoder.", "decoder.", "")
"""Of diffusers' AutoencoderTiny, and of files of the decoder with or without the encoder."""


def tiny_decoder(tensors: Mapping[str, Tensor], where: str) -> TinyDecoder:
    """The decoder of a checkpoint's tensors; InputError if they are not one."""
    for prefix in _PREFIXES:
        found = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        found = {n: t for n, t in found.items() if re.match(r"\d+\.", n)}
        if found:
            break
    else:
        raise InputError(f"{where} is no tiny decoder", "it has none of TAESD's layers")
    numbers = sorted({int(name.split(".")[0]) for name in found})
    layers, weights = list[nn.Module](), dict[str, Tensor]()
    try:
        for place, number in enumerate(numbers):
            own = {n.partition(".")[2]: t for n, t in found.items() if n.startswith(f"{number}.")}
            layers.append(_layer(own))
            weights |= {f"layers.{place}.{name}": tensor for name, tensor in own.items()}
        decoder = TinyDecoder(layers)
        decoder.load_state_dict(weights)
        last = layers[-1]
        if not (isinstance(last, nn.Conv2d) and last.out_channels == 3 and decoder.channels):
            raise ValueError("it does not end in RGB")
    except (LookupError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{where} is no tiny decoder", str(error).splitlines()[0]) from None
    return decoder.eval().requires_grad_(False)


def _layer(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A convolution or a block of these shapes."""
    if "weight" in tensors:
        out, width, side, _ = tensors["weight"].shape
        return nn.Conv2d(width, out, side, padding=side // 2, bias="bias" in tensors)
    out, width, _, _ = tensors["conv.0.weight"].shape
    return TinyBlock(width, out)
