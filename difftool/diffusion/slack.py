"""How far the variational bound is above what it bounds.

With w = p(x_0, path) / q(path | x_0) of noising paths, the bound is -E log w, and -log E w what it
bounds. To second order they are half the variance of log w apart, which is all of it where log w is
Gaussian; a network that errs rarely and much has a wide error here. A path goes from z to the noisy
end in steps of log SNR, in each of which

    p(x_s | x_t)  =  N(mean of q(x_s | x_t, x0*), variance of q + c^2 m)

c the share of x0 in that mean and m the squared error of x0* on average: the variance that is best
there (Analytic-DPM, 2201.06503). With q's alone the steps would have a slack of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difftool.diffusion.likelihood import (
    DRAWS,
    Done,
    Likelihood,
    Measured,
    Tight,
    predict,
    read_nats,
)

PATHS = 4
"""From each of the points z, which are the ODE's."""


def slack_evaluations(measured: Measured) -> int:
    """Of the network: calls for `done`."""
    return DRAWS * PATHS * _steps(measured)


def _steps(measured: Measured) -> int:
    return max(2, measured.steps // 2)


def tightened(measured: Measured, found: Likelihood, done: Done = lambda count: None) -> Tight:
    """The bound of a picture less its slack; its error is that of all the points, and so of the
    variances too."""
    m, calls = measured, PATHS * _steps(measured)
    levels = torch.linspace(found.edges[-1], found.edges[0], _steps(m) + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4 * m.seed + 3)
    eps = m.noise(DRAWS, 0)
    weights = [
        _log_weights(m, levels, one, generator, lambda n, k=k: done(k * calls + n))
        for k, one in enumerate(eps.split(1))
    ]
    log_w = torch.stack(weights)
    bits = (-log_w.mean(1) - log_w.var(1) / 2) / m.unit + found.flow.data
    if m.discrete:  # by which z a picture is read from belongs to it
        at = torch.full((DRAWS,), found.edges[-1])
        nats = read_nats(m.denoiser, m.x0.expand_as(eps), m.conds(DRAWS), at, eps).cpu()
        bits += nats / m.unit - found.flow.data
    return Tight(bits.mean().item(), bits.std().item() / DRAWS**0.5)


@torch.no_grad()
def _log_weights(
    m: Measured, levels: Tensor, eps: Tensor, generator: torch.Generator, done: Done
) -> Tensor:
    """log p(z, path) / q(z, path | x0) of PATHS paths from one z [1,C,H,W], fp64 [PATHS]."""
    alphas, sigmas = levels.sigmoid().sqrt().tolist(), (-levels).sigmoid().sqrt().tolist()
    x0 = m.x0.cpu().double()
    x = (alphas[0] * x0 + sigmas[0] * eps.cpu().double()).expand(PATHS, *x0.shape[1:])
    log_w, dimensions = torch.zeros(PATHS, dtype=torch.float64), x0.numel()
    for i in range(1, len(levels)):
        (alpha_s, sigma_s), (alpha, sigma) = ((alphas[k], sigmas[k]) for k in (i - 1, i))
        kept = alpha / alpha_s
        added = sigma**2 - (kept * sigma_s) ** 2
        noise = torch.randn(x.shape, generator=generator).double()
        x_t = kept * x + added**0.5 * noise
        at = torch.full((PATHS,), levels[i].item())
        guess = predict(m.denoiser, x_t.float().to(m.x0.device), at, m.conds(PATHS))[0]
        share, variance = alpha_s * added / sigma**2, added * (sigma_s / sigma) ** 2
        error = x0 - guess.cpu().double()
        off = x - share * x0 - kept * (sigma_s / sigma) ** 2 * x_t  # from the mean of q
        wide = variance + share**2 * error.square().mean().item()
        each = off**2 / variance - (off + share * error) ** 2 / wide
        log_w += each.flatten(1).sum(1) / 2 - dimensions / 2 * math.log(wide / variance)
        x = x_t
        done(PATHS * i)
    rest = (x - alphas[-1] * x0) / sigmas[-1]
    ends = (rest**2 - x**2).flatten(1).sum(1) / 2
    return log_w + ends + dimensions * math.log(sigmas[-1])
