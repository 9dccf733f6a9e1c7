"""Pictures that repeat without a seam."""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

import difftool
from difftool.config.layers import DEFAULT_MODEL
from difftool.diffusion.denoiser import Cond
from difftool.engine.strips import decode_strips
from difftool.engine.tiles import enlarged_round, tiled
from difftool.images.fit import to_pil, to_tensor
from difftool.pipeline.decode import decode, encode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.pipeline.upscale import upscaled

WAYS = {"x": (0, 4), "y": (4, 0), "both": (4, 4)}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model(
        tiny.preset(4, codec=tiny.VAE | {"widths": [8, 8]}, unet={"depth": [0, 1]}), seed=3
    )


def rolled(x: Tensor, shift: tuple[int, int], by: int = 1) -> Tensor:
    return x.roll((shift[0] * by, shift[1] * by), (2, 3))


@pytest.mark.parametrize("way", WAYS)
def test_in_pixels_what_is_moved_round_is_made_moved_round(way):
    unet = {"depth": [0, 1], "in_channels": 12, "out_channels": 12}
    model = tiny.model(tiny.preset(12, codec=tiny.BLOCKS, unet=unet), seed=3)
    x = torch.randn(1, 12, 16, 12, generator=torch.Generator().manual_seed(1))
    halves = 8 * bool(WAYS[way][0]), 6 * bool(WAYS[way][1])  # half its height, half its width
    level = model.denoiser.path.level(300)
    with torch.no_grad(), tiled(model.network, way), tiled(model.codec, way):
        made, of_moved = (model.denoiser(each, level, Cond()) for each in (x, rolled(x, halves)))
        torch.testing.assert_close(of_moved, rolled(made, halves), rtol=1e-4, atol=1e-5)
        pictures = [decode(model, each) for each in (made, rolled(made, halves))]
    assert torch.equal(pictures[1], rolled(pictures[0], halves, model.codec.factor))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_moved_round_is_made_moved_round(model, way):
    x = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1))
    moved, level = rolled(x, WAYS[way]), model.denoiser.path.level(300)
    factor = model.codec.factor
    with torch.no_grad():
        with tiled(model.network, way):
            plain, of_moved = (model.denoiser(each, level, Cond()) for each in (x, moved))
        torch.testing.assert_close(of_moved, rolled(plain, WAYS[way]), rtol=1e-4, atol=1e-5)
        with tiled(model.codec, way):
            picture, of_moved = (decode(model, each) for each in (x, moved))
        torch.testing.assert_close(
            of_moved, rolled(picture, WAYS[way], factor), atol=1e-5, rtol=1e-4
        )
        with tiled(model.codec, way):
            strips = decode_strips(model.codec, x, rows=8)  # type: ignore[arg-type]
        torch.testing.assert_close(strips.clamp(-1, 1), picture, atol=1e-4, rtol=1e-4)
        after = model.denoiser(moved, level, Cond())
    assert not torch.allclose(after, rolled(model.denoiser(x, level, Cond()), WAYS[way]), atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", [tiny.VAE | {"widths": [8, 8]}, tiny.BLOCKS])
def test_a_picture_that_is_moved_round_is_encoded_moved_round(way, codec):
    """By half its width and by any other number of latents; in fp16 that is upcast too."""
    model = tiny.model(tiny.preset(12 if codec is tiny.BLOCKS else 4, codec=codec), seed=3)
    factor = model.codec.factor
    picture = torch.rand(1, 3, 10 * factor, 12 * factor) * 2 - 1
    down, right = map(bool, WAYS[way])
    for shift in (WAYS[way], (5 * down, 6 * right)):
        moved = rolled(picture, shift, factor)
        with tiled(model.codec, way):
            latent, of_moved = (encode(model, each) for each in (picture, moved))
        torch.testing.assert_close(of_moved, rolled(latent, shift), rtol=1e-4, atol=1e-5)
    plain = encode(model, moved)
    assert codec is tiny.BLOCKS or not torch.allclose(plain, of_moved, atol=1e-3)


def test_weights_that_are_upcast_go_round_too():
    codec = tiny.VAE | {"widths": [8, 8], "force_upcast": True}
    model = tiny.model(tiny.preset(4, codec=codec), seed=3)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    with tiled(model.codec, "both"):
        wanted = encode(model, picture), decode(model, encode(model, picture))
        model.codec.double()  # any type but fp32 is
        found = encode(model, picture), decode(model, encode(model, picture))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_picture_to_start_from_is_encoded_round(model):
    picture = torch.rand(3, 32, 32) * 2 - 1
    asked = {"size": (32, 32), "steps": 4, "strength": 0.5, "posterior": "mean", "tile": "both"}

    def made(**given: Tensor) -> Tensor:
        plan = plan_sampling(model, resolve_settings(model, asked), from_picture=True)
        *_, last = generate(plan, [SampleInput(seed=5, **given)])  # pyright: ignore
        return last.x[0]

    with tiled(model.codec, "both"):
        latent = encode(model, picture[None])[0]
    assert made(init=picture).equal(made(latent=latent))
    assert not made(init=picture).equal(made(latent=encode(model, picture[None])[0]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sides", [(32, 32), (24, 40), (17, 23)])
def test_what_is_moved_round_is_enlarged_moved_round(way, sides):
    x = torch.rand(1, 3, 16, 16)
    enlarge = partial(F.interpolate, mode="bicubic")
    unit = [small // gcd(small, large) for small, large in zip((16, 16), sides, strict=True)]
    shift = [u * bool(by) for u, by in zip(unit, WAYS[way], strict=True)]
    there = [s * large // 16 for s, large in zip(shift, sides, strict=True)]
    made = enlarged_round(x, sides, way, enlarge)
    moved = enlarged_round(x.roll(shift, (2, 3)), sides, way, enlarge)
    assert made.shape[2:] == sides
    torch.testing.assert_close(moved, made.roll(there, (2, 3)), rtol=1e-4, atol=1e-5)
    assert enlarged_round(x, sides, "none", enlarge).equal(enlarge(x, sides))


def test_pictures_are_enlarged_round_by_any_upscaler():
    picture = Image.effect_noise((16, 12), 90).convert("RGB")
    moved = ImageChops.offset(picture, 8, 6)
    for name in ("lanczos", "bicubic", "latent"):
        made, of_moved = (upscaled(p, name, (48, 36), "cpu", "both") for p in (picture, moved))
        assert made.size == (48, 36) and of_moved == ImageChops.offset(made, 24, 18)
        across = upscaled(picture, name, (48, 36), "cpu", "x")
        assert across != made and across != upscaled(picture, name, (48, 36), "cpu")


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_has_no_border(model, upscaler):
    """What it starts from is the first pass, enlarged round."""
    asked = {"size": (16, 16), "steps": 2, "tile": "both", "posterior": "mean"}
    hires = {"hires": 2.0, "upscaler": upscaler, "hires_strength": 0.5}

    def made(asked: dict[str, Any], **given: Tensor) -> Tensor:
        plan = plan_sampling(model, resolve_settings(model, asked), from_picture=bool(given))
        *_, last = generate(plan, [SampleInput(seed=5, **given)])  # pyright: ignore
        return last.x

    first = made(asked)
    if upscaler == "latent":
        enlarged = enlarged_round(first, (16, 16), "both", partial(F.interpolate, mode="bilinear"))
        given = {"latent": enlarged[0]}
    else:
        with tiled(model.codec, "both"):
            picture = to_pil(decode(model, first)[0])
        given = {"init": to_tensor(upscaled(picture, upscaler, (32, 32), "cpu", "both"))}
    again = made({**asked, "size": (32, 32), "strength": 0.5}, **given)
    assert made({**asked, **hires}).equal(again)


def seam(picture: Tensor, axis: int) -> tuple[float, float]:
    """The mean difference across the border, and the largest one between neighbours inside."""
    there = (picture - picture.roll(1, axis)).abs().mean(dim=[d for d in range(3) if d != axis])
    return float(there[0]), float(there[1:].max())


@pytest.mark.slow
@pytest.mark.parametrize(("way", "axes"), [("x", (2,)), ("y", (1,)), ("both", (1, 2))])
def test_a_picture_of_the_bundled_model_has_no_seam(way, axes):
    pipe = difftool.load(DEFAULT_MODEL)
    for picture in pipe.sample("a red heart", seed=[1, 2, 3, 4], steps=8, tile=way):
        for axis in axes:
            border, inside = seam(to_tensor(picture), axis)
            assert border <= inside
