"""The noise path: x_t = alpha x0 + sigma eps. Torch-free; tables are fp64.

discrete   alpha^2 + sigma^2 = 1, a table of `steps` entries, t its index (may be fractional)
flow       alpha = 1 - t, sigma = t, t in [0, 1]
edm        alpha = 1, sigma = t
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from difftool.diffusion.prediction import SIGMA_DATA
from difftool.errors import UsageError, suggestion
from difftool.registry import Registry, call

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Level(NamedTuple):
    """A point of the path. Python floats; in training the same three as tensors, [B,1,1,1]."""

    t: float
    """In the path's own unit; -1 for the clean end of a discrete path."""
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma); +inf where there is no noise, -inf where there is nothing else."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf

    @property
    def rho(self) -> float:
        """sigma / alpha, the "sigma" of k-diffusion; inf at alpha = 0."""
        return self.sigma / self.alpha if self.alpha else math.inf

    def mix(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x_t of this level; [B,C,H,W]."""
        return self.alpha * x0 + self.sigma * eps


class Path(Protocol):
    """How alpha and sigma run from data to noise, and how a network is told where it is."""

    steps: int
    """Entries of the table; a continuous path is seen as this many entries by index grids."""
    continuous: ClassVar[bool] = True
    """Whether times between the entries are as good as the entries."""

    def level(self, t: float) -> Level:
        """The level at time t."""
        ...

    def at_index(self, index: float) -> Level:
        """The level at a place in the table: 0 the cleanest entry, steps - 1 the noisiest."""
        ...

    def at_half_log_snr(self, value: float) -> Level:
        """The level whose log(alpha / sigma) is `value`."""
        ...

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of times t [B], each [B,1,1,1], fp32, on t's device."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """The training time at a share u in (0, 1) of the path, from clean to noisy; [B]."""
        ...

    def nearest_time(self, log_rho: Tensor) -> Tensor:
        """The training time whose log(sigma / alpha) is nearest to that; [B]."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding receives for times t."""
        ...

    def input_scale(self, sigma: Any) -> Any:
        """Factor on x_t at the network's door."""
        return 1.0

    @property
    def t_min(self) -> float:
        """The cleanest time that a network is evaluated at."""
        return self.at_index(0).t

    @property
    def t_max(self) -> float:
        """The noisiest time."""
        return self.at_index(self.steps - 1).t

    @property
    def clean(self) -> Level:
        """The end without noise, where no network is evaluated."""
        return Level(0.0, 1.0, 0.0)

    def k_sigma(self, level: Level) -> float:
        """The noise scale that Karras-like grids divide: sigma / alpha, except on a flow."""
        return level.rho

    def at_k_sigma(self, value: float) -> Level:
        """The level of that noise scale."""
        return self.at_half_log_snr(-math.log(value))


MAX_STEPS = 100_000
"""Entries of a table: published ones have 1000."""


def _check_steps(steps: int) -> None:
    if not 2 <= steps <= MAX_STEPS:
        raise UsageError(f"a noise path has 2 to {MAX_STEPS} steps", f"steps = {steps}")


# --- discrete --------------------------------------------------------------------------------


def _linspace(first: float, last: float, n: int) -> list[float]:
    return [first + (last - first) * i / (n - 1) for i in range(n)]


def _cosine(steps: int, *_: float) -> list[float]:
    """Improved DDPM (2102.09672), eq. 17."""
    bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return [min(1 - b / a, 0.999) for a, b in pairwise(bar)]


SCHEDULES: dict[str, Callable[[int, float, float], list[float]]] = {
    "linear": lambda n, lo, hi: _linspace(lo, hi, n),
    "scaled_linear": lambda n, lo, hi: [b * b for b in _linspace(lo**0.5, hi**0.5, n)],
    "cosine": _cosine,
    "sigmoid": lambda n, lo, hi: [lo + (hi - lo) / (1 + math.exp(-u)) for u in _linspace(-6, 6, n)],
}
"""(steps, beta_start, beta_end) -> betas; published numbers belong to diffusers' names."""


@dataclass(frozen=True)
class Discrete(Path):
    """A table: alpha_i^2 = prod_{j <= i} (1 - beta_j), sigma_i^2 = 1 - alpha_i^2."""

    schedule: str = "scaled_linear"
    """Name of the beta schedule, from SCHEDULES."""
    steps: int = 1000
    """Entries of the table; of a continuous path, those that index grids divide."""
    beta_start: float = 0.00085
    """The first beta, as the schedule reads it."""
    beta_end: float = 0.012
    """The last one."""
    betas: Sequence[float] | None = None
    """The betas themselves, in place of a schedule."""
    zero_snr: bool = False
    """Rescaled to alpha = 0 exactly at the last entry (2305.08891, algorithm 1)."""
    terminal_alpha_bar: float = 0.0
    """Lower bound of alpha_bar at the last entry; 2^-24 in some published samplers."""
    lookup: Literal["log", "linear"] = "log"
    """How rho = sigma / alpha runs between entries: log-linear (k-diffusion) or linear."""
    time: Literal["exact", "nearest", "floor"] = "exact"
    """How a fractional t is told to the network."""
    continuous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            what = f'there is no beta schedule "{self.schedule}"'
            raise UsageError(what, hint=suggestion(self.schedule, SCHEDULES))
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(map(float, self.betas)))
            object.__setattr__(self, "steps", len(self.betas))
        _check_steps(self.steps)
        ends = self.betas or (self.beta_start, self.beta_end)
        if not all(0 < beta <= 1 for beta in ends):
            raise UsageError("every beta of a noise schedule must lie in (0, 1]")
        if not 0 <= self.terminal_alpha_bar < 1:
            why = f"terminal_alpha_bar = {self.terminal_alpha_bar}"
            raise UsageError("alpha_bar lies in [0, 1)", why)
        for option, value, known in (
            ("lookup", self.lookup, ("log", "linear")),
            ("time", self.time, ("exact", "nearest", "floor")),
        ):
            if value not in known:
                why, hint = f"{option} = {value}", suggestion(str(value), known)
                raise UsageError("the noise path has a wrong option", why, hint)

    @cached_property
    def _betas(self) -> Sequence[float]:
        return self.betas or SCHEDULES[self.schedule](self.steps, self.beta_start, self.beta_end)

    @cached_property
    def _table(self) -> list[Level]:
        alphas = list(accumulate(((1 - beta) ** 0.5 for beta in self._betas), operator.mul))
        if self.zero_snr:
            first, last = alphas[0], alphas[-1]
            alphas = [(a - last) * first / (first - last) for a in alphas]
        alphas[-1] = max(alphas[-1], self.terminal_alpha_bar**0.5)
        return [Level(float(t), a, (1 - a * a) ** 0.5) for t, a in enumerate(alphas)]

    @cached_property
    def _log_rho(self) -> list[float]:
        return [-level.half_log_snr for level in self._table]

    def _between(self, f: Any, a0: Any, s0: Any, a1: Any, s1: Any) -> tuple[Any, Any]:
        """alpha, sigma at a share f in (0, 1) between two entries; both interpolations of rho are
        written without a division, so alpha = 0 at the far entry is the limit of small alpha."""
        if self.lookup == "log":
            alpha, sigma = a0 ** (1 - f) * a1**f, s0 ** (1 - f) * s1**f
        else:
            alpha, sigma = a0 * a1, (1 - f) * s0 * a1 + f * s1 * a0
        r = (alpha**2 + sigma**2) ** 0.5
        return alpha / r, sigma / r

    def level(self, t: float) -> Level:
        if t == -1:
            return self.clean
        if not 0 <= t <= self.steps - 1:
            why = f"t = {t:g}, the table has entries 0 to {self.steps - 1}"
            raise UsageError("a time lies outside of the noise path", why)
        below = int(t)
        here = self._table[below]
        if t == below:
            return here
        _, a1, s1 = self._table[below + 1]
        return Level(t, *self._between(t - below, here.alpha, here.sigma, a1, s1))

    def at_index(self, index: float) -> Level:
        return self.level(float(index))

    def at_half_log_snr(self, value: float) -> Level:
        """alpha and sigma are exact at any value; t, linear in log rho, is clamped to the table,
        and rounded so that the entries of the table are found again."""
        log_rho, table = -value, self._log_rho
        below = min(max(bisect_right(table, log_rho) - 1, 0), self.steps - 2)
        lo, hi = table[below], table[below + 1]
        share = 1.0 if log_rho == hi else (log_rho - lo) / (hi - lo)
        alpha, sigma = 1 / math.hypot(1, math.exp(log_rho)), 1 / math.hypot(1, math.exp(value))
        return Level(round(below + min(max(share, 0.0), 1.0), 9), alpha, sigma)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas, sigmas, _ = _tensors(self, t.device)
        below = t.long()
        alpha, sigma = alphas[below], sigmas[below]
        if t.is_floating_point():
            above, f = (below + 1).clamp(max=self.steps - 1), (t - below).float()
            between = self._between(f, alpha, sigma, alphas[above], sigmas[above])
            alpha, sigma = (b.where(f > 0, a) for a, b in zip((alpha, sigma), between, strict=True))
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    def quantile(self, u: Tensor) -> Tensor:
        return (u * self.steps).long().clamp(0, self.steps - 1)

    def nearest_time(self, log_rho: Tensor) -> Tensor:
        table = _tensors(self, log_rho.device)[2]
        return (table - log_rho[:, None].float()).abs().argmin(1)

    def network_time(self, t: Tensor) -> Tensor:
        if self.time == "exact":
            return t
        return t.round() if self.time == "nearest" else t.floor()

    @property
    def clean(self) -> Level:
        return Level(-1.0, 1.0, 0.0)


@lru_cache(maxsize=16)
def _tensors(path: Discrete, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and log rho of the table as fp32 tensors."""
    import torch

    _, alphas, sigmas = zip(*path._table, strict=True)
    with torch.inference_mode(False):  # whoever asks first, training may use them
        alpha, sigma, log_rho = torch.tensor((alphas, sigmas, path._log_rho), device=device).float()
    return alpha, sigma, log_rho


# --- continuous ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow(Path):
    """Rectified flow: the straight line from data to noise (2209.03003, SD3 2403.03206)."""

    shift: float = 1.0
    """Divides alpha / sigma of the training times and of the grids: t <- s t / (1 + (s - 1) t)."""
    steps: int = 1000

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not 0 < self.shift < math.inf:
            raise UsageError("a flow path needs shift > 0", f"shift = {self.shift}")

    def shifted(self, t: Any) -> Any:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def level(self, t: float) -> Level:
        if not 0 <= t <= 1:
            raise UsageError("a time lies outside of the noise path", f"t = {t:g}, not in [0, 1]")
        return Level(t, 1 - t, t)

    def at_index(self, index: float) -> Level:
        return self.level(self.shifted((index + 1) / self.steps))

    def at_half_log_snr(self, value: float) -> Level:
        sigma = 1 / (1 + math.exp(value))
        return Level(sigma, 1 / (1 + math.exp(-value)), sigma)

    def k_sigma(self, level: Level) -> float:
        return level.t

    def at_k_sigma(self, value: float) -> Level:
        return self.level(value)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float().view(-1, 1, 1, 1)
        return 1 - t, t

    def quantile(self, u: Tensor) -> Tensor:
        return self.shifted(u)

    def nearest_time(self, log_rho: Tensor) -> Tensor:
        return log_rho.sigmoid()

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * t


@dataclass(frozen=True)
class Edm(Path):
    """Noise added to unscaled data (EDM, 2206.00364); t is sigma."""

    sigma_min: float = 0.002
    """The cleanest level that is trained on."""
    sigma_max: float = 80.0
    """The noisiest one."""
    sigma_data: float = SIGMA_DATA
    """Scale of the data that the network's input is normalised with."""
    steps: int = 1000

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            why = f"sigma_min = {self.sigma_min}, sigma_max = {self.sigma_max}"
            raise UsageError("an EDM path needs 0 < sigma_min < sigma_max", why)
        if not 0 < self.sigma_data < math.inf:
            raise UsageError("an EDM path needs sigma_data > 0", f"sigma_data = {self.sigma_data}")

    def level(self, t: float) -> Level:
        if not 0 <= t < math.inf:
            raise UsageError("a time lies outside of the noise path", f"sigma = {t:g}")
        return Level(t, 1.0, t)

    def at_index(self, index: float) -> Level:
        return self.level(self.quantile(index / (self.steps - 1)))

    def at_half_log_snr(self, value: float) -> Level:
        return self.level(math.exp(-value))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float().view(-1, 1, 1, 1)
        return sigma.new_ones(sigma.shape), sigma

    def quantile(self, u: Any) -> Any:
        return self.sigma_min ** (1 - u) * self.sigma_max**u

    def nearest_time(self, log_rho: Tensor) -> Tensor:
        return log_rho.exp()

    def network_time(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def input_scale(self, sigma: Any) -> Any:
        return (sigma**2 + self.sigma_data**2) ** -0.5


# --- presets ---------------------------------------------------------------------------------

PATHS: Registry[Callable[..., Path]] = Registry("noise path")
PATHS.add("discrete", Discrete, about="a table of betas, of options of your own")
PATHS.add(
    *("linear", partial(Discrete, "linear", beta_start=1e-4, beta_end=0.02), "ddpm"),
    about="beta even from 1e-4 to 0.02 (DDPM, 2006.11239)",
)
PATHS.add(
    *("scaled_linear", partial(Discrete, "scaled_linear"), "sd15", "sdxl"),
    about="sqrt(beta) even from 0.00085 to 0.012: Stable Diffusion 1, 2 and XL",
)
PATHS.add(
    *("sd21-zsnr", partial(Discrete, "scaled_linear", zero_snr=True)),
    about="scaled_linear, rescaled to no signal at all at its end (2305.08891)",
)
PATHS.add(
    *("cosine", partial(Discrete, "cosine"), "squaredcos_cap_v2"),
    about="alpha falls as a cosine (Improved DDPM, 2102.09672)",
)
PATHS.add(
    *("sigmoid", partial(Discrete, "sigmoid", beta_start=1e-4, beta_end=0.02)),
    about="beta rises as a sigmoid from 1e-4 to 0.02 (GeoDiff, 2203.02923)",
)
PATHS.add(
    *("flow", Flow, "rectified_flow", "flow_matching"),
    about="a straight line from data to noise (rectified flow, 2209.03003; SD3)",
)
PATHS.add("edm", Edm, "ve", about="noise of growing sigma on unscaled data (EDM, 2206.00364)")


def build_path(options: Mapping[str, Any]) -> Path:
    """The path that a preset describes: {kind: NAME, option: value, ...}."""
    options = dict(options)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise UsageError("the noise path has no kind", hint=suggestion("", PATHS))
    return call(f'noise path "{kind}"', PATHS[kind], **options)
