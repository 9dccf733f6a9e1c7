"""Larger pictures: in a second pass, of a picture that is there, by networks, and in windows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from difftool.config.schema import SampleConfig
from difftool.diffusion.prediction import Prediction
from difftool.errors import InputError, UsageError
from difftool.images.fit import to_pil, to_tensor
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.pipeline.upscale import in_tiles, read_upscaler, upscaled
from difftool.pipeline.windows import in_windows, windows
from difftool.sampling.metadata.a1111 import from_parameters
from difftool.sampling.metadata.files import read
from difftool.sampling.settings import read_scale

SAMPLE = {"size": [16, 16], "steps": 4, "sampler": "euler", "schedule": "normal"}
CODEC = tiny.VAE | {"patch": 1, "latent_channels": 3, "widths": [8, 8, 8]}


@pytest.fixture(scope="module")
def model() -> Model:
    """In latents of a quarter of the size."""
    return tiny.model(tiny.preset(3, sample=SAMPLE, codec=CODEC), seed=1)


def drawn(model: Model, asked: dict, **given: object) -> Tensor:
    """x0 of seed 5."""
    started = not {"init", "latent"}.isdisjoint(given)
    plan = plan_sampling(model, resolve_settings(model, asked), from_picture=started)
    steps = list(generate(plan, [SampleInput(seed=5, **given)]))  # pyright: ignore
    assert [step.index for step in steps] == list(range(plan.steps))
    return steps[-1].x[0]


# --- two passes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("latent", "bilinear"), ("latent-bicubic", "bicubic")])
def test_a_second_pass_is_another_run_on_the_latents(model, name, mode):
    found = drawn(model, {"hires": 2.0, "upscaler": name, "hires_strength": 0.5})
    first = drawn(model, {})
    latent = F.interpolate(first[None], size=(8, 8), mode=mode)[0]
    expected = drawn(model, {"size": (32, 32), "strength": 0.5}, latent=latent)
    assert found.shape == (3, 8, 8) and found.equal(expected)


def test_a_second_pass_is_another_run_on_the_picture(model):
    asked = {"hires": 1.5, "upscaler": "lanczos", "hires_strength": 0.5, "hires_steps": 8}
    found = drawn(model, asked | {"rounding": "down"})
    picture = to_pil(decode(model, drawn(model, {})[None])[0], "down").resize((24, 24), 1)
    again = {"size": (24, 24), "strength": 0.5, "steps": 8}
    assert found.equal(drawn(model, again, init=to_tensor(picture)))


def test_blocks_of_pixels_are_scaled_as_pixels():
    preset = tiny.preset(12, sample=SAMPLE, codec=tiny.BLOCKS)
    blocks = tiny.model(preset, seed=1)
    found = drawn(blocks, {"hires": 2.0, "hires_strength": 0.5})
    image = F.interpolate(
        blocks.codec.decode(drawn(blocks, {})[None]), size=(32, 32), mode="bilinear"
    )
    again = {"size": (32, 32), "strength": 0.5, "posterior": "mean"}
    assert (found - drawn(blocks, again, init=image[0])).abs().max() < 1e-5


@pytest.mark.parametrize(("given", "scale"), [("2x", 2), ("1.5", 1.5), (2, 2), ("4X", 4)])
def test_how_much_larger(given, scale):
    assert read_scale(given) == scale
    for wrong in ("0.5", "x", "17x", "nan", ""):
        with pytest.raises(UsageError, match="how much larger"):
            read_scale(wrong)


# --- networks --------------------------------------------------------------------------------


class Smooth(torch.nn.Module):
    """A network of twice the size that sees two pixels far."""

    scale, input_channels, output_channels = 2, 3, 3

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.ones(3, 1, 5, 5) / 25
        seen = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
        return F.interpolate(seen, scale_factor=2, mode="nearest")


def test_tiles_have_no_seams(monkeypatch):
    monkeypatch.setattr("difftool.pipeline.upscale.TILE", 16)
    pixels = torch.rand(1, 3, 41, 50)
    assert (in_tiles(pixels, Smooth(), 2) - Smooth()(pixels)).abs().max() < 1e-6


def test_upscalers_are_names_or_files(tmp_path, monkeypatch):
    assert read_upscaler("Lanczos") == "lanczos" == read_upscaler("lanczos")
    assert read_upscaler("Latent (nearest-exact)") == "latent-nearest"
    for wrong, said in (("swin", "no upscaler"), ("none.pth", "there is no upscaler none.pth")):
        with pytest.raises(UsageError, match=said):
            read_upscaler(wrong)
    path = tmp_path / "2x.pth"
    path.write_bytes(b"weights")
    assert read_upscaler(path) == str(path)
    picture = to_pil(torch.rand(3, 12, 10) * 2 - 1)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UsageError, match="not installed"):
        upscaled(picture, str(path), (20, 24), "cpu")
    loader = SimpleNamespace(load_from_file=lambda path: Smooth())
    spandrel = SimpleNamespace(ModelLoader=lambda device: loader)
    monkeypatch.setitem(sys.modules, "spandrel", spandrel)
    found = np.asarray(upscaled(picture, str(path), (20, 24), "cpu"))
    expected = Smooth()((to_tensor(picture)[None] + 1) / 2)[0]
    assert np.abs(found - (expected * 255).round().permute(1, 2, 0).numpy()).max() <= 1
    path.write_bytes(b"other")  # and so another file
    loader.load_from_file = lambda path: 1 / 0
    with pytest.raises(InputError, match="cannot be read as an upscaler"):
        upscaled(picture, str(path), (40, 48), "cpu")


# --- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 8), (9, 30, 8), (64, 17, 16)])
def test_windows_cover_all_and_overlap(height, width, side):
    seen = torch.zeros(height, width)
    for rows, columns in windows(height, width, side):
        assert rows.stop - rows.start == min(side, height) and columns.stop <= width
        seen[rows, columns] += 1
    assert seen.min() == 1 and len(windows(height, width, None)) == 1
    if height > side:
        assert seen.max() > 1


def test_what_is_seen_alike_in_all_windows_is_so_in_the_picture():
    x = torch.randn(1, 2, 20, 33)
    found = in_windows(lambda part, at: Prediction(part * 2, part + 1), x, 8)
    assert (found.x0 - 2 * x).abs().max() < 1e-5 and (found.eps - x - 1).abs().max() < 1e-5


def test_windows_of_a_picture_leave_no_seam(model):
    asked = {"size": (64, 32), "steps": 2}
    whole, parts = drawn(model, asked), drawn(model, asked | {"window": 32})
    assert not whole.equal(parts)
    inner = parts.diff(dim=2).abs().mean(dim=(0, 1))
    assert inner[7:9].max() < 2.5 * inner.mean()  # where a window ends
    with pytest.raises(UsageError, match="multiple of"):
        resolve_settings(model, {"window": 30})


def bytes_of(path: str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# --- the command -----------------------------------------------------------------------------


def test_the_command_draws_larger(model, tmp_path, monkeypatch, difftool):
    monkeypatch.chdir(tmp_path)
    model.save(Path("m.safetensors"))
    common = ("sample", "-m", "m.safetensors", "--device", "cpu", "--seed", 5)
    ran = difftool(*common, "--hires", "2x", "--upscaler", "Lanczos", "--hires-strength", 0.5,
                   "-o", "large.png", "--save-latents")  # fmt: skip
    assert ran.code == 0 and "then 2 of 4 steps at 32x32, from lanczos" in ran.err
    with Image.open("large.png") as image:
        assert image.size == (32, 32)
        text, pixels = image.text["parameters"], image.tobytes()  # type: ignore[attr-defined]
    words = (
        "Hires upscale: 2",
        "Hires upscaler: Lanczos",
        "Denoising strength: 0.5",
        "Size: 16x16",
    )
    assert all(word in text for word in words)
    taken = from_parameters(text, "test").settings
    assert (taken["hires"], taken["hires_strength"], taken["upscaler"]) == (2.0, 0.5, "lanczos")
    ran = difftool(*common[:-2], "--from-image", "large.png", "-o", "again.png")
    assert ran.code == 0 and bytes_of("again.png") == pixels, ran.err
    ran = difftool(*common[:-2], "--from-latents", "large.latents.safetensors", "-o", "decoded.png")
    assert ran.code == 0 and bytes_of("decoded.png") == pixels, ran.err
    ran = difftool(*common, "--init", "large.png", "--upscale", "2x", "-o", "larger.png")
    assert ran.code == 0 and len(bytes_of("larger.png")) == 64 * 64 * 3
    assert "made 2 times larger and drawn at 64x64" in " ".join(ran.err.split())
    Image.new("L", (16, 16), 255).save("mask.png")
    ran = difftool(*common, "--init", "large.png", "--mask", "mask.png", "--hires", 2)
    assert ran.code == 2 and "--only-masked" in ran.err


def test_the_file_of_an_upscaler_is_not_opened_because_a_picture_names_it(
    model, tmp_path, monkeypatch, difftool
):
    monkeypatch.chdir(tmp_path)
    model.save(Path("m.safetensors"))
    Path("2x.pth").write_bytes(b"weights")
    loader = SimpleNamespace(load_from_file=lambda path: Smooth())
    monkeypatch.setitem(sys.modules, "spandrel", SimpleNamespace(ModelLoader=lambda device: loader))
    common = ("sample", "-m", "m.safetensors", "--device", "cpu", "--seed", 5)
    file = str(tmp_path / "2x.pth")
    ran = difftool(*common, "--hires", 2, "--upscaler", file, "-o", "large.png")
    assert ran.code == 0, ran.err
    request = read(Path("large.png"))
    assert "upscaler" not in request.settings
    assert request.missed == (("upscaler", "the upscaler 2x.pth: --upscaler"),)
    assert SampleConfig().upscaler == "latent"
