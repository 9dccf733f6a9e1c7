"""Files that appear whole or not at all; what is told where they cannot."""

from __future__ import annotations

import errno
import os

import pytest

from difftool.errors import ResourceError, UsageError
from difftool.storage.commit import atomic_file, write_whole


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
