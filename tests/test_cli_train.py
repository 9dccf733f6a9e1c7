"""`difftool train` as a user meets it: the plan, the run, misuse."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import spawn, wait_for
from PIL import Image

from difftool.cli.train import STOPPING

TINY = [
    "--set", "unet.channels=[8,8]", "--set", "unet.groups=4", "--set", "unet.head_dim=4",
    "--set", "unet.blocks=1", "--set", "sample.steps=2",
    "--steps", "4", "--batch-size", "2", "--size", "16",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(3):
        image = Image.new("RGB", (20, 24), (80 * i, 100, 200))
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / f"photos/{i}.png")
    return tmp_path


def test_a_folder_becomes_a_model_that_samples(pictures):
    done = spawn("train", "photos", *TINY, cwd=pictures)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/photos-001/model.safetensors\n"
    assert "3 images" in done.stderr
    assert re.search(r"^preset +pixel-small ", done.stderr, re.MULTILINE)
    assert "next    difftool sample -m runs/photos-001" in done.stderr
    sampled = spawn("sample", "-m", "runs/photos-001", "--steps", "2", "-o", "a.png", cwd=pictures)
    assert sampled.returncode == 0, sampled.stderr
    with Image.open(pictures / "a.png") as image:
        assert image.size == (16, 16)


def test_a_dry_run_plans_and_writes_nothing(pictures, difftool):
    before = sorted(pictures.rglob("*"))
    done = difftool("train", "photos", "--dry-run")
    assert done.code == 0
    assert done.out == ""
    for word in ("3 images", "pixel-small", "train.steps", "memory", "disk", "time", "shown"):
        assert word in done.err
    for key in ("target", "path.kind", "train.lr", "train.warmup"):
        assert re.search(rf"^{key} +\S+  +\S", done.err, re.MULTILINE)
    assert sorted(pictures.rglob("*")) == before


def test_a_dry_run_is_one_object_where_json_is_asked_for(pictures, difftool):
    done = difftool("train", "photos", "--dry-run", "--json", "--steps", "30")
    plan = done.object
    assert done.code == 0 and plan["schema"] == 1 and not plan["warnings"]
    chosen = {key: row["value"] for key, row in plan["plan"].items()}
    assert (chosen["train.size"], chosen["train.steps"], chosen["train.warmup"]) == (20, 30, 3)
    assert all(row["why"] for row in plan["plan"].values())
    assert plan["memory"] < plan["memory_free"]
    assert plan["seconds"] > 0 and "3 images" in plan["data"][0]


def test_the_configuration_is_printed_with_its_origins(pictures, difftool):
    done = difftool("train", "photos", "--print-config", "--json", "--lr", "0.5")
    config = done.object["config"]
    assert config["train.lr"] == {"value": 0.5, "origin": "--lr"}
    assert config["unet.groups"]["origin"] == "default"
    assert "3 pictures" in config["train.batch_size"]["origin"]


MISUSE = [
    (["nowhere"], 2, "no folder"),
    (["photos", "--preset", "pixel-smal"], 2, 'did you mean "pixel-small"'),
    (["photos", "--steps", "0"], 2, "positive"),
    (["photos", "--lr", "-1"], 2, "positive"),
    (["photos", "--precision", "fp8"], 2, "choose from"),
    (["photos", "--device", "tpu"], 2, "cannot be used"),
    (["photos", "--resume"], 2, "--out"),
    (["photos", "--out", "missing", "--resume"], 2, "no checkpoint"),
    (["photos", "--out", "photos"], 2, "not empty"),
    (["photos", "--preset", "text-small"], 2, "no captions"),
    (["photos", "--set", "unet.chanels=[8]"], 2, "channels"),
    (["photos", "--set", "path.kind=edm", "--set", "target=eps", "--size", "15"], 2, "multiple"),
    (["photos", "--set", "path={kind: linear, zero_snr: true}", "--set", "target=eps"], 2, "eps"),
    (
        ["photos", "--set", "unet.attention=transformer", "--set", "unet.context_dim=8"],
        2,
        "encoder",
    ),
    (["photos", "--frobnicate"], 2, "frobnicate"),
    ([], 2, "DATA"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), MISUSE)
def test_misuse_is_told_in_few_lines_and_leaves_nothing(pictures, difftool, arguments, code, says):
    before = sorted(pictures.rglob("*"))
    done = difftool("train", *arguments)
    assert done.code == code
    assert says in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert sorted(pictures.rglob("*")) == before


def test_an_error_is_json_where_json_is_asked_for(pictures, difftool):
    done = difftool("train", "photos", "--steps", "-3", "--json")
    error = done.object["error"]
    assert (done.code, error["code"]) == (2, 2)
    assert "--steps" in error["message"]


@pytest.mark.slow
def test_sigterm_saves_and_resume_goes_on(pictures):
    arguments = [*TINY[:-6], "--steps", "100000", "--batch-size", "2", "--size", "16"]
    command = [sys.executable, "-m", "difftool", "train", "photos", "--out", "run", *arguments]
    with subprocess.Popen(command, cwd=pictures, stderr=subprocess.PIPE, text=True) as process:
        wait_for(pictures / "run/metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, talk = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume" in talk
    assert 0 < talk.index(STOPPING) < talk.index("stopped after step")
    [checkpoint] = (pictures / "run/checkpoints").glob("step-*")
    step = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
    done = spawn(
        "train",
        "photos",
        "--out",
        "run",
        "--resume",
        "--steps",
        str(step + 2),
        "--allow-change",
        cwd=pictures,
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed from run/checkpoints/{checkpoint.name}" in done.stderr
    assert done.stdout == "run/model.safetensors\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_runs_on_cuda(pictures, precision):
    done = spawn(
        "train", "photos", *TINY, "--device", "cuda", "--precision", precision, cwd=pictures
    )
    assert done.returncode == 0, done.stderr
