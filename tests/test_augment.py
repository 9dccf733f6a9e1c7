"""Augmentation that the network is told of, and runs that stop when they get worse."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from folders import solid
from runs import start_run

from difftool.diffusion.denoiser import Cond
from difftool.diffusion.path import Level
from difftool.storage.safetensors import load_tensors
from difftool.training.metrics import PATIENCE, Metrics
from difftool.training.run.evaluation import Evaluation, Work, plan_evaluation
from difftool.training.run.run import Run
from difftool.training.run.validation import Validation
from difftool.training.step.augment import LABELS, AugmentEmbedding, apply_labels, draw_labels

VALUES: dict[str, Any] = {
    "unet": tiny.UNET | {"depth": [0, 0]},
    "train": tiny.TRAIN | {"flip": False, "steps": 4, "augment": 0.5},
    "sample": {"steps": 2},
}


pytestmark = pytest.mark.usefixtures("closed_runs")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    return solid(folder, ((12 * i, 220, 240 - i) for i in range(20)))


def label(**values: float) -> torch.Tensor:
    names = ("mirrored", "upside", "size", "cos", "sin", "along", "across", "right", "down")
    return torch.tensor([[values.get(name, 0.0) for name in names]])


def test_what_is_done_is_what_is_told():
    picture = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))

    def done(**values: float) -> torch.Tensor:
        return apply_labels(picture, label(**values))

    assert done().equal(picture)
    torch.testing.assert_close(done(mirrored=1), picture.flip(-1))
    torch.testing.assert_close(done(upside=1), picture.flip(-2))
    torch.testing.assert_close(done(cos=-2), picture.flip(-1, -2), atol=1e-4, rtol=0)
    square = picture[..., :8]
    torch.testing.assert_close(
        apply_labels(square, label(cos=-1, sin=1)), square.rot90(-1, (2, 3)), atol=1e-4, rtol=0
    )
    moved = done(right=2 / 12 / 0.125, down=1 / 8 / 0.125)
    torch.testing.assert_close(moved[..., 1:, 2:], picture[..., :-1, :-2], atol=1e-5, rtol=0)
    larger = apply_labels(torch.eye(8)[None, None], label(size=5.0))  # twice as large
    assert larger[0, 0].sum() > 12 and done(along=1).shape == picture.shape


def test_each_change_is_as_frequent_as_asked():
    labels = draw_labels(3, torch.arange(20_000), 0.2)
    assert labels.shape == (20_000, LABELS)
    mirrored, upside, size, _, turned, stretched, _, right, _ = (labels != 0).float().mean(0)
    assert (mirrored - 0.1).abs() < 0.01 and (upside - 0.1).abs() < 0.01
    for share in (size, turned, stretched, right):
        assert (share - 0.2).abs() < 0.015
    assert draw_labels(3, torch.arange(99), 0.0).abs().sum() == 0
    assert draw_labels(3, torch.arange(7, 9), 0.2).equal(labels[7:9])


def test_a_picture_to_which_nothing_was_done_is_told_nothing():
    model, x = tiny.model(tiny.preset()), torch.randn(2, 3, 8, 8)
    width = model.network.embedding_width
    assert width
    embedding = AugmentEmbedding(width)
    embedding.init_weights(torch.Generator().manual_seed(0))
    level = Level(500.0, 0.6, 0.8)
    plain = model.denoiser(x, level)
    assert model.denoiser(x, level, Cond(augment=embedding(torch.zeros(2, LABELS)))).equal(plain)
    told = model.denoiser(x, level, Cond(augment=embedding(label(size=1).expand(2, -1))))
    assert not told.allclose(plain, atol=1e-4)


def finish(run: Run) -> bytes:
    for _ in run.steps():
        pass
    return run.finish().read_bytes()


def weights_after(run: Run) -> dict[str, torch.Tensor]:
    """Of a run that is taken to its end, what is left behind among them."""
    for _ in run.steps():
        pass
    return {name: tensor.detach().clone() for name, tensor in run.trainer.learning.items()}


@pytest.mark.parametrize("latent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_it_is_resumed_bit_for_bit_and_leaves_a_plain_model(tmp_path, pictures, latent):
    more: dict[str, Any] = {"parts": ["unet"]}
    if latent:
        more |= {"codec": tiny.VAE | {"latent_channels": 4}}
        more |= {"unet": tiny.UNET | {"depth": [0, 0], "in_channels": 4, "out_channels": 4}}
    options: dict[str, Any] = {"sample_every": 0, "preset": "pixel-small"}
    options["preset"] = "vae-small" if latent else "pixel-small"
    whole = start_run(tmp_path / "whole", pictures, VALUES, more, resume=False, **options)
    expected = weights_after(whole)
    assert "augment.linear.weight" in whole.trainer.learning
    assert not any("augment" in name for name in whole.model.tensors())
    parted = start_run(tmp_path / "run", pictures, VALUES, more, resume=False, **options)
    for step in parted.steps():
        if step.step == 2:
            parted.saves.save()
            break
    parted.folder.close()
    resumed = start_run(tmp_path / "run", pictures, VALUES, more, resume=True, **options)
    assert resumed.trainer.step == 2
    found = weights_after(resumed)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_it_is_refused_where_it_makes_no_sense(difftool, pictures):
    given = ("train", pictures, "--dry-run", "--preset", "pixel-small")
    assert difftool(*given, "--augment", "1.5").code == 2
    stop = difftool(*given, "--stop-when-worse", "--validation", "0")
    assert stop.code == 2 and "nothing to go by" in stop.err
    stop = difftool(*given, "--stop-when-worse", "--sample-every", "0", "--validation", "4")
    assert stop.code == 2 and "nothing would be measured" in stop.err
    ran = difftool(*given, "--augment", "0.12", "--print-config", "--json")
    assert ran.object["config"]["train.augment"]["value"] == 0.12


# --- --stop-when-worse -----------------------------------------------------------------------

STOPS: dict[str, Any] = VALUES | {
    "train": tiny.TRAIN | {"flip": False, "steps": 12, "validation": 5, "stop_when_worse": True},
    "sample": {"steps": 1},
}
BEST = 2


@pytest.fixture
def measured(monkeypatch):
    """Held-out pictures that are best after two steps, by most noise levels."""

    def measure(self: Validation, progress: object = None) -> dict[str, Any]:
        far = abs(self.trainer.step - BEST)
        # the loss alone would go on falling: its noisiest level does, which is the largest
        return {
            "loss": 9.0 / (1 + self.trainer.step),
            "levels": [9.0 / (1 + far / 9), 1 + far, 1 + far, None],
        }

    monkeypatch.setattr(Validation, "measure", measure)


def begin(folder, pictures, resume=False, **options: Any) -> Run:
    every = {"unet": Evaluation(1, pictures=0, samples=5)}
    options = {"preset": "pixel-small", "evaluations": every, **options}
    return start_run(folder, pictures, STOPS, resume=resume, **options)


@pytest.mark.usefixtures("measured")
def test_a_run_that_gets_worse_stops_and_keeps_the_best(tmp_path, pictures):
    run = begin(tmp_path / "run", pictures)
    best: dict[str, torch.Tensor] = {}
    for step in run.steps():
        if step.step == BEST:
            assert run.trainer.ema
            best = {name: t.clone() for name, t in run.trainer.ema.average.items()}
    assert run.trainer.step == BEST + PATIENCE
    written = load_tensors(run.finish())
    for name, tensor in best.items():
        assert written[name].equal(tensor), name
    assert f"best at step {BEST}" in run.notes[-1]
    metrics = Metrics.read(run.folder.metrics)
    assert (metrics.best, metrics.worse) == (BEST, True)
    run.folder.close()
    again = begin(tmp_path / "run", pictures, resume=True)
    assert not list(again.steps()) and again.trainer.step == BEST + PATIENCE
    assert load_tensors(again.finish()).keys() == written.keys()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "after", [BEST, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, BEST + 2))]
)
def test_it_stops_there_too_where_it_was_stopped_before(tmp_path, pictures, after):
    whole = begin(tmp_path / "whole", pictures)
    expected = finish(whole)
    parted = begin(tmp_path / "run", pictures)
    for step in parted.steps():
        if step.step == after:
            parted.saves.save()  # killed between its checkpoint and its measure
            break
    parted.folder.close()
    resumed = begin(tmp_path / "run", pictures, resume=True)
    assert finish(resumed) == expected and resumed.trainer.step == BEST + PATIENCE


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_weights_of_another_step_are_not_taken_for_the_best(tmp_path, pictures):
    run = begin(tmp_path / "run", pictures)
    for _ in run.steps():
        pass
    (tmp_path / "run/best.safetensors").unlink()
    last = (
        {name: t.clone() for name, t in run.trainer.ema.average.items()} if run.trainer.ema else {}
    )
    written = load_tensors(run.finish())
    assert all(written[name].equal(tensor) for name, tensor in last.items())
    assert "not there any more" in run.notes[-1]


def test_measures_by_which_a_run_stops_come_often():
    costly = Work(step=9.6e12, picture=4.4e13, sample=8.2e11)
    assert plan_evaluation(2, costly, "cpu", held=12).samples == 0
    planned = plan_evaluation(2, costly, "cpu", held=12, growth=1.2)
    assert planned.samples and planned.growth == 1.2
