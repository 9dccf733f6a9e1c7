"""Targets and their inversion, against mixing and against published conversions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

from difftool.diffusion import PATHS, TARGETS, Level, recover
from difftool.diffusion.prediction import split_variance
from difftool.errors import InputError, UsageError


def pair(shape: tuple[int, ...] = (2, 3, 4, 4), dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    return x0, eps


def output(target: str, level, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    p, q = TARGETS[target](level.alpha, level.sigma)
    return p * x0 + q * eps


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_recover_inverts_mixing_on_every_path(target: str, path: str):
    x0, eps = pair()
    steps = PATHS[path]().steps
    for index in (0, 1, steps // 3, steps // 2, steps - 2):
        level = PATHS[path]().at_index(index)
        back = recover(level.mix(x0, eps), output(target, level, x0, eps), level, target)
        # x0 is lost in the rounding of x_t as rho grows, and eps as rho falls.
        torch.testing.assert_close(back.x0, x0, rtol=1e-9, atol=1e-13 * max(1, level.rho))
        torch.testing.assert_close(back.eps, eps, rtol=1e-9, atol=1e-13 * max(1, 1 / level.rho))


@pytest.mark.parametrize("target", TARGETS)
def test_recover_at_both_ends(target: str):
    """At alpha = 0 and at sigma = 0 both halves are exact, but for the one that does not exist."""
    x0, eps = pair()
    for level, lost in ((Level(1.0, 0.0, 1.0), "eps"), (Level(0.0, 1.0, 0.0), "x0")):
        back = recover(level.mix(x0, eps), output(target, level, x0, eps), level, target)
        if target != lost or lost == "x0":
            torch.testing.assert_close(back.x0, x0)
        if target != lost or lost == "eps":
            torch.testing.assert_close(back.eps, eps)
        if target == lost:
            other = back.x0 if lost == "eps" else back.eps
            assert not other.isfinite().any()


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_and_floats_agree(target: str):
    x0, eps = pair()
    levels = [Level(0.0, 0.8, 0.6), Level(0.0, 0.3, 0.954)]
    column = SimpleNamespace(
        **{
            name: torch.tensor([getattr(lv, name) for lv in levels], dtype=x0.dtype)[
                :, None, None, None
            ]
            for name in ("alpha", "sigma")
        }
    )
    mixed = column.alpha * x0 + column.sigma * eps
    both = recover(mixed, output(target, column, x0, eps), column, target)
    for k, level in enumerate(levels):
        one = recover(mixed[k], output(target, level, x0[k], eps[k]), level, target)
        torch.testing.assert_close(both.x0[k], one.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.eps[k], one.eps, rtol=1e-12, atol=1e-12)


def test_v_is_the_published_velocity():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, eps = pair(dtype=torch.float32)
    for t in (0, 400, 999):
        level = PATHS["sd15"]().level(t)
        theirs = scheduler.get_velocity(x0, eps, torch.IntTensor([t, t]))
        torch.testing.assert_close(output("v", level, x0, eps), theirs, rtol=1e-4, atol=3e-6)


def test_edm_is_the_published_preconditioning():
    """x0 = c_skip x + c_out F, and with unit-variance v for networks of sigma_data 1 (CosXL)."""
    x, out = pair()
    for target, published in (
        ("edm", EDMEulerScheduler(sigma_data=0.5)),
        ("edm_v", EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")),
    ):
        for sigma in (0.002, 0.5, 1.7, 80.0):
            level = PATHS["edm"]().level(sigma)
            theirs = published.precondition_outputs(x, out, torch.tensor(sigma, dtype=x.dtype))
            ours = recover(x, out, level, target).x0
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ["sd15", "cosine", "edm"])
def test_edm_targets_have_unit_variance(path: str):
    for index in (0, 500, 999):
        level = PATHS[path]().at_index(index)
        p, q = TARGETS["edm"](level.alpha, level.sigma)
        assert math.isclose((p * 0.5) ** 2 + q**2, 1, rel_tol=1e-12)


def test_names_are_found_by_other_tools_spellings():
    for name, alias in (("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")):
        assert TARGETS.resolve(alias) == name
    with pytest.raises(UsageError, match="prediction target"):
        recover(torch.zeros(1), torch.zeros(1), Level(0.0, 1.0, 1.0), "velocty")


def test_variance_heads_are_split_off():
    out = torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2)
    mean, variance = split_variance(out, 3)
    assert variance is not None
    assert torch.equal(torch.cat([mean, variance], dim=1), out)
    assert split_variance(out, 6)[1] is None
    with pytest.raises(InputError, match="does not fit"):
        split_variance(out, 4)
