"""Commands as a user runs them, in this process or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from difftool.cli import app
from difftool.config.options import Option

ROOT = str(Path(__file__).parent.parent)
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "CI"} | {"PYTHONPATH": ROOT}


class Ran(NamedTuple):
    """What a command left: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects on stdout, one a line."""
        return [json.loads(line, parse_constant=pytest.fail) for line in self.lines]

    @property
    def object(self) -> dict[str, Any]:
        """The only one."""
        (found,) = self.objects
        return found


def add_command(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: Sequence[Option], run: Callable[..., Any]
) -> None:
    """A command of a test's own, of these rows."""
    module = SimpleNamespace(ROWS=rows, run=run, ABOUT=f"{name.title()}.")
    monkeypatch.setitem(sys.modules, f"difftool.cli.{name}", module)
    monkeypatch.setattr(app, "COMMANDS", {name: module.ABOUT})


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a process has written something into a file."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} was not written within {seconds:g} s"
        time.sleep(0.01)


def spawn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own, on one thread."""
    command = [sys.executable, "-m", "difftool", *arguments]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
