"""Moving averages: exact weights of their profiles, and lengths chosen after the run."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import tiny
import torch
from scipy.integrate import quad

from difftool.adapters.averages import (
    combine,
    exponent,
    reconstruct,
    snapshots,
    write_model,
)
from difftool.config.schema import TrainConfig
from difftool.data import open_dataset
from difftool.errors import UsageError
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.storage.safetensors import read_header
from difftool.training.step.ema import SNAPSHOTS, Ema, exponential, power
from difftool.training.step.loop import Trainer
from difftool.training.step.state import save_state

STEPS, EVERY = 400, 25


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_profile_has_the_length_that_is_asked_for(length):
    gamma = exponent(length)
    moments = [quad(lambda x, k=k: (gamma + 1) * x ** (gamma + k), 0, 1)[0] for k in range(3)]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, 1.0])
def test_a_length_that_no_power_has_is_refused(length):
    with pytest.raises(UsageError, match="cannot be made"):
        exponent(length)


def test_a_power_average_weighs_steps_by_the_profile():
    p, steps, gamma = torch.zeros(1), 30, exponent(0.1)
    ema = Ema({"p": p}, {"0.1": power(0.1)})
    values = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    for value in values:
        p.fill_(value)
        ema.update()
    edges = (torch.arange(steps + 1) / steps).double() ** (gamma + 1)
    assert ema.average["p"].item() == pytest.approx(float(edges.diff() @ values.double()), abs=1e-6)


def test_the_decaying_average_is_short_at_first():
    p = torch.zeros(1)
    ema = Ema({"p": p}, {"decay": exponential(0.5)})
    p.fill_(1.0)
    kept = [1.0]
    for n in range(1, 20):
        ema.update()
        kept.append(kept[-1] * min(0.5, (1 + n) / (10 + n)))
    assert ema.average["p"].item() == pytest.approx(1 - kept[-1])


@pytest.fixture
def walk(tmp_path):
    """A random walk of 400 steps with snapshots of lengths 0.05 and 0.1, and others' averages."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, generator=generator)
    lengths = (0.05, 0.06, 0.08, 0.1, 0.15, 0.2)
    stored = Ema({"unet.p": p}, {f"{n:g}": power(n) for n in (0.05, 0.1)})
    tracked = Ema({"unet.p": p}, {f"{n:g}": power(n) for n in lengths})
    for step in range(1, STEPS + 1):
        p += 0.1 * torch.randn(64, generator=generator)
        stored.update()
        tracked.update()
        if step % EVERY == 0:
            stored.snapshot(tmp_path / "ema")
    return tmp_path / "ema", tracked.tracks, p


@pytest.mark.parametrize("length", [0.06, 0.08, 0.15, 0.2])
def test_any_length_is_made_from_snapshots_of_two(walk, length):
    folder, tracks, p = walk
    made, misfit = reconstruct(folder, length)
    wanted = tracks[f"{length:g}"]["unet.p"]
    far = min((wanted - other).norm() for other in (p, tracks["0.05"]["unet.p"]))
    assert misfit < 0.03
    assert (made["unet.p"] - wanted).norm() < 0.03 * wanted.norm()
    assert (made["unet.p"] - wanted).norm() < 0.2 * far


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_a_stored_length_comes_back_as_it_is(walk, length):
    folder, tracks, _ = walk
    made, misfit = reconstruct(folder, length)
    assert misfit < 1e-6
    wanted = tracks[f"{length:g}"]["unet.p"]
    torch.testing.assert_close(made["unet.p"], wanted, atol=1e-6, rtol=2**-10)  # fp16


def test_a_length_far_below_the_stored_ones_is_refused(walk):
    with pytest.raises(UsageError, match="unexplained"):
        reconstruct(walk[0], 0.005)


def test_nothing_stored_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match="ema_profile=power"):
        reconstruct(tmp_path / "ema", 0.1)


@pytest.fixture
def run(tmp_path):
    """A run folder with a model, its snapshots, and the averages that the run tracked itself."""
    train = {"batch_size": 2, "steps": 20, "warmup": 0, "flip": False, "ema_profile": "power"}
    values = {"unet": tiny.UNET, "train": tiny.TRAIN | train}
    preset = tiny.small("pixel-small", values)
    trainer = Trainer(Model.fresh(preset, seed=0), open_dataset("shapes"))
    for step in trainer.run():
        if step.step % 5 == 0:
            save_state(trainer, tmp_path / "run", keep=1)
    trainer.model.save(tmp_path / "run/model.safetensors")
    assert trainer.ema is not None
    return tmp_path / "run", trainer.ema.tracks


def test_a_model_is_written_with_the_average_that_is_chosen(run, tmp_path):
    folder, tracks = run
    for length, wanted in (("0.05", tracks["0.05"]), ("0.1", tracks["0.1"])):
        path = tmp_path / f"{length}.safetensors"
        misfit, odd = write_model(folder, float(length), path)
        assert misfit < 1e-6 and not odd
        made = load_model(str(path), device="cpu").tensors()
        assert made.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(made[name], value, atol=1e-6, rtol=2**-10, msg=name)


def test_convert_chooses_the_average(run, tmp_path):
    folder, _ = run
    line = [sys.executable, "-m", "difftool", "convert", str(folder), "out.safetensors"]
    done = subprocess.run(
        [*line, "--ema-length", "0.08"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.safetensors\n"
    assert "averaged over 0.08 of the run" in done.stderr
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["ema_length"] == "0.08"
    refused = subprocess.run(
        [*line, "--ema-length", "0.5", "--overwrite"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "at most 0.28" in refused.stderr


def test_shares_of_equal_profiles_are_one_and_nothing():
    points = [(100, exponent(0.05)), (100, exponent(0.1)), (50, exponent(0.1))]
    for number, point in enumerate(points):
        shares, _ = combine(points, point)
        assert shares == pytest.approx([float(i == number) for i in range(3)], abs=1e-6)


def test_snapshots_are_thinned_and_never_of_a_lost_future(tmp_path):
    ema = Ema({"unet.p": torch.zeros(2)}, {"0.1": power(0.1)})
    for _ in range(3 * SNAPSHOTS):
        ema.update()
        ema.snapshot(tmp_path / "ema")
    steps = list(snapshots(tmp_path / "ema"))
    assert len(steps) == SNAPSHOTS
    assert (steps[0], steps[-1]) == (1, 3 * SNAPSHOTS)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 4
    ema.updates = 40  # resumed
    ema.snapshot(tmp_path / "ema")
    assert max(snapshots(tmp_path / "ema")) == 40


def test_a_recipe_asks_for_one_average_for_two_or_for_none():
    p = {"unet.p": torch.zeros(1)}
    for config, rules in (
        (TrainConfig(ema=0.9), ["decay"]),
        (TrainConfig(ema_profile="power"), ["0.05", "0.1"]),
        (TrainConfig(ema_profile="power", ema_lengths=(0.2,)), ["0.2"]),
    ):
        made = Ema.of(config, p)
        assert made is not None
        assert list(made.rules) == rules
        assert made.average is made.tracks[rules[-1]]
    assert Ema.of(TrainConfig(ema=0.0), p) is None
    for lengths in ((), (0.5,)):
        with pytest.raises(ValueError, match="ema_lengths"):
            TrainConfig(ema_lengths=lengths)
