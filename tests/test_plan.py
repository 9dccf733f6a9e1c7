"""What is chosen where little is said fits together, and the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from difftool.config.layers import Layer, load_preset
from difftool.config.options import read_options
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.data import open_dataset
from difftool.formats import open_model
from difftool.pipeline.model import Model
from difftool.training.options import OPTIONS
from difftool.training.run.estimate import estimate, fit, out_of_reach
from difftool.training.run.plan import plan
from difftool.training.run.stages import start_layers
from difftool.training.run.start import prepare

CPU = torch.device("cpu")


def folder(where: Path, side: int, count: int, captions: bool = True) -> str:
    where.mkdir()
    for i in range(count):
        Image.new("RGB", (side, side), (i % 256, 100, 200)).save(where / f"{i}.png")
        if captions:
            (where / f"{i}.txt").write_text("a picture", encoding="utf-8")
    return str(where)


@pytest.fixture(scope="module")
def icons(tmp_path_factory) -> str:
    return folder(tmp_path_factory.mktemp("data") / "icons", 64, 20)


def chosen(data: str, preset: str | None = None, *given: dict, start: str | None = None) -> Preset:
    """What is made of a data set, from nothing or from a model with the values of a preset."""
    begin = []
    if start:
        values = to_values(load_preset(start))
        past = {"steps", "batch_size", "flip", "size"}
        train = {key: v for key, v in values["train"].items() if key not in past}
        begin = [Layer("--from it", {**values, "train": train, "parts": ["unet"], "data": {}})]
    layers = [Layer("test", values) for values in given]
    return plan(open_dataset(data), preset, layers, start=begin).complete("cpu")[0]


# --- size ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "size"), [("sd15", 512), ("sdxl", 1024), ("emoji", 64)])
def test_size_is_that_of_the_model_one_starts_from(icons, start, size):
    made = chosen(icons, start=start)
    assert made.train.size == size
    assert made.sample.size == (size, size)


def test_that_pictures_are_enlarged_is_said(tmp_path):
    small = folder(tmp_path / "small", 24, 4)
    options = {"data": small, "from_": "emoji"}
    training = prepare(read_options(OPTIONS, options))
    [why] = [why for key, _, why in training.choices() if key == "train.size"]
    assert "the model's own; pictures of about 24 are enlarged" in why
    assert training.preset.train.size == 64


def test_the_model_one_starts_from_is_opened_once(tmp_path, monkeypatch):
    """Of a run folder that is its checkpoint's bytes, hashed."""
    opened = []

    def counted(path: Path):
        opened.append(path)
        return open_model(path)

    monkeypatch.setattr("difftool.training.run.stages.open_model", counted)
    options = {"data": folder(tmp_path / "small", 64, 4), "from_": "emoji", "lora": True}
    prepare(read_options(OPTIONS, options))
    assert len(opened) == 1


def test_how_a_model_was_trained_is_its_past(tmp_path, icons):
    past = {
        "steps": 9,
        "batch_size": 2,
        "accumulate": 7,
        "flip": True,
        "validation": 400,
        "size": 32,
    }
    values = tiny.TRAIN | past
    made = tiny.small("pixel-small", {"unet": tiny.UNET, "train": values})
    Model.fresh(made, seed=0).save(tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    planned = plan(open_dataset(icons), None, [], start=start_layers(path, open_model(path)))
    recipe = planned.complete("cpu")[0].train
    assert not {(key, getattr(recipe, key)) for key in past} & set(past.items()) - {("size", 32)}


def test_size_follows_pictures_and_device_from_nothing(tmp_path, icons):
    assert chosen(folder(tmp_path / "digits", 28, 4, captions=False)).train.size == 28
    assert chosen(icons, "pixel-small").train.size == 32
    assert chosen(icons, "pixel-small", {"train": {"size": 48}}).train.size == 48
    latents = {
        "codec": tiny.VAE | {"widths": [8] * 4},
        "unet": {"in_channels": 4, "out_channels": 4},
    }
    assert chosen(icons, "pixel-small", latents).train.size == 64  # eight times smaller inside


def test_a_device_of_another_kind_is_taken_for_a_gpu(icons):
    planned = plan(open_dataset(icons), "pixel-small", [], start=[])
    xpu, cuda = (planned.complete(device)[0].train for device in ("xpu", "cuda"))
    assert (xpu.size, xpu.batch_size, xpu.steps) == (cuda.size, cuda.batch_size, cuda.steps)


# --- steps and warm-up -----------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, "emoji", "sd15"])
@pytest.mark.parametrize("steps", [None, 1, 30, 200, 5000])
def test_the_warm_up_is_a_small_part_of_the_run(icons, start, steps):
    given = [{"train": {"steps": steps}}] if steps else []
    made = chosen(icons, None, *given, start=start).train
    assert made.steps == (steps or made.steps)
    assert made.warmup <= 0.1 * (made.steps or 0) + 1


def test_a_warm_up_that_was_said_stands(tmp_path, icons):
    assert chosen(icons, None, {"train": {"steps": 30, "warmup": 20}}).train.warmup == 20
    own = tmp_path / "own.yaml"
    own.write_text("extends: text-small\ntrain: {steps: 30, warmup: 20}\n", encoding="utf-8")
    assert chosen(icons, str(own)).train.warmup == 20
    begun = plan(
        open_dataset(icons), str(own), [Layer("--steps", {"train": {"steps": 40}})], begun=True
    )
    assert begun.complete("cpu")[0].train.warmup == 20


def test_large_models_are_trained_further_in_few_steps_of_few_pictures(icons):
    made = chosen(icons, start="sd15").train
    assert (made.batch_size, made.steps) == (4, 500)
    assert chosen(icons, start="emoji").train.batch_size == 16  # there are 20 pictures


# --- memory ----------------------------------------------------------------------------------


def fitted(preset: Preset, free: int, **given: set[str]) -> tuple[Preset, list[str], int]:
    """The preset in that much memory, why, and what it then needs."""
    layers, costs = fit(preset, None, given, free, CPU)
    values = to_values(preset)
    for layer in layers:
        values["train"] |= layer.values["train"]
    made = build_preset(values)
    return made, [layer.origin for layer in layers], estimate(made, costs, 2, CPU).memory


PIXELS = tiny.small("pixel-small", {"train": {"size": 32, "steps": 100, "batch_size": 32}})
GIB = 1 << 30


@pytest.mark.parametrize("free", [700 << 20, GIB, 4 * GIB])
def test_the_batch_follows_the_memory_and_accumulation_does_the_rest(free):
    made, why, needed = fitted(PIXELS, free)
    assert needed <= free
    assert (made.train.batch_size or 0) * made.train.accumulate == 32
    assert (made.train.batch_size == 32) is (free == 4 * GIB)
    assert bool(why) is (free < 4 * GIB)


def test_what_the_user_said_of_the_batch_stands():
    made, why, _ = fitted(PIXELS, 700 << 20, train={"batch_size", "checkpointing", "ema"})
    assert (made.train.batch_size, why) == (32, [])
    made, *_ = fitted(PIXELS, 700 << 20, train={"accumulate"})
    assert made.train.accumulate == 1 and made.train.batch_size in (1, 2, 4, 8, 16)


def test_where_one_picture_is_too_much_blocks_are_computed_again():
    big = tiny.small("pixel-small", {"train": {"size": 512, "steps": 9, "batch_size": 2}})
    made, why, needed = fitted(big, 3 * GIB)
    assert made.train.checkpointing
    assert (made.train.batch_size or 0) * made.train.accumulate == 2
    assert needed <= 3 * GIB
    assert "free" in why[0]


def test_what_is_out_of_reach_is_said():
    layers, costs = fit(PIXELS, None, {}, 64 << 20, CPU)
    assert layers
    needs = estimate(PIXELS, costs, 2, CPU)
    said = out_of_reach(needs, 64 << 20, 3 * 86400.0)
    assert len(said) == 2
    assert "64 MiB are free" in said[0] and "3.0 days" in said[1]
    assert out_of_reach(needs, None, 60.0) == []
