"""CLIP's picture encoder, and the noise that unCLIP adds to what it says of a picture.

Parameter names are transformers' CLIPVisionModelWithProjection's. unCLIP is the open form of
DALL-E 2 (2204.06125): a U-Net that is told a noised embedding of a picture, and how noised it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difftool.config.networks import VisionConfig
from difftool.networks.clip import ClipLayer
from difftool.networks.layers import sinusoids


class ClipVision(nn.Module):
    """Pictures [B,3,size,size], normed by CLIP_MEAN and CLIP_STD, to embeddings [B,P]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = _VisionModel(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(images))


class _VisionModel(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # spelled so by everybody
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config, causal=False) for _ in range(config.layers))


class _Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.width, config.patch
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.size // patch) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class Normalizer(nn.Module):
    """Mean and deviation [1,P] of the embeddings that an unCLIP model was trained on."""

    def __init__(self, width: int):
        super().__init__()
        self.mean = nn.Parameter(torch.empty(1, width))
        self.std = nn.Parameter(torch.empty(1, width))

    def nothing(self) -> dict[str, Tensor]:
        """The weights that change no embedding."""
        shape = self.mean.shape
        return {"mean": torch.zeros(shape), "std": torch.ones(shape)}

    def forward(
        self, embeddings: Tensor, noise: Tensor, alpha: float, sigma: float, level: int
    ) -> Tensor:
        """What the U-Net is told [B,2P]: noised embeddings [B,P], and sinusoids of the level."""
        noised = alpha * (embeddings - self.mean) / self.std + sigma * noise
        told = sinusoids(torch.full((len(noised),), float(level), device=noised.device),
                         noised.shape[1])  # fmt: skip
        return torch.cat([noised * self.std + self.mean, told.to(noised.dtype)], dim=1)
