"""Every sampler against diffusers, run beside it, and against k-diffusion, from golden files."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path as File
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from difftool.diffusion import GRIDS, PATHS, SAMPLERS, Level, Path, Prediction, recover, transition
from difftool.diffusion.clocks import CLOCKS, interpolation, moments
from difftool.diffusion.multisteps import SaSolver
from difftool.diffusion.noise import BrownianNoise, ImageNoise
from difftool.diffusion.samplers import REFUSED, OneOf, split_spelling
from difftool.diffusion.solvers import (
    Multistep,
    Node,
    Pndm,
    Step,
    ThreeStage,
    TwoStage,
    full,
    none,
    posterior,
    rectified,
    reverse_sde,
    tcd,
)
from difftool.diffusion.stages import HeunPlus, Restart
from difftool.errors import UsageError

TOLERANCE = 2e-5
SHAPE = (2, 4, 8, 8)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Network = Callable[[Tensor, float], Tensor]


def toy(x: Tensor, t: float) -> Tensor:
    return 0.95 * torch.tanh(0.9 * x + math.sin(t / 100))


class Conv(nn.Module):
    """A small convolutional network of random weights that hears the time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = torch.randn(8, 4, 3, 3, generator=generator) / 6
        self.outer = torch.randn(4, 8, 3, 3, generator=generator) / 8
        self.rates = torch.rand(8, 1, 1, generator=generator) / 100

    def forward(self, x: Tensor, t: float) -> Tensor:
        hidden = nn.functional.conv2d(x, self.inner.to(x), padding=1) + torch.sin(t * self.rates)
        return nn.functional.conv2d(torch.tanh(hidden), self.outer.to(x), padding=1)


NETWORKS: dict[str, Network] = {"toy": toy, "conv": Conv()}


def denoiser(path: Path, target: str, network: Network = toy) -> Callable[..., Prediction]:
    def denoise(x: Tensor, level: Level) -> Prediction:
        t = float(path.network_time(torch.tensor(level.t, dtype=torch.float64)))
        return recover(x, network(x * path.input_scale(level.sigma), t), level, target)

    return denoise


class Draws:
    """Noises in order, for both sides; counts them."""

    def __init__(self, shape: Sequence[int] = SHAPE, seed: int = 1):
        self.generator, self.shape = torch.Generator().manual_seed(seed), tuple(shape)
        self.count = 0

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        self.count += 1
        return torch.randn(self.shape, generator=self.generator)


def differences(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[float]:
    """max |ours - theirs| / max |theirs| at each step."""
    assert len(ours) == len(theirs)
    pairs = zip(ours, theirs, strict=True)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


def walk(
    sampler: str,
    path: Path,
    levels: Sequence[Level],
    target: str,
    x: Tensor,
    noise: Callable[..., Tensor] | None = None,
    network: Network = toy,
    options: Mapping[str, Any] | None = None,
) -> list[Step]:
    made = SAMPLERS[sampler](path, **(options or {}))
    return list(made(denoiser(path, target, network), x, levels, noise or Draws()))


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


# --- diffusers --------------------------------------------------------------------------------


class Case(NamedTuple):
    """A scheduler of diffusers and what it is here."""

    scheduler: str
    config: dict[str, Any]
    sampler: str
    options: Mapping[str, Any] = {}
    n: int = 10
    end: str = "clean"
    stages: int = 1
    step: Mapping[str, Any] = {}
    """Arguments of the scheduler's step."""

    def __str__(self) -> str:
        values = {**self.config, **self.options, "n": self.n, "end": self.end}
        named = "-".join(f"{k}={v}" for k, v in values.items() if k not in SD)
        return f"{self.sampler}-{named}"


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LEADING = {"steps_offset": 1, "timestep_spacing": "leading"}
TRAILING = {"timestep_spacing": "trailing"}
FIRST = {"set_alpha_to_one": False, **LEADING}
UNCLIPPED = {"clip_sample": False}

IN_RHO = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Schedulers whose x is x_t / alpha."""
FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
)

CASES = [
    *(
        Case(
            "DDIMScheduler",
            {**UNCLIPPED, **config},
            "ddim",
            {"eta": eta},
            end=end,
            step={"eta": eta},
        )
        for eta in (0.0, 0.5, 1.0)
        for config, end in ((FIRST, "first"), (ZERO_SNR, "clean"))
    ),
    *(
        Case(
            "DDPMScheduler",
            {**UNCLIPPED, "variance_type": f"fixed_{size}", **config},
            "ddpm",
            {"variance": size},
        )
        for size in ("small", "large")
        for config in ({}, V)
    ),
    Case("EulerDiscreteScheduler", TRAILING, "euler"),
    Case("EulerDiscreteScheduler", {**V, **LEADING}, "ddim"),
    Case("EulerAncestralDiscreteScheduler", TRAILING, "euler_a"),
    Case("HeunDiscreteScheduler", TRAILING, "heun", stages=2),
    Case("KDPM2DiscreteScheduler", TRAILING, "dpm2", stages=2),
    Case("KDPM2AncestralDiscreteScheduler", TRAILING, "dpm2_a", stages=2),
    Case("LMSDiscreteScheduler", TRAILING, "lms"),
    *(
        Case(
            "PNDMScheduler",
            {**FIRST, "skip_prk_steps": True, **config},
            "plms",
            options,
            end="first",
        )
        for config, options in (({}, {}), (V, {"target": "v"}))
    ),
    *(
        Case(
            "DPMSolverMultistepScheduler",
            {
                "algorithm_type": algorithm,
                "solver_order": order,
                "solver_type": solver_type,
                "final_sigmas_type": {"clean": "zero", "first": "sigma_min"}[end],
            },
            sampler,
            {**options, "solver_type": solver_type},
            n,
            end,
        )
        for algorithm, order, sampler, options in (
            ("dpmsolver++", 2, "dpmpp_2m", {}),
            ("dpmsolver++", 3, "dpmpp_3m", {}),
            ("sde-dpmsolver++", 1, "dpmpp_2m_sde", {"order": 1}),
            ("sde-dpmsolver++", 2, "dpmpp_2m_sde", {}),
            ("dpmsolver", 1, "dpm_solver", {"order": 1}),
            ("dpmsolver", 2, "dpm_solver", {}),
            ("dpmsolver", 3, "dpm_solver", {"order": 3}),
        )
        for solver_type in ("midpoint", "heun")
        for n in (10, 20)
        for end in ("clean", "first")
        if (algorithm, end) != ("dpmsolver", "clean")
    ),
    Case(
        "DPMSolverMultistepScheduler",
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        "dpmpp_2m",
        {"lower_order_final": "final"},
        20,
        "first",
    ),
    *(
        Case(
            "DEISMultistepScheduler", {"solver_order": order}, "deis", {"order": order}, n, "first"
        )
        for order in (1, 2, 3)
        for n in (10, 20)
    ),
    *(
        Case(
            "UniPCMultistepScheduler",
            {
                "solver_order": order,
                "solver_type": variant,
                "predict_x0": target == "x0",
                "final_sigmas_type": "sigma_min",
                **extra,
            },
            "unipc",
            {"order": order, "solver_type": variant, "target": target, **options},
            end="first",
        )
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for target in ("x0", "eps")
        for extra, options in (
            ({}, {}),
            ({"disable_corrector": [0, 3]}, {"disable_corrector": [0, 3]}),
            ({"lower_order_final": False}, {"lower_order_final": "never"}),
        )
    ),
    Case("UniPCMultistepScheduler", {"solver_order": 3}, "unipc_bh2"),
    *(
        Case(
            "DPMSolverSinglestepScheduler",
            {
                "algorithm_type": algorithm,
                "solver_order": order,
                "solver_type": solver_type,
                "final_sigmas_type": {"clean": "zero", "first": "sigma_min"}[end],
                "lower_order_final": end == "clean",
            },
            sampler,
            {
                "order": order,
                "solver_type": solver_type,
                "lower_order_final": "always" if end == "clean" else "never",
            },
            n,
            end,
        )
        for algorithm, sampler in (
            ("dpmsolver++", "dpmpp_single"),
            ("sde-dpmsolver++", "dpmpp_single_sde"),
            ("dpmsolver", "dpm_solver_single"),
        )
        for order, solver_type in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
        for n, end in ((7, "clean"), (12, "first"))
        if (algorithm, end) != ("dpmsolver", "clean")
    ),
    Case(
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "solver_type": "heun"},
        "dpmpp_single",
        {"order": 3, "solver_type": "heun"},
        9,
    ),
    Case("EulerDiscreteScheduler", ZERO_SNR, "euler"),
    Case("DPMSolverMultistepScheduler", ZERO_SNR, "dpmpp_2m"),
    Case("UniPCMultistepScheduler", {**ZERO_SNR, "solver_order": 3}, "unipc_bh2"),
    Case("LCMScheduler", UNCLIPPED, "lcm", n=4),
    *(
        Case("TCDScheduler", FIRST, "tcd", {"eta": gamma}, 4, "first", step={"eta": gamma})
        for gamma in (0.0, 0.3, 1.0)
    ),
]


def published(name: str) -> Any:
    """A class of diffusers."""
    return getattr(diffusers, name)


def exact_table(scheduler: Any, module: Any) -> None:
    """Puts the scheduler's own table in place again, computed in double precision."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    if scheduler.config.get("rescale_betas_zero_snr"):
        betas = module.rescale_zero_terminal_snr(betas)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if (
        scheduler.config.get("rescale_betas_zero_snr")
        and type(scheduler).__name__ != "DDIMScheduler"
    ):
        scheduler.alphas_cumprod[-1] = 2.0**-24
    if scheduler.config.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


def drive(
    case: Case, network: Network, monkeypatch: Any, x: Tensor, n: int = 0
) -> tuple[list[Tensor], Any]:
    """x after every step of diffusers, in its own units, and the scheduler."""
    made_by = published(case.scheduler)
    module = importlib.import_module(made_by.__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", Draws())
    on_flow = case.scheduler in FLOWS or "flow_shift" in case.config
    table = {} if on_flow or "EDM" in case.scheduler else SD
    scheduler: Any = made_by(**table, **case.config)
    if table:  # their table is fp32, where 1 - alpha_bar loses four digits
        exact_table(scheduler, module)
    scheduler.set_timesteps(n or case.n)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    states = []
    for i, t in enumerate(scheduler.timesteps):
        if on_flow:  # some would tell the network a truncated time
            output = network(x, float(1000 * scheduler.sigmas[i]))
        else:
            output = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, **case.step).prev_sample
        states.append(x)
    if case.stages == 2:
        states = [*states[1:-1:2], states[-1]]
    return (states[1:] if case.scheduler == "PNDMScheduler" else states), scheduler


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_diffusers_on_a_table(case, network, monkeypatch):
    theirs, scheduler = drive(case, NETWORKS[network], monkeypatch, start())
    path = PATHS["sd15"]()
    if case.config.get("rescale_betas_zero_snr"):  # all but DDIM have a floor under alpha_bar
        floor = 0.0 if case.scheduler == "DDIMScheduler" else 2.0**-24
        path = PATHS["sd21-zsnr"](terminal_alpha_bar=floor)
    times = list(dict.fromkeys(scheduler.timesteps.tolist()))
    if case.stages == 2:
        times = [scheduler.timesteps.tolist()[0], *scheduler.timesteps.tolist()[2::2]]
    levels = [path.level(t) for t in times]
    levels.append(path.clean if case.end == "clean" else path.at_index(0))
    in_rho = case.scheduler in IN_RHO
    scale = levels[0].alpha * float(scheduler.init_noise_sigma) if in_rho else 1.0
    target = "v" if case.config.get("prediction_type") == "v_prediction" else "eps"
    steps = walk(
        case.sampler, path, levels, target, start() * scale, Draws(), NETWORKS[network],
        case.options,
    )  # fmt: skip
    ours = [step.x / step.level.alpha if in_rho else step.x for step in steps]
    assert max(differences(ours, theirs)) < TOLERANCE
    assert [step.level for step in steps] == levels[1:]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CONTINUOUS = [
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
    Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "lcm"),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "heun", {"variable": "t"}, stages=2),
    Case("LTXEulerAncestralRFScheduler", {}, "euler_a_rf"),
    Case("LTXEulerAncestralRFScheduler", {"eta": 0.4}, "euler_a_rf", {"eta": 0.4}),
    Case("DPMSolverMultistepScheduler", FLOW, "dpmpp_2m"),
    Case("UniPCMultistepScheduler", FLOW, "unipc_bh2", {"order": 2}),
    Case("EDMEulerScheduler", {}, "euler"),
    *(
        Case(
            "EDMDPMSolverMultistepScheduler",
            {"algorithm_type": algorithm, "solver_order": order},
            sampler,
            n=n,
        )
        for algorithm, order, sampler in (
            ("dpmsolver++", 2, "dpmpp_2m"),
            ("dpmsolver++", 3, "dpmpp_3m"),
            ("sde-dpmsolver++", 2, "dpmpp_2m_sde"),
        )
        for n in (10, 20)
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", CONTINUOUS, ids=str)
def test_diffusers_on_a_continuous_path(case, network, monkeypatch):
    theirs, scheduler = drive(case, NETWORKS[network], monkeypatch, start())
    name = "edm" if "EDM" in case.scheduler else "flow"
    path, scale = PATHS[name](), float(scheduler.init_noise_sigma) if name == "edm" else 1.0
    levels = [path.level(t) for t in dict.fromkeys(scheduler.sigmas.tolist())]
    steps = walk(
        case.sampler, path, levels, name, start() * scale, Draws(), NETWORKS[network],
        case.options,
    )  # fmt: skip
    assert max(differences([step.x for step in steps], theirs)) < TOLERANCE
    assert levels[-1].sigma == 0 and levels[0].sigma > 0.99


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("orders", "n", "lowers"),
    [((2, 2), 10, True), ((2, 2), 16, False), ((1, 1), 7, True), ((3, 3), 12, True),
     ((3, 4), 12, True), ((3, 2), 12, False)],
)  # fmt: skip
def test_sa_solver_of_diffusers(orders, n, lowers, monkeypatch):
    """It draws at every step, also where it adds none."""
    config = {
        **dict(zip(("predictor_order", "corrector_order"), orders, strict=True)),
        "lower_order_final": lowers,
    }
    theirs, scheduler = drive(Case("SASolverScheduler", config, ""), toy, monkeypatch, start(), n)
    path, drawn = PATHS["sd15"](), Draws()
    noises = [drawn() for _ in range(n)]
    levels = [*map(path.level, scheduler.timesteps.tolist()), path.at_index(0)]
    options = {"order": orders[0], "corrector_order": orders[1]}
    options |= {} if lowers else {"lower_order_final": "never"}
    steps = walk(
        "SASolverScheduler", path, levels, "eps", start(),
        lambda here, _: noises[levels.index(here)], options=options,
    )  # fmt: skip
    assert max(differences([step.x for step in steps], theirs)) < TOLERANCE


@pytest.mark.parametrize("alpha", [0.05, 0.0])
def test_ipndm_on_its_own_path(alpha):
    """Where alpha = 0, diffusers divides by 1e-8 and has x0 = 0 in the first step."""
    scheduler: Any = published("IPNDMScheduler")()
    scheduler.set_timesteps(10)
    scheduler.alphas[0], scheduler.betas[0] = alpha, math.sqrt(1 - alpha**2)
    x, theirs = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, float(t)), t, x).prev_sample
        theirs.append(x)
    columns = zip(scheduler.timesteps, scheduler.alphas, scheduler.betas, strict=False)
    levels = [Level(*map(float, column)) for column in columns]
    levels.append(Level(0.0, float(scheduler.alphas[-1]), float(scheduler.betas[-1])))
    steps = walk("ipndm", PATHS["sd15"](), levels, "v", start())
    apart = differences([step.x for step in steps], theirs)
    assert max(apart) < TOLERANCE if alpha else apart[-1] > 0.01


@pytest.mark.filterwarnings("ignore")
def test_lcm_boundary_shows_near_the_clean_end():
    made_by = published("LCMScheduler")
    scheduler: Any = made_by(**SD, clip_sample=False)
    times = [999, 499, 19, 1]
    scheduler.set_timesteps(timesteps=times, original_inference_steps=1000)
    exact_table(scheduler, None)
    x = start()
    noises, module = Draws(), importlib.import_module(made_by.__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", noises)
        for t in scheduler.timesteps:
            x = scheduler.step(toy(x, float(t)), t, x).prev_sample
    path = PATHS["sd15"]()
    levels = [*map(path.level, times), path.clean]
    bounded = walk("lcm", path, levels, "eps", start())[-1].x
    without = walk("lcm", path, levels, "eps", start(), options={"boundary_scalings": False})[-1].x
    assert differences([bounded], [x])[0] < TOLERANCE
    assert differences([without], [x])[0] > 5e-4


# --- k-diffusion ------------------------------------------------------------------------------

GOLDEN = load_file(File(__file__).with_name("golden") / "k_diffusion.safetensors")
CHURN = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
KEYS = sorted(
    k for k in GOLDEN if k.count("/") == 1 and not k.endswith("sigmas") and "brownian" not in k
)
OWN = sorted(k for k in GOLDEN if "/own/" in k)
OF_K: dict[str, tuple[str, dict[str, Any]]] = {
    "euler_churn": ("euler", CHURN),
    "heun_churn": ("heun", CHURN),
    "dpm2_churn": ("dpm2", CHURN),
    "euler_a_0.6": ("euler_a", {"eta": 0.6, "s_noise": 0.9}),
    "dpm2_a_0.5": ("dpm2_a", {"eta": 0.5}),
    "lms_2": ("lms", {"order": 2}),
    "dpmpp_2s_a_0.5": ("dpmpp_2s_a", {"eta": 0.5, "s_noise": 0.9}),
    "dpmpp_sde_0.5": ("dpmpp_sde", {"eta": 0.5, "r": 0.4}),
    "dpmpp_2m_sde_0.5": ("dpmpp_2m_sde", {"eta": 0.5}),
    "dpmpp_3m_sde_0.3": ("dpmpp_3m_sde", {"eta": 0.3}),
    "dpmpp_3m_sde_0": ("dpmpp_3m_sde", {"eta": 0.0}),
}
"""Samplers and options of the golden cases that are not named after a sampler."""
ON_FLOW = {"lms": {"variable": "t"}, "heun": {"variable": "t"}, "dpmpp_2m": {"clock": "log_sigma"}}
"""What k-diffusion's samplers are if sigma is put at the t of a flow, as SD3's reference does."""


KINDS = {"sd15_eps": ("sd15", "eps"), "sd15_v": ("sd15", "v"), "flow_rho": ("flow", "flow")}


@pytest.mark.parametrize("key", KEYS)
def test_k_diffusion(key):
    kind, case = key.split("/")
    sampler, options = OF_K.get(case, (case, {}))
    native = kind == "flow"
    name, target = KINDS.get(kind, (kind, kind))
    path = PATHS[name]()
    sigmas = GOLDEN[f"{kind}/sigmas"].tolist()
    if native:
        levels, options = [path.level(t) for t in sigmas], ON_FLOW.get(sampler, {})
    else:
        levels = [*(path.at_half_log_snr(-math.log(s)) for s in sigmas[:-1]), path.clean]
    draws = iter(GOLDEN["z"])
    x = GOLDEN["x"] * sigmas[0] * (1.0 if native else levels[0].alpha)

    def noise(here: Level, there: Level) -> Tensor:
        # k-diffusion draws for churn at every step, also where it adds none.
        return GOLDEN["z"][levels.index(here)] if "s_churn" in options else next(draws)

    steps = walk(sampler, path, levels, target, x, noise, options=options)
    theirs = GOLDEN[key]
    ours = [step.x / (1.0 if native else step.level.alpha) for step in steps][-len(theirs) :]
    assert max(differences(ours, list(theirs))) < 1e-10
    assert len(theirs) == (1 if "s_churn" in options else len(steps))


OF_OWN: dict[str, dict[str, Any]] = {
    "dpm_fast-7-eta": {"eta": 0.7, "s_noise": 0.9},
    "dpm_adaptive-5-order": {
        "order": 2, "rtol": 0.02, "atol": 0.01, "h_init": 0.4, "accept_safety": 0.9,
    },
    "dpm_adaptive-5-pid": {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1},
    "dpm_adaptive-5-eta": {"eta": 0.5, "h_init": 0.3, "rtol": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("key", OWN)
def test_k_diffusion_in_steps_of_its_own(key):
    kind, _, case = key.split("/")
    name, target = KINDS.get(kind, (kind, kind))
    path, (hi, *_, lo, _) = PATHS[name](), GOLDEN[f"{kind}/sigmas"].tolist()
    sampler, n = case.split("-")[0], int(case.split("-")[1])
    lams = [-math.log(hi) + i / n * math.log(hi / lo) for i in range(n + 1)]
    levels = list(map(path.at_half_log_snr, lams))
    draws = iter(GOLDEN["z"].repeat(8, 1, 1, 1, 1))
    x = GOLDEN["x"] * hi * levels[0].alpha
    steps = walk(sampler, path, levels, target, x, lambda *_: next(draws), options=OF_OWN.get(case))
    apart = differences([steps[-1].x / steps[-1].level.alpha], [GOLDEN[key]])
    assert apart[0] < 1e-10


# --- everywhere -------------------------------------------------------------------------------

MODELS = {
    "eps": ("sd15", "eps"),
    "v": ("sd15", "v"),
    "zero-snr": ("sd21-zsnr", "v"),
    "flow": ("flow", "flow"),
    "edm": ("edm", "edm"),
}


DEFAULTS = {name: method(PATHS["sd15"]()) for name, method in SAMPLERS.items()}
STOCHASTIC = [name for name, made in DEFAULTS.items() if made.kappa is not none and made.eta]


class Counted(NamedTuple):
    steps: list[Step]
    levels: list[Level]
    seen: list[Level]
    """Levels that the network was evaluated at."""
    draws: int


def count(sampler: str, model: str, n: int = 6, end: str = "clean", **options: Any) -> Counted:
    path, target = PATHS[MODELS[model][0]](), MODELS[model][1]
    levels = GRIDS["trailing"](path, n, end=end)
    inner, seen, draws = denoiser(path, target), [], Draws()

    def denoise(x: Tensor, level: Level) -> Prediction:
        assert x.isfinite().all() and x.dtype == torch.float32
        seen.append(level)
        return inner(x, level)

    made = SAMPLERS[sampler](path, **options)
    steps = list(made(denoise, start() * levels[0].sigma, levels, draws))
    return Counted(steps, levels, seen, draws.count)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_walks_every_path(sampler, model):
    for end, n in product(("clean", "first"), (1, 2, 6, 16)):
        steps, levels, seen, _ = count(sampler, model, n, end)
        assert [step.level for step in steps] == levels[1:]
        assert [step.index for step in steps] == list(range(n))
        assert all(level.sigma > 0 for level in seen)
        for step in steps:
            assert step.x.isfinite().all() and step.x0.isfinite().all()
            assert step.x.shape == step.x0.shape == SHAPE and step.x.dtype == torch.float32
        if end == "clean" and SAMPLERS[sampler].loop is TwoStage:
            assert steps[-1].x.equal(steps[-1].x0)


VALUES = [
    (name, option, value)
    for name, method in SAMPLERS.items()
    for option, allowed in method.options.items()
    if isinstance(allowed, OneOf)
    for value in allowed.values
]


@pytest.mark.parametrize(("sampler", "option", "value"), VALUES, ids=str)
def test_every_option_walks_every_path(sampler, option, value):
    for n, model, end in product((1, 5), MODELS, ("clean", "first")):
        steps = count(sampler, model, n, end, **{option: value}).steps
        assert all(step.x.isfinite().all() for step in steps)


EVALUATIONS: dict[type, tuple[int, int]] = {
    TwoStage: (11, 1), Restart: (11, 1), ThreeStage: (16, 2), Pndm: (7, 1), HeunPlus: (15, 2),
}  # fmt: skip
"""Of six steps, and how many less out of alpha = 0, where eps, or a level between, does not
exist."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dpm_adaptive"])
def test_evaluations_and_draws(sampler, model):
    _, levels, seen, draws = count(sampler, model)
    made, from_alpha_0 = DEFAULTS[sampler], levels[0].alpha == 0
    evaluations, less = EVALUATIONS.get(SAMPLERS[sampler].loop, (6, 0))
    if getattr(made, "pece", False):
        evaluations = 11
    if sampler.startswith("exp_heun_2_x0"):  # the end of the step exists, and so does x0
        less = 0
    assert len(seen) == evaluations - less * from_alpha_0
    noisy = isinstance(made, TwoStage) and made.noisy_stage
    per_step = 1 + len(made.shares) if isinstance(made, TwoStage) and noisy else 1
    if sampler.startswith("exp_heun_2_x0"):  # both stages lie at the end
        per_step = 1
    if isinstance(made, SaSolver):  # between two shares of the path alone
        assert draws == (5 if made.draws_always else 3)
    else:
        missing = (per_step - 1) * from_alpha_0
        assert draws == (5 * per_step - missing if sampler in STOCHASTIC else 0)


def test_2m_is_what_its_formula_says():
    """The lines that stand in the docstring of Multistep, over a whole run."""
    path = PATHS["sd15"]()
    levels, denoise = GRIDS["trailing"](path, 8)[:-1], denoiser(path, "eps")
    x = y = start()
    x0_last = torch.empty(0)
    options = {"lower_order_final": "never"}
    steps = walk("dpmpp_2m", path, levels, "eps", y, Draws(), options=options)
    for i, ((here, there), step) in enumerate(zip(pairwise(levels), steps, strict=True)):
        x0 = mean = denoise(x, here).x0
        h = there.half_log_snr - here.half_log_snr
        if i:
            h_last = here.half_log_snr - levels[i - 1].half_log_snr
            mean = x0 + h / (2 * h_last) * (x0 - x0_last)
        x = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * mean
        x0_last = x0
        assert differences([step.x], [x])[0] < 1e-5


@pytest.mark.parametrize(
    ("sampler", "old", "new"),
    [
        ("dpmpp_2m", {"taper": "never", "pair": "exact"},
         {"lower_order_final": "never", "solver_type": "heun"}),
        ("dpmpp_3m", {"third": 1.0, "pair": "half"}, {"d2_scale": 1.0, "solver_type": "midpoint"}),
        ("unipc", {"variant": "bh2", "corrector_off": [0]},
         {"solver_type": "bh2", "disable_corrector": [0]}),
        ("lcm", {"boundary": False}, {"boundary_scalings": False}),
        ("deis", {"variant": "tab"}, {"variant": "tab"}),
    ],
)  # fmt: skip
def test_options_are_read_as_older_versions_spelled_them(sampler, old, new):
    path = PATHS["sd15"]()
    assert SAMPLERS[sampler](path, **old) == SAMPLERS[sampler](path, **new)
    assert SAMPLERS[sampler](path, **new) != SAMPLERS[sampler](path)


def test_churn_draws_where_it_adds_noise():
    rhos = [level.rho for level in count("heun", "edm").levels]
    options: dict[str, Any] = {"s_churn": 2.0, "s_tmin": rhos[3], "s_tmax": rhos[1]}
    assert count("heun", "edm", **options).draws == 3


LIMITED = [
    name
    for name, method in SAMPLERS.items()
    if method.loop is Multistep and name not in ("plms", "unipc", "dpmpp_2m_cfg_pp")
]
"""Not those with a first step of another order at alpha = 0, nor B1, which has no limit, nor CFG++,
whose eps alone does not tell x0 there."""


@pytest.mark.parametrize("sampler", LIMITED)
def test_alpha_0_is_the_limit_of_small_alpha(sampler):
    found = []
    for floor in (0.0, 1e-20, 1e-200):
        path = PATHS["sd21-zsnr"](terminal_alpha_bar=floor)
        levels = GRIDS["trailing"](path, 8)
        found.append(walk(sampler, path, levels, "v", start().double(), Draws())[-1].x)
    assert found[1].dtype == torch.float64
    far, near = (differences([other], found[:1])[0] for other in found[1:])
    assert near < 1e-8 or near < far / 8 < 1e-3  # polynomials in lam converge as 1 / lam


# --- the order of convergence -----------------------------------------------------------------

VARIANCES = torch.logspace(-2, 1, 24, dtype=torch.float64).view(1, 24, 1, 1)


def exact(x: Tensor, level: Level) -> Prediction:
    """The ideal denoiser of Gaussian data."""
    total = level.alpha**2 * VARIANCES + level.sigma**2
    return Prediction(level.alpha * VARIANCES / total * x, level.sigma / total * x)


def error(sampler: str, n: int, options: dict[str, Any], tiny: int = 3) -> float:
    """Of a walk down n even steps in lam, on which the first is begun with tiny ones."""
    path = PATHS["sd15"]()
    lams = [-1.5, *(-1.5 + 1e-4 * (i + 1) for i in range(tiny))]
    lams += [lams[-1] + 3.0 * (i + 1) / n for i in range(n)]
    levels = [path.at_half_log_snr(lam) for lam in lams]

    def deviation(level: Level) -> Tensor:
        return (level.alpha**2 * VARIANCES + level.sigma**2).sqrt()

    x = deviation(levels[0])
    *_, last = SAMPLERS[sampler](path, **options)(exact, x, levels, Draws())
    return float((last.x / deviation(levels[-1]) - 1).abs().max())


ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("tcd", {"eta": 0.0}, 1),
    ("euler_a_rf", {"eta": 0.0}, 1),
    ("heun", {}, 2),
    ("heun", {"variable": "t"}, 2),
    ("dpm2", {}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0, "r": 0.3}, 2),
    ("dpmpp_2m", {"lower_order_final": "never"}, 2),
    ("dpmpp_2m", {"lower_order_final": "never", "solver_type": "heun"}, 2),
    ("dpmpp_2m", {"lower_order_final": "never", "clock": "log_sigma"}, 2),
    ("dpmpp_3m", {"lower_order_final": "never"}, 2),
    ("dpmpp_3m", {"lower_order_final": "never", "d2_scale": 1}, 3),
    ("dpmpp_3m_sde", {"eta": 0.0}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0, "d2_scale": 1}, 3),
    ("dpmpp_single", {"lower_order_final": "never"}, 2),
    ("dpmpp_single", {"lower_order_final": "never", "solver_type": "heun"}, 2),
    ("dpmpp_single", {"lower_order_final": "never", "order": 3}, 3),
    ("dpmpp_single", {"lower_order_final": "never", "order": 3, "solver_type": "heun"}, 3),
    ("dpm_solver_single", {"lower_order_final": "never", "order": 3}, 3),
    ("plms", {}, 2),
    ("plms", {"start": "runge_kutta"}, 2),
    ("euler_cfg_pp", {}, 1),
    ("res_multistep", {}, 2),
    ("res_multistep_a", {"eta": 0.0}, 2),
    ("exp_heun_2_x0", {}, 2),
    ("exp_heun_2_x0", {"solver_type": "phi_1"}, 2),
    ("seeds_2", {"eta": 0.0}, 2),
    ("seeds_2", {"eta": 0.0, "solver_type": "phi_2", "r": 0.7}, 2),
    ("seeds_3", {"eta": 0.0}, 3),
    ("res_2s", {}, 2),
    *(("sa_solver", {"eta": 0.0, "order": k, "corrector_order": 0}, k) for k in (1, 2, 3, 4)),
    *(("sa_solver", {"eta": 0.0, "order": k, "corrector_order": k + 1}, k + 1)
      for k in (1, 2, 3)),
    *(("sa_solver_bh1", {"eta": 0.0, "order": k, "corrector_order": k,
                         "lower_order_final": "never"}, k) for k in (2, 3)),
    ("dpm_solver", {"lower_order_final": "never"}, 2),
    ("dpm_solver", {"lower_order_final": "never", "order": 3}, 2),
    ("dpm_solver", {"lower_order_final": "never", "order": 3, "d2_scale": 1}, 3),
    *(("deis", {"lower_order_final": "never", "order": k, "variant": v}, k)
      for k in (1, 2, 3, 4) for v in ("log_rho", "rho", "tab")),
    *(("lms", {"order": k, "variable": v}, k) for k in (1, 2, 3, 4) for v in ("rho", "t")),
    *(("ipndm_v", {"lower_order_final": "never", "order": k, "weights": "exact"}, k)
      for k in (1, 2, 3, 4)),
    ("ipndm_v", {"lower_order_final": "never", "order": 2}, 2),
    *(("unipc", {"lower_order_final": "never", "order": k, "solver_type": v, "target": t}, k + 1)
      for k in (1, 2, 3) for v in ("bh1", "bh2") for t in ("x0", "eps")),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "options", "order"), ORDERS, ids=str)
def test_order_of_convergence(sampler, options, order):
    n = 42 if order < 4 else 20  # whole runs of 3, with the tiny ones
    errors = [error(sampler, k, options) for k in (n, 2 * n)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.35


# --- options ----------------------------------------------------------------------------------

SHOWS = 5 * TOLERANCE

VISIBLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ddim", {}, {"eta": 0.3}),
    ("ddpm", {}, {"variance": "large"}),
    ("euler", {}, {"s_churn": 3.0}),
    ("euler", {"s_churn": 3.0}, {"s_tmin": 1.0}),
    ("euler", {"s_churn": 3.0}, {"s_tmax": 1.0}),
    ("euler", {"s_churn": 3.0}, {"s_noise": 0.9}),
    ("heun", {}, {"s_churn": 3.0}),
    ("heun", {"s_churn": 3.0}, {"s_tmin": 1.0}),
    ("heun", {"s_churn": 3.0}, {"s_tmax": 1.0}),
    ("heun", {"s_churn": 3.0}, {"s_noise": 0.9}),
    ("heun", {}, {"variable": "t"}),
    ("dpm2", {}, {"s_churn": 3.0}),
    ("dpm2", {"s_churn": 3.0}, {"s_tmin": 1.0}),
    ("dpm2", {"s_churn": 3.0}, {"s_tmax": 1.0}),
    ("dpm2", {"s_churn": 3.0}, {"s_noise": 0.9}),
    *((name, {}, {"s_noise": 0.9}) for name in STOCHASTIC if name not in ("ddpm", "tcd")),
    *((name, {}, {"eta": 0.5}) for name in STOCHASTIC if name not in ("ddpm", "lcm", "er_sde")),
    ("lcm", {}, {"boundary_scalings": False}),
    ("lcm", {}, {"timestep_scaling": 0.1}),
    ("dpmpp_2m", {}, {"solver_type": "heun"}),
    ("dpmpp_2m", {}, {"clock": "log_sigma"}),
    ("dpmpp_2m", {}, {"order": 1}),
    ("dpmpp_2m", {}, {"lower_order_final": "never"}),
    ("dpmpp_3m", {}, {"solver_type": "heun"}),
    ("dpmpp_3m", {}, {"clock": "log_sigma"}),
    ("dpmpp_3m", {}, {"lower_order_final": "never"}),
    ("dpmpp_3m", {}, {"lower_order_final": "final"}),
    ("dpmpp_3m", {}, {"d2_scale": 1}),
    ("dpmpp_2m_sde", {}, {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {}, {"order": 1}),
    ("dpmpp_2m_sde", {}, {"lower_order_final": "never"}),
    ("dpmpp_2m_sde_heun", {}, {"lower_order_final": "never"}),
    ("dpmpp_3m_sde", {}, {"d2_scale": 1}),
    *((name, {}, change) for name in ("unipc", "unipc_bh2") for change in (
        {"order": 1}, {"order": 2}, {"target": "eps"}, {"disable_corrector": [0]},
        {"lower_order_final": "never"})),
    ("unipc", {}, {"solver_type": "bh2"}),
    ("unipc_bh2", {}, {"solver_type": "bh1"}),
    ("dpm_solver", {}, {"order": 1}),
    ("dpm_solver", {}, {"order": 3}),
    ("dpm_solver", {}, {"solver_type": "heun"}),
    ("dpm_solver", {}, {"lower_order_final": "never"}),
    ("dpm_solver", {"order": 3}, {"d2_scale": 1}),
    *(("deis", {}, change) for change in (
        {"order": 1}, {"order": 3}, {"order": 4}, {"lower_order_final": "never"},
        {"variant": "rho"}, {"variant": "tab"})),
    *(("lms", {}, {"order": order}) for order in (1, 2, 3)),
    ("lms", {}, {"variable": "t"}),
    *(("ipndm", {}, {"order": order}) for order in (1, 2, 3)),
    *(("ipndm_v", {}, change) for change in (
        {"order": 1}, {"order": 2}, {"order": 3}, {"lower_order_final": "never"},
        {"weights": "exact"})),
    *(("plms", {}, {"target": target}) for target in ("v", "x0", "flow")),
    ("plms", {}, {"start": "runge_kutta"}),
    *((name, {}, change) for name in ("dpmpp_single", "dpmpp_single_sde", "dpm_solver_single")
      for change in ({"order": 1}, {"order": 3}, {"solver_type": "heun"},
                     {"lower_order_final": "never"})),
    ("dpmpp_sde", {}, {"r": 0.4}),
    *((name, {}, {"s_churn": 3.0}) for name in ("euler_cfg_pp", "heunpp2")),
    *((name, {"s_churn": 3.0}, change) for name in ("euler_cfg_pp", "heunpp2")
      for change in ({"s_tmin": 1.0}, {"s_tmax": 1.0}, {"s_noise": 0.9})),
    ("heunpp2", {}, {"variable": "t"}),
    ("ddim_cfg_pp", {}, {"eta": 0.3}),
    *((name, {}, {"clock": "log_sigma"})
      for name in ("dpmpp_2m_cfg_pp", "res_multistep", "res_multistep_cfg_pp")),
    *(("er_sde", {}, {"order": order}) for order in (1, 2)),
    *((name, {}, change)
      for name in ("sa_solver", "sa_solver_pece", "sa_solver_bh1")
      for change in ({"order": 1}, {"corrector_order": 0}, {"tau_start": 0.5}, {"tau_end": 0.5})),
    *((name, {"order": 2}, {"solver_type": "bh1"}) for name in ("sa_solver", "sa_solver_pece")),
    ("sa_solver_bh1", {}, {"solver_type": "heun"}),
    *((name, {}, {"lower_order_final": "always"}) for name in ("sa_solver", "sa_solver_pece")),
    ("sa_solver_bh1", {}, {"lower_order_final": "never"}),
    *((name, {}, {"tau_at": "here"}) for name in ("sa_solver", "sa_solver_pece")),
    ("sa_solver_bh1", {}, {"tau_at": "there"}),
    *((name, {}, change) for name in ("gradient_estimation", "gradient_estimation_cfg_pp")
      for change in ({"ge_gamma": 1.5}, {"variable": "t"})),
    *((name, {}, {"solver_type": "phi_1"}) for name in ("exp_heun_2_x0", "exp_heun_2_x0_sde")),
    ("seeds_2", {}, {"solver_type": "phi_2"}),
    ("seeds_2", {}, {"r": 0.4}),
    ("seeds_3", {}, {"r_1": 0.25}),
    ("seeds_3", {}, {"r_2": 0.75}),
    *((name, {}, {"eta": 0.5}) for name in ("dpm_fast", "dpm_adaptive", "res_2s")),
    *((name, {"eta": 0.5}, {"s_noise": 0.9}) for name in ("dpm_fast", "dpm_adaptive", "res_2s")),
    *(("dpm_adaptive", {}, change) for change in (
        {"order": 2}, {"rtol": 0.5}, {"h_init": 0.2}, {"pcoeff": 0.2}, {"icoeff": 0.5},
        {"dcoeff": 0.2})),
    ("dpm_adaptive", {"rtol": 1e-6}, {"atol": 0.05}),
    ("dpm_adaptive", {"h_init": 2.0}, {"accept_safety": 0.1}),
    ("restart", {}, {"s_noise": 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "base", "change"), VISIBLE, ids=str)
def test_every_option_shows(sampler, base, change):
    path = PATHS["sd15"]()
    times = [999, 800, 570, 350, 180, 40, 1][: 6 if "single" in sampler else 7]  # of whole runs
    if sampler == "restart":
        times = list(range(999, 0, -45))
    levels = GRIDS["explicit"](path, len(times), times=times, end="first")
    found = [
        walk(sampler, path, levels, "v", start(), Draws(), options=options)[-1].x
        for options in (base, base | change)
    ]
    assert differences(*([x] for x in found))[0] > SHOWS


def test_every_option_was_changed():
    changed = {(name, option) for name, _, change in VISIBLE for option in change}
    known = {(name, option) for name, method in SAMPLERS.items() for option in method.options}
    assert known - changed == {(name, "brownian") for name in SAMPLERS if is_brownian(name)}


def is_brownian(name: str, **options: Any) -> bool:
    return SAMPLERS[name](PATHS["sd15"](), **options).brownian


def test_the_sde_family_is_brownian_unless_told():
    found = [name for name in SAMPLERS if is_brownian(name)]
    assert found == ["dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "dpmpp_sde"]
    assert not any(is_brownian(name, brownian=False) for name in found)


@pytest.mark.parametrize("name", SAMPLERS)
def test_defaults_are_options_that_change_nothing(name):
    method, path = SAMPLERS[name], PATHS["sd15"]()
    assert method(path, **method.defaults) == method(path)
    as_json = {k: list(v) if isinstance(v, tuple) else v for k, v in method.defaults.items()}
    assert method(path, **as_json) == method(path)
    assert method.about and method.defaults.keys() == method.options.keys()


@pytest.mark.parametrize(
    ("sampler", "options", "says"),
    [
        ("ddim", {"etta": 0.5}, 'did you mean "eta"'),
        ("dpmpp_2s", {"eta": 0.5}, 'no option "eta"'),
        ("ddim", {"eta": -0.5}, "eta = -0.5"),
        ("ddim", {"eta": math.nan}, ">= 0"),
        ("ddim", {"eta": "half"}, "give a number"),
        ("ddim", {"eta": True}, "give a number"),
        ("tcd", {"eta": 1.5}, "from 0 to 1"),
        ("dpmpp_2m", {"solver_type": "midpont"}, 'did you mean "midpoint"'),
        ("dpmpp_2m", {"solver_type": 0.5}, "choose from: midpoint, heun"),
        ("dpmpp_3m", {"d2_scale": 2}, "choose from: 0.5, 1"),
        ("lms", {"order": 5}, "choose from: 1, 2, 3, 4"),
        ("lms", {"order": True}, "choose from: 1, 2, 3, 4"),
        ("lcm", {"boundary_scalings": 1}, "choose from: true, false"),
        ("unipc", {"solver_type": "bh3"}, 'did you mean "bh'),
        ("unipc", {"disable_corrector": [-1]}, "list of step numbers"),
        ("unipc", {"disable_corrector": 3}, "list of step numbers"),
        ("dpmpp_2m_sde", {"order": 3}, "dpmpp_3m_sde"),
    ],
)
def test_wrong_options_are_told(sampler, options, says):
    with pytest.raises(UsageError) as caught:
        SAMPLERS[sampler](PATHS["sd15"](), **options)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["sde-dpmsolver", "dpm++2mv2"])
def test_broken_methods_are_refused_by_name(name):
    assert name in REFUSED
    for lookup in (SAMPLERS.resolve, SAMPLERS.__getitem__, split_spelling):
        with pytest.raises(UsageError, match="not offered"):
            lookup(name)
    assert SAMPLERS.resolve("sde-dpmsolver++") == "dpmpp_2m_sde"


# --- names ------------------------------------------------------------------------------------

SPELLINGS = {
    # A1111 and its aliases
    "Euler": "euler", "k_euler": "euler", "Euler a": "euler_a", "k_euler_a": "euler_a",
    "k_euler_ancestral": "euler_a", "Heun": "heun", "k_heun": "heun", "DPM2": "dpm2",
    "k_dpm_2": "dpm2", "DPM2 a": "dpm2_a", "k_dpm_2_a": "dpm2_a", "LMS": "lms", "k_lms": "lms",
    "DPM++ 2M": "dpmpp_2m", "k_dpmpp_2m": "dpmpp_2m", "DPM++ 2M SDE": "dpmpp_2m_sde",
    "k_dpmpp_2m_sde": "dpmpp_2m_sde", "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 3M SDE": "dpmpp_3m_sde", "k_dpmpp_3m_sde": "dpmpp_3m_sde", "DPM++ 2S a": "dpmpp_2s_a",
    "k_dpmpp_2s_a": "dpmpp_2s_a", "DPM++ SDE": "dpmpp_sde", "k_dpmpp_sde": "dpmpp_sde",
    "DDIM": "ddim", "PLMS": "plms", "UniPC": "unipc", "LCM": "lcm",
    # ComfyUI
    "euler_ancestral": "euler_a", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a",
    "dpmpp_2s_ancestral": "dpmpp_2s_a", "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2",
    "ddpm": "ddpm", "deis": "deis", "ipndm": "ipndm", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde", "dpmpp_sde_gpu": "dpmpp_sde",
    # stable-diffusion.cpp
    "dpm++2m": "dpmpp_2m", "dpm++2s_a": "dpmpp_2s_a", "dpm++2m_sde": "dpmpp_2m_sde",
    "dpm++2m_sde_bt": "dpmpp_2m_sde", "tcd": "tcd", "res_2s": "res_2s", "er_sde": "er_sde",
    "euler_a_cfg_pp": "euler_a_cfg_pp",
    # diffusers
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun", "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_a", "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "DPMSolverSDEScheduler": "dpmpp_sde",
    "DPMSolverSinglestepScheduler": "dpmpp_single", "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms", "UniPCMultistepScheduler": "unipc_bh2", "LCMScheduler": "lcm",
    "TCDScheduler": "tcd", "DEISMultistepScheduler": "deis", "IPNDMScheduler": "ipndm",
    "FlowMatchEulerDiscreteScheduler": "euler", "EDMEulerScheduler": "euler",
    "sde-dpmsolver++": "dpmpp_2m_sde", "dpmsolver": "dpm_solver",
    # InvokeAI and kohya
    "kdpm_2": "dpm2", "kdpm_2_a": "dpm2_a", "dpmpp_2s": "dpmpp_2s", "dpmpp_3m": "dpmpp_3m",
    "pndm": "plms", "dpmsolver++": "dpmpp_2m", "dpmsingle": "dpmpp_single", "dpm_2_a": "dpm2_a",
}  # fmt: skip
WITH_SCHEDULE = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SDE Heun Karras": ("dpmpp_2m_sde_heun", "karras"),
    "DPM2 a Karras": ("dpm2_a", "karras"),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),
    "k_dpmpp_2m_sde_exp": ("dpmpp_2m_sde", "exponential"),
    "euler_a karras": ("euler_a", "karras"),
    "euler_k": ("euler", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"),
    "ddim_trailing": ("ddim", "trailing"),
    "Euler SGM Uniform": ("euler", "sgm_uniform"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_other_tools(spelling):
    assert SAMPLERS.resolve(spelling) == SPELLINGS[spelling]
    assert split_spelling(spelling) == (SPELLINGS[spelling], None)


@pytest.mark.parametrize("spelling", WITH_SCHEDULE)
def test_spellings_with_a_schedule(spelling):
    assert split_spelling(spelling) == WITH_SCHEDULE[spelling]


def test_every_sampler_with_every_schedule_splits():
    for sampler, schedule in product(SAMPLERS, GRIDS):
        assert split_spelling(f"{sampler} {schedule}") == (sampler, schedule)
        assert split_spelling(f"{sampler}_{schedule}".upper()) == (sampler, schedule)


def test_an_unknown_sampler_names_the_nearest():
    with pytest.raises(UsageError, match='did you mean "dpmpp_2m"'):
        split_spelling("dpmpp_2mm")


# --- published deviations ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_sde_order_3_of_diffusers_is_wrong_by_its_sign(monkeypatch):
    """Which is why it is refused; its other terms are those of dpmpp_3m_sde."""
    config = {
        "algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun",
        "lower_order_final": False, "final_sigmas_type": "zero",
    }  # fmt: skip
    theirs, scheduler = drive(
        Case("DPMSolverMultistepScheduler", config, ""), toy, monkeypatch, start()
    )
    path = PATHS["sd15"]()
    levels = [*map(path.level, scheduler.timesteps.tolist()), path.clean]
    steps = walk("dpmpp_3m_sde", path, levels, "eps", start(), Draws())
    apart = differences([step.x for step in steps], theirs)
    assert max(apart[:2]) < TOLERANCE and apart[2] > 0.01

    class Wrong(Multistep):
        """Its -1/2 for +1/2 in the second moment."""

        def mean_output(self, nodes: Any, u: float, u_next: float) -> Tensor:
            if len(nodes) < 3:
                return super().mean_output(nodes, u, u_next)
            H = 2 * (u_next - u)
            phi = math.expm1(-H) / H + 1
            r = [0.0, *((node.u - u) / (u_next - u) for node in nodes[1:])]
            weight = -math.expm1(-H)
            means = [1.0, phi / weight, 0.0]
            means[2] = ((-math.expm1(-H) - H) / H**2 - 0.5) / weight
            return sum(w * n.F for w, n in zip(interpolation(r, means), nodes, strict=True))  # type: ignore[return-value]

    wrong = Wrong(path=path, order=3, kappa=reverse_sde)
    reproduced = [step.x for step in wrong(denoiser(path, "eps"), start(), levels, Draws())]
    assert max(differences(reproduced, theirs)) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_bh1_into_the_clean_end_is_finite_here_and_not_in_diffusers(monkeypatch):
    case = Case("UniPCMultistepScheduler", {"solver_type": "bh1", "solver_order": 2}, "unipc")
    theirs, scheduler = drive(case, toy, monkeypatch, start())
    path = PATHS["sd15"]()
    levels = [*map(path.level, scheduler.timesteps.tolist()), path.clean]
    steps = walk("unipc", path, levels, "eps", start(), options={"order": 2})
    assert theirs[-1].isnan().all() and theirs[-2].isfinite().all()
    assert max(differences([step.x for step in steps[:-1]], theirs[:-1])) < TOLERANCE
    assert steps[-1].x.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc_bh2"])
def test_the_floor_of_diffusers_under_alpha_bar_shows(sampler):
    """It is a property of the grid; without it the start is exact, and a little elsewhere."""
    found = []
    for floor in (0.0, 2.0**-24):
        path = PATHS["sd21-zsnr"](terminal_alpha_bar=floor)
        levels = GRIDS["trailing"](path, 10)
        found.append(walk(sampler, path, levels, "v", start())[-1].x)
    assert TOLERANCE < differences(found[:1], found[1:])[0] < 2e-3


def test_order_1_of_every_family_is_ddim():
    path = PATHS["sd15"]()
    levels = GRIDS["trailing"](path, 10)
    ddim = [step.x for step in walk("ddim", path, levels, "eps", start())]
    for sampler in ("dpm_solver", "deis", "lms", "ipndm"):
        steps = walk(sampler, path, levels, "eps", start(), options={"order": 1})
        assert all(step.x.equal(x) for step, x in zip(steps, ddim, strict=True))


def test_the_published_third_order_is_the_second():
    """Its quadratic moment is halved; with it whole, the error at 160 steps is tenfold smaller."""
    published, whole = (
        error("dpmpp_3m", 160, {"lower_order_final": "never", "d2_scale": t}) for t in (0.5, 1)
    )
    assert whole < published / 5


def test_plms_of_a_v_model_keeps_the_history_of_v():
    path = PATHS["sd15"]()
    levels = GRIDS["leading"](path, 10, offset=1, end="first")
    found = [
        walk("plms", path, levels, "v", start(), options={"target": target})[-1].x
        for target in ("v", "eps")
    ]
    assert differences(found[:1], found[1:])[0] > 1e-2


# --- the parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("H", [-30.0, -2.0, -0.5, -0.499, -1e-9, 0.0, 0.3, 0.5, 4.0, 40.0])
def test_moments_are_the_integrals(H):
    from scipy.integrate import quad

    def integral(k: int) -> float:
        return quad(lambda r: r**k * math.exp(H * r - max(H, 0)), 0, 1, epsabs=0, epsrel=1e-12)[0]

    expected = [integral(k) / integral(0) for k in range(4)]
    assert moments(H, 4) == pytest.approx(expected, rel=1e-11)


def test_moments_of_an_infinite_step_lie_at_its_end():
    assert moments(math.inf, 3) == [1.0, 1.0, 1.0]
    assert moments(1e6, 3) == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)


def test_the_time_of_deis():
    """That of EDM's VP parametrisation with its sigma_min, sigma_max and epsilon_s."""
    assert CLOCKS["vp"].time(Level(0.0, 1.0, 80.0), 0) == pytest.approx(1.0)
    assert CLOCKS["vp"].time(Level(0.0, 1.0, 0.002), 0) == pytest.approx(1e-3)


def test_deis_tab_weighs_with_the_integral_over_its_time():
    from scipy.integrate import quad

    lo, hi = math.log1p(0.002**2), math.log1p(80.0**2)
    slope = 2 * (lo / 1e-3 - hi) / (1e-3 - 1)
    least = hi - slope / 2

    def velocity(t: float) -> float:  # d rho / d t
        exponent = slope * t * t / 2 + least * t
        return (slope * t + least) * math.exp(exponent) / (2 * math.sqrt(math.expm1(exponent)))

    nodes = [0.5, 0.62, 0.8]  # here, and two before; the step goes to 0.4
    sampler: Any = SAMPLERS["deis"](PATHS["edm"](), variant="tab", order=3)
    for j in range(3):
        others = [t for i, t in enumerate(nodes) if i != j]

        def weight(t: float, j: int = j, others: list[float] = others) -> float:
            return velocity(t) * math.prod((t - o) / (nodes[j] - o) for o in others)

        expected = quad(weight, 0.5, 0.4)[0] / quad(velocity, 0.5, 0.4)[0]
        used = [
            Node(t, torch.tensor(float(i == j), dtype=torch.float64)) for i, t in enumerate(nodes)
        ]
        assert float(sampler.mean_output(used, 0.5, 0.4)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_single_precision_is_enough(sampler, model):
    path, target = PATHS[MODELS[model][0]](), MODELS[model][1]
    levels = GRIDS["trailing"](path, 12)
    x = levels[0].sigma * start()
    fp32 = walk(sampler, path, levels, target, x, Draws())
    fp64 = walk(sampler, path, levels, target, x.double(), Draws())
    ours, exact = ([step.x for step in steps] for steps in (fp32, fp64))
    bound = 5e-3 if sampler == "dpm_adaptive" else TOLERANCE  # whose steps follow the rounding
    assert max(differences(ours, exact)) < bound


@pytest.mark.parametrize("nodes", [[0.0], [0.0, -1.0], [1.0, 0.0, -0.3], [0.0, -1.0, -2.5, -7.0]])
def test_interpolation_is_exact_for_polynomials(nodes):
    means = [1 / (k + 1) for k in range(len(nodes))]
    weights = interpolation(nodes, means)
    for k, mean in enumerate(means):
        assert sum(w * r**k for w, r in zip(weights, nodes, strict=True)) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("order", "weights"),
    [(2, [3, -1]), (3, [23, -16, 5]), (4, [55, -59, 37, -9])],
)
def test_the_index_clock_is_adams_bashforth(order, weights):
    weights = [weight / sum(weights) for weight in weights]
    found = interpolation([-float(j) for j in range(order)], moments(0.0, order))
    assert found == pytest.approx(weights)


@pytest.mark.parametrize("model", ["sd15", "sd21-zsnr", "flow", "edm"])
def test_kappas(model):
    path = PATHS[model]()
    for here, there in pairwise(GRIDS["trailing"](path, 5, end="first")):
        lost = 1 - (there.rho / here.rho) ** 2
        expected = there.sigma * math.sqrt(lost)
        assert posterior(path, here, there, 1.0) == pytest.approx(expected)
        assert reverse_sde(path, here, there, 1.0) == pytest.approx(expected)
        assert posterior(path, here, there, 0.5) == pytest.approx(expected / 2)
        assert posterior(path, here, there, 1e9) == there.sigma
        assert posterior(path, here, there, 0.5) < reverse_sde(path, here, there, 0.5) <= expected
        assert full(path, here, there, 1.0) == there.sigma
        for kappa in (tcd, rectified):
            fresh = [kappa(path, here, there, eta) for eta in (1e-6, 0.5, 1.0)]
            assert 0 <= fresh[0] <= fresh[1] <= fresh[2] <= there.sigma


@pytest.mark.parametrize("model", ["sd15", "flow", "edm"])
def test_a_transition_keeps_the_level(model):
    """x0 and eps of unit variance, and fresh noise: alpha^2 + sigma^2, whatever kappa."""
    level = PATHS[model]().at_half_log_snr(-0.3)
    parts = torch.eye(3)
    for share in (0.0, 0.4, 1.0):
        x = transition(parts[0], parts[1], level, share * level.sigma, parts[2])
        assert float(x.square().sum()) == pytest.approx(level.alpha**2 + level.sigma**2)
        assert float(x[2]) == pytest.approx(share * level.sigma)


def test_noise_is_asked_for_the_levels_of_the_step():
    path = PATHS["edm"]()
    levels, asked = GRIDS["karras"](path, 5), []

    def noise(here: Level, there: Level) -> Tensor:
        asked.append((here, there))
        return torch.zeros(SHAPE)

    walk("euler_a", path, levels, "edm", start(), noise)
    assert asked == list(pairwise(levels[:-1]))
    asked.clear()
    walk("dpmpp_sde", path, levels, "edm", start(), noise)
    for (here, mid), (again, there) in zip(asked[::2], asked[1::2], strict=True):
        assert here == again and here.rho > mid.rho > there.rho


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler_a"])
@pytest.mark.parametrize("model", MODELS)
def test_brownian_noise_walks_every_path(sampler, model):
    path, target = PATHS[MODELS[model][0]](), MODELS[model][1]
    levels = GRIDS["trailing"](path, 6)
    source = ImageNoise([5, 6], SHAPE[1:])
    x = levels[0].sigma * source.start()
    for noise in (source, BrownianNoise([5, 6], SHAPE[1:], levels)):
        steps = walk(sampler, path, levels, target, x, noise)
        assert all(step.x.isfinite().all() for step in steps)
