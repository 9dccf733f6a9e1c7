"""Means of a polynomial over a step, in a time of its own: they weight what Multistep remembers.

lam = log(alpha / sigma), rho = sigma / alpha. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from difftool.diffusion.path import Level


def flow_time(level: Level) -> float:
    """t of a rectified flow with the level's signal-to-noise ratio, 0 to 1."""
    return level.sigma / (level.alpha + level.sigma)


# The time of DEIS (2204.13902): rho^2 = exp(A t^2 + B t) - 1, rho(1) = 80, rho(0.001) = 0.002.
_A = (math.log1p(0.002**2) - 1e-3 * math.log1p(80.0**2)) / (1e-6 - 1e-3)
_B = math.log1p(80.0**2) - _A


def _vp_time(rho: float) -> float:
    root = math.sqrt(_B**2 + 4 * _A * math.log1p(rho**2))
    return (root - _B) / (2 * _A)


def moments(H: float, n: int) -> list[float]:
    """Means of r^k, k < n, over r in (0, 1) under the weight e^(H r)."""
    if H == math.inf:
        return [1.0] * n
    if abs(H) < 0.5:  # where the recursion cancels; 18 terms leave nothing of a double
        integrals = [
            sum((-H) ** i * math.factorial(k) / math.factorial(i + k + 1) for i in range(18))
            for k in range(n)
        ]
    else:
        integrals = [-math.expm1(-H) / H]
        for k in range(1, n):
            integrals.append((1 - k * integrals[-1]) / H)
    return [integral / integrals[0] for integral in integrals]


class Clock:
    """What F may be a polynomial of: a time of its own, and the means of that time's powers.

    In log SNR the weight in F* grows exponentially; by other clocks a step is weighted evenly.
    """

    def __init__(self, time: Callable[[Level], float], exponential: bool = False):
        self._time, self._exponential = time, exponential

    def time(self, level: Level, index: int) -> float:
        """The time of a level, the index-th of a grid."""
        return self._time(level)

    def moments(self, u: float, u_next: float, n: int, rate: float) -> list[float]:
        """Means of r^k, k < n, over a step, in which r goes from 0 to 1; its weight grows by
        e^(rate du)."""
        return moments(rate * (u_next - u) if self._exponential else 0.0, n)


class IndexClock(Clock):
    """The number of the step."""

    def time(self, level: Level, index: int) -> float:
        return float(index)


class DeisClock(Clock):
    """The time of DEIS, in which the weight is d(rho)."""

    def moments(self, u: float, u_next: float, n: int, rate: float) -> list[float]:
        from numpy.polynomial.legendre import leggauss

        start, end = (math.sqrt(max(math.expm1(_A * t**2 + _B * t), 0.0)) for t in (u, u_next))
        nodes, weights = (column.tolist() for column in leggauss(40))
        rhos = [start + (node + 1) / 2 * (end - start) for node in nodes]
        shares = [(_vp_time(rho) - u) / (u_next - u) for rho in rhos]
        return [sum(w / 2 * r**k for w, r in zip(weights, shares, strict=True)) for k in range(n)]


CLOCKS: Mapping[str, Clock] = {
    "lam": Clock(lambda level: level.half_log_snr, exponential=True),
    "log_sigma": Clock(
        lambda level: -math.log(level.sigma) if level.sigma else math.inf, exponential=True
    ),
    "rho": Clock(lambda level: level.rho),
    "t": Clock(flow_time),
    "vp": DeisClock(lambda level: _vp_time(level.rho)),
    "index": IndexClock(lambda level: level.t),
}


def interpolation(nodes: Sequence[float], means: Sequence[float]) -> list[float]:
    """Weights w with sum_j w_j r_j^k = means[k]: the mean of the polynomial through the nodes."""
    weights = []
    for j, r in enumerate(nodes):
        basis = [1.0]  # coefficients, lowest first, of the polynomial that is 1 at r alone
        for other in (*nodes[:j], *nodes[j + 1 :]):
            raised, lowered = [0.0, *basis], [*basis, 0.0]
            basis = [(a - other * b) / (r - other) for a, b in zip(raised, lowered, strict=True)]
        weights.append(sum(c * mean for c, mean in zip(basis, means, strict=True)))
    return weights
