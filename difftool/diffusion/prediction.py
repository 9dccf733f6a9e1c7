"""What a network outputs: F = p x0 + q eps. Torch-free.

One pair (p, q) is both the training target and, inverted, the sampling conversion:

    x_t = alpha x0 + sigma eps          x0  = (q x_t - sigma F) / D
    F   = p x0 + q eps                  eps = (alpha F - p x_t) / D          D = alpha q - sigma p

D is 0 only for eps where alpha = 0 and for x0 where sigma = 0. The half that the network outputs
itself is right even there; the other half does not exist, and comes out non-finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.errors import InputError
from difftool.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

SIGMA_DATA = 0.5
"""Standard deviation of x0 that EDM assumes."""


class Prediction(NamedTuple):
    """The clean image and the noise that a network sees in x_t; [B,C,H,W], fp32."""

    x0: Tensor
    eps: Tensor


def _edm(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """EDM (2206.00364, table 1), written homogeneously, so that it suits any path."""
    r = (sigma**2 + (alpha * SIGMA_DATA) ** 2) ** 0.5
    return sigma / (SIGMA_DATA * r), -alpha * SIGMA_DATA / r


def _unit_v(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """v normalised on a path that does not preserve variance, as CosXL's on EDM's path."""
    r = (alpha**2 + sigma**2) ** 0.5
    return -sigma / r, alpha / r


Target = Callable[[Any, Any], tuple[Any, Any]]
"""(alpha, sigma) -> (p, q); floats or tensors."""

TARGETS: Registry[Target] = Registry("prediction target")
TARGETS.add(
    *("eps", lambda alpha, sigma: (0.0, 1.0), "epsilon", "noise"), about="the noise eps (DDPM)"
)
TARGETS.add(
    *("x0", lambda alpha, sigma: (1.0, 0.0), "sample", "x_start"), about="the clean picture x0"
)
TARGETS.add(
    *("v", lambda alpha, sigma: (-sigma, alpha), "v_prediction", "velocity"),
    about="v = alpha eps - sigma x0 (2202.00512)",
)
TARGETS.add(
    *("flow", lambda alpha, sigma: (-1.0, 1.0), "flow_prediction", "rectified_flow"),
    about="eps - x0, the direction of a rectified flow (2209.03003)",
)
TARGETS.add("edm", _edm, about="EDM's F, of unit variance at every level (2206.00364)")
TARGETS.add("edm_v", _unit_v, about="v normalised on a path of growing variance (CosXL)")


def recover(x_t: Tensor, output: Tensor, level: Any, target: str) -> Prediction:
    """The x0 and eps behind a network's output F [B,C,H,W].

    level has alpha and sigma, floats or [B,1,1,1].
    """
    alpha, sigma = level.alpha, level.sigma
    p, q = TARGETS[target](alpha, sigma)
    det = alpha * q - sigma * p
    return Prediction(
        x0=output / p if _zero(q) else (q * x_t - sigma * output) / det,
        eps=output / q if _zero(p) else (alpha * output - p * x_t) / det,
    )


def _zero(number: Any) -> bool:
    return isinstance(number, float) and number == 0.0


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """F and, from a learned-variance network with twice the channels, its variance head."""
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    why = f"{output.shape[1]} channels for an x0 of {channels}"
    raise InputError("the network's output does not fit its input", why)
