"""Between pictures and x0 with a loaded model. Latents become pictures without ever losing a run:
whole, else one by one, else in exact strips; in fp32 again where a smaller type gave values that
are not finite.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from difftool.engine.memory import free_memory
from difftool.engine.strips import decode_strips
from difftool.errors import out_of_memory
from difftool.networks.codecs import Codec, VaeCodec
from difftool.pipeline.model import Model

MAPS = 4
"""Feature maps of the largest size that a whole decoding has in memory at once, with room."""


@torch.no_grad()
def encode(model: Model, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """x0 [B,c,h,w] of pictures [B,C,H,W] in [-1, 1]; noise in x0's shape draws from the posterior,
    None takes its mean."""
    model.load_part("vae")
    return model.codec.encode(images, noise)


@torch.no_grad()
def decode(model: Model, x0: Tensor) -> Tensor:
    """Pictures [B,C,H,W], fp32 in [-1, 1], of x0 [B,c,h,w]; NaN where a value is not finite, which
    clamped would be white or black."""
    model.load_part("vae")
    images = decode_codec(model.codec, x0)
    return images.where(images.isfinite(), torch.nan).clamp(-1, 1)


@torch.no_grad()
def decode_codec(codec: Codec, x0: Tensor) -> Tensor:
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
    if not fits(codec, x0):
        ways = ways[2:] if not fits(codec, x0[:1]) else ways[1:]
    for way in ways[:-1]:
        try:
            return way()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # here, where the error no longer holds the failed tensors
    return ways[-1]()


def fits(codec: VaeCodec, x0: Tensor) -> bool:
    """Whether a CPU has room for decoding at once: where memory is promised before it is there,
    no error would tell."""
    if x0.device.type != "cpu":
        return True
    free = free_memory(x0.device)
    if free is None:
        return True
    return largest_map(codec, x0) * MAPS * len(x0) < 0.8 * free


def largest_map(codec: VaeCodec, x0: Tensor) -> int:
    """Bytes of the largest feature map of the decoder for one picture."""
    widths, side = codec.config.widths, codec.factor // codec.config.patch
    pixels = x0.shape[2] * x0.shape[3] * side**2
    return pixels * max(widths[: 2 if len(widths) > 1 else 1]) * codec.vae.dtype.itemsize
