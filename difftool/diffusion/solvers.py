"""The three loops behind every sampler, and the fresh noise of their steps. Torch-free at import.

A step from the level `here` (alpha_t, sigma_t) to the level `there` (alpha_s, sigma_s) is

    x_s = alpha_s x0 + sqrt(sigma_s^2 - kappa^2) eps + kappa z

with fresh noise kappa z. The network's own x0 and eps make it exact to first order (FirstOrder).
Other methods put a mean over the step, F*, for the network's output F, and take x0 and eps from
that:

    Multistep   F* from a polynomial through the outputs of earlier steps, one evaluation a step
    TwoStage    F* from a second evaluation within the step, or a third

CFG++ (2406.08070) guides x0 alone: where a sampler says so, `denoise` returns the guided x0 with
the unguided eps. FirstOrder takes both as they are; other loops work on what is unguided, and put
the shift of guidance, delta = guided x0 - unguided x0, to the mean of the step.

lam = log(alpha / sigma), rho = sigma / alpha, h is a step's length in lam. Coefficients are Python
floats, so that no step waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from difftool.diffusion.clocks import CLOCKS, flow_time, interpolation, moments
from difftool.diffusion.consistency import TIMESTEP_SCALING, boundary_scalings
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
    """The clean image that was predicted where the step began; [B,C,H,W]."""


def transition(
    x0: Tensor, eps: Tensor, there: Level, kappa: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """x_t of the level `there`, whose noise is of deviation kappa fresh, z, and else eps."""
    x = there.alpha * x0 + _other_leg(there.sigma, kappa) * eps
    return x if z is None else x + kappa * z


def _other_leg(whole: float, part: float) -> float:
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
    return min(there.sigma, eta * there.sigma * _renewed(here, there, 2.0))


def reverse_sde(path: Path, here: Level, there: Level, eta: float) -> float:
    """The reverse SDE with its noise times eta, solved over the step (DPM-Solver++ 2211.01095)."""
    return there.sigma * _renewed(here, there, 2.0 * eta)


def adams(path: Path, here: Level, there: Level, eta: float) -> float:
    """The same with the square of eta for its share (tau of SA-Solver, 2309.05019)."""
    return reverse_sde(path, here, there, eta**2)


def full(path: Path, here: Level, there: Level, eta: float) -> float:
    """Nothing but fresh noise: consistency models (2303.01469, algorithm 1), LCM (2310.04378)."""
    return there.sigma


def tcd(path: Path, here: Level, there: Level, eta: float) -> float:
    """Down to (1 - eta) t_s and up again to t_s; eta is gamma of TCD (2402.19159)."""
    t = (1 - eta) * there.t
    return _through(path.level(t if path.continuous else math.floor(t)).rho, there)


def rectified(path: Path, here: Level, there: Level, eta: float) -> float:
    """Ancestral steps of flows (ComfyUI, LTX-Video): down by eta (1 - t_s / t_t) of t_s more."""
    t = flow_time(there) * (1 + eta * (flow_time(there) / flow_time(here) - 1))
    return _through(t / (1 - t), there)


def _renewed(here: Level, there: Level, rate: float) -> float:
    """Share of a step's noise that is fresh, sqrt(1 - e^(-rate h)); 1 from alpha = 0, where h is
    infinite."""
    h = there.half_log_snr - here.half_log_snr
    return math.sqrt(-math.expm1(-rate * h)) if rate else 0.0


def _through(rho: float, there: Level) -> float:
    """The fresh noise of a step down to that rho, and from there up to `there`."""
    return _other_leg(there.sigma, there.alpha * rho) if rho < there.rho else 0.0


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
    kappa: Kappa = none
    """The fresh noise of a step."""
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
    cfg_pp: str = ""
    """What guidance shifts by delta where eps is not guided: x0 (CFG++), or eps by delta / rho, as
    in ComfyUI's second-order methods; "" = both are guided."""
    guidance_unit: float = 1.0
    """The guidance scale that counts as 1."""
    alone: bool = False
    """Whether the steps go by the picture, so that each has to be sampled alone."""
    paste: Callable[[Tensor, Level], Tensor] | None = None
    """What becomes of x wherever it arrives: inpainting lays what is known over it."""

    @abstractmethod
    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]: ...

    def part_of(self, steps: int, *, last: bool = True, still: bool = False) -> Sampler:
        """The same method for a part of a grid of `steps` steps, with its last step or without.

        still: whether that step is of no length, and left out.
        """
        return self

    def visits(self, levels: Sequence[Level]) -> Sequence[Level]:
        """The levels that are visited, where a grid is given: its own, for most methods."""
        return levels

    def evaluations(self, steps: int) -> int:
        """How often the network is asked in so many steps, as A1111 counts."""
        return steps

    def _kappa(self, here: Level, there: Level) -> float:
        return self.kappa(self.path, here, there, self.eta) if there.sigma and self.eta else 0.0

    def _noise_scale(self, here: Level, there: Level, kappa: float) -> float:
        """Factor on the fresh noise kappa z."""
        return self.s_noise

    def _fresh(self, here: Level, there: Level, noise: Noise) -> tuple[float, Tensor | None]:
        """The fresh noise of a step: its deviation, and z if there is any."""
        kappa = self._kappa(here, there)
        return kappa, self._noise_scale(here, there, kappa) * noise(here, there) if kappa else None

    def _step(self, mean: Prediction, here: Level, there: Level, noise: Noise) -> Tensor:
        """x_t at `there`, from the mean x0 and eps of the step."""
        return self._pasted(transition(*mean, there, *self._fresh(here, there, noise)), there)

    def _pasted(self, x: Tensor, level: Level) -> Tensor:
        return x if self.paste is None else self.paste(x, level)

    def _churn(self, x: Tensor, here: Level, steps: int, noise: Noise) -> tuple[Tensor, Level]:
        """x and its level with noise put back."""
        within = self.s_tmin <= here.rho <= self.s_tmax and here.alpha > 0
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if within else 0.0
        if not gamma:
            return x, here
        up = self.path.at_half_log_snr(here.half_log_snr - math.log1p(gamma))
        kept = up.alpha / here.alpha
        added = _other_leg(up.sigma, kept * here.sigma)
        return kept * x + added * self.s_noise * noise(here, up), up

    def _output(self, predicted: Prediction, level: Level) -> Tensor:
        """F = p x0 + q eps of the target that is averaged."""
        p, q = TARGETS[self.target](level.alpha, level.sigma)
        return p * predicted.x0 + q * predicted.eps

    @property
    def _rate(self) -> float:
        """Rate by log SNR at which the weight in F* grows."""
        if self.target == "eps":
            return -1.0
        if self.kappa is adams:
            return 1.0 + self.eta**2
        return 1.0 + self.eta if self.kappa is reverse_sde else 1.0

    def _unguided(self, predicted: Prediction, x: Tensor, level: Level) -> Prediction:
        """The prediction without guidance, of one whose eps is not guided."""
        if not self.cfg_pp or not level.alpha:
            return predicted
        return predicted._replace(x0=(x - level.sigma * predicted.eps) / level.alpha)

    def _guided(self, mean: Prediction, delta: Tensor, here: Level) -> Prediction:
        """A mean of unguided predictions, shifted by guidance."""
        if self.cfg_pp == "x0":
            return mean._replace(x0=mean.x0 + delta)
        return mean._replace(eps=mean.eps + delta / here.rho) if self.cfg_pp else mean

    def _recovers(self, level: Level) -> bool:
        """Whether x and F give x0 and eps; from F = eps they do not where alpha = 0."""
        p, q = TARGETS[self.target](level.alpha, level.sigma)
        return level.alpha * q != level.sigma * p


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Sampler):
    """The network's own x0 and eps for every step: kappa alone tells these methods apart."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churn(x, here, len(levels) - 1, noise)
            predicted = self._bounded(denoise(x, here), x, here)
            x = self._step(predicted, here, there, noise)
            yield Step(i, there, x, predicted.x0)

    def _bounded(self, predicted: Prediction, x: Tensor, here: Level) -> Prediction:
        return predicted


@dataclass(frozen=True, kw_only=True)
class Ddpm(FirstOrder):
    """DDPM (2006.11239), with either of its variances."""

    variance: str = "small"
    """Of the noise that is added: the posterior's (small), or that of q(x_t | x_s) (large)."""

    def _noise_scale(self, here: Level, there: Level, kappa: float) -> float:
        if self.variance == "small":
            return self.s_noise
        return _other_leg(here.sigma, here.alpha / there.alpha * there.sigma) / kappa


@dataclass(frozen=True, kw_only=True)
class Consistency(FirstOrder):
    """Latent consistency models (2310.04378)."""

    boundary_scalings: bool = True
    """Whether x0 = x_t at t = 0 (consistency models 2303.01469 eq. 5, with the scalings of LCM),
    on paths with a table."""
    timestep_scaling: float = TIMESTEP_SCALING
    """Factor on t in these scalings."""

    def _bounded(self, predicted: Prediction, x: Tensor, here: Level) -> Prediction:
        if not self.boundary_scalings or self.path.continuous:
            return predicted
        skip, out = boundary_scalings(here.t, self.timestep_scaling)
        return predicted._replace(x0=out * predicted.x0 + skip * x)


class Node(NamedTuple):
    """An output, and the time by the clock when the network made it."""

    u: float
    F: Tensor


class Begun(NamedTuple):
    """A step that is done: its number in the grid, where it began, and what its mean was of."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    x: Tensor
    level: Level
    nodes: list[Node]
    """Newest first."""
    past: list[Node]
    """All that were remembered, newest first."""
    left: int
    """Steps that were left, this one among them."""
    kappa: float = 0.0
    """Deviation of its fresh noise."""
    z: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Multistep(Sampler):
    """F* is the mean over the step of the polynomial through the last `order` outputs.

    In lam it is weighted as the linear part of the ODE or SDE asks, d(1 / rho) for x0 and d(rho)
    for eps, in other clocks evenly. A step that is infinite by the clock, out of alpha = 0 or into
    sigma = 0, is of first order. DPM++ 2M (2211.01095, algorithm 2) has target x0, clock lam, order
    2, solver_type midpoint, and is, written out, from lam_t to lam_s after a step from lam_r,

        h, h_last = lam_s - lam_t, lam_t - lam_r
        x0 = denoise(x_t)
        mean = x0 + h / (2 h_last) (x0 - x0_last)      polynomial through both, half its slope
        x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) mean
        x0_last = x0

    where the last line but one is `transition` with the eps that x_t and the mean x0 make.
    """

    order: int = 1
    clock: str = "lam"
    """What the polynomial is in: a name from CLOCKS."""
    solver_type: str = "heun"
    """First moment of two nodes: exact (heun), one half (midpoint: DPM-Solver's; UniPC's B2), or
    bh1 (UniPC's B1)."""
    d2_scale: float = 1.0
    """Factor on the second moment of three nodes; as DPM-Solver 3M is published, 1/2."""
    lower_order_final: str = "never"
    """Whether the order falls to 1 towards the end: never, final (the last step only), always,
    or short (as always, if there are less than 15 steps)."""
    guided_node: bool = False
    """Whether the newest output counts guided, although eps is not."""
    grid_steps: int = 0
    """Steps of the whole grid, of which the last ones are taken; 0 = those that there are."""
    ends_still: bool = False
    """Whether a step of no length comes after the last, which is not run but counts as the end."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        steps, clock = len(levels) - 1 + self.ends_still, CLOCKS[self.clock]
        u = [clock.time(level, i) for i, level in enumerate(levels)]
        history: list[Node] = []  # newest first
        last: Begun | None = None
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churn(x, here, steps, noise)
            predicted = denoise(x, here)
            own = self._unguided(predicted, x, here)
            node = Node(u[i], self._output(own, here))
            x, mean, node = self._corrected(denoise, x, predicted, here, node, last)

            solver, end = self._at(here, there), self._end(here, there, u[i + 1])
            nodes = [node]
            if self.guided_node:
                nodes = [Node(u[i], self._output(predicted, here))]
            if math.isfinite(end - u[i]) and end != u[i]:
                nodes += history[: self._order(steps - i, steps) - 1]
            if started := self._start(i, denoise, x, predicted, here, there):
                mean = started
            elif any(math.isfinite(past.u) for past in nodes[1:]):
                mean = recover(x, solver.mean_output(nodes, u[i], end), here, self.target)
                mean = self._guided(mean, predicted.x0 - own.x0, here)
            past = [node, *history]
            kappa, z = solver._fresh(here, there, noise)
            number = i + max(self.grid_steps - steps, 0)
            last = Begun(number, x, here, nodes, past, steps - i, kappa, z)
            if end != u[i + 1]:  # what is remembered lies as far back as the step went
                past = [each._replace(u=each.u + u[i + 1] - end) for each in past]
            history = past[: self._kept]
            x = self._pasted(transition(*mean, there, kappa, z), there)
            yield Step(i, there, x, predicted.x0)

    def part_of(self, steps: int, *, last: bool = True, still: bool = False) -> Sampler:
        # Whether steps are few is meant of the whole grid, and so is its end.
        falls = self.lower_order_final
        if (falls == "short" and steps >= 15) or (falls != "final" and not last):
            falls = "never"
        whole = steps if last else 0
        return replace(self, lower_order_final=falls, ends_still=still, grid_steps=whole)

    @property
    def _kept(self) -> int:
        """How many outputs are remembered."""
        return self.order - 1

    def _at(self, here: Level, there: Level) -> Multistep:
        """The method with its numbers for that step."""
        return self

    def _end(self, here: Level, there: Level, u: float) -> float:
        """The time by the clock at which the deterministic part of a step ends; u: that of
        `there`."""
        return u

    def _corrected(
        self,
        denoise: Denoise,
        x: Tensor,
        predicted: Prediction,
        here: Level,
        node: Node,
        last: Begun | None,
    ) -> tuple[Tensor, Prediction, Node]:
        """x_t, x0 and eps there and the newest output, with what this says of the step that led to
        it."""
        return x, predicted, node

    def _start(
        self, i: int, denoise: Denoise, x: Tensor, predicted: Prediction, here: Level, there: Level
    ) -> Prediction | None:
        """The mean x0 and eps of a step, if it is one that makes the history; None = it is not."""
        return None

    def _order(self, left: int, steps: int) -> int:
        """The highest order of the step that is the last but left - 1."""
        when = self.lower_order_final
        falls = when == "always" or (when == "short" and steps < 15)
        return min(self.order, left) if falls or (when == "final" and left == 1) else self.order

    def mean_output(self, nodes: Sequence[Node], u: float, u_next: float) -> Tensor:
        """F* of the step from u to u_next, newest node first: at u, or, to correct, at u_next.

        A node that lies infinitely far back has no weight, which is the limit of the formulas.
        """
        corrects = nodes[0].u == u_next
        ends, past = nodes[: 1 + corrects], nodes[1 + corrects :]
        past = [node for node in past if math.isfinite(node.u)]
        r = [1.0, 0.0] if corrects else [0.0]
        r += [(node.u - u) / (u_next - u) for node in past]
        rate = self._rate
        means = CLOCKS[self.clock].moments(u, u_next, len(r), rate)
        if len(nodes) == 2 and self.solver_type == "midpoint":
            means[1] = 0.5
        if len(nodes) == 2 and self.solver_type == "bh1":
            means[1] = rate * (u_next - u) / (-2 * math.expm1(-rate * (u_next - u)))
        if len(r) == 3 and not corrects:
            means[2] *= self.d2_scale
        first, *others = zip(interpolation(r, means), [*ends, *past], strict=True)
        return sum((w * node.F for w, node in others), start=first[0] * first[1].F)


@dataclass(frozen=True, kw_only=True)
class UniPC(Multistep):
    """A Multistep whose steps, but for the last, are done again with the next output
    (UniC 2302.04867)."""

    disable_corrector: Sequence[int] = ()
    """Numbers of the steps that are not."""

    def _corrected(
        self,
        denoise: Denoise,
        x: Tensor,
        predicted: Prediction,
        here: Level,
        node: Node,
        last: Begun | None,
    ) -> tuple[Tensor, Prediction, Node]:
        if last is None or not self._corrects(last, node.u):
            return x, predicted, node
        solver = self._at(last.level, here)
        nodes = [node, *self._nodes(last)]
        F = node.F
        if len(nodes) > 1:
            F = solver.mean_output(nodes, last.nodes[0].u, node.u)
        mean = recover(last.x, F, last.level, self.target)
        x = transition(*mean, here, last.kappa, last.z)
        return x, recover(x, node.F, here, self.target), node

    def _nodes(self, last: Begun) -> list[Node]:
        """The outputs by which a step is done again, but for the next one."""
        return last.nodes

    def _corrects(self, last: Begun, u_next: float) -> bool:
        u = last.nodes[0].u
        if last.index in self.disable_corrector or u_next in (u, math.inf):
            return False
        return self._recovers(last.level) and (math.isfinite(u) or self.solver_type != "bh1")


@dataclass(frozen=True, kw_only=True)
class Singlestep(Multistep):
    """Runs of 1, 2, ... `order` steps (DPM-Solver 2206.00927, algorithms 1 and 2, on a given grid).

    A run begins afresh: each of its steps goes again from where the run began, with the outputs
    made since. So they need no history, and only a run's end is of the full order.
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        clock, steps = CLOCKS[self.clock], len(levels) - 1
        u = [clock.time(level, i) for i, level in enumerate(levels)]
        orders = self.orders(self.grid_steps or steps, clean=not levels[-1].sigma)
        orders = orders[-steps - self.ends_still :]
        start, nodes = (x, levels[0]), []
        for i, (here, there) in enumerate(pairwise(levels)):
            predicted = mean = denoise(x, here)
            node = Node(u[i], self._output(predicted, here))
            if i and orders[i] > 1 and math.isfinite(nodes[0].u) and math.isfinite(u[i + 1]):
                nodes.append(node)
                F = self.mean_output(nodes, nodes[0].u, u[i + 1])
                mean = recover(start[0], F, start[1], self.target)
            else:
                start, nodes = (x, here), [node]
            x = self._step(mean, start[1], there, noise)
            yield Step(i, there, x, predicted.x0)

    def orders(self, steps: int, *, clean: bool) -> list[int]:
        """The order of each step of a grid; clean: whether it ends without noise."""
        orders = [1 + i % self.order for i in range(steps)]
        if clean or (self.lower_order_final != "never" and steps % self.order == 0):
            orders[-1] = 1
        return orders

    def mean_output(self, nodes: Sequence[Node], u: float, u_next: float) -> Tensor:
        if len(nodes) == 3 and self.solver_type == "midpoint":  # by its ends alone
            ends = (nodes[0], nodes[-1])
            return replace(self, solver_type="heun").mean_output(ends, u, u_next)
        return super().mean_output(nodes, u, u_next)


@dataclass(frozen=True, kw_only=True)
class Pndm(Multistep):
    """A Multistep whose first steps take more evaluations (PNDM 2202.09778)."""

    start: str = "heun"
    """Heun's method for the first step (one more evaluation, at its end), or Runge and Kutta's for
    the first three (three more each, in the middle and at the end)."""

    def _start(
        self, i: int, denoise: Denoise, x: Tensor, predicted: Prediction, here: Level, there: Level
    ) -> Prediction | None:
        whole = self.start == "runge_kutta"
        if i >= (3 if whole else 1) or not there.sigma or not self._recovers(here):
            return None
        t = (here.t + there.t) / 2
        mid = self.path.level(t if self.path.continuous else math.floor(t))
        stages = [(mid, 2), (mid, 2), (there, 1)] if whole else [(there, 1)]
        total = F = self._output(predicted, here)
        for level, weight in stages:
            ahead = denoise(transition(*recover(x, F, here, self.target), level), level)
            F = self._output(ahead, level)
            total = total + weight * F
        return recover(x, total / (6 if whole else 2), here, self.target)


@dataclass(frozen=True, kw_only=True)
class TwoStage(Sampler):
    """F* = F + (F_mid - F) / (2 r), F_mid from a second evaluation at a share r of the step.

    It is of second order in the variable that the target is the velocity by: rho for eps, t for
    flow, 1 / rho for x0. A step without such a level, out of alpha = 0 or into sigma = 0, is of
    first order and takes one evaluation.
    """

    r: float = 0.5
    """Share in lam; 1 = the end of the step."""
    solver_type: str = "midpoint"
    """First moment of the two outputs: one half (midpoint), or exact (heun)."""
    noisy_stage: bool = False
    """Whether the step to the second evaluation has fresh noise of its own; without, it is the
    deterministic part of the step."""
    shared_noise: bool = False
    """Whether the whole step keeps what is left of that noise: both lie on one path of the SDE."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Where in the step, in lam, the network is asked again."""
        return (self.r,)

    def evaluations(self, steps: int) -> int:
        return steps * (1 + len(self.shares))

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise
    ) -> Iterator[Step]:
        for i, (here, there) in enumerate(pairwise(levels)):
            x, here = self._churn(x, here, len(levels) - 1, noise)
            predicted = denoise(x, here)
            mean, kept = self.staged(denoise, x, predicted, here, there, noise)
            x = self._arrived(mean, here, there, noise, kept if self.shared_noise else None)[0]
            yield Step(i, there, x, predicted.x0)

    def staged(
        self,
        denoise: Denoise,
        x: Tensor,
        predicted: Prediction,
        here: Level,
        there: Level,
        noise: Noise,
    ) -> tuple[Prediction, tuple[Level, Tensor | None] | None]:
        """The mean x0 and eps of a step, by the outputs within it; and the last of their levels
        with the fresh noise that is in its x_t."""
        mean, own = predicted, self._unguided(predicted, x, here)
        kept, guess = None, own
        mids = [self._mid(here, there, share) for share in self.shares]
        F = self._output(own, here)
        further = (*self.shares, 1.0)[1:]
        for share, next_share, mid in zip(self.shares, further, mids, strict=True):
            if mid is None:
                return predicted, None
            level = kept if self.shared_noise else None
            x_mid, fresh = self._arrived(guess, here, mid, noise, level, staged=True)
            kept = mid, fresh
            inner = self._unguided(denoise(x_mid, mid), x_mid, mid)
            change = self._output(inner, mid) - F
            if self.solver_type == "midpoint":
                change = change / (2 * share / next_share)
            else:
                h = next_share / share * (mid.half_log_snr - here.half_log_snr)
                change = change * (moments(self._rate * h, 2)[1] * next_share / share)
            guess = recover(x, F + change, here, self.target)
            mean = self._guided(guess, predicted.x0 - own.x0, here)
        return mean, kept

    def _arrived(
        self,
        mean: Prediction,
        here: Level,
        there: Level,
        noise: Noise,
        kept: tuple[Level, Tensor | None] | None,
        staged: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x_t at `there`, and the fresh noise in it; kept: a level before it, and the noise there
        that it has a share of. staged: whether that is within a step."""
        kappa = 0.0 if staged and not self.noisy_stage else self._kappa(here, there)
        fresh = None
        level, before = kept or (here, None)
        if kappa and before is not None:
            left = math.exp(self.eta * (level.half_log_snr - there.half_log_snr))
            fresh = there.sigma / level.sigma * left * before
            if more := self._kappa(level, there):
                fresh = fresh + more * (self.s_noise * noise(level, there))
        elif kappa:
            fresh = kappa * (self.s_noise * noise(here, there))
        x = transition(*mean, there, kappa)
        return self._pasted(x if fresh is None else x + fresh, there), fresh

    def _mid(self, here: Level, there: Level, share: float) -> Level | None:
        """The level at a share of the step; none where the step is of first order."""
        kappa = 0.0 if self.noisy_stage else self._kappa(here, there)
        if not self._recovers(here) or not (old := _other_leg(there.sigma, kappa)):
            return None
        if share == 1 and not kappa:
            return there
        start, end = here.half_log_snr, math.log(there.alpha / old)
        lam = end if share == 1 else start + share * (end - start)
        return self.path.at_half_log_snr(lam) if math.isfinite(lam) else None


@dataclass(frozen=True, kw_only=True)
class ThreeStage(TwoStage):
    """A TwoStage with one more evaluation, further on, by which alone the step then goes
    (SEEDS-3, 2305.14267; DPM-Solver-3, 2206.00927)."""

    r_1: float = 1 / 3
    r_2: float = 2 / 3
    """Shares in lam of the second evaluation and of the third."""
    solver_type: str = "heun"

    @property
    def shares(self) -> tuple[float, ...]:
        return (self.r_1, self.r_2)
