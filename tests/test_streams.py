"""What is said goes where nobody listens, or where there is no room: the exit code stays right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

FULL = Path("/dev/full")
WRONG = ("sample", "--steps", "0")
LISTS = ("--list", "samplers")


def ran(*arguments: str, **streams) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "difftool", *arguments]
    return subprocess.run(program, env=ENVIRONMENT, text=True, **streams)


@pytest.fixture
def nobody():
    """A pipe whose reader went away."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("arguments", [WRONG, (*WRONG, "--json")])
def test_an_error_that_nobody_reads_keeps_its_code(arguments, nobody):
    done = ran(*arguments, stdout=nobody, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --steps 0") and "Traceback" not in done.stderr
    assert ran(*arguments, stdout=nobody, stderr=nobody).returncode == 2


def test_results_that_nobody_reads_end_as_in_any_pipe(nobody):
    done = ran(*LISTS, stdout=nobody, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
def test_no_room_for_results_is_told_and_none_for_talk_is_not():
    with FULL.open("w", encoding="utf-8") as full:
        done = ran(*LISTS, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 5 and done.stderr.startswith("error: the disk is full")
        done = ran(*WRONG, "--json", stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2 and done.stderr.startswith("error: --steps 0")
        assert ran(*WRONG, stdout=subprocess.PIPE, stderr=full).returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_streams_that_were_closed_before_the_start(closed):
    for arguments, code in ((WRONG, 2), (LISTS, 0)):
        line = f'exec "{sys.executable}" -m difftool {" ".join(arguments)} {closed}'
        done = subprocess.run(["sh", "-c", line], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "inside difftool" not in done.stderr + done.stdout
