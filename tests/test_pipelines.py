"""Whole pictures of every published family against diffusers' pipelines, seed for seed."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import SCHEDULERS, WORDS, build, diffusers, reschedule
from torch import Tensor

from difftool.config import SampleConfig
from difftool.errors import UsageError
from difftool.generation import Second
from difftool.model import Item, Model

SIZE = (32, 48)
"""Width and height, in pixels."""
NEGATIVE, SEED, STEPS = "a dog", 7, 8
PIXEL = 1 / 255
LIVELY = 20
"""Least deviation of a reference picture, in 255ths, that proves something."""


class Pair(NamedTuple):
    """The same model here and there."""

    pipe: Any
    model: Model
    folder: str


pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers gives dozens, about itself


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pipelines by family, built when they are asked for."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def pair(family: str) -> Pair:
        if family not in made:
            pipe = build(family, folder)
            pipe.saved_scheduler = pipe.scheduler.config
            where = str(folder / family)
            made[family] = Pair(pipe, Model.load(where, device="cpu"), where)
        return made[family]

    return pair


def picture(seed: int = 3, size: tuple[int, int] = SIZE) -> Image.Image:
    """Smooth colours."""
    noise = torch.rand((1, 3, 6, 4), generator=torch.Generator().manual_seed(seed))
    rows = torch.nn.functional.interpolate(noise, size=size[::-1], mode="bicubic")[0]
    return Image.fromarray((rows.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def half_mask() -> Image.Image:
    """White where it is repainted: the lower right."""
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[20:, 8:] = 255
    return Image.fromarray(mask)


def tensor(image: Image.Image) -> Tensor:
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return values / 127.5 - 1


def mask_tensor(mask: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(mask)) / 255


def theirs(pipe: Any, sampler: str | None = None, steps: int = STEPS, **given: Any) -> Tensor:
    """diffusers' picture [H,W,3] in [0, 1]."""
    if sampler is not None:
        reschedule(pipe, sampler)
    else:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.saved_scheduler)
    values = {"negative_prompt": NEGATIVE, "guidance_scale": 3.0, "output_type": "np"} | given
    values = {name: value for name, value in values.items() if value is not ...}
    generator = torch.Generator().manual_seed(SEED)
    made = pipe(prompt=WORDS, num_inference_steps=steps, generator=generator, **values)
    found = torch.tensor(made.images[0])
    assert 255 * found.std() > LIVELY
    return found


def settings(model: Model, sampler: str | None = None, **given: Any) -> SampleConfig:
    values = {"steps": STEPS, "size": SIZE, "guidance": 3.0, "match": "diffusers"} | given
    if sampler is not None:
        values["sampler"], _, schedule = sampler.partition(" ")
        values |= {"schedule": schedule} if schedule else {}
    return model.settings(**values)


def ours(model: Model, chosen: SampleConfig, second: Second | None = None, **item: Any) -> Tensor:
    given = {"prompt": WORDS, "negative": NEGATIVE, "seed": SEED} | item
    *_, last = model.generate([Item(**given)], chosen, second)
    return model.decode(last.x)[0].permute(1, 2, 0) / 2 + 0.5


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, in the 255ths that a file has."""
    return float(((one * 255).round() - (other * 255).round()).abs().max())


SHAPE = {"width": SIZE[0], "height": SIZE[1]}
GRID = [
    *(("sd1", sampler) for sampler in SCHEDULERS),
    *(("sd2-v", sampler) for sampler in SCHEDULERS),
    *(("sdxl", sampler) for sampler in SCHEDULERS),
    *(("sd2-zsnr", s) for s in ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm")),
]


@pytest.mark.parametrize(("family", "sampler"), GRID)
def test_samplers_are_those_of_diffusers(pairs, family, sampler):
    pipe, model, _ = pairs(family)
    expected = theirs(pipe, sampler, **SHAPE)
    found = ours(model, settings(model, sampler))
    assert difference(found, expected) <= 1
    assert (found - expected).abs().max() < 0.02 * PIXEL


def test_what_is_not_the_same_is_not_the_same_picture(pairs):
    """The controls: each of these shows by far more than what the comparisons allow."""
    pipe, model, _ = pairs("sd1")
    expected = theirs(pipe, "dpmpp_2m", **SHAPE)
    wrong = {
        "another sampler": ours(model, settings(model, "ddim")),
        "another grid": ours(model, settings(model, "dpmpp_2m karras")),
        "other guidance": ours(model, settings(model, "dpmpp_2m", guidance=3.5)),
        "another prompt": ours(model, settings(model, "dpmpp_2m"), prompt="a green house"),
        "another negative": ours(model, settings(model, "dpmpp_2m"), negative=""),
        "another seed": ours(model, settings(model, "dpmpp_2m"), seed=SEED + 1),
    }
    chosen = settings(model, "dpmpp_2m")
    model.denoiser.target = "v"
    wrong["another target"] = ours(model, chosen)
    model.denoiser.target = "eps"
    for name, found in wrong.items():
        assert difference(found, expected) > 3, name


def test_zero_snr_is_exact_unless_diffusers_floor_is_asked_for(pairs):
    pipe, model, _ = pairs("sd2-zsnr")
    for sampler in ("euler", "dpmpp_2m"):
        floored, exact = settings(model, sampler), settings(model, sampler, match=None)
        assert floored.schedule_options["terminal_alpha_bar"] == 2**-24
        assert "terminal_alpha_bar" not in exact.schedule_options
        expected = theirs(pipe, sampler, **SHAPE)
        assert difference(ours(model, exact), expected) <= 2
        error = (ours(model, exact) - expected).abs().max()
        assert error > 3 * (ours(model, floored) - expected).abs().max()


@pytest.mark.parametrize(("family", "steps"), [("sdxl-turbo", 4), ("lcm", 4), ("lcm", 8)])
def test_distilled_models_as_they_come(pairs, family, steps):
    """What the folder says is what is done, without a word about the sampler."""
    pipe, model, _ = pairs(family)
    lcm = family == "lcm"
    more = {"negative_prompt": ...} if lcm else {"negative_prompt": None}
    guidance = 8.5 if lcm else 1.0
    asked = 8.5 if lcm else 0.0
    expected = theirs(pipe, steps=steps, guidance_scale=asked, **SHAPE, **more)
    chosen = model.settings(steps=steps, size=SIZE, guidance=guidance)
    assert chosen.sampler == ("lcm" if lcm else "euler_a")
    assert difference(ours(model, chosen), expected) <= 1


def test_an_empty_negative_prompt_is_zeros_in_sdxl(pairs):
    pipe, model, _ = pairs("sdxl")
    expected = theirs(pipe, "euler", negative_prompt=None, **SHAPE)
    assert difference(ours(model, settings(model, "euler"), negative=""), expected) <= 1
    assert difference(ours(model, settings(model, "euler"), negative=" "), expected) > 1


# --- from pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "euler_a"])
@pytest.mark.parametrize(("family", "strength"), [("sd1", 0.6), ("sdxl", 1.0)])
def test_pictures_to_start_from(pairs, family, sampler, strength):
    pipe, model, _ = pairs(family)
    kind = {"sd1": "StableDiffusionImg2Img", "sdxl": "StableDiffusionXLImg2Img"}[family]
    other = from_pipe(f"{kind}Pipeline", pipe)
    expected = theirs(other, sampler, image=picture(), strength=strength)
    chosen = settings(model, sampler, strength=strength)
    assert difference(ours(model, chosen, init=tensor(picture())), expected) <= 1
    assert model.steps(chosen, init=True) == int(STEPS * strength)


def from_pipe(kind: str, pipe: Any) -> Any:
    made = getattr(diffusers, kind)(**{
        name: part for name, part in pipe.components.items()
        if name in ("vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                    "scheduler")
    }, **({} if "XL" in kind else {"safety_checker": None, "feature_extractor": None,
                                   "requires_safety_checker": False}))  # fmt: skip
    made.saved_scheduler = pipe.saved_scheduler
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m", "unipc", "lcm"])
def test_masks_with_a_plain_model(pairs, sampler):
    pipe, model, _ = pairs("sd1")
    other = from_pipe("StableDiffusionInpaintPipeline", pipe)
    given = {"image": picture(), "mask_image": half_mask(), "strength": 0.75}
    expected = theirs(other, sampler, **given, **SHAPE)
    chosen = settings(model, sampler, strength=0.75)
    masked = {"init": tensor(picture()), "mask": mask_tensor(half_mask())}
    found = ours(model, chosen, **masked)
    assert difference(found, expected) <= 1
    assert difference(ours(model, chosen, init=masked["init"]), expected) > 3


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m karras", "heun"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpaint_checkpoints(pairs, sampler, strength):
    pipe, model, _ = pairs("inpaint")
    given = {"image": picture(), "mask_image": half_mask(), "strength": strength}
    expected = theirs(pipe, sampler, **given, **SHAPE)
    chosen = settings(model, sampler, strength=strength)
    masked = {"init": tensor(picture()), "mask": mask_tensor(half_mask())}
    assert difference(ours(model, chosen, **masked), expected) <= 1
    with pytest.raises(UsageError, match="repaints"):
        ours(model, chosen)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "unipc"])
def test_pictures_to_edit(pairs, sampler):
    pipe, model, _ = pairs("pix2pix")
    expected = theirs(pipe, sampler, image=picture(), image_guidance_scale=1.8)
    chosen = settings(model, sampler, image_guidance=1.8)
    found = ours(model, chosen, init=tensor(picture()))
    assert difference(found, expected) <= 1
    chosen = settings(model, sampler, image_guidance=1.2)
    assert difference(ours(model, chosen, init=tensor(picture())), expected) > 3


@pytest.mark.parametrize(("sampler", "level"), [("ddim", 0), ("euler", 300), ("dpmpp_2m", 999)])
def test_pictures_to_vary(pairs, sampler, level):
    pipe, model, _ = pairs("unclip")
    image = picture(size=(32, 32))
    expected = theirs(pipe, sampler, image=image, noise_level=level, **SHAPE)
    seen = pipe.feature_extractor(images=image, return_tensors="pt").pixel_values[0]
    chosen = settings(model, sampler, noise_level=level)
    assert difference(ours(model, chosen, image=seen), expected) <= 1
    other = settings(model, sampler, noise_level=(level + 500) % 1000)
    assert difference(ours(model, other, image=seen), expected) > 3


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "unipc"])
def test_a_refiner_takes_over(pairs, sampler):
    pipe, model, _ = pairs("sdxl")
    refiner, second, _ = pairs("refiner")
    reschedule(pipe, sampler)
    generator = torch.Generator().manual_seed(SEED)
    common: dict[str, Any] = {"prompt": WORDS, "negative_prompt": NEGATIVE, "guidance_scale": 3.0}
    common |= {"num_inference_steps": STEPS, "generator": generator}
    latent = pipe(**common, **SHAPE, denoising_end=0.7, output_type="latent").images
    reschedule(refiner, sampler)
    # Its own idea of a picture's size comes from the latents, times the autoencoder's factor.
    sizes = {"original_size": SIZE[::-1], "target_size": SIZE[::-1]}
    sizes |= {"negative_original_size": SIZE[::-1], "negative_target_size": SIZE[::-1]}
    made = refiner(**common, **sizes, image=latent, denoising_start=0.7, output_type="np")
    expected = torch.tensor(made.images[0])
    assert 255 * expected.std() > LIVELY
    taking_over = Second(second, settings(second, sampler), 0.7)
    assert difference(ours(model, settings(model, sampler), taking_over), expected) <= 1
    assert difference(ours(model, settings(model, sampler)), expected) > 3
