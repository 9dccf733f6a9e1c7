"""What each part of a model learns: one class a part, and the registry that names them.

unet: the error of its prediction against noise (the text encoders with a vocabulary of their own
learn with it). vae: to give pictures back through a narrow latent. clip: which caption belongs to
which picture. prior: to denoise what a picture encoder says of pictures.
"""

from __future__ import annotations

import pathlib
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.schema import ClipTrainConfig, Preset, TrainConfig, VaeTrainConfig
from difftool.data import Dataset
from difftool.devices import on_device
from difftool.diffusion.denoiser import Cond
from difftool.diffusion.likelihood import INTERVALS, Sampled, sample_bits
from difftool.diffusion.losses import LOSSES, TIMES, WEIGHTS, Time, Weight, training_loss
from difftool.diffusion.path import Path
from difftool.errors import UsageError
from difftool.networks.prior import PriorTransformer
from difftool.pipeline.condition import (
    build_cond,
    context_lengths,
    encode_prompts,
    pooled_texts,
)
from difftool.pipeline.model import Model
from difftool.progress import Progress
from difftool.registry import Registry, call
from difftool.training.step import parallel, rng
from difftool.training.step.augment import AugmentEmbedding, apply_labels, draw_labels
from difftool.training.step.batches import Batch, to_signal
from difftool.training.step.cache import Embeddings, Latents
from difftool.training.step.frames import buckets_of
from difftool.training.step.perception import PatchDiscriminator, PictureEncoder, pyramid_distance
from difftool.training.step.rng import Stream


class LossOutput(NamedTuple):
    """The losses of a batch."""

    loss: Tensor
    """[B]; its mean is what the step descends."""
    terms: dict[str, Tensor]
    """What it is made of, for the record: scalars on the device."""
    log_snr: Tensor | None = None
    """[B]: the noise level that each sample was seen at."""


class Objective(ABC):
    """What one part of a model learns from a batch."""

    by_sample = True
    """Whether a sample's loss is its own, so that processes can share a batch."""
    passes = 3.0
    """Work of a sample in forward passes of what learns, about: there, and back to inputs and to
    weights."""
    copies = 0
    """Networks like the one that learns that are held beside it."""

    def __init__(self, model: Model, config: Any):
        self.model, self.config, self.seed = model, config, config.seed

    @staticmethod
    @abstractmethod
    def learned_parts(preset: Preset) -> list[str]:
        """The names of the parts of a model that learn, as in `Model.parts`."""

    def trained(self) -> dict[str, nn.Module]:
        """The parts that learn, by their names in the model."""
        names = self.learned_parts(self.model.preset)
        return {name: part for name, part in self.model.parts().items() if name in names}

    def helpers(self) -> dict[str, nn.Module]:
        """Networks that learn beside them and are left behind at the end."""
        return {}

    def helper_optimizer(self) -> torch.optim.Optimizer | None:
        """Of the helpers, where they do not learn as the parts do."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What else the next step depends on, for checkpoints."""
        return {}

    def stepped(self) -> None:
        """The weights have made a step."""
        return

    def needs_pictures(self) -> bool:
        """Whether a batch must bring its pictures."""
        return True

    def precompute(self, dataset: Dataset, folder: pathlib.Path, progress: Progress) -> None:
        """Make what frozen networks say of the data once, in files below `folder`, or read it
        there."""
        return

    def encode(
        self, dataset: Dataset, folder: pathlib.Path, progress: Progress, *, flip: bool
    ) -> Latents | None:
        """The latents of a set that x0 can be taken from, mirrored too where `flip`, in a file
        below `folder`; None where pictures are needed."""
        return None

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> LossOutput:
        """The losses of a batch; `step` counts optimiser steps."""

    def held_out(self, batch: Batch, latents: Latents | None = None) -> LossOutput:
        """The losses of a batch that is not learned from, of pictures or, without, of their
        latents: a function of the weights and its slots, so that those of two steps can be
        compared."""
        return self.losses(batch, -1)  # before any discriminator has a say

    def bits(self, batch: Batch, latents: Latents | None = None) -> Sampled | None:
        """Of the likelihood of a batch that is not learned from; None where there is none."""
        return None


OBJECTIVES: Registry[type[Objective]] = Registry("part")


# --- the U-Net -------------------------------------------------------------------------------


def times_and_weight(config: TrainConfig, path: Path, target: str) -> tuple[Time, Weight]:
    """When a recipe's loss looks, u [B] -> t [B], and how much it counts, (alpha, sigma, target) ->
    weight; UsageError for options that they do not have."""
    times = partial(TIMES[config.time], path, **config.time_options)
    weight = partial(WEIGHTS[config.weight], **config.weight_options)
    one = torch.ones(1, 1, 1, 1)
    call(f'time distribution "{config.time}"', times, torch.full((1,), 0.5))
    call(f'loss weighting "{config.weight}"', weight, one, one, target)
    return times, weight


@OBJECTIVES.register("unet")
class DenoisingObjective(Objective):
    """The diffusion objective."""

    config: TrainConfig

    latents: Latents | None = None
    """Where x0 comes from, in place of pictures and the codec."""
    embeddings: Embeddings | None = None
    """Where frozen text encoders' outputs come from, in place of running them."""

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__(model, config)
        denoiser = model.denoiser
        self.times, self.weight = times_and_weight(config, denoiser.path, denoiser.target)
        self.loss = LOSSES[config.loss]
        self.augment: AugmentEmbedding | None = None
        if config.augment:
            width = model.network.embedding_width
            if width is None:
                what = "train.augment is of pictures, which this network does not make"
                raise UsageError(what, hint="leave --augment out")
            self.augment = AugmentEmbedding(width)
            self.augment.init_weights(torch.Generator().manual_seed(config.seed))
            self.augment.to(model.device)

    def helpers(self) -> dict[str, nn.Module]:
        return {"augment": self.augment} if self.augment else {}

    @staticmethod
    def learned_parts(preset: Preset) -> list[str]:
        if preset.train.lora_rank:
            return ["lora"]
        texts = enumerate(preset.text)
        return ["unet", *(f"text.{i}" for i, t in texts if t.tokenizer == "learned")]

    def precompute(self, dataset: Dataset, folder: pathlib.Path, progress: Progress) -> None:
        preset = self.model.preset
        if preset.text and not any(name.startswith("text.") for name in self.learned_parts(preset)):
            self.embeddings = Embeddings(self.model, folder)
        config, flip = self.config, bool(self.config.flip)
        assert config.steps and config.batch_size
        if config.augment:
            return  # no picture is the same twice
        if config.steps * config.batch_size * config.accumulate < len(dataset) * (1 + flip):
            return  # most would be encoded for nothing
        with parallel.first_before_others():
            self.latents = self.encode(dataset, folder, progress, flip=flip)

    def encode(
        self, dataset: Dataset, folder: pathlib.Path, progress: Progress, *, flip: bool
    ) -> Latents | None:
        size, preset = self.config.size, self.model.preset
        if not (size and self.model.codec.encoders() and dataset.fixed):
            return None
        count = len({dataset.name(index) for index in range(len(dataset))})
        with progress("encoding pictures", count) as shown:
            return Latents.make(
                self.model, dataset, buckets_of(preset, size) or size, flip=flip, folder=folder,
                progress=lambda done, _: shown.update(done),
            )  # fmt: skip

    def needs_pictures(self) -> bool:
        return self.latents is None

    def losses(self, batch: Batch, step: int) -> LossOutput:
        u = batch.times
        if self.augment is None:
            x0 = self._x0(batch, self.latents)
            return self._errors(batch, x0, self._cond(batch, x0), u, Stream.NOISE)
        assert batch.pictures is not None
        labels = draw_labels(self.seed, batch.slots, self.config.augment)
        images = apply_labels(to_signal(batch.pictures, self.model.device), labels)
        x0 = self._encoded(images, batch.slots)
        cond = self._cond(batch, x0)._replace(augment=self.augment(labels))
        return self._errors(batch, x0, cond, u, Stream.NOISE)

    def held_out(self, batch: Batch, latents: Latents | None = None) -> LossOutput:
        u = rng.spread(batch.slots).clamp(1e-4, 1 - 1e-4)
        x0 = self._x0(batch, latents)
        return self._errors(batch, x0, self._cond(batch, x0), u, Stream.VALIDATION)

    def _errors(
        self, batch: Batch, x0: Tensor, cond: Cond, u: Tensor, stream: Stream
    ) -> LossOutput:
        """The losses at those quantiles [B] of the training times, with noise of that stream."""
        model, times = self.model, self.times(u)
        eps = rng.normal(self.seed, stream, 0, batch.slots, tuple(x0.shape[1:]))
        losses, level = training_loss(
            model.denoiser, x0, cond, times=times, weight=self.weight, eps=eps, loss=self.loss
        )
        ratio = cast(Tensor, level.alpha / level.sigma)
        return LossOutput(losses, {}, 2 * ratio.log().flatten())

    @torch.no_grad()
    def bits(self, batch: Batch, latents: Latents | None = None) -> Sampled | None:
        x0, slots = self._x0(batch, latents), batch.slots
        return sample_bits(
            self.model.denoiser,
            x0,
            self._cond(batch, x0),
            u=rng.spread(slots),
            eps=rng.normal(self.seed, Stream.LIKELIHOOD, 0, slots, tuple(x0.shape[1:])),
            edge=1 + slots % INTERVALS,
            discrete=not self.model.codec.learned,
        )

    def _cond(self, batch: Batch, x0: Tensor) -> Cond:
        """What conditions the network."""
        model = self.model
        size = (x0.shape[-1] * model.codec.factor, x0.shape[-2] * model.codec.factor)
        encode = self.embeddings or partial(encode_prompts, model)
        length = context_lengths(model, batch.captions)
        return build_cond(model, encode(batch.captions), batch.labels, size, length=length)

    def _x0(self, batch: Batch, latents: Latents | None) -> Tensor:
        model = self.model
        if batch.pictures is None:
            assert latents is not None
            mean, std = latents.read(batch.indices, batch.flips, model.device)
            noise = rng.normal(self.seed, Stream.LATENT, 0, batch.slots, tuple(mean.shape[1:]))
            return model.codec.scaled(mean + std * noise)
        return self._encoded(to_signal(batch.pictures, model.device), batch.slots)

    def _encoded(self, images: Tensor, slots: Tensor) -> Tensor:
        """x0 of pictures [B,3,H,W]."""
        model = self.model
        # In full precision whatever the U-Net trains in: what it learns is no better than x0.
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            sides = (side // model.codec.factor for side in images.shape[-2:])
            shape = (model.codec.channels, *sides)
            noise = None
            if model.codec.learned:
                noise = rng.normal(self.seed, Stream.LATENT, 0, slots, shape)
            return model.codec.encode(images, noise)


# --- the prior -------------------------------------------------------------------------------

MEASURED = 4096
"""Pictures by which the embeddings' mean and deviation are measured, at most."""


@OBJECTIVES.register("prior")
class PriorObjective(DenoisingObjective):
    """The prior's objective (DALL-E 2, 2204.06125, section 2.2): x0 is what a frozen encoder says
    of a picture, normed by mean and deviation over the set; the text is the condition."""

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__(model, config)
        assert isinstance(model.network, PriorTransformer)
        self.network = model.network

    def precompute(self, dataset: Dataset, folder: pathlib.Path, progress: Progress) -> None:
        super().precompute(dataset, folder, progress)
        if self.network.measured:  # by a run that goes on, or by the prior that is trained further
            return
        limit, some = min(len(dataset), MEASURED), self.latents
        if some is None:
            with progress("measuring embeddings", limit) as shown:
                some = Latents.make(
                    self.model, dataset, self.model.codec.factor, flip=False, limit=limit,
                    progress=lambda done, _: shown.update(done),
                )  # fmt: skip
        mean, std = (torch.tensor(values)[None] for values in some.moments())
        self.network.clip_mean.copy_(mean)
        self.network.clip_std.copy_(std.clamp(min=LEAST_SPREAD))

    def bits(self, batch: Batch, latents: Latents | None = None) -> None:
        """An embedding's likelihood is not one of a picture."""

    def _x0(self, batch: Batch, latents: Latents | None) -> Tensor:
        return self.network.normed(super()._x0(batch, latents))


LEAST_SPREAD = 1e-6
"""Of a channel of the embeddings, where all pictures have the same value."""


# --- the autoencoder -------------------------------------------------------------------------


@OBJECTIVES.register("vae")
class VaeObjective(Objective):
    """The autoencoder's objective (Rombach et al. 2022, appendix G): reconstruction, a distance
    that looks at structure, the latent's divergence from a unit normal, and, where it is asked
    for, a patch discriminator's opinion."""

    config: VaeTrainConfig

    def __init__(self, model: Model, config: VaeTrainConfig):
        super().__init__(model, config)
        self.critic: PatchDiscriminator | None = None
        if config.adversarial:
            self.critic = PatchDiscriminator(model.preset.codec.channels)
            self.critic.init_weights(torch.Generator().manual_seed(config.seed))
            self.critic.to(model.device)

    @staticmethod
    def learned_parts(preset: Preset) -> list[str]:
        return ["vae"]

    def helpers(self) -> dict[str, nn.Module]:
        return {"critic": self.critic} if self.critic else {}

    def losses(self, batch: Batch, step: int) -> LossOutput:
        assert batch.pictures is not None
        images, config = to_signal(batch.pictures, self.model.device), self.config
        codec = self.model.codec
        mean, logvar = codec.posterior(images)
        noise = rng.normal(self.seed, Stream.LATENT, 0, batch.slots, tuple(mean.shape[1:]))
        back = codec.pictures(mean + torch.exp(0.5 * logvar) * noise).float()
        mean, logvar = mean.float(), logvar.float()
        terms = {
            "pixels": (back - images).abs().mean(dim=(1, 2, 3)),
            "structure": pyramid_distance(back, images),
            "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)),
        }
        # The divergence counts a whole latent; a share of the picture's values keeps its weight
        # the same at every size.
        weights = {"structure": config.structure, "kl": config.kl / images[0].numel()}
        if self.critic is not None and step >= config.adversarial_from:
            terms |= self.critic.losses(back, images)
            weights |= {"fooling": config.adversarial}
        loss = torch.stack([weights.get(n, 1.0) * t for n, t in terms.items()]).sum(0)
        return LossOutput(loss, {name: term.detach().mean() for name, term in terms.items()})


# --- the text encoders -----------------------------------------------------------------------


@OBJECTIVES.register("clip")
class ClipObjective(Objective):
    """CLIP's objective (Radford et al. 2021): within a batch, which caption is whose picture.

    The text encoders learn; the picture encoder that they learn against is left behind.
    """

    config: ClipTrainConfig
    by_sample = False

    def __init__(self, model: Model, config: ClipTrainConfig):
        super().__init__(model, config)
        widths = [t.projection or t.width for t in model.preset.text]
        self.encoder = PictureEncoder(config.width, widths)
        self.encoder.init_weights(torch.Generator().manual_seed(config.seed))
        self.encoder.to(model.device)

    @staticmethod
    def learned_parts(preset: Preset) -> list[str]:
        return [f"text.{i}" for i in range(len(preset.text))]

    def helpers(self) -> dict[str, nn.Module]:
        return {"pictures": self.encoder}

    def losses(self, batch: Batch, step: int) -> LossOutput:
        assert batch.pictures is not None
        embedded = self.encoder(to_signal(batch.pictures, self.model.device))
        scale = self.encoder.scale()
        total, right = torch.zeros_like(batch.slots, dtype=torch.float32), []
        # The same caption twice in a batch is no mistake: both pictures are its.
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(batch.captions))}
        ids = on_device([numbers[c] for c in batch.captions], self.model.device)
        same = (ids[:, None] == ids[None]).float()
        wanted = same / same.sum(1, keepdim=True)
        for pictures, texts in zip(embedded, pooled_texts(self.model, batch.captions), strict=True):
            logits = scale * F.normalize(pictures, dim=1) @ F.normalize(texts.float(), dim=1).T
            total = total + F.cross_entropy(logits, wanted, reduction="none") / 2
            total = total + F.cross_entropy(logits.T, wanted, reduction="none") / 2
            best = logits.detach().argmax(1)
            right.append(same.gather(1, best[:, None]).mean())
        return LossOutput(total / len(right), {"right": torch.stack(right).mean()})
