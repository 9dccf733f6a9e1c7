"""`train` as the library has it: from options to a run, without talk."""

from __future__ import annotations

import pytest
import tiny
from folders import lay, pictures

from difftool.config.options import read_options
from difftool.errors import UsageError
from difftool.pipeline.load import load_model
from difftool.training.options import OPTIONS
from difftool.training.run.start import prepare, train

SMALL = {f"unet.{key}": value for key, value in tiny.UNET.items()}
SMALL |= {"sample.steps": 2, "train.lr": 2e-4}


@pytest.fixture
def values(tmp_path, monkeypatch):
    """The options of a small run."""
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / "photos", pictures(*(f"{i}.png" for i in range(4))))

    def read(**more):
        small = {"steps": 3, "batch_size": 2, "size": 16, "device": "cpu", "set": SMALL}
        return read_options(OPTIONS, {"data": "photos", **small, **more})

    return read


def test_a_run_is_an_object(tmp_path, values):
    run = train(values(out=tmp_path / "run", seed=5))
    assert run.path == tmp_path / "run" / "model.safetensors"
    assert load_model(str(run.path), device="cpu").preset == run.preset
    assert (run.steps, run.preset.train.lr, run.preset.train.seed) == (3, 2e-4, 5)
    assert [line["step"] for line in run.metrics.training] == [3]
    assert run.report.is_file()
    with pytest.raises(UsageError, match="not empty"):
        train(values(out=tmp_path / "run"))
    again = train(values(out=tmp_path / "run", resume=True, steps=4, allow_change=True))
    assert [line["step"] for line in again.metrics.training] == [3, 4]


def test_what_is_prepared_has_written_nothing_and_told_the_data(tmp_path, values):
    audits = []
    prepared = prepare(values(), audited=audits.append)
    assert [audit.images for audit in audits] == [4]
    assert ("train.lr", 2e-4, "--set train.lr") in prepared.origins
    assert prepared.estimate.batch == 2
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_parts_can_be_left_before_their_end(tmp_path, values):
    for run in prepare(values(out=tmp_path / "run")).parts():
        assert next(run.steps()).step == 1
        break
    with pytest.raises(UsageError, match="not empty"):
        prepare(values(out=tmp_path / "run"))


def test_an_option_that_there_is_not_is_refused(values):
    with pytest.raises(UsageError, match="there is no option"):
        values(learning_rate=1)
