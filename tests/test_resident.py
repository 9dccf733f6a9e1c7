"""Weights that stay as they are in their file, against those that are made fp32 when it is read."""

from __future__ import annotations

from typing import Any

import ldm_models as ldms
import pytest
import tiny
import torch

from difftool.diffusion.denoiser import Cond
from difftool.pipeline.load import load_model

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_network_computes_in_fp32_with_weights_of_any_type(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    tiny.model(ldms.small("sdxl"), deviation=0.02).save(path, dtype=dtype)
    whole, small = (
        load_model(str(path), device="cpu", low_memory=low_memory) for low_memory in (False, True)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    unet: Any = whole.preset.unet
    context = torch.randn(2, 77, unet.context_dim, generator=generator)
    vector = torch.randn(2, unet.vector_dim, generator=generator)
    found = []
    for model in (whole, small):
        model.load_part("unet")
        assert model.dtype == torch.float32
        level = model.denoiser.path.level(500.0)
        with torch.no_grad():
            found.append(model.denoiser(x, level, Cond(context=context, vector=vector)))
    assert found[0].equal(found[1]) and found[0].std() > 0
    held = {str(p.dtype) for p in small.network.parameters()}
    assert held == {{"fp16": "torch.float16", "bf16": "torch.bfloat16"}.get(dtype, "torch.float32")}
    small.unload()
    assert all(p.is_meta for p in small.network.parameters())
    small.load_part("unet")
    with torch.no_grad():
        again = small.denoiser(x, level, Cond(context=context, vector=vector))
    assert again.equal(found[0])
