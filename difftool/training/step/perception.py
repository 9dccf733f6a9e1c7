"""Networks and distances that help a part to learn and are left behind: nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.devices import on_device

BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)


def pyramid_distance(a: Tensor, b: Tensor, levels: int = 4) -> Tensor:
    """Laplacian pyramid distance [B] of pictures [B,C,H,W] (Ling and Okada 2006; Bojanowski et al.
    2018, eq. 3): mean absolute differences of the bands, 4^-j of each a pixel of its own, so that
    edges and shapes count where a plain difference sees only shades."""
    difference, total = a - b, torch.zeros(len(a), device=a.device)
    kernel = on_device(BINOMIAL, a.device, a.dtype)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(a.shape[1], 1, 5, 5)
    for _ in range(levels):  # the pyramid is linear: that of the difference is the difference
        if min(difference.shape[2:]) < 4:
            break
        padded = F.pad(difference, (2, 2, 2, 2), mode="replicate")
        coarse = F.conv2d(padded, kernel, stride=2, groups=a.shape[1])
        fine = F.interpolate(coarse, difference.shape[2:], mode="bilinear", align_corners=False)
        total = total + (difference - fine).abs().mean(dim=(1, 2, 3))
        difference = coarse
    return total + difference.abs().mean(dim=(1, 2, 3))


def init(network: nn.Module, generator: torch.Generator) -> None:
    """Kaiming's scale for leaky rectifiers, a function of the generator's state."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.data.zero_()


class PatchDiscriminator(nn.Module):
    """Judges patches of pictures [B,C,H,W] real or made (Isola et al. 2017), with the hinge loss
    (Lim and Ye 2017) that latent diffusion's autoencoders use."""

    def __init__(self, channels: int, width: int = 48, levels: int = 3):
        super().__init__()
        widths = [channels, *(width * 2**i for i in range(levels))]
        layers: list[nn.Module] = []
        for i in range(levels):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1))
            if i:
                layers.append(nn.GroupNorm(8, widths[i + 1]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def losses(self, made: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Its own loss and the maker's, each [B]: one backward pass serves both, because each
        reaches only the weights of its own side."""
        own = F.relu(1 - self(real)) + F.relu(1 + self(made.detach()))
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        fooling = -torch.func.functional_call(self, frozen, (made,))
        return {"critic": own.mean(dim=(1, 2, 3)), "fooling": fooling.mean(dim=(1, 2, 3))}

    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights."""
        init(self, generator)


class PictureEncoder(nn.Module):
    """Pictures [B,3,H,W] to one embedding [B,P] a text encoder: a small convolutional network."""

    def __init__(self, width: int, outputs: Sequence[int]):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.heads = nn.ModuleList(nn.Linear(8 * width, p, bias=False) for p in outputs)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.silu(norm(layer(x)))
        pooled = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return [head(pooled) for head in self.heads]

    def scale(self) -> Tensor:
        """The logits' scale, at most 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=100)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights."""
        init(self, generator)
