"""Guidance and thresholding against their formulas and diffusers' functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from difftool.diffusion import PATHS, Level, recover
from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.guidance import dynamic_threshold, guided, static_threshold


class Net(nn.Module):
    """Every condition has its say, none mixes images; counts its calls and images."""

    calls = images = 0

    def forward(self, x: Tensor, t: Tensor, *, context, vector, label, guidance) -> Tensor:
        self.calls, self.images = self.calls + 1, self.images + len(x)
        if context is not None:
            x = x + context.sum(dim=(1, 2))[:, None, None, None]
        if label is not None:
            x = x * (1 + label[:, None, None, None])
        return torch.sin(x + t[:, None, None, None] / 1000)


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(Net(), PATHS["sd15"](), "v")


LEVEL = PATHS["sd15"]().level(600)
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def prompt(value: float, length: int = 5, batch: int = 3) -> Cond:
    per_image = torch.arange(batch) * 0.1 + value
    return Cond(context=per_image[:, None, None] * torch.ones(batch, length, 2) / 10)


def net(denoiser: Denoiser) -> Any:
    return denoiser.network


def test_classifier_free_guidance(denoiser: Denoiser):
    cond, uncond = prompt(1.0), prompt(-0.3)
    f_c, f_u = denoiser(X, LEVEL, cond), denoiser(X, LEVEL, uncond)
    expected = recover(X, f_u + 7.5 * (f_c - f_u), LEVEL, "v")
    found = guided(denoiser, [(cond, 7.5), (uncond, -6.5)])(X, LEVEL)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.eps, expected.eps, rtol=1e-4, atol=1e-5)


def test_two_scales_of_instruct_pix2pix(denoiser: Denoiser):
    """F(0,0) + s_I (F(I,0) - F(0,0)) + s_T (F(I,T) - F(I,0)): 2211.09800, eq. 3."""
    both, image_only, neither = prompt(1.0), prompt(0.2), prompt(-0.5)
    f_both, f_image, f_neither = (denoiser(X, LEVEL, c) for c in (both, image_only, neither))
    s_t, s_i = 7.5, 1.5
    output = f_neither + s_i * (f_image - f_neither) + s_t * (f_both - f_image)
    terms = [(both, s_t), (image_only, s_i - s_t), (neither, 1 - s_i)]
    found = guided(denoiser, terms)(X, LEVEL)
    torch.testing.assert_close(found.x0, recover(X, output, LEVEL, "v").x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_is_the_papers(denoiser: Denoiser, phi: float):
    cond, uncond = prompt(1.0), prompt(-0.3)
    f_c, f_u = denoiser(X, LEVEL, cond), denoiser(X, LEVEL, uncond)
    output = rescale_noise_cfg(f_u + 7.5 * (f_c - f_u), f_c, guidance_rescale=phi)
    expected = recover(X, output, LEVEL, "v")
    found = guided(denoiser, [(cond, 7.5), (uncond, -6.5)], rescale=phi)(X, LEVEL)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.eps, expected.eps, rtol=1e-4, atol=1e-5)


def test_one_call_where_the_conditions_are_alike(denoiser: Denoiser):
    guided(denoiser, [(prompt(1.0), 3.0), (prompt(0.0), -2.0)])(X, LEVEL)
    assert (net(denoiser).calls, net(denoiser).images) == (1, 6)


def test_separate_calls_where_they_are_not(denoiser: Denoiser):
    terms = [(prompt(1.0), 2.0), (prompt(0.5, length=9), 1.0), (prompt(0.0), -2.0)]
    found = guided(denoiser, terms)(X, LEVEL)
    assert (net(denoiser).calls, net(denoiser).images) == (2, 9)
    output = torch.stack([w * denoiser(X, LEVEL, c) for c, w in terms]).sum(0)
    torch.testing.assert_close(found.x0, recover(X, output, LEVEL, "v").x0, rtol=1e-4, atol=1e-5)


def test_labels_are_paired_with_their_images(denoiser: Denoiser):
    terms = [
        (Cond(label=torch.tensor([1, 2, 3])), 2.0),
        (Cond(label=torch.tensor([0, 0, 0])), -1.0),
    ]
    together = guided(denoiser, terms)(X, LEVEL).x0
    for k in range(3):
        alone = [(Cond(label=c.label[k : k + 1]), w) for c, w in terms if c.label is not None]
        single = guided(denoiser, alone)(X[k : k + 1], LEVEL).x0
        torch.testing.assert_close(together[k : k + 1], single)


def test_a_weight_of_zero_costs_nothing(denoiser: Denoiser):
    found = guided(denoiser, [(prompt(1.0), 1.0), (prompt(0.0), 0.0)], rescale=0.7)(X, LEVEL)
    assert (net(denoiser).calls, net(denoiser).images) == (1, 3)
    expected = denoiser.predict(X, LEVEL, prompt(1.0))
    assert torch.equal(found.x0, expected.x0)
    assert torch.equal(found.eps, expected.eps)


def test_interval(denoiser: Denoiser):
    """Outside of the range of log SNR only the first term is evaluated, with weight 1."""
    log_snr = 2 * LEVEL.half_log_snr
    terms = [(prompt(1.0), 3.0), (prompt(0.0), -2.0)]
    inside = guided(denoiser, terms, interval=(log_snr - 0.1, log_snr + 0.1))(X, LEVEL)
    assert net(denoiser).images == 6
    assert torch.equal(inside.x0, guided(denoiser, terms)(X, LEVEL).x0)
    net(denoiser).images = 0
    outside = guided(denoiser, terms, interval=(log_snr + 0.1, 99.0))(X, LEVEL)
    assert net(denoiser).images == 3
    assert torch.equal(outside.x0, denoiser.predict(X, LEVEL, prompt(1.0)).x0)


def test_weights_that_follow_the_level(denoiser: Denoiser):
    def scale(level: Level) -> float:
        return 1 + level.t / 600

    terms = [(prompt(1.0), scale), (prompt(0.0), lambda level: 1 - scale(level))]
    constant = [(prompt(1.0), 2.0), (prompt(0.0), -1.0)]
    assert torch.equal(
        guided(denoiser, terms)(X, LEVEL).x0, guided(denoiser, constant)(X, LEVEL).x0
    )


def test_static_clip_keeps_or_rederives_eps(denoiser: Denoiser):
    free = denoiser.predict(3 * X, LEVEL, prompt(1.0))
    assert free.x0.abs().max() > 1
    kept = guided(denoiser, [(prompt(1.0), 1.0)], clip=static_threshold)(3 * X, LEVEL)
    assert torch.equal(kept.x0, free.x0.clamp(-1, 1))
    assert torch.equal(kept.eps, free.eps)
    again = guided(denoiser, [(prompt(1.0), 1.0)], clip=static_threshold, rederive_eps=True)(
        3 * X, LEVEL
    )
    torch.testing.assert_close(LEVEL.mix(again.x0, again.eps), 3 * X, rtol=1e-5, atol=1e-6)


def test_dynamic_threshold_is_diffusers():
    scheduler = DDPMScheduler(thresholding=True, sample_max_value=4.0)
    scale = torch.tensor([0.2, 1.0, 9.0])[:, None, None, None]  # below 1, between, above the limit
    theirs = scheduler._threshold_sample(scale * X)
    torch.testing.assert_close(dynamic_threshold(scale * X, largest=4.0), theirs)
    assert torch.equal(dynamic_threshold(0.2 * X), 0.2 * X)


def test_dynamic_clip_is_used(denoiser: Denoiser):
    free = denoiser.predict(3 * X, LEVEL, prompt(1.0))
    clipped = guided(denoiser, [(prompt(1.0), 1.0)], clip=dynamic_threshold)(3 * X, LEVEL)
    assert torch.equal(clipped.x0, dynamic_threshold(free.x0))


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 3.0])
def test_cfg_pp_guides_x0_and_not_eps(denoiser: Denoiser, scale: float):
    """2406.08070, algorithm 2; what is guided away from is asked for at any scale."""
    cond, uncond = prompt(1.0), prompt(-0.3)
    f_c, f_u = denoiser(X, LEVEL, cond), denoiser(X, LEVEL, uncond)
    terms = [(cond, scale), (uncond, 1 - scale)]
    found = guided(denoiser, terms, cfg_pp=True)(X, LEVEL)
    expected = recover(X, f_u + scale * (f_c - f_u), LEVEL, "v").x0
    torch.testing.assert_close(found.x0, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.eps, recover(X, f_u, LEVEL, "v").eps, rtol=1e-4, atol=1e-5)
    nowhere = guided(denoiser, terms, cfg_pp=True, interval=(90.0, 99.0))(X, LEVEL)
    torch.testing.assert_close(nowhere, recover(X, f_c, LEVEL, "v"), rtol=1e-4, atol=1e-5)
