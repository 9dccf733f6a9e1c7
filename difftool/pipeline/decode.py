"""Latents to pictures without ever losing a run: whole, else one by one, else in exact strips; in
fp32 again where a smaller type gave values that are not finite.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.networks.codecs import Codec, VaeCodec
from difftool.networks.layers import ResBlock
from difftool.networks.vae import Vae

ROWS = 64
"""Rows of a strip."""
MAPS = 4
"""Feature maps of the largest size that a whole decoding has in memory at once, with room."""


@torch.no_grad()
def decode(codec: Codec, x0: Tensor) -> Tensor:
    """Pictures [B,C,H,W], fp32 and not clamped, of x0 [B,c,h,w]."""
    if not isinstance(codec, VaeCodec):
        return codec.decode(x0).float()
    images = _decode(codec, x0)
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all() and codec.vae.dtype != torch.float32 and x0.isfinite().all():
        exact = copy.deepcopy(codec).float()
        images[~finite] = _decode(exact, x0[~finite])
    return images


def _decode(codec: VaeCodec, x0: Tensor) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: codec.decode(x0),
        lambda: torch.cat([codec.decode(one) for one in x0.split(1)]),
        lambda: torch.cat([decode_strips(codec, one) for one in x0.split(1)]),
    ]
    if not _fits(codec, x0):
        ways = ways[2:] if not _fits(codec, x0[:1]) else ways[1:]
    for way in ways[:-1]:
        try:
            return way()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # here, where the error no longer holds the failed tensors
    return ways[-1]()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what went wrong."""
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _fits(codec: VaeCodec, x0: Tensor) -> bool:
    """Whether a CPU has room for decoding at once: where memory is promised before it is there,
    no error would tell."""
    if x0.device.type != "cpu":
        return True
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo") as file:
            free = max(free, *(1024 * int(line.split()[1]) for line in file if "Available" in line))
    except (OSError, ValueError, AttributeError, TypeError):
        return True
    return largest_map(codec, x0) * MAPS * len(x0) < 0.8 * free


def largest_map(codec: VaeCodec, x0: Tensor) -> int:
    """Bytes of the largest feature map of the decoder for one picture."""
    widths, side = codec.config.widths, codec.factor // codec.config.patch
    pixels = x0.shape[2] * x0.shape[3] * side**2
    return pixels * max(widths[: 2 if len(widths) > 1 else 1]) * codec.vae.dtype.itemsize


# --- strips ----------------------------------------------------------------------------------


@torch.no_grad()
def decode_strips(codec: VaeCodec, x0: Tensor, rows: int = ROWS) -> Tensor:
    """The same picture with much less memory on the device: feature maps are kept in the machine's
    own memory, and go through each layer in strips of rows. The statistics of a norm are of the
    whole map, so that this is the same arithmetic but for the order of sums."""
    vae: Vae = codec._network()
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
        height, width = x.shape[2], x.shape[3]
        out = torch.empty(1, conv.out_channels, scale * height, scale * width, dtype=x.dtype)
        for start, end in self._cuts(x):
            top, bottom = start > 0, end < height  # whether there is a row beyond
            strip = before(x[:, :, start - top : end + bottom].to(self.device))
            # One row beyond either end, of zeros beyond the map.
            cut = strip[:, :, top * (scale - 1) : strip.shape[2] - bottom * (scale - 1)]
            padded = F.pad(cut, (1, 1, int(not top), int(not bottom)))
            done = F.conv2d(padded, conv.weight, conv.bias)
            out[:, :, scale * start : scale * end] = done.to(out.device)
        return out

    def _cuts(self, x: Tensor) -> Iterator[tuple[int, int]]:
        for start in range(0, x.shape[2], self.rows):
            yield start, min(start + self.rows, x.shape[2])
