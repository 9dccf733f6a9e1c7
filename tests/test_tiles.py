"""Pictures that repeat without a seam."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

import difftool
from difftool.config.layers import DEFAULT_MODEL
from difftool.diffusion.denoiser import Cond
from difftool.engine.strips import decode_strips
from difftool.engine.tiles import tiled
from difftool.images.fit import to_tensor
from difftool.pipeline.decode import decode
from difftool.pipeline.model import Model

WAYS = {"x": (0, 4), "y": (4, 0), "both": (4, 4)}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model(
        tiny.preset(4, codec=tiny.VAE | {"widths": [8, 8]}, unet={"depth": [0, 1]}), seed=3
    )


def rolled(x: Tensor, shift: tuple[int, int], by: int = 1) -> Tensor:
    return x.roll((shift[0] * by, shift[1] * by), (2, 3))


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
