"""Convolutions by fewer multiplications give the plain ones' outputs."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difftool import load
from difftool.engine import convolutions
from difftool.engine.convolutions import KINDS, chosen, quicken

SHAPES = [(1, 5, 3, 8, 8), (2, 16, 24, 9, 13), (3, 7, 5, 33, 40)]
"""(pictures, channels in and out, height, width)."""


@pytest.fixture
def tried(monkeypatch):
    """The kind that is chosen is the one that a test names."""

    def choose(name: str) -> None:
        monkeypatch.setattr(convolutions, "chosen", lambda x, weight: name)

    return choose


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_the_convolution(name, shape):
    count, inside, outside, *size = shape
    torch.manual_seed(0)
    x, bias = torch.randn(count, inside, *size), torch.randn(outside)
    weight = torch.randn(outside, inside, 3, 3) / (3 * inside**0.5)
    kind = KINDS[name]
    if not kind.fits(x.shape):
        pytest.skip("not for pictures of this size, or not on this processor")
    plain = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for b in (bias, None):
            found = kind.convolve(given, kind.prepare(weight), b)
            wanted = plain if b is not None else plain - bias[:, None, None].double()
            assert found.shape == plain.shape
            assert (found - wanted).abs().max() < 1e-4 * plain.std()


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_follows_its_weights(name, tried):
    tried(name)
    torch.manual_seed(0)
    layer, bias = nn.Conv2d(64, 64, 3, padding=1), torch.randn(64)
    layer.bias = nn.Parameter(bias)
    of_bias = bias[:, None, None]
    small, strided = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
    x = torch.randn(2, 64, 32, 32)
    before = layer(x)
    quicken(nn.Sequential(layer, small, strided))
    assert type(small) is type(strided) is nn.Conv2d is not type(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-4)
        layer.weight.mul_(2)  # as a LoRA is merged
        torch.testing.assert_close(layer(x), 2 * before - of_bias, rtol=0, atol=2e-4)
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
        assert (layer(x) == of_bias).all()


def test_what_was_chosen_is_kept_for_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, weight = torch.Size((1, 8, 8, 8)), torch.Size((8, 8, 3, 3))
    name = chosen(x, weight)
    (path,) = tmp_path.rglob("*.json")
    assert name in KINDS and json.loads(path.read_text("utf-8")) == {f"{[*x]} {[*weight]}": name}
    chosen.cache_clear()
    other = next(each for each in KINDS if each != name)
    path.write_text(json.dumps({f"{[*x]} {[*weight]}": other}), encoding="utf-8")
    assert chosen(x, weight) == other
    chosen.cache_clear()
    path.write_text("damaged", encoding="utf-8")
    assert chosen(x, weight) in KINDS
    chosen.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # nothing can be kept there
    assert chosen(x, weight) in KINDS
    chosen.cache_clear()


def test_a_picture_is_within_a_level_of_the_plain_one(monkeypatch):
    """Every large convolution of the bundled model by each kind."""
    pictures = []
    for engine in ("plain", "quick"):
        model = load(engine=engine)
        for name in ("winograd_2", "winograd_4") if engine == "quick" else ("plain",):
            monkeypatch.setattr(convolutions, "chosen", lambda x, weight, name=name: name)
            (picture,) = model.sample("a fox", seed=1, steps=2)
            pictures.append(np.asarray(picture, np.int16))
    for quick in pictures[1:]:
        assert abs(quick - pictures[0]).max() <= 1


def test_what_is_learned_is_computed_plainly(tried):
    tried("winograd_4")
    layer, plain = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    quicken(layer)
    x = torch.randn(1, 64, 16, 16)
    assert layer(x).equal(plain(x)) and layer(x).requires_grad
    half = layer.bfloat16()
    with torch.no_grad():
        assert half(x.bfloat16()).dtype == torch.bfloat16
