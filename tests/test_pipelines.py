"""Whole pictures of every published family against diffusers' pipelines, seed for seed."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conversions import convert
from PIL import Image
from pipelines import SCHEDULERS, WORDS, build, build_whole, diffusers, reschedule
from torch import Tensor

from difftool.cli.app import main
from difftool.config.schema import SampleConfig
from difftool.errors import UsageError
from difftool.formats import open_model
from difftool.pipeline.condition import encode_prompts, token_count
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import Refiner, plan_sampling, resolve_settings

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


pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pipelines by family, built when they are asked for."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def pair(family: str) -> Pair:
        if family not in made:
            pipe = build(family, folder)
            pipe.saved_scheduler = pipe.scheduler.config
            where = str(folder / family)
            made[family] = Pair(pipe, load_model(where, device="cpu"), where)
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
    match = values.pop("match")
    if sampler is not None:
        values["sampler"], _, schedule = sampler.partition(" ")
        values |= {"schedule": schedule} if schedule else {}
    return resolve_settings(model, values, match)


def ours(model: Model, chosen: SampleConfig, second: Refiner | None = None, **item: Any) -> Tensor:
    given = {"prompt": WORDS, "negative": NEGATIVE, "seed": SEED} | item
    plan = plan_sampling(model, chosen, from_picture="init" in given, refiner=second)
    *_, last = generate(plan, [SampleInput(**given)])
    return decode(model, last.x)[0].permute(1, 2, 0) / 2 + 0.5


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
    more: dict[str, Any] = {"negative_prompt": ... if lcm else None}
    guidance = 8.5 if lcm else 1.0
    asked = 8.5 if lcm else 0.0
    expected = theirs(pipe, steps=steps, guidance_scale=asked, **SHAPE, **more)
    chosen = resolve_settings(model, {"steps": steps, "size": SIZE, "guidance": guidance})
    assert chosen.sampler == ("lcm" if lcm else "euler_a")
    assert difference(ours(model, chosen), expected) <= 1


def test_an_empty_negative_prompt_is_zeros_in_sdxl(pairs):
    pipe, model, _ = pairs("sdxl")
    expected = theirs(pipe, "euler", negative_prompt=None, **SHAPE)
    assert difference(ours(model, settings(model, "euler"), negative=""), expected) <= 1
    assert difference(ours(model, settings(model, "euler"), negative=" "), expected) > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd21-v", "sdxl"])
def test_the_published_configurations_at_full_size(tmp_path, family):
    """Gigabytes of weights (of SDXL 14, held once), in shards; small pictures, so that it takes
    minutes."""
    pipe = build_whole(family, tmp_path)
    pipe.saved_scheduler = pipe.scheduler.config
    size, samplers = (64, 128), ("ddim", "dpmpp_2m karras")
    expected = [theirs(pipe, s, steps=3, width=size[0], height=size[1]) for s in samplers]
    del pipe
    gc.collect()
    model = load_model(str(tmp_path / family), device="cpu")
    for sampler, picture in zip(samplers, expected, strict=True):
        found = ours(model, settings(model, sampler, steps=3, size=size))
        assert difference(found, picture) <= 1


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
    plan = plan_sampling(model, chosen, from_picture=True)
    assert plan.steps == int(STEPS * strength)


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
    masked: dict[str, Any] = {"init": tensor(picture()), "mask": mask_tensor(half_mask())}
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
    masked: dict[str, Any] = {"init": tensor(picture()), "mask": mask_tensor(half_mask())}
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
    taking_over = Refiner(second, settings(second, sampler), 0.7)
    assert difference(ours(model, settings(model, sampler), taking_over), expected) <= 1
    assert difference(ours(model, settings(model, sampler)), expected) > 3


# --- from the command line --------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    """Run `difftool sample` in an empty folder; the picture [H,W,3], and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, code: int = 0) -> tuple[Tensor, str]:
        common = ("--device", "cpu", "--seed", SEED, "-o", "made.png", "--overwrite")
        monkeypatch.setattr(sys, "argv", ["difftool", "sample", *map(str, (*args, *common))])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert stopped.value.code == code, said
        if code:
            return torch.empty(0), said
        with Image.open("made.png") as image:
            return torch.from_numpy(np.array(image)).float() / 255, said

    return run


def flags(family: str, **more: object) -> list[object]:
    values = {"guidance": 3, "steps": STEPS, "size": "x".join(map(str, SIZE))} | more
    prompts = [WORDS, "--negative", NEGATIVE]
    return [*prompts, *(part for n, v in values.items() for part in (f"--{n}", v))]


SINGLE = ["sd1", "sd2-v", "sd2-zsnr", "sdxl", "lcm", "inpaint", "pix2pix"]


@pytest.mark.parametrize("family", SINGLE)
def test_folders_and_single_files_give_the_same_picture(pairs, sample, family):
    """The published configuration of a family is that of its single files."""
    pipe, _, folder = pairs(family)
    sampler = "lcm" if family == "lcm" else "euler"
    more: dict[str, Any] = {"sampler": sampler, "match": "diffusers"}
    given: dict[str, Any] = dict(SHAPE)
    image = Path("init.png")
    if family in ("inpaint", "pix2pix"):
        picture().save(image)
        half_mask().save("mask.png")
        more |= {"init": image}
        given = {"image": picture()}
    if family == "inpaint":
        more |= {"mask": "mask.png", "strength": 1}
        given |= SHAPE | {"mask_image": half_mask(), "strength": 1.0}
    if family == "pix2pix":
        more |= {"image-guidance": 1.5}
    if family == "lcm":
        given |= {"negative_prompt": ...}
    expected = theirs(pipe, sampler, **given)
    convert(open_model(Path(folder)), Path("single.safetensors"), "ldm")
    for where in (folder, "single.safetensors"):
        found, said = sample(*flags(family, **more), "-m", where)
        if family == "inpaint":
            outside = half_mask_array() == 0
            kept = torch.from_numpy(np.array(picture())).float() / 255
            assert found[outside].equal(kept[outside])
            found = torch.where(outside[..., None], expected, found)
        assert difference(found, expected) <= 1, where
        assert f"steps of {sampler}" in said


def half_mask_array() -> Tensor:
    return torch.from_numpy(np.array(half_mask()))


def test_what_is_not_masked_stays_to_the_bit(pairs, sample):
    _, _, folder = pairs("sd1")
    picture(5, (34, 50)).save("init.png")
    soft = np.full((48, 32), 128, np.uint8)
    soft[:, :10], soft[:, 20:] = 0, 255
    Image.fromarray(soft).save("mask.png")
    arguments = (WORDS, "-m", folder, "--steps", 8, "--sampler", "ddim", "--init", "init.png")
    whole, said = sample(*arguments, "--strength", 0.5)
    assert whole.shape == (48, 32, 3) and "4 of 8 steps are run" in said  # sides of multiples of 4
    found, _ = sample(*arguments, "--strength", 0.5, "--mask", "mask.png")
    init = torch.from_numpy(np.array(picture(5, (34, 50)).resize((32, 48), 1))).float() / 255
    assert found[:, :10].equal(init[:, :10])
    for part, least in ((slice(10, 20), 1), (slice(20, 32), 5)):
        assert difference(found[:, part], init[:, part]) > least
    again, _ = sample("--from-image", "made.png", "-m", folder)
    assert again.equal(found)
    _, said = sample(*arguments, "--strength", 0.1, code=2)
    assert "no step" in said


def test_little_memory_makes_the_same_picture(pairs, sample):
    _, _, folder = pairs("sdxl")
    _, _, refiner = pairs("refiner")
    arguments = [*flags("sdxl"), "-m", folder, "--refiner", refiner, "--refiner-start", 0.6]
    found, _ = sample(*arguments)
    assert sample(*arguments, "--low-memory")[0].equal(found)
    assert not sample(*flags("sdxl"), "-m", folder)[0].equal(found)
    staged = load_model(folder, device="cpu", low_memory=True)

    def here() -> set[str]:
        parts = staged.parts().items()
        return {name for name, part in parts if not next(part.parameters()).is_meta}

    seen = []
    staged.denoiser.network.register_forward_pre_hook(lambda *_: seen.append(here()))
    plan = plan_sampling(staged, resolve_settings(staged, {"steps": 2, "size": SIZE}))
    *_, last = generate(plan, [SampleInput(WORDS, seed=1)])
    decode(staged, last.x)
    assert seen[0] == {"unet"} and here() == {"vae"}


def test_another_autoencoder(pairs, sample):
    _, _, folder = pairs("sd1")
    _, _, other = pairs("sdxl")
    common = (*flags("sd1"), "-m", folder)
    with_other, said = sample(*common, "--vae", other, "--verbose")
    assert difference(with_other, sample(*common)[0]) > 3 and "autoencoder of" in said


def test_a_preset_settles_how_a_model_is_sampled(pairs, sample):
    pipe, _, folder = pairs("sdxl")
    told = {"timestep_spacing": "trailing"}
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        pipe.saved_scheduler, **told
    )
    generator = torch.Generator().manual_seed(SEED)
    made = pipe(WORDS, num_inference_steps=4, guidance_scale=0.0, generator=generator, **SHAPE,
                output_type="np")  # fmt: skip
    found, said = sample(WORDS, "-m", folder, "--preset", "sdxl-turbo", "--size", "32x48")
    assert difference(found, torch.tensor(made.images[0])) <= 1
    assert "4 steps of euler_a, schedule trailing, guidance 1" in said


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_clip_skip_counts_from_the_end(pairs, family):
    """As A1111 does: 1 is the last layer, with the final norm where the family has it."""
    pipe, model, _ = pairs(family)
    ids = torch.tensor(pipe.tokenizer([WORDS], padding="max_length", max_length=77).input_ids)
    encoder = pipe.text_encoder
    states = encoder(ids, output_hidden_states=True).hidden_states
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    for skip in (1, 2):
        expected = norm(states[-skip]) if family == "sd1" else states[-skip]
        found, _ = encode_prompts(model, [WORDS], clip_skip=skip)
        assert found is not None
        assert (found[..., : expected.shape[-1]] - expected).abs().max() < 1e-5
    own, _ = encode_prompts(model, [WORDS])
    assert own is not None
    assert own.equal(encode_prompts(model, [WORDS], clip_skip=1 if family == "sd1" else 2)[0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="clip-skip"):
        ours(model, settings(model, "ddim", clip_skip=4))


def test_exclamation_marks_are_padding_where_diffusers_is_matched(pairs):
    pipe, model, _ = pairs("sd2-v")
    prompt = "a fox! don't, !! it's a!b"
    found = []
    for tool in ("diffusers", None):
        model.set_padding(tool)
        found.append(model.tokenizers[0].encode([prompt], 77)[0])
    expected = pipe.tokenizer(prompt, padding="max_length", max_length=77).input_ids
    assert found[0] == expected and found[1] != expected
    assert token_count(model, prompt)[0] < 77


def test_what_a_model_lacks_is_said(pairs, sample):
    for family, more, says in (
        ("inpaint", (), "--init and --mask"),
        ("pix2pix", (), "--init"),
        ("unclip", (), "--image-prompt"),
        ("sd1", ("--mask", "mask.png"), "--init"),
        ("sd1", ("--image-prompt", "init.png"), "unCLIP"),
        ("sd1", ("--refiner-start", 0.5), "--refiner"),
        ("sd1", ("--strength", 1.5, "--init", "init.png"), "strength 1.5"),
        ("sd1", ("--init", "none.png"), "none.png"),
        ("pix2pix", ("--init", "init.png", "--image-guidance", 0.5), "image-guidance 0.5"),
        ("unclip", ("--image-prompt", "init.png", "--noise-level", 1000), "noise-level 1000"),
    ):
        picture().save("init.png")
        half_mask().save("mask.png")
        _, said = sample(*flags(family), "-m", pairs(family).folder, *more, code=2)
        assert says in said, (family, said)


def test_a_picture_is_varied_from_the_command_line(pairs, sample):
    pipe, _, folder = pairs("unclip")
    picture(size=(32, 32)).save("init.png")
    expected = theirs(pipe, "euler", image=picture(size=(32, 32)), noise_level=100, **SHAPE)
    more = {"sampler": "euler", "image-prompt": "init.png", "noise-level": 100}
    found, _ = sample(*flags("unclip", **more), "-m", folder)
    assert difference(found, expected) <= 1
