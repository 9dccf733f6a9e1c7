"""Files that appear whole or not at all; what is told where they cannot."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from difftool.errors import ResourceError, UsageError
from difftool.storage.commit import Lock, atomic_file, atomic_folder, write_whole


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
    path, rename = tmp_path / "x", Path.rename
    path.mkdir()
    (path / "old").write_text("old")

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "the disk is ill")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
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
