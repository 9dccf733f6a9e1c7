"""Training and sampling on a device that is not the CPU, with and without float64.

CELLS is the whole matrix, a row each; docs/systems.md shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ldm_models as ldms
import numpy as np
import pytest
import tiny
import torch
from commands import ENVIRONMENT, ROOT
from PIL import Image
from safetensors.torch import save_file
from test_unclip import Tower, written

MODELS = (
    *("sd1", "sd1-inpaint", "pix2pix", "lcm", "sd2", "sd2-depth", "x4-upscaler"),
    *("sdxl", "sdxl-refiner"),
)


class Cell(NamedTuple):
    """A command, of which the device must make what the CPU makes."""

    command: str
    tolerance: float = 1
    """Of a picture, levels of 255; of losses and other numbers, relative."""
    stages: int = 1
    """Parts of the work, before each of which the host may wait: at no other step."""
    refuses: dict[str, int] = {}  # noqa: RUF012
    """What the device has no memory for (see second_device)."""


def sample(model: str, more: str = "", prompt: str = "a cat", **options) -> Cell:
    """A picture; without a prompt, of a model that reads none."""
    words = f"sample {prompt.replace(' ', '_')} -m {model} --steps 4 --seed 1 {more}"
    return Cell(f"{words} -o {{device}}-%s.png", **options)


def own(name: str, more: str = "", **options) -> Cell:
    """A picture of a small model of that family."""
    size = "" if name == "x4-upscaler" else "--size 32 "
    return sample(f"{name}.safetensors", f"{size}--guidance 3 {more}", **options)


def train(command: str, tolerance: float = 1e-4, **options) -> Cell:
    return Cell(f"train {command} --out {{device}}-%s", tolerance, **options)


SETTINGS = [*tiny.settings(unet=tiny.UNET | {"depth": [0, 0]}), "train.warmup=1"]
SET = " ".join(f"--set={value}".replace(" ", "") for value in SETTINGS)
FEW = "--size 16 --batch-size 4 --steps 4 --validation 0 --sample-every 0"
PIXELS = f"data --preset pixel-small {FEW} {SET}"
LATENTS = (
    "captioned --from sd1.safetensors --size 16 --batch-size 2 --steps 5 --validation 0 "
    "--sample-every 0"
)
INIT, MASKED = "--init picture.png", "--init picture.png --mask mask.png"
# Of latents and text, captions are encoded, and kept, when they are first seen: in three steps.
CELLS = {
    # training
    "fp32": train(PIXELS),
    "bf16": train(f"{PIXELS} --precision bf16", 0.05),
    "fp16, loss scaled": train(f"{PIXELS} --precision fp16", 0.02),
    "resume": Cell("train data --steps 6 --resume --allow-change --out {device}-fp32", 1e-4),
    "sheets and measures": train(
        f"{PIXELS} --validation 0.2 --sample-every 2 --set sample.steps=2 --likelihood"
    ),
    "muon": train(f"{PIXELS} --optimizer muon"),
    # GradScaler looks whether the gradients of an optimiser that is not torch's are finite
    "muon in fp16": train(f"{PIXELS} --optimizer muon --precision fp16", 0.02, stages=4),
    "averages by length": train(f"{PIXELS} --set train.ema_profile=power"),
    "accumulation": train(f"{PIXELS} --accumulate 2"),
    "checkpointing": train(f"{PIXELS} --set train.checkpointing=true"),
    "augmentation": train(f"{PIXELS} --augment 0.5"),
    "latents and text": train(LATENTS, stages=3),
    "lora": train(f"{LATENTS} --lora", stages=3),
    "lora in fp16": train(f"{LATENTS} --lora --precision fp16", 0.02, stages=3),
    "distillation, lcm": train(f"{LATENTS} --distill lcm", 1e-3, stages=3),
    "distillation, ect": train(f"data --from cpu-fp32 --distill ect {FEW}", 1e-3),
    # sampling
    "pixels, by class": sample("cpu-fp32", "--label a", prompt=""),
    "sd1": own("sd1"),
    "sd1, in fp16": own("sd1", "--dtype fp16", tolerance=8),
    "sd1, in bf16": own("sd1", "--dtype bf16", tolerance=40),
    "sd2, ancestral": own("sd2", "--sampler euler_a"),
    "sdxl, sde": own("sdxl", "--sampler dpmpp_2m_sde"),
    "lcm": own("lcm"),
    "image to image": own("sd2", f"{INIT} --strength 0.7"),
    "mask over any model": own("sd2", MASKED),
    "inpaint": own("sd1-inpaint", MASKED),
    "edit": own("pix2pix", f"{INIT} --image-guidance 1.5"),
    "depth": own("sd2-depth", f"{INIT} --depth-map mask.png"),
    "upscaler x4": own("x4-upscaler", f"{INIT} --noise-level 5"),
    "refiner": own("sdxl", "--refiner sdxl-refiner.safetensors --refiner-start 0.6", stages=2),
    "unclip": sample("unclip.safetensors", "--size 32 --image-prompt picture.png"),
    "with a lora": own("sd1", "--lora cpu-lora"),
    "a learned word": own("sd1", "--embedding toy.safetensors", prompt="a toy"),
    "weighted prompts": own("sd1", "--prompt-syntax a1111", prompt="a (cat:1.4) AND a dog"),
    "prompts that change": own("sd1", "--prompt-syntax a1111", prompt="a [cat|dog] [in fog:2]"),
    "second pass": own("sd1", "--hires 2x --hires-steps 4", stages=2),
    "windows": own("sd1", "--window 16"),
    "low memory": own("sdxl", "--low-memory"),
    "halved batch": own("sd1", "-n 4 --batch-size 4", refuses={"batch": 4}, stages=3),
    "strips": sample("sd1.safetensors", "--size 32x160", refuses={"rows": 140}),
    "the bundled model": sample("emoji", prompt="a smiling fox"),
    # noise
    "noise and back": Cell("noise picture.png -m sd1.safetensors --size 32 --reverse"
                           " --steps 3 -o {device}-%s.png"),
    "likelihood": Cell("noise data/a/0.png -m cpu-fp32 --likelihood --json -o {device}-%s.png",
                       1e-3),
}  # fmt: skip
QUICK = ("sd1", "edit")


def lay_out(folder: Path, words: set[str]) -> None:
    """What commands of these words read."""
    rng = np.random.default_rng(0)
    for name in MODELS:
        if f"{name}.safetensors" in words:
            tiny.model(ldms.small(name), deviation=0.02).save(folder / f"{name}.safetensors")
    if "unclip.safetensors" in words:
        torch.manual_seed(0)
        written(folder / "unclip.safetensors", Tower(), statistics=True)
    save_file({"toy": torch.from_numpy(rng.normal(size=(2, 24)))}, folder / "toy.safetensors")
    for kind in ("data/a", "data/b", "captioned"):
        (folder / kind).mkdir(parents=True)
        for i in range(6):
            noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / kind / f"{i}.png")
            if kind == "captioned":
                (folder / kind / f"{i}.txt").write_text(f"a thing {i}", encoding="utf-8")
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    Image.fromarray(smooth).save(folder / "picture.png")
    Image.fromarray(np.repeat([[0], [255]], 16, 0).repeat(32, 1).astype(np.uint8)).save(
        folder / "mask.png"
    )


def pictures(folder: Path, command: str, device: str) -> np.ndarray:
    """All that a command left on a device."""
    first = folder / command.split()[-1].format(device=device)
    files = sorted(folder.glob(f"{first.stem}*{first.suffix}"))
    return np.stack([np.asarray(Image.open(path), np.int16) for path in files])


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def numbers(printed: object) -> list[float]:
    """All that JSON has."""
    if isinstance(printed, dict):
        printed = list(printed.values())
    if isinstance(printed, list):
        return [number for each in printed for number in numbers(each)]
    return [printed] if isinstance(printed, float) else []


def commands(names: list[str]) -> dict[str, str]:
    """The cells' commands; what they write is called after them."""
    return {
        name: CELLS[name].command.replace("%s", "-".join(name.replace(",", "").split()))
        for name in names
    }


def check(folder: Path, names: list[str], *, doubles: bool) -> None:
    lay_out(folder, {word for name in names for word in CELLS[name].command.split()})
    rows = [
        {"words": [w.replace("_", " ") if i == 1 and command.startswith("sample") else w
                   for i, w in enumerate(command.split())], "refuses": CELLS[name].refuses}
        for name, command in commands(names).items()
    ]  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(rows), encoding="utf-8")
    program = [sys.executable, str(Path(__file__).with_name("second_device.py"))]
    program += [] if doubles else ["--no-doubles"]
    ran = subprocess.run(
        [*program, "commands.json"], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    wrong = {}
    for (name, command), row in zip(commands(names).items(), report, strict=True):
        try:
            check_cell(folder, CELLS[name], command, row)
        except (AssertionError, OSError, ValueError) as error:
            wrong[name] = f"{row['words']}\n{error}\n{row['kinds']}"
    assert not wrong, "\n".join([f"{n}: {w}" for n, w in wrong.items()] + [ran.stderr[-6000:]])


def check_cell(folder: Path, cell: Cell, command: str, row: dict) -> None:
    assert row["codes"] == [0, 0]
    for steps in row["waits"]:
        waited = [step for step, count in enumerate(steps) if count]
        assert len(waited) <= cell.stages, f"waits at steps {waited}: {steps}"
    assert row["refused"].keys() == cell.refuses.keys()
    kind = command.split()[0]
    if kind == "train":
        place = command.split()[-1]
        first, second = (losses(folder / place.format(device=d)) for d in ("cpu", "second"))
        assert first and second == pytest.approx(first, rel=cell.tolerance)
        assert row["waits"], "no step was seen"
    elif "--json" in command:
        first, second = (numbers(json.loads(out)) for out in row["out"])
        assert first and second == pytest.approx(first, rel=cell.tolerance)
    else:
        ours, theirs = (pictures(folder, command, device) for device in ("second", "cpu"))
        assert ours.std() > 1, "the picture is of one colour"
        assert np.abs(ours - theirs).max() <= cell.tolerance


def test_pictures_of_a_device_without_float64_are_the_cpus(tmp_path):
    check(tmp_path, list(QUICK), doubles=False)


@pytest.mark.slow
@pytest.mark.parametrize("doubles", [True, False])
def test_every_way_of_training_and_sampling_on_a_second_device(tmp_path, doubles):
    check(tmp_path, list(CELLS), doubles=doubles)


def test_the_matrix_is_in_the_docs():
    page = (Path(ROOT) / "docs/systems.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in CELLS] == list(CELLS)
