"""Four kinds of generative model of about as many parameters, for generative_models.py: a GAN, a
VAE, a normalizing flow, and difftool's own U-Net and training step.

Pictures are [B,C,S,S] in [-1, 1], S a multiple of 4. The U-Net's size is given; the others' widths
are such that they have as many parameters. All that is trained counts: a GAN's discriminator and a
VAE's encoder too, which no sample is made by.

    gan        convolutions as in DCGAN (1511.06434); hinge loss, spectral norm (1802.05957)
    vae        the same layers; a discretised logistic for each value (1606.04934, appendix A.3)
    flow       Glow (1807.03039): two levels, their steps of affine couplings
    diffusion  the preset pixel-small with fewer channels: flow matching over 2x2 blocks of pixels

Samples are what each is usually shown by: the VAE's are means, the flow's of temperature 1, the
diffusion model's of the preset's sampler and steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from difftool.config.layers import preset_layers, resolve
from difftool.config.networks import UNetConfig
from difftool.diffusion.denoiser import UNCONDITIONAL, Denoiser
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.likelihood import (
    INTERVALS,
    Measured,
    likelihood,
    mean_bits,
    sample_bits,
)
from difftool.diffusion.losses import TIMES, WEIGHTS, training_loss
from difftool.diffusion.path import build_path
from difftool.diffusion.samplers import SAMPLERS
from difftool.networks.kinds import build_network

CHANNELS = (32, 64)
"""Of the U-Net, by level."""
LATENT = 64
"""Numbers that a picture of the GAN and of the VAE is made from."""
GROUPS = 2
"""Of the group norms of the GAN and the VAE."""
OUTER, INNER = 4, 8
"""Steps of the flow by level; the outer ones, on four times as many places, are half as wide."""
WARM = 0.1
"""Share of the training over which the VAE's KL comes to count whole."""
DRAWS = 4
"""Noise levels at which the diffusion model's bound sees each picture."""
ODE_PICTURES, ODE_STEPS = 8, 64
"""Pictures that go through the diffusion model's ODE, and how finely (`Measured.steps`)."""


class Generative(nn.Module, ABC):
    """What is compared. Subclasses set `shape`, [C,S,S]."""

    rates: ClassVar[Mapping[str, float]]
    """Learning rate of each part that has an optimiser of its own."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    evaluations: int = 1
    """Of the network, that a sample takes."""
    shape: tuple[int, int, int]

    @abstractmethod
    def losses(self, x: Tensor, spent: float) -> Iterator[tuple[str, Tensor]]:
        """Losses of a batch, each with the part that is to follow it, which has moved when the next
        is asked for. spent: share of the training that is over."""

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """Pictures by torch's global generator, not yet clamped."""

    def bits(self, x: Tensor) -> dict[str, float]:
        """Bits per dimension of pictures, whose values are one of 256, by how they were found:
        "exact", "bound" or "ODE"; none for what has no likelihood."""
        return {}


# --- shared by the GAN and the VAE -----------------------------------------------------------


def from_latent(width: int, side: int, outputs: int) -> nn.Sequential:
    """[B,LATENT] to maps [B,outputs,side,side]; most of the weights work at a quarter of it."""
    wide, small = 2 * width, side // 4
    return nn.Sequential(
        nn.Linear(LATENT, wide * small**2), nn.Unflatten(1, (wide, small, small)),
        nn.GroupNorm(GROUPS, wide), nn.SiLU(), nn.ConvTranspose2d(wide, width, 4, 2, 1),
        nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
        nn.GroupNorm(GROUPS, width // 2), nn.SiLU(), nn.Conv2d(width // 2, outputs, 3, padding=1),
    )  # fmt: skip


def to_vector(
    width: int, shape: tuple[int, int, int], outputs: int, *, critic: bool = False
) -> nn.Sequential:
    """Pictures [B,C,S,S] to [B,outputs]. critic: spectral norm in place of group norms."""
    bounded = spectral_norm if critic else nn.Identity()
    layers: list[nn.Module] = []
    before = shape[0]
    for after, stride in ((width // 2, 1), (width, 2), (2 * width, 2)):
        kernel = 2 + stride if stride > 1 else 3
        layers.append(bounded(nn.Conv2d(before, after, kernel, stride, 1)))
        layers += [nn.LeakyReLU(0.2)] if critic else [nn.GroupNorm(GROUPS, after), nn.SiLU()]
        before = after
    last = nn.Linear(2 * width * (shape[1] // 4) ** 2, outputs)
    return nn.Sequential(*layers, nn.Flatten(), bounded(last))


# --- the four --------------------------------------------------------------------------------


class Gan(Generative):
    """A generator, and a discriminator that tells its pictures from true ones."""

    rates: ClassVar[Mapping[str, float]] = {"critic": 4e-4, "generator": 2e-4}
    betas: ClassVar[tuple[float, float]] = (0.0, 0.9)

    def __init__(self, width: int, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape
        self.generator = from_latent(width, shape[1], shape[0])
        self.critic = to_vector(width, shape, 1, critic=True)

    def losses(self, x: Tensor, spent: float) -> Iterator[tuple[str, Tensor]]:
        made = self.sample(len(x)).detach()
        true, false = self.critic(x), self.critic(made)
        yield "critic", F.relu(1 - true).mean() + F.relu(1 + false).mean()
        yield "generator", -self.critic(self.sample(len(x))).mean()

    def sample(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, LATENT)).tanh()


class Vae(Generative):
    """An encoder to a Gaussian over latents, and a decoder to a distribution of each value."""

    rates: ClassVar[Mapping[str, float]] = {"": 1e-3}

    def __init__(self, width: int, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape
        self.encoder = to_vector(width, shape, 2 * LATENT)
        self.decoder = from_latent(width, shape[1], 2 * shape[0])

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of each picture given its latent, and those of the latent: [B] each. Their sum is
        the variational bound."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        log_variance = log_variance.clamp(-10, 10)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
        centre, log_scale = self.decoder(z).chunk(2, 1)
        return -logistic_mass(x, centre, log_scale.clamp(min=-7)).flatten(1).sum(1), kl

    def losses(self, x: Tensor, spent: float) -> Iterator[tuple[str, Tensor]]:
        values, kl = self.parted(x)
        yield "", (values + min(1, spent / WARM) * kl).mean() / x[0].numel()

    def sample(self, count: int) -> Tensor:
        return self.decoder(torch.randn(count, LATENT)).chunk(2, 1)[0]

    def bits(self, x: Tensor) -> dict[str, float]:
        return {"bound": sum(part.mean().item() for part in self.parted(x)) / unit(x)}


def unit(x: Tensor) -> float:
    """Nats of a picture that are a bit a dimension."""
    return x[0].numel() * math.log(2)


def logistic_mass(x: Tensor, centre: Tensor, log_scale: Tensor) -> Tensor:
    """log of a logistic's mass in the bin of each x, of 255 steps in [-1, 1]; the first and the
    last bin have the tails."""
    scale, bin_half = log_scale.exp(), 1 / 255
    low, high = (x - bin_half - centre) / scale, (x + bin_half - centre) / scale
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
    inner = torch.log(-torch.expm1(-2 * bin_half / scale))
    first, last = x < -1 + bin_half, x > 1 - bin_half
    below = torch.where(last, 0, F.logsigmoid(high))
    above = torch.where(first, 0, F.logsigmoid(-low))
    return below + above + torch.where(first | last, 0, inner)


class FlowStep(nn.Module):
    """Glow's step: each channel scaled and shifted, channels mixed, and half of them scaled and
    shifted by what a network makes of the other half."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, 2 * (channels - channels // 2), 3, padding=1),
        )  # fmt: skip
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)  # so that the coupling begins by changing nothing

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Bring the channels of x to mean 0 and deviation 1."""
        deviation, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        self.log_scale.copy_(-(deviation + 1e-6).log())
        self.shift.copy_(-mean / (deviation + 1e-6))

    def _coupling(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.net(kept).chunk(2, 1)
        return 2 * (log_scale / 2).tanh(), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """And the log determinant of each picture, [B]."""
        places = x[0, 0].numel()
        x = F.conv2d(x * self.log_scale.exp() + self.shift, self.mix[:, :, None, None])
        fixed = self.log_scale.sum() + torch.linalg.slogdet(self.mix)[1]
        kept, moved = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
        log_scale, shift = self._coupling(kept)
        y = torch.cat([kept, moved * log_scale.exp() + shift], 1)
        return y, places * fixed + log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The x of a y."""
        kept, moved = y.split([y.shape[1] // 2, y.shape[1] - y.shape[1] // 2], 1)
        log_scale, shift = self._coupling(kept)
        x = torch.cat([kept, (moved - shift) * (-log_scale).exp()], 1)
        x = F.conv2d(x, torch.linalg.inv(self.mix)[:, :, None, None])
        return (x - self.shift) * (-self.log_scale).exp()


class Flow(Generative):
    """Two levels: 2x2 blocks become channels, steps, half of the channels leave; and again,
    where all leave. What leaves is Gaussian, the first half given the second."""

    rates: ClassVar[Mapping[str, float]] = {"": 1e-3}
    ready: Tensor

    def __init__(self, width: int, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape
        outer, inner = 4 * shape[0], 8 * shape[0]
        self.outer = nn.ModuleList(FlowStep(outer, width // 2) for _ in range(OUTER))
        self.inner = nn.ModuleList(FlowStep(inner, width) for _ in range(INNER))
        self.prior = nn.Conv2d(outer // 2, outer, 3, padding=1)
        for parameter in self.prior.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("ready", torch.tensor(False))

    def log_density(self, values: Tensor) -> Tensor:
        """Of values in [-1/2, 1/2], [B]; the first batch sets the channels' scales."""
        x, total = F.pixel_unshuffle(values, 2), 0.0
        for steps in (self.outer, self.inner):
            for step in steps:
                assert isinstance(step, FlowStep)
                if not self.ready:
                    step.fit(x)
                x, log_determinant = step(x)
                total = total + log_determinant
            if steps is self.outer:
                leaving, x = x.chunk(2, 1)
                mean, log_deviation = self._prior(x)
                total = total + normal(leaving, mean, log_deviation)
                x = F.pixel_unshuffle(x, 2)
        self.ready.fill_(True)
        return total + normal(x, torch.zeros_like(x), torch.zeros_like(x))

    def _prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_deviation = self.prior(x).chunk(2, 1)
        return mean, 2 * (log_deviation / 2).tanh()

    def _nats(self, x: Tensor) -> Tensor:
        """Of pictures, [B], a noise as wide as a bin added to each value."""
        values = ((x + 1) * 127.5 + torch.rand_like(x)) / 256 - 0.5
        return x[0].numel() * math.log(256) - self.log_density(values)

    def losses(self, x: Tensor, spent: float) -> Iterator[tuple[str, Tensor]]:
        yield "", self._nats(x).mean() / x[0].numel()

    def sample(self, count: int) -> Tensor:
        channels, side = 8 * self.shape[0], self.shape[1] // 4
        x = torch.randn(count, channels, side, side)
        for steps in (self.inner, self.outer):
            for step in reversed(list(steps)):
                assert isinstance(step, FlowStep)
                x = step.inverse(x)
            if steps is self.inner:
                x = F.pixel_shuffle(x, 2)
                mean, log_deviation = self._prior(x)
                x = torch.cat([mean + log_deviation.exp() * torch.randn_like(x), x], 1)
        # the middle of the bin that a value is in
        return ((F.pixel_shuffle(x, 2) + 0.5) * 256).floor() / 127.5 - 1

    def bits(self, x: Tensor) -> dict[str, float]:
        return {"exact": self._nats(x).mean().item() / unit(x)}


def normal(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log density [B] of Gaussian x."""
    square = ((x - mean) * (-log_deviation).exp()) ** 2
    return -(square / 2 + log_deviation + math.log(2 * math.pi) / 2).flatten(1).sum(1)


class Diffusion(Generative):
    """The preset pixel-small with CHANNELS, for pictures of any number of channels."""

    rates: ClassVar[Mapping[str, float]] = {"": 1e-3}

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape
        self.preset = preset = resolve([*preset_layers("pixel-small")])
        assert isinstance(preset.unet, UNetConfig)
        planes = 4 * shape[0]
        config = replace(preset.unet, in_channels=planes, out_channels=planes, channels=CHANNELS)
        network = build_network(config)
        network.init_weights(torch.Generator().manual_seed(torch.initial_seed()))
        self.denoiser = Denoiser(network, build_path(preset.path), preset.target)
        self.sampler = SAMPLERS[preset.sample.sampler](self.denoiser.path)
        self.levels = GRIDS[preset.sample.schedule](self.denoiser.path, preset.sample.steps)
        self.evaluations = preset.sample.steps

    def losses(self, x: Tensor, spent: float) -> Iterator[tuple[str, Tensor]]:
        x0, train = F.pixel_unshuffle(x, 2), self.preset.train
        each, _ = training_loss(
            self.denoiser,
            x0,
            UNCONDITIONAL,
            times=TIMES[train.time](self.denoiser.path, torch.rand(len(x))),
            weight=WEIGHTS[train.weight],
            eps=torch.randn_like(x0),
        )
        yield "", each.mean()

    def sample(self, count: int) -> Tensor:
        channels, side, _ = self.shape
        x = self.levels[0].sigma * torch.randn(count, 4 * channels, side // 2, side // 2)
        steps = self.sampler(
            self.denoiser.predict, x, self.levels, lambda here, there: torch.randn_like(x)
        )
        *_, last = steps
        return F.pixel_shuffle(last.x, 2)

    def bits(self, x: Tensor) -> dict[str, float]:
        """The bound of all; and that of the ODE: the bound less what the two differ by on the first
        few pictures, where both are known of each."""
        x0 = F.pixel_unshuffle(x, 2)
        samples, slots = [], torch.arange(len(x0))
        for _ in range(DRAWS):
            u = (torch.randperm(len(x0)) + torch.rand(len(x0))) / len(x0)
            edge, eps = 1 + slots[torch.randperm(len(x0))] % INTERVALS, torch.randn_like(x0)
            for some in slots.split(100):
                found = sample_bits(
                    self.denoiser, x0[some], UNCONDITIONAL,
                    u=u[some], eps=eps[some], edge=edge[some], discrete=True,
                )  # fmt: skip
                samples.append(found)
        bound = mean_bits(samples)[0]
        apart = [
            likelihood(
                Measured(
                    denoiser=self.denoiser, x0=one[None], cond=UNCONDITIONAL,
                    discrete=True, steps=ODE_STEPS, seed=seed,
                )
            ).difference[0]
            for seed, one in enumerate(x0[:ODE_PICTURES])
        ]  # fmt: skip
        return {"bound": bound, "ODE": bound - sum(apart) / len(apart)}


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


FASHION_MNIST, EMOJI = (1, 28, 28), (3, 32, 32)
"""Shapes of pictures, [C,S,S]."""
WIDTHS: dict[type[Gan | Vae | Flow], dict[tuple[int, int, int], int]] = {
    Gan: {FASHION_MNIST: 80, EMOJI: 72},
    Vae: {FASHION_MNIST: 44, EMOJI: 36},
    Flow: {FASHION_MNIST: 284, EMOJI: 208},
}
"""By which they have as many parameters as the U-Net, to 3 %."""


def of_equal_size(kind: type[Gan | Vae | Flow], shape: tuple[int, int, int]) -> Generative:
    """A model as large as the U-Net."""
    return kind(WIDTHS[kind][shape], shape)


MODELS: dict[str, Callable[[tuple[int, int, int]], Generative]] = {
    "gan": partial(of_equal_size, Gan),
    "vae": partial(of_equal_size, Vae),
    "flow": partial(of_equal_size, Flow),
    "diffusion": Diffusion,
}
"""By name, of pictures of a shape [C,S,S]; weights by torch's global generator."""
