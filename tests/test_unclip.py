"""unCLIP's picture encoder in a single file, against a tower built as OpenCLIP builds it."""

from __future__ import annotations

from pathlib import Path

import ldm_models as ldms
import pytest
import torch
from conversions import convert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftool.config.networks import VisionConfig
from difftool.formats import open_model
from difftool.formats.ldm.tables import vision_rules
from difftool.pipeline.load import load_model

WIDTH, LAYERS, PATCH, SIZE, PROJECTION = 128, 2, 8, 32, 40
"""PROJECTION is half of what the small U-Net of the family is told."""


class Block(nn.Module):
    """As OpenCLIP's ResidualAttentionBlock, on torch's own attention."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(3 * WIDTH, WIDTH)}
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    """As OpenCLIP's VisionTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(Block(nn.GELU()) for _ in range(LAYERS))}
        )
        self.proj = nn.Parameter(torch.randn(WIDTH, PROJECTION) * WIDTH**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"]:  # type: ignore[union-attr]
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    made = Tower().eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "ln_" in name or "bias" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return made


def written(path: Path, tower: Tower, statistics: bool = False) -> Path:
    """A single file of the family, as published ones are."""
    state = {n: t for n, t in ldms.state("sd2-unclip").items() if "visual" not in n}
    del state["noise_augmentor.data_mean"]
    state |= {f"embedder.model.visual.{n}": t for n, t in tower.state_dict().items()}
    state["embedder.model.logit_scale"] = torch.tensor(4.6)
    if statistics:
        state["noise_augmentor.data_mean"] = torch.linspace(-1, 1, PROJECTION)[None]
        state["noise_augmentor.data_std"] = torch.linspace(0.5, 2, PROJECTION)[None]
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    return path


@pytest.mark.parametrize("statistics", [False, True])
def test_the_encoder_of_a_single_file_sees_as_openclips(tower, statistics, tmp_path):
    model = load_model(str(written(tmp_path / "m.safetensors", tower, statistics)), device="cpu")
    assert model.vision is not None and model.normalizer is not None
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        found = model.vision(images)
    expected = tower(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    if statistics:
        assert model.normalizer.std.flatten()[-1] == 2 and model.normalizer.mean.min() == -1
    else:
        assert model.normalizer.std.eq(1).all() and not model.normalizer.mean.any()
    assert model.vision_path is not None
    assert model.vision_path.level(0).alpha == pytest.approx(1, abs=1e-4)  # cosine


@pytest.mark.parametrize("kind", ["difftool", "diffusers", "ldm"])
def test_it_comes_back_from_every_format(tower, kind, tmp_path):
    source = open_model(written(tmp_path / "m.safetensors", tower, statistics=True))
    ledger = convert(source, tmp_path / "there", kind)
    assert not any("not there" in warning for warning in ledger.warnings), ledger.warnings
    convert(open_model(tmp_path / "there"), tmp_path / "back.safetensors", "ldm")
    before, after = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    if kind == "ldm":
        assert b"image_encoder/config.json" not in (tmp_path / "there").read_bytes()[:200_000]
    if kind == "diffusers":
        vision = load_file(tmp_path / "there/image_encoder/model.safetensors")
        assert vision["visual_projection.weight"].equal(tower.proj.T)


def test_an_encoder_that_is_not_whole_is_kept_as_it_is(tower, tmp_path):
    path = written(tmp_path / "m.safetensors", tower)
    tensors = load_file(path)
    del tensors["embedder.model.visual.ln_post.bias"]
    save_file(tensors, path)
    source = open_model(path)
    assert "extra.ldm.embedder.model.visual.proj" in source.tensors
    assert not any(name.startswith("image_") for name in source.configs)


def test_of_openais_encoder_the_statistics_are_missed(tmp_path):
    """ViT-L's come in another file, without which its embeddings cannot be noised."""
    config = VisionConfig(
        width=64, layers=1, heads=1, mlp=64, size=16, patch=8, projection=768,
        activation="quick_gelu",
    )  # fmt: skip
    path = written(tmp_path / "m.safetensors", Tower())
    tensors = {n: t for n, t in load_file(path).items() if "visual" not in n}
    for rule in vision_rules(config):
        tensors[f"embedder.model.visual.{rule.theirs}"] = torch.zeros(rule.their_shape)
    save_file(tensors, path)
    source = open_model(path)
    assert any("ViT-L-14_stats.th" in warning for warning in source.warnings)
    assert source.configs["image_encoder/config.json"]["hidden_act"] == "quick_gelu"
    assert load_model(str(path), device="cpu").vision is None
