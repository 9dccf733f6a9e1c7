"""`--sampler X` on a published model: diffusers' X built from its scheduler. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difftool.config.schema import Preset
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Discrete, build_path
from difftool.diffusion.samplers import SAMPLERS
from difftool.formats.diffusers.schedulers import BETAS, CLASSES, FLOOR, TARGETS, read_scheduler

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm_solver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Classes that stand for several samplers: the class, and the fields that choose this one."""
ORDERS = {"dpmpp_2m": 2, "dpmpp_3m": 3, "dpmpp_2m_sde": 2}
"""Samplers whose names say their order."""
FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta_sigma": "use_beta_sigmas",
}
"""Grids that are a flag of most classes, and the flag."""
SOLVER_TYPES = {
    "DPMSolverMultistepScheduler": ("midpoint", "heun"),
    "UniPCMultistepScheduler": ("bh2", "bh1"),
    "DEISMultistepScheduler": ("logrho",),
}
"""What `solver_type` means differs; a class takes its first word for the words of others."""


def switched(
    preset: Preset, sampler: str | None, schedule: str | None, floor: bool = False
) -> dict[str, Any]:
    """SampleConfig's fields for a sampler, or a grid, or both, of a model that carries a scheduler.

    A sampler without a class in diffusers gets Euler's grid. floor: diffusers' alpha_bar = 2^-24
    where its class has it for zero terminal SNR, in place of 0.
    """
    path = build_path(preset.path)
    assert isinstance(path, Discrete)
    sampler = SAMPLERS.resolve(sampler or preset.sample.sampler)
    schedule = None if schedule is None else GRIDS.resolve(schedule)
    name, chosen = _class_of(sampler)
    config = {**preset.scheduler, **chosen} | {
        "_class_name": name,
        "beta_schedule": {ours: theirs for theirs, ours in BETAS.items()}[path.schedule],
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "trained_betas": None if path.betas is None else list(path.betas),
        "num_train_timesteps": path.steps,
        "prediction_type": {ours: theirs for theirs, ours in TARGETS.items()}[preset.target],
        "rescale_betas_zero_snr": path.zero_snr,
    }
    config |= {"solver_order": ORDERS[sampler]} if sampler in ORDERS else {}
    words = SOLVER_TYPES.get(name, ())
    if config.get("solver_type") not in words:
        config.pop("solver_type", None)
    if config.get("variance_type") and name.startswith("DPM"):
        del config["variance_type"]  # DDPM's
    if schedule in FLAGS:
        config |= dict.fromkeys((*FLAGS.values(), "use_lu_lambdas"), False)
        config[FLAGS[schedule]] = True
    known = {"_class_name": name} | {
        key: value for key, value in config.items() if key in CLASSES[name].defaults
    }
    sample = read_scheduler(known, f"the scheduler of {preset.name}").sample
    sample["sampler_options"] = _options(sampler, sample)
    sample["sampler"] = sampler
    if schedule and schedule != sample["schedule"]:
        options = sample["schedule_options"]
        ends = {"end": options["end"]} if "end" in options else {}
        if schedule == "normal" and CLASSES[name].grids == "k":
            ends["lookup"] = "linear"
        sample["schedule"], sample["schedule_options"] = schedule, ends
    if path.zero_snr and floor and "rescale_betas_zero_snr" in CLASSES[name].defaults:
        if CLASSES[name].grids in ("k", "dpm"):
            sample["schedule_options"]["terminal_alpha_bar"] = FLOOR
    return {"rederive_eps": None, "start_noise": "unit"} | sample


def _class_of(sampler: str) -> tuple[str, dict[str, Any]]:
    if sampler in SOLVERS:
        return SOLVERS[sampler]
    tables = {k.sampler: name for name, k in CLASSES.items() if k.grids not in ("flow", "edm")}
    return tables.get(sampler, "EulerDiscreteScheduler"), {}


def _options(sampler: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The options of that sampler that make it the one that was read."""
    read = SAMPLERS[sample["sampler"]]
    method = SAMPLERS[sampler]
    if read.options.keys() - method.options.keys() or read.loop is not method.loop:
        return {}
    whole = read.defaults | sample["sampler_options"]
    return {name: v for name, v in whole.items() if v != method.defaults[name]}
