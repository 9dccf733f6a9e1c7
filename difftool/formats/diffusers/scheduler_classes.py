"""Every scheduler class of diffusers that difftool knows, and the samplers that it is. Torch-free.

A class is a row of CLASSES; a sampler that shares its class with others is a row of SOLVERS too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from difftool.formats.diffusers.fields import FLOAT, INT, FieldKind, Fields, Row, choice

TARGETS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
FLOOR = 2.0**-24
"""What diffusers puts for alpha_bar = 0 where it divides by it."""

_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "steps_offset": 0,
}  # fmt: skip
_SD_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_CLIP = {
    "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False,
    "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0,
}  # fmt: skip
_TABLE = _BETAS | {"timestep_spacing": "leading", "rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = _SIGMAS | {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
_K = _SD_BETAS | _SIGMAS | {"timestep_spacing": "linspace"}
_THRESHOLD = {k: v for k, v in _CLIP.items() if not k.startswith("clip")}
_DPM = _BETAS | _SIGMAS | _THRESHOLD | {
    "timestep_spacing": "linspace", "solver_order": 2, "lower_order_final": True,
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}  # fmt: skip
_LCM = _SD_BETAS | _CLIP | {
    "beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50,
    "set_alpha_to_one": True, "timestep_spacing": "leading", "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}  # fmt: skip
_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0,
    "final_sigmas_type": "zero",
}  # fmt: skip

PATH_FIELDS = {*_BETAS, "rescale_betas_zero_snr"} - {"steps_offset"}
"""What a file says of path and target."""

TARGET = choice(TARGETS)
STEPS = Row("num_train_timesteps", "steps", INT)
BETA_ROWS = (
    Row("beta_schedule", "schedule", choice(BETAS)),
    STEPS,
    Row("beta_start", "beta_start", FLOAT),
    Row("beta_end", "beta_end", FLOAT),
)
FLOW_ROWS = (Row("shift", "shift", FLOAT), STEPS)
EDM_ROWS = (
    *(Row(name, name, FLOAT) for name in ("sigma_min", "sigma_max", "sigma_data")),
    STEPS,
)
"""Fields of noise paths of each kind."""
SPACINGS = {
    "use_karras_sigmas": ("karras", "nearest"),
    "use_exponential_sigmas": ("exponential", "floor"),
    "use_beta_sigmas": ("beta_sigma", "floor"),
    "use_lu_lambdas": ("exponential", "nearest"),
}
"""Flags of the noise scales' spacing: the grid, and how the classes of open grids look up times."""


# --- options of samplers ---------------------------------------------------------------------


def _lowers(f: Fields, name: str) -> str:
    """How the order falls towards the end."""
    final = "euler_at_final" in f.values and f.get("euler_at_final", bool)
    lowers = f.get("lower_order_final", bool)
    return "final" if final else "short" if lowers else "never"


ORDER = Row("solver_order", "order", choice({1: 1, 2: 2, 3: 3}))
LOWERS = Row(
    "lower_order_final", "lower_order_final", FieldKind(_lowers, lambda lowers: lowers != "never")
)
_WORDS = {"midpoint": "midpoint", "heun": "heun"} | dict.fromkeys(
    ("logrho", "bh1", "bh2"), "midpoint"
)
"""Of DPM-Solver; what it makes of other classes' words."""
DPM = (
    Row("solver_type", "solver_type", choice(_WORDS)),
    ORDER,
    LOWERS,
    Row(
        "euler_at_final", "lower_order_final", FieldKind(_lowers, lambda lowers: lowers == "final")
    ),
)
SINGLE = (
    ORDER,
    Row("solver_type", "solver_type", choice(_WORDS)),
    Row("lower_order_final", "lower_order_final", choice({True: "always", False: "never"})),
)
DEIS = (
    ORDER,
    Row(
        "solver_type",
        "variant",
        choice(dict.fromkeys(("logrho", "midpoint", "heun", "bh1", "bh2"), "log_rho")),
    ),
    LOWERS,
)
UNIPC = (
    ORDER,
    Row(
        "solver_type",
        "solver_type",
        choice({"bh2": "bh2", "bh1": "bh1"} | dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")),
    ),
    Row("predict_x0", "target", choice({True: "x0", False: "eps"})),
    Row("lower_order_final", "lower_order_final", choice({True: "always", False: "never"})),
    Row(
        "disable_corrector",
        "disable_corrector",
        FieldKind(lambda f, n: tuple(f.get(n, list)), list),
    ),
)
SA = (
    Row("predictor_order", "order", choice({1: 1, 2: 2, 3: 3, 4: 4})),
    Row("corrector_order", "corrector_order", choice({0: 0, 1: 1, 2: 2, 3: 3, 4: 4})),
    Row("lower_order_final", "lower_order_final", choice({True: "always", False: "never"})),
)
VARIANCE = Row(
    "variance_type",
    "variance",
    choice(
        {"fixed_small": "small", "fixed_large": "large"}
        | dict.fromkeys(("fixed_small_log", "learned", "learned_range"), "small")
        | {"fixed_large_log": "large"}
    ),
)


# --- the classes -----------------------------------------------------------------------------


class Class(NamedTuple):
    """One of diffusers' schedulers."""

    sampler: str
    """What it is, or is unless its fields say another of SOLVERS."""
    grids: str
    """How its steps are spaced: table, k (fractional, noise scales), dpm (open), lcm, flow, edm."""
    defaults: dict[str, Any]
    options: tuple[Row, ...] = ()
    """Fields that are options of the sampler."""


_DDIM = Class("ddim", "table", _TABLE | _CLIP | {"set_alpha_to_one": True})
_DDPM = Class("ddpm", "table", _TABLE | _CLIP | {"variance_type": "fixed_small"}, (VARIANCE,))

CLASSES: dict[str, Class] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": Class(
        "plms",
        "table",
        _BETAS
        | {"timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False},
    ),
    "EulerDiscreteScheduler": Class(
        "euler",
        "k",
        _BETAS
        | _SIGMAS
        | {
            "timestep_spacing": "linspace", "interpolation_type": "linear", "sigma_min": None,
            "sigma_max": None, "timestep_type": "discrete", "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": Class(
        "euler_a",
        "k",
        _BETAS | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    ),
    "HeunDiscreteScheduler": Class(
        "heun", "k", _K | {"clip_sample": False, "clip_sample_range": 1.0}
    ),
    "KDPM2DiscreteScheduler": Class("dpm2", "k", _K),
    "KDPM2AncestralDiscreteScheduler": Class("dpm2_a", "k", _K),
    "LMSDiscreteScheduler": Class("lms", "k", _K | {"beta_start": 1e-4, "beta_end": 0.02}),
    "DPMSolverSDEScheduler": Class("dpmpp_sde", "k", _K | {"noise_sampler_seed": None}),
    "DPMSolverMultistepScheduler": Class(
        "dpmpp_2m",
        "dpm",
        _DPM
        | {
            "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False,
            "use_lu_lambdas": False, "final_sigmas_type": "zero",
            "lambda_min_clipped": -float("inf"), "variance_type": None,
            "rescale_betas_zero_snr": False,
        },
        DPM,
    ),
    "DPMSolverSinglestepScheduler": Class(
        "dpmpp_single",
        "dpm",
        {name: value for name, value in _DPM.items()
         if name not in ("timestep_spacing", "steps_offset")}
        | {
            "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False,
            "final_sigmas_type": "zero", "lambda_min_clipped": -float("inf"),
            "variance_type": None,
        },
        SINGLE,
    ),
    "DEISMultistepScheduler": Class(
        "deis", "dpm", _DPM | {"algorithm_type": "deis", "solver_type": "logrho"}, DEIS
    ),
    "UniPCMultistepScheduler": Class(
        "unipc_bh2",
        "dpm",
        _DPM
        | {
            "predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None,
            "final_sigmas_type": "zero", "rescale_betas_zero_snr": False, "sigma_min": None,
            "sigma_max": None, "shift_terminal": None,
        },
        UNIPC,
    ),
    "SASolverScheduler": Class(
        "sa_solver_bh1",
        "dpm",
        {name: value for name, value in _DPM.items()
         if name not in ("solver_order", "use_dynamic_shifting", "time_shift_type")}
        | {
            "algorithm_type": "data_prediction", "predictor_order": 2, "corrector_order": 2,
            "lambda_min_clipped": -float("inf"), "variance_type": None, "tau_func": None,
        },
        SA,
    ),
    "LCMScheduler": Class(
        "lcm", "lcm", _LCM, (Row("timestep_scaling", "timestep_scaling", FLOAT),)
    ),
    "TCDScheduler": Class("tcd", "lcm", _LCM),
    "FlowMatchEulerDiscreteScheduler": Class(
        "euler",
        "flow",
        _FLOW | {"stochastic_sampling": False},
    ),
    "FlowMatchLCMScheduler": Class(
        "lcm",
        "flow",
        _FLOW | {"scale_factors": None, "upscale_mode": "bicubic"},
    ),
    "FlowMatchHeunDiscreteScheduler": Class(
        "heun", "flow", {"num_train_timesteps": 1000, "shift": 1.0}
    ),
    "EDMEulerScheduler": Class("euler", "edm", _EDM),
    "EDMDPMSolverMultistepScheduler": Class(
        "dpmpp_2m",
        "edm",
        _EDM
        | _THRESHOLD
        | {
            "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
            "lower_order_final": True, "euler_at_final": False,
        },
        DPM,
    ),
}  # fmt: skip


class Solver(NamedTuple):
    """A sampler that shares its class with others."""

    scheduler: str
    """The class."""
    fields: dict[str, Any]
    """Fields that tell it from the others."""


SOLVERS = {
    "dpmpp_2m": Solver(
        *("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2})
    ),
    "dpmpp_3m": Solver(
        *("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3})
    ),
    "dpmpp_2m_sde": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm_solver": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
    "dpmpp_single": Solver("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_single_sde": Solver(
        *("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    ),
    "dpm_solver_single": Solver("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver"}),
    "unipc": Solver("UniPCMultistepScheduler", {}),
    "sa_solver_bh1": Solver("SASolverScheduler", {"algorithm_type": "data_prediction"}),
}


def class_of(sampler: str) -> str | None:
    """The class that a sampler is on discrete paths; None if there is none."""
    if sampler in SOLVERS:
        return SOLVERS[sampler].scheduler
    discrete = (name for name, kind in CLASSES.items() if kind.grids not in ("flow", "edm"))
    return next((name for name in discrete if CLASSES[name].sampler == sampler), None)
