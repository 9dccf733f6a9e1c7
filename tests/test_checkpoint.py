"""Checkpoints: whole or absent, damage found, the newest good one resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest

from difftool.errors import UsageError
from difftool.training.step.checkpoint import (
    checkpoints,
    newest_good,
    save_checkpoint,
    verify_checkpoint,
)


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "state.json").write_text("{}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, write, keep=3)
    return tmp_path


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, write, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000010"]


def test_a_failed_write_leaves_nothing(folder):
    def broken(where: Path) -> None:
        write(where)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(folder, 40, broken, keep=1)
    assert len(list(folder.iterdir())) == 3
    assert newest_good(folder)[0].name == "step-000030"


def test_leavings_of_a_killed_process_are_cleared(folder):
    (folder / ".step-000040.tmp-1").mkdir()
    save_checkpoint(folder, 50, write, keep=9)
    assert not list(folder.glob(".*"))


def test_saving_a_step_again_replaces_it(folder):
    save_checkpoint(folder, 30, write, keep=9)
    assert [p.name for p in checkpoints(folder)] == ["step-000010", "step-000020", "step-000030"]
    assert verify_checkpoint(folder / "step-000030") is None


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
    ],
)
def test_damage_is_found_and_passed_over(folder, damage):
    damage(folder / "step-000030")
    path, notes = newest_good(folder)
    assert path.name == "step-000020"
    assert "step-000030" in notes[0]


def test_nothing_good_is_an_error(folder):
    for path in checkpoints(folder):
        flip(path / "model.safetensors")
    with pytest.raises(UsageError, match="no checkpoint to resume"):
        newest_good(folder)
