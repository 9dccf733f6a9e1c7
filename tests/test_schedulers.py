"""Pictures by every scheduler class and configuration against diffusers' pipelines, seed for seed.

What differs is refused, or is a row of DIFFERENCES, which the documentation names.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import WORDS, build, diffusers
from torch import Tensor

from difftool.diffusion.samplers import SAMPLERS
from difftool.errors import DifftoolError, InputError
from difftool.formats.diffusers.configs import derive_preset
from difftool.formats.diffusers.pipelines import PIPELINES
from difftool.formats.diffusers.scheduler_classes import CLASSES
from difftool.formats.diffusers.schedulers import read_scheduler
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

SEED, SIZE = 7, (32, 48)
BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # fmt: skip
TRAILING, V = {"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}
SD_CLASSES = [name for name, kind in CLASSES.items() if kind.grids not in ("flow", "edm")]


class Pair(NamedTuple):
    """A small Stable Diffusion 1 in memory, and its folder, whose scheduler is overwritten."""

    pipe: Any
    folder: Path

    def theirs(self, name: str, config: Mapping[str, Any], steps: int, **given: Any) -> Tensor:
        """diffusers' picture [H,W,3] in [0, 1]."""
        kind = "Img2Img" if "image" in given else ""
        kept = ("vae", "unet", "text_encoder", "tokenizer")
        parts = {part: value for part, value in self.pipe.components.items() if part in kept}
        made = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
            **parts, scheduler=getattr(diffusers, name).from_config(config), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(SEED)
        shape = {} if "image" in given else {"width": SIZE[0], "height": SIZE[1]}
        images = made(
            WORDS, negative_prompt="a dog", guidance_scale=3.0, num_inference_steps=steps,
            generator=generator, output_type="np", **shape, **given,
        ).images  # fmt: skip
        return torch.tensor(images[0])

    def model(self, name: str, config: Mapping[str, Any], pipeline: str = "") -> Model:
        """What difftool reads where the folder's scheduler is that one."""
        written = {"_class_name": name, "_diffusers_version": "0.42.0", **config}
        file = self.folder / "scheduler/scheduler_config.json"
        file.write_text(json.dumps(written), encoding="utf-8")
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        index["scheduler"] = ["diffusers", name]
        index["_class_name"] = pipeline or "StableDiffusionPipeline"
        (self.folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return load_model(str(self.folder), device="cpu")


def ours(model: Model, steps: int, match: str | None = "diffusers", **given: Any) -> Tensor:
    image, strength = given.pop("image", None), given.pop("strength", 0.75)
    asked = {"steps": steps, "size": SIZE, "guidance": 3.0, "strength": strength, **given}
    plan = plan_sampling(
        model, resolve_settings(model, asked, match), from_picture=image is not None
    )
    init = None
    if image is not None:
        init = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    *_, last = generate(plan, [SampleInput(WORDS, "a dog", seed=SEED, init=init)])
    return decode(model, last.x)[0].permute(1, 2, 0) / 2 + 0.5


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, in the 255ths that a file has."""
    return float(((one * 255).round() - (other * 255).round()).abs().max())


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("schedulers")
    return Pair(build("sd1", folder), folder / "sd1")


def picture() -> Image.Image:
    noise = torch.rand((1, 3, 6, 4), generator=torch.Generator().manual_seed(3))
    rows = torch.nn.functional.interpolate(noise, size=SIZE[::-1], mode="bicubic")[0]
    return Image.fromarray((rows.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


# --- what a pipeline makes of its scheduler's file --------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"clip_sample": True, "steps_offset": 0}),
        ("DDIMScheduler", {"steps_offset": 7}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("PNDMScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 7}),
        ("HeunDiscreteScheduler", {"clip_sample": True}),
        ("TCDScheduler", {}),
    ],
    ids=str,
)
def test_what_a_pipeline_sets_is_set(pair, name, config):
    expected = pair.theirs(name, BETAS | config, 7)
    model = pair.model(name, BETAS | config)
    for match in (None, "diffusers"):
        assert difference(ours(model, 7, match), expected) <= 1


def test_a_sampler_in_its_place_is_set_as_well(pair):
    """As a pipeline sets it; with --match diffusers as from_config leaves it, where the file of
    another class does not speak of it."""
    config = BETAS | {"skip_prk_steps": True, "clip_sample": True, "steps_offset": 0}
    expected = pair.theirs("DDIMScheduler", config, 7)
    model = pair.model("PNDMScheduler", config)
    for match in (None, "diffusers"):
        assert difference(ours(model, 7, match, sampler="ddim"), expected) <= 1
    silent = pair.model("PNDMScheduler", BETAS)
    expected = pair.theirs("DDIMScheduler", BETAS, 7)
    assert difference(ours(silent, 7, None, sampler="ddim"), expected) <= 1
    assert difference(ours(silent, 7, sampler="ddim"), expected) > 3
    assert resolve_settings(silent, {"sampler": "ddim"}, "diffusers").clip == "static"


def test_pipelines_ask_for_what_they_ask_for():
    for name, row in PIPELINES.items():
        asked = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert asked["num_inference_steps"].default == row.steps, name
        assert "guidance_scale" not in asked or asked["guidance_scale"].default == row.guidance
        if "eta" in asked:
            assert asked["eta"].default == 0


CONDITIONED = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64], "sample_size": 32,
    "cross_attention_dim": 24, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1,
}  # fmt: skip
PLAIN = {
    "_class_name": "UNet2DModel", "block_out_channels": [32, 64], "sample_size": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def preset_of(pipeline: str, unet: dict[str, Any], scheduler: dict[str, Any], **more: Any) -> Any:
    configs = {
        "model_index.json": {"_class_name": pipeline}, "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler, **more,
    }  # fmt: skip
    return derive_preset(configs, {}, {}, "it").preset


def test_pipelines_of_one_scheduler_take_it_for_every_file():
    ddpm = {"_class_name": "DDPMScheduler", "clip_sample": False}
    for name, sampler in (("DDPM", "ddpm"), ("DDIM", "ddim"), ("PNDM", "plms")):
        found = preset_of(f"{name}Pipeline", PLAIN, ddpm)
        assert found.sample.sampler == sampler
        assert found.sample.clip == "none"
    assert found.sample.sampler_options == {"start": "runge_kutta"}
    # The inpaint pipeline has PNDM begin otherwise, and lets clipping be.
    told = {"_class_name": "PNDMScheduler"}
    found = preset_of("StableDiffusionInpaintPipeline", CONDITIONED, told)
    assert found.sample.sampler_options == {}
    assert found.sample.schedule_options == {"offset": 1, "end": "first"}
    told = {"_class_name": "DDIMScheduler"}
    found = preset_of("StableDiffusionInpaintPipeline", CONDITIONED, told)
    assert found.sample.clip == "static"


def test_what_pipelines_set_in_other_files():
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [32] * 3}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 3}
    vae |= {"up_block_types": ["UpDecoderBlock2D"] * 3}
    told = {"_class_name": "DDIMScheduler"}
    files = {"vae/config.json": vae}
    upscaler = CONDITIONED | {"in_channels": 7, "num_class_embeds": 1000}
    found = preset_of("StableDiffusionUpscalePipeline", upscaler, told, **files)
    assert found.codec.scale == 0.08333
    for version, side in (("0.6.0", 64), ("0.9.0", 32), ("0.42.0", 32)):
        unet = CONDITIONED | {"_diffusers_version": version}
        found = preset_of("StableDiffusionPipeline", unet, told, **files)
        assert found.sample.size == (side * 4, side * 4)
        found = preset_of("StableDiffusionInstructPix2PixPipeline", unet, told, **files)
        assert found.sample.size == (128, 128)


def test_strength_of_an_lcm_is_a_share_of_what_it_was_distilled_on():
    scheduler = diffusers.LCMScheduler()
    read = read_scheduler({"_class_name": "LCMScheduler"}, "it").sample
    from difftool.diffusion.grids import GRIDS
    from difftool.diffusion.path import build_path

    path = build_path({"kind": "scaled_linear"})
    for steps, strength in ((4, 0.8), (3, 0.5), (1, 0.3), (7, 1.0)):
        scheduler.set_timesteps(steps, strength=strength)
        levels = GRIDS[read["schedule"]](path, steps, strength=strength)
        assert [level.t for level in levels[:-1]] == scheduler.timesteps.tolist()
    with pytest.raises(DifftoolError, match="leaves 5"):
        GRIDS["lcm"](path, 6, strength=0.1)


# --- every class and configuration ------------------------------------------------------------

OVERRIDES: dict[str, dict[str, Any]] = {
    "as Stable Diffusion": {
        "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    },
    "plain": {}, "trailing": TRAILING, "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"}, "offset": {"steps_offset": 7},
    "clip": {"clip_sample": True}, "clip range": {"clip_sample": True, "clip_sample_range": 2.0},
    "threshold": {"thresholding": True},
    "dynamic": {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.9},
    "v": V, "x0": {"prediction_type": "sample"},
    "zero SNR": V | TRAILING | {"rescale_betas_zero_snr": True},
    "to alpha 1": {"set_alpha_to_one": True}, "to entry 0": {"set_alpha_to_one": False},
    "karras": {"use_karras_sigmas": True}, "lu": {"use_lu_lambdas": True},
    "karras leading": {"use_karras_sigmas": True, "timestep_spacing": "leading"},
    "exponential": {"use_exponential_sigmas": True}, "beta": {"use_beta_sigmas": True},
    "to sigma_min": {"final_sigmas_type": "sigma_min"},
    "order 1": {"solver_order": 1}, "order 3": {"solver_order": 3},
    "heun": {"solver_type": "heun"}, "bh1": {"solver_type": "bh1"},
    "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "sde order 3": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    "full order": {"lower_order_final": False}, "euler at final": {"euler_at_final": True},
    "eps": {"predict_x0": False}, "no corrector": {"disable_corrector": [0, 2]},
    "linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
    "500 entries": {"num_train_timesteps": 500}, "large": {"variance_type": "fixed_large"},
    "log interpolation": {"interpolation_type": "log_linear"},
    "lcm 100": {"original_inference_steps": 100}, "lcm scaling": {"timestep_scaling": 0.1},
    "lambda": {"lambda_min_clipped": -2.0},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "own seed": {"noise_sampler_seed": SEED},
}  # fmt: skip


class Case(NamedTuple):
    """A picture to make."""

    scheduler: str
    override: str
    steps: int
    strength: float | None = None
    """Of a picture to start from; None = from noise."""

    @property
    def config(self) -> dict[str, Any]:
        """The scheduler's file."""
        return BETAS | OVERRIDES[self.override]

    @property
    def spacing(self) -> str:
        known = CLASSES[self.scheduler].defaults
        return {**known, **OVERRIDES[self.override]}.get("timestep_spacing", "linspace")


def knows(scheduler: str, override: str) -> bool:
    """Whether the class has these fields."""
    own = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    return override == "as Stable Diffusion" or own.keys() >= OVERRIDES[override].keys()


def _off_stride(case: Case) -> bool:
    known = case.scheduler in ("DDIMScheduler", "PNDMScheduler")
    even = case.config["num_train_timesteps"] % case.steps == 0
    return known and (case.spacing == "linspace" or (case.spacing == "trailing" and not even))


def _history(case: Case) -> bool:
    return case.strength is not None and case.scheduler in ("LMSDiscreteScheduler", "PNDMScheduler")


def _one_linspace(case: Case) -> bool:
    closed = CLASSES[case.scheduler].grids in ("k", "table")
    return case.steps == 1 and closed and case.spacing == "linspace"


def _rounded(case: Case) -> bool:
    return CLASSES[case.scheduler].grids == "dpm" and case.override in ("exponential", "beta")


def _long_heun(case: Case) -> bool:
    return case.scheduler == "HeunDiscreteScheduler" and case.override == "cosine"


def _stays(case: Case) -> bool:
    sigmas = [f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta", "flow")]
    stays = case.scheduler in ("DEISMultistepScheduler", "SASolverScheduler")
    return stays and any(map(case.config.get, sigmas))


DIFFERENCES: dict[str, Any] = {
    "lands off its own steps": _off_stride,
    "start their history": _history,
    "a single step of linspace": _one_linspace,
    "stays at its last level": _stays,
    "by rounding": _rounded,
    "rounds in float32": _long_heun,
    "noise of DPMSolverSDEScheduler": lambda case: (
        case.scheduler == "DPMSolverSDEScheduler"
        and (case.override != "own seed" or case.strength is not None)
    ),
    "whole numbers of 1000 t": lambda case: case.override == "flow",
    "leaves the noise of the last step": lambda case: (
        case.scheduler == "DDPMScheduler" and case.override == "large"
    ),
    "log_linear": lambda case: case.override == "log interpolation",
}
"""Words of the documentation, and the cases that they are about."""


def check(pair: Pair, case: Case) -> str:
    """What became of it: the same, refused by one or the other, or a difference that is known."""
    given: dict[str, Any] = {}
    if case.strength is not None:
        given = {"image": picture(), "strength": case.strength}
    try:
        expected = pair.theirs(case.scheduler, case.config, case.steps, **given)
    except Exception as error:
        return f"diffusers: {type(error).__name__}"
    if not expected.isfinite().all():
        return "diffusers: not finite"
    try:
        found = ours(pair.model(case.scheduler, case.config), case.steps, **given)
    except DifftoolError:
        return "refused"
    if difference(found, expected) <= 1:
        return "same"
    known = [words for words, about in DIFFERENCES.items() if about(case)]
    assert known, (case, difference(found, expected))
    return known[0]


SLICE = [
    *(Case(name, "as Stable Diffusion", 3) for name in SD_CLASSES),
    Case("DDIMScheduler", "zero SNR", 2, 0.6),
    Case("DDIMScheduler", "dynamic", 3),
    Case("DDPMScheduler", "clip range", 3, 0.8),
    Case("PNDMScheduler", "plain", 7),
    Case("EulerDiscreteScheduler", "karras", 3),
    Case("EulerDiscreteScheduler", "to sigma_min", 7, 0.5),
    Case("KDPM2DiscreteScheduler", "karras leading", 7, 0.5),
    Case("DPMSolverSDEScheduler", "own seed", 3),
    Case("DPMSolverMultistepScheduler", "lambda", 3),
    Case("DPMSolverMultistepScheduler", "lu", 7, 0.5),
    Case("DPMSolverSinglestepScheduler", "order 3", 7),
    Case("DPMSolverSinglestepScheduler", "sde", 7, 0.8),
    Case("DPMSolverSinglestepScheduler", "karras", 1),
    Case("DEISMultistepScheduler", "exponential", 7, 0.5),
    Case("UniPCMultistepScheduler", "no corrector", 7, 0.5),
    Case("DPMSolverMultistepScheduler", "order 1", 3),
    Case("LCMScheduler", "lcm scaling", 3),
    Case("TCDScheduler", "dynamic", 3),
    Case("SASolverScheduler", "trailing", 12),
    Case("SASolverScheduler", "full order", 7, 0.6),
]


@pytest.mark.parametrize("case", SLICE, ids=str)
def test_pictures_are_those_of_diffusers(pair, case):
    seedless = case.scheduler == "DPMSolverSDEScheduler" and case.override != "own seed"
    assert check(pair, case) == ("noise of DPMSolverSDEScheduler" if seedless else "same")


def every() -> Iterator[Case]:
    for name in SD_CLASSES:
        for override in OVERRIDES:
            if knows(name, override):
                for steps in (1, 2, 3, 7, 20):
                    yield Case(name, override, steps)
                    yield from (Case(name, override, steps, s) for s in (0.3, 0.6, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", SD_CLASSES)
def test_every_configuration(pair, name):
    """Of all steps and strengths; it takes minutes a class."""
    became = [check(pair, case) for case in every() if case.scheduler == name]
    known = {*DIFFERENCES, *(each for each in became if each.startswith("diffusers"))}
    others = [each for each in became if each not in known]
    assert others.count("same") >= len(others) / 2 > 0


def test_what_differs_is_documented():
    told = (Path(__file__).parents[1] / "docs/formats.md").read_text(encoding="utf-8")
    told = re.sub(r"\s+", " ", told)
    assert [words for words in DIFFERENCES if words not in told] == []


def test_histories_begin_where_the_steps_begin(pair):
    """From a picture, LMS and PNDM of diffusers weigh steps that they have not taken. A first step
    knows no others, so that LMS's is Euler's."""
    given = {"image": picture(), "strength": 0.25}
    euler = pair.theirs("EulerDiscreteScheduler", BETAS | TRAILING, 4, **given)
    lms = "LMSDiscreteScheduler"
    assert difference(ours(pair.model(lms, BETAS | TRAILING), 4, **given), euler) <= 1
    assert difference(pair.theirs(lms, BETAS | TRAILING, 4, **given), euler) > 3
    for name in (lms, "PNDMScheduler"):
        config = BETAS | {"timestep_spacing": "leading", "skip_prk_steps": True}
        model = pair.model(name, config)
        for strength, same in ((1.0, True), (0.5, False)):
            given = {"image": picture(), "strength": strength}
            expected = pair.theirs(name, config, 8, **given)
            assert (difference(ours(model, 8, **given), expected) <= 1) is same


# --- names ------------------------------------------------------------------------------------


def test_a_class_name_is_a_sampler_or_unknown():
    """Every scheduler of diffusers: read with its own method, or refused by name."""
    for name in dir(diffusers):
        if name.endswith("Scheduler") and name in SAMPLERS:
            sampler = SAMPLERS.resolve(name)
            assert name not in CLASSES or CLASSES[name].sampler == sampler, name
    assert SAMPLERS.resolve("DPMSolverSinglestepScheduler") == "dpmpp_single"
    read = {"SASolverScheduler": "sa_solver_bh1", "DDIMParallelScheduler": "ddim",
            "DDPMParallelScheduler": "ddpm", "FlowMatchLCMScheduler": "lcm"}  # fmt: skip
    for name, sampler in read.items():
        assert read_scheduler({"_class_name": name}, "it").sample["sampler"] == sampler
    orders = {"_class_name": "SASolverScheduler", "predictor_order": 3, "corrector_order": 0}
    options = read_scheduler(orders, "it").sample["sampler_options"]
    assert options == {"order": 3, "corrector_order": 0}
    for name, says in (("IPNDMScheduler", "ipndm"), ("UnCLIPScheduler", "ddpm")):
        with pytest.raises(InputError, match=says):
            read_scheduler({"_class_name": name}, "it")
    for broken in (
        {"solver_order": 3, "solver_type": "heun", "algorithm_type": "sde-dpmsolver++"},
    ):
        with pytest.raises(InputError, match="solver_order"):
            read_scheduler({"_class_name": "DPMSolverSinglestepScheduler", **broken}, "it")
