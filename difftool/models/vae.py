"""The KL autoencoder of latent diffusion (Rombach et al. 2022), of any depth and latent width.

Parameter names are diffusers' AutoencoderKL's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.models.configs import VaeConfig

NORM_EPS = 1e-6


class Vae(nn.Module):
    """Pictures [B,C,H,W] in [-1, 1] to the latent's posterior [B,c,h,w], and latents to pictures.

    H and W are multiples of `factor`. Latents are raw: the codec shifts and scales them.
    """

    def __init__(self, config: VaeConfig):
        super().__init__()
        latent = config.latent_channels
        self.config = config
        self.factor = 2 ** (len(config.widths) - 1)
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
        moments = self.encoder(images)
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures of latents; not clamped."""
        if self.config.quant_conv:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent)

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
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
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
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


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
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Level(nn.Module):
    def __init__(self, before: int, width: int, blocks: int, groups: int, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            _ResBlock(before if j == 0 else width, width, groups) for j in range(blocks)
        )
        self.downsamplers = nn.ModuleList([_Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([_Upsample(width)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class _Middle(nn.Module):
    def __init__(self, width: int, config: VaeConfig):
        super().__init__()
        self.resnets = nn.ModuleList(_ResBlock(width, width, config.groups) for _ in range(2))
        count = 1 if config.mid_attention else 0
        self.attentions = nn.ModuleList(_Attention(width, config.groups) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        for module in (first, *self.attentions, second):
            x = module(x)
        return x


class _ResBlock(nn.Module):
    def __init__(self, before: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, NORM_EPS)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    """Self-attention of one head over all positions."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        # SDPA's fast kernels want [B,heads,L,D].
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out[0](y).transpose(1, 2).reshape(x.shape)


class _Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
