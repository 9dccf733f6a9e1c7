"""`difftool convert` from end to end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import ldm_models
import pytest
import tiny
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from difftool import inspect
from difftool.formats import open_model
from difftool.pipeline.model import Model
from difftool.storage import safetensors

SAMPLE = {"size": [16, 16], "sampler": "ddim", "schedule": "leading"}
PRESET = tiny.preset(unet={"depth": [0, 1]}, path={"kind": "ddpm"}, sample=SAMPLE)


@pytest.fixture
def convert(difftool):
    """Run `difftool convert` in a folder with the model m.safetensors."""
    Model.fresh(PRESET, seed=0).save(Path("m.safetensors"), metadata={"k": "a \x1b[31m note"})
    return partial(difftool, "convert")


def left() -> set[str]:
    """What is in the working folder beside the model."""
    return {path.name for path in Path().iterdir()} - {"m.safetensors"}


def test_there_and_back(convert):
    ran = convert("m.safetensors", "m", "--to", "diffusers")
    assert (ran.code, ran.out) == (0, "m\n")
    assert "verification: identical" in ran.err
    assert (
        json.loads(Path("m/model_index.json").read_text(encoding="utf-8"))["_class_name"]
        == "DDPMPipeline"
    )
    ran = convert("m/", "back.safetensors", "--to", "difftool", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "back.safetensors\n", "")
    before, after = load_file("m.safetensors"), load_file("back.safetensors")
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert left() == {"m", "back.safetensors"}


def test_the_report_is_the_ledger(convert):
    ran = convert("m.safetensors", "m", "--to", "diffusers", "--report", "r.json")
    assert ran.code == 0
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))
    names = set(load_file("m.safetensors"))
    assert {entry["source"] for entry in report["entries"]} == names
    assert report["counts"] == {"copy": len(names)}
    assert report["schema"] == 1
    entry = report["entries"][0]
    assert entry.keys() == {
        "source", "source_file", "target", "target_file", "op", "shape", "source_dtype",
        "target_dtype", "source_sha256", "target_sha256", "source_shape", "target_shape",
    }  # fmt: skip
    assert entry["source_sha256"] == entry["target_sha256"]


def test_json_results(convert):
    found = convert("m.safetensors", "m", "--to", "diffusers", "--json").object
    assert found["schema"] == 1
    assert found["path"] == "m"
    assert found["kinds"] == ["difftool", "diffusers"]
    assert "identical" in found["verified"]
    found = convert("m.safetensors", "m2", "--to", "diffusers", "--no-verify", "--json").object
    assert found["verified"] == "not asked for"


def test_another_dtype_is_measured(convert):
    found = convert("m.safetensors", "h.st", "--to", "difftool", "--dtype", "fp16", "--json").object
    assert found["casts"]["unet"]["infinite"] == 0
    assert 0 < found["casts"]["unet"]["max_abs_error"] < 1e-3
    before, after = load_file("m.safetensors"), load_file("h.st")
    assert all(tensor.half().equal(after[name]) for name, tensor in before.items())


def test_a_dry_run_writes_nothing(convert):
    ran = convert("m.safetensors", "m", "--to", "diffusers", "--dry-run")
    assert (ran.code, ran.out) == (0, "")
    assert "copy" in ran.err
    assert left() == set()


def test_metadata_is_stripped_where_asked(convert):
    assert convert("m.safetensors", "a", "--to", "difftool").code == 0
    assert convert("m.safetensors", "b", "--to", "difftool", "--strip-metadata").code == 0
    assert "k" in open_model(Path("a")).metadata
    assert "k" not in open_model(Path("b")).metadata


def test_output_is_replaced_only_where_asked(convert):
    for target, kind in (("m", "diffusers"), ("a.safetensors", "difftool")):
        assert convert("m.safetensors", target, "--to", kind).code == 0
        ran = convert("m.safetensors", target, "--to", kind)
        assert ran.code == 2
        assert "--overwrite" in ran.err
        assert convert("m.safetensors", target, "--to", kind, "--overwrite").code == 0
    Path("r.json").write_text("precious", encoding="utf-8")
    ran = convert("m.safetensors", "b", "--to", "difftool", "--report", "r.json")
    assert ran.code == 2
    assert Path("r.json").read_text(encoding="utf-8") == "precious"
    assert "b" not in left()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["m.safetensors"], "no DST"),
        (["m.safetensors", "x"], "format"),
        (["m.safetensors", "x", "--to", "difusers"], 'did you mean "diffusers"'),
        (["m.safetensors", "x", "--to", "difftool", "--dtype", "fp17"], "fp16"),
        (["none", "x", "--to", "difftool"], "does not exist"),
        (["none", "--inspect"], "does not exist"),
        (["m.safetensors", "x", "--inspect"], "--inspect"),
        (["m.safetensors", "--inspect", "--to", "difftool"], "--inspect"),
        (["m.safetensors", "no/such/folder", "--to", "difftool"], "does not exist"),
        (["m.safetensors", "no/such/folder", "--to", "diffusers"], "does not exist"),
        (["m.safetensors", "m.safetensors", "--to", "difftool", "--overwrite"], "converted"),
        (["m.safetensors", ".", "--to", "diffusers", "--overwrite"], "converted"),
        (["m.safetensors", "x", "--to", "difftool", "--nonsense"], "--nonsense"),
        ([], "SRC"),
    ],
)
def test_misuse_is_exit_2(convert, args, says):
    ran = convert(*args)
    assert ran.code == 2
    assert says in ran.err
    assert ran.out == ""
    assert left() == set()


@pytest.mark.parametrize("args", [["--inspect"], ["out", "--to", "difftool"]])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.safetensors", b""),
        ("cut.safetensors", b"\xff" * 8 + b"{"),
        ("twice.safetensors", b'\x0f\0\0\0\0\0\0\0{"a":1,"a":1}  '),
        ("old.ckpt", b"PK\x03\x04"),
        ("picture.png", b"\x89PNG"),
    ],
)
def test_refused_input_is_exit_3(convert, name, content, args):
    Path(name).write_bytes(content)
    ran = convert(name, *args)
    assert ran.code == 3
    assert ran.out == ""
    assert len(ran.err.splitlines()) <= 3
    assert left() == {name}


def test_an_unknown_family_is_inspected_but_not_converted(convert):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, "lora.safetensors")
    assert convert("lora.safetensors", "--inspect", "--json").object["family"] == "lora"
    ran = convert("lora.safetensors", "out", "--to", "difftool")
    assert ran.code == 3
    assert "unknown to this version" in ran.err
    assert left() == {"lora.safetensors"}


def test_an_error_under_json(convert):
    found = convert("none", "--inspect", "--json").object
    assert found["schema"] == 1
    assert found["error"].keys() == {"code", "message", "hint"}
    assert found["error"]["code"] == 2


def test_what_would_lose_data_is_exit_4(convert):
    tensors = load_file("m.safetensors") | {"unet.nobody_knows": torch.ones(1)}
    metadata = safetensors.read_header(Path("m.safetensors")).metadata
    save_file(tensors, "odd.safetensors", metadata)
    for kind in ("difftool", "diffusers"):
        ran = convert("odd.safetensors", "out", "--to", kind)
        assert ran.code == 4
        assert "nobody_knows" in ran.err
    tensors["unet.conv_in.bias"] = torch.full((8,), 1e9)
    del tensors["unet.nobody_knows"]
    save_file(tensors, "odd.safetensors", metadata)
    ran = convert("odd.safetensors", "out", "--to", "difftool", "--dtype", "fp16")
    assert ran.code == 4
    assert "bf16" in ran.err
    assert left() == {"odd.safetensors"}


def test_a_full_disk_is_exit_5_and_leaves_nothing(convert, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for kind in ("difftool", "diffusers"):
        ran = convert("m.safetensors", "out", "--to", kind)
        assert ran.code == 5
        assert "disk is full" in ran.err
    assert left() == set()


def test_inspection_for_people(convert):
    ran = convert("m.safetensors", "--inspect")
    assert ran.code == 0
    rows = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert rows["format"] == "difftool"
    assert rows["prediction"] == "eps"
    assert rows["unet"].endswith("fp32")
    assert "\x1b" not in ran.out
    assert "\\x1b[31m note" in ran.out


def test_inspection_for_programs(convert):
    shown = convert("m.safetensors", "--inspect", "--json").object
    assert shown.keys() >= {
        "schema", "family", "prediction", "zero_snr", "evidence", "weights", "components",
        "metadata",
    }  # fmt: skip
    tensors = load_file("m.safetensors")
    assert shown["components"] == {
        "unet": {
            "tensors": len(tensors),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "dtypes": {"fp32": len(tensors)},
        }
    }
    assert shown["metadata"]["k"] == "a \x1b[31m note"
    assert convert("m.safetensors", "m", "--to", "diffusers").code == 0
    folder = convert("m", "--inspect", "--json").object
    assert folder["components"] == shown["components"]
    assert folder["prediction"] == "eps"


def test_inspection_imports_no_torch(convert):
    assert convert("m.safetensors", "m", "--to", "diffusers").code == 0
    code = """
import sys
from difftool.cli.app import main
for path in sys.argv[1:]:
    sys.argv = ["difftool", "convert", path, "--inspect"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
assert not {"torch", "numpy", "safetensors"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, *map(os.path.abspath, ("m.safetensors", "m"))]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unet") >= 2


def test_a_run_folder_is_a_source(convert):
    Path("run").mkdir()
    shutil.copy("m.safetensors", "run/model.safetensors")
    Path("run/config.yaml").write_text("name: tiny\n", encoding="utf-8")
    assert convert("run", "out.safetensors", "--to", "difftool").code == 0
    assert load_file("out.safetensors").keys() == load_file("m.safetensors").keys()


def test_help_shows_examples_and_every_choice(convert):
    shown = convert("--help")
    assert shown.code == 0
    for text in ("Examples", "--inspect", "--dry-run", "--strip-metadata", "--weights", "ldm,"):
        assert text in shown.out


# --- single files ----------------------------------------------------------------------------


def test_a_single_file_goes_to_a_folder_and_back(convert):
    tensors = ldm_models.write(Path("sd.safetensors"), "sd1", {"format": "pt"}, ema=True)
    ran = convert("sd.safetensors", "sd", "--to", "diffusers", "--report", "r.json")
    assert (ran.code, ran.out) == (0, "sd\n")
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert {entry["source"] for entry in report["entries"]} == tensors.keys()
    there = {entry["source"]: entry for entry in report["entries"]}
    entry = there["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert entry["op"] == "reshape"
    assert entry["source_shape"] == [*entry["target_shape"], 1, 1]
    assert entry["source_sha256"] == entry["target_sha256"]
    assert report["verified"].startswith("identical")
    assert convert("sd", "back.safetensors", "--to", "ldm").code == 0
    back = load_file("back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(back[name].equal(tensor) for name, tensor in tensors.items())
    assert safetensors.read_header(Path("back.safetensors")).metadata == {"format": "pt"}


def test_weights_are_chosen_by_a_flag(convert):
    tensors = ldm_models.write(Path("sd.safetensors"), "sd1", ema=True)
    shown = convert("sd.safetensors", "--inspect", "--json").object
    assert shown["weights"] == ["live", "ema"]
    ran = convert("sd.safetensors", "x.safetensors", "--to", "ldm", "--weights", "ema", "--json")
    assert ran.object["counts"]["drop"] == sum(n.startswith("model_ema") for n in tensors)
    name = "model.diffusion_model.out.0.bias"
    assert load_file("x.safetensors")[name].equal(tensors["model_ema.diffusion_modelout0bias"])
    ran = convert("x.safetensors", "y", "--to", "diffusers", "--weights", "live")
    assert ran.code == 2
    assert "no live weights" in ran.err
    assert convert("sd.safetensors", "z", "--to", "ldm", "--weights", "both").code == 2


def test_a_contradiction_is_settled_by_a_flag(convert):
    tensors = ldm_models.state("sdxl") | {"v_pred": torch.ones(0)}
    notes = {"modelspec.prediction_type": "epsilon"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, "xl.safetensors", notes)
    for args in (["out", "--to", "diffusers"], ["--inspect"]):
        ran = convert("xl.safetensors", *args)
        assert ran.code == 3
        assert "--prediction" in ran.err
        assert len(ran.err.splitlines()) <= 3
    shown = convert("xl.safetensors", "--inspect", "--json", "--prediction", "v").object
    assert (shown["prediction"], shown["family"]) == ("v", "sdxl")
    ran = convert("xl.safetensors", "out", "--to", "diffusers", "--prediction", "v")
    assert ran.code == 0
    scheduler = json.loads(Path("out/scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler["prediction_type"] == "v_prediction"
    ran = convert("xl.safetensors", "o", "--to", "ldm", "--prediction", "eps", "--zero-snr")
    assert ran.code == 2
    assert convert("xl.safetensors", "o", "--to", "ldm", "--prediction", "x0").code == 2


def test_what_is_not_explained_in_a_single_file_is_exit_4(convert):
    tensors = ldm_models.state("sd1") | {"model.diffusion_model.nobody_knows": torch.ones(1)}
    save_file(tensors, "odd.safetensors")
    for kind in ("ldm", "diffusers", "difftool"):
        ran = convert("odd.safetensors", "out", "--to", kind)
        assert (ran.code, ran.out) == (4, "")
        assert "nobody_knows" in ran.err
    tensors.pop("model.diffusion_model.input_blocks.1.0.in_layers.2.weight")
    save_file(tensors, "cut.safetensors")
    ran = convert("cut.safetensors", "out", "--to", "diffusers")
    assert ran.code == 3
    assert "nearest family: sd" in ran.err
    assert left() == {"odd.safetensors", "cut.safetensors"}


def test_inspection_of_a_single_file_imports_no_torch(convert):
    ldm_models.write(Path("sd.safetensors"), "sd2")
    code = """
import sys
from difftool.cli.app import main
sys.argv = ["difftool", "convert", sys.argv[1], "--inspect"]
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {"torch", "numpy", "safetensors"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, os.path.abspath("sd.safetensors")]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "sd2" in done.stdout


def test_a_single_file_is_sampled(difftool):
    """The text encoder, U-Net and decoder of a single file make a picture."""
    ldm_models.write(Path("sd.safetensors"), "sd1")
    words = "sample fox -m sd.safetensors --steps 1 --size 32x32 -o a.png"
    assert difftool(*words.split()).code == 0
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_says_how_it_was_made(convert, tmp_path):
    info = PngImagePlugin.PngInfo()
    said = "Steps: 9, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x32, NGMS: 3"
    info.add_text("parameters", f"a fox\nin two lines\nNegative prompt: bad\n{said}")
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.png", pnginfo=info)
    ran = convert(tmp_path / "fox.png", "--inspect")
    assert ran.code == 0 and [line.split(maxsplit=1) for line in ran.lines] == [
        ["format", "png, 8x8"], ["made", "by           A1111"], ["model", "not said"],
        ["prompt", "a fox"], ["in", "two lines"], ["negative", "bad"], ["seed", "5"],
        ["sampler", "euler_a"], ["steps", "9"], ["guidance", "7.0"], ["width", "64"],
        ["height", "32"], ["not", "taken         NGMS: 3"],
    ]  # fmt: skip
    (told,) = convert(tmp_path / "fox.png", "--inspect", "--json").objects
    assert told["request"]["seed"] == 5 and told["missed"] == ["NGMS: 3"]
    assert inspect(tmp_path / "fox.png") == told
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.webp")
    (told,) = convert(tmp_path / "plain.webp", "--inspect", "--json").objects
    assert told["request"] is None and told["format"] == "webp"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert convert(tmp_path / "broken.png", "--inspect").code == 3
    assert convert(tmp_path / "none.png", "--inspect").code == 2
