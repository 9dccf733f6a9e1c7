"""Files that appear whole or not at all; what is told where they cannot."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from faults import Faults, Killed

from difftool.errors import ResourceError, UsageError
from difftool.storage.commit import (
    atomic_file,
    atomic_folder,
    hidden_folder,
    move_files,
    sweep,
    write_whole,
)
from difftool.storage.locks import LONG_AGO, Lock


def test_a_failure_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    for before in (None, b"mine"):
        if before:
            path.write_bytes(before)
        with pytest.raises(ZeroDivisionError):
            with atomic_file(path, overwrite=True) as file:
                file.write(b"half")
                file.flush()
                assert 1 / 0
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_what_cannot_be_read_meanwhile_is_not_a_fault_of_the_target(tmp_path):
    with pytest.raises(OSError) as error:
        with atomic_file(tmp_path / "a"):
            raise OSError(errno.EIO, "the source broke")
    assert error.value.errno == errno.EIO
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_given_once(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a"
    with pytest.raises(UsageError, match="there already"):
        with atomic_file(path) as file:
            file.write(b"ours")
            path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


class Violation(PermissionError):
    """What Windows says of a file that another program has open."""

    winerror = 32


@pytest.mark.parametrize("times", [2, 100])
def test_a_file_that_another_program_has_open_is_waited_for(tmp_path, monkeypatch, times):
    path, pauses, replace = tmp_path / "a", [], os.replace

    def in_use(old: Path, new: Path) -> None:
        if len(pauses) < times:
            raise Violation(errno.EACCES, "The process cannot access the file")
        replace(old, new)

    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", in_use)
    monkeypatch.setattr(time, "sleep", pauses.append)
    if times == 2:
        write_whole(path, b"new", overwrite=True)
    else:
        with pytest.raises(UsageError, match="another program has it open") as error:
            write_whole(path, b"new", overwrite=True)
        assert error.value.hint == "close it there"
    assert path.read_bytes() == (b"new" if times == 2 else b"old")
    assert len(list(tmp_path.iterdir())) == 1 and 0 < sum(pauses) < 2


def test_a_claimed_name_is_given_up_when_the_move_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, full)
    with pytest.raises(ResourceError, match="No space"):
        write_whole(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        write_whole(tmp_path / "a", b"x", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def fill(folder: Path, text: str) -> None:
    (folder / "inside").mkdir()
    write_whole(folder / "inside" / "a", text)


def tree(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): p.read_text(encoding="utf-8")
        for p in root.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("former", [None, "file", "folder"])
def test_a_folder_appears_whole_in_the_place_of_what_was_there(tmp_path, former):
    path = tmp_path / "x"
    if former == "file":
        path.write_text("old")
    elif former:
        path.mkdir()
        (path / "old").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        with atomic_folder(path, overwrite=True) as place:
            fill(place, "half")
            assert 1 / 0
    assert tree(tmp_path) == before
    with atomic_folder(path, overwrite=True) as place:
        fill(place, "new")
        assert tree(path if former == "folder" else tmp_path)
    assert tree(tmp_path) == {"x/inside/a": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_has_its_name_back_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    path, rename = tmp_path / "x", os.rename
    path.mkdir()
    (path / "old").write_text("old")

    def refuse(source: Path, target: Path) -> None:
        if target == path:
            raise OSError(errno.EIO, "the disk is ill")
        rename(source, target)

    monkeypatch.setattr(ctypes, "CDLL", None)  # two paths cannot be exchanged in one step
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UsageError, match="cannot write"):
        with atomic_folder(path, overwrite=True) as place:
            fill(place, "new")
    assert tree(tmp_path) == {"x/old": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_s_name_is_given_once(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(UsageError, match="there already"):
        with atomic_folder(path) as place:
            fill(place, "ours")
            path.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and not tree(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        with atomic_folder(tmp_path / "none" / "x"):
            pass


@pytest.mark.parametrize("name", [".lock", ""])
def test_what_is_locked_is_refused_until_it_is_let_go(tmp_path, name):
    with Lock(tmp_path / name, busy="taken"):
        with pytest.raises(UsageError, match="taken"):
            Lock(tmp_path / name, busy="taken")
    lock = Lock(tmp_path / name)
    lock.close()
    Lock(tmp_path / name, busy="taken").close()


def test_a_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with Lock(tmp_path / ".lock", busy="taken"), Lock(tmp_path / ".lock", busy="taken"):
        pass


# --- kills -----------------------------------------------------------------------------------


def file(path: Path, text: str) -> None:
    write_whole(path, text, overwrite=True)


def folder(path: Path, text: str) -> None:
    with atomic_folder(path, overwrite=True) as place:
        fill(place, text)


def files(path: Path, text: str) -> None:
    former = [p for p in path.parent.iterdir() if not p.name.startswith(".")]
    with hidden_folder(path) as place:
        names = [f"{path.name}{i}" for i in (1, 2, len(text))]
        for name in names:
            write_whole(place / name, text)
        move_files(place, names, former)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("write", [file, folder, files])
def test_a_kill_at_any_moment_loses_nothing_and_leaves_nothing(
    tmp_path, monkeypatch, write, exchange
):
    """All is as it was or as it was to be, once the next process has swept; a file, and a folder
    where two can change places, is so at once."""
    states = []
    for text in ("old", "newer"):
        (tmp_path / text).mkdir()
        write(tmp_path / text / "x", text)
        states.append(tree(tmp_path / text))
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", None)
    seen, turn = set(), 0
    for turn in range(1, 200):
        place = tmp_path / str(turn)
        place.mkdir()
        write(place / "x", "old")
        with Faults(turn) as faults, suppress(Killed):
            write(place / "x", "newer")
        if not faults.happened:
            break
        if write is file or (write is folder and exchange):
            shown = {k: v for k, v in tree(place).items() if not k.startswith(".")}
            assert shown in states, (turn, faults.log)
        sweep(place)
        assert tree(place) in states, (turn, faults.log)
        assert not list(place.glob(".*")), (turn, faults.log)
        seen.add(states.index(tree(place)))
    assert turn > 5 and seen == {0, 1}


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with atomic_file(tmp_path / "a") as file, atomic_folder(tmp_path / "b") as folder:
        sweep(tmp_path)
        file.write(b"whole")
        fill(folder, "whole")
    assert tree(tmp_path) == {"a": "whole", "b/inside/a": "whole"}
    (tmp_path / ".mine.part").touch()
    sweep(tmp_path)
    assert (tmp_path / ".mine.part").exists()


def test_where_nothing_can_be_locked_what_is_old_was_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for age, name in ((0, "a"), (2 * LONG_AGO, "b")):
        path = tmp_path / f".difftool-{name * 16}.part"
        path.touch()
        os.utime(path, (0, time.time() - age))
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f".difftool-{'a' * 16}.part"]
