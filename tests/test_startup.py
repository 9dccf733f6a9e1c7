"""Help and configuration must come up at once, so they never import what is slow to import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SLOW = {"torch", "numpy", "PIL", "matplotlib", "safetensors", "tokenizers", "huggingface_hub"}
COMMANDS = ("train", "sample", "noise", "convert")
RUN = """
import sys
sys.argv = ["difftool", *sys.argv[1:]]
from difftool.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def imported(code: str, *arguments: str, **environment: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter holds after running the code."""
    listed = "\nprint('modules:', *{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", "import sys\n" + code + listed, *arguments]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return set(done.stdout.rpartition("modules:")[2].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)]
)
def test_help_imports_nothing_slow(arguments):
    modules = imported(RUN, *arguments)
    assert "typer" in modules
    assert not modules & SLOW


@pytest.mark.parametrize("line", ["", "train --set t", "sample --sampler d", "noise --path "])
def test_completion_imports_nothing_slow(line):
    asks = {"_DIFFTOOL_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": f"difftool {line}"}
    modules = imported(RUN, **asks)
    assert "typer" in modules
    assert not modules & SLOW


@pytest.mark.parametrize("name", ["difftool.config.layers", "difftool.diffusion"])
def test_configuration_and_mathematics_import_nothing_slow(name):
    assert not imported(f"import {name}") & SLOW


def test_noise_shows_its_numbers_without_torch():
    assert "torch" not in imported(RUN, "noise", "--curve")


def test_the_library_imports_nothing_before_it_is_used():
    code = "before = set(sys.modules)\nimport difftool\nassert set(sys.modules) - before == {%r}"
    imported(code % "difftool")
    used = "import difftool\ndifftool.SAMPLERS, difftool.UsageError, difftool.load"
    assert not imported(used) & SLOW


def test_the_library_describes_a_model_without_torch():
    assert "torch" not in imported("import difftool\ndifftool.inspect('emoji')")
