"""The table of families against the presets, and what a model is told to be by its structure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from difftool.config.families import CONCAT, FAMILIES, OWN, PUBLISHED, concat_of, family, family_of
from difftool.config.layers import load_preset, preset_names
from difftool.config.networks import IdentityConfig, TextConfig, UNetConfig, VaeConfig
from difftool.formats.diffusers.pipelines import PIPELINES, pipeline_class

LATENT = [name for name, row in FAMILIES.items() if row.latent and row.fits]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_agrees_with_its_preset(name):
    row = FAMILIES[name]
    preset = load_preset(row.preset)
    assert {*row.variants.values(), row.preset} <= set(preset_names())
    assert row.concat is None or row.concat in CONCAT
    assert set(row.targets) <= {"eps", "v"}
    if row.published:
        unet, codec = preset.unet, preset.codec
        assert isinstance(unet, UNetConfig) and isinstance(codec, VaeConfig)
        assert preset.family == name and preset.target in row.targets
        assert (codec.scale, codec.force_upcast) == (row.scale, row.force_upcast)
        assert unet.heads == row.heads and unet.head_dim == (None if row.heads else 64)
        assert row.encoders is not None
        openclip = [isinstance(t, TextConfig) and t.activation == "gelu" for t in preset.text]
        kinds = ["openclip" if gelu else "clip" for gelu in openclip]
        assert kinds == list(row.encoders)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_of_the_family_that_their_structure_tells(name):
    preset = load_preset(name)
    found = family_of(preset.unet, preset.codec, preset.text)
    assert preset.family in (found, OWN)
    assert pipeline_class(preset) in PIPELINES


CHANGES = {
    "sd1": ("sd15", {}),
    "pix2pix": ("sd15", {"in_channels": 8}),
    "sd1-inpaint": ("sd15", {"in_channels": 9}),
    "sd2": ("sd21", {}),
    "sd2-inpaint": ("sd21", {"in_channels": 9}),
    "sd2-depth": ("sd21", {"in_channels": 5}),
    "sd2-unclip": ("sd21", {"vector_dim": 2048, "vector_name": "class_embedding"}),
    "x4-upscaler": ("sd21", {"in_channels": 7, "num_classes": 1000}),
    "sdxl": ("sdxl", {}),
    "sdxl-inpaint": ("sdxl", {"in_channels": 9}),
    "ssd-1b": ("sdxl", {"mid_blocks": 1}),
    "sdxl-refiner": ("sdxl-refiner", {}),
}


def test_every_family_is_told_by_its_structure_alone():
    assert set(CHANGES) == set(LATENT)
    for name, (base, changes) in CHANGES.items():
        preset = load_preset(base)
        unet = replace(preset.unet, **changes)
        assert family_of(unet, preset.codec, preset.text) == name
        assert FAMILIES[name].concat in (concat_of(unet, preset.codec), None)
        pixels = IdentityConfig(channels=unet.in_channels)
        assert family_of(unet, pixels, preset.text) == "unet"
        assert family_of(unet, preset.codec, ()) == OWN
    sd1 = load_preset("sd15")
    for more in (2, 3, 6):
        unet = replace(sd1.unet, in_channels=4 + more)
        assert family_of(unet, sd1.codec, sd1.text) == OWN
    assert concat_of(replace(sd1.unet, in_channels=6), sd1.codec) == "other"
    halved = replace(load_preset("sdxl").unet, mid_depth=4, depth=(0, 2, 4))
    assert family_of(halved, load_preset("sdxl").codec, load_preset("sdxl").text) == "ssd-1b"


def test_the_preset_of_a_model_is_that_of_its_first_trait_that_has_one():
    assert FAMILIES["sd2"].preset_for() == "sd21"
    assert FAMILIES["sd2"].preset_for("v") == "sd21-v"
    assert FAMILIES["sd1"].preset_for("turbo", "v") == "sd15"
    assert FAMILIES["sdxl"].preset_for("turbo", "guidance") == "sdxl-turbo"
    assert FAMILIES["sdxl-inpaint"].preset_for("turbo", "guidance") == "lcm"


def test_a_family_that_a_preset_made_up_has_nothing_special():
    made_up = family("mine")
    assert made_up.id == "mine" and made_up.fits is None
    assert not made_up.published and not made_up.pipeline and not made_up.modelspec
    assert family("sdxl") is FAMILIES["sdxl"] and set(PUBLISHED) < set(FAMILIES)
