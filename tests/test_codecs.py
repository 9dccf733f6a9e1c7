"""The codecs: exact inverses, published scalings, sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from difftool.config.kinds import CodecConfig
from difftool.config.networks import CODEC_KINDS, IdentityConfig, SpaceToDepthConfig, VaeConfig
from difftool.errors import UsageError
from difftool.networks.codecs import VaeCodec
from difftool.networks.kinds import CODECS, build_codec

VAE = VaeConfig(widths=(8, 8, 16), groups=4)
CONFIGS = {
    "identity": IdentityConfig(),
    "grey identity": IdentityConfig(channels=1),
    "space_to_depth": SpaceToDepthConfig(),
    "space_to_depth 3": SpaceToDepthConfig(block=3, channels=1),
    "space_to_depth 1": SpaceToDepthConfig(block=1),
    "vae": VAE,
    "vae 16": replace(VAE, latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609),
}
WEIGHTLESS = [name for name in CONFIGS if "vae" not in name]


def codec_of(config: CodecConfig) -> Any:
    codec: Any = build_codec(config)
    if isinstance(codec, VaeCodec):
        codec.vae.init_weights(torch.Generator().manual_seed(0))
    return codec.eval().requires_grad_(False)


def pictures(channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, channels, height, width, generator=generator) * 2 - 1


def test_every_codec_is_registered_and_tested():
    of_pictures = {config.kind for config in CONFIGS.values()}
    assert set(CODECS) == of_pictures | {"embedding"}  # a prior's, which test_prior is about
    assert set(CODECS) == set(CODEC_KINDS)
    with pytest.raises(UsageError, match="codec"):
        CODECS["jpeg"]


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_sizes(name):
    config = CONFIGS[name]
    codec = codec_of(config)
    images = pictures(config.channels, 12, 24)
    x0 = codec.encode(images)
    assert x0.shape == (2, codec.channels, 12 // codec.factor, 24 // codec.factor)
    assert x0.dtype == torch.float32 and x0.std() > 0.01
    assert codec.decode(x0).shape == images.shape
    if codec.factor > 1:
        for height, width in ((13, 24), (12, 25)):
            with pytest.raises(ValueError, match=f"multiples of {codec.factor}.*{width}x{height}"):
                codec.encode(pictures(config.channels, height, width))


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_weightless_codecs_are_exact(name):
    config = CONFIGS[name]
    codec = codec_of(config)
    assert not codec.state_dict()
    images = pictures(config.channels, 6, 12)
    x0 = codec.encode(images, torch.randn(2, codec.channels, 6, 12))
    assert torch.equal(codec.decode(x0), images)
    assert torch.equal(x0.flatten().sort().values, images.flatten().sort().values)


def test_space_to_depth_order():
    """Channel c block^2 + i block + j of x0 is pixel (i, j) of every block of channel c."""
    codec = codec_of(SpaceToDepthConfig(block=2))
    images = pictures(3, 4, 6)
    x0 = codec.encode(images)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert torch.equal(x0[:, 4 * c + 2 * i + j], images[:, c, i::2, j::2])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": 0.13025},
        {"scale": 1.5305, "shift": 0.0609},
        {
            "scale": 0.5,
            "latents_mean": (-1.6574, 1.886, -1.383, 2.5155),
            "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
        },
    ],
    ids=["sd1", "sdxl", "sd3", "playground"],
)
def test_published_scalings(changes):
    config = replace(VAE, **changes)
    codec = codec_of(config)
    images = pictures(3, 8, 12)
    mean, logvar = codec.vae.encode(images)
    x0 = codec.encode(images)
    for c in range(4):
        shift = config.shift if config.latents_mean is None else config.latents_mean[c]
        std = 1.0 if config.latents_std is None else config.latents_std[c]
        torch.testing.assert_close(x0[:, c], (mean[:, c] - shift) * config.scale / std)
    torch.testing.assert_close(codec.decode(x0), codec.vae.decode(mean))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    drawn = codec.encode(images, noise)
    gain = (drawn - x0) / noise
    std = torch.tensor(config.latents_std or (1.0,) * 4).view(-1, 1, 1)
    torch.testing.assert_close(gain, (logvar / 2).exp() * config.scale / std, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_force_upcast_runs_in_fp32(dtype):
    plain, upcast = codec_of(VAE), codec_of(replace(VAE, force_upcast=True))
    rounded = {name: w.to(dtype).float() for name, w in plain.vae.state_dict().items()}
    plain.vae.load_state_dict(rounded)
    upcast.vae.load_state_dict(rounded)
    upcast.to(dtype)
    images = pictures(3, 8, 12)
    x0 = upcast.encode(images)
    assert torch.equal(x0, plain.encode(images))
    assert torch.equal(upcast.decode(x0), plain.decode(x0))
    assert upcast.vae.dtype == dtype  # the stored weights stay as they were
    # A control: without it, the network computes in its own dtype.
    low = codec_of(VAE)
    low.vae.load_state_dict(rounded)
    decoded = low.to(dtype).decode(x0)
    assert decoded.dtype == torch.float32
    assert 1e-5 < (decoded - plain.decode(x0)).abs().max() < 0.1


def test_force_upcast_survives_what_fp16_cannot_hold():
    config = replace(VAE, force_upcast=True)
    codec, plain = codec_of(config), codec_of(VAE)
    for each in (codec, plain):
        each.vae.decoder.conv_in.bias.fill_(6e4)
        each.half()
    x0 = torch.full((1, 4, 2, 2), 50.0)
    x0[:, :, 0] = -50
    for each in (codec, plain):
        each.vae.decoder.conv_in.weight.mul_(500)
    assert codec.decode(x0).isfinite().all()
    assert not plain.decode(x0).isfinite().all()


def test_built_without_memory():
    """On the meta device, as models are before their weights are read."""
    for config in CONFIGS.values():
        with torch.device("meta"):
            codec: Any = build_codec(config)
        assert codec.channels >= 1 and codec.factor >= 1
    with pytest.raises(ValueError, match="block 0"):
        SpaceToDepthConfig(block=0)
