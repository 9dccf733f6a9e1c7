"""An autoencoder's decoder in strips of rows: the same picture in a fraction of the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.engine.quick import convolve_padded
from difftool.engine.tiles import tile_of
from difftool.networks.codecs import VaeCodec
from difftool.networks.layers import ResBlock
from difftool.networks.vae import Vae

ROWS = 64
"""Rows of a strip."""


@torch.no_grad()
def decode_strips(codec: VaeCodec, x0: Tensor, rows: int = ROWS) -> Tensor:
    """The same picture with much less memory on the device: feature maps are kept in the machine's
    own memory, and go through each layer in strips of rows. The statistics of a norm are of the
    whole map, so that this is the same arithmetic but for the order of sums."""
    vae: Vae = codec.network()
    latent = codec.raw(x0).to(vae.dtype)
    if codec.config.quant_conv:
        latent = vae.post_quant_conv(latent)
    decoder: Any = vae.decoder
    x = decoder.mid_block(decoder.conv_in(latent)).cpu()
    strips = _Strips(x0.device, rows)
    for level in decoder.up_blocks:
        for block in level.resnets:
            x = strips.resblock(block, x)
        for upsample in level.upsamplers:
            x = strips.conv(upsample.conv, x, lambda rows: F.interpolate(rows, scale_factor=2), 2)
    x = strips.conv(decoder.conv_out, x, strips.norm(decoder.conv_norm_out, x))
    return F.pixel_shuffle(x.float(), codec.config.patch).to(x0.device)


class _Strips:
    """Layers over strips of rows of maps [1,C,H,W] that lie on the CPU."""

    def __init__(self, device: torch.device, rows: int):
        self.device, self.rows = device, rows

    def resblock(self, block: ResBlock, x: Tensor) -> Tensor:
        h = self.conv(block.conv1, x, self.norm(block.norm1, x))
        h = self.conv(block.conv2, h, self.norm(block.norm2, h))
        for start, end in self._cuts(x):
            part = x[:, :, start:end].to(self.device)
            skip = part if block.conv_shortcut is None else block.conv_shortcut(part)
            h[:, :, start:end] += skip.to(h.device)
        return h

    def norm(self, norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The group norm of the whole map, then SiLU, as a function of a strip."""
        count, groups = x[0].numel() // norm.num_groups, norm.num_groups
        total = torch.zeros(groups, dtype=torch.float64)
        squares = torch.zeros(groups, dtype=torch.float64)
        for start, end in self._cuts(x):
            part = x[0, :, start:end].double().reshape(groups, -1)
            total += part.sum(1)
            squares += part.square().sum(1)
        mean = total / count
        scale = (squares / count - mean**2 + norm.eps).rsqrt()
        each = x.shape[1] // groups
        mean, scale = (v.repeat_interleave(each).float().to(self.device) for v in (mean, scale))
        gain = scale * norm.weight.float()
        offset = norm.bias.float() - mean * gain

        def apply(strip: Tensor) -> Tensor:
            normed = strip.float() * gain[:, None, None] + offset[:, None, None]
            return F.silu(normed.to(strip.dtype))

        return apply

    def conv(
        self, conv: nn.Conv2d, x: Tensor, before: Callable[[Tensor], Tensor], scale: int = 1
    ) -> Tensor:
        """A 3x3 convolution of before(x), which makes maps `scale` times as large."""
        height, width, tile = x.shape[2], x.shape[3], tile_of(conv)
        across = "circular" if tile in ("x", "both") else "constant"
        out = torch.empty(1, conv.out_channels, scale * height, scale * width, dtype=x.dtype)
        for start, end in self._cuts(x):
            top, bottom = start > 0, end < height  # whether there is a row beyond
            if tile in ("y", "both"):
                top = bottom = True
            rows = torch.arange(start - top, end + bottom) % height
            strip = before(x[:, :, rows].to(self.device))
            # One row beyond either end, of zeros beyond the map.
            cut = strip[:, :, top * (scale - 1) : strip.shape[2] - bottom * (scale - 1)]
            padded = F.pad(F.pad(cut, (1, 1, 0, 0), across), (0, 0, int(not top), int(not bottom)))
            done = convolve_padded(conv, padded)
            out[:, :, scale * start : scale * end] = done.to(out.device)
        return out

    def _cuts(self, x: Tensor) -> Iterator[tuple[int, int]]:
        for start in range(0, x.shape[2], self.rows):
            yield start, min(start + self.rows, x.shape[2])
