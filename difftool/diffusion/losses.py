"""Training: the loss, when it looks (TIMES), how much each level counts (WEIGHTS), and what an
error costs (LOSSES). Torch-free at import: configuration is checked by these names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from difftool.diffusion.path import Level, Path
from difftool.diffusion.prediction import SIGMA_DATA, TARGETS
from difftool.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from difftool.diffusion.denoiser import Cond, Denoiser

Time = Callable[..., "Tensor"]
"""(path, u, **options) -> t [B]; u [B] uniform in (0, 1): randomness comes from outside."""
Weight = Callable[..., "Tensor"]
"""(alpha, sigma, target, **options) -> weight of the output's error; all [B,1,1,1]."""

Loss = Callable[..., "Tensor"]
"""(error, **options) -> what each error of the output costs; both [B,C,H,W]."""

TIMES: Registry[Time] = Registry("time distribution")
WEIGHTS: Registry[Weight] = Registry("loss weighting")
LOSSES: Registry[Loss] = Registry("loss")


def training_loss(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    *,
    times: Tensor,
    weight: Weight,
    eps: Tensor,
    loss: Loss | None = None,
) -> tuple[Tensor, Level]:
    """Loss of each sample [B], fp32: the weighted error of F, mean over C, H, W; and the level that
    each is noised to, its alpha and sigma [B,1,1,1].

    x0, eps: [B,C,H,W]. times: [B], from TIMES. loss: from LOSSES; None = mse.
    """
    alpha, sigma = denoiser.path.coefficients(times)
    level = Level(*cast(Any, (times, alpha, sigma)))
    p, q = TARGETS[denoiser.target](alpha, sigma)
    x0, eps = x0.float(), eps.float()
    error = denoiser(level.mix(x0, eps), level, cond) - (p * x0 + q * eps)
    cost = (loss or mse)(error)
    return (weight(alpha, sigma, denoiser.target) * cost).mean(dim=(1, 2, 3)), level


# --- what ------------------------------------------------------------------------------------


@LOSSES.register("mse")
def mse(error: Tensor) -> Tensor:
    """Squared."""
    return error**2


@LOSSES.register("huber")
def huber(error: Tensor, c: float = 0.1) -> Tensor:
    """Squared below c, absolute above it: the pseudo-Huber loss (2310.14189, eq. 7)."""
    return 2 * c * ((error**2 + c**2).sqrt() - c)


# --- when ------------------------------------------------------------------------------------


@TIMES.register("uniform")
def uniform(path: Path, u: Tensor) -> Tensor:
    """Evenly over the path: table indices, t of a flow (then shifted), log sigma of EDM."""
    return path.quantile(u)


@TIMES.register("logit_normal")
def logit_normal(path: Path, u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Mostly the middle of the path (SD3, 2403.03206, eq. 19)."""
    return path.quantile((mean + std * _normal_quantile(u)).sigmoid())


@TIMES.register("log_normal")
def log_normal(path: Path, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log(sigma / alpha) normal: EDM's P_mean and P_std (2206.00364, table 1)."""
    return path.nearest_time(mean + std * _normal_quantile(u))


def _normal_quantile(u: Tensor) -> Tensor:
    import torch

    return torch.special.ndtri(u)


# --- how much --------------------------------------------------------------------------------


@WEIGHTS.register("uniform")
def unweighted(alpha: Tensor, sigma: Tensor, target: str) -> Tensor:
    """Every error of the output alike."""
    return alpha.new_ones(alpha.shape)


def _on_x0(weight: Callable[..., Tensor]) -> Weight:
    """A weight of the x0 error, (SNR, **options) -> w, as one of the output's error.

    x0 = (q x_t - sigma F) / D, so that the error of x0 is |sigma / D| times that of F.
    """

    def of_output(alpha: Tensor, sigma: Tensor, target: str, **options: float) -> Tensor:
        alpha, sigma = alpha.clamp(min=1e-12), sigma.clamp(min=1e-12)  # the limits of 0 / 0
        p, q = TARGETS[target](alpha, sigma)
        return weight((alpha / sigma) ** 2, **options) * (sigma / (alpha * q - sigma * p)) ** 2

    return of_output


@_on_x0
def _min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    return snr.clamp(max=gamma)


@_on_x0
def _soft_min_snr(snr: Tensor, gamma: float = SIGMA_DATA**-2) -> Tensor:
    return snr / (1 + snr / gamma)


@_on_x0
def _edm(snr: Tensor) -> Tensor:
    return snr + SIGMA_DATA**-2


WEIGHTS.add("min_snr", _min_snr, about="by the SNR, at most gamma (Min-SNR, 2303.09556)")
WEIGHTS.add(
    *("soft_min_snr", _soft_min_snr), about="its smooth form (HDiT, 2401.11605, section 3.3)"
)
WEIGHTS.add("edm", _edm, about="lambda(sigma) of EDM (2206.00364, table 1)")
