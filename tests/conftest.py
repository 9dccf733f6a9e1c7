"""One thread a test process: small tensors are slower on more, and sums are the same everywhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from commands import Ran

from difftool import plugins
from difftool.cli import console
from difftool.cli.app import main
from difftool.registry import ADDITIONS

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """While it lasts diffusers and peft log nothing about themselves."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def difftool(tmp_path, monkeypatch, capsys) -> Callable[..., Ran]:
    """Run a command in this process, in an empty folder: difftool("noise", "photo.png")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFTOOL_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no hub"))

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(console, "mode", console.Mode())
        monkeypatch.setattr(sys, "argv", ["difftool", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Ran(stopped.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def closed_runs():
    """The folders of runs that a test begins are let go of after it."""
    yield
    from runs import close_runs

    close_runs()


@pytest.fixture
def forget():
    """Plugins of a test are taken back after it."""
    before = plugins.loaded()
    yield
    added = plugins.loaded()[len(before) :]
    for plugin in added:
        plugins.unload(plugin)
    assert plugins.loaded() == before
    for registry, name in (each for plugin in added for each in plugin.adds):
        assert name not in registry and (registry, name) not in ADDITIONS
