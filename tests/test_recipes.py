"""`--sampler X` on a model that carries a scheduler: the options of diffusers' X."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from difftool.config.layers import load_preset
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import build_path
from difftool.diffusion.samplers import SAMPLERS
from difftool.formats.diffusers.scheduler_switch import switched
from difftool.formats.diffusers.schedulers import CLASSES, kept, read_scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": SD | {
        "_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True,
        "set_alpha_to_one": False, "clip_sample": False, "trained_betas": None,
    },
    "sdxl": SD | {
        "_class_name": "EulerDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "leading",
        "interpolation_type": "linear", "clip_sample": False, "set_alpha_to_one": False,
    },
    "turbo": SD | {
        "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing",
        "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
    },
}  # fmt: skip
CLASS_OF = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler", "lcm": "LCMScheduler",
    "ddpm": "DDPMScheduler", "plms": "PNDMScheduler", "dpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler", "tcd": "TCDScheduler",
}  # fmt: skip


def preset(name: str):
    read = read_scheduler(PUBLISHED[name], name)
    base = load_preset("sd15")
    return replace(base, path=read.path, target=read.target, scheduler=kept(PUBLISHED[name]))


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("sampler", CLASS_OF)
@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_are_asked_when_diffusers_asks(name, sampler, steps):
    """The times that the network is told are those of the class that from_config makes."""
    chosen = switched(preset(name), sampler, None)
    path = build_path(preset(name).path)
    levels = GRIDS[chosen["schedule"]](path, steps, **chosen["schedule_options"])
    config = {k: v for k, v in PUBLISHED[name].items() if k != "_class_name"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(import_module("diffusers"), CLASS_OF[sampler]).from_config(config)
        theirs.set_timesteps(steps)
    times = list(dict.fromkeys(theirs.timesteps.tolist()))  # two stages ask twice
    if sampler in ("dpm2", "plms"):
        times = [t for t in times if any(abs(t - level.t) < 1e-3 for level in levels)]
    assert [level.t for level in levels[:-1]] == pytest.approx(times, abs=1e-3)
    SAMPLERS[chosen["sampler"]](path, **chosen["sampler_options"])


def test_every_sampler_can_be_switched_to():
    for name in PUBLISHED:
        for sampler in SAMPLERS:
            chosen = switched(preset(name), sampler, None)
            path = build_path(preset(name).path)
            SAMPLERS[chosen["sampler"]](path, **chosen["sampler_options"])
            assert chosen["sampler"] == sampler


def test_every_sampler_with_every_schedule_at_any_number_of_steps():
    known = preset("sd15")
    path = build_path(known.path)
    for sampler in SAMPLERS:
        for schedule in GRIDS.keys() - {"explicit", "sd3", "flow_dpm"}:
            chosen = switched(known, sampler, schedule)
            for steps in (1, 2, 7):
                levels = GRIDS[chosen["schedule"]](path, steps, **chosen["schedule_options"])
                assert len(levels) > 1 and levels[0].sigma > levels[-1].sigma


def test_schedules_replace_the_grid_alone():
    known = preset("sd15")
    chosen = switched(known, "ddim", "trailing")
    assert (chosen["schedule"], chosen["schedule_options"]) == ("trailing", {"end": "first"})
    karras = switched(known, "dpmpp_2m", "karras")
    assert karras["schedule_options"] == {"time": "nearest"}
    karras = switched(preset("sdxl"), "euler", "karras")
    assert karras["schedule_options"] == {"range": {"kind": "leading", "offset": 1}}
    assert karras["start_noise"] == "hypot"


def test_hidden_fields_of_a_file_reach_other_classes():
    """PNDM knows no clip_sample, DDIM clips by default: the file's word decides."""
    assert kept(PUBLISHED["sd15"])["clip_sample"] is False
    assert switched(preset("sd15"), "ddim", None)["clip"] == "none"
    told = replace(preset("sd15"), scheduler={"steps_offset": 1})
    assert switched(told, "ddim", None, exact=True)["clip"] == "static"
    # The pipeline itself would set it, whatever its scheduler.
    assert switched(told, "ddim", None)["clip"] == "none"


def test_names_say_orders_and_words_of_other_classes_are_passed_over():
    known = preset("sd15")
    told = replace(known, scheduler=known.scheduler | {"solver_order": 3, "solver_type": "bh1"})
    assert switched(told, "unipc", None)["sampler_options"] == {}  # bh1 of order 3 is its own
    assert switched(told, "dpmpp_2m", None)["sampler_options"] == {}
    assert switched(told, "deis", None)["sampler_options"] == {"order": 3}
    midpoint = replace(known, scheduler=known.scheduler | {"solver_type": "heun"})
    assert switched(midpoint, "dpmpp_2m", None)["sampler_options"] == {"solver_type": "heun"}


def test_floors_of_zero_snr_belong_to_the_classes_that_have_them():
    zero = load_preset("sd21-zsnr")
    for sampler, floored in (("euler", True), ("dpmpp_2m", True), ("ddim", False), ("heun", False)):
        options = switched(zero, sampler, None, exact=True)["schedule_options"]
        assert ("terminal_alpha_bar" in options) is floored
        assert "terminal_alpha_bar" not in switched(zero, sampler, None)["schedule_options"]
    assert "rescale_betas_zero_snr" not in CLASSES["HeunDiscreteScheduler"].defaults
