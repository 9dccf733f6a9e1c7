"""The table of settings: what its rows say is whole, and true."""

from __future__ import annotations

import dataclasses

import pytest

from difftool.config.layers import DEFAULT_MODEL
from difftool.config.options import read_options
from difftool.config.schema import SampleConfig
from difftool.errors import UsageError
from difftool.formats import open_model
from difftool.hub.find import find_model
from difftool.sampling.command import prepare
from difftool.sampling.files.names import FIELDS
from difftool.sampling.metadata.a1111 import ORDER
from difftool.sampling.requests import Request
from difftool.sampling.settings import A1111_WORDS, ALWAYS, KEYS, OPTIONS, SETTINGS

FACTS = {"Model hash", "RNG", "Version"}
"""What A1111's text says that is no setting."""


def named(rows):
    return {row.name: row for row in rows}


def test_names_flags_and_keys_are_each_of_one_row():
    assert len(named(OPTIONS)) == len(OPTIONS) and len(named(SETTINGS)) == len(SETTINGS)
    flags = [flag for row in OPTIONS for flag in (row.flags or (row.flag,))]
    keys = [key for row in SETTINGS for key in row.json]
    shorts = [row.short for row in SETTINGS if row.short]
    for spellings in (flags, keys, shorts):
        assert len(set(spellings)) == len(spellings)
    assert not set(shorts) & set(KEYS)


def test_every_field_of_the_configuration_and_of_a_request_has_a_row():
    fields = {field.name for field in dataclasses.fields(SampleConfig)}
    keys = {row.key.split(".")[1] for row in SETTINGS if row.key}
    assert keys == fields | {"width", "height"}
    own = {field.name for field in dataclasses.fields(Request)}
    given = {row.field for row in SETTINGS if row.field}
    others = {
        "settings",
        "source",
        "line",
        *("model", "model_hash", "made_by"),
        "embeddings",
        "loras",
        "plugins",
        "missed",
    }
    assert own - given == others | {
        *(
            "found",
            "named",
            "sought",
            "hashes",
            "opened",
            "changed",
            "networks",
            "ignored",
            "place",
        ),
    }
    assert given <= own


def test_what_a_picture_is_made_by_is_printed_and_read():
    for row in SETTINGS:
        if row.key is not None and row.name != "size":  # which is width and height
            assert row.json and row.json[0] == row.name
            assert all(KEYS[key] is row for key in row.json)
    assert {row.name for row in ALWAYS} < set(FIELDS)


def test_a1111_s_words_have_their_places():
    assert set(ORDER) == {*A1111_WORDS} | FACTS


def test_help_shows_how_the_bundled_model_is_sampled():
    shipped = open_model(find_model(DEFAULT_MODEL)).values["sample"]
    width, height = shipped["size"]
    shown = {row.name: row.shown_default() for row in OPTIONS}
    for name in ("sampler", "schedule", "steps"):
        assert shown[name] == f"{shipped[name]} for {DEFAULT_MODEL}"
    assert shown["guidance"] == f"{shipped['guidance']:g} for {DEFAULT_MODEL}"
    assert shown["size"] == f"{width}x{height} for {DEFAULT_MODEL}"
    assert shown["model"] == DEFAULT_MODEL
    for name in ("strength", "image_guidance"):
        assert float(shown[name] or 0) == getattr(SampleConfig(), name)


def test_keywords_are_read_as_flags_are():
    values = read_options(
        OPTIONS,
        {"prompt": "a fox", "seed": 7, "size": (64, 32), "guidance": 3, "label": 2, "lora": "a:1"}
        | {"lora": None, "guidance_interval": (-2, float("inf"))},
    )
    assert values["prompt"] == ["a fox"] and values["seed"] == (7,) and values["label"] == ["2"]
    assert values["size"] == (64, 32) and values["guidance"] == 3.0
    assert values["guidance_interval"] == (-2.0, float("inf"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "not a number"),
        ({"steps": 0}, "--steps 0"),
        ({"guidance": float("nan")}, "finite"),
        ({"guidance": 0.5}, "0.5"),
        ({"image_guidance": 0.5}, "at least 1"),
        ({"strength": 0}, "--strength 0"),
        ({"strength": 2.0}, "--strength 2"),
        ({"noise_level": 1000}, "999"),
        ({"prompt": [3]}, "3 is not a text"),
        ({"prompt": "a\0b"}, "control characters"),
        ({"seed": 1.5}, "1.5"),
        ({"size": "64y64"}, "64y64"),
        ({"sampler": "eulr"}, "eulr"),
        ({"schedule": "karas"}, "karas"),
        ({"exact": 1}, "neither true nor false"),
        ({"stepz": 3}, "stepz"),
        ({"init": "none.png"}, "there is no picture none.png"),
        ({"lora": ["none.safetensors:0.5"]}, "there is no LoRA none.safetensors"),
        ({"refiner_start": 0.5}, "--refiner"),
        ({"prompt": "a", "prompts": "-"}, "exclude each other"),
        ({"set": ["sample.strength=1.5"]}, "strength 1.5"),
        ({"set": ["sample.noise_level=1000"]}, "noise level 1000"),
    ],
)
def test_what_no_model_takes_is_refused(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        prepare(read_options(OPTIONS, given))
    assert says in str(refused.value)
