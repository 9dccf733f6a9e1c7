"""Loops of single published methods that remember earlier outputs. Torch-free at import."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from difftool.diffusion.guidance import Denoise
from difftool.diffusion.path import Level, Path
from difftool.diffusion.prediction import Prediction
from difftool.diffusion.solvers import Begun, Multistep, Node, Noise, Step, UniPC

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ancestral(Multistep):
    """A Multistep whose polynomials run over the deterministic parts of the steps alone (RES,
    2308.02157, as in ComfyUI)."""

    def _end(self, here: Level, there: Level, u: float) -> float:
        kappa = self._kappa(here, there)
        if not kappa:
            return u
        down = math.sqrt(max(there.sigma**2 - kappa**2, 0.0))
        return math.log(there.alpha / down) if down else math.inf


@dataclass(frozen=True, kw_only=True)
class GradientEstimation(Multistep):
    """F* = F + (ge_gamma - 1) (F - F_last), whatever the lengths of the steps (2306.04848)."""

    ge_gamma: float = 2.0

    def mean_output(self, nodes: Sequence[Node], u: float, u_next: float) -> Tensor:
        newest, last = nodes
        return newest.F + (self.ge_gamma - 1) * (newest.F - last.F)


@dataclass(frozen=True, kw_only=True)
class IpndmV(Multistep):
    """Adams-Bashforth over the lengths of the steps, by the formulas that were published
    (diff-sampler, ComfyUI): those of three and four outputs are not the method's, which lms is."""

    weights: str = "published"
    """published, or exact: the method's own."""

    def mean_output(self, nodes: Sequence[Node], u: float, u_next: float) -> Tensor:
        if len(nodes) < 3 or self.weights == "exact":
            return super().mean_output(nodes, u, u_next)
        times = [u_next, *(node.u for node in nodes)]
        h, h1, h2, *more = (later - earlier for later, earlier in pairwise(times))
        F = [node.F for node in nodes]
        mean = F[0] + h / (2 * h1) * (F[0] - F[1])
        bend = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        mean = mean + bend * (F[0] - (1 + h1 / h2) * F[1] + h1 / h2 * F[2])
        if not more:
            return mean
        (h3,) = more
        third = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        third *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        a = h1 * (h1 + h2) / (h2 * (h2 + h3))
        change = F[0] - (1 + h1 / h2 + a) * F[1]
        change = change + (h1 / h2 + a * (1 + h2 / h3)) * F[2] - a * h1 / h2 * F[3]
        return mean + third * change


# --- ER-SDE ---------------------------------------------------------------------------------------

POINTS = 200
"""Of the sums that stand for integrals in the published method."""


def _scaler(rho: float) -> float:
    """phi of ER-SDE, which says how fast noise is renewed."""
    power = rho**0.3
    return rho * (math.exp(power) + 10) if power < 700 else math.inf


def er_sde(path: Path, here: Level, there: Level, eta: float) -> float:
    """Of x_t / alpha - x0 a share phi(rho_s) / phi(rho_t) is kept (2309.06169)."""
    kept = _scaler(there.rho) / _scaler(here.rho)
    old = there.alpha * here.rho * kept if kept else 0.0
    return math.sqrt(max(there.sigma**2 - old**2, 0.0))


@dataclass(frozen=True, kw_only=True)
class ErSde(Multistep):
    """The extended reverse SDE of that kappa (ER-SDE-Solver-3, 2309.06169), with the published sums
    in place of integrals, and the published second derivative."""

    def mean_output(self, nodes: Sequence[Node], u: float, u_next: float) -> Tensor:
        rho, rho_next = math.exp(-u), math.exp(-u_next)
        phi = _scaler(rho_next)
        width = (rho - rho_next) / POINTS
        places = [rho_next + k * width for k in range(POINTS)]
        first = phi * width * sum(1 / _scaler(r) for r in places) - (rho - rho_next)
        weight = 1 - phi / _scaler(rho)
        rhos, F = [math.exp(-node.u) for node in nodes], [node.F for node in nodes]
        slope = (F[0] - F[1]) / (rhos[0] - rhos[1])
        mean = F[0] + first / weight * slope
        if len(nodes) < 3:
            return mean
        second = phi * width * sum((r - rho) / _scaler(r) for r in places)
        second += (rho - rho_next) ** 2 / 2
        bend = 2 * (slope - (F[1] - F[2]) / (rhos[1] - rhos[2])) / (rhos[0] - rhos[2])
        return mean + second / weight * bend


# --- SA-Solver ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SaSolver(UniPC):
    """Stochastic Adams (2309.05019): a predictor of `order` outputs and a corrector, whose step has
    the same fresh noise, of `corrector_order` with the next one. eta is its tau."""

    corrector_order: int = 4
    """How many outputs the corrector takes, the next one among them; 0 = it is left out."""
    tau_start: float = 0.2
    tau_end: float = 0.8
    """Between these shares of the path there is fresh noise; 0 is its noisy end."""
    tau_at: str = "there"
    """Where in a step that is asked: at its end (there, ComfyUI), or where it begins (here)."""
    pece: bool = False
    """Whether the network is asked again after the corrector."""
    draws_always: bool = False
    """Whether noise is drawn in steps that add none, as diffusers does: further ones' depends on
    it."""
    lower_order_final: str = "clean"
    """clean: where the grid ends without noise, the orders fall to 1 in the last step but that
    one, the corrector's one later. always: in the last step, the corrector's to 3."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        solver = self
        if self.lower_order_final == "clean" and levels[-1].sigma:
            solver = replace(self, lower_order_final="never")
        return super(SaSolver, solver).__call__(denoise, x, levels, noise)

    def evaluations(self, steps: int) -> int:
        return steps * (1 + self.pece)

    def _fresh(self, here: Level, there: Level, noise: Noise) -> tuple[float, Tensor | None]:
        kappa, z = super()._fresh(here, there, noise)
        if z is None and self.draws_always and there.sigma:
            noise(here, there)
        return kappa, z

    @property
    def _kept(self) -> int:
        return max(self.order - 1, self.corrector_order - 2)

    def _order(self, left: int, steps: int) -> int:
        if self.lower_order_final == "clean":
            return max(1, min(self.order, left - 1))
        return super()._order(left, steps)

    def _at(self, here: Level, there: Level) -> Multistep:
        asked = there if self.tau_at == "there" else here
        high, low = (
            self.path.at_index((1 - share) * (self.path.steps - 1)).rho
            for share in (self.tau_start, self.tau_end)
        )
        within = low * (1 - ROUNDING) <= asked.rho <= high * (1 + ROUNDING)
        return self if within else replace(self, eta=0.0)

    def _corrected(
        self,
        denoise: Denoise,
        x: Tensor,
        predicted: Prediction,
        here: Level,
        node: Node,
        last: Begun | None,
    ) -> tuple[Tensor, Prediction, Node]:
        there, mean, same = super()._corrected(denoise, x, predicted, here, node, last)
        if not self.pece or there is x:
            return there, mean, same
        again = denoise(there, here)
        return there, again, Node(node.u, self._output(again, here))

    def _corrects(self, last: Begun, u_next: float) -> bool:
        return self.corrector_order > 0 and super()._corrects(last, u_next)

    def _nodes(self, last: Begun) -> list[Node]:
        left = last.left - 1
        most = {"clean": left, "always": left + 2}.get(self.lower_order_final, math.inf)
        return last.past[: int(min(self.corrector_order, most)) - 1]


ROUNDING = 1e-9
"""By which a level may lie beyond the ends of an interval."""
