"""Pictures that are started from: what stays of them, and what masks do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from difftool.diffusion.noise import ImageNoise
from difftool.errors import UsageError
from difftool.pipeline.backdrop import FITS, Fitting, filled, grown, region_of, softened, started
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.sampling.metadata.a1111 import from_parameters
from difftool.sampling.settings import read_outpaint

RNG = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def square(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


# --- masks -----------------------------------------------------------------------------------


def test_a_mask_grows_and_shrinks_by_pixels():
    mask = np.zeros((9, 12), np.float32)
    mask[4, 5:7] = 1
    wide = grown(mask, 2)
    assert wide.sum() == 5 * 6 and wide[2:7, 3:9].all()
    assert (grown(wide, -2) == mask).all() and grown(mask, 0) is mask
    edge = np.ones((4, 4), np.float32)
    assert (grown(edge, -1) == 1).all()  # beyond the picture it goes on


def test_a_mask_is_softened_by_a_gaussian():
    mask = np.zeros((41, 41), np.float32)
    mask[20, 20] = 1
    soft = softened(mask, 2.0)
    ranges = np.arange(-5, 6)  # 2.5 deviations
    weights = np.exp(-(ranges**2) / (2 * 2.0**2))
    weights /= weights.sum()
    assert soft[15:26, 15:26] == pytest.approx(np.outer(weights, weights), abs=1e-6)
    assert soft.sum() == pytest.approx(1, abs=1e-5) and softened(mask, 0) is mask


@pytest.mark.parametrize(
    ("box", "padding", "size", "region"),
    [
        ((40, 30, 50, 40), 0, (64, 64), (40, 30, 50, 40)),
        ((40, 30, 50, 40), 5, (64, 64), (35, 25, 55, 45)),
        ((40, 30, 60, 40), 0, (64, 64), (40, 25, 60, 45)),
        ((40, 30, 50, 40), 0, (64, 32), (35, 30, 55, 40)),
        ((0, 0, 10, 4), 3, (64, 64), (0, 0, 13, 13)),
        ((90, 70, 100, 80), 3, (64, 64), (87, 67, 100, 80)),
        ((0, 10, 100, 20), 3, (64, 64), (0, 0, 100, 80)),
    ],
)
def test_the_masked_region_has_the_shape_that_is_drawn(box, padding, size, region):
    mask = np.asarray(square(100, 80, box)).astype(np.float32) / np.float32(255)
    assert region_of(mask, padding, size) == region


# --- fitting ---------------------------------------------------------------------------------


def test_how_pictures_of_another_size_are_fitted():
    picture = noise(40, 20)
    assert FITS["stretch"](picture, (16, 16)).tobytes() == picture.resize((16, 16), 1).tobytes()
    cut = np.asarray(FITS["crop"](picture, (20, 20)))
    assert (cut == np.asarray(picture)[:, 10:30]).all()
    padded = np.asarray(FITS["pad"](picture, (40, 40)))
    assert (padded[10:30] == np.asarray(picture)).all() and (padded[:10] == padded[10]).all()
    for fit in FITS:
        start = started(picture, square(40, 20, (15, 5, 25, 15)), Fitting((24, 32), fit=fit))
        assert start.picture.size == (24, 32) and start.mask is not None
        assert start.mask.shape == (32, 24)


def test_a_mask_of_nothing_is_refused():
    with pytest.raises(UsageError, match="all black"):
        started(noise(8, 8), Image.new("L", (8, 8)), Fitting((8, 8)))
    turned = started(noise(8, 8), Image.new("L", (8, 8)), Fitting((8, 8), mask_invert=True))
    assert turned.mask is not None and turned.mask.all()


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        ("left=64,top=32", (64, 32, 0, 0)),
        ("bottom=8 right=16", (0, 0, 16, 8)),
        ("64", (64, 64, 64, 64)),
        (32, (32, 32, 32, 32)),
        ("1,2,3,4", (1, 2, 3, 4)),
        ([1, 2, 3, 4], (1, 2, 3, 4)),
    ],
)
def test_sides_of_what_is_drawn_beyond_a_picture(given, sides):
    assert read_outpaint(given) == sides


@pytest.mark.parametrize(
    "given",
    [
        "",
        "0",
        "left",
        "left=a",
        "left=1,left=2",
        "up=3",
        "1,2",
        "left=-3",
        "left=99999",
        "1,left=2",
    ],
)
def test_sides_that_are_none(given):
    with pytest.raises(UsageError):
        read_outpaint(given)


# --- from end to end -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Files of a model in pixels and of one in latents of a quarter of the size."""
    folder, files = tmp_path_factory.mktemp("models"), {}
    sample = {"size": [16, 16], "steps": 4, "sampler": "euler_a", "schedule": "normal"}
    codec = tiny.VAE | {"patch": 1, "latent_channels": 3, "widths": [8, 8, 8]}
    for name, more in {"pixels": {}, "latents": {"codec": codec}}.items():
        made: Model = tiny.model(tiny.preset(3, sample=sample, **more), seed=1)
        files[name] = str(folder / f"{name}.safetensors")
        made.save(Path(files[name]))
    return files


@pytest.fixture
def draw(models, tmp_path, monkeypatch, difftool):
    """Run `sample` on a picture of 32 x 24; the pixels that come out."""
    monkeypatch.chdir(tmp_path)
    noise(32, 24).save("photo.png")
    mask = square(32, 24, (8, 8, 20, 16))
    ImageDraw.Draw(mask).rectangle((12, 16, 16, 18), fill=90)
    mask.save("mask.png")

    def run(kind: str, *args: object, code: int = 0):
        ran = difftool("sample", "-m", models[kind], "--device", "cpu", "--seed", 5, "--init",
                       "photo.png", "-o", "out.png", "--overwrite", *args)  # fmt: skip
        assert ran.code == code, ran.err
        return ran if code else (pixels("out.png"), " ".join(ran.err.split()))

    return run


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("pixels", ("--strength", 0.3)),
        ("pixels", ("--match", "a1111")),
        ("latents", ("--strength", 1)),
        ("latents", ("--mask-invert",)),
    ],
)
def test_what_is_not_masked_stays_to_the_byte(draw, kind, more):
    found, _ = draw(kind, "--mask", "mask.png", *more)
    kept = pixels("mask.png")[..., 0] == (255 if "--mask-invert" in more else 0)
    assert (found == pixels("photo.png"))[kept].all()
    assert (found != pixels("photo.png"))[~kept].mean() > 0.5


@pytest.mark.parametrize("kind", ["pixels", "latents"])
@pytest.mark.parametrize("more", [(), ("--tile", "both")])
def test_it_does_so_at_every_strength(draw, models, difftool, kind, more):
    steps = ("--steps", 3, "--sampler", "euler_a,ddim", "--strength", "0.34,0.5,0.67,0.99,1")
    given = ("-m", models[kind], "--init", "photo.png", "--mask", "mask.png", "--seed", 5)
    ran = difftool("sample", *given, *steps, *more, "-o", "[sampler]-[denoising].png")
    assert ran.code == 0, ran.err
    kept, made = pixels("mask.png")[..., 0] == 0, sorted(Path().glob("*-*.png"))
    assert len(made) == 10 and len({pixels(each).tobytes() for each in made}) >= 5
    for each in made:
        assert (pixels(each) == pixels("photo.png"))[kept].all(), each


def test_a_mask_that_is_grown_and_softened(draw):
    found, _ = draw("latents", "--mask", "mask.png", "--mask-grow", 2, "--mask-blur", 1)
    kept = (
        softened(grown(np.asarray(Image.open("mask.png"), np.float32) / np.float32(255), 2), 1) == 0
    )
    assert (found == pixels("photo.png"))[kept].all() and 0.3 < kept.mean() < 0.75
    assert (found != pixels("photo.png"))[~kept].mean() > 0.5


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_the_masked_region_alone_is_drawn_at_the_model_s_size(draw, kind):
    found, said = draw(kind, "--mask", "mask.png", "--only-masked", "--mask-padding", 2)
    assert found.shape == (24, 32, 3) and "16x16 of it at 6,6 are drawn at 16x16" in said
    kept = pixels("mask.png")[..., 0] == 0
    assert (found == pixels("photo.png"))[kept].all()
    assert (found != pixels("photo.png"))[~kept].mean() > 0.5


def test_what_is_masked_is_filled_with_what_is_around_it():
    picture = Image.new("RGB", (48, 24), (200, 30, 10))
    picture.paste((10, 40, 220), (24, 0, 48, 24))
    picture.paste((0, 255, 0), (4, 4, 12, 12))
    mask = np.zeros((24, 48), np.float32)
    mask[4:12, 4:12] = 1
    found = np.asarray(filled(picture, mask), int)
    assert (found == np.asarray(picture))[mask == 0].all()
    assert abs(found[mask == 1] - (200, 30, 10)).max() < 40  # red, with some blue from far
    assert (np.asarray(filled(picture, mask + 1 - mask)) == 0).all()


def test_what_is_below_a_mask_is_noise_or_nothing(models):
    """As a picture that has that there would be drawn."""
    model = load_model(models["pixels"], device="cpu")
    mask = torch.zeros(16, 16)
    mask[4:12, 6:14] = 1
    init = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    begun = ImageNoise([5], (3, 16, 16), model.device).start(None, 0.0)[0]

    def drawn(picture: torch.Tensor, content: str) -> torch.Tensor:
        asked = {"size": (16, 16), "steps": 4, "strength": 0.75, "mask_content": content}
        asked |= {"posterior": "mean"}
        plan = plan_sampling(model, resolve_settings(model, asked), from_picture=True)
        *_, last = generate(plan, [SampleInput(seed=5, init=picture, mask=mask)])
        return last.x[0]

    for content, below in (("nothing", torch.zeros(3, 16, 16)), ("noise", begun)):
        expected = drawn((1 - mask) * init + mask * below, "original")
        torch.testing.assert_close(drawn(init, content), expected, rtol=1e-5, atol=1e-5)
        assert not drawn(init, "original").allclose(expected, atol=0.05)


def test_masked_content_is_in_the_metadata_by_a1111_s_words(draw, models, difftool):
    given = ("--mask", "mask.png", "--strength", 0.6)
    found, _ = draw("latents", *given, "--mask-content", "latent noise")
    draw("latents", *given, "--mask-content", "fill,original", "-o", "[index].png")
    kept = pixels("mask.png")[..., 0] == 0
    assert (found == pixels("photo.png"))[kept].all()
    assert len({each.tobytes() for each in (found, pixels("0.png"), pixels("1.png"))}) == 3
    draw("latents", *given, "--mask-content", "noise")
    with Image.open("out.png") as image:
        assert "Masked content: latent noise" in image.info["parameters"]
        request = from_parameters(image.info["parameters"], "it")
    assert request.settings["mask_content"] == "noise"
    common = ("sample", "-m", models["latents"], "--device", "cpu")
    ran = difftool(*common, "--from-image", "out.png", "-o", "again.png")
    assert ran.code == 0 and (pixels("again.png") == found).all(), ran.err
    _, said = draw("latents", "--mask-content", "fill")
    assert "--mask-content has no effect without --mask" in said
    assert draw("latents", "--mask-content", "noise2", code=2).code == 2


def test_more_is_drawn_beyond_a_picture_which_stays(draw):
    found, said = draw("latents", "--outpaint", "left=7,bottom=8")
    assert found.shape == (32, 39, 3) and "drawn on 40x32 and cut to 39x32" in said
    assert (found[:24, 7:] == pixels("photo.png")).all()
    assert found[:, :7].std() > 1 and "steps are run" not in said  # all of them
    again, _ = draw("pixels", "--outpaint", "8", "--mask", "mask.png")
    kept = pixels("mask.png")[..., 0] == 0
    assert again.shape == (40, 48, 3) and (again[8:32, 8:40] == pixels("photo.png"))[kept].all()


def test_a_picture_of_another_size_is_said_and_fitted(draw):
    found, said = draw("pixels", "--size", "16x16")
    assert "photo.png is 32x24, fitted to 16x16 by --fit stretch (also crop or pad)" in said
    other, said = draw("pixels", "--size", "16x16", "--fit", "crop")
    assert "by --fit crop" in said and (found != other).any()
    _, said = draw("pixels")
    assert "fitted" not in said


def test_what_was_put_back_is_again_with_the_metadata_and_the_latents(draw, models, difftool):
    given = ("--mask", "mask.png", "--mask-grow", 1, "--save-latents", "--match", "a1111")
    found, _ = draw("latents", *given, "--only-masked")
    common = ("sample", "-m", models["latents"], "--device", "cpu")
    ran = difftool(*common, "--from-image", "out.png", "-o", "again.png")
    assert ran.code == 0 and (pixels("again.png") == found).all(), ran.err
    ran = difftool(*common, "--from-latents", "out.latents.safetensors", "-o", "decoded.png")
    assert ran.code == 0 and (pixels("decoded.png") == found).all(), ran.err


def test_what_has_no_picture_or_no_mask_is_said(draw):
    _, said = draw("pixels", "--mask-blur", 2)
    assert "--mask-blur 2 has no effect without --mask" in said
    ran = draw("pixels", "--outpaint", "up=3", code=2)
    assert "left=64" in ran.err
