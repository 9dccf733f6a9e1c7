"""Noise in a model's own space, and what the model sees in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.prediction import Prediction
from difftool.errors import ResourceError, UsageError
from difftool.forward.figures import marginal_figure, markov_figure, reverse_figure
from difftool.forward.levels import even_levels, psnr
from difftool.forward.process import marginals
from difftool.forward.reverse import ModelSpace, condition, frame_size
from difftool.images.fit import framed, to_tensor
from difftool.pipeline.decode import decode
from difftool.pipeline.model import Model

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
CODECS = {
    "identity": ({"kind": "identity"}, 3),
    "space_to_depth": (tiny.BLOCKS, 12),
    "vae": (tiny.VAE | {"latent_channels": 4}, 4),
}


def make(codec: str = "identity", **values: Any) -> Model:
    config, channels = CODECS[codec]
    values = {"name": codec, "codec": config, "sample": {"size": [32, 24]}} | values
    return tiny.model(tiny.preset(channels, **values), seed=1, deviation=0.05)


@pytest.fixture(scope="module", params=CODECS)
def space(request) -> ModelSpace:
    return ModelSpace(make(request.param), PICTURE)


def test_the_picture_fills_the_models_size(space):
    assert space.size == (32, 24)
    assert space.picture.equal(to_tensor(framed(PICTURE, (32, 24)))[None])
    factor = space.model.codec.factor
    assert space.x0.shape == (space.model.codec.channels, 24 // factor, 32 // factor)


@pytest.mark.parametrize(
    ("side", "expected"), [(None, (32, 24)), (60, (60, 40)), (31, (32, 20)), (8, (8, 6))]
)
def test_another_size_keeps_the_shape_of_the_picture(side, expected):
    assert frame_size(make("space_to_depth"), PICTURE.size, side) == expected


def test_pixels_are_seen_again_exactly():
    for codec in ("identity", "space_to_depth"):
        space = ModelSpace(make(codec), PICTURE)
        np.testing.assert_array_equal(
            space.to_pixels(space.x0), np.asarray(framed(PICTURE, (32, 24)))
        )
        assert space.error(space.x0) == 0


def test_noise_is_added_where_the_model_works(space):
    path = space.model.denoiser.path
    levels = even_levels(path, 3)
    figure = marginal_figure(space, "a model", path, levels, 7)
    z = np.random.default_rng(7).standard_normal(space.x0.shape, dtype=np.float32)
    for frame, level in zip(figure.strips[0].frames, levels, strict=True):
        x_t = torch.from_numpy(level.alpha * space.x0 + level.sigma * z)[None]
        expected = (decode(space.model, x_t)[0] + 1) * 127.5
        np.testing.assert_allclose(frame, expected.permute(1, 2, 0), atol=0.51)


def test_the_chain_is_walked_there_too(space):
    path = space.model.denoiser.path
    figure, check = markov_figure(space, "a model", path, even_levels(path, 3), 0)
    assert check.transitions == 1000 and check.std < 0.2
    assert figure.strips[1].frames[2].shape == (24, 32, 3)


def test_predictions_are_the_denoisers(space):
    model = space.model
    levels = even_levels(model.denoiser.path, 3)
    cond = condition(model, space.size)
    figure = reverse_figure(space, levels, 5, cond)
    for k, x_t in enumerate(marginals(space.x0, levels, 5)):
        with torch.no_grad():
            x0 = model.denoiser.predict(torch.from_numpy(x_t)[None], levels[k], cond).x0
        seen = decode(model, x0)
        error = (seen - space.picture).square().mean().sqrt()
        assert figure.strips[1].errors[k] == pytest.approx(error.item(), rel=1e-4)
        expected = ((seen[0] + 1) * 127.5).permute(1, 2, 0)
        np.testing.assert_allclose(figure.strips[1].frames[k], expected, atol=0.51)


def test_a_perfect_network_makes_no_error(monkeypatch):
    space = ModelSpace(make(), PICTURE)
    x0 = torch.from_numpy(space.x0)[None]

    def predict(x_t, level, cond):
        return Prediction(x0, (x_t - level.alpha * x0) / level.sigma)

    monkeypatch.setattr(space.model.denoiser, "predict", predict)
    figure = reverse_figure(
        space, even_levels(space.model.denoiser.path, 4), 0, condition(space.model, space.size)
    )
    assert max(figure.strips[1].errors) < 1e-6
    row = figure.rows()[2]
    assert row["rmse"] == figure.strips[1].errors[2] and row["psnr"] > 120


def test_the_clean_level_is_not_asked_for(monkeypatch):
    space = ModelSpace(make(), PICTURE)
    asked = []
    predict = space.model.denoiser.predict

    def recorded(x_t, level, cond):
        asked.append(level)
        return predict(x_t, level, cond)

    monkeypatch.setattr(space.model.denoiser, "predict", recorded)
    levels = GRIDS["trailing"](space.model.denoiser.path, 3)[::-1]
    figure = reverse_figure(space, levels, 0, condition(space.model, space.size))
    assert levels[0].t == -1 and asked == levels[1:]
    assert figure.strips[1].errors[0] == 0 and figure.rows()[0]["psnr"] == math.inf == psnr(0)


def test_numbers_that_give_out_are_told():
    model = make()
    next(model.denoiser.network.parameters()).data.fill_(float("nan"))
    space = ModelSpace(model, PICTURE)
    with pytest.raises(ResourceError, match="t = 999"):
        levels = [model.denoiser.path.level(999.0)]
        reverse_figure(space, levels, 0, condition(model, space.size))


def test_what_a_model_cannot_be_told_is_refused():
    plain = make()
    with pytest.raises(UsageError, match="reads no prompt"):
        condition(plain, (32, 24), prompt="a fox")
    with pytest.raises(UsageError, match="no classes"):
        condition(plain, (32, 24), label="fox")
    classes = {"unet": {"num_classes": 3}, "classes": ["fox", "dog"]}
    model = make(**classes)
    labels = [condition(model, (32, 24), label=label).label for label in (None, "dog", "0")]
    assert [label.item() for label in labels if label is not None] == [2, 1, 0]
    with pytest.raises(UsageError, match="no class"):
        condition(model, (32, 24), label="dig")
    needs_one = make(unet={"num_classes": 2}, classes=["fox", "dog"])
    with pytest.raises(UsageError, match="needs a class"):
        condition(needs_one, (32, 24))
    inpainting = make(unet={"in_channels": 7})
    with pytest.raises(UsageError, match="another picture"):
        condition(inpainting, (32, 24))
