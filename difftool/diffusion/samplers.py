"""Samplers: from noise to an image, level by level. Torch-free at import.

Each step from `here` to `there` is one transition,

    x_s = alpha_s x0 + sqrt(sigma_s^2 - kappa^2) eps + kappa z

with kappa the fresh noise. The network's own x0 and eps make the step exact to first order; the
others put a better mean F* of what the network would say over the step in their place:

    Multistep   F* from a polynomial through the outputs of earlier steps, one evaluation a step
    TwoStage    F* from a second evaluation within the step

A method is a row of SAMPLERS: one of the two loops and its numbers. h is the step in
lam = log(alpha / sigma), rho = sigma / alpha. Coefficients are Python floats, so a step costs no
synchronisation with the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.guidance import Denoise
from difftool.diffusion.path import Level, Path
from difftool.diffusion.prediction import TARGETS, Prediction, recover
from difftool.errors import UsageError, suggestion
from difftool.registry import Registry, canonical

if TYPE_CHECKING:
    from torch import Tensor

Noise = Callable[[Level, Level], "Tensor"]
"""Fresh unit noise [B,C,H,W] for a step between two levels."""


class Step(NamedTuple):
    """One step done."""

    index: int
    level: Level
    """The level arrived at."""
    x: Tensor
    """x_t at that level; [B,C,H,W]."""
    x0: Tensor
    """The clean image that the network saw where the step began."""


def transition(
    x0: Tensor, eps: Tensor, there: Level, kappa: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """x_t of the level `there`, of whose noise a part of deviation kappa is fresh: z."""
    old = math.sqrt(max(there.sigma**2 - kappa**2, 0.0))
    x = there.alpha * x0 + old * eps
    return x if z is None else x + kappa * z


# --- kappa: the fresh noise of a step ---------------------------------------------------------

Kappa = Callable[[Path, Level, Level, float], float]
"""(path, here, there, eta) -> deviation of the fresh noise in x at `there`."""


def none(path: Path, here: Level, there: Level, eta: float) -> float:
    """No fresh noise: the probability flow ODE."""
    return 0.0


def posterior(path: Path, here: Level, there: Level, eta: float) -> float:
    """Deviation of q(x_s | x_t, x0), times eta (DDPM 2006.11239 eq. 7, DDIM 2010.02502 eq. 16)."""
    return min(there.sigma, eta * there.sigma * _lost(here, there, 2.0))


def reverse_sde(path: Path, here: Level, there: Level, eta: float) -> float:
    """The reverse SDE with its noise times eta, solved over the step (DPM-Solver++ 2211.01095)."""
    return there.sigma * _lost(here, there, 2.0 * eta)


def full(path: Path, here: Level, there: Level, eta: float) -> float:
    """All of the noise: consistency models (2303.01469, algorithm 1), LCM (2310.04378)."""
    return there.sigma


def tcd(path: Path, here: Level, there: Level, eta: float) -> float:
    """Down to (1 - eta) t, and back up to t (TCD 2402.19159, whose gamma is eta)."""
    t = (1 - eta) * there.t
    return _via(path.level(t if path.continuous else math.floor(t)).rho, there)


def rectified(path: Path, here: Level, there: Level, eta: float) -> float:
    """Ancestral steps of rectified flows (LTX-Video, ComfyUI): below t_s by eta (1 - t_s / t_t)."""
    t = _flow_time(there) * (1 + eta * (_flow_time(there) / _flow_time(here) - 1))
    return _via(t / (1 - t), there)


def _lost(here: Level, there: Level, rate: float) -> float:
    """sqrt(1 - e^(-rate h)); 1 from alpha = 0, where h is infinite."""
    h = there.half_log_snr - here.half_log_snr
    return math.sqrt(max(-math.expm1(-rate * h), 0.0)) if rate else 0.0


def _via(rho: float, there: Level) -> float:
    """Fresh noise of a step that drops to a level of that rho and is noised again up to `there`."""
    return math.sqrt(max(there.sigma**2 - (there.alpha * rho) ** 2, 0.0))


# --- clocks: what F is a polynomial of --------------------------------------------------------


def _flow_time(level: Level) -> float:
    return level.sigma / (level.alpha + level.sigma)


# DEIS's own time (2204.13902): rho^2 = exp(a t^2 + b t) - 1 with rho(1) = 80, rho(0.001) = 0.002.
_LO, _HI = math.log1p(0.002**2), math.log1p(80.0**2)
_A = (_LO - 1e-3 * _HI) / (1e-6 - 1e-3)
_B = _HI - _A


def _vp_time(rho: float) -> float:
    if rho == math.inf:
        return rho
    return (math.sqrt(_B**2 + 4 * _A * math.log1p(rho**2)) - _B) / (2 * _A)


CLOCKS: Mapping[str, Callable[[Level], float]] = {
    "lam": lambda level: level.half_log_snr,
    "log_sigma": lambda level: -math.log(level.sigma) if level.sigma else math.inf,
    "rho": lambda level: level.rho,
    "t": _flow_time,
    "vp": lambda level: _vp_time(level.rho),
}
"""Beside these, "index": the number of the step."""


def moments(H: float, n: int) -> list[float]:
    """Means of s^k, k < n, over s in (0, 1) under the weight exp(H s)."""
    if H == math.inf:
        return [1.0] * n
    if abs(H) < 0.5:  # the recursion cancels here, the series is exact in 18 terms
        terms = range(18)
        integrals = [
            math.factorial(k) * sum((-H) ** i / math.factorial(i + k + 1) for i in terms)
            for k in range(n)
        ]
    else:
        integrals = [-math.expm1(-H) / H]
        for k in range(1, n):
            integrals.append((1 - k * integrals[-1]) / H)
    return [integral / integrals[0] for integral in integrals]


def _vp_moments(here: Level, there: Level, n: int) -> list[float]:
    """Means of r^k over a step in rho, where r is the share of the step done in DEIS's time."""
    from numpy.polynomial.legendre import leggauss

    start, end = _vp_time(here.rho), _vp_time(there.rho)
    means = [0.0] * n
    for node, weight in zip(*(column.tolist() for column in leggauss(40)), strict=True):
        rho = here.rho + (node + 1) / 2 * (there.rho - here.rho)
        r = (_vp_time(rho) - start) / (end - start)
        means = [mean + weight / 2 * r**k for k, mean in enumerate(means)]
    return means


def interpolation(nodes: Sequence[float], means: Sequence[float]) -> list[float]:
    """Weights w with sum_j w_j r_j^k = means[k]: the mean of the polynomial through the nodes."""
    weights = []
    for j, r in enumerate(nodes):
        basis = [1.0]  # coefficients of the Lagrange polynomial of node j, lowest first
        for other in (*nodes[:j], *nodes[j + 1 :]):
            shifted, scale = [0.0, *basis], 1 / (r - other)
            basis = [scale * (a - other * b) for a, b in zip(shifted, [*basis, 0.0], strict=True)]
        weights.append(sum(c * mean for c, mean in zip(basis, means, strict=True)))
    return weights


# --- the loops --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """(denoise, x, levels, noise) -> steps, noisy to clean.

    x [B,C,H,W] lies at levels[0]. Noise is drawn only for steps that have some, in the order of
    the published method.
    """

    path: Path
    """For levels off the grid."""
    target: str = "x0"
    """Which output F is averaged over a step, a name from TARGETS."""
    fresh: Kappa = none
    eta: float = 1.0
    """Share of the fresh noise; 0 = deterministic."""
    s_noise: float = 1.0
    """Factor on all fresh noise."""
    s_churn: float = 0.0
    """Noise put back before each step, spread over all steps (EDM 2206.00364, algorithm 2)."""
    s_tmin: float = 0.0
    """Lowest rho with churn."""
    s_tmax: float = math.inf
    """Highest rho with churn."""
    brownian: bool = False
    """Whether the published noise is the increments of one Brownian path."""

    @abstractmethod
    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]: ...

    def _kappa(self, here: Level, there: Level) -> float:
        return self.fresh(self.path, here, there, self.eta) if there.sigma else 0.0

    def _go(self, mean: Prediction, here: Level, there: Level, noise: Noise) -> Tensor:
        kappa = self._kappa(here, there)
        z = self._gain(here, there, kappa) * noise(here, there) if kappa else None
        return transition(mean.x0, mean.eps, there, kappa, z)

    def _gain(self, here: Level, there: Level, kappa: float) -> float:
        return self.s_noise

    def _churned(self, x: Tensor, here: Level, steps: int, noise: Noise) -> tuple[Tensor, Level]:
        """x with noise put back, and its level."""
        churn = self.s_churn if self.s_tmin <= here.rho <= self.s_tmax and here.alpha else 0.0
        gamma = min(churn / steps, math.sqrt(2) - 1)
        if not gamma:
            return x, here
        up = self.path.at_half_log_snr(here.half_log_snr - math.log1p(gamma))
        a = up.alpha / here.alpha
        added = math.sqrt(up.sigma**2 - (a * here.sigma) ** 2)
        return a * x + added * self.s_noise * noise(here, up), up

    def _output(self, prediction: Prediction, level: Level) -> Tensor:
        p, q = TARGETS[self.target](level.alpha, level.sigma)
        return p * prediction.x0 + q * prediction.eps

    def _recovers(self, level: Level) -> bool:
        """Whether x and F determine x0 and eps; not eps at alpha = 0, nor x0 at sigma = 0."""
        p, q = TARGETS[self.target](level.alpha, level.sigma)
        return level.alpha * q != level.sigma * p


class Node(NamedTuple):
    """An output F and when it was made."""

    u: float
    F: Tensor


@dataclass(frozen=True, kw_only=True)
class Multistep(Sampler):
    """F* is the mean over the step of the polynomial through the last `order` outputs.

    The mean is exact for the linear part of the ODE or SDE: x0 is weighted with d(1 / rho), eps
    with d(rho), and what runs in other clocks evenly. Steps whose length is infinite in the clock,
    out of alpha = 0 or into sigma = 0, are of first order.
    """

    order: int = 1
    clock: str = "lam"
    """What the polynomial is in: a name from CLOCKS, or "index"."""
    pair: str = "exact"
    """First moment with two nodes: exact, half (DPM-Solver's, UniPC's B2), bh1 (UniPC's B1)."""
    third: float = 1.0
    """Factor on the second moment with three nodes; the published DPM-Solver(++) 3M has 1/2."""
    corrector: bool = False
    """Each step is done again with the next output (UniC 2302.04867), at no evaluation."""
    corrector_off: Sequence[int] = ()
    """Steps that are not done again."""
    taper: str = "never"
    """The order falls to 1 towards the end: never, in the last step only (final), always, or
    always with less than 15 steps (short)."""
    start: str = "euler"
    """First step: euler, or heun, which costs one more evaluation (PLMS 2202.09778)."""
    variance: str = "small"
    """Noise of DDPM: that of the posterior (small), or of q(x_t | x_s) (large)."""
    boundary: bool = False
    """On table paths, x0 is mixed with x_t as LCM's boundary condition asks."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        steps, u = len(levels) - 1, self._times(levels)
        history: list[Node] = []  # newest first
        redo: tuple[Tensor, list[Node]] | None = None  # start and nodes of the step to correct
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churned(x, here, steps, noise)
            seen = mean = self._bounded(denoise(x, here), x, here)
            node = Node(u[i], self._output(seen, here))
            if redo:
                before, nodes = redo
                F = self._mean([node, *nodes], levels[i - 1], here, u[i - 1], u[i])
                corrected = recover(before, F, levels[i - 1], self.target)
                x = transition(corrected.x0, corrected.eps, here)
                mean = recover(x, node.F, here, self.target)

            recent = [n for n in history if math.isfinite(n.u)][: self._order(steps - i, steps) - 1]
            regular = math.isfinite(u[i + 1] - u[i]) and u[i + 1] != u[i]
            nodes = [node, *recent] if regular else [node]
            heun = self.start == "heun" and i == 0 and there.sigma > 0 and self._recovers(here)
            if len(nodes) > 1:
                F = self._mean(nodes, here, there, u[i], u[i + 1])
                mean = recover(x, F, here, self.target)
            elif heun:
                ahead = denoise(transition(seen.x0, seen.eps, there), there)
                F = (node.F + self._output(ahead, there)) / 2
                mean = recover(x, F, here, self.target)
            history = [node, *history][: self.order - 1]
            redo = (x, nodes) if self._corrects(i, here, u[i], u[i + 1]) else None
            x = self._go(mean, here, there, noise)
            yield Step(i, there, x, seen.x0)

    def _times(self, levels: Sequence[Level]) -> list[float]:
        if self.clock == "index":
            return [float(i) for i in range(len(levels))]
        return [CLOCKS[self.clock](level) for level in levels]

    def _order(self, left: int, steps: int) -> int:
        """The highest order of a step after which `left` - 1 follow."""
        if self.taper == "always" or (self.taper == "short" and steps < 15):
            return min(self.order, left)
        return 1 if self.taper == "final" and left == 1 else self.order

    def _corrects(self, i: int, here: Level, u: float, u_next: float) -> bool:
        if not self.corrector or i in self.corrector_off or u == u_next or u_next == math.inf:
            return False
        return self._recovers(here) and (self.pair != "bh1" or math.isfinite(u))

    def _mean(
        self, nodes: Sequence[Node], here: Level, there: Level, u: float, u_next: float
    ) -> Tensor:
        """F* of the step from u to u_next."""
        ahead = nodes[0].u == u_next  # a corrector; 0 and 1 also where u is infinite
        r = [1.0] if ahead else []
        r += [0.0, *((n.u - u) / (u_next - u) for n in nodes[len(r) + 1 :])]
        if self.clock == "vp":
            means = _vp_moments(here, there, len(r))
        else:
            H = self._growth * (u_next - u)
            means = moments(H, len(r))
            if len(r) == 2 and self.pair != "exact":
                means[1] = 0.5 if self.pair == "half" or not H else H / (-2 * math.expm1(-H))
        if len(r) == 3 and not ahead:
            means[2] *= self.third
        weights = interpolation(r, means)
        F = weights[0] * nodes[0].F
        for weight, n in zip(weights[1:], nodes[1:], strict=True):
            F = F + weight * n.F
        return F

    @property
    def _growth(self) -> float:
        """Rate, in the clock, of the weight that F is averaged with."""
        if self.clock not in ("lam", "log_sigma"):
            return 0.0
        if self.target == "eps":
            return -1.0
        return 1.0 + self.eta if self.fresh is reverse_sde else 1.0

    def _gain(self, here: Level, there: Level, kappa: float) -> float:
        if self.variance == "small":
            return self.s_noise
        return math.sqrt(here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2) / kappa

    def _bounded(self, seen: Prediction, x: Tensor, here: Level) -> Prediction:
        """LCM's boundary condition: x0 = x_t where t = 0."""
        if not self.boundary or self.path.continuous:
            return seen
        s = 10 * here.t
        x0 = s / math.hypot(s, 0.5) * seen.x0 + 0.25 / (s**2 + 0.25) * x
        return seen._replace(x0=x0)


@dataclass(frozen=True, kw_only=True)
class TwoStage(Sampler):
    """F* from a second evaluation at a share r of the step: F + (F_mid - F) / (2 r).

    It is of second order in the variable whose velocity the target is: rho for eps, t for flow,
    1 / rho for x0. Steps for which there is no such level, out of alpha = 0 or into sigma = 0, are
    of first order and have one evaluation.
    """

    r: float = 0.5
    """Where in the step, in lam, the second evaluation is made."""
    stage: str = "down"
    """The first stage: down to what the step leaves of the old noise, or with fresh noise too."""

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
                F, F_mid = self._output(seen, here), self._output(denoise(guess, mid), mid)
                mean = recover(x, F + (F_mid - F) / (2 * self.r), here, self.target)
            x = self._go(mean, here, there, noise)
            yield Step(i, there, x, seen.x0)

    def _mid(self, here: Level, there: Level) -> Level | None:
        """The level of the second evaluation."""
        kappa = self._kappa(here, there) if self.stage == "down" else 0.0
        left = math.sqrt(max(there.sigma**2 - kappa**2, 0.0))  # of the old noise
        if not left or not self._recovers(here):
            return None
        if self.r == 1 and not kappa:
            return there
        start, end = here.half_log_snr, math.log(there.alpha / left)
        lam = start + self.r * (end - start) if self.r < 1 else end
        return self.path.at_half_log_snr(lam) if math.isfinite(lam) else None


# --- the rows ---------------------------------------------------------------------------------


class Range(NamedTuple):
    """Numbers that an option may be."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" if self.high < math.inf else f"{self.low:g} or more"


class Numbers(NamedTuple):
    """Lists of step numbers that an option may be."""

    def __str__(self) -> str:
        return "a list of step numbers, the first is 0"


Allowed = tuple[Any, ...] | Range | Numbers | Mapping[str, Mapping[str, Any]]
"""What an option may be: one of some values, or one of some names for values of several fields."""


@dataclass(frozen=True)
class Method:
    """A row of SAMPLERS: called with a path and options, it makes the sampler."""

    name: str
    about: str
    loop: type[Sampler]
    numbers: Mapping[str, Any]
    """Fields of the loop that are not at their defaults."""
    allowed: Mapping[str, Allowed]
    """The options: fields of the loop, or names for values of several."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        return {name: self._default(name) for name in self.allowed}

    def _default(self, name: str) -> Any:
        allowed = self.allowed[name]
        if isinstance(allowed, Mapping):
            return next(k for k, v in allowed.items() if v.items() <= self.numbers.items())
        return self.numbers.get(name, getattr(self.loop, name))

    def __call__(self, path: Path, **options: Any) -> Sampler:
        numbers = dict(self.numbers)
        for name, value in options.items():
            numbers |= self._fields(name, value)
        return self.loop(path=path, **numbers)

    def _fields(self, name: str, value: Any) -> Mapping[str, Any]:
        """The fields that an option sets; UsageError if it cannot be."""
        what = f'sampler "{self.name}"'
        refuse(f"{self.name} {name} {value}")
        if name not in self.allowed:
            hint = suggestion(name, self.allowed) if self.allowed else f"{what} has no options"
            raise UsageError(f'{what} has no option "{name}"', hint=hint)
        allowed = self.allowed[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(allowed, Range):
            if number and allowed.low <= value <= allowed.high:
                return {name: value}
            hint = f"give a number, {allowed}"
        elif isinstance(allowed, Numbers):
            if isinstance(value, list | tuple) and all(type(i) is int and i >= 0 for i in value):
                return {name: tuple(value)}
            hint = f"give {allowed}"
        else:
            known = {str(v).lower(): v for v in allowed}
            found = known.get(f"{value:g}" if number else str(value).lower())
            if found is not None:
                return allowed[found] if isinstance(allowed, Mapping) else {name: found}
            hint = suggestion(str(value), known)
        raise UsageError(f"{what} has a wrong option", f"{name} = {value!r}", hint)


REFUSED = {
    "ipndm_v": "its orders 3 and 4 are published with a misplaced bracket; lms is that method",
    "sde-dpmsolver": "as published it does not preserve the variance; use sde-dpmsolver++",
    "dpmpp_2m_sde order 3": "published with a wrong sign in diffusers; dpmpp_3m_sde is that method",
}
"""Published methods that do not do what they say, and what to take instead."""


def refuse(name: str) -> None:
    """UsageError for a method, or "method option value", that is known to be broken."""
    for broken, why in REFUSED.items():
        if canonical(name) == canonical(broken):
            raise UsageError(f'"{name}" is not offered', why)


class Samplers(Registry[Method]):
    """The methods by name and by the names that other tools give them."""

    def resolve(self, name: str) -> str:
        refuse(name)
        return super().resolve(name)


SAMPLERS = Samplers("sampler")


def _row(
    name: str,
    loop: type[Sampler],
    about: str,
    spellings: str,
    allowed: Mapping[str, Allowed],
    **numbers: Any,
) -> None:
    names = (name, *spellings.split())
    method = Method(name, about, loop, numbers, allowed)
    SAMPLERS.add(name, method, *names, *(f"k_{spelling}" for spelling in names))


ANY, SHARE, YES_NO = Range(0.0, math.inf), Range(0.0, 1.0), (True, False)
NOISE: dict[str, Allowed] = {"eta": ANY, "s_noise": ANY}
BROWNIAN: dict[str, Allowed] = {**NOISE, "brownian": YES_NO}
CHURN: dict[str, Allowed] = dict.fromkeys(("s_churn", "s_tmin", "s_tmax", "s_noise"), ANY)
TAPER: dict[str, Allowed] = {"taper": ("never", "final", "short", "always")}
PAIR: dict[str, Allowed] = {"pair": ("half", "exact")}
THIRD: dict[str, Allowed] = {"third": (0.5, 1.0)}
CLOCK: dict[str, Allowed] = {"clock": ("lam", "log_sigma")}
ORDER: dict[str, Allowed] = {"order": (1, 2, 3, 4)}
UNIPC: dict[str, Allowed] = {
    "order": (1, 2, 3),
    "variant": {"bh1": {"pair": "bh1"}, "bh2": {"pair": "half"}},
    "target": ("x0", "eps"),
    "corrector_off": Numbers(),
    **TAPER,
}

# fmt: off
# First order: kappa alone.
_row("ddim", Multistep, "DDIM; eta = 1 is DDPM", "DDIMScheduler",
     {"eta": ANY}, fresh=posterior, eta=0.0)
_row("ddpm", Multistep, "DDPM", "DDPMScheduler",
     {"variance": ("small", "large")}, fresh=posterior)
_row("euler", Multistep, "Euler, with churn if asked; without it the same as DDIM",
     "EulerDiscreteScheduler EDMEulerScheduler FlowMatchEulerDiscreteScheduler", CHURN)
_row("euler_a", Multistep, "Euler ancestral", "euler_ancestral EulerAncestralDiscreteScheduler",
     NOISE, fresh=posterior)
_row("euler_a_rf", Multistep, "Euler ancestral of rectified flows",
     "euler_ancestral_rf LTXEulerAncestralRFScheduler", NOISE, fresh=rectified)
_row("lcm", Multistep, "latent consistency models", "LCMScheduler FlowMatchLCMScheduler",
     {"boundary": YES_NO, "s_noise": ANY}, fresh=full, boundary=True)
_row("tcd", Multistep, "trajectory consistency distillation, eta its gamma", "TCDScheduler",
     {"eta": SHARE}, fresh=tcd, eta=0.3)

# Several steps, x0 in lam.
_row("dpmpp_2m", Multistep, "DPM-Solver++(2M)",
     "dpmsolver++ DPMSolverMultistepScheduler EDMDPMSolverMultistepScheduler",
     PAIR | CLOCK | TAPER, order=2, pair="half", taper="short")
_row("dpmpp_3m", Multistep, "DPM-Solver++(3M); published: of second order, third = 1: of third", "",
     PAIR | THIRD | CLOCK | TAPER, order=3, pair="half", third=0.5, taper="short")
_row("dpmpp_2m_sde", Multistep, "DPM-Solver++(2M) of the reverse SDE",
     "dpmpp_2m_sde_bt dpmpp_2m_sde_gpu sde-dpmsolver++", BROWNIAN | PAIR | {"order": (1, 2)},
     order=2, pair="half", fresh=reverse_sde, brownian=True)
_row("dpmpp_2m_sde_heun", Multistep, "the same with the exact first moment",
     "dpmpp_2m_sde_heun_gpu", BROWNIAN, order=2, fresh=reverse_sde, brownian=True)
_row("dpmpp_3m_sde", Multistep, "DPM-Solver++(3M) of the reverse SDE", "dpmpp_3m_sde_gpu",
     BROWNIAN | THIRD, order=3, third=0.5, fresh=reverse_sde, brownian=True)
_row("unipc", Multistep, "UniPC, B1 as in A1111 and ComfyUI", "uni_pc",
     UNIPC, order=3, pair="bh1", corrector=True, taper="always")
_row("unipc_bh2", Multistep, "UniPC, B2 as in diffusers", "uni_pc_bh2 UniPCMultistepScheduler",
     UNIPC, order=3, pair="half", corrector=True, taper="always")

# Several steps, eps.
_row("dpm_solver", Multistep, "DPM-Solver, of order 2 (2M) or 3", "dpmsolver",
     PAIR | THIRD | TAPER | {"order": (1, 2, 3)},
     target="eps", order=2, pair="half", third=0.5, taper="short")
_row("deis", Multistep, "DEIS, a polynomial in log rho, rho or DEIS's own time (tab)",
     "DEISMultistepScheduler", ORDER | TAPER | {"variant": {
         "log_rho": {"clock": "lam"}, "rho": {"clock": "rho"}, "tab": {"clock": "vp"}}},
     target="eps", order=2, clock="lam", taper="short")
_row("lms", Multistep, "linear multistep in rho, or in t = sigma / (alpha + sigma)",
     "LMSDiscreteScheduler", ORDER | {"variable": {
         "rho": {"target": "eps", "clock": "rho"}, "t": {"target": "flow", "clock": "t"}}},
     target="eps", order=4, clock="rho")
_row("ipndm", Multistep, "Adams-Bashforth in the number of the step", "IPNDMScheduler",
     ORDER, target="eps", order=4, clock="index")
_row("plms", Multistep, "PNDM without its Runge-Kutta start; target: the network's own",
     "pndm PNDMScheduler", {"target": ("eps", "v", "x0", "flow")},
     target="eps", order=4, clock="index", start="heun")

# Two stages.
_row("heun", TwoStage, "Heun in rho (EDM, with churn if asked), or in t = sigma / (alpha + sigma)",
     "HeunDiscreteScheduler FlowMatchHeunDiscreteScheduler", CHURN | {"variable": {
         "rho": {"target": "eps"}, "t": {"target": "flow"}}}, target="eps", r=1.0)
_row("dpm2", TwoStage, "DPM-Solver-2, with churn if asked", "dpm_2 KDPM2DiscreteScheduler",
     CHURN, target="eps")
_row("dpm2_a", TwoStage, "DPM-Solver-2 ancestral",
     "dpm_2_a dpm_2_ancestral KDPM2AncestralDiscreteScheduler",
     NOISE, target="eps", fresh=posterior)
_row("dpmpp_2s", TwoStage, "DPM-Solver++(2S)", "dpmsingle DPMSolverSinglestepScheduler", {})
_row("dpmpp_2s_a", TwoStage, "DPM-Solver++(2S) ancestral", "dpmpp_2s_ancestral",
     NOISE, fresh=posterior)
_row("dpmpp_sde", TwoStage, "DPM-Solver++ with fresh noise in both stages",
     "dpmpp_sde_gpu DPMSolverSDEScheduler", BROWNIAN | {"r": Range(0.01, 1.0)},
     fresh=posterior, stage="fresh", brownian=True)
# fmt: on


def split_spelling(name: str) -> tuple[str, str | None]:
    """Sampler and schedule of a name such as "DPM++ 2M Karras"; the latter None if not named."""
    if name in SAMPLERS:
        return SAMPLERS.resolve(name), None
    suffixes = {canonical(schedule): schedule for schedule in GRIDS}
    for suffix, schedule in (suffixes | SUFFIXES).items():
        stem = canonical(name).removesuffix(suffix)
        if stem != canonical(name) and stem in SAMPLERS:
            return SAMPLERS.resolve(stem), schedule
    return SAMPLERS.resolve(name), None


SUFFIXES = {"k": "karras", "ka": "karras", "exp": "exponential"}
"""Of InvokeAI and A1111."""
