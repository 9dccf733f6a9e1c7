"""Every example of the README and of docs/ runs as it stands, page by page, in one folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import ENVIRONMENT, ROOT, Ran
from folders import lay, pictures
from ldm_models import state, write
from PIL import Image
from slices import slow_but

import difftool as package

PAGES = sorted(
    path.relative_to(ROOT)
    for path in (Path(ROOT) / "README.md", *Path(ROOT, "docs").glob("*.md"))
    if path.name != "reference.md"
)
LONG = Path("docs/training.md")
"""A minute of training."""
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
STAND_INS = {
    "difftool": f'exec "{sys.executable}" -m difftool "$@"',
    "jq": """exec grep -o '"path": "[^"]*"' | cut -d'"' -f4""",
    "generate-prompts": 'printf "a smiling fox\\na red heart\\n"',
}
"""Programs that examples call, by their names."""


class Example(NamedTuple):
    kind: str
    text: str
    mark: str
    """Of a comment above the block: "not run: WHY", or "with: FLAGS", by which it is smaller."""


def examples(page: Path) -> Iterator[Example]:
    text = (Path(ROOT) / page).read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Example(found["kind"], found["text"], found["mark"] or "")


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a block, and what each prints."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        line, *output = part.rstrip("\n").split("\n")
        yield line, output


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA of the small sd15.safetensors."""
    folder = tmp_path_factory.mktemp("lora")
    photos(folder)
    write(folder / "sd15.safetensors", "sd1")
    given = {"from_": str(folder / "sd15.safetensors"), "lora": True, "rank": 4, "size": 32}
    package.train(folder / "photos", out=folder / "run", steps=1, sample_every=9, **given)
    return folder / "run" / "lora.safetensors"


def photos(folder: Path) -> None:
    names = [str(i) for i in range(6)]
    captions = {f"{name}.txt": f"a photo of thing {name}" for name in names}
    lay(folder / "photos", {**pictures(*(f"{n}.png" for n in names)), **captions})


@pytest.fixture
def place(tmp_path, monkeypatch, lora) -> Path:
    """A folder with what the examples name."""
    photos(tmp_path)
    shutil.copy(lora, tmp_path / "fox-lora.safetensors")
    for name in ("photo.png", "photo.jpg", "mask.png"):
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / name)
    write(tmp_path / "sd15.safetensors", "sd1")
    write(tmp_path / "sdxl.safetensors", "sdxl")
    torch.save({"state_dict": state("sd1", ema=True)}, tmp_path / "sd15.ckpt")
    (tmp_path / "prompts.txt").write_text("a smiling fox\na red heart\n", encoding="utf-8")
    (tmp_path / "bin").mkdir()
    for name, line in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_shell(line: str, place: Path) -> Ran:
    environment = ENVIRONMENT | {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment["OMP_NUM_THREADS"] = "1"
    command = ["bash", "-o", "pipefail", "-c", line]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    return Ran(done.returncode, done.stdout, done.stderr)


def run(line: str, place: Path, difftool: Callable[..., Ran]) -> Ran:
    words = shlex.split(line)
    if words[0] == "difftool" and not {"|", ">", "&&"} & set(words):
        return difftool(*words[1:])
    return in_shell(line, place)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("page", slow_but([p for p in PAGES if p != LONG], PAGES), ids=str)
def test_the_examples_of_a_page_run(page, place, difftool):
    names: dict[str, Any] = {}
    ran = 0
    for example in examples(page):
        if example.mark.startswith("not run"):
            continue
        if example.kind == "python":
            if title := re.match(r"# (\w+\.py)\n", example.text):
                (place / title[1]).write_text(example.text, encoding="utf-8")
            else:
                exec(compile(example.text, str(page), "exec"), names)
            ran += 1
        elif example.kind == "json":
            (place / "lines.jsonl").write_text(example.text, encoding="utf-8")
            assert difftool("sample", "--prompts", "lines.jsonl", "-o", "lines/").code == 0
            ran += 1
        elif example.kind == "text":
            more = example.mark.removeprefix("with: ") if example.mark else ""
            for line, output in commands(example.text):
                done = run(f"{line} {more}", place, difftool)
                assert done.code == 0, f"{page}: {line}\n{done.out}{done.err}"
                if output and not example.mark:
                    assert done.lines == output, f"{page}: {line}\n{done.out}"
                ran += 1
    assert ran or page.name in ("architecture.md", "systems.md")
