"""Commands as a user runs them, in this process or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

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


def spawn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own, on one thread."""
    command = [sys.executable, "-m", "difftool", *arguments]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
