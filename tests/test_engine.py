"""Layers by the fastest way of computing them give the plain ones' outputs."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difftool import load
from difftool.config.networks import UNetConfig
from difftool.engine import trials
from difftool.engine.convolutions import CHUNK, KINDS, STRIP, Case
from difftool.engine.quick import convolve_padded, quicken
from difftool.engine.tiles import tiled
from difftool.engine.trials import chosen
from difftool.networks.layers import Attention, TokenLinear
from difftool.networks.unet import UNet

CASES = [
    Case(torch.Size((1, 5, 8, 8)), torch.Size((3, 5, 3, 3)), 1, 1),
    Case(torch.Size((2, 16, 9, 13)), torch.Size((24, 16, 3, 3)), 1, 1, True),
    Case(torch.Size((3, 7, 33, 40)), torch.Size((5, 7, 3, 3)), 1, 0),
    Case(torch.Size((2, 6, 35, 34)), torch.Size((4, 6, 3, 3)), 1, 1),
    Case(torch.Size((2, 6, 35, 34)), torch.Size((4, 6, 3, 3)), 2, 1, True),
    Case(torch.Size((2, 6, 12, 10)), torch.Size((4, 6, 1, 1)), 1, 0, True),
    Case(torch.Size((2, 6, 1, 21)), torch.Size((8, 6, 1, 1)), 1, 0, True),
]


@pytest.fixture
def tried(monkeypatch):
    """The kind that is chosen is the one that a test names, where it fits."""

    def choose(name: str) -> None:
        monkeypatch.setattr(
            trials, "chosen", lambda case: name if KINDS[name].fits(case) else "plain"
        )

    return choose


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_the_convolution(name, case, monkeypatch):
    kind = KINDS[name]
    if not kind.fits(case):
        pytest.skip("not for this, or not on this processor")
    torch.manual_seed(0)
    form = torch.channels_last if case.last else torch.contiguous_format
    x, bias = torch.randn(case.x).contiguous(memory_format=form), torch.randn(case.weight[0])
    weight = torch.randn(case.weight) / (case.weight[1:].numel() ** 0.5)
    plain = F.conv2d(x.double(), weight.double(), bias.double(), case.stride, case.padding)
    made = weight if kind.prepare is None else kind.prepare(weight, case)
    for whole in (True, False):  # and in several chunks, or strips
        monkeypatch.setattr("difftool.engine.convolutions.CHUNK", CHUNK if whole else 1)
        monkeypatch.setattr("difftool.engine.convolutions.STRIP", STRIP if whole else 9_000)
        for b in (bias, None):
            found = kind.convolve(x, made, b, case)
            wanted = plain if b is not None else plain - bias[:, None, None].double()
            assert found.shape == plain.shape
            assert (found - wanted).abs().max() < 1e-4 * plain.std()
            assert found.is_contiguous(memory_format=form) or name.startswith("winograd")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("again", [True, False])
def test_a_layer_follows_its_weights(name, again, tried):
    tried(name)
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1)
    first = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    read = []

    def reload() -> None:
        read.append(1)
        layer.load_state_dict(first, assign=True)

    x = torch.randn(2, 64, 32, 32)
    before, of_bias = layer(x), first["bias"][:, None, None]
    quicken(nn.Sequential(layer), reload if again else None)
    assert list(layer.state_dict()) == ["weight", "bias"]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-4)
        assert not read
        assert layer.weight.equal(first["weight"])  # which is why it is read again, if it has to be
        assert bool(read) == (again and KINDS[name].prepare is not None)
        layer.load_state_dict({"weight": 2 * first["weight"], "bias": first["bias"]}, assign=True)
        torch.testing.assert_close(layer(x), 2 * before - of_bias, rtol=0, atol=2e-4)
    layer.load_state_dict(first, assign=True)
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_strides(name, tried):
    tried(name)
    torch.manual_seed(0)
    linear, strided = TokenLinear(64, 128), nn.Conv2d(64, 64, 3, stride=2, padding=1)
    tokens, x = torch.randn(2, 24, 64), torch.randn(2, 64, 10, 8)
    plain = linear(tokens), linear(tokens[0]), strided(x)
    quicken(nn.Sequential(linear, strided))
    with torch.no_grad():
        for found, wanted in zip(
            (linear(tokens), linear(tokens[0]), strided(x)), plain, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_pictures_go_round_as_by_the_plain_layer(name, tried):
    tried(name)
    torch.manual_seed(0)
    layer, strided = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
    both, x = nn.Sequential(layer, strided), torch.randn(1, 64, 36, 32)
    with torch.no_grad():
        with tiled(both, "x"):
            plain = both(x)
        quicken(both)
        with tiled(both, "x"):
            torch.testing.assert_close(both(x), plain, rtol=0, atol=1e-4)
        wanted = F.conv2d(x, layer.weight, layer.bias)
        torch.testing.assert_close(convolve_padded(layer, x), wanted, rtol=0, atol=1e-4)


def test_what_was_chosen_is_kept_for_the_next_process(tmp_path, monkeypatch):
    def forget() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(len(places))))
        places.append(trials.kept())

    places = []
    forget()
    case = Case(torch.Size((1, 8, 8, 8)), torch.Size((8, 8, 3, 3)), 1, 1)
    name = chosen(case)
    key = "1 8 8 8 by 8 8 3 3 1 1 False"
    assert name in KINDS and json.loads(places[0].read_text("utf-8")) == {key: name}
    assert chosen(case._replace(x=torch.Size((1, 8, 8, 8)))) == name
    other = next(each for each in KINDS if each != name and KINDS[each].fits(case))
    for content, wanted in ((json.dumps({key: other}), [other]), ("damaged", KINDS)):
        forget()
        places[-1].parent.mkdir(parents=True)
        places[-1].write_text(content, encoding="utf-8")
        assert chosen(case) in wanted
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # nothing can be kept there
    assert chosen(case) in KINDS


def test_a_large_picture_is_tried_in_part(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weight = torch.Size((4, 4, 3, 3))
    for height, width in ((64, 64), (100, 80), (300, 64)):
        chosen(Case(torch.Size((1, 4, height, width)), weight, 1, 1))
    assert len(json.loads(trials.kept().read_text("utf-8"))) == 1


def test_a_picture_is_within_a_level_of_the_plain_one(tried):
    """Every large layer of the bundled model by a kind."""
    pictures = []
    for name in ("plain", "packed", "winograd_4"):
        tried(name)
        model = load(engine="plain" if name == "plain" else "quick")
        (picture,) = model.sample("a fox", seed=1, steps=2)
        pictures.append(np.asarray(picture, np.int16))
    assert all(abs(quick - pictures[0]).max() <= 1 for quick in pictures[1:])


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


def test_a_guided_pair_is_one_until_it_is_told_apart(tried):
    """The first layers see half of the batch, and what is put out is the same."""
    tried("packed")
    torch.manual_seed(0)
    sizes = {"channels": (16, 16), "blocks": 1, "groups": 8, "depth": (1, 1), "head_dim": 8}
    unet = UNet(UNetConfig(in_channels=4, out_channels=4, **sizes, attention="transformer",
                           context_dim=16, vector_dim=8))  # fmt: skip
    x, t = torch.randn(3, 4, 8, 8), torch.full((6,), 0.5)
    told = {"context": torch.randn(6, 5, 16), "vector": torch.zeros(6, 8)}
    pair, other = x.repeat(2, 1, 1, 1), torch.randn(6, *x.shape[1:])
    with torch.no_grad():
        plain = {of: unet(of, t, **told) for of in (pair, other)}
    quicken(unet)
    seen = []
    block = "attentions.0.transformer_blocks.0"
    for name in ("resnets.0.conv1", f"{block}.attn1.to_q", f"{block}.attn2.to_q"):
        layer = unet.get_submodule(f"down_blocks.0.{name}")
        layer.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    with torch.no_grad():
        for of, counts in ((pair, [3, 3, 6]), (other, [6, 6, 6])):
            seen.clear()
            torch.testing.assert_close(unet(of, t, **told), plain[of], rtol=0, atol=1e-4)
            assert seen == counts
        apart = told | {"vector": torch.arange(6.0)[:, None].expand(6, 8)}
        seen.clear()
        unet(pair, t, **apart)
        assert seen == [6, 6, 6]


def test_auto_leaves_a_small_model_as_it_is():
    kinds = {}
    for engine in ("auto", "plain", "quick"):
        network = load(engine=engine).model.network
        kinds[engine] = type(network.get_submodule("down_blocks.0.resnets.0.conv1"))
    assert kinds["auto"] is kinds["plain"] is nn.Conv2d is not kinds["quick"]


def test_keys_and_values_of_a_context_are_computed_once(tried):
    tried("packed")
    torch.manual_seed(0)
    layer, told = Attention(64, 4, context_dim=64), torch.randn(1, 7, 64)
    x, twice = torch.randn(1, 9, 64), 2 * torch.randn(1, 7, 64)
    plain = {of: layer(x, of) for of in (told, twice)}
    calls = []
    quicken(layer)
    layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for of, count in ((told, 1), (told, 1), (told.clone(), 1), (twice, 2)):
            wanted = plain[twice if of is twice else told]
            torch.testing.assert_close(layer(x, of), wanted, rtol=0, atol=1e-5)
            assert len(calls) == count
        twice.copy_(told)  # in its place
        torch.testing.assert_close(layer(x, twice), plain[told], rtol=0, atol=1e-5)
        layer.to_v.load_state_dict({"weight": -layer.to_v.weight}, assign=True)
        assert (layer(x, told) - plain[told]).abs().max() > 1e-3
    assert layer(x, told).requires_grad
