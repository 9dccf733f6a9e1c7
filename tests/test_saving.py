"""Checkpoints of a run at work: when they come, and that neither numbers, disks nor signals lose
what was learned."""

from __future__ import annotations

import errno
import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faults import Faults
from folders import solid
from runs import start_run

from difftool.errors import ResourceError, Stopped
from difftool.storage.runs import newest_checkpoint
from difftool.training.metrics import Metrics
from difftool.training.options import RunOptions
from difftool.training.run.folder import RunFolder
from difftool.training.run.run import Run
from difftool.training.run.saving import FIRST, Saves

TINY = {"unet": tiny.UNET, "train": tiny.TRAIN | {"flip": False}, "sample": {"steps": 1}}


pytestmark = pytest.mark.usefixtures("closed_runs")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    return solid(folder, ((60 * i, 100, 200) for i in range(4)))


def start(folder: Path, data: str, resume: bool = False, every: int = 4, **values: object) -> Run:
    options: dict[str, Any] = {"save_every": every, "sample_every": 100, "keep": 2}
    train = {"train": values}
    return start_run(folder, data, TINY, train, preset="pixel-small", resume=resume, **options)


def left(folder: Path) -> list[str]:
    """What should not be there."""
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weights", "average", "moments"])
def test_what_is_not_finite_is_never_saved(tmp_path, pictures, where):
    run = start(tmp_path / "run", pictures, every=2)
    trainer = run.trainer
    with pytest.raises(ResourceError, match="not finite") as caught:
        for step in run.steps():
            if step.step == 3:
                p = next(iter(trainer.parameters.values()))
                average = trainer.ema and next(iter(trainer.ema.average.values()))
                moment = trainer.optimizer.state[p]["exp_avg_sq"]
                wrong = {"weights": p, "average": average, "moments": moment}[where]
                with torch.no_grad():
                    wrong.fill_(float("inf" if where == "moments" else "nan"))
    assert caught.value.code == 5 and "--allow-change" in str(caught.value)
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000002"]
    with pytest.raises(ResourceError):
        run.finish()
    assert not (tmp_path / "run/model.safetensors").exists()
    run.folder.close()
    resumed = start(tmp_path / "run", pictures, resume=True, lr=1e-4)
    for _ in resumed.steps():
        pass
    assert resumed.finish().is_file()


# --- time ------------------------------------------------------------------------------------


def steps_saved(run: Run, seconds: float, minutes: float, steps: int) -> list[float]:
    """When checkpoints are begun, in seconds, where each step takes so long and a save 20 s."""
    now = 0.0
    options = RunOptions(save_every=10**6, save_minutes=minutes)
    saves = Saves(run.trainer, run.folder.path, options, [], clock=lambda: now)
    began = []

    def write() -> None:
        nonlocal now
        now += 20

    for _ in range(steps):
        now += seconds
        run.trainer.step += 1
        if saves.due():
            began.append(now)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("difftool.training.run.saving.save_state", lambda *_, **__: write())
                assert saves.save()
    return began


@pytest.mark.parametrize("seconds", [0.5, 7, 45, 250])
def test_never_more_than_ten_minutes_are_at_risk(tmp_path, pictures, seconds):
    run = start(tmp_path / "run", pictures)
    began = steps_saved(run, seconds, RunOptions.save_minutes, int(4000 / seconds))
    assert FIRST <= began[0] < FIRST + seconds + 1
    gaps = [after - before for before, after in pairwise(began)]
    assert len(gaps) > 4 and max(gaps) + 20 <= 600
    if seconds < 50:
        assert min(gaps) > 450  # and not more often than need be


def test_the_time_is_the_user_s(tmp_path, pictures):
    run = start(tmp_path / "run", pictures)
    assert len(steps_saved(run, 10, 1000, 360)) == 1
    assert len(steps_saved(run, 10, 1, 30)) > 5


# --- disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "stride"),
    [
        (errno.ENOSPC, 21),
        pytest.param(errno.ENOSPC, 7, marks=pytest.mark.slow),
        pytest.param(errno.EIO, 1, marks=pytest.mark.slow),
        pytest.param(errno.ENOSPC, 1, marks=pytest.mark.slow),
    ],
)
def test_no_single_error_of_a_save_ends_a_run(tmp_path, pictures, number, stride):
    """Every call of the system fails once, or every so many-th: it is told, nothing half written is
    left, and the next save comes through."""
    run = start(tmp_path / "run", pictures)
    steps: Any = run.trainer.run()
    next(steps)
    turn = failed = 0
    for turn in range(1, 1000, stride):
        saves = Saves(run.trainer, run.folder.path, run.options, run.notes)
        run.notes.clear()
        run.trainer.step += 1
        with Faults(turn, number) as faults:
            saved = saves.save()
        if not faults.happened:
            break
        assert saved == (not run.notes), faults.log
        failed += not saved
        good, passed_over = newest_checkpoint(run.folder.path)
        assert not passed_over and (good == saves.path or not saved), faults.log
        assert saved or (os.strerror(number) in run.notes[0] and "going on" in run.notes[0])
        if left(tmp_path):  # where it was what cleans up that failed
            run.trainer.step += 1
            assert saves.save() and not left(tmp_path), faults.log
    assert 20 // stride < failed < turn
    steps.close()


def test_a_run_whose_disk_fails_for_a_while_ends_well(tmp_path, pictures, monkeypatch):
    whole = start(tmp_path / "whole", pictures)
    for _ in whole.steps():
        pass
    model = whole.finish().read_bytes()
    run, fsync = start(tmp_path / "run", pictures), os.fsync

    def broken(descriptor: int) -> None:
        if 3 < run.trainer.step < 11:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    for _ in run.steps():
        pass
    assert run.finish().read_bytes() == model
    assert [note for note in run.notes if "step 4 could not" in note]
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000012"] and not left(tmp_path)


def test_a_model_that_cannot_be_written_ends_the_run_and_can_be_written_later(
    tmp_path, pictures, monkeypatch
):
    run = start(tmp_path / "run", pictures)
    for _ in run.steps():
        pass
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        run.finish()
    assert caught.value.code == 5 and f"--out {tmp_path}/run --resume" in str(caught.value)
    monkeypatch.setattr(os, "fsync", fsync)
    run.folder.close()
    resumed = start(tmp_path / "run", pictures, resume=True)
    assert not list(resumed.steps())
    assert resumed.finish().is_file()


def test_lines_that_the_disk_did_not_take_come_with_the_next(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run") as folder:
        folder.append({"step": 1})
        with Faults(1, errno.ENOSPC, calls=("fsync",)) as faults:
            monkeypatch.setattr(Path, "open", faults.counted("open", Path.open))
            with pytest.raises(OSError, match="No space"):
                folder.append({"step": 2})
        monkeypatch.undo()
        folder.append({"step": 3})
        assert [line["step"] for line in Metrics.read(folder.metrics).lines] == [1, 2, 3]


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_the_last_save_and_the_model_are_written_whatever_comes(
    tmp_path, pictures, monkeypatch, number
):
    run = start(tmp_path / "run", pictures)
    fsync, last = os.fsync, []

    def signalled(descriptor: int) -> None:
        fsync(descriptor)
        if run.trainer.step == 12 and not last:
            last.append(signal.raise_signal(number))

    monkeypatch.setattr(os, "fsync", signalled)
    with pytest.raises(Stopped) as caught:
        for _ in run.steps():
            pass
    assert caught.value.code == 128 + number
    good, _ = newest_checkpoint(run.folder.path)
    assert good and good.name == "step-000012"
    last.clear()
    assert run.finish().is_file()
    assert run.stopped == number
    facts = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert facts["finished"]


def test_what_is_saved_is_not_saved_again(tmp_path, pictures):
    run, before = start(tmp_path / "run", pictures), None
    with pytest.raises(Stopped):
        for step in run.steps():
            if step.step == 4:
                assert run.saves.save()
                before = os.stat(run.saves.path).st_ino
                signal.raise_signal(signal.SIGTERM)
    assert os.stat(run.saves.path).st_ino == before


def test_a_part_s_run_is_continued_by_the_folder_of_the_whole(tmp_path, pictures):
    with RunFolder(tmp_path / "run") as whole:
        run = start(tmp_path / "run" / "part", pictures)
        run.folder.root = whole.path
        with pytest.raises(Stopped, match=rf"--out {tmp_path}/run --resume"):
            for _ in run.steps():
                signal.raise_signal(signal.SIGTERM)
