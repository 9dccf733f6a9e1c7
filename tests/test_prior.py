"""DALL-E 2's prior against diffusers': its network, its steps, and pictures from text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import convert
from PIL import Image
from pipelines import PRIOR_SCHEDULER, WORDS, build, diffusers, karlo, scaled
from safetensors.torch import load_file
from torch import Tensor

from difftool.config.networks import PriorConfig, TextConfig
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.noise import ImageNoise
from difftool.diffusion.path import Level, build_path
from difftool.diffusion.prediction import Prediction
from difftool.diffusion.samplers import SAMPLERS
from difftool.errors import InputError
from difftool.formats import open_model
from difftool.formats.diffusers.tokenizers import tokenizer_files
from difftool.formats.prior import open_prior
from difftool.networks.prior import PriorTransformer
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput, load_image_prompt
from difftool.pipeline.load import load_model
from difftool.pipeline.prior import imagined
from difftool.pipeline.settings import plan_sampling, resolve_settings

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

SIZE, SEED, STEPS = (32, 48), 7, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("priors")


@pytest.fixture(scope="module")
def pipe(root) -> Any:
    """StableUnCLIPPipeline, in root/unclip-text."""
    return build("unclip-text", root)


@pytest.fixture(scope="module")
def karlos(root) -> dict[str, Any]:
    """The parts of root/karlo."""
    parts = karlo(root / "karlo")
    lean(root / "karlo/tokenizer", None)
    return parts


@pytest.fixture(scope="module")
def unclip(root) -> Any:
    """The pipeline that varies pictures, in root/unclip."""
    made = build("unclip", root)
    lean(root / "unclip/tokenizer", 0)
    return made


def lean(folder: Path, pad: int | None) -> None:
    """The same vocabulary in the files of older versions, which are read sooner."""
    for file in folder.iterdir():
        file.unlink()
    for name, text in tokenizer_files(TextConfig(pad_id=pad)).items():
        (folder / name).write_text(text, encoding="utf-8")


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_the_network_is_that_of_diffusers(masked):
    theirs = diffusers.PriorTransformer(
        num_attention_heads=3, attention_head_dim=8, num_layers=3, embedding_dim=10,
        num_embeddings=9, embedding_proj_dim=6,
    )  # fmt: skip
    scaled(theirs, 1)
    config = PriorConfig(
        in_channels=10, context_dim=10, vector_dim=6, length=9, width=24, heads=3, layers=3
    )
    ours = PriorTransformer(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, text, pooled = torch.randn(3, 10), torch.randn(3, 9, 10), torch.randn(3, 6)
    length, t = torch.tensor([2, 5, 9]), torch.tensor([0, 500, 999])
    mask = torch.arange(9) < length[:, None]
    with torch.no_grad():
        expected = theirs(x, t, pooled, text, mask if masked else None).predicted_image_embedding
        found = ours(
            x[..., None, None], t, context=text, vector=pooled, length=length if masked else None
        )
        normed = ours.embeddings(x[..., None, None])
    assert (found[..., 0, 0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert normed.equal(theirs.post_process_latents(x))


# --- pictures ---------------------------------------------------------------------------------


def picture(model: Any, *, match: str | None = None, **asked: Any) -> Tensor:
    """difftool's picture [H,W,3] in [0, 1]."""
    chosen = resolve_settings(model, {"steps": STEPS, "size": SIZE, "guidance": 3.0} | asked, match)
    given = SampleInput(WORDS, "a dog", seed=SEED)
    *_, last = generate(plan_sampling(model, chosen), [given])
    return decode(model, last.x)[0].permute(1, 2, 0) / 2 + 0.5


def theirs(pipe: Any, **given: Any) -> Tensor:
    made = pipe(
        WORDS, negative_prompt="a dog", guidance_scale=3.0, num_inference_steps=STEPS,
        width=SIZE[0], height=SIZE[1], generator=torch.Generator().manual_seed(SEED),
        output_type="np", **given,
    )  # fmt: skip
    found = torch.tensor(made.images[0])
    assert 255 * found.std() > 20
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, in the 255ths that a file has."""
    return float(((one * 255).round() - (other * 255).round()).abs().max())


def test_pictures_from_text_are_those_of_diffusers(pipe, root):
    model = load_model(str(root / "unclip-text"), device="cpu")
    expected = theirs(pipe)
    assert difference(picture(model), expected) <= 1
    other = {"prior_num_inference_steps": 9, "prior_guidance_scale": 1.0, "noise_level": 300}
    asked = {"prior_steps": 9, "prior_guidance": 1.0, "noise_level": 300}
    assert difference(picture(model, **asked), theirs(pipe, **other)) <= 1
    for name, value in asked.items():
        assert difference(picture(model, **{name: value}), expected) > 3, name


class Karlo(diffusers.UnCLIPScheduler):
    """UnCLIPScheduler, told where the next step begins, as UnCLIPPipeline tells it."""

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, **given: Any
    ) -> Any:
        place = self.timesteps.tolist().index(int(timestep))
        following = [*self.timesteps.tolist()[1:], None][place]
        given |= {"prev_timestep": following, "generator": generator}
        return super().step(model_output, timestep, sample, **given)


def with_prior(pipe: Any, parts: dict[str, Any], scheduler: Any) -> Any:
    """The same pipeline with the parts of a prior."""
    own = {name: part for name, part in pipe.components.items() if name not in parts}
    made = diffusers.StableUnCLIPPipeline(**own, **parts | {"prior_scheduler": scheduler})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("where", ["karlo", "karlo/prior"])
def test_karlos_prior_steps_as_karlo_does(pipe, karlos, unclip, root, where):
    """The prior of another folder, for a model that varies pictures."""
    model = load_model(str(root / "unclip"), prior=str(root / where), device="cpu")
    assert model.vision is not None and model.prior is not None
    expected = theirs(with_prior(pipe, karlos, Karlo(**PRIOR_SCHEDULER)))
    assert difference(picture(model), expected) <= 1


@pytest.mark.slow
def test_a_folders_own_prior_steps_as_its_pipeline_does(pipe, karlos, root, tmp_path):
    """To the timestep before, which is said, and is not what the same folder does as --prior."""
    other = with_prior(pipe, karlos, diffusers.UnCLIPScheduler(**PRIOR_SCHEDULER))
    other.save_pretrained(tmp_path / "folder")
    model = load_model(str(tmp_path / "folder"), device="cpu")
    assert any("whichever comes next" in warning for warning in model.warnings)
    expected = theirs(other)
    assert difference(picture(model), expected) <= 1
    where = str(tmp_path / "folder")
    again = load_model(where, prior=where, device="cpu")
    assert not any("whichever" in warning for warning in again.warnings)
    assert difference(picture(again), expected) > 3


@pytest.mark.parametrize("steps", [25, 7, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_steps_are_unclip_schedulers(karlos, root, steps):
    """Number for number, whatever the network says."""
    prior = open_prior(root / "karlo").preset
    path, options = build_path(prior.path), prior.sample.schedule_options
    levels = GRIDS[prior.sample.schedule](path, steps, **options)
    scheduler = Karlo(**PRIOR_SCHEDULER)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = torch.tensor(
        [path.level(t).alpha ** 2 for t in range(path.steps)], dtype=torch.float64
    )  # fp32 cancels in 1 - beta, to 5e-5 of the first step
    ratios = scheduler.alphas_cumprod[1:] / scheduler.alphas_cumprod[:-1]
    scheduler.alphas = torch.cat([scheduler.alphas_cumprod[:1], ratios])
    assert (1 - scheduler.alphas - scheduler.betas).abs().max() < 2e-7
    scheduler.betas = 1 - scheduler.alphas
    assert [level.t for level in levels[:-1]] == scheduler.timesteps.tolist()
    said = 4 * torch.randn(1000, 20, generator=torch.Generator().manual_seed(1))  # beyond the bound

    def denoise(x: Tensor, level: Level) -> Prediction:
        x0 = said[int(level.t)][None, :, None, None].clamp(-5, 5)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    noise = ImageNoise([3], (20, 1, 1))
    start, generator = noise.draw(), torch.Generator().manual_seed(3)
    x = torch.randn(1, 20, generator=generator)
    assert start.flatten(1).equal(x)
    sampler = SAMPLERS[prior.sample.sampler](path, **prior.sample.sampler_options)
    assert prior.sample.clip == "static" and prior.sample.clip_range == 5
    for step, t in zip(sampler(denoise, start, levels, noise), scheduler.timesteps, strict=True):
        x = scheduler.step(said[t][None], t, x, generator=generator).prev_sample
        assert (step.x.flatten(1) - x).abs().max() <= 1e-5
        x = x.float()
    assert x.abs().max() == 5


# --- from one form to another -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["difftool", pytest.param("ldm", marks=pytest.mark.slow)])
def test_a_prior_comes_back_from_every_format(pipe, root, kind, tmp_path):
    source = open_model(root / "unclip-text")
    ledger = convert(source, tmp_path / "there", kind)
    counts = ledger.counts()
    assert sum(counts.values()) == len(source.tensors) and not counts.get("dropped"), counts
    there = open_model(tmp_path / "there")
    back = convert(there, tmp_path / "back", "diffusers")
    assert not any("not there" in warning for warning in back.warnings), back.warnings
    for file in sorted((root / "unclip-text").glob("**/*.safetensors")):
        again = load_file(tmp_path / "back" / file.relative_to(root / "unclip-text"))
        wanted = load_file(file)
        assert {short(name) for name in again} == {short(name) for name in wanted}
        ours = {short(name): tensor for name, tensor in again.items()}
        assert all(ours[short(name)].equal(tensor) for name, tensor in wanted.items()), file
    for file in (root / "unclip-text").glob("**/*.json"):
        if file.name in ("model_index.json", "config.json", "scheduler_config.json"):
            again = tmp_path / "back" / file.relative_to(root / "unclip-text")
            assert json.loads(again.read_text("utf-8")) == json.loads(file.read_text("utf-8")), file
    if kind == "ldm":
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "back")
        assert type(loaded) is diffusers.StableUnCLIPPipeline
    model = load_model(str(tmp_path / "there"), device="cpu")
    assert difference(picture(model), theirs(pipe)) <= 1


def short(name: str) -> str:
    """Without the prefix that newer transformers leave out."""
    return name.removeprefix("text_model.")


# --- refused ----------------------------------------------------------------------------------


def test_a_prior_that_does_not_fit_is_refused(difftool, karlos, unclip, pipe, root, tmp_path):
    """Each with what is wrong, and a way out."""
    karlo(tmp_path / "narrow", 16)
    for name, lacks in (("textless", "text_encoder"), ("still", "prior_scheduler")):
        shutil.copytree(root / "karlo", tmp_path / name)
        shutil.rmtree(tmp_path / name / lacks)
    odd = {
        "normed": ("prior/config.json", {"norm_in_type": "layer"}),
        "short": ("prior/config.json", {"num_embeddings": 9}),
        "linear": ("prior_scheduler/scheduler_config.json", {"beta_schedule": "linear"}),
    }
    for name, (file, more) in odd.items():
        shutil.copytree(root / "karlo", tmp_path / name)
        config = json.loads((tmp_path / name / file).read_text(encoding="utf-8"))
        (tmp_path / name / file).write_text(json.dumps(config | more), encoding="utf-8")
    with pytest.raises(InputError, match="the network reads 9"):
        open_prior(tmp_path / "short")
    with pytest.raises(InputError, match="beta_schedule = linear"):
        open_prior(tmp_path / "linear")
    model, prior, picture = root / "unclip", root / "karlo", tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    for given, code, says in (
        ((model, "--prior", tmp_path / "narrow"), 2, "its embeddings are 16 wide"),
        ((model, "--prior", tmp_path / "textless"), 3, "has no text_encoder"),
        ((model, "--prior", tmp_path / "still"), 3, "has no prior_scheduler"),
        ((model, "--prior", tmp_path / "normed"), 3, "norm_in_type = layer"),
        ((model, "--prior", model), 3, "holds no prior"),
        ((model, "--prior", prior, "--image-prompt", picture), 2, "exclude"),
        ((model, "--prior", tmp_path / "nowhere"), 2, "nowhere"),
        (("emoji", "--prior", prior), 2, "takes no --prior"),
        ((model,), 2, "--prior MODEL"),
        ((model, "--prior-steps", 0, "--prior", prior), 2, "--prior-steps"),
    ):
        ran = difftool("sample", WORDS, "-o", tmp_path / "made.png", "-m", *given)
        assert ran.code == code and says in ran.err, (given, ran.code, ran.err)
    shutil.copytree(root / "unclip-text", tmp_path / "seen")
    ran = difftool("sample", WORDS, "-m", tmp_path / "seen", "--image-prompt", picture)
    assert ran.code == 2 and "takes no --image-prompt" in ran.err
    index = tmp_path / "seen/model_index.json"
    told = json.loads(index.read_text(encoding="utf-8")) | {"prior_text_encoder": [None, None]}
    index.write_text(json.dumps(told), encoding="utf-8")
    ran = difftool("sample", WORDS, "-m", tmp_path / "seen")
    assert ran.code == 3 and "a prior without prior_text_encoder" in ran.err


def test_pictures_from_text_on_the_command_line(difftool, karlos, pipe, unclip, root, tmp_path):
    """Of the picture's own words the same one is made again; what has no effect is said."""
    given = ("-m", root / "unclip", "--prior", root / "karlo", "--size", "32x48", "--seed", SEED)
    asked = ("--steps", STEPS, "--guidance", 3, "--negative", "a dog", "--prior-steps", 25)
    ran = difftool("sample", WORDS, *given, *asked, "-o", tmp_path / "one.png", "--json")
    assert ran.code == 0, ran.err
    line = ran.object
    assert line["prior"] == "karlo" and line["prior_steps"] == 25
    made = pixels(tmp_path / "one.png").float() / 255
    expected = theirs(with_prior(pipe, karlos, Karlo(**PRIOR_SCHEDULER)))
    assert difference(made, expected) <= 1
    (tmp_path / "lines.jsonl").write_text(json.dumps(line), encoding="utf-8")
    more = (*given[:4], "--prompts", tmp_path / "lines.jsonl", "-o", tmp_path / "two.png")
    again = difftool("sample", *more, "--low-memory")
    assert again.code == 0, again.err
    assert pixels(Path(again.lines[0])).equal(pixels(tmp_path / "one.png"))


def pixels(path: Path) -> Tensor:
    """Of a picture, [H,W,3] uint8."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


# --- training ---------------------------------------------------------------------------------

TINY = {
    "unet": {"width": 16, "heads": 2, "layers": 1, "length": 12, "context_dim": 16,
             "vector_dim": 8},
    "text": [{"width": 16, "layers": 1, "heads": 2, "mlp": 32, "activation": "gelu",
              "vocab_size": 300, "length": 12, "tokenizer": "learned", "pooled": True,
              "projection": 8}],
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(root) -> Path:
    """Pictures in two colours, which their captions name."""
    folder = root / "photos"
    folder.mkdir()
    for number in range(16):
        colour = ("red", "blue")[number % 2]
        noise = torch.randint(0, 60, (32, 32, 3), generator=torch.Generator().manual_seed(number))
        values = noise + torch.tensor([180, 0, 0] if colour == "red" else [0, 0, 180])
        Image.fromarray(values.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} square", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def asked(root) -> tuple[Any, ...]:
    """The options of a small prior's training."""
    preset = root / "tiny.yaml"
    values = {"extends": "prior-small", "about": "for tests", **TINY}
    preset.write_text(json.dumps(values), encoding="utf-8")
    given = ("--vision", root / "unclip", "--preset", preset, "--lr", "1e-2", "--batch-size", 8)
    return (*given, "--validation", 4, "--sample-every", 0, "--device", "cpu")


def test_a_prior_is_trained_and_makes_pictures(difftool, unclip, root, photos, asked):
    """It learns which embedding goes with which words, and is taken by --prior."""
    run = difftool("train", photos, *asked, "--steps", 40, "--out", "run")
    assert run.code == 0, run.err
    made = load_file("run/model.safetensors")
    assert not any(name.startswith(("vae.", "vision")) for name in made)
    model = open_prior(Path("run"))
    assert model.preset.codec.latent_channels == 20 and model.preset.family == "unclip-prior"
    prior = load_model(str(root / "unclip"), prior="run", device="cpu")
    assert prior.vision is not None
    seen = [seen_by(prior.vision, photos / f"{number}.png") for number in range(2)]
    distance = (seen[0] - seen[1]).norm()
    assert (made["unet.clip_mean"] - (seen[0] + seen[1]) / 2).norm() < 0.3 * distance
    plan = plan_sampling(prior, resolve_settings(prior, {"size": SIZE}))
    assert plan.prior is not None and plan.prior.settings.guidance == 2
    words = [f"a {colour} square" for colour in ("red", "blue") for _ in range(4)]
    said = imagined(plan.prior, words, ImageNoise(range(8), (1,)))
    nearest = torch.stack([(said - embedding).norm(dim=1) for embedding in seen]).argmin(0)
    assert nearest.tolist() == [0] * 4 + [1] * 4
    assert "--prior run" in Path("run/report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is a prior"):
        load_model("run", device="cpu")


def seen_by(encoder: Any, path: Path) -> Tensor:
    with torch.no_grad():
        return encoder(load_image_prompt(str(path), 32)[None])


@pytest.mark.slow
def test_a_prior_goes_on_and_is_trained_further(difftool, unclip, photos, asked):
    """By the picture encoder of before, and by what was measured with it."""
    run = difftool("train", photos, *asked, "--steps", 6, "--save-every", 3, "--out", "run")
    assert run.code == 0, run.err
    made = load_file("run/model.safetensors")
    shutil.copytree("run", "again")
    shutil.rmtree("again/checkpoints/step-000006")
    more = difftool("train", photos, "--out", "again", "--resume")
    assert more.code == 0, more.err
    again = load_file("again/model.safetensors")
    assert all(tensor.equal(again[name]) for name, tensor in made.items())
    tuned = difftool("train", photos, "--from", "run", *asked[:2], "--steps", 1, "--out", "tuned")
    assert tuned.code == 0, tuned.err
    tensors = load_file("tuned/model.safetensors")
    assert tensors["unet.clip_mean"].equal(made["unet.clip_mean"])
    assert (tensors["unet.prd_embedding"] - made["unet.prd_embedding"]).abs().max() < 1e-2
    ran = difftool("convert", "run", "other", "--to", "diffusers")
    assert ran.code == 4 and "kind prior" in ran.err


def test_what_cannot_train_a_prior_is_refused(difftool, unclip, karlos, root, photos, tmp_path):
    model, captionless = root / "unclip", tmp_path / "captionless"
    captionless.mkdir()
    Image.new("RGB", (32, 32)).save(captionless / "0.png")
    for data, given, says in (
        (photos, ("--part", "prior"), "--vision MODEL"),
        (photos, ("--part", "unet", "--vision", model), "--part unet"),
        (photos, ("--vision", "emoji"), "has no picture encoder"),
        (photos, ("--vision", model, "--vae", model), "exclude"),
        (photos, ("--vision", model, "--size", 64), "squares of 32"),
        (photos, ("--vision", model, "--buckets"), "squares of 32"),
        (photos, ("--vision", model, "--preset", "pixel-small"), "no prior"),
        (photos, ("--part", "unet", "--preset", "prior-small"), "is a prior"),
        (captionless, ("--vision", model), "captions"),
        (photos, ("--part", "prior", "--from", model), "holds no prior"),
        (photos, ("--from", model, "--size", 32), "cannot be trained further"),
        (
            photos,
            ("--part", "prior", "--from", root / "karlo", "--vision", model, "--lora"),
            "--lora",
        ),
    ):
        ran = difftool("train", data, *given, "--dry-run")
        assert ran.code in (2, 3) and says in ran.err, (given, ran.err)
    ran = difftool("noise", photos / "0.png", "-m", model, "--reverse", "--prompt", "a square")
    assert ran.code == 2 and "no way back" in ran.err


def _seen(encoder: Any, path: Path) -> Tensor:
    with torch.no_grad():
        return encoder(load_image_prompt(str(path), 32)[None])
