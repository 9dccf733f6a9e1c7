"""Commands killed at random moments: nothing is lost, and the next run leaves nothing behind.

DIFFTOOL_KILLS=1000 pytest -m slow tests/test_kills.py takes as many kills in all.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from difftool.storage.runs import newest_checkpoint
from difftool.storage.yaml import dump_yaml

KILLS = int(os.environ.get("DIFFTOOL_KILLS", "40"))
SEED = int(os.environ.get("DIFFTOOL_KILLS_SEED", "0"))
PRELOADED = (
    *("torch", "matplotlib.figure", "matplotlib.backends.backend_agg", "pydantic", "commands"),
    *("difftool.cli.train", "difftool.cli.sample", "difftool.cli.convert"),
    *("difftool.training.run.run", "difftool.training.run.start", "difftool.training.run.costs"),
    *("difftool.training.run.estimate", "difftool.training.run.rehearsal"),
    *("difftool.sampling.run", "difftool.conversion.model"),
)
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGHUP]
STEPS = {"steps": 6, "batch_size": 2, "warmup": 1}
PARTS = tiny.LATENT | {
    "sample": {"size": [16, 16], "steps": 1},
    "train_vae": STEPS,
    "train_clip": STEPS | {"width": 8},
    "train": STEPS | {"size": 16},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
]


def command(folder: str, words: list[str]) -> None:
    """A command in a process of its own."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["difftool", *words]
    from difftool.cli.app import main

    main()


class Commands:
    """Commands in a folder, killed now and then."""

    def __init__(self, folder: Path):
        self.folder, self.random = folder, random.Random(SEED)
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(list(PRELOADED))
        self.killed, self.lasted = 0, 0.0

    def start(self, *words: str) -> Any:
        process = self.forks.Process(target=command, args=(str(self.folder), list(words)))
        process.start()
        return process

    def run(self, *words: str) -> float:
        """A whole command; how long it took."""
        began, process = time.monotonic(), self.start(*words)
        process.join()
        log = (self.folder / "log.txt").read_text(encoding="utf-8")
        assert process.exitcode == 0, log[-3000:]
        return time.monotonic() - began

    def kill(self, seconds: float, *words: str) -> bool:
        """A command that is killed within about so many seconds; whether it was."""
        began, process = time.monotonic(), self.start(*words)
        number = self.random.choice(SIGNALS)
        process.join(self.random.uniform(0.02, seconds))
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join()
        log = (self.folder / "log.txt").read_text(encoding="utf-8")
        assert process.exitcode in (0, -number, 128 + number), log[-3000:]
        self.killed += process.exitcode != 0
        self.lasted = time.monotonic() - began
        return process.exitcode != 0


@pytest.fixture
def commands(tmp_path) -> Commands:
    """Commands beside captioned pictures, and a model."""
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {'abcdef'[i]}", encoding="utf-8")
    (tmp_path / "parts.yaml").write_text(dump_yaml(PARTS), encoding="utf-8")
    for name, seed in (("a", 1), ("b", 2)):
        tiny.model(tiny.preset(), seed=seed).save(tmp_path / f"{name}.safetensors")
    return Commands(tmp_path)


def left(folder: Path) -> list[str]:
    """What killed processes have left."""
    names = (str(path.relative_to(folder)) for path in folder.rglob(".*"))
    return [name for name in names if not name.endswith(".lock")]


def hashes(folder: Path) -> dict[str, str]:
    """All that lies in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "/." not in f"/{path.relative_to(folder)}"
    }


ONE = (
    *("train", "photos", "--preset", "pixel-small", "--steps", "12", "--batch-size", "2"),
    *("--size", "16", "--set", "sample.steps=1"),
    *(word for each in tiny.settings(unet=tiny.UNET) for word in ("--set", each)),
)
LORA = (*("train", "photos", "--from", "a.safetensors", "--lora", "--rank", "2"), *ONE[4:10])
OFTEN = ("--device", "cpu", "--save-every", "2", "--sample-every", "6", "--keep", "1")


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (ONE, ["."]),
        (("train", "photos", "--preset", "parts.yaml"), ["vae", "clip", "."]),
        (LORA, ["."]),
    ],
    ids=["one part", "three parts", "lora"],
)
def test_killed_training_loses_nothing(commands, words, folders):
    """Each time it goes on from the newest checkpoint that there was or a newer one, and in the end
    it is the run that was never killed."""
    seconds = commands.run(*words, *OFTEN, "--out", "whole")
    name = "lora.safetensors" if words is LORA else "model.safetensors"
    whole = (commands.folder / "whole" / name).read_bytes()
    number, newest = 0, dict.fromkeys(folders, -1)
    while commands.killed < KILLS // 5:
        run = commands.folder / f"run-{number}"
        resume = ["--resume"] if run.exists() and any(run.iterdir()) else []
        killed = commands.kill(seconds, *words, *OFTEN, "--out", run.name, *resume)
        for folder in folders:
            good, passed_over = newest_checkpoint(run / folder)
            assert not passed_over, passed_over
            step = int(good.name[5:]) if good else -1
            assert step >= newest[folder], (folder, step, newest)
            newest[folder] = step
        if not killed:
            assert (run / name).read_bytes() == whole
            assert not left(run)
            number, newest = number + 1, dict.fromkeys(folders, -1)
            seconds = min(
                seconds, max(commands.lasted, 1.0)
            )  # else most end before they are killed
    run = commands.folder / f"run-{number}"
    resume = ["--resume"] if run.exists() else []
    commands.run(*words, *OFTEN, "--out", run.name, *resume)
    assert (run / name).read_bytes() == whole and not left(run)


@pytest.mark.parametrize("kind", ["folder", "file", "shards"])
def test_a_killed_conversion_leaves_the_old_model_or_the_new_one(commands, kind):
    out = "out" if kind == "folder" else "out.safetensors"
    words = ["--to", "diffusers" if kind == "folder" else "difftool", "--overwrite"]
    if kind == "shards":
        words += ["--max-shard-size", "20KB"]
    place, states, seconds = commands.folder / "place", [], 0.0
    place.mkdir()
    for name in ("a", "b"):
        seconds = commands.run("convert", f"{name}.safetensors", f"place/{out}", *words)
        states.append(hashes(place))
    assert states[0] != states[1]
    turns = cycle("ab")
    for _ in range(KILLS // 5):
        source = f"{next(turns)}.safetensors"
        commands.kill(1.1 * seconds, "convert", source, f"place/{out}", *words)
        if kind != "shards":  # of several files each has its place again when the next process came
            assert hashes(place) in states
    commands.run("convert", "a.safetensors", f"place/{out}", *words)
    assert hashes(place) == states[0]
    assert not left(place)


@pytest.mark.parametrize("names", ["out/", "out/[seed].png"])
def test_killed_sampling_leaves_whole_pictures(commands, names):
    words = ["sample", "-m", "a.safetensors", "--size", "16x16", "--steps", "2", "-n", "4"]
    words += ["--seed", "1", "--batch-size", "1", "--save-latents", "-o", names]
    words += ["--overwrite"] if "[" in names else []
    seconds, out = commands.run(*words), commands.folder / "out"
    before: dict[str, str] = {}
    for _ in range(KILLS // 5):
        before = hashes(out)
        commands.kill(1.1 * seconds, *words)
        assert before.items() <= hashes(out).items()  # overwritten by the same bytes
        for path in out.glob("*.png"):
            if not path.name.startswith("."):
                with Image.open(path) as picture:
                    picture.load()
    commands.run(*words)
    assert before.items() <= hashes(out).items() and not left(out)
