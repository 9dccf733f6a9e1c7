"""What a run measures beside its loss: held-out pictures, colours, memory and disk beforehand."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from folders import solid
from PIL import Image
from runs import start_run

from difftool.config.layers import Layer
from difftool.data.shapes import ShapesDataset
from difftool.errors import ResourceError, Stopped, UsageError
from difftool.images.sheets import Cell, sheet
from difftool.pipeline.condition import build_cond, encode_prompts
from difftool.pipeline.model import Model
from difftool.training import metrics
from difftool.training.metrics import METRICS, Metric, Metrics, cast, overfits
from difftool.training.report import page
from difftool.training.run.costs import costs_of, saved_for_backward
from difftool.training.run.estimate import check_disk, estimate
from difftool.training.run.plan import plan
from difftool.training.run.previews import MEASURES
from difftool.training.run.run import Run
from difftool.training.run.validation import channel_statistics as statistics
from difftool.training.run.validation import hold_out

TINY = {
    "unet": tiny.ATTENTION_UNET,
    "train": tiny.TRAIN | {"flip": False},
    "sample": {"steps": 2},
}


pytestmark = pytest.mark.usefixtures("closed_runs")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    return solid(folder, ((215 + 2 * i, 220, 240 - i) for i in range(20)))


def start(folder: Path, data: str, values: dict, *, every: int = 6, resume: bool = False) -> Run:
    options: dict[str, Any] = {"save_every": 100, "sample_every": every}
    return start_run(folder, data, TINY, values, preset="pixel-small", resume=resume, **options)


def finish(run: Run) -> bytes:
    for _ in run.steps():
        pass
    return run.finish().read_bytes()


# --- held-out pictures -----------------------------------------------------------------------


def test_what_is_held_out_is_never_trained_on(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {"train": {"validation": 5}})
    assert run.held is not None
    assert run.previews.validation is not None
    sides = [{s.name(i) for i in range(len(s))} for s in (run.dataset, run.held)]
    assert [len(side) for side in sides] == [15, 5]
    assert not sides[0] & sides[1]
    assert run.trainer.batches.dataset is run.dataset
    assert run.previews.validation.batches.dataset is run.held


@pytest.mark.slow
def test_measuring_changes_nothing_and_gives_the_same_twice(tmp_path, pictures):
    values = {"train": {"validation": 5}, "unet": {"dropout": 0.2}}
    often = start(tmp_path / "often", pictures, values, every=3)
    assert finish(often) == finish(start(tmp_path / "once", pictures, values, every=12))
    lines = Metrics.read(often.folder.metrics).validation
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert often.previews.validation is not None
    with often.previews.averaged():
        first, second = (often.previews.validation.measure() for _ in range(2))
    assert first == second == lines[-1]["validation"]


def test_the_measure_is_the_error_of_the_prediction(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {"train": {"validation": 5}})
    assert run.held is not None
    assert run.previews.validation is not None
    network = run.model.denoiser.network
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()  # F = 0, so that the loss of flow's target is (eps - x0)^2
    x0 = run.held.images(range(5), 16).float() / 127.5 - 1
    measured = run.previews.validation.measure()
    assert measured["loss"] == pytest.approx(1 + float((x0**2).mean()), rel=0.02)
    counted = [v for v in measured["levels"] if v is not None]
    assert len(counted) >= 5
    assert counted == pytest.approx([measured["loss"]] * len(counted), rel=0.2)


def test_the_times_of_a_measure_cover_the_training_times_evenly(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {"train": {"validation": 5}})
    assert run.previews.validation is not None
    objective = run.trainer.objective
    samples = run.evaluation.samples
    batch = run.previews.validation.batches.draw(0, samples)
    with torch.no_grad():
        seen = objective.held_out(batch).log_snr
    assert seen is not None
    even = (torch.arange(samples) + 0.5) / samples
    alpha, sigma = run.model.denoiser.path.coefficients(objective.times(even))  # type: ignore[attr-defined]
    wanted = 2 * (alpha / sigma).log().flatten()
    ranks = torch.searchsorted(seen.sort().values, wanted.sort().values) / samples
    assert float((ranks - even).abs().max()) < 0.02


def test_a_run_stopped_where_it_would_have_shown_shows_it_when_it_goes_on(tmp_path, pictures):
    values = {"train": {"validation": 5}}
    whole = start(tmp_path / "whole", pictures, values)
    model = finish(whole)
    stopped = start(tmp_path / "stopped", pictures, values)
    with pytest.raises(Stopped):
        for step in stopped.steps():
            if step.step == 6:
                signal.raise_signal(signal.SIGTERM)
    stopped.folder.close()
    assert not Metrics.read(stopped.folder.metrics).validation
    resumed = start(tmp_path / "stopped", pictures, values, resume=True)
    assert finish(resumed) == model
    assert resumed.folder.metrics.read_bytes() == whole.folder.metrics.read_bytes()
    names = [
        sorted(p.name for p in (tmp_path / r / "samples").iterdir()) for r in ("whole", "stopped")
    ]
    assert names[0] == names[1] == ["step-000006.png", "step-000012.png"]
    sessions = json.loads((tmp_path / "stopped" / "run.json").read_text(encoding="utf-8"))[
        "sessions"
    ]
    assert [(s["from"], s["to"]) for s in sessions] == [(0, 6), (6, 12)]


@pytest.mark.parametrize(("wanted", "held"), [(None, 256), (0, 0), (5, 5), (0.1, 5000)])
def test_how_much_is_held_out(wanted, held):
    dataset = ShapesDataset()
    dataset.held_out = ShapesDataset()
    kept, left = hold_out(dataset, wanted)
    count = len(left) if left is not None else 0
    assert count == pytest.approx(held, rel=0.05)
    assert len(kept) == len(dataset) - (count if wanted else 0)


def test_holding_out_all_is_refused(tmp_path, pictures):
    with pytest.raises(UsageError, match="hold out that much"):
        start(tmp_path / "run", pictures, {"train": {"validation": 20}})


@pytest.mark.parametrize(
    ("validation", "training", "expected"),
    [
        ([1.0, 0.5, 0.6, 0.7, 0.8], [1.0, 0.5, 0.4, 0.3, 0.2], True),
        ([1.0, 0.5, 0.6, 0.7, 0.8], [1.0, 0.5, 0.6, 0.7, 0.8], False),  # training rises too
        ([1.0, 0.5, 0.6, 0.51, 0.6], [1.0, 0.5, 0.4, 0.3, 0.2], False),  # it comes and goes
        ([1.0, 0.5, 0.6, 0.7], [1.0, 0.5, 0.4, 0.3], False),  # too early to tell
        ([1.0, 0.9, 0.8, 0.7, 0.6], [1.0, 0.5, 0.4, 0.3, 0.2], False),
    ],
)
def test_overfitting_is_a_rise_that_lasts_while_training_falls(validation, training, expected):
    assert overfits(validation, training) is expected


# --- colours and sheets ----------------------------------------------------------------------


def test_a_colour_cast_is_found_and_chance_is_not():
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(256, 3, 8, 8, generator=generator) - 0.5
    good = statistics(data[:16])
    assert cast(good, statistics(data), 16) is None
    tinted = data[:16] + torch.tensor([0.0, 0.0, 0.3])[:, None, None]
    assert (
        cast(statistics(tinted), statistics(data), 16)
        == "samples are more blue (+0.30) than the data"
    )
    assert "darker" in str(cast(statistics(data[:16] - 0.4), statistics(data), 16))
    assert "less varied" in str(cast(statistics(data[:16] * 0.3), statistics(data), 16))
    shades = torch.randn(256, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8) * 0.5
    assert cast(statistics(shades[:4]), statistics(shades), 4) is None  # four are too few to tell


def test_a_metric_is_a_row_and_what_measures_it(tmp_path, pictures, monkeypatch):
    others = {"validation", "bits", "evaluation"}
    assert {*MEASURES["unet"], *MEASURES["vae"]} | others == {m.key for m in METRICS}

    def summary(metrics: Metrics) -> tuple[str, str]:
        return "brightness", f"{metrics.of('brightness')[-1]['brightness']:.3f} of 1"

    row = Metric("brightness", "for tests", summary, lambda metrics, steps: "all is bright")
    for module in (metrics, page):
        monkeypatch.setattr(module, "METRICS", (*METRICS, row))
    measure = {"brightness": lambda previews, shown: float(shown.images.mean())}
    monkeypatch.setitem(MEASURES, "unet", measure)
    run = start(tmp_path / "run", pictures, {})
    finish(run)
    assert [line["step"] for line in Metrics.read(run.folder.metrics).of("brightness")] == [6, 12]
    assert run.notes == ["all is bright"]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert " of 1</dd>" in report
    assert "all is bright" in report


def test_what_is_worrying_is_said_once(tmp_path, pictures):
    run = start(tmp_path / "run", pictures, {"train": {"lr": 1e-9}}, every=2)
    finish(run)
    assert len(Metrics.read(run.folder.metrics).colours) == 6
    [note] = run.notes  # untrained samples are grey, the pictures nearly white
    assert "darker" in note
    assert note[1:] in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_sheet_writes_below_each_picture_what_fits():
    cells = [Cell([Image.new("RGB", (64, 64), "red")], text) for text in ("", "short", "x y " * 99)]
    drawn = sheet(cells, columns=3)
    columns = [drawn.crop((i * 74 + 10, 75, i * 74 + 74, drawn.height)) for i in range(3)]
    inked = [sum(column.convert("L").histogram()[:128]) for column in columns]
    assert inked[0] == 0 < inked[1] < inked[2]
    assert drawn.height < 64 + 4 * 15 + 20


# --- beforehand ------------------------------------------------------------------------------


def test_activations_are_counted_as_the_backward_pass_keeps_them():
    dataset = ShapesDataset()
    preset, vocabulary, _ = plan(dataset, "text-small", []).complete("cpu")
    counted = costs_of(preset, vocabulary).parts["unet"].activations
    model = Model.fresh(preset, seed=0, tokenizer_json=vocabulary)
    cond = build_cond(model, encode_prompts(model, ["a red circle"]), [None], (64, 64))
    x = torch.randn(1, model.codec.channels, 64 // model.codec.factor, 64 // model.codec.factor)
    level = model.denoiser.path.level(0.5)
    with saved_for_backward() as tensors:
        model.denoiser(x, level, cond)
    own = sum(t.untyped_storage().nbytes() for t in tensors)
    assert counted == pytest.approx(own, rel=0.1)


@pytest.mark.slow
def test_recomputing_blocks_takes_less_memory():
    given = [Layer("test", {"train": {"checkpointing": True}})]
    counts = []
    for layers in ([], given):
        preset, vocabulary, _ = plan(ShapesDataset(), "text-small", layers).complete("cpu")
        counts.append(costs_of(preset, vocabulary).parts["unet"].activations)
    assert counts[1] < 0.6 * counts[0]


def test_the_estimate_counts_weights_gradients_moments_and_average():
    preset, vocabulary, _ = plan(ShapesDataset(), "text-small", []).complete("cpu")
    counted = costs_of(preset, vocabulary)
    costs = estimate(preset, counted, 2, torch.device("cpu"))
    total = sum(costs.parameters.values())
    assert costs.weights == 5 * 4 * total
    assert costs.checkpoint == 4 * 4 * total
    assert costs.disk == 3 * costs.checkpoint + 4 * total
    assert costs.activations == costs.batch * counted.parts["unet"].activations


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
    check_disk(tmp_path / "new" / "run", 5 << 20)
    with pytest.raises(ResourceError, match="too full") as caught:
        check_disk(tmp_path / "new" / "run", 20 << 20)
    assert "20 MiB" in str(caught.value)
    assert not (tmp_path / "new").exists()
