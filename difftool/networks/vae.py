"""The KL autoencoder of latent diffusion (Rombach et al. 2022), of any depth and latent width.

Parameter names are diffusers' AutoencoderKL's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.networks import VaeConfig
from difftool.networks.layers import Downsample, PlainAttention, ResBlock, Upsample, silu

NORM_EPS = 1e-6


class Vae(nn.Module):
    """Pictures [B,C,H,W] in [-1, 1] to the latent's posterior [B,c,h,w], and latents to pictures.

    H and W are multiples of `factor`. Latents are raw: the codec shifts and scales them.
    """

    def __init__(self, config: VaeConfig):
        super().__init__()
        latent = config.latent_channels
        self.config = config
        self.factor = config.factor
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        if config.quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.encoder.conv_in.weight.dtype

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, both [B,c,h,w]."""
        moments = self.encoder(F.pixel_unshuffle(images, self.config.patch))
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures of latents; not clamped."""
        if self.config.quant_conv:
            latent = self.post_quant_conv(latent)
        return F.pixel_shuffle(self.decoder(latent), self.config.patch)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, uniform within 1/sqrt(fan-in), a function of the generator's state."""
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


class _Encoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, groups, last = config.widths, config.groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels * config.patch**2, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, config.blocks, groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = _Middle(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, groups, last = config.widths[::-1], config.groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], config)
        self.up_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, config.blocks + 1, groups, up=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.channels * config.patch**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


def _resblocks(before: int, width: int, count: int, groups: int) -> nn.ModuleList:
    widths = (before, *[width] * count)
    return nn.ModuleList(
        ResBlock(i, o, emb_dim=None, groups=groups, eps=NORM_EPS) for i, o in pairwise(widths)
    )


class _Level(nn.Module):
    def __init__(self, before: int, width: int, blocks: int, groups: int, down=False, up=False):
        super().__init__()
        self.resnets = _resblocks(before, width, blocks, groups)
        self.downsamplers = nn.ModuleList([Downsample(width, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        for upsample in self.upsamplers:
            x = upsample(x, None, [2 * side for side in x.shape[2:]])
        return x


class _Middle(nn.Module):
    def __init__(self, width: int, config: VaeConfig):
        super().__init__()
        self.resnets = _resblocks(width, width, 2, config.groups)
        self.attentions = nn.ModuleList(
            [PlainAttention(width, 1, config.groups, NORM_EPS)] if config.mid_attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        for module in (first, *self.attentions, second):
            x = module(x)
        return x
