"""The two loops behind every sampler, and the fresh noise of their steps. Torch-free at import.

A step from the level `here` (alpha_t, sigma_t) to the level `there` (alpha_s, sigma_s) is

    x_s = alpha_s x0 + sqrt(sigma_s^2 - kappa^2) eps + kappa z

with fresh noise kappa z. The network's own x0 and eps make it exact to first order. Other methods
put a mean over the step, F*, for the network's output F, and take x0 and eps from that:

    Multistep   F* from a polynomial through the outputs of earlier steps, one evaluation a step
    TwoStage    F* from a second evaluation within the step

lam = log(alpha / sigma), rho = sigma / alpha, h is a step's length in lam. Coefficients are Python
floats, so that no step waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from difftool.diffusion.guidance import Denoise
from difftool.diffusion.path import Level, Path
from difftool.diffusion.prediction import TARGETS, Prediction, recover

if TYPE_CHECKING:
    from torch import Tensor

Noise = Callable[[Level, Level], "Tensor"]
"""Fresh unit noise [B,C,H,W] for a step between two levels."""


class Step(NamedTuple):
    """A step that is done."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    level: Level
    """The level arrived at."""
    x: Tensor
    """x_t at that level; [B,C,H,W]."""
    x0: Tensor
    """The clean image that the network saw where the step began; [B,C,H,W]."""


def transition(
    x0: Tensor, eps: Tensor, there: Level, kappa: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """x_t of the level `there`, whose noise is of deviation kappa fresh, z, and else eps."""
    x = there.alpha * x0 + _rest(there.sigma, kappa) * eps
    return x if z is None else x + kappa * z


def _rest(whole: float, part: float) -> float:
    """The other leg of a right triangle; 0 where rounding leaves none."""
    return math.sqrt(max(whole**2 - part**2, 0.0))


# --- kappa: the fresh noise of a step ---------------------------------------------------------

Kappa = Callable[[Path, Level, Level, float], float]
"""(path, here, there, eta) -> deviation of the fresh noise at `there`, at most sigma_s."""


def none(path: Path, here: Level, there: Level, eta: float) -> float:
    """The probability flow ODE: no fresh noise."""
    return 0.0


def posterior(path: Path, here: Level, there: Level, eta: float) -> float:
    """Deviation of q(x_s | x_t, x0), times eta (DDPM 2006.11239 eq. 7, DDIM 2010.02502 eq. 16)."""
    return min(there.sigma, eta * there.sigma * _forgotten(here, there, 2.0))


def reverse_sde(path: Path, here: Level, there: Level, eta: float) -> float:
    """The reverse SDE with its noise times eta, solved over the step (DPM-Solver++ 2211.01095)."""
    return there.sigma * _forgotten(here, there, 2.0 * eta)


def full(path: Path, here: Level, there: Level, eta: float) -> float:
    """Nothing but fresh noise: consistency models (2303.01469, algorithm 1), LCM (2310.04378)."""
    return there.sigma


def tcd(path: Path, here: Level, there: Level, eta: float) -> float:
    """Down to (1 - eta) t_s and up again to t_s; eta is gamma of TCD (2402.19159)."""
    t = (1 - eta) * there.t
    return _via(path.level(t if path.continuous else math.floor(t)).rho, there)


def rectified(path: Path, here: Level, there: Level, eta: float) -> float:
    """Ancestral steps of flows (ComfyUI, LTX-Video): down by eta (1 - t_s / t_t) of t_s more."""
    t = _flow_time(there) * (1 + eta * (_flow_time(there) / _flow_time(here) - 1))
    return _via(t / (1 - t), there)


def _forgotten(here: Level, there: Level, rate: float) -> float:
    """sqrt(1 - e^(-rate h)); 1 from alpha = 0, where h is infinite."""
    h = there.half_log_snr - here.half_log_snr
    return math.sqrt(-math.expm1(-rate * h)) if rate else 0.0


def _via(rho: float, there: Level) -> float:
    """The fresh noise of a step down to that rho, and from there up to `there`."""
    return _rest(there.sigma, there.alpha * rho) if rho < there.rho else 0.0


# --- the mean of a polynomial over a step -----------------------------------------------------


def _flow_time(level: Level) -> float:
    return level.sigma / (level.alpha + level.sigma)


# The time of DEIS (2204.13902): rho^2 = exp(A t^2 + B t) - 1, rho(1) = 80, rho(0.001) = 0.002.
_A = (math.log1p(0.002**2) - 1e-3 * math.log1p(80.0**2)) / (1e-6 - 1e-3)
_B = math.log1p(80.0**2) - _A


def _vp_time(rho: float) -> float:
    root = math.sqrt(_B**2 + 4 * _A * math.log1p(rho**2))
    return (root - _B) / (2 * _A)


CLOCKS: Mapping[str, Callable[[Level], float]] = {
    "lam": lambda level: level.half_log_snr,
    "log_sigma": lambda level: -math.log(level.sigma) if level.sigma else math.inf,
    "rho": lambda level: level.rho,
    "t": _flow_time,
    "vp": lambda level: _vp_time(level.rho),
}
"""What F may be a polynomial of; beside these, "index", the number of the step."""


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


def _vp_moments(u: float, u_next: float, n: int) -> list[float]:
    """Means of r^k, k < n, under the weight d(rho), r running in DEIS's time from u to u_next."""
    from numpy.polynomial.legendre import leggauss

    start, end = (math.sqrt(max(math.expm1(_A * t**2 + _B * t), 0.0)) for t in (u, u_next))
    nodes, weights = (column.tolist() for column in leggauss(40))
    rhos = [start + (node + 1) / 2 * (end - start) for node in nodes]
    shares = [(_vp_time(rho) - u) / (u_next - u) for rho in rhos]
    return [sum(w / 2 * r**k for w, r in zip(weights, shares, strict=True)) for k in range(n)]


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


# --- the loops --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A method with its options: (denoise, x, levels, noise) -> its steps, noisy to clean.

    x [B,C,H,W] lies at levels[0]. Noise is drawn only where some is added, in the published order.
    """

    path: Path
    """For levels that are not on the grid."""
    target: str = "x0"
    """Which F is averaged: a name from TARGETS."""
    fresh: Kappa = none
    eta: float = 1.0
    """Share of the fresh noise; 0 = none."""
    s_noise: float = 1.0
    """Factor on z."""
    s_churn: float = 0.0
    """Noise put back before the steps, in all (EDM 2206.00364, algorithm 2)."""
    s_tmin: float = 0.0
    """Lowest rho where it is."""
    s_tmax: float = math.inf
    """Highest rho where it is."""
    brownian: bool = False
    """Whether z is published as the increments of one Brownian path."""
    paste: Callable[[Tensor, Level], Tensor] | None = None
    """What becomes of x wherever it arrives: inpainting lays what is known over it."""

    @abstractmethod
    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]: ...

    def part_of(self, steps: int, *, last: bool = True) -> Sampler:
        """The same method for a part of a grid of `steps` steps, with its last step or without."""
        return self

    def _kappa(self, here: Level, there: Level) -> float:
        return self.fresh(self.path, here, there, self.eta) if there.sigma and self.eta else 0.0

    def _gain(self, here: Level, there: Level, kappa: float) -> float:
        return self.s_noise

    def _go(self, mean: Prediction, here: Level, there: Level, noise: Noise) -> Tensor:
        kappa = self._kappa(here, there)
        z = self._gain(here, there, kappa) * noise(here, there) if kappa else None
        return transition(*mean, there, kappa, z)

    def _pasted(self, x: Tensor, level: Level) -> Tensor:
        return x if self.paste is None else self.paste(x, level)

    def _churned(self, x: Tensor, here: Level, steps: int, noise: Noise) -> tuple[Tensor, Level]:
        """x and its level with noise put back."""
        within = self.s_tmin <= here.rho <= self.s_tmax and here.alpha > 0
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if within else 0.0
        if not gamma:
            return x, here
        up = self.path.at_half_log_snr(here.half_log_snr - math.log1p(gamma))
        kept = up.alpha / here.alpha
        added = _rest(up.sigma, kept * here.sigma)
        return kept * x + added * self.s_noise * noise(here, up), up

    def _output(self, seen: Prediction, level: Level) -> Tensor:
        p, q = TARGETS[self.target](level.alpha, level.sigma)
        return p * seen.x0 + q * seen.eps

    def _recovers(self, level: Level) -> bool:
        """Whether x and F give x0 and eps; from F = eps they do not where alpha = 0."""
        p, q = TARGETS[self.target](level.alpha, level.sigma)
        return level.alpha * q != level.sigma * p


class Node(NamedTuple):
    """An output, and the time by the clock when the network made it."""

    u: float
    F: Tensor


@dataclass(frozen=True, kw_only=True)
class Multistep(Sampler):
    """F* is the mean over the step of the polynomial through the last `order` outputs.

    In lam it is weighted as the linear part of the ODE or SDE asks, d(1 / rho) for x0 and d(rho)
    for eps, in other clocks evenly. A step that is infinite by the clock, out of alpha = 0 or into
    sigma = 0, is of first order.
    """

    order: int = 1
    clock: str = "lam"
    """What the polynomial is in: a name from CLOCKS, or "index"."""
    pair: str = "exact"
    """First moment of two nodes: exact, half (DPM-Solver's; UniPC's B2), or bh1 (UniPC's B1)."""
    third: float = 1.0
    """Factor on the second moment of three nodes; as DPM-Solver 3M is published, 1/2."""
    corrector: bool = False
    """Every step but the last is done again with the next output (UniC 2302.04867)."""
    corrector_off: Sequence[int] = ()
    """Numbers of the steps that are not."""
    taper: str = "never"
    """Whether the order falls to 1 towards the end: never, final (the last step only), always,
    or short (as always, if there are less than 15 steps)."""
    start: str = "euler"
    """The first step: euler, or heun, which takes one more evaluation (PNDM 2202.09778)."""
    variance: str = "small"
    """Noise added by DDPM: the posterior's (small), or that of q(x_t | x_s) (large)."""
    boundary: bool = False
    """Whether x0 meets LCM's boundary condition, on paths with a table."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        steps = len(levels) - 1
        indexed = self.clock == "index"
        u = [float(i) if indexed else CLOCKS[self.clock](level) for i, level in enumerate(levels)]
        history: list[Node] = []  # newest first
        redo: tuple[Tensor, list[Node]] | None = None  # where the last step began, what it used
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churned(x, here, steps, noise)
            seen = mean = self._bounded(denoise(x, here), x, here)
            node = Node(u[i], self._output(seen, here))
            if redo:
                before, used = redo
                F = self._mean([node, *used], u[i - 1], u[i])
                x = transition(*recover(before, F, levels[i - 1], self.target), here)
                mean = recover(x, node.F, here, self.target)

            used = [node]
            if math.isfinite(u[i + 1] - u[i]) and u[i + 1] != u[i]:
                used += history[: self._order(steps - i, steps) - 1]
            if any(math.isfinite(past.u) for past in used[1:]):
                mean = recover(x, self._mean(used, u[i], u[i + 1]), here, self.target)
            elif self.start == "heun" and i == 0 and there.sigma and self._recovers(here):
                ahead = denoise(transition(*seen, there), there)
                mean = recover(x, (node.F + self._output(ahead, there)) / 2, here, self.target)
            history = [node, *history][: self.order - 1]
            redo = (x, used) if self._corrects(i, here, u[i], u[i + 1]) else None
            x = self._pasted(self._go(mean, here, there, noise), there)
            yield Step(i, there, x, seen.x0)

    def part_of(self, steps: int, *, last: bool = True) -> Multistep:
        # Whether steps are few is meant of the whole grid, and so is its end.
        few = self.taper == "short" and steps < 15
        if last and (few or self.taper != "short"):
            return self
        return self if self.taper == "final" else replace(self, taper="never")

    def _order(self, left: int, steps: int) -> int:
        """The highest order of the step that is the last but left - 1."""
        falls = self.taper == "always" or (self.taper == "short" and steps < 15)
        final = self.taper == "final" and left == 1
        return min(self.order, left) if falls or final else self.order

    def _corrects(self, i: int, here: Level, u: float, u_next: float) -> bool:
        if not self.corrector or i in self.corrector_off or u_next in (u, math.inf):
            return False
        return self._recovers(here) and (math.isfinite(u) or self.pair != "bh1")

    def _mean(self, nodes: Sequence[Node], u: float, u_next: float) -> Tensor:
        """F* of the step from u to u_next, newest node first: at u, or, to correct, at u_next.

        A node that lies infinitely far back has no weight, which is the limit of the formulas.
        """
        corrects = nodes[0].u == u_next
        ends, past = nodes[: 1 + corrects], nodes[1 + corrects :]
        past = [node for node in past if math.isfinite(node.u)]
        r = [1.0, 0.0] if corrects else [0.0]
        r += [(node.u - u) / (u_next - u) for node in past]
        if self.clock == "vp":
            means = _vp_moments(u, u_next, len(r))
        else:
            H = self._growth * (u_next - u)
            means = moments(H, len(r))
            if len(nodes) == 2 and self.pair == "half":
                means[1] = 0.5
            if len(nodes) == 2 and self.pair == "bh1":
                means[1] = H / (-2 * math.expm1(-H))
        if len(r) == 3 and not corrects:
            means[2] *= self.third
        first, *others = zip(interpolation(r, means), [*ends, *past], strict=True)
        return sum((w * node.F for w, node in others), start=first[0] * first[1].F)

    @property
    def _growth(self) -> float:
        """Rate by the clock at which the weight in F* grows."""
        if self.clock not in ("lam", "log_sigma"):
            return 0.0
        if self.target == "eps":
            return -1.0
        return 1.0 + self.eta if self.fresh is reverse_sde else 1.0

    def _gain(self, here: Level, there: Level, kappa: float) -> float:
        if self.variance == "small":
            return self.s_noise
        return _rest(here.sigma, here.alpha / there.alpha * there.sigma) / kappa

    def _bounded(self, seen: Prediction, x: Tensor, here: Level) -> Prediction:
        """x0 = x_t at t = 0 (consistency models 2303.01469 eq. 5, with the scalings of LCM)."""
        if not self.boundary or self.path.continuous:
            return seen
        s = 10 * here.t
        mixed = s / math.hypot(s, 0.5) * seen.x0 + 0.25 / (s**2 + 0.25) * x
        return seen._replace(x0=mixed)


@dataclass(frozen=True, kw_only=True)
class TwoStage(Sampler):
    """F* = F + (F_mid - F) / (2 r), F_mid from a second evaluation at a share r of the step.

    It is of second order in the variable that the target is the velocity by: rho for eps, t for
    flow, 1 / rho for x0. A step without such a level, out of alpha = 0 or into sigma = 0, is of
    first order and takes one evaluation.
    """

    r: float = 0.5
    """Share in lam; 1 = the end of the step."""
    stage: str = "down"
    """The step to the second evaluation: down, without fresh noise, or fresh, with its own."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        steps = len(levels) - 1
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churned(x, here, steps, noise)
            seen = mean = denoise(x, here)
            if mid := self._mid(here, there):
                fresh = self.stage == "fresh"
                guess = self._go(seen, here, mid, noise) if fresh else transition(*seen, mid)
                guess = self._pasted(guess, mid)
                F, F_mid = self._output(seen, here), self._output(denoise(guess, mid), mid)
                mean = recover(x, F + (F_mid - F) / (2 * self.r), here, self.target)
            x = self._pasted(self._go(mean, here, there, noise), there)
            yield Step(i, there, x, seen.x0)

    def _mid(self, here: Level, there: Level) -> Level | None:
        """The level of the second evaluation; none where the step is of first order."""
        kappa = self._kappa(here, there) if self.stage == "down" else 0.0
        if not self._recovers(here) or not (old := _rest(there.sigma, kappa)):
            return None
        if self.r == 1 and not kappa:
            return there
        start, end = here.half_log_snr, math.log(there.alpha / old)
        lam = end if self.r == 1 else start + self.r * (end - start)
        return self.path.at_half_log_snr(lam) if math.isfinite(lam) else None
