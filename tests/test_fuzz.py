"""Hostile arguments and files by the thousand: see fuzz.py, by which a single case is run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

FUZZ = Path(__file__).with_name("fuzz.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is not measured"),
]


def fuzz(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FUZZ), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def test_each_kind_of_fault_is_found(tmp_path):
    ran = fuzz("faults", "0", "5", cwd=tmp_path)
    for index, kind in enumerate(("internal", "time", "memory", "outside", "executed")):
        assert f"{index} {kind}: {kind}" in ran.stdout, ran.stdout + ran.stderr
    assert ran.returncode == 1


def test_hostile_cases_are_answered(tmp_path):
    ran = fuzz("small", "0", os.environ.get("DIFFTOOL_FUZZ", "2000"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_large_files_are_answered_soon(tmp_path):
    ran = fuzz("large", "0", "500", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
