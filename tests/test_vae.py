"""The autoencoder against diffusers' AutoencoderKL."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.config.networks import VaeConfig
from difftool.errors import CheckError
from difftool.formats.diffusers.networks import write_vae
from difftool.networks.vae import Vae

SMALL = VaeConfig(widths=(16, 24, 32), groups=8)
CASES = {
    "sd": SMALL,
    "16 channels, no quant conv": replace(SMALL, latent_channels=16, quant_conv=False),
    "no mid attention": replace(SMALL, mid_attention=False),
    "one block a level": replace(SMALL, blocks=1),
    "three blocks a level": replace(SMALL, blocks=3, groups=4),
    "one level": replace(SMALL, widths=(16,)),
    "two levels": replace(SMALL, widths=(16, 16), latent_channels=3),
    "five levels": replace(SMALL, widths=(8, 16, 8, 24, 16), blocks=1),
    "grey pictures": replace(SMALL, channels=1, latent_channels=1),
}


def fresh(config: VaeConfig, seed: int = 0) -> Vae:
    """An autoencoder whose every weight shows in the outputs."""
    vae = Vae(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if weight.ndim > 1:
                gain = 3.0 if ".to_q" in name or ".to_k" in name else 1.5
                weight.normal_(0, gain * weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.normal_("norm" in name and "weight" in name, 0.5, generator=generator)
    return vae.eval()


def oracle(vae: Vae) -> Any:
    """diffusers' autoencoder with the same weights, loaded strictly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

    c = vae.config
    levels = len(c.widths)
    autoencoder: Any = diffusers.AutoencoderKL  # type: ignore[attr-defined]
    model = autoencoder(
        in_channels=c.channels,
        out_channels=c.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=c.widths,
        layers_per_block=c.blocks,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        use_quant_conv=c.quant_conv,
        use_post_quant_conv=c.quant_conv,
        mid_block_add_attention=c.mid_attention,
    ).eval()
    model.load_state_dict(vae.state_dict(), strict=True)
    vae.load_state_dict(model.state_dict(), strict=True)
    return model


def pictures(config: VaeConfig, factor: int, height: int = 3, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.channels, height * factor, width * factor)
    return torch.rand(shape, generator=generator) * 2 - 1


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square difference relative to how much b varies."""
    assert a.shape == b.shape and b.std() > 0.1
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_agrees_with_diffusers(name):
    vae = fresh(CASES[name])
    model = oracle(vae)
    images = pictures(vae.config, vae.factor)
    posterior = model.encode(images).latent_dist
    mean, logvar = vae.encode(images)
    assert mean.shape == (2, vae.config.latent_channels, 3, 5)
    assert difference(mean, posterior.mean) < 1e-5
    assert difference(logvar, posterior.logvar) < 1e-5
    assert difference(vae.decode(mean), model.decode(mean).sample) < 1e-5
    assert vae.decode(mean).shape == images.shape


@torch.no_grad()
def test_a_patch_leaves_out_the_costliest_resolution():
    vae = fresh(replace(SMALL, patch=2))
    plain = fresh(SMALL)
    assert vae.factor == 2 * plain.factor
    images = pictures(vae.config, vae.factor)
    mean, _ = vae.encode(images)
    assert mean.shape == (2, SMALL.latent_channels, 3, 5)
    assert vae.decode(mean).shape == images.shape
    # The network behind the folding is the published one over four times the channels.
    folded = F.pixel_unshuffle(images, 2)
    wide = fresh(replace(SMALL, channels=4 * SMALL.channels))
    wide.load_state_dict(vae.state_dict(), strict=True)
    assert torch.equal(wide.encode(folded)[0], mean)
    with pytest.raises(CheckError, match="no counterpart"):
        write_vae(vae.config, 64)


@torch.no_grad()
def test_log_variance_is_clamped():
    vae = fresh(SMALL)
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[4:6] = torch.tensor([1e3, -1e3])
    images = pictures(SMALL, vae.factor)
    logvar = vae.encode(images)[1]
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()
    assert difference(logvar, oracle(vae).encode(images).latent_dist.logvar) < 1e-5


class Symmetric(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)


@pytest.mark.parametrize("control", ["padding", "eps", "attention", "transposed query"])
@torch.no_grad()
def test_controls_differ(control):
    """What a wrong autoencoder would give is far outside the tolerance."""
    vae = fresh(SMALL)
    images = pictures(SMALL, vae.factor)
    mean, _ = vae.encode(images)
    wrong: Any = fresh(SMALL)
    middle = wrong.encoder.mid_block
    if control == "padding":
        for block in list(wrong.encoder.down_blocks)[:-1]:
            block.downsamplers[0] = Symmetric(block.downsamplers[0].conv)
    elif control == "eps":
        for module in wrong.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = 1e-4
    elif control == "attention":
        middle.attentions = nn.ModuleList()
    else:
        weight = middle.attentions[0].to_q.weight
        weight.copy_(weight.T.clone())
    assert difference(wrong.encode(images)[0], mean) > 1e-4


def test_published_size():
    with torch.device("meta"):
        weights = Vae(VaeConfig()).state_dict()
    assert sum(w.numel() for w in weights.values()) == 83_653_863
    assert len(weights) == 248


@torch.no_grad()
def test_init_weights_is_a_function_of_the_generator():
    def init(seed: int) -> Vae:
        with torch.device("meta"):
            vae = Vae(SMALL)
        vae.to_empty(device="cpu")
        for weight in vae.parameters():
            weight.fill_(float("nan"))
        vae.init_weights(torch.Generator().manual_seed(seed))
        return vae

    first, again, other = (init(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "decoder.conv_in.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= (9 * 4) ** -0.5 < 1.1 * first[name].abs().max()
    vae = init(3)
    images = pictures(SMALL, vae.factor)
    assert vae.decode(vae.encode(images)[0]).isfinite().all()


def test_trains():
    vae = fresh(SMALL)
    mean, logvar = vae.encode(pictures(SMALL, vae.factor))
    (vae.decode(mean).square().mean() + logvar.square().mean()).backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in vae.parameters())


@pytest.mark.parametrize(
    "change, why",
    [
        ({"widths": (16, 20)}, "groups"),
        ({"latents_mean": (0.0,)}, "latents_mean"),
        ({"latents_std": (1.0,) * 5}, "latents_std"),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, "zero"),
        ({"scale": 0.0}, "zero"),
    ],
)
def test_impossible_configurations(change, why):
    with pytest.raises(ValueError, match=why):
        replace(SMALL, **change)
