"""Grids: which n levels of a path a sampler visits, noisy to clean. Torch-free.

GRIDS[name](path, n, **options) gives n levels, and the level where the last step ends:

    end                  "clean" (no noise left), "first" (entry 0 of the table), "none" (no end
                         level: the last step ends at the last of the n)
    drop_penultimate     whether the grid is one of n + 1 levels without the last but one, which
                         k-diffusion's DPM2 has for the sake of its second stage
    terminal_alpha_bar   lower bound of alpha_bar at the noisiest entry (2^-24 in diffusers)
    lookup               how noise scales run between the table's entries: "log" or "linear"
    time                 what the network is told of a fractional time: "exact", "nearest", "floor"
    lam_min              of an index grid: lowest log(alpha / sigma) of the entries that it divides

Index grids divide the table's indices, 0 .. T-1, and fit every path through `path.at_index`. Scale
grids divide the noise scale `path.k_sigma`; their options are the ends of the range,

    range                "table" (all of the path) or the index grid whose ends bound this one: its
                         name, or {kind: NAME, option: value, ...}
    sigma_min, sigma_max ends given as such
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from difftool.diffusion.path import Discrete, Flow, Level, Path
from difftool.errors import UsageError, suggestion
from difftool.registry import Registry, call


@dataclass(frozen=True)
class Grid:
    """A grid is a row: its kind says what `function` divides, the rest is the same for all.

    index   (T, n, **options) -> indices of a table of T entries; with `rounds` it is given what
            rounds an index too: half to even on a table, nothing on a continuous path
    scale   (hi, lo, n, **options) -> noise scales
    level   (path, n, **options) -> levels
    """

    name: str
    kind: Literal["index", "scale", "level"]
    function: Callable[..., Sequence[Any]]
    about: str
    """One line for lists and help."""
    aliases: tuple[str, ...] = ()
    """Other tools' spellings of the name."""
    rounds: bool = False
    a1111: str | None = None
    """A1111's name of it; None = it has none."""

    def __call__(
        self, path: Path, n: int, *, drop_penultimate: bool = False, **options: Any
    ) -> list[Level]:
        """n levels and the end, noisy to clean; UsageError if the path has no such levels."""
        levels = self._whole(path, n + drop_penultimate, **options)
        return [*levels[:-2], levels[-1]] if drop_penultimate else levels

    def _whole(
        self,
        path: Path,
        n: int,
        *,
        end: str = "clean",
        terminal_alpha_bar: float | None = None,
        lookup: str | None = None,
        time: str | None = None,
        lam_min: float | None = None,
        **options: Any,
    ) -> list[Level]:
        what = f'schedule "{self.name}"'
        if not 1 <= n <= path.steps:
            why = f"steps = {n}, the noise path has {path.steps}"
            raise UsageError("the number of steps does not fit", why)
        table = {"terminal_alpha_bar": terminal_alpha_bar, "lookup": lookup, "time": time}
        if table := {name: value for name, value in table.items() if value is not None}:
            if not isinstance(path, Discrete):
                raise UsageError(f"{next(iter(table))} belongs to discrete noise paths")
            path = call(what, partial(replace, path), **table)
        if lam_min is not None:
            if self.kind != "index":
                raise UsageError("lam_min belongs to schedules that divide the table's indices")
            options["lam_min"] = lam_min
        divided = {"index": self._indices, "scale": self._scales, "level": self._levels}[self.kind]
        levels = [_at_network_time(level, time) for level in divided(what, path, n, options)]
        return _checked(what, _ended(levels, path, end), n)

    def _levels(self, what: str, path: Path, n: int, options: dict[str, Any]) -> Sequence[Level]:
        return call(what, self.function, path, n, **options)

    def _indices(self, what: str, path: Path, n: int, options: dict[str, Any]) -> Sequence[Level]:
        entries, lam_min = path.steps, options.pop("lam_min", None)
        if lam_min is not None:
            entries = sum(path.at_index(i).half_log_snr >= lam_min for i in range(entries))
        given = (entries, n)
        if self.rounds:
            given = (*given, (lambda index: index) if path.continuous else round)
        return [path.at_index(index) for index in call(what, self.function, *given, **options)]

    def _scales(self, what: str, path: Path, n: int, options: dict[str, Any]) -> Sequence[Level]:
        noisy, clean = _range(path, n, options.pop("range", "table"))
        hi, lo = options.pop("sigma_max", None), options.pop("sigma_min", None)
        hi = path.k_sigma(noisy) if hi is None else hi
        lo = path.k_sigma(clean) if lo is None else lo
        if not 0 < lo <= hi < math.inf or (lo == hi and n > 1):
            hint = "set terminal_alpha_bar or sigma_max, or choose another schedule"
            raise UsageError(f"{what} needs a finite range", f"{lo:g} to {hi:g}", hint)
        scales = call(what, self.function, hi, lo, n, **options)
        return [path.at_k_sigma(scale) for scale in scales]


def _range(path: Path, n: int, within: str | Mapping[str, Any]) -> tuple[Level, Level]:
    """The noisiest and the cleanest level of a scale grid."""
    if within == "table":
        return path.level(path.t_max), path.level(path.t_min)
    options: dict[str, Any] = {"kind": within} if isinstance(within, str) else dict(within)
    levels = GRIDS[str(options.pop("kind", ""))](path, n, **options)
    return levels[0], levels[-2]


def _at_network_time(level: Level, time: str | None) -> Level:
    """The level at the time that the network is given."""
    whole = {"nearest": round, "floor": math.floor}.get(time or "")
    return level if whole is None else level._replace(t=float(whole(level.t)))


ROUNDING = 1e-9
"""The length of a step, in log(alpha / sigma), under which it is none."""


def _ended(levels: list[Level], path: Path, end: str) -> list[Level]:
    if end not in ("clean", "first", "none"):
        raise UsageError(f'a schedule cannot end at "{end}"', hint="choose clean, first or none")
    last = {"clean": path.clean, "first": path.at_index(0), "none": levels[-1]}[end]
    step = last.half_log_snr - levels[-1].half_log_snr
    # A step of length 0 is no step, whatever rounding makes of it.
    return levels if last == levels[-1] or abs(step) < ROUNDING else [*levels, last]


def _checked(what: str, levels: list[Level], n: int) -> list[Level]:
    if len(levels) < 2:
        raise UsageError(f"{what} has no step to take", f"steps = {n}", "take more steps")
    for here, there in pairwise(levels):
        if not here.half_log_snr < there.half_log_snr:
            why = f"steps = {n}: from t = {here.t:g} to t = {there.t:g}"
            if here.half_log_snr == there.half_log_snr:
                why = f"steps = {n}: two levels fall together at t = {here.t:g}"
            raise UsageError(f"{what} does not go from noisy to clean", why, "take fewer steps")
    return levels


def _ramp(n: int) -> list[float]:
    """n even shares from 0 to 1; a single one is 0, the noisy end."""
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.0]


# --- index grids: T = path.steps entries, i the step ------------------------------------------


Whole = Callable[[float], float]


def _even(last: float, n: int) -> list[float]:
    """n even numbers from last to 0, to the bit as numpy's linspace: published roundings of halves
    depend on it."""
    step = last / max(n - 1, 1)
    return [last, *(i * step for i in range(n - 2, -1, -1))]


def _leading(T: int, n: int, offset: int = 0) -> Sequence[float]:
    """DDIM, DDPM, PNDM and the Euler family of diffusers; Stable Diffusion 1 has offset 1."""
    return [i * (T // n) + offset for i in reversed(range(n))]


def _leading_open(T: int, n: int, offset: int = 0) -> Sequence[float]:
    """The "leading" of diffusers' DPM-Solver, UniPC and DEIS."""
    return [i * (T // (n + 1)) + offset for i in range(n, 0, -1)]


def _trailing(T: int, n: int, whole: Whole) -> Sequence[float]:
    """From the noisiest entry on (2305.08891, section 3.3); 1 - i/n on a flow."""
    return [whole(T - i * T / n) - 1 for i in range(n)]


def _linspace(T: int, n: int, whole: Whole) -> Sequence[float]:
    """Both ends of the table: DDIM, DDPM, PNDM."""
    return [whole(index) for index in _even(T - 1, n)]


def _linspace_open(T: int, n: int, whole: Whole) -> Sequence[float]:
    """linspace of n + 1, without index 0: diffusers' DPM-Solver, UniPC and DEIS."""
    return [whole(index) for index in _even(T - 1, n + 1)[:-1]]


def _normal(T: int, n: int) -> Sequence[float]:
    """linspace, never rounded: k-diffusion, ComfyUI, the Euler family of diffusers."""
    return _even(T - 1, n)


def _sgm_uniform(T: int, n: int) -> Sequence[float]:
    """linspace_open, never rounded: sgm, ComfyUI; on a flow, diffusers' UniPC."""
    return _even(T - 1, n + 1)[:-1]


def _simple(T: int, n: int) -> Sequence[float]:
    """ComfyUI."""
    return [T - 1 - i * T // n for i in range(n)]


def _ddim_uniform(T: int, n: int) -> Sequence[float]:
    """ComfyUI; as published it takes more than n steps where n does not divide T."""
    return list(range(1, T, T // n))[::-1]


def _lcm(T: int, n: int, original_steps: int = 50, strength: float = 1.0) -> Sequence[float]:
    """Every so many of the steps that an LCM was distilled on (2310.04378); strength: of the
    cleanest such share of them."""
    stride, steps = T // original_steps, int(original_steps * strength)
    if n > steps or not stride:
        why = f"steps = {n}, and it was distilled on {original_steps}"
        why += f", of which strength {strength:g} leaves {steps}" if strength != 1 else ""
        raise UsageError(
            "an LCM does not go from noisy to clean in so many steps", why, "take fewer"
        )
    return [stride * (steps - steps * i // n) - 1 for i in range(n)]


def _beta(T: int, n: int, alpha: float = 0.6, beta: float = 0.6) -> Sequence[float]:
    """Quantiles of a beta distribution over the index (2407.12173, ComfyUI); repeats dropped."""
    shares = (beta_quantile(1 - i / n, alpha, beta) for i in range(n))
    return list(dict.fromkeys(round(share * (T - 1)) for share in shares))


# --- scale grids: from noise scale hi to lo ---------------------------------------------------


def karras(hi: float, lo: float, n: int, rho: float = 7.0) -> Sequence[float]:
    """EDM (2206.00364, eq. 5)."""
    a, b = hi ** (1 / rho), lo ** (1 / rho)
    return [(a + share * (b - a)) ** rho for share in _ramp(n)]


def _polyexponential(hi: float, lo: float, n: int, rho: float = 1.0) -> Sequence[float]:
    """k-diffusion."""
    return [lo * (hi / lo) ** ((1 - share) ** rho) for share in _ramp(n)]


def _exponential(hi: float, lo: float, n: int) -> Sequence[float]:
    """Even in log noise scale: k-diffusion, DPM-Solver; diffusers' Lu rounds its t."""
    return [hi * (lo / hi) ** share for share in _ramp(n)]


def _beta_sigma(
    hi: float, lo: float, n: int, alpha: float = 0.6, beta: float = 0.6
) -> Sequence[float]:
    """Quantiles of a beta distribution over the noise scale: diffusers' use_beta_sigmas."""
    return [lo + (hi - lo) * beta_quantile(1 - share, alpha, beta) for share in _ramp(n)]


def _kl_optimal(hi: float, lo: float, n: int) -> Sequence[float]:
    """Even in the angle of sigma, which is least in KL divergence (2404.14507, appendix): ComfyUI,
    and A1111, which ends above 0."""
    return [math.tan((1 - share) * math.atan(hi) + share * math.atan(lo)) for share in _ramp(n)]


def _linear_quadratic(
    hi: float, lo: float, n: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Sequence[float]:
    """Evenly down by that share in the first half of the steps, or as many, then a parabola whose
    slope goes on and which ends at 0: Mochi, ComfyUI."""
    first = n // 2 if linear_steps is None else linear_steps
    if n == 1:
        return [hi]
    if not 0 < first < n:
        raise ValueError(f"linear_steps = {first} of {n} steps")
    slope, left = threshold_noise / first, n - first
    bend = (1 - threshold_noise - slope * left) / left**2
    after = (slope * i + bend * max(i - first, 0) ** 2 for i in range(n))
    return [hi * (1 - gone) for gone in after]


# --- grids of their own kind ------------------------------------------------------------------

# Align Your Steps (2404.14507): rho of 10 steps.
AYS = {
    "sd1": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def _ays(path: Path, n: int, table: str = "sd1") -> list[Level]:
    """Optimised for one model; other numbers of steps interpolate log rho."""
    if table not in AYS:
        raise UsageError(f'there is no table "{table}"', hint=suggestion(table, AYS))
    logs = [math.log(rho) for rho in AYS[table]]
    places = [divmod(i * (len(logs) - 1) / n, 1) for i in range(n)]
    values = [logs[int(k)] + share * (logs[int(k) + 1] - logs[int(k)]) for k, share in places]
    return [path.at_half_log_snr(-value) for value in values]


def _sd3(
    path: Path, n: int, twice: bool = True, shift_terminal: float | None = None
) -> list[Level]:
    """diffusers' FlowMatch schedulers. As published, the end of the range is shifted twice.

    shift_terminal: t of the last level, to which all are stretched. diffusers' dynamic shifting is
    twice = False on a path of shift e^mu.
    """
    flow = _flow(path)
    last = flow.shifted(1 / flow.steps) if twice else 1 / flow.steps
    times = [flow.shifted(1 + share * (last - 1)) for share in _ramp(n)]
    if shift_terminal is not None and n > 1:  # a single one is the noisy end
        stretch = (1 - shift_terminal) / (1 - times[-1])
        times = [1 - (1 - t) * stretch for t in times]
    return [flow.level(t) for t in times]


def _flow_dpm(path: Path, n: int) -> list[Level]:
    """diffusers' DPM-Solver and DEIS on a flow: starts below t = 1."""
    flow = _flow(path)
    return [flow.level(flow.shifted((1 - 1 / flow.steps) * (1 - i / n))) for i in range(n)]


def _flow(path: Path) -> Flow:
    if isinstance(path, Flow):
        return path
    raise UsageError("this schedule belongs to flow models", hint="choose trailing or karras")


def _explicit(
    path: Path,
    n: int,
    times: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> list[Level]:
    """A list of times in the path's unit, or of noise scales; n of them, noisy to clean."""
    if (times is None) == (sigmas is None):
        raise UsageError('schedule "explicit" needs either times or sigmas')
    levels = [path.level(t) for t in times or ()] or [path.at_k_sigma(s) for s in sigmas or ()]
    if len(levels) != n:
        raise UsageError("the list of levels does not fit", f"{len(levels)} levels, {n} steps")
    return levels


# --- the rows ----------------------------------------------------------------------------------

GRIDS: Registry[Grid] = Registry("schedule")

for row in (
    Grid("leading", "index", _leading, "every T/n-th entry from 0: DDIM, DDPM, PNDM, Euler"),
    Grid("leading_open", "index", _leading_open, "every T/(n+1)-th entry: diffusers' DPM-Solver"),
    Grid(
        *("trailing", "index", _trailing, "every T/n-th entry back from T; 1 - i/n on a flow"),
        aliases=("uniform", "turbo", "sd_turbo"),
        rounds=True,
    ),
    Grid("linspace", "index", _linspace, "both ends of the table, rounded", rounds=True),
    Grid(
        *("linspace_open", "index", _linspace_open, "linspace of n + 1 without entry 0, rounded"),
        rounds=True,
    ),
    Grid(
        *("normal", "index", _normal, "both ends of the table, never rounded"),
        aliases=("discrete",),
        a1111="Normal",
    ),
    Grid(
        *("sgm_uniform", "index", _sgm_uniform, "normal of n + 1 without entry 0: sgm, ComfyUI"),
        a1111="SGM Uniform",
    ),
    Grid("simple", "index", _simple, "every T/n-th entry back from T - 1: ComfyUI", a1111="Simple"),
    Grid(
        *("ddim_uniform", "index", _ddim_uniform, "every T/n-th entry from 1: ComfyUI"),
        aliases=("ddim",),
        a1111="DDIM",
    ),
    Grid("lcm", "index", _lcm, "every so many of the steps an LCM was distilled on"),
    Grid("beta", "index", _beta, "quantiles of a beta distribution over the index", a1111="Beta"),
    Grid("beta57", "index", partial(_beta, alpha=0.5, beta=0.7), "beta of 0.5 and 0.7: RES4LYF"),
    Grid("karras", "scale", karras, "even in sigma^(1/rho), rho = 7 (EDM)", a1111="Karras"),
    Grid(
        *("polyexponential", "scale", _polyexponential, "a power of even steps in log sigma"),
        a1111="Polyexponential",
    ),
    Grid(
        *("exponential", "scale", _exponential, "even in log sigma"),
        aliases=("lu",),
        a1111="Exponential",
    ),
    Grid(
        *("kl_optimal", "scale", _kl_optimal, "even in arctan sigma: ComfyUI, A1111"),
        a1111="KL Optimal",
    ),
    Grid("linear_quadratic", "scale", _linear_quadratic, "even, then a parabola: Mochi, ComfyUI"),
    Grid("beta_sigma", "scale", _beta_sigma, "quantiles of a beta distribution over sigma"),
    Grid(
        *("ays", "level", _ays, "Align Your Steps: optimised for SD1, SDXL or SVD"),
        aliases=("align_your_steps", "align_your_steps_11"),
        a1111="Align Your Steps",
    ),
    Grid(
        *("sd3", "level", _sd3, "diffusers' FlowMatch schedulers, the end shifted twice"),
        aliases=("flow_match",),
    ),
    Grid("flow_dpm", "level", _flow_dpm, "diffusers' DPM-Solver on a flow"),
    Grid("explicit", "level", _explicit, "a list of times or of sigmas"),
):
    GRIDS.add(row.name, row, *row.aliases)

for names, hint in (
    ("align_your_steps_GITS gits align_your_steps_32 ays_30 ays_32 ays+",
     "ays has the published table, and explicit takes a list of sigmas of your own"),
    ("bong_tangent smoothstep laplace cosine vp sqrt_linear ltxv ltxv_image constant",
     "kl_optimal, beta and karras are near; explicit takes a list of sigmas of your own"),
    ("default", "leave --schedule out for the model's own"),
    ("epsilon v_prediction linear scaled_linear squaredcos_cap_v2 sigmoid",
     "that is a noise path, which the model was trained on; --schedule spaces the steps"),
):  # fmt: skip
    GRIDS.answer(names, hint)


# --- the beta distribution --------------------------------------------------------------------


def beta_quantile(share: float, a: float, b: float) -> float:
    """x with I_x(a, b) = share, by bisection: 60 halvings leave nothing of a double."""
    lo, hi = 0.0, 1.0
    if share <= lo or share >= hi:
        return min(max(share, lo), hi)
    for _ in range(60):
        x = (lo + hi) / 2
        lo, hi = (x, hi) if _beta_cdf(x, a, b) < share else (lo, x)
    return (lo + hi) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function, as a continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    fraction = 1.0
    for m in range(40, 0, -1):  # converges geometrically on this side; backwards it cannot overflow
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * fraction)
