"""The samplers of ComfyUI's and A1111's menus that no installed library has, each against its
published definition, written down here in k-diffusion's units: x / alpha, sigma = rho."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from torch import Tensor

from difftool.diffusion import GRIDS, PATHS, SAMPLERS, Level, Path, Prediction, Step, recover
from difftool.diffusion.samplers import split_spelling
from difftool.errors import UsageError
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.settings import plan_sampling, resolve_settings

SHAPE = (2, 1, 3, 3)
STEPS = 9
PATH: Path = PATHS["sd15"]()


def output(x: Tensor, t: float, shift: float) -> Tensor:
    return 0.95 * torch.tanh(0.9 * x + math.sin(t / 100) + shift)


SCALE = 1.4
"""Of guidance."""


class Seen(NamedTuple):
    """What a network sees in x at a sigma: x0 guided, and x0 without guidance."""

    x0: Tensor
    unguided: Tensor


def see(x: Tensor, sigma: float) -> Seen:
    level = PATH.at_half_log_snr(-math.log(sigma))
    x_t = level.alpha * x
    cond, uncond = (output(x_t, level.t, shift) for shift in (0.3, -0.2))
    no = x - sigma * uncond
    return Seen(no + SCALE * (x - sigma * cond - no), no)


def denoise(guided: bool) -> Callable[[Tensor, Level], Prediction]:
    """The same as difftool's loops ask for it: with the unguided eps, or the guided one."""

    def of(x_t: Tensor, level: Level) -> Prediction:
        cond, uncond = (output(x_t, level.t, shift) for shift in (0.3, -0.2))
        eps = uncond + SCALE * (cond - uncond)
        found = recover(x_t, eps, level, "eps")
        return found if guided else found._replace(eps=uncond)

    return of


def grid(steps: int = STEPS, clean: bool = True) -> list[float]:
    """Karras'."""
    hi, lo = (PATH.at_index(i).rho ** (1 / 7) for i in (999, 0))
    sigmas = [(hi + i / (steps - 1) * (lo - hi)) ** 7 for i in range(steps)]
    return [*sigmas, 0.0] if clean else sigmas


class Noises:
    """The same noises for both sides."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *_: Any) -> Tensor:
        return torch.randn(SHAPE, dtype=torch.float64, generator=self.generator)


START = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Reference = Callable[[Tensor, Sequence[float], Noises], Iterator[Tensor]]


def ancestral(s: float, t: float, eta: float = 1.0) -> tuple[float, float]:
    """Sigma down to which a step goes, and up from there."""
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    return math.sqrt(t**2 - up**2), up


# --- CFG++ ------------------------------------------------------------------------------------


def euler_cfg_pp(eta: float) -> Reference:
    """CFG++ (2406.08070), algorithm 2: renoised by the unguided eps."""

    def run(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
        for s, t in pairwise(sigmas):
            seen = see(x, s)
            down, up = ancestral(s, t, eta) if t else (0.0, 0.0)
            x = seen.x0 + down * (x - seen.unguided) / s
            x = x + up * noise() if up else x
            yield x

    return run


def dpmpp_2s_a_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
    for s, t in pairwise(sigmas):
        seen = see(x, s)
        if t == 0:
            yield seen.x0
            return
        down, up = ancestral(s, t)
        mid = math.sqrt(s * down)
        between = mid / s * x + (1 - mid / s) * seen.unguided
        unguided = see(between, mid).unguided
        x = down / s * x + (1 - down / s) * unguided + up * noise() + (seen.x0 - seen.unguided)
        yield x


def dpmpp_2m_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
    last = None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        seen = see(x, s)
        mixed = t / s * (x - seen.unguided)
        if last is not None and t:
            r = math.log(sigmas[i - 1] / s) / math.log(s / t)
            mixed = mixed + (1 - t / s) / (2 * r) * (seen.x0 - last)
        x, last = seen.x0 + mixed, seen.unguided
        yield x


def res(eta: float, cfg_pp: bool) -> Reference:
    """RES (2308.02157), of two steps, with ComfyUI's ancestral noise."""

    def run(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
        last = down_last = None
        for i, (s, t) in enumerate(pairwise(sigmas)):
            seen = see(x, s)
            own = seen.unguided if cfg_pp else seen.x0
            down, up = ancestral(s, t, eta) if t else (0.0, 0.0)
            if last is None or down == 0:
                x = seen.x0 + down * (x - own) / s
            else:
                assert down_last is not None
                h = math.log(s / down)
                c2 = -math.log(sigmas[i - 1] / down_last) / h
                phi1 = math.expm1(-h) / -h
                phi2 = (phi1 - 1) / -h
                x = x + (seen.x0 - own)
                x = down / s * x + h * ((phi1 - phi2 / c2) * own + phi2 / c2 * last)
            x = x + up * noise() if up else x
            last, down_last = own, down
            yield x

    return run


def gradient_estimation(cfg_pp: bool, gamma: float = 2.0) -> Reference:
    """2306.04848, section 4: the next direction is guessed from the last two."""

    def run(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
        last = None
        for s, t in pairwise(sigmas):
            seen = see(x, s)
            d = (x - (seen.unguided if cfg_pp else seen.x0)) / s
            x = seen.x0 + t * d if cfg_pp else x + (t - s) * d
            if last is not None and t:
                x = x + (gamma - 1) * (d - last) * (t - s)
            last = d
            yield x

    return run


def published_weights(a: float, b: float, c: float | None, d: float | None) -> list[float]:
    """Of the newest output and those before it, for a step of length a after steps of b, c and d:
    diff-sampler's coefficients of iPNDM_v, with what is misprinted in them."""
    found = [1 + a / (2 * b), -a / (2 * b)]
    if c is None:
        return found
    k = 0.5 * (1 - a * a * (a + b) / (3 * (a + b) * b * (b + c)))
    found = [found[0] + k, found[1] - k - k * b / c, k * b / c]
    if d is None:
        return found
    m = 0.5 - a / (6 * (a + b)) + (a / 6 - a * a / (12 * (a + b))) / (a + b + c)
    m *= a * (a + b) * (a + b + c) / (b * (b + c) * (b + c + d))
    q = b * (b + c) / (c * (c + d))
    change = [m, -m * (1 + b / c + q), m * (b / c + q + q * c / d), -m * q * b / c]
    return [old + new for old, new in zip([*found, 0.0], change, strict=True)]


def ipndm_v(most: int) -> Reference:
    """ComfyUI's: the last step goes to x0."""

    def run(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
        ds: list[Tensor] = []
        for i, (s, t) in enumerate(pairwise(sigmas)):
            x0 = see(x, s).x0
            ds = [(x - x0) / s, *ds][:most]
            back = [sigmas[i - k] - sigmas[i - k - 1] if k < len(ds) - 1 else None
                    for k in range(3)]  # fmt: skip
            weights = [1.0] if back[0] is None else published_weights(t - s, back[0], *back[1:])
            mean = sum((w * d for w, d in zip(weights, ds, strict=True)), start=0 * x)
            x = x + (t - s) * mean if t else x0
            yield x

    return run


# --- of one step ------------------------------------------------------------------------------


def heunpp2(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
    for i, (s, t) in enumerate(pairwise(sigmas)):
        d = [(x - see(x, s).x0) / s]
        ahead = [s, *sigmas[i + 1 : -1][:2]]
        y = x
        for here, there in pairwise(ahead):
            y = y + (there - here) * d[-1]
            d.append((y - see(y, there).x0) / there)
        weights = [there / (len(ahead) * sigmas[0]) for there in ahead[1:]]
        mean = (1 - sum(weights)) * d[0]
        mean = mean + sum((w * each for w, each in zip(weights, d[1:], strict=True)), start=0 * x)
        x = x + (t - s) * mean
        yield x


def phi(k: int, h: float) -> float:
    """h phi_k(-h) of exponential integrators, k = 1 or 2."""
    return -math.expm1(-h) if k == 1 else (math.expm1(-h) + h) / h


def seeds(shares: Sequence[float], eta: float, exact: bool) -> Reference:
    """SEEDS (2305.14267), data prediction: one Brownian path a step, met at each stage."""

    def run(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
        for s, t in pairwise(sigmas):
            first = see(x, s).x0
            if t == 0:
                yield first
                return
            h = math.log(s / t)
            last, at, told, y = first, 0.0, torch.zeros_like(x), x
            for share in (*shares, 1.0):
                if share > at and eta:
                    told = math.exp(-(share - at) * h * eta) * told
                    told = told + math.sqrt(-math.expm1(-2 * (share - at) * h * eta)) * noise()
                grown = share * h * (1 + eta)
                second = 0.0
                if at:
                    second = phi(2, grown) * share / at if exact else phi(1, grown) / (2 * at)
                mean = (phi(1, grown) - second) * first + second * last
                sigma = s * math.exp(-share * h)
                y = math.exp(-grown) * x + mean + sigma * told
                if share == 1.0 and at == shares[-1]:
                    break
                last, at = see(y, sigma).x0, share
            x = y
            yield x

    return run


# --- of several steps -------------------------------------------------------------------------


def er_sde(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
    """ER-SDE-Solver-3 (2309.06169), with phi(l) = l (e^(l^0.3) + 10) and sums of 200 points."""

    def scaled(sigma: float) -> float:
        return sigma * (math.exp(sigma**0.3) + 10)

    x0: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x0.append(see(x, s).x0)
        if t == 0:
            yield x0[-1]
            return
        r, dt = scaled(t) / scaled(s), t - s
        x = r * x + (1 - r) * x0[-1]
        points = [t - k * dt / 200 for k in range(200)]
        if i:
            slopes.append((x0[-1] - x0[-2]) / (s - sigmas[i - 1]))
            area = sum(1 / scaled(p) for p in points) * -dt / 200
            x = x + (dt + area * scaled(t)) * slopes[-1]
        if i > 1:
            bend = (slopes[-1] - slopes[-2]) / ((s - sigmas[i - 2]) / 2)
            area = sum((p - s) / scaled(p) for p in points) * -dt / 200
            x = x + (dt**2 / 2 + area * scaled(t)) * bend
        x = x + math.sqrt(t**2 - s**2 * r**2) * noise()
        yield x


def sa_solver(pece: bool, most: tuple[int, int] = (3, 4)) -> Reference:
    """SA-Solver (2309.05019), eqs. 14 to 18: Lagrange polynomials in lam, integrated by quadrature;
    tau is 1 where the step ends within 0.2 to 0.8 of the path."""
    from numpy.polynomial.legendre import leggauss

    marks, widths = (column.tolist() for column in leggauss(30))
    low, high = (PATH.at_index(share * 999).rho for share in (0.2, 0.8))

    def weights(nodes: Sequence[float], a: float, b: float, tau: float) -> list[float]:
        """Of outputs at the times `nodes` over the step from a to b."""
        rate, found = 1 + tau**2, []
        for j, own in enumerate(nodes):
            others = [n for k, n in enumerate(nodes) if k != j]
            total = 0.0
            for mark, width in zip(marks, widths, strict=True):
                u = a + (b - a) * (mark + 1) / 2
                lagrange = math.prod((u - n) / (own - n) for n in others)
                total += (b - a) / 2 * width * rate * math.exp(rate * (u - b)) * lagrange
            found.append(total)
        return found

    def moved(
        x: Tensor, i: int, u: list[float], x0: list[Tensor], count: int, tau: float
    ) -> Tensor:
        """From u[i] to u[i + 1], by the newest `count` outputs, without the noise."""
        nodes = u[: len(x0)][-count:]
        h = u[i + 1] - u[i]
        x = math.exp(-(1 + tau**2) * h) * x
        pairs = zip(weights(nodes, u[i], u[i + 1], tau), x0[-count:], strict=True)
        return x + sum((w * each for w, each in pairs), start=0 * x)

    def run(x: Tensor, sigmas: Sequence[float], noise: Noises) -> Iterator[Tensor]:
        u = [-math.log(s) for s in sigmas if s]
        n, predicted, added, tau = len(sigmas), x, 0 * x, 0.0
        x0: list[Tensor] = []
        for i, t in enumerate(sigmas[1:]):
            x0.append(see(predicted, sigmas[i]).x0)
            corrector = min(most[1], len(x0), n - 1 - i)
            if i == 0 or (t == 0 and not pece):
                x = predicted
            else:
                x = moved(x, i - 1, u, x0, corrector, tau) + added
                if pece:
                    x0[-1] = see(x, sigmas[i]).x0
            if t == 0:
                yield x0[-1]
                return
            tau = 1.0 if low <= t <= high else 0.0
            added = (
                t
                * math.sqrt(-math.expm1(-2 * tau**2 * math.log(sigmas[i] / t)))
                * (noise() if tau else 0 * x)
            )
            predicted = moved(x, i, u, x0, min(most[0], len(x0), n - 2 - i), tau) + added
            yield predicted

    return run


CASES: dict[str, tuple[str, dict[str, Any], Reference]] = {
    "ddim_cfg_pp": ("ddim_cfg_pp", {}, euler_cfg_pp(0.0)),
    "euler_cfg_pp": ("euler_cfg_pp", {}, euler_cfg_pp(0.0)),
    "euler_a_cfg_pp": ("euler_ancestral_cfg_pp", {}, euler_cfg_pp(1.0)),
    "euler_a_cfg_pp 0.6": ("euler_ancestral_cfg_pp", {"eta": 0.6}, euler_cfg_pp(0.6)),
    "dpmpp_2s_a_cfg_pp": ("dpmpp_2s_ancestral_cfg_pp", {}, dpmpp_2s_a_cfg_pp),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m_cfg_pp", {}, dpmpp_2m_cfg_pp),
    "res": ("res_multistep", {}, res(0.0, False)),
    "res_a": ("res_multistep_ancestral", {}, res(1.0, False)),
    "res_a 0.5": ("res_multistep_ancestral", {"eta": 0.5}, res(0.5, False)),
    "res_cfg_pp": ("res_multistep_cfg_pp", {}, res(0.0, True)),
    "res_a_cfg_pp": ("res_multistep_ancestral_cfg_pp", {}, res(1.0, True)),
    **{f"ipndm_v {k}": ("ipndm_v", {"order": k}, ipndm_v(k)) for k in (1, 2, 3, 4)},
    "gradient": ("gradient_estimation", {}, gradient_estimation(False)),
    "gradient 1.3": (
        "gradient_estimation", {"ge_gamma": 1.3}, gradient_estimation(False, 1.3),
    ),
    "gradient_cfg_pp": ("gradient_estimation_cfg_pp", {}, gradient_estimation(True)),
    "heunpp2": ("heunpp2", {}, heunpp2),
    "seeds_2": ("seeds_2", {}, seeds((0.5,), 1.0, False)),
    "seeds_2 phi_2": (
        "seeds_2", {"solver_type": "phi_2", "r": 0.3, "eta": 0.6}, seeds((0.3,), 0.6, True),
    ),
    "res_2s": ("res_2s", {}, seeds((0.5,), 0.0, True)),
    "exp_heun_2_x0": ("exp_heun_2_x0", {}, seeds((1.0,), 0.0, True)),
    "exp_heun_2_x0 phi_1": (
        "exp_heun_2_x0", {"solver_type": "phi_1"}, seeds((1.0,), 0.0, False),
    ),
    "exp_heun_2_x0_sde": ("exp_heun_2_x0_sde", {}, seeds((1.0,), 1.0, True)),
    "seeds_3": ("seeds_3", {}, seeds((1 / 3, 2 / 3), 1.0, True)),
    "seeds_3 0.5": (
        "seeds_3", {"eta": 0.5, "r_1": 0.25, "r_2": 0.7}, seeds((0.25, 0.7), 0.5, True),
    ),
    "er_sde": ("er_sde", {}, er_sde),
    "sa_solver": ("sa_solver", {}, sa_solver(False)),
    "sa_solver_pece": ("sa_solver_pece", {}, sa_solver(True)),
    "sa_solver 2 3": (
        "sa_solver", {"order": 2, "corrector_order": 3}, sa_solver(False, (2, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_published_definition(case):
    sampler, options, reference = CASES[case]
    made = SAMPLERS[sampler](PATH, **options)
    sigmas = grid()
    levels = [*(PATH.at_half_log_snr(-math.log(s)) for s in sigmas[:-1]), PATH.clean]
    steps = list(
        made(denoise(not made.cfg_pp), levels[0].alpha * sigmas[0] * START, levels, Noises())
    )
    theirs = list(reference(sigmas[0] * START, sigmas, Noises()))
    assert len(steps) == len(theirs) == STEPS
    for step, x in zip(steps, theirs, strict=True):
        assert float((step.x / step.level.alpha - x).abs().max() / x.abs().max()) < 1e-10


# --- Restart ----------------------------------------------------------------------------------


def karras(count: int, low: float, high: float) -> list[float]:
    ends = high ** (1 / 7), low ** (1 / 7)
    return [(ends[0] + i / (count - 1) * (ends[1] - ends[0])) ** 7 for i in range(count)]


def restart(x: Tensor, sigmas: list[float], noise: Noises) -> Iterator[Tensor]:
    """Restart (2306.14878), algorithm 2, with A1111's numbers: from 20 steps on once, from 36 on
    twice, from 0.1 up to 2."""
    n = len(sigmas) - 1
    length, times = (n // 4, 2) if n >= 36 else (9, 1) if n >= 20 else (0, 0)
    if times:
        sigmas = [*karras(n - length * times, sigmas[-2], sigmas[0]), 0.0]
    low, high = (min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - s)) for s in (0.1, 2.0))
    pairs = list(pairwise(sigmas))
    if times:
        again = karras(length + 1, sigmas[low], sigmas[high])
        inner = list(pairwise(again))
        pairs[low:low] = inner * times
    last = sigmas[0]
    for s, t in pairs:
        if s > last * (1 + 1e-9):
            x = x + math.sqrt(s**2 - last**2) * noise()
            yield x
        d = (x - see(x, s).x0) / s
        if t:
            y = x + (t - s) * d
            d = (d + (y - see(y, t).x0) / t) / 2
        x, last = x + (t - s) * d, t
        yield x


@pytest.mark.parametrize("n", [12, 20, 37])
def test_restart_goes_a_part_again(n):
    sigmas = grid(n)
    levels = [*(PATH.at_half_log_snr(-math.log(s)) for s in sigmas[:-1]), PATH.clean]
    made = SAMPLERS["Restart"](PATH)
    steps = list(made(denoise(True), levels[0].alpha * sigmas[0] * START, levels, Noises()))
    theirs = list(restart(sigmas[0] * START, sigmas, Noises()))
    assert len(steps) == len(theirs) == n + (0 if n < 20 else 1 if n < 36 else 2)
    assert [step.level for step in steps] == list(made.visits(levels))[1:]
    for step, x in zip(steps, theirs, strict=True):
        assert float((step.x / step.level.alpha - x).abs().max() / x.abs().max()) < 1e-9


# --- everything that the menus have ------------------------------------------------------------

COMFY = """
euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0
exp_heun_2_x0_sde dpm_2 dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral
dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde
dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm
ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral
res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2
seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2
""".split()
"""KSampler's."""
FORGE = ("HeunPP2", "IPNDM", "IPNDM_V", "DEIS", "DDPM")
"""What it has beside A1111's."""
SCHEDULES = """
simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal beta57
align_your_steps turbo discrete ays lcm polyexponential uniform
""".split()
"""ComfyUI's, with RES4LYF's, Forge's and stable-diffusion.cpp's."""
A1111_SCHEDULES = (
    *("Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Align Your Steps"),
    *("Simple", "Normal", "DDIM", "Beta"),
)
ANSWERED = """
res_2m res_3s deis_3m rk4 euler_smea_dy kohaku_lonyu_yog DPM++_2M_alt k-diffusion UnCLIPScheduler
CosineDPMSolverMultistepScheduler CogVideoXDPMScheduler KarrasVeScheduler ScoreSdeVpScheduler
CMStochasticIterativeScheduler RePaintScheduler DDIMInverseScheduler VQDiffusionScheduler
""".split()
ANSWERED_SCHEDULES = (
    "bong_tangent smoothstep gits align_your_steps_32 default scaled_linear".split()
)
A1111 = (
    *("DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE"),
    *("Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart"),
    *("DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM"),
)
DIFFUSERS = """
DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler
EulerAncestralDiscreteScheduler HeunDiscreteScheduler KDPM2DiscreteScheduler
KDPM2AncestralDiscreteScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler
DPMSolverSDEScheduler DEISMultistepScheduler UniPCMultistepScheduler SASolverScheduler
IPNDMScheduler LCMScheduler TCDScheduler EDMEulerScheduler EDMDPMSolverMultistepScheduler
FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler
LTXEulerAncestralRFScheduler DDIMParallelScheduler DDPMParallelScheduler
""".split()
"""Its samplers of pictures from noise."""


def test_every_menu_is_known():
    import diffusers

    for name in (*COMFY, *FORGE, *A1111, *DIFFUSERS):
        assert SAMPLERS.resolve(name) in SAMPLERS
    assert all(GRIDS.resolve(name) in GRIDS for name in SCHEDULES)
    assert [GRIDS[name].a1111 for name in A1111_SCHEDULES] == list(A1111_SCHEDULES)
    assert split_spelling("DPM++ 2M Turbo") == ("dpmpp_2m", "trailing")
    assert [SAMPLERS[name].a1111 for name in A1111] == list(A1111)
    assert not [name for name in DIFFUSERS if not hasattr(diffusers, name)]


@pytest.mark.parametrize("name", [*ANSWERED, *ANSWERED_SCHEDULES])
def test_what_no_row_is_is_answered_by_name(name):
    registry = GRIDS if name in ANSWERED_SCHEDULES else SAMPLERS
    with pytest.raises(UsageError, match=re.escape(f'"{name}"')) as caught:
        registry.resolve(name)
    assert caught.value.hint and "choose from" not in caught.value.hint


# --- in pictures --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    classes = {"classes": ["a", "b"], "codec": tiny.BLOCKS, "unet": {"num_classes": 3}}
    return tiny.model(tiny.preset(12, **classes), seed=1)


def pictures(model: Any, count: int, **asked: Any) -> list[Step]:
    plan = plan_sampling(model, resolve_settings(model, {"size": (16, 16), "steps": 3} | asked))
    inputs = [SampleInput("", label=i % 2, seed=i) for i in range(count)]
    steps = list(generate(plan, inputs))
    assert [step.index for step in steps] == list(range(plan.steps))
    return steps


def test_pictures_of_adaptive_steps_are_the_same_in_any_company(model):
    asked = {"sampler": "DPM adaptive", "sampler_options": {"rtol": 0.5, "h_init": 0.5}}
    alone, together = (pictures(model, count, guidance=3.0, **asked)[-1].x for count in (1, 3))
    assert together[:1].equal(alone)


def test_restart_shows_as_many_steps_as_it_takes(model):
    assert len(pictures(model, 1, sampler="Restart", steps=20)) == 21


def test_cfg_pp_has_scales_from_0_on(model):
    found = [
        pictures(model, 1, sampler=sampler, guidance=scale)[-1].x
        for sampler, scale in (
            ("euler", 1.0), ("euler_cfg_pp", 1.0), ("euler_cfg_pp", 0.5), ("ddim_cfg_pp", 6.25),
            ("euler_cfg_pp", 0.0),
        )
    ]  # fmt: skip
    assert found[2].allclose(found[3], atol=1e-5)
    for one, other in pairwise((*found[:3], found[4])):
        assert not one.allclose(other, atol=1e-3)
    with pytest.raises(UsageError, match=r"guidance 0\.5"):
        pictures(model, 1, sampler="euler", guidance=0.5)
