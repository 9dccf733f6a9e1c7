"""difftool as a library: a notebook's session, and that it makes what the commands make."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

import difftool


@pytest.fixture(scope="module")
def model() -> difftool.Pipeline:
    return difftool.load("emoji", device="cpu")


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A yellow disc on white."""
    made = Image.new("RGB", size, "white")
    ImageDraw.Draw(made).ellipse((6, 6, size[0] - 7, size[1] - 7), fill=(255, 204, 50))
    return made


def test_public_names_are_there_and_no_others():
    for name in difftool.__all__:
        assert getattr(difftool, name) is getattr(difftool, name)
        assert name in dir(difftool)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        difftool.laod  # noqa: B018  # type: ignore[attr-defined]
    assert "dpmpp_2m" in difftool.SAMPLERS and "cosine" in difftool.PATHS


def test_pictures_go_through_the_model_s_space(model, tmp_path):
    z = model.encode(picture())
    assert z.shape == (1, 8, 8, 8)
    again = model.decode(z)
    assert again.size == (64, 64) and model.decode(z[0]).tobytes() == again.tobytes()
    error = np.asarray(again, float) - np.asarray(picture(), float)
    assert np.abs(error).mean() < 12
    path = tmp_path / "p.png"
    picture().save(path)
    assert model.encode(path).equal(z) and model.encode(str(path)).equal(z)
    assert model.encode(picture((71, 66))).equal(model.encode(picture((71, 66)), size=(64, 64)))


def test_pictures_of_every_kind_are_read_as_from_a_file(model, tmp_path):
    clear = picture().convert("RGBA")
    clear.putalpha(128)
    clear.save(tmp_path / "clear.png")
    assert model.encode(clear).equal(model.encode(tmp_path / "clear.png"))
    assert not model.encode(clear).equal(model.encode(picture()))


def test_what_cannot_be_is_an_error_with_its_parts(model):
    with pytest.raises(difftool.UsageError) as refused:
        model.encode(picture(), size=(63, 64))
    error = refused.value
    assert isinstance(error, difftool.DifftoolError) and error.code == 2
    assert error.what == "size 63x64 does not fit this model"
    assert error.why == "sides must be multiples of 8" and error.hint == "try 64x64"
    with pytest.raises(difftool.UsageError, match=r"one picture's"):
        model.decode(model.encode(picture()).repeat(2, 1, 1, 1))
    with pytest.raises(difftool.UsageError, match="no model"):
        difftool.load("no/such/model")


def test_a_model_is_described_from_its_headers():
    found = difftool.inspect("emoji")
    assert found["prediction"] == "flow" and set(found["components"]) == {"unet", "vae", "text.0"}
