"""Consistency models: from any level to x0 in one evaluation. Torch-free at import.

    f(x_t, t) = c_skip x_t + c_out x0(x_t, t)        x_t itself where t is the clean end
    loss      = h(f(x_t, t) - f'(x_s, s))            x_s on the same path of the ODE, f' held still

x_s comes from a step of a teacher's ODE (consistency distillation 2303.01469, LCM 2310.04378), or
from the x0 and eps that x_t is mixed of (consistency training, ECT 2406.14548).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from difftool.diffusion.path import Level
from difftool.diffusion.prediction import recover

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from difftool.diffusion.denoiser import Cond, Denoiser

SIGMA_DATA = 0.5
"""Of LCM's scalings."""
TIMESTEP_SCALING = 10.0
"""Factor on t in them."""
HUBER = 0.00054
"""Of the pseudo-Huber loss for each root of the count of values (2310.14189, section 3.3)."""
ECT_K, ECT_B = 8.0, 1.0
"""By how much low noise takes longer steps, and where it begins (ECT, section 3.2)."""


def boundary_scalings(t: Any, scaling: float = TIMESTEP_SCALING) -> tuple[Any, Any]:
    """c_skip and c_out of LCM at entries t of a table, floats or tensors: (1, 0) at t = 0
    (2303.01469 eq. 5)."""
    s = scaling * t
    square = s**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, s / square**0.5


class LevelTable(NamedTuple):
    """Levels by number as tensors [N]."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, levels: Sequence[Level], device: torch.device) -> LevelTable:
        import torch

        return cls(*(torch.tensor(v, device=device) for v in zip(*levels, strict=True)))

    def number(self, u: Tensor) -> Tensor:
        """Which level but the last each quantile [B] falls on."""
        count = len(self.t) - 1
        return (u * count).long().clamp(max=count - 1)

    def at(self, numbers: Tensor) -> Level:
        """The levels of those numbers [B], as tensors [B,1,1,1]."""
        return Level(*(cast(Any, v[numbers].view(-1, 1, 1, 1)) for v in self))


def consistency(denoiser: Denoiser, x: Tensor, level: Level, cond: Cond) -> Tensor:
    """f(x_t, t) [B,C,H,W], fp32; level of tensors [B,1,1,1]. On paths with a table by LCM's
    scalings, on others by x0 alone, which is x_t at sigma = 0 by itself."""
    path, clean = denoiser.path, cast("Tensor", level.sigma) == 0
    end = path.level(path.t_min)  # no network is asked about sigma = 0
    asked = Level(*(v.where(~clean, e) for v, e in zip(cast(Any, level), end, strict=True)))
    x0 = denoiser.predict(x, asked, cond).x0
    if not path.continuous:
        skip, out = boundary_scalings(asked.t)
        x0 = skip * x + out * x0
    return x.where(clean, x0)


class Guided(NamedTuple):
    """A frozen denoiser with a guidance scale for each sample."""

    denoiser: Denoiser
    wanted: Cond
    unwanted: Cond | None = None
    """What is guided away from; None = nothing is."""
    scale: Tensor | None = None
    """[B]."""

    def __call__(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x0 and eps at that level, of tensors [B,1,1,1]."""
        output = self.denoiser(x, level, self.wanted)
        if self.unwanted is not None and self.scale is not None:
            other = self.denoiser(x, level, self.unwanted)
            output = other + self.scale.view(-1, 1, 1, 1) * (output - other)
        return recover(x.float(), output, level, self.denoiser.target)


def ode_step(predict: Callable[[Tensor, Level], tuple[Tensor, Tensor]], x: Tensor, here: Level,
             there: Level) -> Tensor:  # fmt: skip
    """x_s of the probability flow ODE from x_t, to first order: a step of DDIM (2010.02502)."""
    return there.mix(*predict(x, here))


def pseudo_huber(error: Tensor) -> Tensor:
    """sqrt(|error|^2 + c^2) - c of each sample [B], c by the count of its values, over that
    count's root, so that it costs the same at every size (2310.14189, eq. 7)."""
    root = error[0].numel() ** 0.5
    c = HUBER * root
    return ((error.square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c) / root


def tuning_ratio(rho: Tensor, stage: int, q: float = 2.0) -> Tensor:
    """rho_s / rho_t of consistency tuning (ECT, section 3.2): 1 - n(rho) / q^stage, n = 1 + k
    sigmoid(-b rho); at stage 0 x_s is x0 itself, and steps shrink from stage to stage."""
    n = 1 + ECT_K * (-ECT_B * rho).sigmoid()
    return (1 - n / q ** (stage + 1)).clamp(min=0.0)
