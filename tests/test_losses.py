"""The loss, the times it looks at and the weights, against closed forms and published code."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor, nn

from difftool.diffusion import PATHS, TARGETS
from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.losses import LOSSES, TIMES, WEIGHTS, huber, training_loss

U = (torch.arange(20000) + 0.5) / 20000  # quantiles: the distributions themselves, without chance


class Linear(nn.Module):
    def forward(self, x: Tensor, t: Tensor, **_: Tensor | None) -> Tensor:
        return 0.3 * x


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randn(
        4, 3, 8, 8, generator=generator
    )


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (p, t)
        for p in PATHS
        for t in TARGETS
        if t != "eps" or PATHS[p]().level(PATHS[p]().t_max).alpha
    ],
)
def test_loss_is_the_weighted_error_of_the_output(path: str, target: str):
    denoiser = Denoiser(Linear(), PATHS[path](), target)
    x0, eps = pair()
    times = TIMES["uniform"](denoiser.path, torch.tensor([0.1, 0.4, 0.6, 0.95]))
    loss, _ = training_loss(
        denoiser, x0, Cond(), times=times, weight=lambda *_: column(1, 2, 3, 4), eps=eps
    )
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    for k, t in enumerate(times.tolist()):
        level = denoiser.path.level(t)
        p, q = TARGETS[target](level.alpha, level.sigma)
        x_t = level.alpha * x0[k].double() + level.sigma * eps[k].double()
        output = 0.3 * x_t * denoiser.path.input_scale(level.sigma)
        error = output - (p * x0[k].double() + q * eps[k].double())
        expected = (k + 1) * error.square().mean().item()
        assert loss[k].item() == pytest.approx(expected, rel=1e-4)


def test_huber():
    denoiser = Denoiser(Linear(), PATHS["sd15"](), "eps")
    x0, eps = pair()
    times, c = torch.tensor([10, 300, 600, 990]), 0.25
    given = {"times": times, "weight": WEIGHTS["uniform"], "eps": eps}
    alpha, sigma = denoiser.path.coefficients(times)
    error = 0.3 * (alpha * x0 + sigma * eps) - eps
    expected = (2 * c * ((error**2 + c**2).sqrt() - c)).mean(dim=(1, 2, 3))
    found, _ = training_loss(denoiser, x0, Cond(), **given, loss=partial(huber, c=c))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    mse, _ = training_loss(denoiser, x0, Cond(), **given)  # type: ignore[arg-type]
    wide, _ = training_loss(denoiser, x0, Cond(), **given, loss=partial(huber, c=100.0))  # type: ignore[arg-type]
    torch.testing.assert_close(wide, mse, rtol=2e-2, atol=0)


def test_a_perfect_network_has_no_loss():
    class Perfect(nn.Module):
        def forward(self, x: Tensor, t: Tensor, **_: Tensor | None) -> Tensor:
            return eps - x0

    x0, eps = pair()
    denoiser = Denoiser(Perfect(), PATHS["flow"](), "flow")
    loss, _ = training_loss(
        denoiser, x0, Cond(), times=torch.rand(4), weight=WEIGHTS["min_snr"], eps=eps
    )
    assert loss.tolist() == [0] * 4


# --- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("time", TIMES)
def test_times_lie_on_the_path(time: str, path: str):
    noise = PATHS[path]()
    times = TIMES[time](noise, U)
    assert times.shape == U.shape
    assert (times.diff() >= 0).all()  # an inverse distribution function
    assert not times.is_floating_point() or noise.continuous
    alpha, sigma = noise.coefficients(times)
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()
    if not noise.continuous:
        assert 0 <= times.min() <= times.max() < noise.steps


def test_uniform_times():
    counts = TIMES["uniform"](PATHS["sd15"](), U).bincount(minlength=1000)
    assert counts.tolist() == [20] * 1000
    assert torch.equal(TIMES["uniform"](PATHS["flow"](), U), U)
    shifted = TIMES["uniform"](PATHS["flow"](shift=3.0), U)
    torch.testing.assert_close(shifted, 3 * U / (1 + 2 * U))
    logs = TIMES["uniform"](PATHS["edm"](), U).log()
    torch.testing.assert_close(logs, math.log(0.002) + U * math.log(40000), rtol=1e-4, atol=1e-4)


def test_logit_normal_times_are_diffusers():
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 200000, logit_mean=0.4, logit_std=0.8, generator=generator
    )
    ours = TIMES["logit_normal"](PATHS["flow"](), U, mean=0.4, std=0.8)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(
        ours.quantile(quantiles), theirs.quantile(quantiles), rtol=0, atol=5e-3
    )


@pytest.mark.parametrize("path", ["edm", "flow", "linear"])
def test_log_normal_times(path: str):
    """log(sigma / alpha) has EDM's mean and deviation on any path that reaches so far."""
    noise = PATHS[path]()
    alpha, sigma = noise.coefficients(TIMES["log_normal"](noise, U))
    logs = (sigma / alpha).log().flatten()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert logs.std().item() == pytest.approx(1.2, abs=0.02)


# --- how much -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_published(gamma: float):
    """2303.09556: min(SNR, gamma) on x0, and divided by SNR on eps, by SNR + 1 on v."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    times = torch.tensor([0, 50, 250, 500, 750, 999])
    snr = compute_snr(scheduler, times)
    alpha, sigma = PATHS["sd15"]().coefficients(times)
    least = snr.clamp(max=gamma)
    for target, expected in (("x0", least), ("eps", least / snr), ("v", least / (snr + 1))):
        weight = WEIGHTS["min_snr"](alpha, sigma, target, gamma=gamma).flatten()
        torch.testing.assert_close(weight, expected, rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [name for name in WEIGHTS if name != "uniform"])
def test_weights_do_not_depend_on_the_target(weight: str):
    """The same error of x0 costs the same, whatever the network outputs."""
    x0, eps = (image.double() for image in pair())
    wrong = x0 + 0.01
    alpha, sigma = column(0.9, 0.6, 0.2).double(), column(0.435, 0.8, 0.98).double()
    costs = []
    for target in TARGETS:
        p, q = TARGETS[target](alpha, sigma)
        x_t = alpha * x0[:3] + sigma * eps[:3]
        eps_of_wrong = (x_t - alpha * wrong[:3]) / sigma
        error = p * (wrong - x0)[:3] + q * (eps_of_wrong - eps[:3])
        costs.append(WEIGHTS[weight](alpha, sigma, target) * error**2)
    for cost in costs[1:]:
        torch.testing.assert_close(cost, costs[0], rtol=1e-9, atol=0)


def test_edm_weight_is_one_on_edms_output():
    sigma = column(0.002, 0.5, 80.0)
    weight = WEIGHTS["edm"](torch.ones_like(sigma), sigma, "edm")
    torch.testing.assert_close(weight, torch.ones_like(sigma))
    on_x0 = WEIGHTS["edm"](torch.ones_like(sigma), sigma, "x0")
    torch.testing.assert_close(on_x0, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)


def test_soft_min_snr_is_k_diffusions():
    """(sigma sd)^2 / (sigma^2 + sd^2)^2 on the output of EDM's preconditioning."""
    sigma = column(0.01, 0.5, 7.0)
    weight = WEIGHTS["soft_min_snr"](torch.ones_like(sigma), sigma, "edm")
    torch.testing.assert_close(weight, (sigma * 0.5) ** 2 / (sigma**2 + 0.25) ** 2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_are_finite_at_both_ends(weight: str, target: str):
    ends = WEIGHTS[weight](column(0.0, 1.0), column(1.0, 0.0), target)
    assert ends.isfinite().all()
    assert (ends >= 0).all()
    if weight != "edm" or target not in ("eps", "x0"):  # there it grows without bound
        assert ends.max() < 30


@pytest.mark.parametrize(
    ("target", "at_alpha_0", "at_sigma_0"), [("eps", 1.0, 0.0), ("x0", 0.0, 5.0), ("v", 0.0, 0.0)]
)
def test_min_snr_limits(target: str, at_alpha_0: float, at_sigma_0: float):
    ends = WEIGHTS["min_snr"](column(0.0, 1.0), column(1.0, 0.0), target).flatten().tolist()
    assert ends == pytest.approx([at_alpha_0, at_sigma_0], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_what_an_error_costs_is_its_square_where_it_is_small(name):
    error = torch.tensor([-1e-3, 0.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(LOSSES[name](error), error**2, rtol=1e-4, atol=1e-12)
