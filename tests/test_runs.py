"""Run folders. Checkpoints: whole or absent, damage found, the newest good one taken."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import pytest
from faults import Faults, Killed

from difftool.errors import UsageError
from difftool.storage.commit import sweep
from difftool.storage.runs import (
    by_step,
    checkpoint_to_resume,
    checkpoints,
    model_of,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "state.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, write, keep=3)
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, write, keep=2)
    assert names(tmp_path) == ["step-000003", "step-000010"]


def test_those_of_a_future_that_is_made_anew_go(run):
    """Else the one that was just written might be pruned, or passed over, for them."""
    save_checkpoint(run, 15, write, keep=1)
    assert names(run) == ["step-000015"]


def test_a_failed_write_leaves_nothing(run):
    def broken(where: Path) -> None:
        write(where)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(run, 40, broken, keep=1)
    assert len(names(run)) == 3
    assert checkpoint_to_resume(run)[0].name == "step-000030"


def test_leavings_of_a_killed_process_are_cleared(run):
    (run / "checkpoints" / ".step-000040.tmp-1").mkdir()
    save_checkpoint(run, 50, write, keep=9)
    assert not list((run / "checkpoints").glob(".*"))


def test_saving_a_step_again_replaces_it(run):
    save_checkpoint(run, 30, write, keep=9)
    assert [p.name for p in checkpoints(run)] == ["step-000010", "step-000020", "step-000030"]
    assert verify_checkpoint(run / "checkpoints/step-000030") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: flip(p / "model.safetensors"),
        lambda p: (p / "model.safetensors").write_bytes(b"weights"),
        lambda p: (p / "state.json").unlink(),
        lambda p: (p / "manifest.json").unlink(),
        lambda p: (p / "manifest.json").write_text("{"),
        lambda p: (p / "manifest.json").write_text("[]"),
        lambda p: (p / "manifest.json").write_text("{}"),
        lambda p: (p / "manifest.json").write_text('{"model.safetensors": 5}'),
    ],
)
def test_damage_is_found_and_passed_over(run, damage):
    damage(run / "checkpoints/step-000030")
    path, notes = checkpoint_to_resume(run)
    assert path.name == "step-000020"
    assert "step-000030" in notes[0]
    assert model_of(run) == (path / "model.safetensors", notes)


def test_nothing_good_is_an_error(run):
    for path in checkpoints(run):
        flip(path / "model.safetensors")
    with pytest.raises(UsageError, match="no checkpoint to resume") as error:
        checkpoint_to_resume(run)
    for found, notes in (newest_checkpoint(run), model_of(run)):
        assert found is None and len(notes) == 3
        assert all(note in str(error.value.why) for note in notes)


def test_what_is_of_steps_is_in_their_order(tmp_path):
    for name in ("step-1000000.png", "step-000020.png", "step-5", "step-x.png", "a.png"):
        (tmp_path / name).touch()
    assert list(by_step(tmp_path, ".png")) == [20, 1_000_000]
    assert list(by_step(tmp_path)) == [5]


@pytest.mark.parametrize(("step", "exchange"), [(10, False), (20, True)])
def test_a_kill_while_saving_leaves_a_good_checkpoint(tmp_path, monkeypatch, step, exchange):
    """Also where the only one that is kept is saved again."""
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", None)
    turn = 0
    for turn in range(1, 200, 3):
        place = tmp_path / str(turn)
        save_checkpoint(place, 10, write, keep=1)
        with Faults(turn) as faults, suppress(Killed):
            save_checkpoint(place, step, write, keep=1)
        if not faults.happened:
            break
        sweep(place / "checkpoints")
        assert newest_checkpoint(place)[0] and not newest_checkpoint(place)[1], faults.log
        assert not list(place.rglob(".*")), faults.log
        save_checkpoint(place, 20, write, keep=1)
        assert names(place) == ["step-000020"]
    assert turn > 20
