"""`--sampler X` on a published model: diffusers' X built from its scheduler. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difftool.config.schema import Preset
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import Discrete, build_path
from difftool.diffusion.samplers import SAMPLERS
from difftool.formats.diffusers.pipelines import PIPELINES, pipeline_class
from difftool.formats.diffusers.scheduler_classes import CLASSES, FLOOR, SOLVERS, SPACINGS, class_of
from difftool.formats.diffusers.schedulers import path_fields, read_scheduler

FLAGS = {schedule: flag for flag, (schedule, _) in reversed(SPACINGS.items())}
"""Grids that are a flag of most classes, and the flag."""

RESET = {
    "rederive_eps": None,
    "start_noise": "unit",
    "clip_range": None,
    "clip_quantile": 0.995,
}
"""What a sampler that is switched to does not take over."""


def switched(
    preset: Preset, sampler: str | None, schedule: str | None, exact: bool = False
) -> dict[str, Any]:
    """SampleConfig's fields for a sampler, or a grid, or both, of a model that carries a scheduler.

    A sampler without a class in diffusers gets Euler's grid. What the model's scheduler does not
    say is what its pipeline sets, then the class's default. exact: diffusers to the number, which
    is alpha_bar = 2^-24 where the class has it for zero terminal SNR, in place of 0; and, for a
    sampler, the class's default first, as in pipe.scheduler = X.from_config(pipe.scheduler.config).
    """
    path = build_path(preset.path)
    assert isinstance(path, Discrete)
    usual = {} if exact and sampler else PIPELINES[pipeline_class(preset)].scheduler
    named, sampler = sampler is not None, SAMPLERS.resolve(sampler or preset.sample.sampler)
    schedule = None if schedule is None else GRIDS.resolve(schedule)
    name = class_of(sampler) or "EulerDiscreteScheduler"
    solver = SOLVERS[sampler].fields if sampler in SOLVERS else {}
    if sampler == "dpmpp_2m_sde":
        solver = {**solver, "solver_order": 2}
    # A name says what its class has fields for; the model's own sampler is what the fields say.
    says = {**preset.scheduler, **solver} if named else {**solver, **preset.scheduler}
    config = {**usual, **says, **path_fields(path, preset.target), "_class_name": name}
    # What solver_type means differs: a class takes its default for the words of others.
    kinds = [row.kind for row in CLASSES[name].options if row.name == "solver_type"]
    if not any(config.get("solver_type") in kind.words for kind in kinds):
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
        if schedule in ("leading", "leading_open") and config.get("steps_offset"):
            ends["offset"] = config["steps_offset"]
        if schedule == "normal" and CLASSES[name].grids == "k":
            ends["lookup"] = "linear"
        sample["schedule"], sample["schedule_options"] = schedule, ends
    if path.zero_snr and exact and "rescale_betas_zero_snr" in CLASSES[name].defaults:
        if CLASSES[name].grids in ("k", "dpm"):
            sample["schedule_options"]["terminal_alpha_bar"] = FLOOR
    return RESET | sample


def _options(sampler: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The options of that sampler that make it the one that was read."""
    read = SAMPLERS[sample["sampler"]]
    method = SAMPLERS[sampler]
    if read.options.keys() - method.options.keys() or read.loop is not method.loop:
        return {}
    whole = read.defaults | sample["sampler_options"]
    return {name: v for name, v in whole.items() if v != method.defaults[name]}
