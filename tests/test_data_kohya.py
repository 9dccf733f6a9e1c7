"""kohya's folders, JSON metadata and TOML files, as users of sd-scripts have them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from folders import audit, captions_of, lay, pictures

from difftool.config.schema import DataConfig
from difftool.data import Dataset, open_dataset
from difftool.errors import InputError, UsageError


def seen(data: Dataset) -> dict[str, int]:
    """How often each picture is seen in an epoch."""
    return dict(Counter(map(data.name, range(len(data)))))


def test_a_gui_project_with_regularisation(tmp_path):
    where = lay(
        tmp_path,
        {
            **pictures("img/3_sks dog/a.png", "img/3_sks dog/b.png"),
            **pictures("reg/1_dog/r0.png", "reg/1_dog/r1.png", "reg/1_dog/r2.png"),
            "img/3_sks dog/a.txt": "a photo of sks dog",
            "log/events.log": "x",
            "model/config.json": "{}",
        },
    )
    data = open_dataset(where)
    counts = seen(data)
    assert counts["img/3_sks dog/a.png"] == counts["img/3_sks dog/b.png"] == 3
    assert [counts[f"reg/1_dog/r{i}.png"] for i in range(3)] == [2, 2, 2]
    assert captions_of(where)["img/3_sks dog/b.png"] == "sks dog"
    assert captions_of(where)["reg/1_dog/r0.png"] == "dog"
    told = audit(where)
    assert "3 regularisation images" in told and "to 6 samples" in told
    assert '"1_dog" x1, "3_sks dog" x3' in told


def test_more_regularisation_than_pictures(tmp_path):
    where = lay(tmp_path, pictures("2_a/x.png", "reg/1_b/0.png", "reg/1_b/1.png", "reg/1_b/2.png"))
    assert seen(open_dataset(where)) == {"2_a/x.png": 2, "reg/1_b/0.png": 1, "reg/1_b/1.png": 1}
    assert "1 not used, as there are too many" in audit(where)


def test_a_lone_folder_around_the_others_means_nothing(tmp_path):
    where = lay(tmp_path, pictures("dataset/img/2_red fox/a.png", "dataset/img/1_dog/b.png"))
    assert seen(open_dataset(where)) == {
        "dataset/img/2_red fox/a.png": 2, "dataset/img/1_dog/b.png": 1,
    }  # fmt: skip


def test_years_and_classes_with_a_number_are_pointed_out(tmp_path):
    where = lay(tmp_path, pictures("2021_berlin/a.png", "0_cat/b.png"))
    told = audit(where)
    assert '"2021_berlin" is read as 2021 repeats' in told
    assert "0 repeats: 1 image not used" in told and "--labels folders" in told
    assert open_dataset(where, DataConfig(labels="folders")).classes == ("0_cat", "2021_berlin")


@pytest.mark.parametrize("name", ["meta_cap.json", "meta_lat.json", "metadata.json"])
def test_json_metadata(tmp_path, name):
    table = {
        "/home/me/train/x/a.png": {"caption": "a cat\na kitten", "tags": "fur, paws"},
        "x\\b": {"caption": "a dog", "train_resolution": [512, 512]},
        "/home/me/train/y/b.png": {"tags": "tree, sky"},
        "/elsewhere/gone.png": {"caption": "nothing"},
    }
    files = pictures("x/a.png", "x/b.png", "y/b.png", "y/c.png")
    where = lay(tmp_path, {**files, name: json.dumps(table)})
    captions = captions_of(where)
    assert captions["x/a.png"] in ("a cat, fur, paws", "a kitten, fur, paws")
    assert captions["x/b.png"] == "a dog" and captions["y/b.png"] == "tree, sky"
    assert captions["y/c.png"] == ""
    told = audit(where)
    assert f"captions: 3 from {name}, 1 without" in told
    assert f"{name} names 1 picture that are not there" in told


def test_ambiguous_names_in_json_metadata_match_nothing(tmp_path):
    files = pictures("x/a.png", "y/a.png", "y/b.png")
    table = {"a": {"caption": "which?"}, "b": {"caption": "this"}}
    where = lay(tmp_path, {**files, "meta_cap.json": json.dumps(table)})
    assert captions_of(where) == {"x/a.png": "", "y/a.png": "", "y/b.png": "this"}
    wrong = json.dumps({"a": {"caption": "which?"}})
    with pytest.raises(InputError, match="names no picture"):
        open_dataset(lay(tmp_path, {"meta_cap.json": wrong}))


def test_a_name_does_not_fill_the_memory(tmp_path):
    where = lay(tmp_path, pictures(*(f"999999_x/{i}.png" for i in range(11))))
    with pytest.raises(InputError, match="too often") as error:
        open_dataset(where)
    assert error.value.why and "10,999,989 samples" in error.value.why


# --- TOML ------------------------------------------------------------------------------------

DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"

[[datasets]]
resolution = [512, 512]
batch_size = 4
enable_bucket = true
bucket_no_upscale = true

  [[datasets.subsets]]
  image_dir = "fox"
  num_repeats = 2
  class_tokens = "sks fox"

  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  class_tokens = "fox"
  shuffle_caption = false
"""


def project(root: Path, toml: str = DATASET) -> str:
    files = pictures("fox/a.png", "fox/b.png", "fox/deeper/c.png", "reg/r.png")
    lay(root, {**files, "fox/a.txt": "fox, grass, sky\nanother line", "set.toml": toml})
    return str(root / "set.toml")


def test_a_toml_file(tmp_path):
    where = project(tmp_path)
    data = open_dataset(where)
    assert data.kind == "text" and data.native_size == 512
    assert seen(data) == {"fox/a.png": 2, "fox/b.png": 2, "reg/r.png": 4}
    assert data.asked == {"size": 512, "batch_size": 4}
    drawn = {text for key in range(40) for text in data.captions([0], [key])}
    assert drawn == {"fox, grass, sky", "fox, sky, grass"}
    captions = captions_of(where)
    assert captions["fox/b.png"] == "sks fox" and captions["reg/r.png"] == "fox"
    told = audit(where)
    assert "captions: 1 from .txt, 2 from class_tokens" in told
    assert "1 image in deeper folders not used" in told
    assert "size = 512, batch_size = 4" in told and "enable_bucket" in told
    assert "the first is used, wildcards are off" in told


def test_wildcards_prefix_and_dropout_of_a_toml_file(tmp_path):
    toml = """
    [[datasets]]
    [[datasets.subsets]]
    image_dir = "fox"
    caption_extension = ".txt"
    enable_wildcard = true
    caption_prefix = "photo,"
    caption_dropout_rate = 0.5
    random_crop = true
    flip_aug = true
    """
    data = open_dataset(project(tmp_path, toml))
    drawn = Counter(data.captions([0] * 300, range(300)))
    assert set(drawn) == {"photo, fox, grass, sky", "photo, another line", ""}
    assert 110 < drawn[""] < 190
    assert not data.fixed and data.asked == {"flip": True}


def test_the_default_caption_extension_falls_back_to_txt(tmp_path):
    toml = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "fox"\n'
    assert captions_of(project(tmp_path, toml))["fox/a.png"] == "fox, grass, sky"
    assert "no .caption beside some pictures: .txt is read" in audit(str(tmp_path / "set.toml"))


def test_a_metadata_file_of_a_subset(tmp_path):
    toml = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "fox"\nmetadata_file = "cap.json"\n'
    lay(tmp_path, {"cap.json": json.dumps({"/data/fox/b.png": {"caption": "from json"}})})
    where = project(tmp_path, toml)
    assert captions_of(where) == {"fox/a.png": "fox, grass, sky", "fox/b.png": "from json"}
    (tmp_path / "cap.json").write_text("{}")
    with pytest.raises(InputError, match=r"cap\.json has no captions"):
        open_dataset(where)
    (tmp_path / "cap.json").unlink()
    with pytest.raises(UsageError, match=r"cap\.json does not exist"):
        open_dataset(where)


def test_folders_of_one_name_are_told_apart(tmp_path):
    lay(tmp_path, pictures("x/img/a.png", "y/img/a.png"))
    subsets = "".join(f'[[datasets.subsets]]\nimage_dir = "{d}/img"\n' for d in "xy")
    lay(tmp_path, {"set.toml": f"[[datasets]]\n{subsets}"})
    assert seen(open_dataset(str(tmp_path / "set.toml"))) == {"img/a.png": 1, "img'/a.png": 1}


def test_unknown_keys_are_named(tmp_path):
    toml = DATASET.replace("batch_size = 4", "batch_size = 4\nbach_size = 3\ncache_info = true")
    told = audit(project(tmp_path, toml + "\n[extra]\n"))
    assert "keys not known and not used: bach_size, extra" in told


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("batch_size = 4", "color_aug = true", "cannot do"),
        ("batch_size = 4", "alpha_mask = true", "cannot do"),
        ("[512, 512]", "[512, 768]", "cannot do"),
        ("[512, 512]", '"512"', "resolution is not valid"),
        ("[512, 512]", "[512, 512, 512]", "resolution is not valid"),
        ("num_repeats = 2", "num_repeats = true", "num_repeats is not valid"),
        ("num_repeats = 2", "num_repeats = -1", "num_repeats is negative"),
        ('image_dir = "fox"', "", "no image_dir"),
        ("num_repeats = 2", "flip_aug = true", "flip_aug differs"),
        ("num_repeats = 2", "is_reg = true", "regularisation images alone"),
        ("[[datasets.subsets]]", "[[datasets.subset]]", "has no"),
        ("[general]", "general = 3\n[other]", "not a table"),
        ("[general]", "[general", "not TOML"),
        ("[general]", "general = '\0'", "NUL"),
    ],
)
def test_what_a_toml_file_may_not_say(tmp_path, old, new, what):
    with pytest.raises(InputError, match=what) as error:
        open_dataset(project(tmp_path, DATASET.replace(old, new)))
    assert "set.toml" in error.value.what


def test_a_missing_folder_of_a_toml_file(tmp_path):
    with pytest.raises(UsageError, match="no folder nowhere"):
        open_dataset(project(tmp_path, DATASET.replace('"fox"', '"nowhere"')))
