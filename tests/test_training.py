"""The training loop: it learns, and a run that is stopped and resumed is the same run."""

from __future__ import annotations

import json
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from runs import start_run
from slices import slow_but

from difftool.data import open_dataset
from difftool.errors import ResourceError, Stopped, UsageError
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.training.run.folder import RunFolder
from difftool.training.run.plan import plan
from difftool.training.run.run import Run

TINY = {
    "unet": tiny.ATTENTION_UNET,
    "train": tiny.TRAIN | {"flip": True},
    "sample": {"steps": 2},
}
TINY_TEXT = {"text": [tiny.TEXT], "unet": tiny.TEXT_UNET}


pytestmark = pytest.mark.usefixtures("closed_runs")


def start(folder: Path, data: str, values: dict, preset: str | None = None, resume: bool = False):
    options: dict[str, Any] = {"save_every": 5, "keep": 9, "sample_every": 6}
    return start_run(folder, data, TINY, values, preset=preset, resume=resume, **options)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Two classes: dark and light pictures."""
    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            size = (16, 16) if i else (24, 16)
            image = Image.new("RGB", size, (shade, shade + 5 * i, shade))
            image.save(tmp_path / "pictures" / name / f"{i}.png")
    return str(tmp_path / "pictures")


def state(run: Run) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on."""
    trainer = run.trainer
    tensors = {f"live.{k}": v for k, v in trainer.parameters.items()}
    if trainer.ema:
        tensors |= {f"ema.{k}": v for k, v in trainer.ema.average.items()}
    for name, p in trainer.parameters.items():
        tensors |= {f"adam.{name}.{k}": v for k, v in trainer.optimizer.state[p].items()}
    return {k: v.detach().clone() for k, v in tensors.items()}


RECIPES = [
    ({}, "class"),
    (TINY_TEXT, "shapes"),
    ({"path": {"kind": "edm"}, "target": "edm", "train": {"time": "log_normal"}}, "class"),
    ({"data": {"buckets": True}, "train": {"batch_size": 3}}, "class"),
    ({"train": {"accumulate": 3}}, "class"),
    ({"train": {"ema": 0.0}}, "class"),
    ({"unet": {"dropout": 0.2}}, "class"),
]


@pytest.mark.parametrize(
    ("stops", "recipe"),
    slow_but([((11, 10), RECIPES[3])], [*product([(11, 10), (6, 5)], RECIPES)]),
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, pictures, stops, recipe):
    (stop_at, from_step), (values, data) = stops, recipe
    source, preset = (pictures, "pixel-small") if data == "class" else ("shapes", "text-small")
    whole = start(tmp_path / "whole", source, values, preset)
    for _ in whole.steps():
        pass
    whole.finish()

    stopped = start(tmp_path / "stopped", source, values, preset)
    for step in stopped.steps():
        if step.step == stop_at:
            break  # as if killed: what came after the last checkpoint is lost
    stopped.folder.close()
    resumed = start(tmp_path / "stopped", source, values, preset, resume=True)
    assert resumed.trainer.step == from_step
    for _ in resumed.steps():
        pass
    resumed.finish()

    ours, theirs = state(resumed), state(whole)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
    for name in ("metrics.jsonl", "model.safetensors"):
        same = [(tmp_path / run / name).read_bytes() for run in ("whole", "stopped")]
        assert same[0] == same[1]


def test_a_signal_saves_and_says_how_to_go_on(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {})
    with pytest.raises(Stopped, match="stopped after step 3") as caught:
        for step in run.steps():
            if step.step == 3:
                signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert "--resume" in str(caught.value)
    assert (tmp_path / "run/checkpoints/step-000003/manifest.json").is_file()


def test_a_second_signal_interrupts(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {})
    steps: Any = run.steps()
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    steps.close()
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_folder_holds_what_is_promised(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {})
    for _ in run.steps():
        pass
    path = run.finish()
    names = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*.*")}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "samples/step-000006.png"} <= names
    assert {"report.html", "run.json", "samples/step-000012.png"} <= names
    lines = [
        json.loads(line) for line in run.folder.metrics.read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == [10, 12]
    assert [line["step"] for line in lines if "colours" in line] == [6, 12]
    with Image.open(tmp_path / "run/loss.png") as curve:
        assert curve.size[0] > 400
    model = load_model(str(path), device="cpu")
    assert model.preset == run.preset
    ema = run.trainer.ema
    assert ema is not None
    assert all(torch.equal(model.tensors()[k], v) for k, v in ema.average.items())
    assert load_model(str(tmp_path / "run"), device="cpu").hash == model.hash


@pytest.mark.slow
def test_training_learns_the_classes(tmp_path, pictures):
    values = {
        "train": {"steps": 200, "batch_size": 12, "lr": 5e-3, "warmup": 10, "ema": 0.9},
        "sample": {"steps": 8},
    }
    run = start(tmp_path / "run", pictures, values)
    losses = [step.loss for step in run.steps() if step.loss is not None]
    assert losses[-1] < 0.8 * losses[0]
    with run.previews.averaged():
        items = [SampleInput(label=k, seed=s) for k in (0, 1) for s in range(4)]
        images = run.previews.samples(items).images
    dark, light = images[:4].mean(), images[4:].mean()
    assert dark < -0.4
    assert light > 0.4


def test_numbers_that_are_not_finite_stop_the_run(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {"train": {"lr": 1e30, "clip_norm": 0.0}})
    with pytest.raises(ResourceError, match="not finite"):
        for _ in run.steps():
            pass


def test_two_runs_do_not_share_a_folder(tmp_path, pictures):
    first = start(tmp_path / "run", pictures, {})
    with pytest.raises(UsageError, match="another run"):
        start(tmp_path / "run", pictures, {})
    first.folder.close()


def test_of_two_runs_that_begin_at_once_the_later_leaves_no_trace(tmp_path, pictures):
    first = start(tmp_path / "run", pictures, {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    assert "config.yaml" in before
    with pytest.raises(UsageError, match="another run is at work"):
        RunFolder(tmp_path / "run", fresh=True)
    first.folder.close()  # the other was found to be empty, but is not by now
    with pytest.raises(UsageError, match="another run has begun"):
        RunFolder(tmp_path / "run", fresh=True)
    RunFolder(tmp_path / "run").close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_resuming_with_another_batch_size_is_refused(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {})
    for _ in run.steps():
        pass
    run.folder.close()
    with pytest.raises(UsageError, match="another batch_size"):
        start(tmp_path / "run", pictures, {"train": {"batch_size": 6}}, resume=True)


def test_captions_are_needed_for_text(pictures):
    with pytest.raises(UsageError, match="no captions"):
        plan(open_dataset(pictures), "text-small", [])


def test_what_is_chosen_is_explained(pictures):
    preset, _, layers = plan(open_dataset(pictures), None, []).complete("cpu")
    assert preset.name == "pixel-small"
    assert preset.classes == ("dark", "light")
    assert preset.unet.num_classes == 3
    chosen = [layer.origin for layer in layers if layer.origin.startswith("chosen")]
    assert len(chosen) == 6
    assert preset.train.size == 16


def test_pictures_of_many_shapes_are_trained_in_their_own_frames(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        size = [(32, 16), (16, 32), (20, 20)][i % 3]
        Image.new("RGB", size, (20 * i, 100, 100)).save(tmp_path / "photos" / f"{i}.png")
    run = start(tmp_path / "run", str(tmp_path / "photos"), {"train": {"steps": 24}})
    assert run.preset.data.buckets is True  # squares would lose a third
    shapes, seen = set(), []
    for position in range(24):
        batch = run.trainer.batches.draw(position * 4, 4)
        assert batch.pictures is not None
        shapes.add(tuple(batch.pictures.shape[2:]))
        seen += batch.indices
    assert len(shapes) == 3
    counts = [seen.count(i) for i in range(len(run.dataset))]
    assert max(counts) - min(counts) <= 2
    for _ in run.steps():
        pass
    run.finish()
