"""Help and configuration must come up at once, so they never import what is slow to import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from commands import ROOT
from folders import lay

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
    asks = {
        "_DIFFTOOL_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": f"difftool {line}",
    }
    modules = imported(RUN, **asks)
    assert "typer" in modules
    assert not modules & SLOW


@pytest.mark.parametrize("name", ["difftool.config.layers", "difftool.diffusion"])
def test_configuration_and_mathematics_import_nothing_slow(name):
    assert not imported(f"import {name}") & SLOW


def test_noise_shows_its_numbers_without_torch():
    assert "torch" not in imported(RUN, "noise", "--curve")


def test_the_library_imports_nothing_before_it_is_used():
    code = "before = set(sys.modules)\nimport difftool\nassert set(sys.modules) - before == %r"
    imported(code % {"difftool", "difftool.version"})
    used = "import difftool\ndifftool.SAMPLERS, difftool.UsageError, difftool.load"
    assert not imported(used) & SLOW


def test_the_library_describes_a_model_without_torch():
    assert "torch" not in imported("import difftool\ndifftool.inspect('emoji')")


REFUSED = {
    "sample": """
2 a_fox --init none.png
2 a_fox --mask none.png
2 a_fox --image-prompt none.png
2 a_fox --lora none.safetensors:0.5
2 a_fox --embedding none.pt
2 a_fox -m none.safetensors
2 a_fox --refiner none.safetensors
2 a_fox --vae none.safetensors
2 --prompts none.txt
2 --from-image none.png
3 --from-image text.png
2 --from-latents none.safetensors
2 a_fox --steps 0
2 a_fox --steps many
2 a_fox --size 64y64
2 a_fox --seed 5-1
2 a_fox --sampler eulr
2 a_fox --schedule karas
2 a_fox --guidance 0.5
2 a_fox --strength 2
2 a_fox --format gif
2 a_fox --dtype fp8
2 a_fox --stepz 3
2 a_fox --set sample.stepz=3
2 a_fox --set sample.steps=many
2 a_fox --set unet.blocks=3
2 a_fox --exact --batch-size 2
2 a_fox --refiner-start 0.5
2 a_fox --skip-existing --overwrite
2 a_fox --prompts -
2 a_fox --from-latents text.png
2 a_fox --seed 1,2 -n 3
2 a_fox -n 2 -o -
2 a_fox --json -o -
2 a_fox -o fox.gif
2 a_fox -o text.png
2 a_fox -o text.png/fox.png
2 a_fox -o [sed].png
""",
    "train": """
2 none
2 photos --steps 0
2 photos --lr -1
2 photos --workers 999
2 photos --crop middle
2 photos --max-shard-size big
2 photos --preset none
2 photos --preset none.yaml
2 photos --preset text-small
2 photos --from none.safetensors
2 photos --vae none.safetensors
2 photos --from emoji --preset text-small
2 photos --out photos
2 photos --out new --resume
2 photos --resume
2 photos --rank 4
2 photos --lora
2 photos --lora --from emoji --part vae
2 photos --set unet.chanels=3
2 photos --set data=3
2 photos --set train.optimizer=sdg
2 photos --set train.time=gaussian
2 photos --set train.loss=l3
""",
    "noise": """
2
2 none.png
3 text.png
2 text.png --path cosin
2 text.png --set shift=3
2 text.png --set kind=flow
2 text.png --steps 0
2 text.png --steps 1001
2 text.png --schedule karas
2 text.png --size 4
2 text.png --format jif
2 text.png -o strip.xyz
2 text.png -o text.png
2 text.png text.png
2 text.png --compare flow,flow
2 text.png --compare flow,edm --markov
2 text.png --prompt fox
2 text.png -m none.safetensors
2 text.png --latent --path flow
2 --curve --markov
2 --curve -o curve.gif
2 --curve -o text.png
""",
}
REFUSE = """
import sys
from difftool.cli.app import main
command, lines = sys.argv[1:]
for line in lines.strip().splitlines():
    code, *arguments = line.split()
    sys.argv = ["difftool", command, *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == int(code), (line, end.code)
    assert "torch" not in sys.modules, line
"""


@pytest.mark.parametrize("command", REFUSED)
def test_what_needs_no_model_is_refused_without_torch(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.delenv("DIFFTOOL_MODEL", raising=False)
    (tmp_path / "text.png").write_text("no picture")
    lay(tmp_path / "photos", {"a.png": None, "b.png": None})
    assert "torch" not in imported(REFUSE, command, REFUSED[command])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "text.png"]
