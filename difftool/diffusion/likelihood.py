"""Likelihood: how many bits a dimension of x0 takes under a model, and at which noise levels.

With z the point at the cleanest level that is used, drawn as x_t is, and l = log SNR,

    bits of x0  =  bits of z under the model  -  bits that its noise brought  +  bits of x0 given z

    first two   <=  KL(z_T || N(0, I)) + 1/2 int |eps - eps*|^2 dl     the variational bound in
                                        continuous time (2107.00630, section 4; 2303.00848, eq. 14)
                =   log q(z | x0) - log p(z)       by the probability-flow ODE (2011.13456, eq. 39),
                                        its divergence by Hutchinson's estimator

Both depend on the noise path by log SNR alone, so all is computed where alpha^2 + sigma^2 = 1, of
any path and target. They are the same where the network's eps* is that of a density. Else the bound
has a slack, which `slack` measures, and the ODE's density is another one than the bound's.

The last term, of values that are one of 256 (pixels): z dequantises them, by the path's own noise
(2305.03935), and a Gaussian around the network's x0 reads them from it, discretised as in DDPM
(2006.11239, eq. 13). It is one of DEVIATIONS, z at one of the intervals' edges, all as likely.
Values that are continuous (latents) are not read from z: what is measured is the density of
z / alpha at the path's cleanest level, or at CLEANEST, whose bits may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.path import Level, Path

BINS = 255
"""Steps between -1 and 1 of values that are one of 256."""
LOWEST = -8.0
"""Log SNR at which a path's noisy end is taken, if it goes beyond."""
CLEANEST = 8.0
"""Log SNR at which a density is measured, if the path goes beyond: there noise is a hundredth of
the latents, and what is below it is not learned."""
DEVIATIONS = 33
"""Of the Gaussian of the last term: each a quarter of an octave below the one before, the first the
noise itself."""
INTERVALS = 8
"""Of log SNR, by which bits are told apart."""
DRAWS = 8
"""Points z of a picture, each with a probe of its own for the ODE."""
BATCH = 16
"""Points that a network is given at a time, at most."""

Done = Callable[[int], None]
"""Called with how many evaluations of the network are done."""


class Spent(NamedTuple):
    """Bits per dimension that a picture takes, by where they go."""

    levels: list[float]
    """In each interval of log SNR, from the noisiest."""
    errors: list[float]
    """Standard error of each."""
    prior: float
    """Beyond the noisiest level."""
    data: float
    """Below the cleanest one."""
    error: float
    """Standard error of the sum, from the noise that was drawn."""
    steps_error: float = 0.0
    """What the steps of a solver may be off by."""

    @property
    def total(self) -> float:
        """Bits per dimension."""
        return sum(self.levels) + self.prior + self.data

    @property
    def uncertainty(self) -> float:
        """Of the total, from both errors."""
        return math.hypot(self.error, self.steps_error)

    def __str__(self) -> str:
        return f"{self.total:.3f} ± {self.uncertainty:.3f}"

    def facts(self) -> dict[str, float]:
        """The sum and what is not told apart by level, as JSON."""
        parts = {"prior": self.prior, "data": self.data, "steps_error": self.steps_error}
        return {"bits": self.total, "error": self.uncertainty} | parts


class Tight(NamedTuple):
    """Bits per dimension of a picture by the bound without its slack; see `slack`."""

    total: float
    uncertainty: float

    def __str__(self) -> str:
        return f"{self.total:.3f} ± {self.uncertainty:.3f}"


class Likelihood(NamedTuple):
    """Of a picture under a model."""

    edges: list[float]
    """Ends of the intervals of log SNR that are counted, from the noisy end to where z is."""
    bound: Spent
    flow: Spent
    """By the probability-flow ODE."""
    maps: Tensor
    """[n,H,W], fp32: bits of the bound in each interval and place, summed over channels."""
    dimensions: int
    """Of x0."""
    discrete: bool
    """Whether they are one of 256 values, as pixels are; else their bits are those of a density."""
    tight: Tight | None = None
    """Measured where the bound is above the ODE by more than chance."""

    @property
    def difference(self) -> tuple[float, float]:
        """Bound less ODE, and what it may be off by; z, which both have in common, is not in it."""
        apart = self.bound.total - self.flow.total
        return apart, math.hypot(self.bound.uncertainty, self.flow.uncertainty)

    def facts(self) -> dict[str, Any]:
        """What is not told apart by level, as JSON."""
        apart, error = self.difference
        return {
            "of": "pixels" if self.discrete else "latents",
            "dimensions": self.dimensions,
            "log_snr": self.edges[-1],
            "bound": self.bound.facts(),
            "flow": self.flow.facts(),
            "difference": apart,
            "difference_error": error,
            "tight": self.tight and {"bits": self.tight.total, "error": self.tight.uncertainty},
        }


def log_snr_range(path: Path, *, discrete: bool) -> tuple[float, float]:
    """log(alpha^2 / sigma^2) at the noisy and at the clean end of what is measured of values that
    are discrete or not."""
    noisy, clean = (2 * path.level(t).half_log_snr for t in (path.t_max, path.t_min))
    return max(noisy, LOWEST), clean if discrete else min(clean, CLEANEST)


def _edges(path: Path, discrete: bool) -> list[float]:
    low, high = log_snr_range(path, discrete=discrete)
    return [low + (high - low) * i / INTERVALS for i in range(INTERVALS + 1)]


def predict(denoiser: Denoiser, x: Tensor, log_snr: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """The network's x0 and eps, fp32, at x [B,C,H,W] of levels log_snr [B], in coordinates where
    alpha^2 + sigma^2 = 1."""
    found = [denoiser.path.at_half_log_snr(value / 2) for value in log_snr.tolist()]
    level = Level(*cast(Any, torch.tensor(found, dtype=torch.float32, device=x.device).T))
    scale = torch.hypot(cast(Tensor, level.alpha), cast(Tensor, level.sigma))
    return denoiser.predict(x * scale.view(-1, 1, 1, 1), level, cond)


def _alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """With alpha^2 + sigma^2 = 1, [B,1,1,1], fp32."""
    column = log_snr.double().view(-1, 1, 1, 1)
    return column.sigmoid().sqrt().float(), (-column).sigmoid().sqrt().float()


@torch.no_grad()
def noise_errors(
    denoiser: Denoiser, x0: Tensor, cond: Cond, log_snr: Tensor, eps: Tensor
) -> Tensor:
    """|eps - eps*|^2 / 2 of each value [B,C,H,W] at levels log_snr [B]: nats a unit of log SNR."""
    alpha, sigma = _alpha_sigma(log_snr.to(x0.device))
    return (eps - predict(denoiser, alpha * x0 + sigma * eps, log_snr, cond)[1]) ** 2 / 2


def prior_nats(x0: Tensor, low: float) -> Tensor:
    """KL(q(z_T | x0) || N(0, I)) of each picture [B], the noisy end at log SNR `low`."""
    signal = 1 / (1 + math.exp(-low))
    each = signal * x0.double() ** 2 - signal - math.log1p(-signal)  # its variance is 1 - signal
    return each.flatten(1).sum(1) / 2


@torch.no_grad()
def read_nats(denoiser: Denoiser, x0: Tensor, cond: Cond, log_snr: Tensor, eps: Tensor) -> Tensor:
    """The last term of each picture [B] of values that are one of 256, from the noise eps of its z
    at log_snr [B]."""
    alpha, sigma = _alpha_sigma(log_snr.to(x0.device))
    mean = predict(denoiser, alpha * x0 + sigma * eps, log_snr, cond)[0].double()
    noise = (sigma / alpha).double()
    each = [
        log_mass(x0.double(), mean, noise * 2 ** (-k / 4)).flatten(1).sum(1)
        for k in range(DEVIATIONS)
    ]
    return math.log(DEVIATIONS * INTERVALS) - torch.stack(each).logsumexp(0)


def entropy_nats(high: float) -> float:
    """The last term of each continuous value: what the noise of z / alpha brought."""
    return (math.log(2 * math.pi * math.e) - high) / 2


def log_mass(x: Tensor, mean: Tensor, deviation: Tensor | float) -> Tensor:
    """log of a Gaussian's mass in the bin of each x, of BINS steps in [-1, 1]; the first and the
    last bin have the tails. All fp64."""
    low = torch.where(x < -1 + 0.5 / BINS, -torch.inf, (x - 1 / BINS - mean) / deviation)
    high = torch.where(x > 1 - 0.5 / BINS, torch.inf, (x + 1 / BINS - mean) / deviation)
    flip = low + high > 0  # to the side on which a mass keeps its digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper = torch.special.log_ndtr(high)
    ratio = (torch.special.log_ndtr(low) - upper).clamp(max=-1e-15)
    return upper + torch.log(-torch.expm1(ratio))


# --- of one picture --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A picture whose likelihood is estimated, and how."""

    denoiser: Denoiser
    x0: Tensor
    """[1,C,H,W]"""
    cond: Cond
    """Of the one picture."""
    discrete: bool
    """Whether values are one of 256 between -1 and 1."""
    steps: int
    """Points of log SNR at which the bound is evaluated, about; the ODE takes a quarter as many."""
    seed: int = 0

    def conds(self, count: int) -> Cond:
        """The condition for so many points."""
        return Cond(*(v if v is None else v.expand(count, *v.shape[1:]) for v in self.cond))

    def noise(self, count: int, stream: int) -> Tensor:
        """Unit noise for so many points, [count,C,H,W]."""
        generator = torch.Generator().manual_seed(4 * self.seed + stream)
        return torch.randn(count, *self.x0.shape[1:], generator=generator).to(self.x0.device)

    @property
    def unit(self) -> float:
        """Nats of the picture that are a bit a dimension."""
        return self.x0[0].numel() * math.log(2)

    @property
    def pairs(self) -> int:
        """Of evaluations of the bound in each interval."""
        return max(1, round(self.steps / 2 / INTERVALS))

    @property
    def flow_steps(self) -> int:
        """Of the ODE in each interval; even."""
        return 2 * max(1, round(self.steps / 8 / INTERVALS))

    @property
    def evaluations(self) -> int:
        """Of the network, at most: calls for `done`."""
        return INTERVALS * (2 * self.pairs + 3 * self.flow_steps)


def likelihood(measured: Measured, done: Done = lambda count: None) -> Likelihood:
    """Both estimates of a picture's likelihood.

    An interval is divided into equal parts with two evaluations of the bound each, by whose
    difference its error is known. The ODE is solved by Heun's method, from DRAWS points z, and once
    more in half as many steps, by which it is extrapolated and its error known.
    """
    m, edges = measured, _edges(measured.denoiser.path, measured.discrete)
    levels, errors, maps = _bound_levels(m, edges, done)
    eps, prior = m.noise(DRAWS, 0), prior_nats(m.x0, edges[0]).item() / m.unit
    if m.discrete:
        found = [_read(m, eps, high) for high in edges[1:]]
        sums = [sum(levels[: n + 1]) + nats.mean().item() for n, nats in enumerate(found)]
        count = 1 + min(range(len(sums)), key=sums.__getitem__)
        data = found[count - 1]
    else:
        bits = entropy_nats(edges[-1]) / math.log(2)
        count, data = INTERVALS, torch.full((DRAWS,), bits, dtype=torch.float64)
    edges, levels, errors = edges[: count + 1], levels[:count], errors[:count]
    error = math.hypot((data.std() / DRAWS**0.5).item(), *errors)
    bound = Spent(levels, errors, prior, data.mean().item(), error)
    before = 2 * m.pairs * INTERVALS
    flow = _flow(m, eps, data, edges, lambda calls: done(before + calls))
    return Likelihood(edges, bound, flow, maps[:count], m.x0[0].numel(), m.discrete)


def _read(m: Measured, eps: Tensor, high: float) -> Tensor:
    """The last term from each z, in bits a dimension, [K]."""
    count = len(eps)
    at = torch.full((count,), high)
    nats = read_nats(m.denoiser, m.x0.expand_as(eps), m.conds(count), at, eps)
    return nats.cpu() / m.unit


def _bound_levels(
    m: Measured, edges: list[float], done: Done
) -> tuple[list[float], list[float], Tensor]:
    """Bits a dimension in each interval, their errors, and in each place of the picture."""
    count, calls = 2 * m.pairs, 0
    generator = torch.Generator().manual_seed(4 * m.seed + 1)
    levels, errors, maps = [], [], []
    for k, (low, high) in enumerate(pairwise(edges)):
        places = (torch.arange(count) // 2 + torch.rand(count, generator=generator)) / m.pairs
        eps, parts = m.noise(count, 4 * k + 6), []
        points = (low + (high - low) * places).split(BATCH)
        for log_snr, some in zip(points, eps.split(BATCH), strict=True):
            x0, cond = m.x0.expand_as(some), m.conds(len(some))
            parts.append(noise_errors(m.denoiser, x0, cond, log_snr, some))
            calls += len(some)
            done(calls)
        nats = torch.cat(parts) * (high - low)
        each = _steadied(nats, eps).cpu() / m.unit
        levels.append(each.mean().item())
        errors.append((each[::2] - each[1::2]).square().sum().sqrt().item() / count)
        maps.append(nats.sum(1).mean(0).cpu() / math.log(2))
    return levels, errors, torch.stack(maps)


def _steadied(nats: Tensor, eps: Tensor) -> Tensor:
    """The sum over each of the points [N,C,H,W], without what it has from |eps|^2, which on average
    is the number of values; the share of that in it is taken from a pair's other point, so that the
    mean stays what it is. fp64."""
    sums, squares = (part.double().flatten(1).sum(1) for part in (nats, eps**2))
    other = (sums / squares).view(-1, 2).flip(1).flatten()
    return sums - other * (squares - eps[0].numel())


def _flow(m: Measured, eps: Tensor, data: Tensor, edges: list[float], done: Done) -> Spent:
    probes = m.noise(len(eps), 2).sign()
    intervals, steps = len(edges) - 1, m.flow_steps
    fine = _solve(m, eps, probes, edges, steps, done)
    before = 2 * steps * intervals
    coarse = _solve(m, eps, probes, edges, steps // 2, lambda calls: done(before + calls))
    bits = (fine + (fine - coarse) / 3) / m.unit
    sums = bits.sum(1)
    off = (fine.sum(1) - coarse.sum(1)).mean().abs().item() / 3 / m.unit
    means, errors = bits.mean(0).tolist(), (bits.std(0) / len(bits) ** 0.5).tolist()
    error = ((sums + data).std() / len(sums) ** 0.5).item()
    return Spent(means[:-1], errors[:-1], means[-1], data.mean().item(), error, off)


def _solve(
    m: Measured, eps: Tensor, probes: Tensor, edges: list[float], steps: int, done: Done
) -> Tensor:
    """log q(z | x0) - log p(z) of each z [K, n + 1], in nats: in each interval, in so many steps
    of it, and at the noisy end."""
    alpha, sigma = _alpha_sigma(torch.tensor([edges[-1]], device=m.x0.device))
    x, calls = alpha * m.x0 + sigma * eps, 0
    nats = torch.zeros(len(eps), len(edges), dtype=torch.float64)
    for k in range(len(edges) - 1, 0, -1):
        h = (edges[k - 1] - edges[k]) / steps
        for i in range(steps):
            log_snr = edges[k] + i * h
            dx, rate = _velocity(m, x, log_snr, probes)
            dx_next, rate_next = _velocity(m, x + h * dx, log_snr + h, probes)
            x = x + h / 2 * (dx + dx_next)
            nats[:, k - 1] -= h / 2 * (rate + rate_next)
            calls += 2
            done(calls)
    sigma = _alpha_sigma(torch.tensor([edges[0]]))[1].item()
    ends = (x.double() ** 2 - eps.double() ** 2).flatten(1).sum(1).cpu() / 2
    nats[:, -1] = ends - m.x0[0].numel() * math.log(sigma)
    return nats


def _velocity(m: Measured, x: Tensor, log_snr: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """dx / dlog_snr, and the nats that are spent a unit of it, [K].

    With v = alpha eps* - sigma x0*, which is dx / darctan(sigma / alpha), they are - alpha sigma v
    / 2 and alpha (alpha D - sigma div v) / 2: the growth of the noise's own volume is taken off.
    """
    levels = torch.full((len(x),), log_snr)
    alpha, sigma = (part.item() for part in _alpha_sigma(levels[:1]))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0, eps = predict(m.denoiser, x, levels, m.conds(len(x)))
        v = alpha * eps - sigma * x0
        (pulled,) = torch.autograd.grad(v, x, probes)
    divergence = (pulled * probes).double().flatten(1).sum(1).cpu()
    rate = alpha * (alpha * x[0].numel() - sigma * divergence) / 2
    return -alpha * sigma / 2 * v.detach(), rate


# --- of a set --------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """What is known of samples of a set from one level and one z each, in bits a dimension; [B]."""

    interval: Tensor
    """In which the level lies."""
    rate: Tensor
    """Of the interval, were it like this level."""
    prior: Tensor
    edge: Tensor
    """At which z lies, from 1 to INTERVALS."""
    data: Tensor


def sample_bits(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    *,
    u: Tensor,
    eps: Tensor,
    edge: Tensor,
    discrete: bool,
) -> Sampled:
    """Of pictures x0 [B,C,H,W], each at the share u [B] in (0, 1) of the levels, with z at an edge
    [B], both by the same noise eps."""
    edges = _edges(denoiser.path, discrete)
    low, high = edges[0], edges[-1]
    unit, width = x0[0].numel() * math.log(2), (high - low) / INTERVALS
    errors = noise_errors(denoiser, x0, cond, low + (high - low) * u.cpu(), eps)
    if discrete:
        data = read_nats(denoiser, x0, cond, torch.tensor(edges)[edge.cpu()], eps) / unit
    else:
        edge = torch.full_like(edge, INTERVALS)
        data = torch.full((len(x0),), entropy_nats(high) / math.log(2))
    return Sampled(
        (u * INTERVALS).long().clamp(max=INTERVALS - 1).cpu(),
        errors.double().flatten(1).sum(1).cpu() * width / unit,
        prior_nats(x0, low).cpu() / unit,
        edge.cpu(),
        data.double().cpu(),
    )


def mean_bits(samples: Sequence[Sampled]) -> tuple[float, float]:
    """The variational bound of a set from samples of it, bits a dimension, with z where that is
    lowest, and the standard error; not finite where an interval has no sample."""
    interval, rate, prior, edge, data = (torch.cat(part) for part in zip(*samples, strict=True))
    levels = [_mean(rate[interval == k]) for k in range(INTERVALS)]
    found = []
    for count in range(1, INTERVALS + 1):
        parts = [_mean(data[edge == count]), _mean(prior), *levels[:count]]
        values, errors = zip(*parts, strict=True)
        found.append((sum(values), math.hypot(*errors)))
    whole = [each for each in found if math.isfinite(sum(each))]
    return min(whole, default=(math.nan, math.nan))


def _mean(values: Tensor) -> tuple[float, float]:
    """And its standard error: infinite of one, nan of none."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.inf
    return values.mean().item(), error
