"""The layers that U-Nets are made of. Parameter names are diffusers'.

Shapes: B pictures; C channels; H, W rows and columns; N = H W tokens; L context tokens of width D;
E the width of the time embedding.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(
    t: Tensor, dim: int, *, cosines_first: bool = True, shift: float = 0.0, period: float = 10_000.0
) -> Tensor:
    """Cosines and sines [*,dim], fp32, of numbers t [*] (Vaswani et al. 2017, section 3.5).

    The wavelengths are 2 pi period^(i / (dim/2 - shift)), i = 0, 1, ... A last odd column is zero.
    """
    half = dim // 2
    # In the published order of operations: at t = 999 the last bit of a frequency shows.
    exponents = -math.log(period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[..., None] * torch.exp(exponents / (half - shift))
    waves = [angles.cos(), angles.sin()] if cosines_first else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


def guidance_sinusoids(w: Tensor, dim: int) -> Tensor:
    """LCM's sinusoids [B,dim], fp32, of a guidance scale w [B] (Luo et al. 2023): of 1000 w, sines
    first, and the frequencies multiplied out in another order than the time's."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = 1000 * w.float()[:, None] * torch.exp(index * (-math.log(10_000) / (half - 1)))
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


def silu(x: Tensor) -> Tensor:
    """SiLU of what is needed no more, in its place where nothing is learned: of a large picture
    that saves a feature map."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def to_tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,N,C]; a view if x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """[B,N,C] -> [B,C,H,W], rows and columns as in `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class TokenLinear(nn.Linear):
    """A linear layer of tokens [B,N,C]."""


class TimeEmbedding(nn.Module):
    """Two linear layers that bring sinusoids or a vector [B,in_dim] to the time embedding [B,E].

    With `guidance_dim`, an embedded guidance scale [B,guidance_dim] joins at the input (LCM).
    """

    def __init__(self, in_dim: int, emb_dim: int, guidance_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, emb_dim)
        self.linear_2 = nn.Linear(emb_dim, emb_dim)
        if guidance_dim is not None:
            self.cond_proj = nn.Linear(guidance_dim, in_dim, bias=False)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            x = x + self.cond_proj(guidance)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Two convolutions with a residual connection, conditioned on the time by addition (DDPM) or by
    scale and shift (ADM), and changing the resolution where `resample` says so (BigGAN, ADM).

    With `emb_dim` None there is no time (autoencoders).
    """

    last = "conv2"

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        emb_dim: int | None,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        if emb_dim is not None:
            self.time_emb_proj = nn.Linear(emb_dim, 2 * channels if scale_shift else channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None
        )

    def forward(
        self, x: Tensor, emb: Tensor | None = None, size: torch.Size | None = None
    ) -> Tensor:
        """x [B,C,H,W], emb [B,E] after its SiLU, size that of the result if it is upsampled."""
        h = silu(self.norm1(x))
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = F.interpolate(x, size), F.interpolate(h, size)
        h = self.conv1(h)
        time = None if emb is None else self.time_emb_proj(emb)[:, :, None, None]
        if time is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(silu(h)))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h + skip if torch.is_grad_enabled() or h.dtype != skip.dtype else h.add_(skip)


class Downsample(nn.Module):
    """Convolution of stride 2; padding 0 pads one row and column at the far end (DDPM)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size`, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None, size: torch.Size | list[int]) -> Tensor:
        return self.conv(F.interpolate(x, size))


class Attention(nn.Module):
    """Multi-head attention of tokens x [B,N,C] to a context [B,L,D], or to themselves."""

    attend = staticmethod(F.scaled_dot_product_attention)
    """Of q, k, v, [B,heads,N,C] each."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = TokenLinear(channels, channels, bias=bias)
        self.to_k = TokenLinear(context_dim or channels, channels, bias=bias)
        self.to_v = TokenLinear(context_dim or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([TokenLinear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        told = self.keys_values(x) if context is None else self.of_context(context)
        q, k, v = (  # each [B,heads,N or L,C/heads]
            y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), *told)
        )
        y = self.attend(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B,L,C]."""
        return self.to_k(source), self.to_v(source)

    def of_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a context, which may be the same step after step."""
        return self.keys_values(context)


class PlainAttention(Attention):
    """Residual self-attention over all positions of a picture [B,C,H,W] (DDPM, ADM)."""

    last = "to_out.0"

    def __init__(self, channels: int, heads: int, groups: int, eps: float):
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + to_picture(super().forward(to_tokens(self.group_norm(x))), like=x)


class GEGLU(nn.Module):
    """Linear layer gated by the exact (erf) GELU of another (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = TokenLinear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back."""

    def __init__(self, channels: int):
        super().__init__()
        # The middle is diffusers' dropout, unused by every published U-Net; it fixes the names.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), TokenLinear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context if there is one, feed-forward; tokens [B,N,C].

    With `only_cross` the first attention looks at the context too (the x4 upscaler).
    """

    def __init__(self, channels: int, heads: int, context_dim: int | None, only_cross: bool):
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, context_dim if only_cross else None)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)
        if context is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Residual stack of `depth` transformer blocks over a picture [B,C,H,W] (Rombach et al. 2022).

    Its projections are linear layers (SD2, SDXL) or 1x1 convolutions (SD1), the same mathematics.
    """

    last = "proj_out"

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        *,
        context_dim: int | None,
        only_cross: bool,
        linear: bool,
        groups: int,
    ):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        project = TokenLinear if linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, only_cross) for _ in range(depth)
        )
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear:
            return x + to_picture(self.proj_out(tokens), like=x)
        return x + self.proj_out(to_picture(tokens, like=x))
