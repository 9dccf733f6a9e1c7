"""Training and sampling on a device that is not the CPU, with and without float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import ENVIRONMENT
from ldm_models import small as small_of_family
from PIL import Image

PIXELS = ["--size", "16", "--batch-size", "4", "--validation", "0.2", "--sample-every", "2"]
TINY = [f"--set={value}" for value in tiny.settings(unet=tiny.UNET | {"depth": [0, 0]})]
SAMPLE = ["--steps", "3", "--seed", "1", "-o", "{device}-%s.png"]
MODELS = ("sd1", "sd1-inpaint", "sd2", "sdxl", "sdxl-refiner")

PIXEL_RUN = ["train", "data", "--preset", "pixel-small", "--steps", "4", *PIXELS, *TINY]
LATENT_RUN = [
    "train", "captioned", "--from", "sd1.safetensors", "--steps", "2", "--size", "16",
    "--batch-size", "2", "--validation", "0", "--sample-every", "100",
]  # fmt: skip
QUICK = {
    "trained": [*PIXEL_RUN, "--out", "{device}-run"],
    "resumed": [
        *("train", "data", "--out", "{device}-run", "--steps", "6", "--resume", "--allow-change")
    ],
    "pixels": ["sample", "-m", "cpu-run", "--label", "a"],
    "sd1": ["sample", "a cat", "-m", "sd1.safetensors", "--guidance", "3"],
    "lora": [*LATENT_RUN, "--lora", "--out", "{device}-lora"],
}
"""Commands, by what they are: pictures of the device are compared with those of the CPU."""
SLOW = {
    "sdxl": ["sample", "a cat", "-m", "sdxl.safetensors", "--sampler", "dpmpp_2m_sde"],
    "refined": [
        "sample", "a cat", "-m", "sdxl.safetensors", "--refiner-start", "0.6",
        "--refiner", "sdxl-refiner.safetensors",
    ],
    "masked": [
        "sample", "a cat", "-m", "sd1-inpaint.safetensors", "--init", "picture.png",
        "--mask", "mask.png",
    ],
    "img2img": [
        "sample", "a cat", "-m", "sd2.safetensors", "--init", "picture.png", "--strength", "0.7",
    ],
    "low-memory": ["sample", "a cat", "-m", "sdxl.safetensors", "--low-memory"],
    "with-lora": ["sample", "a cat", "-m", "sd1.safetensors", "--lora", "cpu-lora"],
    "emoji": ["sample", "a smiling fox"],
    "muon": [*PIXEL_RUN, "--optimizer", "muon", "--out", "{device}-muon"],
    "latents": [*LATENT_RUN, "--out", "{device}-latents"],
}  # fmt: skip


def lay_out(folder: Path) -> None:
    """What the commands read."""
    rng = np.random.default_rng(0)
    for name in MODELS:
        tiny.model(small_of_family(name), deviation=0.02).save(folder / f"{name}.safetensors")
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


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int16)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def check(folder: Path, commands: dict[str, list[str]], *, doubles: bool) -> None:
    lay_out(folder)
    given = [
        words + [word.replace("%s", name) for word in SAMPLE] if words[0] == "sample" else words
        for name, words in commands.items()
    ]
    (folder / "commands.json").write_text(json.dumps(given), encoding="utf-8")
    program = [sys.executable, str(Path(__file__).with_name("second_device.py"))]
    program += [] if doubles else ["--no-doubles"]
    ran = subprocess.run(
        [*program, "commands.json"], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for name, row in zip(commands, report, strict=True):
        assert row["codes"] == [0, 0], (name, ran.stderr[-4000:])
        if row["command"][0] == "sample":
            ours, theirs = (pixels(folder / f"{place}-{name}.png") for place in ("second", "cpu"))
            assert np.abs(ours - theirs).max() <= 1, name
            assert ours.std() > 1, name
            steps = 3  # and what is done once
            assert sum(row["waits"].values()) <= steps + 3, (name, row["waits"])
        else:
            place = row["command"][row["command"].index("--out") + 1]
            first, second = (losses(folder / place.format(device=d)) for d in ("cpu", "second"))
            assert first and second == pytest.approx(first, rel=1e-4), name


@pytest.mark.slow
def test_training_resume_and_sampling_on_a_device_without_float64(tmp_path):
    check(tmp_path, QUICK, doubles=False)


@pytest.mark.slow
@pytest.mark.parametrize("doubles", [True, False])
def test_every_way_of_training_and_sampling_on_a_second_device(tmp_path, doubles):
    check(tmp_path, QUICK | SLOW, doubles=doubles)
