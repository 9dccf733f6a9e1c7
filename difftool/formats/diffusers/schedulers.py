"""scheduler_config.json <-> noise path, prediction target and sampling defaults. Torch-free.

A field that is missing has its class's default, which is seldom Stable Diffusion's value. What
decides path or target must be understood, or the file is refused; an option of the sampler that
difftool does not have is said and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from difftool.config.schema import SampleConfig
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import SCHEDULES, Discrete, Edm, Flow, Path
from difftool.diffusion.prediction import SIGMA_DATA
from difftool.errors import InputError
from difftool.formats.diffusers.fields import VERSION, Fields

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


class Class(NamedTuple):
    """One of diffusers' schedulers."""

    sampler: str
    grids: str
    """How its steps are spaced: table, k (fractional, noise scales), dpm (open), lcm, flow, edm."""
    defaults: dict[str, Any]


CLASSES: dict[str, Class] = {
    "DDIMScheduler": Class("ddim", "table", _TABLE | _CLIP | {"set_alpha_to_one": True}),
    "DDPMScheduler": Class("ddpm", "table", _TABLE | _CLIP | {"variance_type": "fixed_small"}),
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
    ),
    "DEISMultistepScheduler": Class(
        "deis", "dpm", _DPM | {"algorithm_type": "deis", "solver_type": "logrho"}
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
    ),
    "LCMScheduler": Class("lcm", "lcm", _LCM),
    "TCDScheduler": Class("tcd", "lcm", _LCM),
    "FlowMatchEulerDiscreteScheduler": Class(
        "euler",
        "flow",
        _SIGMAS
        | {
            "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False,
            "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
            "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
            "time_shift_type": "exponential", "stochastic_sampling": False,
        },
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
    ),
}  # fmt: skip


class Scheduling(NamedTuple):
    """What a scheduler_config.json says."""

    path: dict[str, Any]
    target: str
    sample: dict[str, Any]
    scheduler: dict[str, Any]
    """What it says beside path and target, for other classes too: see Preset.scheduler."""
    says: str
    warnings: tuple[str, ...]


# --- reading ---------------------------------------------------------------------------------


def read_scheduler(config: Mapping[str, Any], where: str) -> Scheduling:
    """Path, target and sampling defaults of a scheduler; InputError if difftool has no such."""
    from difftool.diffusion.samplers import SAMPLERS

    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        what = f"{where} is of a class that difftool does not have"
        raise InputError(what, f"_class_name = {name}")
    kind = CLASSES[name]
    known = {key: value for key, value in config.items() if key in kind.defaults}
    fields = Fields(known, kind.defaults, where)
    notes: list[str] = []
    read = {"flow": _read_flow, "edm": _read_edm}.get(kind.grids, _read_discrete)
    if fields.values.get("use_flow_sigmas"):
        read = _read_flow_dpm
    elif fields.values.get("timestep_type") == "continuous":
        read = _read_continuous
    path, target, sample = read(name, kind, fields)
    sampler, options = _sampler(name, kind, target, fields, notes)
    defaults = SAMPLERS[sampler].defaults
    sample["sampler"] = sampler
    sample["sampler_options"] = {k: v for k, v in options.items() if v != defaults[k]}
    sample["clip"] = _clip(fields)
    if sampler == "ddim" and name != "DDIMScheduler" and sample["clip"] != "none":
        sample["rederive_eps"] = True  # a solver of first order, which goes by x0
    for option, value in fields.values.items():
        if option not in fields.seen and value != fields.defaults[option]:
            notes.append(f"{name}'s {option} = {value} is not supported and was left out")
    says = f"{name}: target {target}, path {path['kind']}"
    return Scheduling(path, target, sample, kept(config), says, tuple(notes))


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's file says beside path and target, as far as any class knows it."""
    known = set().union(*(kind.defaults for kind in CLASSES.values())) - PATH_FIELDS
    return {k: v for k, v in config.items() if k in known and v != -float("inf")}


def _target(f: Fields) -> str:
    name = f.get("prediction_type", str)
    if name not in TARGETS:
        f.refuse("prediction_type")
    return TARGETS[name]


def _read_discrete(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    zero_snr = "rescale_betas_zero_snr" in f.values and f.get("rescale_betas_zero_snr", bool)
    betas = f.get("trained_betas", (list, type(None)))
    f.ignore("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    if betas is not None:
        if not all(type(beta) in (int, float) for beta in betas):
            f.refuse("trained_betas")
        path: dict[str, Any] = {"kind": "discrete", "betas": [float(beta) for beta in betas]}
    else:
        path = {"kind": "discrete", "schedule": BETAS[f.one_of("beta_schedule", *BETAS)]}
        path["steps"] = f.get("num_train_timesteps", int)
        path["beta_start"] = float(f.get("beta_start", (int, float)))
        path["beta_end"] = float(f.get("beta_end", (int, float)))
    if zero_snr:
        path["zero_snr"] = True
    target = _target(f)
    if target == "eps" and zero_snr:
        raise InputError(
            f"{f.where} contradicts itself",
            "prediction_type = epsilon with rescale_betas_zero_snr: at zero SNR, eps says nothing",
        )
    return path, target, _grid(name, kind, f, path)


def _grid(name: str, kind: Class, f: Fields, path: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings that say which levels are visited."""
    spacing = f.one_of("timestep_spacing", "leading", "trailing", "linspace")
    offset = f.get("steps_offset", int)
    if kind.grids == "lcm":
        original = f.get("original_inference_steps", int)
        # TCD's last step ends at entry 0 of the table, LCM's at x0.
        options = {"end": "first"} if name == "TCDScheduler" else {}
        f.ignore("set_alpha_to_one")
        options |= {} if original == 50 else {"original_steps": original}
        return {"schedule": "lcm", "schedule_options": options}
    grid: dict[str, Any] = {
        "linspace": {"kind": {"k": "normal", "dpm": "linspace_open"}.get(kind.grids, "linspace")},
        "leading": {
            "kind": "leading_open" if kind.grids == "dpm" else "leading",
            **({"offset": offset} if offset else {}),
        },
        "trailing": {"kind": "trailing"},
    }[spacing]
    options = {}
    spaced = {
        "use_karras_sigmas": ("karras", "nearest"),
        "use_exponential_sigmas": ("exponential", "floor"),
        "use_beta_sigmas": ("beta_sigma", "floor"),
        "use_lu_lambdas": ("exponential", "nearest"),
    }
    for option, (schedule, time) in spaced.items():
        if option in f.values and f.get(option, bool):
            options = {"range": grid} if kind.grids == "k" else {"time": time}
            options |= {
                key: float(f.get(key, (int, float)))
                for key in ("sigma_min", "sigma_max")
                if f.values.get(key) is not None
            }
            grid = {"kind": schedule}
            if path.get("zero_snr"):  # these divide a finite range
                options["terminal_alpha_bar"] = FLOOR
            break
    if grid["kind"] == "normal":  # the one whose times are fractional
        options["lookup"] = "linear"
    if name in ("DDIMScheduler", "PNDMScheduler"):
        options |= _end("set_alpha_to_one", f)
    elif name == "DEISMultistepScheduler":
        options["end"] = "first"
    elif f.values.get("final_sigmas_type") == "sigma_min":
        options["end"] = "first"
    f.ignore("final_sigmas_type", "sigma_min", "sigma_max")
    start = {"k": "hypot" if spacing == "leading" else "sigma"}.get(kind.grids, "unit")
    schedule = grid.pop("kind")
    settings = {"schedule": schedule, "schedule_options": grid | options, "start_noise": start}
    return settings


def _end(name: str, f: Fields) -> dict[str, Any]:
    return {} if f.get(name, bool) else {"end": "first"}


def _read_flow(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    if f.values.get("invert_sigmas"):
        f.refuse("invert_sigmas")
    path: dict[str, Any] = {"kind": "flow", "shift": float(f.get("shift", (int, float)))}
    steps = f.get("num_train_timesteps", int)
    if steps != 1000:
        path["steps"] = steps
    options: dict[str, Any] = {}
    if f.values.get("shift_terminal") is not None:
        options["shift_terminal"] = float(f.get("shift_terminal", (int, float)))
    f.ignore("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    f.ignore("shift_terminal", "time_shift_type")
    return path, "flow", {"schedule": "sd3", "schedule_options": options}


def _read_flow_dpm(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    path = {"kind": "flow", "shift": float(f.get("flow_shift", (int, float)))}
    f.ignore("use_flow_sigmas", *_BETAS, "rescale_betas_zero_snr", "time_shift_type")
    f.ignore("timestep_spacing", "final_sigmas_type")
    schedule = "sgm_uniform" if name.startswith("UniPC") else "flow_dpm"
    target = _target(f)
    if target == "eps":  # the class default: nobody trains a flow to predict eps
        f.refuse("prediction_type")
    return path, target, {"schedule": schedule, "schedule_options": {}}


def _read_edm(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    path: dict[str, Any] = {"kind": "edm"}
    path |= {k: float(f.get(k, (int, float))) for k in ("sigma_min", "sigma_max", "sigma_data")}
    steps = f.get("num_train_timesteps", int)
    if steps != 1000:
        path["steps"] = steps
    kind_of = f.one_of("prediction_type", "epsilon", "v_prediction")
    target, data = {"epsilon": ("edm", SIGMA_DATA), "v_prediction": ("edm_v", 1.0)}[kind_of]
    if path["sigma_data"] != data:
        f.refuse("sigma_data")
    schedule = f.one_of("sigma_schedule", "karras", "exponential")
    rho = float(f.get("rho", (int, float)))
    options: dict[str, Any] = {"rho": rho} if schedule == "karras" and rho != 7.0 else {}
    if f.one_of("final_sigmas_type", "zero", "sigma_min") == "sigma_min":
        options["end"] = "none"
    sample = {"schedule": schedule, "schedule_options": options, "start_noise": "hypot"}
    return path, target, sample


def _read_continuous(
    name: str, kind: Class, f: Fields
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Euler told log(sigma) / 4 and v: CosXL's first configuration."""
    f.ignore("timestep_type", *_BETAS, "timestep_spacing", "rescale_betas_zero_snr")
    f.ignore("interpolation_type", "use_karras_sigmas")
    if f.values["prediction_type"] != "v_prediction" or not f.values["use_karras_sigmas"]:
        f.refuse("timestep_type")
    path: dict[str, Any] = {"kind": "edm", "sigma_data": 1.0}
    path |= {key: float(f.get(key, (int, float))) for key in ("sigma_min", "sigma_max")}
    options = {"end": "none"} if f.values["final_sigmas_type"] == "sigma_min" else {}
    f.ignore("final_sigmas_type")
    sample = {"schedule": "karras", "schedule_options": options, "start_noise": "hypot"}
    return path, "edm_v", sample


def _clip(f: Fields) -> str:
    """Thresholding of x0."""
    clip = "none"
    if f.values.get("clip_sample"):
        clip = "static"
        f.ignore("clip_sample")
        if f.values["clip_sample_range"] == 1.0:
            f.ignore("clip_sample_range")
    if f.values.get("thresholding"):
        f.ignore("thresholding", "sample_max_value")
        clip = "static" if f.values["sample_max_value"] == 1.0 else "dynamic"
    f.ignore("clip_sample", "thresholding")
    if not f.values.get("clip_sample"):
        f.ignore("clip_sample_range")
    if clip != "dynamic":
        f.ignore("dynamic_thresholding_ratio", "sample_max_value")
    return clip


def _sampler(
    name: str, kind: Class, target: str, f: Fields, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The sampler, where a class stands for several, and its options."""
    options: dict[str, Any] = {}
    if name == "DDPMScheduler":
        learned = ("learned", "learned_range")
        small, large = (("fixed_small", "fixed_small_log"), ("fixed_large", "fixed_large_log"))
        variance = f.one_of("variance_type", *small, *large, *learned)
        if variance in learned:
            notes.append("the learned variance is not used in sampling")
        return "ddpm", {"variance": "large" if variance in large else "small"}
    if name == "PNDMScheduler":
        if not f.get("skip_prk_steps", bool):
            notes.append("PNDM's Runge-Kutta start (skip_prk_steps = False) is left out")
        return "plms", {"target": target}
    if "DPMSolverMultistep" in name:
        return _dpm_solver(f)
    if name == "DEISMultistepScheduler":
        f.one_of("solver_type", "logrho")
        options = {"order": f.one_of("solver_order", 1, 2, 3)} | _lower_order_final(f)
    elif name == "UniPCMultistepScheduler":
        options = {"order": f.one_of("solver_order", 1, 2, 3)}
        options |= {"solver_type": f.one_of("solver_type", "bh2", "bh1")}
        options |= {"target": "x0" if f.get("predict_x0", bool) else "eps"}
        options |= {"lower_order_final": "always" if f.get("lower_order_final", bool) else "never"}
        options |= {"disable_corrector": tuple(f.get("disable_corrector", list))}
    elif kind.grids == "flow" and kind.sampler == "heun":
        options = {"variable": "t"}
    elif f.values.get("stochastic_sampling"):
        f.ignore("stochastic_sampling")
        return "lcm", {}
    return kind.sampler, options


def _dpm_solver(f: Fields) -> tuple[str, dict[str, Any]]:
    order = f.one_of("solver_order", 1, 2, 3)
    kind = f.one_of("algorithm_type", "dpmsolver", "dpmsolver++", "sde-dpmsolver++")
    if order == 1 and kind != "sde-dpmsolver++":
        f.ignore("solver_type", "lower_order_final", "euler_at_final")
        return "ddim", {}
    options: dict[str, Any] = {"solver_type": f.one_of("solver_type", "midpoint", "heun")}
    if kind == "sde-dpmsolver++":
        if order == 3:
            f.refuse("solver_order")
        f.ignore("lower_order_final", "euler_at_final")
        return "dpmpp_2m_sde", options | {"order": order, "brownian": False}
    if kind == "dpmsolver":
        return "dpm_solver", options | {"order": order} | _lower_order_final(f)
    return f"dpmpp_{order}m", options | _lower_order_final(f)


def _lower_order_final(f: Fields) -> dict[str, Any]:
    """How the order falls towards the end."""
    final = "euler_at_final" in f.values and f.get("euler_at_final", bool)
    short = f.get("lower_order_final", bool)
    return {"lower_order_final": "final" if final else "short" if short else "never"}


# --- writing ---------------------------------------------------------------------------------


def write_scheduler(
    path: Path, target: str, sample: SampleConfig, scheduler: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The scheduler_config.json that comes nearest to a model's path, target and sampler.

    scheduler: what the model carries for other samplers, Preset.scheduler.
    """
    from difftool.diffusion.samplers import SAMPLERS

    sampler, grid = SAMPLERS.resolve(sample.sampler), GRIDS.resolve(sample.schedule)
    options = sample.schedule_options
    if isinstance(path, Flow):
        heun = sampler == "heun"
        name = f"FlowMatch{'Heun' if heun else 'Euler'}DiscreteScheduler"
        fields = {"shift": path.shift, "num_train_timesteps": path.steps}
        if name == "FlowMatchEulerDiscreteScheduler":
            fields["stochastic_sampling"] = sampler == "lcm"
            fields["shift_terminal"] = options.get("shift_terminal")
    elif isinstance(path, Edm):
        solver = sampler in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde")
        name = "EDMDPMSolverMultistepScheduler" if solver else "EDMEulerScheduler"
        fields = {
            "sigma_min": path.sigma_min,
            "sigma_max": path.sigma_max,
            "sigma_data": path.sigma_data,
            "num_train_timesteps": path.steps,
            "prediction_type": "v_prediction" if target == "edm_v" else "epsilon",
            "sigma_schedule": "exponential" if grid == "exponential" else "karras",
            "rho": options.get("rho", 7.0) if grid == "karras" else 7.0,
            "final_sigmas_type": "sigma_min" if options.get("end") == "none" else "zero",
        }
        if solver:
            chosen = SAMPLERS[sampler].defaults | sample.sampler_options
            fields |= _write_dpm_solver(sampler, chosen)
    else:
        assert isinstance(path, Discrete)
        name, fields = _write_discrete(path, target, sample, sampler, grid)
    defaults = CLASSES[name].defaults
    values = defaults | {key: value for key, value in fields.items() if key in defaults}
    values |= {key: value for key, value in (scheduler or {}).items() if key not in defaults}
    return {"_class_name": name, "_diffusers_version": VERSION, **dict(sorted(values.items()))}


def _write_discrete(
    path: Discrete, target: str, sample: SampleConfig, sampler: str, grid: str
) -> tuple[str, dict[str, Any]]:
    from difftool.diffusion.samplers import SAMPLERS

    names = {
        SAMPLERS.resolve(kind.sampler): name
        for name, kind in CLASSES.items()
        if kind.grids not in ("flow", "edm")
    }
    solvers = ("dpmpp_3m", "dpmpp_2m_sde", "dpm_solver")
    names |= dict.fromkeys(solvers, "DPMSolverMultistepScheduler")
    names["unipc"] = "UniPCMultistepScheduler"
    name = names.get(sampler, "DDIMScheduler")
    if path.zero_snr and "rescale_betas_zero_snr" not in CLASSES[name].defaults:
        name = "DDIMScheduler"
    options, chosen = sample.schedule_options, sample.sampler_options
    within = options.get("range", {}) if isinstance(options.get("range", {}), dict) else {}
    spacing = GRIDS.resolve(within["kind"]) if "kind" in within else grid
    first = options.get("end") == "first"
    fields: dict[str, Any] = {
        "num_train_timesteps": path.steps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": {ours: theirs for theirs, ours in BETAS.items()}[path.schedule],
        "trained_betas": None if path.betas is None else list(path.betas),
        "prediction_type": next((t for t, ours in TARGETS.items() if ours == target), "epsilon"),
        "rescale_betas_zero_snr": path.zero_snr,
        "timestep_spacing": next(
            (s for s in ("leading", "trailing") if spacing.startswith(s)), "linspace"
        ),
        "steps_offset": {**within, **options}.get("offset", 0),
        "use_karras_sigmas": grid == "karras",
        "use_exponential_sigmas": grid == "exponential" and options.get("time") != "nearest",
        "use_lu_lambdas": grid == "exponential" and options.get("time") == "nearest",
        "use_beta_sigmas": grid == "beta_sigma",
        "sigma_min": options.get("sigma_min"),
        "sigma_max": options.get("sigma_max"),
        "set_alpha_to_one": not first,
        "final_sigmas_type": "sigma_min" if first else "zero",
        "original_inference_steps": options.get("original_steps", 50),
        "skip_prk_steps": True,
        "clip_sample": sample.clip == "static",
        "thresholding": sample.clip == "dynamic",
        "variance_type": "fixed_large" if chosen.get("variance") == "large" else "fixed_small",
    }
    if path.schedule == "sigmoid" and name != "DDPMScheduler" and path.betas is None:
        betas = SCHEDULES["sigmoid"](path.steps, path.beta_start, path.beta_end)
        fields |= {"beta_schedule": "linear", "trained_betas": betas}
    method = SAMPLERS[sampler]
    chosen = method.defaults | chosen
    if name == "DPMSolverMultistepScheduler":
        fields |= _write_dpm_solver(sampler, chosen)
    elif name == "UniPCMultistepScheduler":
        fields |= {
            "solver_order": chosen["order"],
            "solver_type": chosen["solver_type"],
            "predict_x0": chosen["target"] == "x0",
            "disable_corrector": list(chosen["disable_corrector"]),
            "lower_order_final": chosen["lower_order_final"] != "never",
        }
    elif name == "DEISMultistepScheduler":
        fields |= {
            "solver_order": chosen["order"],
            "lower_order_final": chosen["lower_order_final"] != "never",
        }
    return name, fields


def _write_dpm_solver(sampler: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"dpmpp_2m_sde": "sde-dpmsolver++", "dpm_solver": "dpmsolver"}
    return {
        "solver_order": {"dpmpp_2m": 2, "dpmpp_3m": 3}.get(sampler, chosen.get("order")),
        "algorithm_type": kinds.get(sampler, "dpmsolver++"),
        "solver_type": chosen["solver_type"],
        "variance_type": None,
        "euler_at_final": chosen.get("lower_order_final") == "final",
        "lower_order_final": chosen.get("lower_order_final", "short") != "never",
    }
