"""scheduler_config.json <-> noise path, prediction target and sampling defaults. Torch-free.

A field that is missing has its class's default, which is seldom Stable Diffusion's value. What
decides path or target must be understood, or the file is refused; an option of the sampler that
difftool does not have is said and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from difftool.config.schema import SampleConfig
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import SCHEDULES, Discrete, Edm, Flow, Path
from difftool.diffusion.prediction import SIGMA_DATA
from difftool.diffusion.samplers import SAMPLERS
from difftool.errors import InputError, UsageError
from difftool.formats.diffusers.fields import VERSION, Fields, read_rows, write_rows
from difftool.formats.diffusers.scheduler_classes import (
    BETA_ROWS,
    CLASSES,
    DEIS,
    DPM,
    EDM_ROWS,
    FLOOR,
    FLOW_ROWS,
    PATH_FIELDS,
    SA,
    SINGLE,
    SOLVERS,
    SPACINGS,
    TARGET,
    Class,
    class_of,
)

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis")
"""Of DPM-Solver; the last is another class's word, for which it takes dpmsolver++."""
UNBOUNDED = 1e6
"""A bound of x0 that is none."""


class Scheduling(NamedTuple):
    """What a scheduler_config.json says."""

    path: dict[str, Any]
    target: str
    sample: dict[str, Any]
    says: str
    warnings: tuple[str, ...]


# --- reading ---------------------------------------------------------------------------------


def read_scheduler(config: Mapping[str, Any], where: str) -> Scheduling:
    """Path, target and sampling defaults of a scheduler; InputError if difftool has no such."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        what = f"{where} is of a class that difftool does not have"
        raise InputError(what, f"_class_name = {name}", _instead(name))
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
    sample |= _clip(fields, name)
    for option, value in fields.values.items():
        if option not in fields.seen and value != fields.defaults[option]:
            notes.append(f"{name}'s {option} = {value} is not supported and was left out")
    says = f"{name}: target {target}, path {path['kind']}"
    return Scheduling(path, target, sample, says, tuple(notes))


def _instead(name: object) -> str | None:
    """What to use in place of a class that is not read, where its method is known."""
    try:
        return f"--sampler {SAMPLERS.resolve(str(name))} is its method, with a scheduler of others"
    except UsageError as error:
        known = isinstance(name, str) and "choose from" not in (error.hint or "choose from")
        return error.hint if known else None


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's file says beside path and target, as far as any class knows it: what
    Preset.scheduler holds, which is empty where there is no scheduler, and only there."""
    known = set().union(*(kind.defaults for kind in CLASSES.values())) - PATH_FIELDS
    says = {k: v for k, v in config.items() if k in known and v != -math.inf}
    return says or {"thresholding": False}  # as it is in every class that has it


def _read_discrete(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    zero_snr = "rescale_betas_zero_snr" in f.values and f.get("rescale_betas_zero_snr", bool)
    betas = f.get("trained_betas", (list, type(None)))
    f.ignore("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    if betas is not None:
        if not all(type(beta) in (int, float) for beta in betas):
            f.refuse("trained_betas")
        path: dict[str, Any] = {"kind": "discrete", "betas": [float(beta) for beta in betas]}
    else:
        path = {"kind": "discrete"} | read_rows(f, BETA_ROWS)
    if zero_snr:
        path["zero_snr"] = True
    target = TARGET.read(f, "prediction_type")
    if target == "eps" and zero_snr:
        raise InputError(
            f"{f.where} contradicts itself",
            "prediction_type = epsilon with rescale_betas_zero_snr: at zero SNR, eps says nothing",
        )
    return path, target, _grid(name, kind, f, path)


def _grid(name: str, kind: Class, f: Fields, path: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings that say which levels are visited."""
    spacing, offset = "linspace", 0
    if "timestep_spacing" in f.values:
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
    least = f.number("lambda_min_clipped") if "lambda_min_clipped" in f.values else -math.inf
    if least > -math.inf and spacing != "trailing":
        grid["lam_min"] = least
    for option, (schedule, time) in SPACINGS.items():
        if option in f.values and f.get(option, bool):
            if name == "DPMSolverMultistepScheduler" and path.get("schedule") == "cosine":
                time = "floor"
            options = {"range": grid} if kind.grids == "k" else {"time": time}
            if name.startswith("KDPM2") and schedule == "karras":
                options["time"] = time
            options |= {
                key: f.number(key)
                for key in ("sigma_min", "sigma_max")
                if f.values.get(key) is not None
            }
            grid = {"kind": schedule}
            if path.get("zero_snr"):  # these divide a finite range
                options["terminal_alpha_bar"] = FLOOR
            break
    if grid["kind"] == "normal":  # the one whose times are fractional
        options["lookup"] = "linear"
    if "set_alpha_to_one" in f.values:
        options |= {} if f.get("set_alpha_to_one", bool) else {"end": "first"}
    elif name in ("DEISMultistepScheduler", "SASolverScheduler"):
        options["end"] = "first"
    elif f.values.get("final_sigmas_type") == "sigma_min":
        options["end"] = "first"
    f.ignore("final_sigmas_type", "sigma_min", "sigma_max")
    start = {"k": "hypot" if spacing == "leading" else "sigma"}.get(kind.grids, "unit")
    schedule = grid.pop("kind")
    return {"schedule": schedule, "schedule_options": grid | options, "start_noise": start}


def _without_usual_steps(path: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in path.items() if (key, value) != ("steps", 1000)}


def _read_flow(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    if f.values.get("invert_sigmas"):
        f.refuse("invert_sigmas")
    path = {"kind": "flow"} | _without_usual_steps(read_rows(f, FLOW_ROWS))
    options: dict[str, Any] = {}
    if f.values.get("shift_terminal") is not None:
        options["shift_terminal"] = f.number("shift_terminal")
    f.ignore("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    f.ignore("shift_terminal", "time_shift_type")
    return path, "flow", {"schedule": "sd3", "schedule_options": options}


def _read_flow_dpm(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    path = {"kind": "flow", "shift": f.number("flow_shift")}
    f.ignore("use_flow_sigmas", *PATH_FIELDS, "steps_offset", "time_shift_type")
    f.ignore("timestep_spacing", "final_sigmas_type")
    schedule = "sgm_uniform" if name.startswith("UniPC") else "flow_dpm"
    target = TARGET.read(f, "prediction_type")
    if target == "eps":  # the class default: nobody trains a flow to predict eps
        f.refuse("prediction_type")
    return path, target, {"schedule": schedule, "schedule_options": {}}


def _read_edm(name: str, kind: Class, f: Fields) -> tuple[dict[str, Any], str, dict[str, Any]]:
    path = {"kind": "edm"} | _without_usual_steps(read_rows(f, EDM_ROWS))
    kind_of = f.one_of("prediction_type", "epsilon", "v_prediction")
    target, data = {"epsilon": ("edm", SIGMA_DATA), "v_prediction": ("edm_v", 1.0)}[kind_of]
    if path["sigma_data"] != data:
        f.refuse("sigma_data")
    schedule = f.one_of("sigma_schedule", "karras", "exponential")
    rho = f.number("rho")
    options: dict[str, Any] = {"rho": rho} if schedule == "karras" and rho != 7.0 else {}
    if f.one_of("final_sigmas_type", "zero", "sigma_min") == "sigma_min":
        options["end"] = "none"
    sample = {"schedule": schedule, "schedule_options": options, "start_noise": "hypot"}
    return path, target, sample


def _read_continuous(
    name: str, kind: Class, f: Fields
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Euler told log(sigma) / 4 and v: CosXL's first configuration."""
    f.ignore("timestep_type", *PATH_FIELDS, "steps_offset", "timestep_spacing")
    f.ignore("interpolation_type", "use_karras_sigmas")
    if f.values["prediction_type"] != "v_prediction" or not f.values["use_karras_sigmas"]:
        f.refuse("timestep_type")
    path: dict[str, Any] = {"kind": "edm", "sigma_data": 1.0}
    path |= {key: f.number(key) for key in ("sigma_min", "sigma_max")}
    options = {"end": "none"} if f.values["final_sigmas_type"] == "sigma_min" else {}
    f.ignore("final_sigmas_type")
    sample = {"schedule": "karras", "schedule_options": options, "start_noise": "hypot"}
    return path, "edm_v", sample


def _clip(f: Fields, name: str) -> dict[str, Any]:
    """Thresholding of x0: dynamic, where both kinds are asked for."""
    if name == "TCDScheduler":  # it has the fields and minds none of them
        f.ignore("clip_sample", "clip_sample_range", "thresholding")
        return {"clip": "none"}
    numbers = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value")
    bound, ratio, largest = (f.number(name) if name in f.values else 1.0 for name in numbers)
    if "thresholding" in f.values and f.get("thresholding", bool):
        f.ignore("clip_sample")
        if largest < 1:
            f.refuse("sample_max_value")
        if largest == 1:
            return {"clip": "static"}
        quantile = {} if ratio == 0.995 else {"clip_quantile": ratio}
        return {"clip": "dynamic", "clip_range": largest} | quantile
    if "clip_sample" in f.values and f.get("clip_sample", bool):
        return {"clip": "static"} | ({} if bound == 1 else {"clip_range": bound})
    return {"clip": "none"}


def _sampler(
    name: str, kind: Class, target: str, f: Fields, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The sampler, where a class stands for several, and its options."""
    if name == "PNDMScheduler":
        start = "heun" if f.get("skip_prk_steps", bool) else "runge_kutta"
        return "plms", {"target": target, "start": start}
    if f.values.get("stochastic_sampling"):
        f.ignore("stochastic_sampling")
        return "lcm", {}
    if kind.grids == "flow" and kind.sampler == "heun":
        return "heun", {"variable": "t"}
    if str(f.values.get("variance_type")).startswith("learned"):
        notes.append("the learned variance is not used in sampling")
    if name == "TCDScheduler":
        f.ignore("timestep_scaling")
        return "tcd", {"eta": 0.0}  # what every pipeline passes, whatever the class's own 0.3
    if kind.options is DEIS:
        f.ignore("algorithm_type")
    if kind.options is SA:
        f.one_of("algorithm_type", "data_prediction", "dpmsolver", "dpmsolver++")
    if kind.options is SINGLE:
        return _single(name, f)
    return _dpm_solver(f) if kind.options is DPM else (kind.sampler, read_rows(f, kind.options))


def _dpm_solver(f: Fields) -> tuple[str, dict[str, Any]]:
    order = f.one_of("solver_order", 1, 2, 3)
    if f.one_of("algorithm_type", *ALGORITHMS) == "deis":
        f.values["algorithm_type"] = "dpmsolver++"
    algorithm = f.values["algorithm_type"]
    stochastic = algorithm == "sde-dpmsolver++"
    if order == 3 and stochastic:
        f.refuse("solver_order")
    options = read_rows(f, DPM)
    if stochastic:  # of order 2 at most, the last step is of order 1 whatever these say
        options |= {"brownian": False, "lower_order_final": "short"}
    sampler = "dpmpp_2m"  # that has an option for order 1
    if order != 1 or algorithm != "dpmsolver++":
        sampler = _solver("DPMSolverMultistepScheduler", f)
    return sampler, {k: v for k, v in options.items() if k in SAMPLERS[sampler].options}


def _single(name: str, f: Fields) -> tuple[str, dict[str, Any]]:
    if f.one_of("algorithm_type", *ALGORITHMS) == "deis":
        f.values["algorithm_type"] = "dpmsolver++"
    sampler, options = _solver(name, f), read_rows(f, SINGLE)
    if sampler == "dpmpp_single_sde" and (options["order"], options["solver_type"]) == (3, "heun"):
        f.refuse("solver_order")
    return sampler, options


def _solver(scheduler: str, f: Fields) -> str:
    """The sampler that a class is, by the fields that tell it from the others of the class."""
    rows = ((name, solver) for name, solver in SOLVERS.items() if solver.scheduler == scheduler)
    return next(name for name, solver in rows if solver.fields.items() <= f.values.items())


# --- writing ---------------------------------------------------------------------------------


def path_fields(path: Discrete, target: str) -> dict[str, Any]:
    """What a file says of path and target."""
    return write_rows(vars(path), BETA_ROWS) | {
        "trained_betas": None if path.betas is None else list(path.betas),
        "prediction_type": TARGET.write(target),
        "rescale_betas_zero_snr": path.zero_snr,
    }


def write_scheduler(
    path: Path, target: str, sample: SampleConfig, scheduler: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The scheduler_config.json that comes nearest to a model's path, target and sampler.

    scheduler: what the model carries for other samplers, Preset.scheduler.
    """
    sampler, grid = SAMPLERS.resolve(sample.sampler), GRIDS.resolve(sample.schedule)
    if isinstance(path, Flow):
        name, fields = _write_flow(path, sample, sampler)
    elif isinstance(path, Edm):
        name, fields = _write_edm(path, target, sample, sampler, grid)
    else:
        assert isinstance(path, Discrete)
        name, fields = _write_discrete(path, target, sample, sampler, grid)
    options = SAMPLERS[sampler].defaults | sample.sampler_options
    if sampler in SOLVERS and CLASSES[name].options is CLASSES[SOLVERS[sampler].scheduler].options:
        fields |= SOLVERS[sampler].fields
    fields |= write_rows(options, [row for row in CLASSES[name].options if row.ours in options])
    defaults = CLASSES[name].defaults
    values = defaults | {key: value for key, value in fields.items() if key in defaults}
    values |= {key: value for key, value in (scheduler or {}).items() if key not in defaults}
    return {"_class_name": name, "_diffusers_version": VERSION, **dict(sorted(values.items()))}


def _write_flow(path: Flow, sample: SampleConfig, sampler: str) -> tuple[str, dict[str, Any]]:
    name = f"FlowMatch{'Heun' if sampler == 'heun' else 'Euler'}DiscreteScheduler"
    return name, write_rows(vars(path), FLOW_ROWS) | {
        "stochastic_sampling": sampler == "lcm",
        "shift_terminal": sample.schedule_options.get("shift_terminal"),
    }


def _write_edm(
    path: Edm, target: str, sample: SampleConfig, sampler: str, grid: str
) -> tuple[str, dict[str, Any]]:
    solver = sampler in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde")
    options = sample.schedule_options
    name = "EDMDPMSolverMultistepScheduler" if solver else "EDMEulerScheduler"
    return name, write_rows(vars(path), EDM_ROWS) | {
        "prediction_type": "v_prediction" if target == "edm_v" else "epsilon",
        "sigma_schedule": "exponential" if grid == "exponential" else "karras",
        "rho": options.get("rho", 7.0) if grid == "karras" else 7.0,
        "final_sigmas_type": "sigma_min" if options.get("end") == "none" else "zero",
    }


def _write_discrete(
    path: Discrete, target: str, sample: SampleConfig, sampler: str, grid: str
) -> tuple[str, dict[str, Any]]:
    name = class_of(sampler) or "DDIMScheduler"
    if path.zero_snr and "rescale_betas_zero_snr" not in CLASSES[name].defaults:
        name = "DDIMScheduler"
    options = sample.schedule_options
    within = options.get("range", {}) if isinstance(options.get("range", {}), dict) else {}
    spacing = GRIDS.resolve(within["kind"]) if "kind" in within else grid
    first = options.get("end") == "first"
    lu = grid == "exponential" and options.get("time") == "nearest"
    fields = path_fields(path, target) | {
        "timestep_spacing": next(
            (s for s in ("leading", "trailing") if spacing.startswith(s)), "linspace"
        ),
        "steps_offset": {**within, **options}.get("offset", 0),
        **{flag: kind == grid and not lu for flag, (kind, _) in SPACINGS.items()},
        "use_lu_lambdas": lu,
        "sigma_min": options.get("sigma_min"),
        "sigma_max": options.get("sigma_max"),
        "set_alpha_to_one": not first,
        "final_sigmas_type": "sigma_min" if first else "zero",
        "lambda_min_clipped": options.get("lam_min", -math.inf),
        "original_inference_steps": options.get("original_steps", 50),
        "skip_prk_steps": sample.sampler_options.get("start") != "runge_kutta",
        "clip_sample": sample.clip == "static",
        "clip_sample_range": sample.clip_range or 1.0,
        "thresholding": sample.clip == "dynamic",
        "sample_max_value": (sample.clip_range or UNBOUNDED) if sample.clip == "dynamic" else 1.0,
        "dynamic_thresholding_ratio": sample.clip_quantile,
    }
    if path.schedule == "sigmoid" and name != "DDPMScheduler" and path.betas is None:
        betas = SCHEDULES["sigmoid"](path.steps, path.beta_start, path.beta_end)
        fields |= {"beta_schedule": "linear", "trained_betas": betas}
    return name, fields
