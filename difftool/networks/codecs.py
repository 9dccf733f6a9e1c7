"""Codecs between pictures [B,C,H,W] in [-1, 1] and x0 [B,c,h,w], the space that is diffused."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.kinds import CodecConfig
from difftool.config.networks import SpaceToDepthConfig, VaeConfig
from difftool.devices import on_device
from difftool.networks.vae import Vae


class Codec(nn.Module):
    """Between pictures and x0; this one changes nothing, others what they do otherwise.

    A learned codec's latent is drawn from a posterior, and x0 is that latent shifted and scaled.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.channels, self.factor = config.latent_channels, config.factor
        self.learned = config.learned
        """Whether it has weights, and a posterior with spread."""

    def parts(self) -> dict[str, nn.Module]:
        """Its networks with weights, by the prefix of their tensors in a model file."""
        return {}

    def encoders(self) -> dict[str, nn.Module]:
        """The networks that make its latents, whether or not they are parts of the model."""
        return self.parts()

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B,c,h,w] of the latents of pictures."""
        return images, torch.full_like(images, -torch.inf)

    def pictures(self, latent: Tensor) -> Tensor:
        """Pictures [B,C,H,W] of latents."""
        return latent

    def scaled(self, latent: Tensor) -> Tensor:
        """x0 of latents."""
        return latent

    def raw(self, x0: Tensor) -> Tensor:
        """Latents as the network has them, of x0."""
        return x0

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0, fp32, of pictures; noise in x0's shape draws from the posterior, None takes its mean.
        ValueError if a side is no multiple of `factor`."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            what = f"picture sides must be multiples of {self.factor}, got {width}x{height}"
            raise ValueError(what)
        mean, logvar = (part.float() for part in self.posterior(images))
        if noise is not None and self.learned:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return self.scaled(mean)

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures, fp32, of x0."""
        return self.pictures(self.raw(x0)).float()


class SpaceToDepth(Codec):
    """Blocks of pixels become channels, in pixel_unshuffle's order; x0 stays in [-1, 1]."""

    def __init__(self, config: SpaceToDepthConfig):
        super().__init__(config)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().posterior(F.pixel_unshuffle(images, self.factor))

    def pictures(self, latent: Tensor) -> Tensor:
        return F.pixel_shuffle(latent, self.factor)


class VaeCodec(Codec):
    """x0 is a KL autoencoder's latent, shifted and scaled to about unit variance.

    Pictures and x0 are fp32; the network runs in its own dtype, or in fp32 under `force_upcast`.
    """

    def __init__(self, config: VaeConfig):
        super().__init__(config)
        self.config = config
        self.vae = Vae(config)

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.network()
        return vae.encode(images.to(vae.dtype))

    def pictures(self, latent: Tensor) -> Tensor:
        vae = self.network()
        return vae.decode(latent.to(vae.dtype))

    def scaled(self, latent: Tensor) -> Tensor:
        offset, gain = self._affine(latent)
        return (latent - offset) * gain

    def raw(self, x0: Tensor) -> Tensor:
        offset, gain = self._affine(x0)
        return x0.float() / gain + offset

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
            return on_device(values, like.device, torch.float32).reshape(-1, 1, 1)

        return column(offset), c.scale / column(std)
