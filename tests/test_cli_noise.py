"""`difftool noise` from end to end."""

from __future__ import annotations

import csv
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS, build_path
from difftool.pipeline.model import Model

ROW = ["index", "t", "alpha", "sigma", "log_snr"]
PRESET = tiny.preset(
    channels=12,
    codec=tiny.BLOCKS,
    unet={"num_classes": 3},
    classes=["fox", "dog"],
    path={"kind": "flow", "shift": 3.0},
    target="flow",
    sample={"size": [16, 16]},
)


@pytest.fixture
def noise(difftool):
    """Run `difftool noise` in a folder with photo.png (40x30) and small.png (8x8)."""
    rng = np.random.default_rng(0)
    for name, size in (("photo", (30, 40, 3)), ("small", (8, 8, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(f"{name}.png")
    return partial(difftool, "noise")


@pytest.fixture
def model(noise):
    """A tiny model of two classes in that folder."""
    Model.fresh(PRESET, seed=0).save(Path("tiny.safetensors"))
    return "tiny.safetensors"


def left() -> set[str]:
    """Every file in the working folder but the two pictures and the model."""
    files = {str(path) for path in Path().rglob("*") if path.is_file()}
    return files - {"photo.png", "small.png", "tiny.safetensors"}


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- strips ----------------------------------------------------------------------------------


def test_a_strip_beside_the_working_folder(noise):
    ran = noise("photo.png")
    assert (ran.code, ran.out) == (0, "photo-noise.png\n")
    assert "sd15" in ran.err and "8 levels" in ran.err
    assert left() == {"photo-noise.png"}
    with Image.open("photo-noise.png") as strip:
        assert strip.format == "PNG" and strip.width > 8 * 160


def test_the_same_strip_again_and_another_by_another_seed(noise):
    first, again, other = (
        Path(noise("photo.png", "--seed", seed, "-o", f"{i}.png").out.strip()).read_bytes()
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == again != other


def test_a_strip_is_the_same_among_others(noise):
    assert noise("photo.png", "-o", "alone.png").code == 0
    assert noise("small.png", "photo.png", "-o", "both/").code == 0
    assert Path("alone.png").read_bytes() == Path("both/photo-noise.png").read_bytes()


@pytest.mark.parametrize("name", [*PATHS, "sd15", "DDPM"])
def test_levels_of_every_path_as_json(noise, name):
    ran = noise("small.png", "--path", name, "--steps", 5, "--json")
    found = ran.object
    assert ran.code == 0
    assert found["schema"] == 1 and found["path"] == "small-noise.png"
    assert (found["image"], found["width"], found["height"]) == ("small.png", 8, 8)
    assert found["noise_path"] == name
    assert [row["index"] for row in found["levels"]] == list(range(5))
    for row in found["levels"]:
        level = build_path({"kind": name}).level(row["t"])
        assert list(row) == ROW
        assert (row["alpha"], row["sigma"]) == level[1:]


def test_a_strip_of_a_samplers_levels_from_clean_to_noisy(noise):
    ran = noise("small.png", "--schedule", "karras", "--steps", 4, "--json")
    sigmas = [row["sigma"] for row in ran.object["levels"]]
    assert len(sigmas) == 5 and sigmas == sorted(sigmas) and sigmas[0] == 0


def test_the_chain(noise):
    ran = noise("photo.png", "--markov", "--steps", 3, "--json")
    chain = ran.object["chain"]
    assert chain["transitions"] == 1000
    assert 0 < chain["mean"] < 0.1 and 0 < chain["std"] < 0.1
    with Image.open("photo-noise.png") as both:
        assert noise("photo.png", "--steps", 3, "-o", "one.png").code == 0
        with Image.open("one.png") as one:
            assert both.height > 1.5 * one.height


def test_a_comparison(noise):
    names = ["linear", "sd15", "flow"]
    ran = noise("small.png", "--compare", ",".join(names), "--steps", 3, "--json")
    assert list(ran.object["noise_paths"]) == names
    assert [len(rows) for rows in ran.object["noise_paths"].values()] == [3, 3, 3]


def test_size_is_the_longest_side(noise):
    found = noise("photo.png", "--size", 20, "--json").object
    assert (found["width"], found["height"]) == (20, 15)


def test_pictures_are_read_as_a_viewer_shows_them(noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save("turned.jpg", exif=exif)
    ran = noise("turned.jpg", "--json")
    assert (ran.object["width"], ran.object["height"]) == (10, 20) and "EXIF" in ran.err
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save("clear.png")
    assert "alpha" in noise("clear.png").err
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save("deep.png")
    assert "16 bits" in noise("deep.png").err


# --- kinds of output -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "frames"), [("gif", 40), ("webp", 40), ("GIF", 40)])
def test_a_moving_picture(noise, kind, frames):
    ran = noise("small.png", "-o", f"a.{kind}")
    assert (ran.code, ran.out) == (0, f"a.{kind}\n")
    with Image.open(f"a.{kind}") as moving:
        assert moving.format == kind.upper() and getattr(moving, "n_frames", 1) == frames
    assert noise("small.png", "-o", "b.gif", "--steps", 3).code == 0
    with Image.open("b.gif") as moving:
        assert getattr(moving, "n_frames", 1) == 3


def test_a_page_has_every_level(noise):
    ran = noise("small.png", "-o", "a.html", "--json", "--compare", "linear,flow")
    assert [len(rows) for rows in ran.object["noise_paths"].values()] == [1000, 1001]
    assert Path("a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(noise("small.png", "-o", "b.html", "--json", "--steps", 9).object["levels"]) == 9
    assert len(noise("small.png", "-o", "c.html", "--json", "--markov").object["levels"]) == 25


def test_a_table_has_the_levels_shown(noise):
    assert noise("small.png", "-o", "a.csv", "--steps", 3).out == "a.csv\n"
    rows = rows_of("a.csv")
    assert list(rows[0]) == ROW and [row["t"] for row in rows] == ["0.0", "500.0", "999.0"]
    noise("small.png", "-o", "b.csv", "--steps", 3, "--compare", "linear,flow")
    rows = rows_of("b.csv")
    assert list(rows[0]) == [*ROW, "path"] and rows[3]["path"] == "flow"


def test_a_file_of_each_picture_in_a_folder(noise):
    ran = noise("photo.png", "small.png", "-o", "out/", "--format", "gif", "--steps", 2)
    assert ran.lines == ["out/photo-noise.gif", "out/small-noise.gif"]
    assert left() == set(ran.lines)


def test_a_last_table_of_a_thousand_levels_fits_in_no_strip_but_in_a_csv(noise):
    assert noise("photo.png", "--steps", 1000, "-o", "a.csv").code == 0
    assert len(rows_of("a.csv")) == 1000


# --- curves ----------------------------------------------------------------------------------


def test_options_of_a_path(noise):
    ran = noise(
        "--curve", "--path", "linear", "--set", "steps=50", "--set", "beta_end=0.1", "--json"
    )
    expected = build_path({"kind": "linear", "steps": 50, "beta_end": 0.1})
    found = [row["alpha"] for row in ran.object["rows"]]
    assert found == [expected.level(t).alpha for t in range(50)]
    # Defaults follow a path that is shorter than they are.
    assert noise("--curve", "--set", "steps=5").out.count("\n") == 6
    assert noise("small.png", "--set", "steps=5").code == 0


def test_the_curve_as_csv_has_the_whole_table(noise):
    ran = noise("--curve", "--path", "sd21-zsnr", "-o", "curve.csv")
    assert (ran.code, ran.out) == (0, "curve.csv\n")
    rows = rows_of("curve.csv")
    assert list(rows[0]) == ROW
    assert len(rows) == 1000
    assert float(rows[-1]["alpha"]) == 0 and rows[-1]["log_snr"] == "-inf"
    listed = noise("--curve", "--path", "sd21-zsnr", "--json").object["rows"]
    assert [row["alpha"] for row in listed] == [float(row["alpha"]) for row in rows]
    assert listed[-1]["log_snr"] is None


def test_the_curve_as_a_table(noise):
    ran = noise("--curve")
    assert ran.lines[0].split() == [*ROW, "SNR", "dB"]
    assert len(ran.lines) == 22 and ran.lines[-1].split()[:2] == ["20", "999"]
    assert "--json" in ran.err


@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"explicit", "ays", "sd3", "flow_dpm"}))
def test_the_levels_that_a_sampler_visits(noise, name):
    ran = noise("--curve", "--schedule", name, "--steps", 7, "--json")
    expected = GRIDS[name](build_path({"kind": "sd15"}), 7)
    assert ran.code == 0
    found = [(row["t"], row["alpha"], row["sigma"]) for row in ran.object["rows"]]
    assert found == [tuple(level) for level in expected]


@pytest.mark.parametrize("kind", ["png", "html"])
def test_the_curve_as_a_picture_and_as_a_page(noise, kind):
    assert noise("--curve", "-o", f"bare.{kind}").out == f"bare.{kind}\n"
    ran = noise("--curve", "--schedule", "karras", "-o", f"dots.{kind}", "--json")
    assert ran.object["path"] == f"dots.{kind}" and len(ran.object["rows"]) == 21
    assert noise("--curve", "--compare", "flow,edm", "-o", f"two.{kind}").code == 0
    assert len({Path(f"{name}.{kind}").read_bytes() for name in ("bare", "dots", "two")}) == 3


def test_curves_are_compared(noise):
    found = noise("--curve", "--compare", "flow,edm", "--schedule", "trailing", "--json").object
    assert {name: len(rows) for name, rows in found["noise_paths"].items()} == {
        "flow": 21, "edm": 21,
    }  # fmt: skip
    lines = noise("--curve", "--compare", "flow,edm", "--steps", 2).lines
    assert [lines[k] for k in (0, 4)] == ["flow", "edm"]


# --- models ----------------------------------------------------------------------------------


def test_the_path_of_a_model_in_pixels(noise, model):
    ran = noise("photo.png", "--model", model, "--steps", 3, "--json")
    assert ran.code == 0 and "tiny" in ran.err
    assert [row["t"] for row in ran.object["levels"]] == [0, 0.75, 1]
    assert (ran.object["width"], ran.object["noise_path"]) == (40, "tiny")
    rows = noise("--curve", "--model", model, "--steps", 3, "--json").object["rows"]
    assert [row["t"] for row in rows] == [0, 0.75, 1]


def test_noise_where_a_model_works(noise, model):
    found = noise("photo.png", "--model", model, "--latent", "--steps", 3, "--json").object
    assert (found["width"], found["height"], found["model"]) == (16, 16, "tiny")
    assert noise("photo.png", "--model", model, "--latent", "--size", 20, "-o", "b.png").code == 0
    ran = noise("photo.png", "--model", model, "--latent", "--markov", "-o", "c.gif", "--json")
    assert ran.object["chain"]["transitions"] >= 1000


def test_there_and_back(noise, model):
    ran = noise("photo.png", "--reverse", "--model", model, "--label", "dog", "--json")
    found = ran.object
    assert (found["label"], found["prompt"], len(found["model_hash"])) == ("dog", None, 10)
    assert list(found["levels"][0]) == [*ROW, "rmse", "psnr"]
    assert found["levels"][0] | {"rmse": 0, "psnr": None} == found["levels"][0]
    assert all(0 < row["rmse"] < 2 for row in found["levels"][1:])
    for kind in ("csv", "gif", "html"):
        assert noise("photo.png", "--reverse", "-m", model, "-o", f"a.{kind}").code == 0
    rows = rows_of("a.csv")
    assert list(rows[0]) == [*ROW, "rmse", "psnr"] and rows[0]["psnr"] == "inf"


def test_a_trained_model_sees_what_it_knows(noise):
    from difftool.data.shapes import draw

    Image.fromarray(draw("a large red circle", 64, 5)).save("small.png")
    told = noise("small.png", "--reverse", "-m", "shapes", "--prompt", "a large red circle",
                 "--steps", 5, "--json")  # fmt: skip
    errors = [row["rmse"] for row in told.object["levels"]]
    assert told.code == 0 and errors == sorted(errors)
    assert errors[2] < 0.2 < errors[4]


# --- misuse ----------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(noise):
    Path("photo-noise.png").write_text("mine", encoding="utf-8")
    ran = noise("photo.png")
    assert ran.code == 2 and "--overwrite" in ran.err and ran.out == ""
    assert Path("photo-noise.png").read_text(encoding="utf-8") == "mine"
    assert noise("photo.png", "--overwrite").code == 0
    assert Path("photo-noise.png").read_bytes().startswith(b"\x89PNG")
    for name in ("curve.csv", "curve.png"):
        Path(name).write_text("mine", encoding="utf-8")
        assert noise("--curve", "-o", name).code == 2
        assert Path(name).read_text(encoding="utf-8") == "mine"


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(noise):
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:99])
    assert noise("broken.png").code == 3
    ran = noise("broken.png", "small.png", "-o", "out/")
    assert (ran.code, ran.out) == (1, "out/small-noise.png\n")
    assert "broken.png" in ran.err and "1 of 2" in ran.err
    assert left() == {"broken.png", "out/small-noise.png"}


MISUSE = [
    ([], "no picture"),
    (["missing.png"], "no picture missing.png"),
    (["photo.png", "missing.png"], "no picture missing.png"),
    (["photo.png", "--path", "cosin"], 'did you mean "cosine"?'),
    (["photo.png", "--schedule", "karas"], 'did you mean "karras"?'),
    (["photo.png", "--format", "jif"], 'did you mean "gif"?'),
    (["photo.png", "--set", "shift=3"], 'no option "shift"'),
    (["photo.png", "--set", "kind=flow"], "--path NAME"),
    (["photo.png", "--set", "shift"], "key.path=value"),
    (["photo.png", "--steps", "0"], "--steps"),
    (["photo.png", "--steps", "1001"], "it has 1000"),
    (["photo.png", "--size", "x"], "--size"),
    (["photo.png", "--size", "4"], "--size"),
    (["photo.png", "--seed", "-1"], "--seed"),
    (["photo.png", "--size", "4096"], "too large"),
    (["photo.png", "-o", "strip.tiff"], ".png, .gif, .webp, .html, .csv"),
    (["photo.png", "-o", "strip"], "unknown ending"),
    (["photo.png", "-o", "strip.gif", "--format", "png"], "differ"),
    (["photo.png", "small.png", "-o", "strip.png"], "strip.png/ is a folder"),
    (["photo.png", "./photo.png"], "two pictures"),
    (["photo.png", "-o", "photo.png/strip.png"], "photo.png"),
    (["photo.png", "--curve"], "--curve"),
    (["--curve", "--markov"], "--markov"),
    (["--curve", "--reverse"], "--reverse"),
    (["--curve", "--seed", "1"], "--seed"),
    (["--curve", "-o", "curve.gif"], ".csv, .png, .html"),
    (["--curve", "-o", "."], "is a folder"),
    (["--curve", "--format", "png"], "--output"),
    (["photo.png", "--compare", "flow,edn"], 'did you mean "edm"?'),
    (["photo.png", "--compare", ""], "--compare is empty"),
    (["photo.png", "--compare", "flow,flow"], "with itself"),
    (["photo.png", "--compare", "flow,edm", "--path", "edm"], "--path"),
    (["photo.png", "--compare", "flow,edm", "--reverse"], "--reverse"),
    (["photo.png", "--reverse", "--markov"], "--markov"),
    (["photo.png", "--prompt", "a fox"], "--prompt"),
    (["photo.png", "--latent", "--label", "fox"], "--label"),
    (["photo.png", "--latent", "--path", "flow"], "--path"),
    (["photo.png", "--model", "nowhere"], 'no model "nowhere"'),
    (["photo.png", "--reverse", "--label", "fox"], "has no classes"),
    (["photo.png", "--latent", "--dtype", "fp23"], 'did you mean "fp32"?'),
    (["photo.png", "--latent", "--device", "tpu9"], 'device "tpu9"'),
]


@pytest.mark.parametrize(("arguments", "says"), MISUSE)
def test_misuse_exits_with_2_and_leaves_nothing(noise, arguments, says):
    ran = noise(*arguments)
    assert ran.code == 2
    assert says in ran.err
    assert ran.out == "" and "Traceback" not in ran.err and left() == set()
    assert 1 <= len(ran.err[ran.err.index("error: ") :].splitlines()) <= 3


def test_a_folder_that_cannot_be_made(noise):
    ran = noise("photo.png", "-o", "photo.png/in/")
    assert ran.code == 2 and "photo.png" in ran.err and left() == set()
    os.mkdir("photo-noise.png")
    ran = noise("photo.png", "--overwrite")
    assert ran.code == 2 and "is a folder" in ran.err


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(noise, content):
    Path("photo.png").write_bytes(content)
    ran = noise("photo.png")
    assert ran.code == 3 and ran.out == "" and "photo.png" in ran.err and left() == set()


def test_what_is_no_model_is_refused(noise):
    Path("tiny.safetensors").write_bytes(b"no model")
    for flags in ([], ["--latent"], ["--reverse"]):
        ran = noise("photo.png", "--model", "tiny.safetensors", *flags)
        assert ran.code == 3 and left() == set()


def test_a_full_disk_leaves_nothing(noise, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ran = noise("photo.png")
    assert ran.code == 5 and "disk is full" in ran.err and left() == set()


def test_errors_as_json(noise):
    ran = noise("photo.png", "--path", "cosin", "--json")
    error = ran.object["error"]
    assert (ran.code, error["code"]) == (2, 2)
    assert "cosin" in error["message"] and "cosine" in error["hint"]


def test_quiet_prints_the_result_alone(noise):
    ran = noise("small.png", "--quiet")
    assert (ran.out, ran.err) == ("small-noise.png\n", "")


def test_the_configuration_says_where_each_value_is_from(noise):
    ran = noise("--curve", "--set", "steps=50", "--schedule", "karras", "--print-config", "--json")
    config = ran.object["config"]
    assert config["sd15.steps"] == {"value": 50, "origin": "--set steps=50"}
    assert config["sd15.beta_end"] == {"value": 0.012, "origin": "path sd15"}
    assert config["schedule"]["origin"] == "--schedule" and config["seed"]["origin"] == "default"


def test_a_long_prompt_is_cut_on_the_picture(noise):
    words = "a large red circle " * 40
    ran = noise("small.png", "--reverse", "--prompt", words, "--steps", 2, "--json")
    assert ran.object["prompt"] == words and "of the prompt's" in ran.err
    with Image.open("small-noise.png") as page:
        assert page.width < 1000


def test_help_lists_the_values_of_every_choice(noise, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = noise("--help")
    text = " ".join(ran.out.replace("│", " ").split())
    assert ran.code == 0
    assert ", ".join(PATHS) in text and "png, gif, webp, html, csv" in text
    for name in GRIDS:
        assert name in text
