"""`difftool noise` from end to end."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from difftool.cli import console
from difftool.cli.app import main
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS, build_path

ROW = ["index", "t", "alpha", "sigma", "log_snr"]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict]:
        return [json.loads(line, parse_constant=pytest.fail) for line in self.out.splitlines()]


@pytest.fixture
def noise(tmp_path, monkeypatch, capsys):
    """Run `difftool noise` in a folder with photo.png (40x30) and small.png (8x8)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "mode", console.Mode())
    rng = np.random.default_rng(0)
    for name, size in (("photo", (30, 40, 3)), ("small", (8, 8, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(f"{name}.png")

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["difftool", "noise", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Ran(stopped.value.code, captured.out, captured.err)

    return run


def left() -> set[str]:
    """Every file in the working folder but the two pictures."""
    files = {str(path) for path in Path().rglob("*") if path.is_file()}
    return files - {"photo.png", "small.png"}


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
    (found,) = ran.objects
    assert ran.code == 0
    assert found["schema"] == 1 and found["path"] == "small-noise.png"
    assert (found["image"], found["width"], found["height"]) == ("small.png", 8, 8)
    assert found["noise_path"] == name
    assert [row["index"] for row in found["levels"]] == list(range(5))
    for row in found["levels"]:
        level = build_path({"kind": name}).level(row["t"])
        assert list(row) == ROW
        assert (row["alpha"], row["sigma"]) == level[1:]


def test_options_of_a_path(noise):
    ran = noise(
        "--curve", "--path", "linear", "--set", "steps=50", "--set", "beta_end=0.1", "--json"
    )
    rows = ran.objects[0]["rows"]
    expected = build_path({"kind": "linear", "steps": 50, "beta_end": 0.1})
    assert [row["alpha"] for row in rows] == [expected.level(t).alpha for t in range(50)]
    # Defaults follow a path that is shorter than they are.
    assert noise("--curve", "--set", "steps=5").out.count("\n") == 6
    assert noise("small.png", "--set", "steps=5").code == 0


def test_the_curve_as_csv_has_the_whole_table(noise):
    ran = noise("--curve", "--path", "sd21-zsnr", "-o", "curve.csv")
    assert (ran.code, ran.out) == (0, "curve.csv\n")
    with open("curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ROW
    assert len(rows) == 1000
    assert float(rows[-1]["alpha"]) == 0 and rows[-1]["log_snr"] == "-inf"
    listed = noise("--curve", "--path", "sd21-zsnr", "--json").objects[0]["rows"]
    assert [row["alpha"] for row in listed] == [float(row["alpha"]) for row in rows]
    assert listed[-1]["log_snr"] is None


def test_the_curve_as_a_table(noise):
    ran = noise("--curve")
    lines = ran.out.splitlines()
    assert lines[0].split() == [*ROW, "SNR", "dB"]
    assert len(lines) == 22 and lines[-1].split()[:2] == ["20", "999"]
    assert "--json" in ran.err


@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"explicit", "ays", "sd3", "flow_dpm"}))
def test_the_levels_that_a_sampler_visits(noise, name):
    ran = noise("--curve", "--schedule", name, "--steps", 7, "--json")
    expected = GRIDS[name](build_path({"kind": "sd15"}), 7)
    assert ran.code == 0
    found = [(row["t"], row["alpha"], row["sigma"]) for row in ran.objects[0]["rows"]]
    assert found == [tuple(level) for level in expected]


def test_a_strip_of_a_samplers_levels_from_clean_to_noisy(noise):
    ran = noise("small.png", "--schedule", "karras", "--steps", 4, "--json")
    sigmas = [row["sigma"] for row in ran.objects[0]["levels"]]
    assert len(sigmas) == 5 and sigmas == sorted(sigmas) and sigmas[0] == 0


def test_the_chain(noise):
    ran = noise("photo.png", "--markov", "--steps", 3, "--json")
    chain = ran.objects[0]["chain"]
    assert chain["transitions"] == 1000
    assert 0 < chain["mean"] < 0.1 and 0 < chain["std"] < 0.1
    with Image.open("photo-noise.png") as both:
        assert noise("photo.png", "--steps", 3, "-o", "one.png").code == 0
        with Image.open("one.png") as one:
            assert both.height > 1.5 * one.height


def test_a_comparison(noise):
    names = ["linear", "sd15", "flow"]
    ran = noise("small.png", "--compare", ",".join(names), "--steps", 3, "--json")
    found = ran.objects[0]
    assert list(found["noise_paths"]) == names
    assert [len(rows) for rows in found["noise_paths"].values()] == [3, 3, 3]


def test_size_is_the_longest_side(noise):
    found = noise("photo.png", "--size", 20, "--json").objects[0]
    assert (found["width"], found["height"]) == (20, 15)


def test_nothing_is_overwritten_unasked(noise):
    Path("photo-noise.png").write_text("mine")
    ran = noise("photo.png")
    assert ran.code == 2 and "--overwrite" in ran.err and ran.out == ""
    assert Path("photo-noise.png").read_text() == "mine"
    assert noise("photo.png", "--overwrite").code == 0
    assert Path("photo-noise.png").read_bytes().startswith(b"\x89PNG")
    Path("curve.csv").write_text("mine")
    assert noise("--curve", "-o", "curve.csv").code == 2
    assert Path("curve.csv").read_text() == "mine"


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(noise):
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:99])
    assert noise("broken.png").code == 3
    ran = noise("broken.png", "small.png", "-o", "out/")
    assert (ran.code, ran.out) == (1, "out/small-noise.png\n")
    assert "broken.png" in ran.err and "1 of 2" in ran.err
    assert left() == {"broken.png", "out/small-noise.png"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no picture"),
        (["missing.png"], "missing.png does not exist"),
        (["photo.png", "missing.png"], "missing.png does not exist"),
        (["photo.png", "--path", "cosin"], 'did you mean "cosine"?'),
        (["photo.png", "--schedule", "karas"], 'did you mean "karras"?'),
        (["photo.png", "--set", "shift=3"], 'no option "shift"'),
        (["photo.png", "--set", "kind=flow"], "--path NAME"),
        (["photo.png", "--set", "shift"], "key.path=value"),
        (["photo.png", "--steps", "0"], "--steps"),
        (["photo.png", "--steps", "1001"], "it has 1000"),
        (["photo.png", "--size", "x"], "--size"),
        (["photo.png", "--seed", "-1"], "--seed"),
        (["photo.png", "--size", "4096"], "too large"),
        (["photo.png", "-o", "strip.tiff"], ".png"),
        (["photo.png", "small.png", "-o", "strip.png"], "strip.png/ is a folder"),
        (["photo.png", "./photo.png"], "two pictures"),
        (["photo.png", "-o", "photo.png/strip.png"], "cannot make the folder"),
        (["photo.png", "--curve"], "--curve"),
        (["--curve", "--markov"], "--markov"),
        (["--curve", "--seed", "1"], "--seed"),
        (["--curve", "-o", "curve.png"], ".csv"),
        (["photo.png", "--compare", "flow,edn"], 'did you mean "edm"?'),
        (["photo.png", "--compare", "flow,edm", "--path", "edm"], "--path"),
    ],
)
def test_misuse_exits_with_2_and_leaves_nothing(noise, arguments, says):
    ran = noise(*arguments)
    assert ran.code == 2
    assert says in ran.err
    assert ran.out == "" and "Traceback" not in ran.err and left() == set()


def test_errors_as_json(noise):
    ran = noise("photo.png", "--path", "cosin", "--json")
    error = ran.objects[0]["error"]
    assert (ran.code, error["code"]) == (2, 2)
    assert "cosin" in error["message"] and "cosine" in error["hint"]


def test_quiet_prints_the_result_alone(noise):
    ran = noise("small.png", "--quiet")
    assert (ran.out, ran.err) == ("small-noise.png\n", "")


def test_help_lists_the_values_of_every_choice(noise, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = noise("--help")
    text = " ".join(ran.out.replace("│", " ").split())
    assert ran.code == 0
    assert ", ".join(PATHS) in text
    for name in GRIDS:
        assert name in text
