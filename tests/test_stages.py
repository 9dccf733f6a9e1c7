"""Several parts in one command: what each leaves to the next, and that a kill leaves no trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import wait_for
from PIL import Image

from difftool.config.layers import load_preset
from difftool.config.networks import VaeConfig
from difftool.data import shapes
from difftool.errors import InputError
from difftool.formats import open_model
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.storage.yaml import dump_yaml

STEPS = {"steps": 20, "batch_size": 4, "warmup": 2}
TINY = tiny.LATENT | {
    "sample": {"size": [16, 16], "steps": 2},
    "train_vae": STEPS | {"adversarial": 0.1, "adversarial_from": 8},
    "train_clip": STEPS | {"width": 8},
    "train": STEPS | {"size": 16, "flip": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A captioned folder, and a preset for it."""
    place = tmp_path_factory.mktemp("stages")
    (place / "tiny.yaml").write_text(dump_yaml(TINY), encoding="utf-8")
    (place / "photos").mkdir()
    captions = [str(c) for c in shapes.captions()][::97][:24]
    with (place / "photos" / "metadata.jsonl").open("w") as file:
        for i, caption in enumerate(captions):
            Image.fromarray(shapes.draw(caption, 16, i)).save(place / "photos" / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": caption}) + "\n")
    return place


def train(place: Path, out: str, *arguments: str) -> subprocess.Popen:
    command = ["train", "photos", "--out", out, "--save-every", "5", "--sample-every", "10"]
    command += ["--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "difftool", *command],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that was never stopped."""
    done = train(place, "whole", "--preset", "tiny.yaml")
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert out == "whole/model.safetensors\n"
    return place / "whole"


@pytest.mark.slow
def test_a_run_killed_twice_is_the_run_that_never_stopped(place: Path, whole: Path):
    first = ["--preset", "tiny.yaml"]
    for waited, arguments in (
        ("vae/checkpoints/step-000010", first),
        ("clip/checkpoints/step-000005", ["--resume"]),
        ("checkpoints/step-000005", ["--resume"]),
    ):
        run = train(place, "killed", *arguments)
        wait_for(place / "killed" / waited / "manifest.json", run)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (place / "killed" / "model.safetensors").exists()
    done = train(place, "killed", "--resume")
    assert done.communicate()[0] == "killed/model.safetensors\n"
    names = [Path("vae"), Path("clip"), Path()]
    for name in names:
        for file in ("model.safetensors", "metrics.jsonl", "config.yaml"):
            left, right = whole / name / file, place / "killed" / name / file
            assert left.read_bytes() == right.read_bytes(), (name, file)
        last = Path("checkpoints", "step-000020")
        for file in ("model", "ema", "optimizer"):
            left = whole / name / last / f"{file}.safetensors"
            right = place / "killed" / name / last / f"{file}.safetensors"
            assert left.read_bytes() == right.read_bytes(), (name, file)


def test_each_part_goes_on_from_what_was_learned_before(whole: Path):
    model = load_model(str(whole), device="cpu")
    vae = open_model(whole / "vae" / "model.safetensors")
    assert all(name.startswith("vae.") for name in vae.tensors)
    for name, tensor in vae.load("vae.", "cpu").items():
        assert torch.equal(tensor, model.parts()["vae"].state_dict()[name]), name
    # The U-Net's part measured the latents: x0 has about unit variance.
    codec = model.preset.codec
    assert isinstance(codec, VaeConfig)
    assert codec.latents_std is not None
    pictures = [
        shapes.draw(str(c), 16, i) for i, c in enumerate(list(shapes.captions())[::97][:24])
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(24, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x0 = model.codec.encode(images, noise)
    assert 0.7 < float(x0.std()) < 1.3
    plan = plan_sampling(model, resolve_settings(model))
    *_, last = generate(plan, [SampleInput("a large red circle")])
    assert decode(model, last.x).shape == (1, 3, 16, 16)


def test_a_part_alone_is_no_model_to_sample(whole: Path):
    with pytest.raises(InputError, match="without a U-Net"):
        load_model(str(whole / "vae"), device="cpu")


@pytest.mark.slow
def test_the_vae_of_another_model_is_taken_as_it_is(place: Path, whole: Path):
    done = train(place, "second", "--preset", "tiny.yaml", "--vae", "whole/vae", "--steps", "5")
    _, err = done.communicate()
    assert done.returncode == 0, err
    ours, theirs = (load_model(str(place / n), device="cpu") for n in ("second", "whole"))
    assert ours.preset.codec == theirs.preset.codec
    for name, tensor in theirs.parts()["vae"].state_dict().items():
        assert torch.equal(tensor, ours.parts()["vae"].state_dict()[name])
    assert not (place / "second" / "vae").exists()


def test_fine_tuning_starts_from_the_model_with_a_gentler_rate(place: Path, whole: Path):
    done = train(place, "tuned", "--from", "whole", "--steps", "5", "--batch-size", "4")
    _, err = done.communicate()
    assert done.returncode == 0, err
    start, tuned = (load_model(str(place / n), device="cpu") for n in ("whole", "tuned"))
    assert tuned.preset.train.lr == pytest.approx(start.preset.train.lr / 10)
    before, after = start.tensors(), tuned.tensors()
    moved = {n: float((after[n] - t).abs().max()) for n, t in before.items()}
    assert 0 < max(moved.values()) < 0.01  # five gentle steps from where it was
    assert all(v == 0 for n, v in moved.items() if n.startswith("vae."))


def test_the_presets_of_several_parts_say_so():
    assert load_preset("ldm-small").parts == ("vae", "clip", "unet")
    assert load_preset("vae-small").parts == ("vae",)
