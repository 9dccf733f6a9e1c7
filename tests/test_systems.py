"""The main paths of the four commands where the system is another than this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import ENVIRONMENT
from PIL import Image

SIZE = ["--size", "16", "--batch-size", "4"]
TINY = [f"--set={value}" for value in tiny.settings(unet=tiny.UNET | {"depth": [0, 0]})]
COMMANDS = [
    [
        "train",
        "fotos",
        "--preset",
        "pixel-small",
        "--steps",
        "2",
        "--out",
        "runs/ünï",
        *SIZE,
        *TINY,
    ],
    ["train", "fotos", "--out", "runs/ünï", "--steps", "3", "--resume", "--allow-change"],
    ["sample", "-m", "runs/ünï", "--label", "größe", "-n", "2", "-o", "out/[seed]-[label].png"],
    ["sample", 'a "smiling" fox: what? <yes> | no*', "--steps", "1", "-o", "out/[prompt].png"],
    ["sample", "a fox ...", "--steps", "1"],
    ["sample", "CON", "--steps", "1", "-o", "out/[prompt].webp"],
    ["noise", "fotos/größe/0.png", "-o", "strip.png"],
    ["noise", "--curve", "-o", "curve.png"],
    ["convert", "runs/ünï", "modell", "--to", "diffusers"],
    ["convert", "modell", "back.safetensors", "--to", "difftool", "--report", "report.json"],
    ["convert", "--inspect", "back.safetensors"],
]
"""Their arguments; all of them are to succeed."""


def run(folder: Path, system: str, *flags: str, **environment: str) -> None:
    for name in ("größe", "b"):
        (folder / "fotos" / name).mkdir(parents=True)
        for i in range(4):
            shade = Image.linear_gradient("L").resize((16, 16)).rotate(90 * i)
            shade.convert("RGB").save(folder / "fotos" / name / f"{i}.png")
    (folder / "commands.json").write_text(json.dumps(COMMANDS), encoding="utf-8")
    program = [sys.executable, *flags, str(Path(__file__).with_name("systems.py"))]
    done = subprocess.run(
        [*program, system, "commands.json"],
        cwd=folder,
        capture_output=True,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "0"} | environment,
    )
    talk = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, talk
    codes = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    assert codes == [0] * len(COMMANDS), talk


@pytest.mark.slow
def test_without_what_only_posix_has(tmp_path):
    run(tmp_path, "windows")
    taken = [path.name for path in (tmp_path / "out").iterdir()]
    assert not any(set(name) & set(':?*"<>|') or name.startswith("CON.") for name in taken), taken


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp437", "cp1252", "ascii"])
def test_on_a_console_of_few_characters(encoding, tmp_path):
    run(
        *(tmp_path, "encodings", "-X", "warn_default_encoding"),
        PYTHONIOENCODING=f"{encoding}:strict",
    )
