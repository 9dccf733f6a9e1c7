"""What difftool itself has made is not taken for data."""

from __future__ import annotations

import json

import pytest
from folders import audit, captions_of, lay, pictures
from PIL import Image

from difftool.config.options import read_options
from difftool.data import open_dataset
from difftool.forward.command import figure_of, task_of
from difftool.forward.options import FIGURES, OPTIONS
from difftool.forward.outputs import OUTPUTS
from difftool.images.formats import OWN
from difftool.images.write import encode, encode_png

PICTURE = Image.new("RGB", (12, 10), (9, 90, 200))
TEXT = "a fox\nSteps: 4, Sampler: Euler, Seed: 7, Size: 64x64, Version: difftool-0.1"
FOREIGN = "a fox\nSteps: 4, Sampler: Euler, Seed: 7, Size: 64x64, Version: v1.10.1"
CHUNKS = {"parameters": TEXT, "difftool": "{}"}
MADE = {
    "a.png": encode_png(PICTURE, CHUNKS),
    "grid.png": encode_png(PICTURE, {"parameters": TEXT}),
    "a.jpg": encode(PICTURE, "jpg", CHUNKS, TEXT),
    "a.webp": encode(PICTURE, "webp", CHUNKS, TEXT),
    "photo-noise.png": encode_png(PICTURE, OWN),
}
RUN = {
    "config.yaml": "name: x",
    "metrics.jsonl": json.dumps({"step": 1, "loss": 1.0}),
    "loss.png": encode_png(PICTURE),
    "samples/step-000001.png": encode_png(PICTURE),
    "samples/step-000001.txt": "not a caption",
}


@pytest.mark.parametrize("name", MADE)
def test_pictures_that_difftool_made_are_left_out(tmp_path, name):
    where = lay(tmp_path, {**pictures("x.png"), f"outputs/{name}": MADE[name]})
    assert captions_of(where) == {"x.png": ""}
    assert f"1 picture that difftool made left out: outputs/{name}" in audit(where)
    assert len(captions_of(where, own_pictures=True)) == 2
    assert open_dataset(str(tmp_path / "outputs")).name(0) == name  # nothing else was meant


def test_pictures_of_others_are_not(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures("x.png"),
            "a.png": encode_png(PICTURE, {"parameters": FOREIGN, "Software": "GIMP"}),
            "a.jpg": encode(PICTURE, "jpg", {}, FOREIGN),
        },
    )
    assert set(captions_of(where)) == {"a.jpg", "a.png", "x.png"}


def test_those_that_are_meant_as_data_are_data(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures("img/2_red fox/x.png", "img/2_red fox/y.png"),
            "img/2_red fox/z.png": MADE["a.png"],
            "reg/1_fox/a.png": MADE["a.png"],
            "loose.png": MADE["a.png"],
        },
    )
    names = {"img/2_red fox/x.png", "img/2_red fox/y.png", "img/2_red fox/z.png", "reg/1_fox/a.png"}
    assert set(captions_of(where)) == names
    beside = lay(tmp_path / "b", {**pictures("x.png"), "a.png": MADE["a.png"], "a.txt": "a fox"})
    assert captions_of(beside) == {"a.png": "a fox", "x.png": ""}


@pytest.mark.parametrize("folder", ["runs/photos-001", "deep/er/run", "mine"])
def test_run_folders_are_left_out(tmp_path, folder):
    run = {f"{folder}/{name}": content for name, content in RUN.items()}
    where = lay(tmp_path, {**pictures("x.png", "sub/y.png"), **run})
    assert captions_of(where) == {"sub/y.png": "", "x.png": ""}
    told = audit(where)
    assert f"1 run folder left out: {folder}" in told and "caption file" not in told
    assert len(captions_of(where, own_pictures=True)) == 4
    assert len(captions_of(str(tmp_path / folder / "samples"))) == 1


def test_classes_are_those_of_the_data_alone(tmp_path):
    run = {f"runs/a-001/{name}": content for name, content in RUN.items()}
    made = {"outputs/00000-1.png": MADE["a.png"]}
    where = lay(tmp_path, {**pictures("cats/a.png", "dogs/b.png"), **run, **made})
    assert open_dataset(where).classes == ("cats", "dogs")


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_figures_say_that_they_are_none(tmp_path, kind):
    values = read_options((*FIGURES, *OPTIONS), {"steps": 2, "size": 12})
    figure, _ = figure_of(task_of(values, kind), PICTURE)
    where = lay(tmp_path, {**pictures("x.png"), f"x-noise.{kind}": OUTPUTS[kind].encode(figure)})
    assert captions_of(where) == {"x.png": ""}


def test_a_kohya_file_leaves_them_out_too(tmp_path):
    lay(tmp_path, {**pictures("img/x.png"), "img/x-noise.png": MADE["photo-noise.png"],
                   "reg/a.png": MADE["a.png"]})  # fmt: skip
    subsets = "[[datasets.subsets]]\nimage_dir = '{}'\nis_reg = {}\n"
    text = "[[datasets]]\n" + subsets.format("img", "false") + subsets.format("reg", "true")
    (tmp_path / "d.toml").write_text(text, encoding="utf-8")
    data = open_dataset(str(tmp_path / "d.toml"))
    assert {data.name(i) for i in range(len(data))} == {"img/x.png", "reg/a.png"}
