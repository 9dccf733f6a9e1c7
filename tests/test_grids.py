"""Grids against diffusers' schedulers, scipy, and published tables."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
from diffusers.schedulers.scheduling_utils import AysSchedules

from difftool.diffusion import GRIDS, PATHS, Path
from difftool.diffusion.grids import beta_quantile
from difftool.diffusion.path import Discrete, Flow, build_path
from difftool.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = (4, 10, 20, 27, 30, 50)


def scheduler(name: str, n: int, mu: float | None = None, **config: Any) -> Any:
    built = getattr(diffusers, name)(**config)
    built.set_timesteps(n, **({} if mu is None else {"mu": mu}))
    return built


def levels(name: str, path: Path, n: int, **options: Any):
    """The levels that are evaluated: the end is left out."""
    return GRIDS[name](path, n, **options)[:-1]


# --- against diffusers: times -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "options", "theirs", "config"),
    [
        ("leading", {}, "DDIMScheduler", {}),
        ("leading", {"offset": 1}, "DDIMScheduler", {"steps_offset": 1}),
        ("leading", {"offset": 1}, "DDPMScheduler", {"steps_offset": 1}),
        ("leading", {"offset": 1}, "EulerDiscreteScheduler",
         {"steps_offset": 1, "timestep_spacing": "leading"}),
        ("trailing", {}, "DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("trailing", {}, "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("trailing", {}, "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("linspace", {}, "DDIMScheduler", {"timestep_spacing": "linspace"}),
        ("linspace", {}, "DDPMScheduler", {"timestep_spacing": "linspace"}),
        ("normal", {}, "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("linspace_open", {}, "DPMSolverMultistepScheduler", {}),
        ("linspace_open", {}, "UniPCMultistepScheduler", {}),
        ("linspace_open", {}, "DEISMultistepScheduler", {}),
        ("leading_open", {"offset": 1}, "DPMSolverMultistepScheduler",
         {"timestep_spacing": "leading", "steps_offset": 1}),
        ("lcm", {}, "LCMScheduler", {}),
        ("lcm", {"original_steps": 100}, "LCMScheduler", {"original_inference_steps": 100}),
        ("lcm", {}, "TCDScheduler", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", STEPS)
def test_times_of_diffusers(grid: str, options: dict, theirs: str, config: dict, n: int):
    ours = [level.t for level in levels(grid, PATHS["sd15"](), n, **options)]
    assert ours == pytest.approx(scheduler(theirs, n, **SD, **config).timesteps.tolist(), abs=1e-4)


# --- against diffusers: noise scales -------------------------------------------------------------

LEADING = {"range": {"kind": "leading", "offset": 1}}
EULER_LEADING = {"timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize(
    ("grid", "options", "theirs", "config"),
    [
        ("karras", {}, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("exponential", {}, "DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
        ("lu", {}, "DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("beta_sigma", {}, "DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
        ("karras", {}, "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("karras", LEADING, "EulerDiscreteScheduler", {"use_karras_sigmas": True, **EULER_LEADING}),
        ("exponential", LEADING, "EulerDiscreteScheduler",
         {"use_exponential_sigmas": True, **EULER_LEADING}),
        ("beta_sigma", LEADING, "EulerDiscreteScheduler",
         {"use_beta_sigmas": True, **EULER_LEADING}),
        ("karras", {"range": "trailing"}, "EulerDiscreteScheduler",
         {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
        ("karras", {"range": "normal"}, "EulerDiscreteScheduler",
         {"use_karras_sigmas": True, "timestep_spacing": "linspace"}),
        ("karras", {"sigma_min": 0.1, "sigma_max": 10}, "EulerDiscreteScheduler",
         {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", STEPS)
def test_scales_of_diffusers(grid: str, options: dict, theirs: str, config: dict, n: int):
    ours = [level.rho for level in levels(grid, PATHS["sd15"](), n, **options)]
    expected = scheduler(theirs, n, **SD, **config).sigmas[:n].tolist()
    assert ours == pytest.approx(expected, rel=2e-5)  # their rho_0 is the root of an fp32 1 - bar


@pytest.mark.parametrize("n", STEPS)
def test_karras_times_of_diffusers(n: int):
    """DPM-Solver rounds t under Karras; Euler keeps the fraction."""
    dpm = scheduler("DPMSolverMultistepScheduler", n, **SD, use_karras_sigmas=True)
    ours = levels("karras", PATHS["sd15"](), n)
    assert ours[0].t == 999
    assert ours[-1].t == 0
    assert [round(level.t) for level in ours] == dpm.timesteps.tolist()
    euler = scheduler("EulerDiscreteScheduler", n, **SD, use_karras_sigmas=True, **EULER_LEADING)
    ours = levels("karras", PATHS["sd15"](), n, **LEADING)
    assert [level.t for level in ours] == pytest.approx(euler.timesteps.tolist(), abs=2e-3)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("karras", [False, True])
def test_terminal_alpha_bar_is_diffusers_floor(n: int, karras: bool):
    theirs = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    euler = scheduler("EulerDiscreteScheduler", n, **theirs, use_karras_sigmas=karras)
    grid, options = ("karras", {"range": "trailing"}) if karras else ("trailing", {})
    ours = levels(grid, PATHS["sd21-zsnr"](), n, terminal_alpha_bar=2**-24, **options)
    assert ours[0].rho == pytest.approx(4096, rel=1e-6)
    rhos = [level.rho for level in ours]
    assert rhos == pytest.approx(euler.sigmas[:-1].tolist(), rel=3e-4)
    assert GRIDS["trailing"](PATHS["sd21-zsnr"](), n)[0] == (999.0, 0.0, 1.0)


@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("n", STEPS)
def test_edm_grid(kind: str, n: int):
    edm = scheduler("EDMEulerScheduler", n, sigma_schedule=kind)
    ours = GRIDS[kind](PATHS["edm"](), n)
    assert [level.sigma for level in ours] == pytest.approx(edm.sigmas.tolist(), rel=1e-6)


def test_edm_paper_equation_5():
    ours = GRIDS["karras"](PATHS["edm"](), 18)
    for i, level in enumerate(ours[:-1]):
        sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert level.sigma == pytest.approx(sigma, rel=1e-12)
    assert ours[-1] == (0.0, 1.0, 0.0)


# --- flow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "path", "options", "theirs", "config"),
    [
        ("sd3", Flow(), {}, "FlowMatchEulerDiscreteScheduler", {}),
        ("sd3", Flow(shift=3), {}, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("sd3", Flow(shift=3), {}, "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("sd3", Flow(shift=3), {"shift_terminal": 0.1}, "FlowMatchEulerDiscreteScheduler",
         {"shift": 3.0, "shift_terminal": 0.1}),
        ("sd3", Flow(shift=math.exp(0.8)), {"twice": False}, "FlowMatchEulerDiscreteScheduler",
         {"use_dynamic_shifting": True}),
        ("normal", Flow(shift=math.exp(0.8)), {}, "FlowMatchEulerDiscreteScheduler",
         {"use_dynamic_shifting": True}),
        ("flow_dpm", Flow(shift=3), {}, "DPMSolverMultistepScheduler",
         {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
        ("sgm_uniform", Flow(shift=3), {}, "UniPCMultistepScheduler",
         {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", STEPS)
def test_flow_grids_of_diffusers(grid, path, options, theirs, config, n):
    mu = 0.8 if "use_dynamic_shifting" in config else None
    expected = scheduler(theirs, n, mu, **config).sigmas.tolist()
    if "Heun" in theirs:
        expected = expected[::2]  # the inner levels are repeated
    ours = [level.sigma for level in GRIDS[grid](path, n, **options)]
    assert ours[:n] == pytest.approx(expected[:n], rel=3e-6, abs=2e-6)  # UniPC: t = 1 - 1e-6


def test_uniform_flow():
    for name in ("trailing", "uniform"):
        times = [level.t for level in GRIDS[name](PATHS["flow"](), 30)]
        assert times == pytest.approx([1 - i / 30 for i in range(31)], abs=1e-15)


def test_karras_on_flow_divides_t():
    times = [level.t for level in levels("karras", PATHS["flow"](), 10)]
    roots = [t ** (1 / 7) for t in times]
    assert (times[0], times[-1]) == pytest.approx((1, 0.001))
    assert np.diff(roots) == pytest.approx([(0.001 ** (1 / 7) - 1) / 9] * 9)


# --- as published elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("n", STEPS)
def test_index_grids_of_comfyui_and_k_diffusion(n: int):
    beta = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * 999)
    expected = {
        "normal": np.linspace(999, 0, n),
        "sgm_uniform": np.linspace(999, 0, n + 1)[:-1],
        "simple": [999 - int(i * 1000 / n) for i in range(n)],
        "ddim_uniform": np.arange(1, 1000, 1000 // n)[::-1],
        "beta": beta,
        "beta57": np.rint(
            scipy.stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.5, 0.7) * 999
        ),
    }
    for name, times in expected.items():
        ours = [level.t for level in levels(name, PATHS["sd15"](), n)]
        assert ours == pytest.approx(list(times), abs=1e-9), name


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_scale_grids_of_comfyui(n: int):
    lo, hi = 0.0291671582, 14.6146412293
    ramp = np.arange(n) / max(n - 1, 1)
    first, last = n // 2, n - n // 2
    line = [i * 0.025 / first for i in range(first)]
    square = []
    if first:  # as Mochi writes it out
        a = (first - 0.025 * n) / (first * last**2)
        b = 0.025 / first - 2 * (first - 0.025 * n) / last**2
        square = [a * i**2 + b * i + a * first**2 for i in range(first, n)]
    expected = {
        "kl_optimal": np.tan(ramp * math.atan(lo) + (1 - ramp) * math.atan(hi)),
        "linear_quadratic": hi * (1 - np.array([*line, *square] if n > 1 else [0.0])),
    }
    for name, scales in expected.items():
        ours = [level.rho for level in levels(name, PATHS["sd15"](), n)]
        assert ours == pytest.approx(scales.tolist(), rel=1e-8), name


def test_polyexponential():
    lo, hi = 0.0291671582, 14.6146412293
    ramp = np.linspace(1, 0, 12) ** 1.7
    expected = np.exp(ramp * (math.log(hi) - math.log(lo)) + math.log(lo))
    ours = [level.rho for level in levels("polyexponential", PATHS["sd15"](), 12, rho=1.7)]
    assert ours == pytest.approx(expected.tolist(), rel=1e-8)


@pytest.mark.parametrize(
    ("table", "times", "published"),
    [
        ("sd1", "StableDiffusionTimesteps", "StableDiffusionSigmas"),
        ("sdxl", "StableDiffusionXLTimesteps", "StableDiffusionXLSigmas"),
        ("svd", None, "StableDiffusionVideoSigmas"),
    ],
)
def test_align_your_steps(table: str, times: str | None, published: str):
    ours = levels("ays", PATHS["sd15"](), 10, table=table)
    rhos = [level.rho for level in ours]
    assert rhos == pytest.approx(AysSchedules[published][:10], rel=0.02)  # to 3 decimals, of t
    if times:
        assert [round(level.t) for level in ours] == pytest.approx(AysSchedules[times], abs=0.5)
    twenty = [level.rho for level in levels("ays", PATHS["sd15"](), 20, table=table)]
    assert twenty[::2] == pytest.approx(rhos)
    assert twenty[1] == pytest.approx(math.sqrt(rhos[0] * rhos[1]))


def test_explicit_levels():
    path = PATHS["sd15"]()
    assert [level.t for level in GRIDS["explicit"](path, 2, times=[999, 499])] == [999, 499, -1]
    assert [level.rho for level in levels("explicit", path, 2, sigmas=[9.0, 0.5])] == pytest.approx(
        [9, 0.5]
    )
    with pytest.raises(UsageError, match="does not fit"):
        GRIDS["explicit"](path, 3, times=[999, 499])
    with pytest.raises(UsageError, match="noisy to clean"):
        GRIDS["explicit"](path, 2, times=[499, 999])
    with pytest.raises(UsageError, match="times or sigmas"):
        GRIDS["explicit"](path, 2)


# --- what holds for all ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_on_every_path(grid: str, path: str):
    """n + 1 distinct finite levels from noisy to clean, or a reason why not."""
    for n in (1, 2, 7, 20, 50):
        options: Any = {"times": [PATHS[path]().at_index(i).t for i in range(n)][::-1]}
        options = options if grid == "explicit" else {}
        try:
            found = GRIDS[grid](PATHS[path](), n, **options)
        except UsageError as error:
            infinite = path == "sd21-zsnr" and "finite range" in str(error)
            assert infinite or (grid in ("sd3", "flow_dpm") and path != "flow")
            continue
        if n == 1 or grid not in ("beta", "ddim_uniform"):  # these repeat or overshoot as published
            assert len(found) == n + 1
        snrs = [level.half_log_snr for level in found]
        assert all(a < b for a, b in pairwise(snrs))
        assert all(math.isfinite(number) for level in found for number in level)
        assert found[-1] == PATHS[path]().clean


@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_of_steps_that_do_not_fit(grid: str):
    path = PATHS["flow" if grid in ("sd3", "flow_dpm") else "sd15"]()
    for n in (0, -3, 1001):
        with pytest.raises(UsageError, match="does not fit"):
            GRIDS[grid](path, n)


def test_steps_beyond_what_a_grid_can_tell_apart():
    for grid, n, options in (("leading_open", 1000, {}), ("lcm", 51, {})):
        with pytest.raises(UsageError, match="noisy to clean"):
            GRIDS[grid](PATHS["sd15"](), n, **options)
    with pytest.raises(UsageError, match="outside"):
        GRIDS["leading"](PATHS["sd15"](), 1000, offset=1)


def test_ends():
    path = PATHS["sd15"]()
    first = GRIDS["leading"](path, 20, offset=1, end="first")
    assert first[-1] == path.level(0)
    assert len(first) == 21
    assert GRIDS["leading"](path, 20, end="first")[-2:] == [path.level(50), path.level(0)]
    assert GRIDS["trailing"](path, 20, end="none") == GRIDS["trailing"](path, 20)[:-1]
    with pytest.raises(UsageError, match="no step"):
        GRIDS["trailing"](path, 1, end="none")
    with pytest.raises(UsageError, match="cannot end"):
        GRIDS["trailing"](path, 20, end="zero")


@pytest.mark.parametrize(
    ("grid", "path", "options", "said"),
    [
        ("trailing", "sd15", {"ofset": 1}, 'no option "ofset"'),
        ("leading", "sd15", {"ofset": 1}, 'did you mean "offset"'),
        ("karras", "sd15", {"roh": 7}, 'did you mean "rho"'),
        ("karras", "sd15", {"range": "tabel"}, "no schedule"),
        ("karras", "sd15", {"sigma_min": 20}, "finite range"),
        ("karras", "sd21-zsnr", {}, "terminal_alpha_bar"),
        ("karras", "sd15", {"rho": 0}, "wrong option"),
        ("trailing", "flow", {"terminal_alpha_bar": 2**-24}, "discrete"),
        ("ays", "sd15", {"table": "sd3"}, "no table"),
        ("lcm", "sd15", {"original_steps": 0}, "wrong option"),
    ],
)
def test_wrong_options_are_the_users_error(grid: str, path: str, options: dict, said: str):
    with pytest.raises(UsageError) as error:
        GRIDS[grid](PATHS[path](), 20, **options)
    assert said in str(error.value)


def test_any_table_length():
    times = [level.t for level in GRIDS["trailing"](Discrete(steps=250), 10)]
    assert times == [249, 224, 199, 174, 149, 124, 99, 74, 49, 24, -1]


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.1, 2), (1, 1), (3, 0.5), (20, 30)])
def test_beta_quantile(a: float, b: float):
    for share in np.linspace(0, 1, 41):
        expected = scipy.stats.beta.ppf(share, a, b)
        assert beta_quantile(share, a, b) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_whole_product_goes_down_or_says_why():
    """Distinct levels for every schedule, path, end and number of steps, or the real reason."""
    reasons = (
        "belongs to flow models", "needs a finite range", "has no step to take",
        "two levels fall together", "it was distilled on",
    )  # fmt: skip
    paths = [
        {"kind": "scaled_linear"}, {"kind": "linear"}, {"kind": "cosine"}, {"kind": "flow"},
        {"kind": "sd21-zsnr"}, {"kind": "edm"},
    ]  # fmt: skip
    for options in paths:
        path = build_path(options)
        for name in GRIDS.keys() - {"explicit"}:
            for end in ("clean", "first", "none"):
                for n in (1, 2, 7, 20):
                    try:
                        levels = GRIDS[name](path, n, end=end)
                    except UsageError as error:
                        assert any(why in str(error) for why in reasons), (name, options, end, n)
                        # What a single step leaves no room for is the only thing refused there.
                        if "no step" in str(error) or "fall together" in str(error):
                            assert n == 1, (name, options, end, n)
                        continue
                    lams = [level.half_log_snr for level in levels]
                    assert all(a < b for a, b in pairwise(lams))


def test_a_terminal_level_belongs_to_more_than_one_step():
    for n, times in ((1, [1.0, 0.0]), (2, [1.0, 0.1, 0.0])):
        levels = GRIDS["sd3"](PATHS["flow"](shift=3.0), n, shift_terminal=0.1)
        assert [level.t for level in levels] == pytest.approx(times)
