"""Loops of single published methods that ask the network several times a step, or take steps of
their own. Torch-free at import."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.diffusion.clocks import flow_time
from difftool.diffusion.grids import karras
from difftool.diffusion.guidance import Denoise
from difftool.diffusion.path import Level, Path
from difftool.diffusion.prediction import Prediction, recover
from difftool.diffusion.solvers import Noise, Sampler, Step, TwoStage, posterior, transition

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeunPlus(Sampler):
    """Heun++: the network is asked at the end of a step and at that of the next, with weights that
    fall with their noise scale. The last step is Euler's, the last but one looks ahead once."""

    def evaluations(self, steps: int) -> int:
        return 3 * steps

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        steps = len(levels) - 1
        whole = self._scale(next(level for level in levels if level.alpha))
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churn(x, here, steps, noise)
            predicted = mean = denoise(x, here)
            ahead = levels[i + 1 : min(i + 3, steps)] if self._recovers(here) else []
            F = first = self._output(predicted, here)
            guess = predicted
            x_next = x
            for level in ahead:
                x_next = self._pasted(transition(*guess, level), level)
                guess = denoise(x_next, level)
                weight = self._scale(level) / whole / (len(ahead) + 1)
                F = F + weight * (self._output(guess, level) - first)
            if ahead:
                mean = recover(x, F, here, self.target)
            x = self._step(mean, here, there, noise)
            yield Step(i, there, x, predicted.x0)

    def _scale(self, level: Level) -> float:
        return level.rho if self.target == "eps" else flow_time(level)


# --- Restart ----------------------------------------------------------------------------------

RESTART = (0.1, 2.0)
"""Down to the rho nearest to the first, and from there up again to the second (A1111)."""


@dataclass(frozen=True, kw_only=True)
class Restart(TwoStage):
    """Heun's method, which goes back and down a part of the path again (2306.14878), with A1111's
    numbers: from 20 steps on, on a grid of its own."""

    def visits(self, levels: Sequence[Level]) -> Sequence[Level]:
        """Karras' grid and in it the part that is gone again; as many steps as are asked for, and
        one for each time that noise is put back."""
        steps = len(levels) - 1
        if steps < 20:
            return levels
        each, times = (9, 1) if steps < 36 else (steps // 4, 2)
        head = [levels[0]] if not levels[0].alpha else []
        tail = [] if levels[-1].sigma else [levels[-1]]
        within = levels[len(head) : len(levels) - len(tail)]
        count = len(within) - each * times
        grid = [*head, *self._karras(within[0], within[-1], count), *tail]
        noisy = grid[: len(grid) - len(tail)]
        low, high = (min(range(len(noisy)), key=lambda i: abs(noisy[i].rho - r)) for r in RESTART)
        if high >= low:
            return grid
        again = self._karras(grid[high], grid[low], each + 1) * times
        return [*grid[: low + 1], *again, *grid[low + 1 :]]

    def _karras(self, first: Level, last: Level, count: int) -> list[Level]:
        """So many levels, both ends among them."""
        rhos = karras(first.rho, last.rho, count)[1:-1]
        return [first, *(self.path.at_half_log_snr(-math.log(rho)) for rho in rhos), last]

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        x0 = x
        for i, (here, there) in enumerate(pairwise(self.visits(levels))):
            if there.rho > here.rho:
                kept = there.alpha / here.alpha
                added = math.sqrt(there.sigma**2 - (kept * here.sigma) ** 2)
                x = self._pasted(kept * x + added * self.s_noise * noise(here, there), there)
            else:
                predicted = denoise(x, here)
                x0, mean = predicted.x0, self.staged(denoise, x, predicted, here, there, noise)[0]
                x = self._step(mean, here, there, noise)
            yield Step(i, there, x, x0)


# --- DPM-Solver on grids of its own -------------------------------------------------------------

ORDERS: Mapping[int, Mapping[str, Any]] = {
    1: {"within": ()},
    2: {"within": (1 / 2,), "solver_type": "midpoint"},
    3: {"within": (1 / 3, 2 / 3), "solver_type": "heun"},
}
"""DPM-Solver-1, 2 and 3."""


class Walked(NamedTuple):
    """A step that is done: the level arrived at, x there, and what was predicted at its start."""

    level: Level
    x: Tensor
    predicted: Prediction


@dataclass(frozen=True, kw_only=True)
class DpmSolver(TwoStage):
    """DPM-Solver (2206.00927) in steps of its own down to the lowest level that has noise, which
    then counts as clean. The grid says where it begins and ends, and when x is told: in between,
    to first order. The step out of alpha = 0 is of first order."""

    within: tuple[float, ...] = ()
    """The shares."""

    @property
    def shares(self) -> tuple[float, ...]:
        return self.within

    def evaluations(self, steps: int) -> int:
        return steps

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        i, steps, here, x0 = 0, len(levels) - 1, levels[0], x
        low, count = self._lowest(levels), steps
        if not here.alpha or here.rho <= low.rho:
            predicted, there, count = denoise(x, here), self._second(levels), steps - 1
            x, x0 = self._down_to(low)._step(predicted, here, there, noise), predicted.x0
            here = there
        for done in self._walk(denoise, x, here, low, noise, count):
            here, x, x0 = done.level, done.x, done.predicted.x0
            while i < steps and here.rho <= levels[i + 1].rho > low.rho:
                told = transition(*done.predicted, levels[i + 1])
                yield Step(i, levels[i + 1], told, x0)
                i += 1
        while i < steps:
            there = levels[i + 1]
            if there.rho < here.rho:  # what is left of noise stays
                x, here = self._pasted(there.alpha / here.alpha * x, there), there
            yield Step(i, there, x, x0)
            i += 1

    @abstractmethod
    def _walk(
        self, denoise: Denoise, x: Tensor, here: Level, low: Level, noise: Noise, count: int
    ) -> Iterator[Walked]:
        """The steps between two levels; count: how many evaluations the grid stands for."""

    def _lowest(self, levels: Sequence[Level]) -> Level:
        """Where it ends: the path's lowest level, if the grid ends without noise."""
        return levels[-1] if levels[-1].sigma else self.path.at_index(0)

    def _second(self, levels: Sequence[Level]) -> Level:
        """Where the step out of alpha = 0 ends."""
        return levels[1]

    def _down_to(self, low: Level, **numbers: Any) -> DpmSolver:
        """The method of those numbers, whose deterministic steps end above a level."""

        def kappa(path: Path, here: Level, there: Level, eta: float) -> float:
            most = math.sqrt(max(there.sigma**2 - (there.alpha * low.rho) ** 2, 0.0))
            return min(posterior(path, here, there, eta), most)

        return replace(self, kappa=kappa, **numbers)


@dataclass(frozen=True, kw_only=True)
class DpmFast(DpmSolver):
    """As many steps of order 3 as evaluations allow, even in log SNR."""

    def _walk(
        self, denoise: Denoise, x: Tensor, here: Level, low: Level, noise: Noise, count: int
    ) -> Iterator[Walked]:
        if not count or here.rho <= low.rho:
            return
        full, rest = divmod(count, 3)
        orders = [3] * full + [rest] if rest else [3] * (full - 1) + [2, 1]
        start, h = here.half_log_snr, low.half_log_snr - here.half_log_snr
        lams = [start + h * i / len(orders) for i in range(1, len(orders))]
        ends = [*map(self.path.at_half_log_snr, lams), low]
        for there, order in zip(ends, orders, strict=True):
            predicted, solver = denoise(x, here), self._down_to(low, **ORDERS[order])
            mean = solver.staged(denoise, x, predicted, here, there, noise)[0]
            x, here = solver._step(mean, here, there, noise), there
            yield Walked(here, x, predicted)


@dataclass(frozen=True, kw_only=True)
class DpmAdaptive(DpmSolver):
    """Steps as long as the difference of two orders allows, picture by picture."""

    alone: bool = True
    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    """Of the difference, in units of x_t / alpha."""
    h_init: float = 0.05
    """The first step, in lam."""
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    """Of the controller that sets the next step."""
    accept_safety: float = 0.81
    """A step after which the next one were shortened by more is done again."""

    def evaluations(self, steps: int) -> int:
        return self.order * steps

    def _second(self, levels: Sequence[Level]) -> Level:
        return levels[1] if levels[0].alpha else self.path.at_index(self.path.steps - 2)

    def _walk(
        self, denoise: Denoise, x: Tensor, here: Level, low: Level, noise: Noise, count: int
    ) -> Iterator[Walked]:
        high = self._down_to(low, **ORDERS[self.order])
        guess = self._down_to(low, within=high.within[: self.order - 2], solver_type="midpoint")
        control, predicted = _Controller(self), None
        end, x_last = low.half_log_snr, x / here.alpha
        while here.half_log_snr < end - 1e-5:
            predicted = predicted or denoise(x, here)
            ahead = here.half_log_snr + control.h
            there = self.path.at_half_log_snr(ahead) if ahead < end else low
            ask = _Once(denoise)
            means = [s.staged(ask, x, predicted, here, there, noise)[0] for s in (guess, high)]
            kappa = high._kappa(here, there)
            ends = [transition(*mean, there, kappa) / there.alpha for mean in means]
            if control.accepts(_error(ends, x_last, self.atol, self.rtol)):
                x, x_last = high._step(means[1], here, there, noise), ends[0]
                here, done = there, predicted
                predicted = None
                yield Walked(here, x, done)


class _Once:
    """A network that is asked once at each level."""

    def __init__(self, denoise: Denoise):
        self.denoise, self.known = denoise, dict[Level, Prediction]()

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        if level not in self.known:
            self.known[level] = self.denoise(x, level)
        return self.known[level]


def _error(ends: Sequence[Tensor], last: Tensor, atol: float, rtol: float) -> float:
    """The difference of two orders in units of what is allowed, over all numbers."""
    guess, better = ends
    allowed = (rtol * guess.abs().maximum(last.abs())).clamp(min=atol)
    return float(((guess - better) / allowed).square().mean().sqrt())


MAX_TRIES = 1000
"""Of steps: then what is left is done in one."""


class _Controller:
    """Sets steps by the errors of the last three (PID)."""

    def __init__(self, numbers: DpmAdaptive):
        self.h, self.safety, self.tried = numbers.h_init, numbers.accept_safety, 0
        order = 1.5 if numbers.eta else numbers.order
        p, i, d = numbers.pcoeff, numbers.icoeff, numbers.dcoeff
        self.powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.last: list[float] = []

    def accepts(self, error: float) -> bool:
        """Whether a step of that error is kept; sets the next one."""
        self.tried += 1
        if not math.isfinite(error) or self.tried > MAX_TRIES:
            self.h = math.inf
            return True
        inverse = 1 / (error + 1e-8)
        self.last = self.last or [inverse] * 2
        now = [inverse, *self.last]
        factor = math.prod(value**power for value, power in zip(now, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        if factor < self.safety:
            return False
        self.last = now[:2]
        return True
