"""Small models of every family of single files, of random weights: shared by tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from difftool.config.networks import TextConfig, UNetConfig, VaeConfig
from difftool.config.schema import Preset, SampleConfig
from difftool.formats.ldm.names import ema_rules, model_rules, text_places
from difftool.formats.rules import Rule

VAE = VaeConfig(widths=(32, 64), blocks=1)
CLIP = TextConfig(width=24, layers=2, heads=1, mlp=40)
OPENCLIP = replace(CLIP, width=40, layers=3, mlp=56, activation="gelu", pad_id=0)
POOLED = replace(OPENCLIP, projection=24, hidden=-2, final_norm=False, pooled=True)
SD1 = UNetConfig(
    in_channels=4, out_channels=4, channels=(32, 64, 96), blocks=2, attention="transformer",
    depth=(1, 1, 0), context_dim=24, heads=8,
)  # fmt: skip
SD2 = replace(SD1, blocks=1, context_dim=40, heads=None, head_dim=32, linear_projection=True)
XL = replace(
    SD2, depth=(0, 2, 3), mid_depth=3, context_dim=64, vector_dim=24 + 6 * 256
)  # fmt: skip
REFINER = replace(
    XL, channels=(32, 64, 96, 96), depth=(0, 2, 2, 0), mid_depth=2, context_dim=40,
    vector_dim=24 + 5 * 256,
)  # fmt: skip
SSD = replace(
    XL, blocks=2, depth=(0, (2, 1), (2, 3)), up_depth=(0, (3, 1, 1), (2, 3, 4)), mid_blocks=1,
    mid_depth=0,
)  # fmt: skip
UPSCALER = replace(
    SD2, in_channels=7, channels=(32, 64, 64, 96), depth=(0, 1, 1, 1), only_cross=(1, 2),
    num_classes=10, heads=8, head_dim=None,
)  # fmt: skip
UNETS: dict[str, UNetConfig] = {
    "sd1": SD1,
    "sd1-inpaint": replace(SD1, in_channels=9),
    "pix2pix": replace(SD1, blocks=1, in_channels=8),
    "lcm": replace(SD1, blocks=1, guidance_dim=16),
    "sd2": SD2,
    "sd2-inpaint": replace(SD2, in_channels=9),
    "sd2-depth": replace(SD2, in_channels=5),
    "sd2-unclip": replace(SD2, vector_dim=80, vector_name="class_embedding"),
    "x4-upscaler": UPSCALER,
    "sdxl": XL,
    "sdxl-inpaint": replace(XL, in_channels=9),
    "sdxl-refiner": REFINER,
    "ssd-1b": SSD,
}
FAMILIES = list(UNETS)
COMPLETE = [n for n in FAMILIES if n.startswith(("sd2", "x4"))]
"""Whose files hold the whole OpenCLIP tower, its last layer unused."""


def small(name: str) -> Preset:
    """The networks of a family, scaled down; for its table, not as it is detected."""
    text: tuple[TextConfig, ...] = (CLIP,)
    if name in COMPLETE:
        text = (OPENCLIP,)
    elif name == "sdxl-refiner":
        text = (POOLED,)
    elif UNETS[name].vector_dim:
        text = (replace(CLIP, hidden=-2, final_norm=False), POOLED)
    return Preset(
        name=name, about="a small model", unet=UNETS[name], codec=VAE, text=text,
        path={"kind": "scaled_linear"}, target="eps", sample=SampleConfig(size=(64, 64)),
        size_numbers={"sdxl-refiner": 5}.get(name, 6 if len(text) > 1 else 0),
    )  # fmt: skip


def rules(name: str) -> list[Rule]:
    """The table of a family's small model."""
    return model_rules(small(name))


def state(
    name: str, dtype: torch.dtype = torch.float32, *, ema: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a single file, all that such files have beside the networks included."""
    generator = torch.Generator().manual_seed(seed)
    table = rules(name)
    shapes = {rule.theirs: rule.their_shape for rule in table}
    if ema:
        shapes |= {rule.theirs: rule.their_shape for rule in ema_rules(table)}
    if name in COMPLETE:
        layer = OPENCLIP.layers - 1
        prefix, _ = text_places(small(name).unet, small(name).text)[0]
        last = f"{prefix}transformer.resblocks.{layer}."
        for there in [n for n in shapes if n.startswith(last)]:
            shapes[there.replace(last, f"{prefix}transformer.resblocks.{layer + 1}.")] = shapes[
                there
            ]
        shapes[f"{prefix}text_projection"] = (OPENCLIP.width, OPENCLIP.width)
    # small enough that the networks of such weights give finite values
    tensors = {n: (torch.randn(s, generator=generator) / 20).to(dtype) for n, s in shapes.items()}
    for n in [n for n in tensors if n.endswith(".ln_final.weight")]:
        tensors[n.replace("ln_final.weight", "logit_scale")] = torch.tensor(4.6)
    for n in [n for n in tensors if n.endswith("token_embedding.weight") and "text_model" in n]:
        tensors[n.replace("token_embedding.weight", "position_ids")] = torch.arange(77)[None]
    if name == "sdxl":
        tensors["denoiser.sigmas"] = torch.linspace(0.03, 14.6, 1000)
    if name.startswith("sd1"):
        tensors["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        tensors["alphas_cumprod"] = (1 - tensors["betas"].double()).cumprod(0).float()
    if ema:
        tensors["model_ema.decay"] = torch.tensor(0.9999)
        tensors["model_ema.num_updates"] = torch.tensor(470000, dtype=torch.int32)
    if name == "sd2-unclip":
        tensors["embedder.model.visual.proj"] = torch.randn(8, 4, generator=generator).to(dtype)
        tensors["noise_augmentor.data_mean"] = torch.randn(1, 4, generator=generator)
    return tensors


def write(
    path: Path, name: str, metadata: dict[str, str] | None = None, **options: Any
) -> dict[str, Tensor]:
    """A single file of a family; its tensors."""
    tensors = state(name, **options)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    return tensors
