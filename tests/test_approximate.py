"""What takes less time and gives nearly the same picture: DeepCache and token merging."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny
import torch

from difftool import UsageError, load
from difftool.config.networks import UNetConfig
from difftool.engine.approximate import (
    DeepFeatures,
    Joined,
    deep_features_kept,
    finest_attention,
    tokens_joined,
)
from difftool.networks.layers import PlainAttention
from difftool.networks.unet import UNet
from difftool.pipeline.settings import plan_sampling, resolve_settings

CONFIGS = {
    "transformer": UNetConfig(
        in_channels=4, out_channels=4, channels=(16, 32), blocks=2, groups=8,
        attention="transformer", depth=(1, 1), context_dim=12, head_dim=8,
    ),
    "plain": UNetConfig(
        in_channels=4, out_channels=4, channels=(16, 32, 32), blocks=1, groups=8, depth=(0, 0, 1),
        head_dim=8,
    ),
    "one level": UNetConfig(
        in_channels=4, out_channels=4, channels=(16,), blocks=1, groups=8, depth=(0,), head_dim=8,
    ),
}  # fmt: skip


def network(name: str) -> UNet:
    made = UNet(CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    made.init_weights(generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def told(name: str, count: int) -> dict[str, torch.Tensor]:
    return {"context": torch.randn(count, 5, 12)} if CONFIGS[name].context_dim else {}


@pytest.mark.parametrize("name", CONFIGS)
def test_deep_features_of_the_same_latents_give_the_same_output(name):
    """And those of another level a near one, for which the deep levels are not computed."""
    torch.manual_seed(0)
    unet, kept = network(name), DeepFeatures(2)
    x, t, more = torch.randn(2, 4, 9, 7), torch.tensor([500.0, 500.0]), told(name, 2)
    deep = []
    unet.get_submodule("mid_block").register_forward_hook(lambda *_: deep.append(1))
    with torch.no_grad():
        plain = unet(x, t, **more)
        with deep_features_kept(unet, kept, 0):
            assert unet(x, t, **more).equal(plain) and len(deep) == 2
        with deep_features_kept(unet, kept, 1):
            assert unet(x, t, **more).equal(plain) and len(deep) == 2
        with deep_features_kept(unet, kept, 1):
            other = unet(x + 0.01, t - 1, **more)
            assert len(deep) == 2 and not other.equal(plain)
        wanted = unet(x + 0.01, t - 1, **more)
        assert (other - wanted).abs().mean() < 0.1 * wanted.std()
        with deep_features_kept(unet, kept, 2):
            assert unet(x + 0.01, t - 1, **more).equal(wanted) and len(deep) == 4
    assert "forward" not in unet.__dict__


def test_calls_of_an_evaluation_have_features_of_their_own():
    """A step may call the network for each condition, and for another count of pictures."""
    torch.manual_seed(0)
    unet, kept = network("transformer"), DeepFeatures(3)
    x, t, one, two = torch.randn(1, 4, 8, 8), torch.ones(1), *(told("transformer", 1) for _ in "12")
    with torch.no_grad():
        plain = [unet(x, t, **each) for each in (one, two)]
        for evaluation in range(3):
            with deep_features_kept(unet, kept, evaluation):
                made = [unet(x, t, **each) for each in (one, two)]
            assert all(mine.equal(own) for mine, own in zip(made, plain, strict=True))
        twice = x.repeat(2, 1, 1, 1)
        with deep_features_kept(unet, kept, 2):  # kept of one picture, asked of two
            both = {"context": torch.cat([one["context"], two["context"]])}
            torch.testing.assert_close(unet(twice, t.repeat(2), **both), torch.cat(plain))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("sides", [(8, 8), (9, 7)])
def test_tokens_that_are_alike_lose_nothing_by_joining(share, sides):
    height, width = sides
    cells = torch.randn(2, 5, -(-height // 2), -(-width // 2))
    x = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]
    x = x.flatten(2).transpose(1, 2)
    fixed = torch.tensor([y * width + x for y in range(0, height, 2) for x in range(0, width, 2)])
    movable = torch.tensor([i for i in range(height * width) if i not in fixed])
    joined = Joined(x, share, fixed, movable)
    fewer = joined.together(x)
    assert fewer.shape[1] == height * width - min(round(share * height * width), len(movable))
    torch.testing.assert_close(joined.apart(fewer), x)


def test_the_likest_tokens_join_and_become_their_mean():
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.7]]])
    joined = Joined(x, 0.25, torch.tensor([0, 2]), torch.tensor([1, 3]))
    wanted = torch.tensor([[[0.95, 0.05], [0.0, 1.0], [0.6, 0.7]]])
    torch.testing.assert_close(joined.together(x), wanted)
    apart = torch.tensor([[[0.95, 0.05], [0.95, 0.05], [0.0, 1.0], [0.6, 0.7]]])
    torch.testing.assert_close(joined.apart(joined.together(x)), apart)


def test_the_finest_transformers_see_fewer_tokens():
    torch.manual_seed(0)
    unet = network("transformer")
    seen = Counter()
    for name, layer in unet.named_modules():
        if name.endswith("attn1.to_q"):
            layer.register_forward_hook(lambda _, given, __: seen.update([given[0].shape[1]]))
    x, t, more = torch.randn(2, 4, 8, 8), torch.ones(2), told("transformer", 2)
    with torch.no_grad():
        plain = unet(x, t, **more)
        with tokens_joined(unet, 0.5, (8, 8), 0):
            fewer = unet(x, t, **more)
        with tokens_joined(unet, 0.5, (8, 8), 1):
            moved = unet(x, t, **more)
        assert not fewer.equal(plain) and not moved.equal(fewer)
        with tokens_joined(unet, 0.0, (8, 8), 0):
            assert unet(x, t, **more).equal(plain)
        alone = more["context"][1:]
        with tokens_joined(unet, 0.5, (8, 8), 0):
            torch.testing.assert_close(unet(x[1:], t[1:], context=alone), fewer[1:])
    fine = len(finest_attention(unet))
    assert fine == 5 and seen[32] == 3 * fine and seen[64] == 2 * fine
    assert not any(isinstance(each, PlainAttention) for each in unet.modules())
    assert finest_attention(network("plain")) == []


def test_pictures_are_nearly_the_same_alone_and_in_a_batch():
    model = load("emoji")
    made = {}
    for name, more in (("plain", {}), ("deepcache", {"deepcache": 2}), ("tome", {"tome": 0.1})):
        one, two = model.sample("a fox", seed=[1, 2], steps=8, **more)
        (alone,) = model.sample("a fox", seed=2, steps=8, **more)
        made[name] = [np.asarray(each, np.int16) for each in (one, two)]
        assert abs(np.asarray(alone, np.int16) - made[name][1]).max() <= 1
    for name in ("deepcache", "tome"):
        for plain, near, other in zip(made["plain"], made[name], made["plain"][::-1], strict=True):
            assert 0 < abs(near - plain).mean() < abs(other - plain).mean() / 2


def test_deep_levels_are_computed_at_every_so_many_th_step():
    model = load("emoji")
    deep = []
    model.model.network.get_submodule("mid_block").register_forward_hook(lambda *_: deep.append(1))
    for every, wanted in ((1, 7), (2, 4), (3, 3), (10, 1)):
        deep.clear()
        model.sample("a fox", seed=1, steps=7, deepcache=every)
        assert len(deep) == wanted


@pytest.mark.parametrize("given", [{"deepcache": 0}, {"tome": 0.8}, {"tome": -0.1}])
def test_values_without_a_meaning_are_refused(given):
    with pytest.raises(UsageError, match=next(iter(given))):
        load("emoji").sample("a fox", **given)


def test_models_without_transformers_have_no_tokens_to_join():
    model = tiny.model(tiny.preset())
    plan_sampling(model, resolve_settings(model, {"deepcache": 2}))
    with pytest.raises(UsageError, match="tome does not fit"):
        plan_sampling(model, resolve_settings(model, {"tome": 0.5}))
