"""Places that cannot be written to, and names that lie: found before the work, alike everywhere."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import difftool
from difftool.cli.app import main
from difftool.errors import ResourceError
from difftool.storage.places import check_place

WRITES = {
    "train": ["train", "photos", "--preset", "pixel-small", "--steps", "1", "--out"],
    "sample": ["sample", "a fox", "--steps", "1", "-o"],
    "noise": ["noise", "p.png", "-o"],
    "curve": ["noise", "--curve", "-o"],
    "convert": ["convert", "emoji", "--to", "difftool"],
    "report": ["convert", "emoji", "new.safetensors", "--to", "difftool", "--report"],
}
"""Commands, up to the name of what they write."""
NAMES = {"train": "run", "convert": "m.safetensors", "report": "r.json"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "there"):
        Path(name).mkdir()
    for name in ("p.png", "photos/a.png", "photos/b.png"):
        Image.new("RGB", (16, 16)).save(name)
    Path("file").write_text("mine", encoding="utf-8")
    Path("lost").symlink_to("nowhere")
    return tmp_path


def run(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    before = sorted(map(str, Path().rglob("*")))
    monkeypatch.setattr(sys, "argv", ["difftool", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    assert sorted(map(str, Path().rglob("*"))) == before
    assert "Traceback" not in told.err and not told.out
    return int(stopped.value.code or 0), told.err


@pytest.mark.parametrize("command", WRITES)
@pytest.mark.parametrize("folder", ["file", "file/deep", "lost", "x" * 300])
def test_a_place_that_is_none_is_a_usage_error(monkeypatch, capsys, command, folder):
    name = f"{folder}/{NAMES.get(command, 'x.png')}"
    code, said = run(monkeypatch, capsys, *WRITES[command], name)
    assert code == 2 and "loading" not in said and "images" not in said
    reason = "too long" if "xxx" in folder else "and no folder"
    assert reason in said.lower()


@pytest.mark.parametrize("command", WRITES)
def test_a_folder_without_permission_is_a_usage_error(monkeypatch, capsys, command):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for the superuser all are
    name = f"there/{NAMES.get(command, 'x.png')}"
    code, said = run(monkeypatch, capsys, *WRITES[command], name)
    assert code == 2 and "cannot write to the folder" in said and "loading" not in said


@pytest.mark.parametrize("command", WRITES)
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_full_disk_and_a_read_only_one_are_found_first(monkeypatch, capsys, command, fault):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC if fault == "full" else errno.EROFS, "not here")

    monkeypatch.setattr(os, "fsync" if fault == "full" else "mkdir", refuse)
    name = f"there/{NAMES.get(command, 'x.png')}"
    code, said = run(monkeypatch, capsys, *WRITES[command], name)
    assert code == (5 if fault == "full" else 2), said
    assert "loading" not in said and ("the disk is full" if fault == "full" else "not here") in said


@pytest.mark.parametrize("command", ["noise", "sample"])
def test_a_disk_that_fills_up_meanwhile_ends_the_run(monkeypatch, capsys, command):
    def full(*_: object) -> None:
        raise ResourceError("the disk is full") from OSError(errno.ENOSPC, "full")

    room = "forward.outputs" if command == "noise" else "sampling.output"
    monkeypatch.setattr(f"difftool.{room}.write_whole", full)
    Path("q.png").write_bytes(Path("p.png").read_bytes())
    asked = ["p.png", "q.png"] if command == "noise" else ["a fox", "a dog", "--steps", "1"]
    code, said = run(monkeypatch, capsys, command, *asked, "-o", "there/")
    assert code == 5 and said.count("the disk is full") == 1


def test_room_is_there_for_the_whole_model(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    code, said = run(monkeypatch, capsys, *WRITES["convert"], "m.safetensors")
    assert code == 5 and "no room for m.safetensors" in said and "1 are free" in said


def test_a_place_that_will_do_is_left_as_it_was(place):
    before = sorted(place.rglob("*"))
    check_place(Path("new/deep/x.png"))
    check_place(Path("there/x.png"), 1 << 10)
    assert sorted(place.rglob("*")) == before
    with pytest.raises(difftool.UsageError, match="cannot write"):
        check_place(Path("new/x.png"), makes=False)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("train", "model.safetensors"),
        ("train", "run.zip"),
        ("sample", "fox.gif"),
        ("sample", "fox.safetensors"),
        ("noise", "strip.jpg"),
        ("curve", "curve.gif"),
        ("convert", "m.ckpt"),
        ("convert", "m.GGUF"),
        ("convert", "m.json"),
        ("report", "ledger.csv"),
    ],
)
def test_a_name_that_promises_another_format_is_refused(monkeypatch, capsys, command, name):
    code, said = run(monkeypatch, capsys, *WRITES[command], name)
    assert code == 2 and "loading" not in said and name.rpartition(".")[2].lower() in said.lower()


def test_so_does_the_library():
    for call in (
        lambda: difftool.convert("emoji", "m.pt", to="ldm"),
        lambda: difftool.convert("emoji", "m.safetensors", to="diffusers"),
        lambda: difftool.train("photos", out="run.pt"),
        lambda: difftool.load().sample("a fox", output="fox.bmp"),
    ):
        with pytest.raises(difftool.UsageError, match="is not the name of"):
            call()


def test_a_number_in_a_name_is_no_ending(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["difftool", *WRITES["convert"], "emoji-1.5", "--dry-run"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0, capsys.readouterr().err
