"""Codecs between pictures [B,C,H,W] in [-1, 1] and x0 [B,c,h,w], the space that is diffused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.networks import CodecConfig, IdentityConfig, SpaceToDepthConfig, VaeConfig
from difftool.networks.vae import Vae
from difftool.registry import Registry


class Codec(Protocol):
    """Between pictures and x0. A size that is not a multiple of `factor` is a ValueError."""

    channels: int
    """Channels of x0."""
    factor: int
    """How many times smaller the sides of x0 are."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0 of pictures; noise in x0's shape draws from the posterior, None takes its mean."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures of x0."""
        ...


class IdentityCodec(nn.Module):
    """x0 is the picture."""

    def __init__(self, config: IdentityConfig):
        super().__init__()
        self.channels, self.factor = config.latent_channels, config.factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, x0: Tensor) -> Tensor:
        return x0


class SpaceToDepth(nn.Module):
    """Blocks of pixels become channels, in pixel_unshuffle's order; x0 stays in [-1, 1]."""

    def __init__(self, config: SpaceToDepthConfig):
        super().__init__()
        self.channels, self.factor = config.latent_channels, config.factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        _check_size(images, self.factor)
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, x0: Tensor) -> Tensor:
        return F.pixel_shuffle(x0, self.factor)


class VaeCodec(nn.Module):
    """x0 is a KL autoencoder's latent, shifted and scaled to about unit variance.

    Pictures and x0 are fp32; the network runs in its own dtype, or in fp32 under `force_upcast`.
    """

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.vae = Vae(config)
        self.channels, self.factor = config.latent_channels, config.factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        _check_size(images, self.factor)
        vae = self.network()
        mean, logvar = (part.float() for part in vae.encode(images.to(vae.dtype)))
        return self.scaled(mean if noise is None else mean + torch.exp(0.5 * logvar) * noise)

    def scaled(self, latent: Tensor) -> Tensor:
        """x0 of a raw latent [B,c,h,w]."""
        offset, gain = self._affine(latent)
        return (latent - offset) * gain

    def raw(self, x0: Tensor) -> Tensor:
        """The latent as the network has it, of x0 [B,c,h,w]."""
        offset, gain = self._affine(x0)
        return x0.float() / gain + offset

    def decode(self, x0: Tensor) -> Tensor:
        vae = self.network()
        return vae.decode(self.raw(x0).to(vae.dtype)).float()

    def network(self) -> Vae:
        """The autoencoder in the type that it runs in."""
        if self.config.force_upcast and self.vae.dtype != torch.float32:
            return copy.deepcopy(self.vae).float()  # for this call: the stored weights stay small
        return self.vae

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """offset and gain [c,1,1] (or scalar) of x0 = (latent - offset) * gain."""
        c = self.config
        offset = c.shift if c.latents_mean is None else c.latents_mean
        std = 1.0 if c.latents_std is None else c.latents_std

        def column(values: float | tuple[float, ...]) -> Tensor:
            tensor = torch.tensor(values, dtype=torch.float32, device=like.device)
            return tensor.reshape(-1, 1, 1)

        return column(offset), c.scale / column(std)


def _check_size(images: Tensor, factor: int) -> None:
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"picture sides must be multiples of {factor}, got {width}x{height}")


CODECS: Registry[Callable[..., Codec]] = Registry("codec")
CODECS.add("identity", IdentityCodec, "pixel")
CODECS.add("space_to_depth", SpaceToDepth)
CODECS.add("vae", VaeCodec)


def build_codec(config: CodecConfig) -> Codec:
    """The codec of a configuration, a module."""
    return CODECS[config.kind](config)
