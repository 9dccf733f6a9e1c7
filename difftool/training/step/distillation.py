"""Distillation: a student that needs few steps learns from a frozen teacher, or from the noise of
its own pictures. What a method is called is in loop.DISTILLATIONS; its mathematics in
diffusion/consistency.py; adversarial distillation in turbo.py.

What a teacher is guided by is learned with it, so that a student is sampled without guidance.
"""

from __future__ import annotations

import pathlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from difftool.adapters.lora.train import Adapters
from difftool.config.schema import Preset, TrainConfig
from difftool.data import Dataset
from difftool.diffusion.consistency import (
    Guided,
    LevelTable,
    consistency,
    ode_step,
    pseudo_huber,
    tuning_ratio,
)
from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Level
from difftool.errors import UsageError
from difftool.formats import open_model
from difftool.hub.find import find_model
from difftool.pipeline.condition import build_cond, encode_prompts, unwanted_cond
from difftool.pipeline.load import load_part_from
from difftool.pipeline.model import Model
from difftool.progress import Progress
from difftool.training.step import rng
from difftool.training.step.batches import Batch
from difftool.training.step.cache import Latents
from difftool.training.step.ema import Ema
from difftool.training.step.objectives import DenoisingObjective, LossOutput
from difftool.training.step.rng import Stream

ECT_STAGES = 8
"""In how many stages consistency tuning's steps shrink over a run (ECT, section 3.3)."""


class Pupil(NamedTuple):
    """What a step is about: pictures, and what student and teacher are told of them."""

    x0: Tensor
    cond: Cond
    """Of the student."""
    teacher: Guided


class Distillation(DenoisingObjective):
    """What all methods have in common."""

    teaches = True
    """Whether there is a teacher beside the student."""

    def __init__(self, model: Model, config: TrainConfig):
        """UsageError for a model that cannot be distilled so."""
        super().__init__(model, config)
        self.settings = config.distill
        if model.concat != "none":
            what = f"the model {model.name} cannot be distilled"
            raise UsageError(what, f"it goes by pictures ({model.concat}) that the data lacks")
        most = max(self.settings.guidance)
        if most > 1 and not model.guidable and not model.preset.unet.guidance_dim:
            why = "it has no prompts and no class that means none"
            hint = "--set train.distill.guidance=[1,1]"
            raise UsageError(f"the model {model.name} cannot be guided", why, hint)
        model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher, self.teacher_is_told = model.denoiser, bool(model.preset.unet.guidance_dim)
        if self.teaches and model.adapters is None:
            self.teacher, self.teacher_is_told = self._copy()

    def _copy(self) -> tuple[Denoiser, bool]:
        """The model that is distilled, frozen, and whether it is told the guidance scale; without
        weights where the student has none."""
        model, where = self.model, self.settings.teacher
        if where is None:
            raise UsageError("there is no model to distil", hint="give --from MODEL")
        source = open_model(find_model(where))
        if any(getattr(source.preset, k) != getattr(model.preset, k) for k in ("path", "target")):
            why = "its noise path or its prediction target is another"
            raise UsageError(f"{where} cannot teach the model {model.name}", why)
        teacher = Model(source.preset, source.tokenizer_json)
        teacher.device = model.device
        if not next(model.network.parameters()).is_meta:
            load_part_from(teacher, source, "unet")
        teacher.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return teacher.denoiser, bool(source.preset.unet.guidance_dim)

    @staticmethod
    def learned_parts(preset: Preset) -> list[str]:
        """The network alone: a text encoder that learned would tell the teacher other things."""
        return ["lora"] if preset.train.lora_rank else ["unet"]

    def precompute(self, dataset: Dataset, folder: pathlib.Path, progress: Progress) -> None:
        super().precompute(dataset, folder, progress)
        if any(text.tokenizer == "learned" for text in self.model.preset.text):
            self.embeddings = None  # small encoders, quicker than a file for each caption

    @contextmanager
    def asking(self, *, gradient: bool = False) -> Iterator[None]:
        """In the block the teacher is asked; gradient: of what it is asked about."""
        adapters, network = self.model.adapters, self.model.network
        without = adapters.off() if isinstance(adapters, Adapters) else nullcontext()
        with held_still(gradient=gradient), without:
            network.checkpoint(False)  # on the way back there are adapters again
            try:
                yield
            finally:
                network.checkpoint(self.config.checkpointing)

    # --- what is told --------------------------------------------------------------------

    def pupil(self, batch: Batch, latents: Latents | None) -> Pupil:
        """The pictures of a batch and what is told of them."""
        model, count = self.model, len(batch.slots)
        x0 = self._x0(batch, latents)
        size = (x0.shape[-1] * model.codec.factor, x0.shape[-2] * model.codec.factor)
        low, high = self.settings.guidance
        scale = low + (high - low) * rng.uniform(self.seed, Stream.GUIDANCE, 0, batch.slots)
        encode = self.embeddings or partial(encode_prompts, model)
        with torch.no_grad():
            cond = build_cond(model, encode(batch.captions), batch.labels, size)
            unwanted, nothing = None, [""] * count
            if high > 1 and not self.teacher_is_told:
                unwanted = unwanted_cond(model, encode(nothing), nothing, size)
        told = scale - 1  # LCM's w
        if model.preset.unet.guidance_dim:
            cond = cond._replace(guidance=told)
        wanted = cond._replace(guidance=told if self.teacher_is_told else None)
        unwanted = None if unwanted is None else unwanted._replace(guidance=None)
        return Pupil(x0, cond, Guided(self.teacher, wanted, unwanted, scale))

    def level(self, t: Tensor) -> Level:
        """The levels of times [B], as tensors [B,1,1,1]."""
        alpha, sigma = self.model.denoiser.path.coefficients(t)
        return Level(*cast("tuple[float, ...]", (t.float().view(-1, 1, 1, 1), alpha, sigma)))

    def ode_levels(self, steps: int) -> LevelTable:
        """The levels of so many steps on the teacher's ODE, the noisiest first."""
        most = self.settings.ode_steps
        levels = GRIDS["lcm"](self.model.denoiser.path, steps, original_steps=most)
        return LevelTable.of(levels, self.model.device)

    # --- losses --------------------------------------------------------------------------

    def agreement(
        self,
        levels: LevelTable,
        pupil: Pupil,
        u: Tensor,
        noise: Tensor,
        average: AbstractContextManager[object],
    ) -> tuple[Tensor, Level]:
        """The losses [B] of latent consistency distillation at those quantiles [B] of the levels,
        and the levels. average: within it the student has the weights that it is to agree with."""
        number = levels.number(u)
        here, there = levels.at(number), levels.at(number + 1)
        x = here.mix(pupil.x0, noise)
        with self.asking():
            x_s = ode_step(pupil.teacher, x, here, there)
        student = self.model.denoiser
        with held_still(), average:
            wanted = consistency(student, x_s, there, pupil.cond)
        return pseudo_huber(consistency(student, x, here, pupil.cond) - wanted), here

    def losses(self, batch: Batch, step: int) -> LossOutput:
        return self.taught(self.pupil(batch, self.latents), batch.slots, batch.times, step)

    def held_out(self, batch: Batch, latents: Latents | None = None) -> LossOutput:
        u = rng.spread(batch.slots).clamp(1e-4, 1 - 1e-4)
        return self.taught(self.pupil(batch, latents), batch.slots, u, -1)

    @abstractmethod
    def taught(self, pupil: Pupil, slots: Tensor, u: Tensor, step: int) -> LossOutput:
        """The losses at those quantiles [B] of the levels; step -1: of held-out pictures."""

    def noise(self, slots: Tensor, step: int, shape: Sequence[int]) -> Tensor:
        """What the pictures are mixed with."""
        stream = Stream.NOISE if step >= 0 else Stream.VALIDATION
        return rng.normal(self.seed, stream, 0, slots, tuple(shape[1:]))


def log_snr(level: Level) -> Tensor:
    """[B]."""
    return 2 * (cast(Tensor, level.alpha) / cast(Tensor, level.sigma)).log().flatten()


class LcmObjective(Distillation):
    """Latent consistency distillation (2310.04378), of pixels as well: the student's x0 from x_t is
    what its moving average makes of x_s, a step of the guided teacher's ODE further."""

    passes, copies = 6.0, 2

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__(model, config)
        self.levels = self.ode_levels(self.settings.ode_steps)
        decay = self.settings.target_ema
        named = ((prefix, part.named_parameters()) for prefix, part in self.trained().items())
        own = {f"{prefix}.{name}": p for prefix, parameters in named for name, p in parameters}
        self.target = Ema(own, {"target": lambda n: decay}) if decay else None

    def tensors(self) -> dict[str, Tensor]:
        return {f"target.{n}": t for n, t in self.target.average.items()} if self.target else {}

    def stepped(self) -> None:
        if self.target:
            self.target.update()

    def taught(self, pupil: Pupil, slots: Tensor, u: Tensor, step: int) -> LossOutput:
        # Held-out losses are of the averaged weights alone.
        average = self.target.swapped() if self.target and step >= 0 else nullcontext()
        noise = self.noise(slots, step, pupil.x0.shape)
        losses, here = self.agreement(self.levels, pupil, u, noise, average)
        return LossOutput(losses, {}, log_snr(here))


class EctObjective(Distillation):
    """Consistency tuning (ECT, 2406.14548): as LCM without a teacher, x_s mixed of the same picture
    and noise as x_t, and nearer to it from stage to stage."""

    passes, copies, teaches = 4.0, 0, False

    def taught(self, pupil: Pupil, slots: Tensor, u: Tensor, step: int) -> LossOutput:
        path, denoiser, steps = self.model.denoiser.path, self.model.denoiser, self.config.steps
        stage = ECT_STAGES - 1 if step < 0 else min(ECT_STAGES * step // (steps or 1), 7)
        t = self.times(u)
        alpha, sigma = path.coefficients(t)
        rho = (sigma / alpha).flatten()
        near = rho * tuning_ratio(rho, stage)
        s = path.nearest_time(near.log())
        if not path.continuous:  # another entry, or the first
            s = torch.minimum(s, t - 1).clamp(min=0)
        here, there = self.level(t), self.level(s)
        eps = self.noise(slots, step, pupil.x0.shape)
        with held_still():
            wanted = consistency(denoiser, there.mix(pupil.x0, eps), there, pupil.cond)
        error = consistency(denoiser, here.mix(pupil.x0, eps), here, pupil.cond) - wanted
        return LossOutput(pseudo_huber(error) / (rho - near), {}, log_snr(here))


@contextmanager
def held_still(*, gradient: bool = False) -> Iterator[None]:
    """In the block there are no gradients, unless wanted, and autocast keeps no weights that it has
    cast: those of the student's own pass must have theirs."""
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
