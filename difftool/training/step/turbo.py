"""Adversarial distillation (ADD 2311.17042; in latents LADD 2403.12015): the student draws in one
evaluation what small heads on the frozen teacher's features cannot tell from pictures.

It begins as a consistency model (LCM), as do students of Hyper-SD (2404.13686), CTM (2310.02279):
a teacher's single step is the mean of all pictures, from which there is no way but to the likeliest
one. A consistency model's step has decided already, by the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.schema import TrainConfig
from difftool.diffusion.losses import TIMES
from difftool.diffusion.path import Level
from difftool.pipeline.model import Model
from difftool.training.step import rng
from difftool.training.step.distillation import Distillation, Pupil, log_snr
from difftool.training.step.objectives import LossOutput
from difftool.training.step.perception import init
from difftool.training.step.rng import Stream

HEAD_WIDTH = 128
"""Channels of a head, at most."""


class Head(nn.Module):
    """One opinion [B,1,h,w] for each place of a feature map [B,C,h,w]."""

    def __init__(self, width: int):
        super().__init__()
        inner = min(width, HEAD_WIDTH)
        self.norm = nn.GroupNorm(1, width, affine=False)  # features of a level are of any size
        self.conv_in = nn.Conv2d(width, inner, 1)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv_out = nn.Conv2d(inner, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(self.norm(x)), 0.2)
        return self.conv_out(F.leaky_relu(self.conv(x), 0.2))


class Heads(nn.Module):
    """A head for each of a network's features, with hinge losses (Lim and Ye 2017)."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.heads = nn.ModuleList(Head(width) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The opinions [B,N]: above 1 they are sure of a picture, below -1 of a student's."""
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(feature.float()).flatten(1) for head, feature in pairs], dim=1)

    def losses(self, made: Sequence[Tensor], real: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Their own loss and the student's, each [B]: one backward pass serves both, because each
        reaches only the weights of its own side."""
        own = F.relu(1 - self(real)) + F.relu(1 + self([feature.detach() for feature in made]))
        still = {name: p.detach() for name, p in self.named_parameters()}
        fooling = -cast(Tensor, torch.func.functional_call(self, still, (made,)))
        return own.mean(dim=1), fooling.mean(dim=1)


class TurboObjective(Distillation):
    """The student's x0 from the levels that it is sampled at: a picture to the heads, and one that
    its teacher, shown it under noise again, leaves as it is."""

    passes, copies = 8.0, 1

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__(model, config)
        settings = self.settings
        self.levels = self.ode_levels(min(settings.student_steps, settings.ode_steps))
        self.ode, self.first = self.ode_levels(settings.ode_steps), settings.consistency
        self.heads = Heads(model.network.feature_widths)
        init(self.heads, torch.Generator().manual_seed(config.seed))
        self.heads.to(model.device)

    def helpers(self) -> dict[str, nn.Module]:
        return {"heads": self.heads}

    def helper_optimizer(self) -> torch.optim.Optimizer:
        """Adam without a memory of the direction: the student moves away under them."""
        lr = self.settings.head_lr
        return torch.optim.AdamW(self.heads.parameters(), lr, betas=(0.0, 0.99), weight_decay=0.0)

    def taught(self, pupil: Pupil, slots: Tensor, u: Tensor, step: int) -> LossOutput:
        settings, x0 = self.settings, pupil.x0
        if 0 <= step < self.first * (self.config.steps or 1):
            noise = self.noise(slots, step, x0.shape)
            losses, here = self.agreement(self.ode, pupil, u, noise, nullcontext())
            return LossOutput(losses, {"consistency": losses.detach().mean()}, log_snr(here))
        here = self.levels.at(self.levels.number(u))
        x = here.mix(x0, self.noise(slots, step, x0.shape))
        made = self.model.denoiser.predict(x, here, pupil.cond).x0
        level, eps = self._judged(slots, x0)
        with self.asking():
            again, _ = pupil.teacher(level.mix(made.detach(), eps), level)
        terms = {"matching": (level.alpha * (made - again) ** 2).mean(dim=(1, 2, 3))}
        if step >= 0 and settings.adversarial:
            told = pupil.teacher.wanted
            with self.asking(gradient=True):
                seen = self.teacher.features(level.mix(made, eps), level, told)
            with self.asking():
                real = self.teacher.features(level.mix(x0, eps), level, told)
            terms["heads"], terms["fooling"] = self.heads.losses(seen, real)
        weights = {"matching": settings.matching, "fooling": settings.adversarial}
        loss = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum(0)
        measured = {name: term.detach().mean() for name, term in terms.items()}
        return LossOutput(loss, measured, log_snr(here))

    def _judged(self, slots: Tensor, x0: Tensor) -> tuple[Level, Tensor]:
        """The level and the noise under which pictures are judged."""
        u = rng.uniform(self.seed, Stream.JUDGED_TIME, 0, slots)
        level = self.level(TIMES["logit_normal"](self.model.denoiser.path, u))
        return level, rng.normal(self.seed, Stream.JUDGED_NOISE, 0, slots, tuple(x0.shape[1:]))
