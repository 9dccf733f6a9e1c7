"""Latents become pictures whatever memory and numbers allow."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from difftool.config.networks import IdentityConfig, VaeConfig
from difftool.engine.strips import decode_strips
from difftool.errors import ResourceError
from difftool.images.fit import to_pil
from difftool.networks.codecs import Codec, VaeCodec
from difftool.pipeline import decode as decoding
from difftool.pipeline.decode import decode_codec

CONFIGS = {
    "sd": VaeConfig(widths=(16, 16, 32), blocks=1, groups=4),
    "bare": VaeConfig(widths=(8, 16), blocks=2, groups=2, quant_conv=False, mid_attention=False),
    "patched": VaeConfig(widths=(16, 8), blocks=1, groups=4, patch=2, latents_mean=(1.0,) * 4),
}


def made(name: str) -> VaeCodec:
    """A codec of random weights and biases."""
    codec = VaeCodec(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in codec.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else noise
    return codec.eval().requires_grad_(False)


def latents(count: int = 1, height: int = 7, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 4, height, width, generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_strips_give_the_same_picture(name, rows):
    codec, x0 = made(name), latents()
    whole = codec.decode(x0)
    found = decode_strips(codec, x0, rows)
    assert found.shape == whole.shape and found.dtype == torch.float32
    assert whole.std() > 0.1 and (found - whole).abs().max() < 1e-5 * whole.abs().max()


def test_norms_of_single_strips_would_show():
    """The control: statistics by strip, as tiled decoders have them, give another picture."""
    codec, x0 = made("sd"), latents(height=8)
    whole = codec.decode(x0)
    parts = torch.cat([codec.decode(part) for part in x0.split(4, dim=2)], dim=2)
    assert (parts - whole).abs().max() > 0.01 * whole.abs().max()


def limited(codec: VaeCodec, pixels: int, monkeypatch: Any) -> list[int]:
    """Let the codec run out of memory above so many latent pixels; sizes of what it was given."""
    asked: list[int] = []
    usual = VaeCodec.decode

    def decode_some(self: VaeCodec, x0: Tensor) -> Tensor:
        asked.append(len(x0))
        if x0.shape[0] * x0.shape[2] * x0.shape[3] > pixels:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return usual(self, x0)

    monkeypatch.setattr(VaeCodec, "decode", decode_some)
    return asked


@pytest.mark.parametrize(("pixels", "calls"), [(105, [3]), (40, [3, 1, 1, 1]), (10, [3, 1])])
def test_what_does_not_fit_is_decoded_one_by_one_or_in_strips(pixels, calls, monkeypatch):
    codec, x0 = made("sd"), latents(3)
    whole = codec.decode(x0)
    asked = limited(codec, pixels, monkeypatch)
    found = decode_codec(codec, x0)
    assert asked == calls and (found - whole).abs().max() < 1e-4


def test_other_errors_are_not_hidden(monkeypatch):
    codec = made("sd")

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(VaeCodec, "decode", broken)
    with pytest.raises(RuntimeError, match="Half"):
        decode_codec(codec, latents())


def test_a_cpu_without_room_is_not_asked_for_it(monkeypatch):
    codec, x0 = made("sd"), latents(2)
    whole = codec.decode(x0)
    asked = limited(codec, 10**9, monkeypatch)
    monkeypatch.setattr(decoding, "fits", lambda *_: False)
    assert (decode_codec(codec, x0) - whole).abs().max() < 1e-4 and asked == []


def test_values_that_are_not_finite_are_decoded_again_in_fp32():
    """The first convolution overflows fp16 for the loud latent alone."""
    codec, x0 = made("sd"), latents(2)
    x0[1] *= 2e4
    expected = codec.decode(x0)
    half = made("sd").half()
    assert not half.decode(x0)[1].isfinite().all()
    found = decode_codec(half, x0)
    assert found.isfinite().all() and half.vae.dtype == torch.float16
    assert (found[1] - expected[1]).abs().max() < 0.05 * expected[1].abs().max()


def test_an_infinite_value_is_no_white_pixel():
    """Clamped, infinity would be white, and a picture of it looks like one."""
    made_of = SimpleNamespace(load_part=lambda part: None, codec=Codec(IdentityConfig()))
    x0 = torch.tensor([0.5, math.inf, -math.inf, math.nan]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    found = decoding.decode(cast(Any, made_of), x0)[0]
    assert found.isfinite().sum() == 3 and found[0, 0, 0] == 0.5
    with pytest.raises(ResourceError, match="not finite"):
        to_pil(found)


def test_other_codecs_are_asked_once():
    codec: Any = SimpleNamespace(decode=lambda x0: 2 * x0)
    assert decode_codec(codec, torch.ones(1, 3, 2, 2)).equal(torch.full((1, 3, 2, 2), 2.0))
    assert not isinstance(codec, nn.Module)
