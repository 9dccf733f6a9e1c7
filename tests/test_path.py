"""Noise paths against diffusers' tables, k-diffusion's lookups and the papers' formulas."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from difftool.diffusion import PATHS, Level, build_path
from difftool.diffusion.path import Discrete, Edm, Flow
from difftool.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}


def test_levels_know_their_snr():
    assert Level(0.0, 1.0, 0.0).half_log_snr == math.inf
    assert Level(0.0, 0.0, 1.0).half_log_snr == -math.inf
    assert Level(0.0, 0.0, 1.0).rho == math.inf
    assert math.isclose(Level(0.0, 0.6, 0.3).half_log_snr, math.log(2))


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        (PATHS["linear"](), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (PATHS["sd15"](), {"beta_schedule": "scaled_linear", **SD}),
        (
            PATHS["sd21-zsnr"](),
            {"beta_schedule": "scaled_linear", **SD, "rescale_betas_zero_snr": True},
        ),
        (PATHS["cosine"](), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            PATHS["cosine"](steps=250),
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 250},
        ),
        (PATHS["sigmoid"](), {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
        (PATHS["discrete"](betas=[0.1, 0.3, 0.2]), {"trained_betas": [0.1, 0.3, 0.2]}),
    ],
)
def test_tables_are_diffusers(path: Discrete, theirs: dict):
    bars = DDPMScheduler(**{"num_train_timesteps": path.steps, **theirs}).alphas_cumprod.double()
    ours = torch.tensor([path.level(t).alpha ** 2 for t in range(path.steps)], dtype=torch.float64)
    torch.testing.assert_close(ours, bars, rtol=2e-4, atol=2e-7)  # theirs is an fp32 product
    for t in (0, path.steps // 2, path.steps - 1):
        level = path.level(t)
        assert math.isclose(level.alpha**2 + level.sigma**2, 1, rel_tol=1e-14)


def test_published_numbers_of_stable_diffusion():
    path = PATHS["sd15"]()
    assert math.isclose(path.level(0).rho, 0.0291671582, rel_tol=1e-8)
    assert math.isclose(path.level(999).rho, 14.6146412293, rel_tol=1e-10)
    assert math.isclose(path.level(999).alpha, 0.0682649, rel_tol=1e-6)
    assert math.isclose(path.level(999).sigma, 0.9976672, rel_tol=1e-7)


def test_zero_terminal_snr_is_exact():
    path = PATHS["sd21-zsnr"]()
    assert path.level(999) == (999.0, 0.0, 1.0)
    assert math.isclose(path.level(998).alpha, 4.436e-4, rel_tol=1e-4)
    assert path.level(0).alpha == PATHS["sd15"]().level(0).alpha
    ddim = DDIMScheduler(beta_schedule="scaled_linear", **SD, rescale_betas_zero_snr=True)
    assert ddim.alphas_cumprod[-1] == 0
    floored = Discrete(zero_snr=True, terminal_alpha_bar=2**-24)
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", **SD, rescale_betas_zero_snr=True)
    assert math.isclose(
        floored.level(999).alpha ** 2, float(euler.alphas_cumprod[-1]), rel_tol=1e-12
    )
    assert floored.level(998) == path.level(998)


@pytest.mark.parametrize("lookup", ["log", "linear"])
def test_fractional_times(lookup: str):
    path = Discrete(lookup=lookup)  # type: ignore[arg-type]
    for t in (0.25, 417.6, 998.5):
        lo, hi = path.level(int(t)).rho, path.level(int(t) + 1).rho
        share, level = t - int(t), path.level(t)
        between = lo ** (1 - share) * hi**share if lookup == "log" else lo + share * (hi - lo)
        assert math.isclose(level.rho, between, rel_tol=1e-12)
        assert math.isclose(level.alpha**2 + level.sigma**2, 1, rel_tol=1e-14)
    tensors = torch.tensor([0.25, 417.6, 998.5, 7.0])
    for kind in (path, Discrete(lookup=lookup, zero_snr=True)):  # type: ignore[arg-type]
        alpha, sigma = kind.coefficients(tensors)
        for t, a, s in zip(tensors.tolist(), alpha, sigma, strict=True):
            level = kind.level(t)
            assert math.isclose(level.alpha, a.item(), rel_tol=1e-5, abs_tol=1e-9)
            assert math.isclose(level.sigma, s.item(), rel_tol=1e-5)


def test_diffusers_interpolates_likewise():
    """Euler's linear lookup at fractional times; its sigma_t inverse is linear in log sigma."""
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", **SD, timestep_spacing="linspace")
    euler.set_timesteps(27)
    path = Discrete(lookup="linear")
    for t, rho in zip(euler.timesteps.tolist(), euler.sigmas.tolist(), strict=False):
        assert math.isclose(path.level(t).rho, rho, rel_tol=2e-5)
    karras = EulerDiscreteScheduler(beta_schedule="scaled_linear", **SD, use_karras_sigmas=True)
    karras.set_timesteps(27)
    for t, rho in zip(karras.timesteps.tolist(), karras.sigmas.tolist(), strict=False):
        assert math.isclose(path.at_half_log_snr(-math.log(rho)).t, t, abs_tol=2e-3)


@pytest.mark.parametrize("name", PATHS)
def test_levels_are_found_again_by_their_snr(name: str):
    path = PATHS[name]()
    for index in (0, 1, 500, 998):
        level = path.at_index(index)
        found = path.at_half_log_snr(level.half_log_snr)
        assert found == pytest.approx(level, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_paths_run_from_clean_to_noisy(name: str):
    path = PATHS[name]()
    snrs = [path.at_index(i).half_log_snr for i in range(path.steps)]
    assert all(a > b for a, b in pairwise(snrs))
    assert path.clean.half_log_snr == math.inf
    assert path.level(path.clean.t) == path.clean
    assert (path.level(path.t_min), path.level(path.t_max)) == (
        path.at_index(0),
        path.at_index(999),
    )


@pytest.mark.parametrize("name", PATHS)
def test_coefficients_are_the_levels(name: str):
    path = PATHS[name]()
    u = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
    times = path.quantile(u)
    alpha, sigma = path.coefficients(times)
    assert alpha.shape == sigma.shape == (5, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    levels = [path.level(t) for t in times.tolist()]
    torch.testing.assert_close(alpha.flatten(), torch.tensor([lv.alpha for lv in levels]))
    torch.testing.assert_close(sigma.flatten(), torch.tensor([lv.sigma for lv in levels]))
    assert (times.diff() > 0).all()


def test_tables_made_in_inference_mode_serve_training():
    path = Discrete(steps=77)
    with torch.inference_mode():
        path.coefficients(torch.tensor([3]))
    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    (weight * path.coefficients(torch.tensor([3]))[0]).sum().backward()
    assert weight.grad is not None


def test_snr_beyond_the_table_keeps_alpha_and_clamps_the_time():
    path = PATHS["sd15"]()
    level = path.at_half_log_snr(-math.log(700))
    assert level.t == 999
    assert math.isclose(level.rho, 700, rel_tol=1e-12)
    assert path.at_half_log_snr(-math.log(0.002)).t == 0
    assert PATHS["sd21-zsnr"]().at_half_log_snr(-math.inf) == (999.0, 0.0, 1.0)


def test_network_time():
    t = torch.tensor([3.2, 998.9])
    times = {time: Discrete(time=time).network_time(t) for time in ("exact", "nearest", "floor")}  # type: ignore[arg-type]
    assert torch.equal(times["exact"], t)
    assert times["nearest"].tolist() == [3, 999]
    assert times["floor"].tolist() == [3, 998]
    assert Flow().network_time(torch.tensor([0.25])).item() == 250
    assert math.isclose(
        Edm().network_time(torch.tensor([80.0])).item(), math.log(80) / 4, rel_tol=1e-6
    )


def test_flow_shift_divides_alpha_by_sigma():
    plain, shifted = Flow(), Flow(shift=3)
    for index in (9, 499, 899):
        assert math.isclose(
            shifted.at_index(index).rho, 3 * plain.at_index(index).rho, rel_tol=1e-12
        )
    assert shifted.at_index(999) == plain.at_index(999) == (1.0, 0.0, 1.0)
    assert shifted.level(0.25) == (0.25, 0.75, 0.25)  # a level's t is already shifted


def test_edm_input_has_unit_variance():
    for sigma in (0.002, 1.0, 80.0):
        assert math.isclose(Edm().input_scale(sigma) ** 2 * (sigma**2 + 0.25), 1, rel_tol=1e-12)
    assert PATHS["sd15"]().input_scale(0.5) == Flow().input_scale(0.5) == 1


def test_paths_are_built_from_presets():
    assert build_path({"kind": "flow", "shift": 3.0}) == Flow(shift=3.0)
    assert build_path({"kind": "discrete", "betas": [0.1, 0.2]}).steps == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no kind"),
        ({"kind": "lineer"}, 'did you mean "linear"'),
        ({"kind": "sd15", "zero_snrr": True}, 'did you mean "zero_snr"'),
        ({"kind": "sd15", "steps": 1}, "2 to 100000 steps"),
        ({"kind": "sd15", "beta_end": -1}, "beta"),
        ({"kind": "sd15", "beta_end": "much"}, "wrong option"),
        ({"kind": "sd15", "time": "now"}, "time = now"),
        ({"kind": "discrete", "schedule": "cosin"}, 'did you mean "cosine"'),
        ({"kind": "flow", "shift": 0}, "shift"),
        ({"kind": "edm", "sigma_min": 90}, "sigma_min"),
        ({"kind": "edm", "sigma_max": float("inf")}, "sigma_max"),
        ({"kind": "edm", "sigma_data": 0}, "sigma_data"),
        ({"kind": "flow", "shift": float("inf")}, "shift"),
        ({"kind": "sd15", "terminal_alpha_bar": float("nan")}, "terminal_alpha_bar"),
    ],
)
def test_wrong_paths_are_the_users_error(options: dict, said: str):
    with pytest.raises(UsageError) as error:
        build_path(options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "t"), [("sd15", 1000), ("sd15", -0.5), ("flow", 1.5), ("edm", -1)]
)
def test_times_outside_of_the_path_are_refused(name: str, t: float):
    with pytest.raises(UsageError, match="outside"):
        PATHS[name]().level(t)
