"""The presets of published families, at full size on the meta device, against published facts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import published
import pytest
import torch
from torch import nn

from difftool.config.layers import load_preset, preset_names
from difftool.config.networks import PriorConfig, TextConfig, UNetConfig, VaeConfig
from difftool.config.schema import Preset
from difftool.config.validate import to_values
from difftool.diffusion import GRIDS, TARGETS
from difftool.diffusion.path import Discrete, build_path
from difftool.formats.diffusers.scheduler_switch import switched
from difftool.networks.kinds import build_codec, build_encoder, build_network
from difftool.networks.unet import UNet
from difftool.networks.vae import Vae

SD15_UNET, SD21_UNET = (686, 859_520_964), (686, 865_910_724)
SDXL_UNET, REFINER_UNET = (1680, 2_567_463_684), (1220, 2_259_526_660)
VAE, CLIP_L, CLIP_H, CLIP_G = (
    (248, 83_653_863), (196, 123_060_480), (372, 340_387_840), (517, 694_659_840),
)  # fmt: skip

# (tensors, parameters) of the U-Net, the autoencoder and each text encoder, and the U-Net's
# published configuration.
PARTS: dict[str, tuple[dict[str, tuple[int, int]], dict[str, Any]]] = {
    "sd15": ({"unet": SD15_UNET, "vae": VAE, "text.0": CLIP_L}, published.SD1),
    "sd21": ({"unet": SD21_UNET, "vae": VAE, "text.0": CLIP_H}, published.SD2),
    "sd21-v": ({"unet": SD21_UNET, "vae": VAE, "text.0": CLIP_H}, published.SD2),
    "sd21-zsnr": ({"unet": SD21_UNET, "vae": VAE, "text.0": CLIP_H}, published.SD2),
    "sd-turbo": ({"unet": SD21_UNET, "vae": VAE, "text.0": CLIP_H}, published.SD2),
    "lcm": (
        {"unet": (687, 859_520_964 + 256 * 320), "vae": VAE, "text.0": CLIP_L}, published.LCM,
    ),
    "sdxl": (
        {"unet": SDXL_UNET, "vae": VAE, "text.0": CLIP_L, "text.1": CLIP_G}, published.SDXL,
    ),
    "sdxl-turbo": (
        {"unet": SDXL_UNET, "vae": VAE, "text.0": CLIP_L, "text.1": CLIP_G}, published.SDXL,
    ),
    "sdxl-refiner": ({"unet": REFINER_UNET, "vae": VAE, "text.0": CLIP_G}, published.REFINER),
    "ddpm-cifar10": ({"unet": (328, 35_746_307)}, published.DDPM),
}  # fmt: skip


def sizes(network: nn.Module) -> tuple[int, int]:
    """Tensors and parameters."""
    return len(network.state_dict()), sum(p.numel() for p in network.parameters())


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@cache
def oracle_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes(published.build(published.VAE if name == "vae" else PARTS[name][1]))


def parts(preset: Preset) -> dict[str, nn.Module]:
    """The preset's networks without memory."""
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"unet": build_network(preset.unet)}
        if isinstance(preset.codec, VaeConfig):
            networks["vae"] = Vae(preset.codec)
        return networks | {f"text.{i}": build_encoder(text) for i, text in enumerate(preset.text)}


@pytest.mark.parametrize("name", PARTS)
def test_networks_have_the_published_tensors(name):
    networks = parts(load_preset(name))
    assert {part: sizes(network) for part, network in networks.items()} == PARTS[name][0]
    assert shapes(networks["unet"]) == oracle_shapes(name)
    if "vae" in networks:
        assert shapes(networks["vae"]) == oracle_shapes("vae")


@pytest.mark.parametrize(
    "base,changes,oracle,counts",
    [
        ("sd15", {"in_channels": 9}, published.SD1 | {"in_channels": 9}, (686, 859_535_364)),
        (
            "sd21",
            {"vector_dim": 2048, "vector_name": "class_embedding"},
            published.UNCLIP,
            (690, 870_173_124),
        ),
        (
            "sd21",
            {
                "in_channels": 7,
                "channels": (256, 512, 512, 1024),
                "depth": (0, 1, 1, 1),
                "only_cross": (0, 1, 2),
                "head_dim": None,
                "heads": 8,
                "num_classes": 1000,
            },
            published.UPSCALER,
            None,
        ),
        (
            "sdxl",
            {
                "depth": (0, 2, 4),
                "up_depth": (0, (2, 1, 1), (4, 4, 10)),
                "mid_blocks": 1,
                "mid_depth": 0,
            },
            published.SSD_1B,
            None,
        ),
    ],
    ids=["sd1-inpaint", "sd2-unclip", "x4-upscaler", "ssd-1b"],
)
def test_relatives_have_the_published_tensors(base, changes, oracle, counts):
    with torch.device("meta"):
        network = build_network(replace(load_preset(base).unet, **changes))
        assert shapes(network) == shapes(published.build(oracle))
    if counts:
        assert sizes(network) == counts


def test_adm_has_the_published_tensors():
    config = UNetConfig(
        in_channels=3, out_channels=6, channels=(192, 384, 576, 768), blocks=3,
        depth=(0, 1, 1, 1), head_dim=64, num_classes=1000, scale_shift=True, resblock_updown=True,
    )  # fmt: skip
    with torch.device("meta"):
        assert shapes(UNet(config)) == shapes(published.build(published.ADM))


@pytest.mark.parametrize("name", preset_names())
def test_parts_fit_together(name):
    preset = load_preset(name)
    unet, text = preset.unet, preset.text
    assert isinstance(unet, UNetConfig | PriorConfig)
    assert unet.context_dim == (sum(encoder.width for encoder in text) or None)
    pooled = sum(encoder.projection or encoder.width for encoder in text if encoder.pooled)
    assert (unet.vector_dim or 0) == pooled + 256 * preset.size_numbers
    codec = build_codec(preset.codec)
    multiple = codec.factor
    assert unet.in_channels == codec.channels
    if isinstance(unet, UNetConfig):
        assert unet.out_channels == codec.channels
        # Sizes that reach the innermost level without rounding.
        multiple = codec.factor * 2 ** (len(unet.channels) - 1)
    assert unet.multiple * codec.factor == multiple
    assert all(side % multiple == 0 for side in preset.sample.size)
    path = build_path(preset.path)
    if isinstance(path, Discrete) and path.zero_snr:
        assert preset.target != "eps"  # at alpha = 0 eps says nothing about x0
    levels = GRIDS[preset.sample.schedule](
        path, preset.sample.steps, **preset.sample.schedule_options
    )
    assert len(levels) == preset.sample.steps + 1
    assert preset.target in TARGETS


@pytest.mark.parametrize(
    "name,times",
    [
        # diffusers' DPM-Solver, built from the published configuration.
        ("sd15", [38 * i + 1 for i in range(25, 0, -1)]),
        ("sd21-v", [38 * i + 1 for i in range(25, 0, -1)]),
        ("sdxl", [32 * i + 1 for i in range(30, 0, -1)]),
        ("sd-turbo", [999, 749, 499, 249]),
        ("sdxl-turbo", [999, 749, 499, 249]),
        ("lcm", [999, 759, 499, 259]),
        ("ddpm-cifar10", [10 * i for i in range(99, -1, -1)]),
        ("sd21-zsnr", [40 * i - 1 for i in range(25, 0, -1)]),
    ],
)
def test_networks_are_asked_at_the_published_times(name, times):
    sample = load_preset(name).sample
    path = build_path(load_preset(name).path)
    levels = GRIDS[sample.schedule](path, sample.steps, **sample.schedule_options)
    assert [level.t for level in levels[:-1]] == times


@pytest.mark.parametrize(
    "name,alpha_bar",
    [
        ("sd15", 0.004660098513),
        ("sdxl", 0.004660098513),
        ("sd21-zsnr", 0.0),
        ("ddpm-cifar10", 4.035829765e-05),
    ],
)
def test_paths_end_where_the_published_ones_do(name, alpha_bar):
    path = build_path(load_preset(name).path)
    assert path.level(path.t_max).alpha ** 2 == pytest.approx(alpha_bar, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl", "lcm", "sd-turbo", "sdxl-turbo"])
def test_the_default_sampler_is_diffusers_own(name):
    """What a preset samples with by itself is what it samples with when that is asked for."""
    preset = load_preset(name)
    values = to_values(preset.sample)
    found = switched(preset, preset.sample.sampler, None)
    assert {key: values[key] for key in found} == json.loads(json.dumps(found))


def test_what_makes_each_family_itself():
    presets = {name: load_preset(name) for name in PARTS}
    scales = {name: getattr(preset.codec, "scale", None) for name, preset in presets.items()}
    assert {n for n, scale in scales.items() if scale == 0.18215} == {
        "sd15", "sd21", "sd21-v", "sd21-zsnr", "sd-turbo", "lcm",
    }  # fmt: skip
    assert {n for n, scale in scales.items() if scale == 0.13025} == {
        "sdxl", "sdxl-turbo", "sdxl-refiner",
    }  # fmt: skip
    assert {n for n, preset in presets.items() if preset.target == "v"} == {"sd21-v", "sd21-zsnr"}
    # Distilled models run without guidance, or with it as an input.
    assert {n for n, preset in presets.items() if preset.sample.guidance == 1} == {
        "sd-turbo", "sdxl-turbo", "ddpm-cifar10",
    }  # fmt: skip
    assert [text.pad_id for text in presets["sdxl"].text] == [None, 0]
    hidden = {n: [getattr(t, "hidden", None) for t in p.text] for n, p in presets.items()}
    assert hidden["sdxl"] == [-2, -2]
    assert [text.pooled for text in presets["sdxl"].text] == [False, True]
    assert hidden["sd21"] == [-1] and presets["sd21"].text[0].layers == 23
    (clip,) = presets["sd15"].text
    assert isinstance(clip, TextConfig) and clip.activation == "quick_gelu"


def test_a_child_that_names_another_schedule_drops_its_parents_options():
    assert load_preset("sd21").sample.schedule_options == {"offset": 1}
    assert load_preset("sd-turbo").sample.schedule_options == {}
    asked = load_preset("sd15", ["sample.schedule=trailing"]).sample
    assert (asked.schedule, asked.schedule_options) == ("trailing", {})
    kept = load_preset("sd15", ["sample.steps=10"]).sample
    assert kept.schedule_options == {"offset": 1}
