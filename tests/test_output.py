"""Names of pictures, hostile ones too, and files that are never replaced or left half-written."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from difftool.errors import UsageError
from difftool.sampling.files.names import WORDS, expand, slug
from difftool.sampling.output import Output

VALUES: dict[str, Any] = {
    "seed": 7,
    "index": 0,
    "prompt": "a red fox, smiling",
    "negative": "",
    "label": None,
    "steps": 20,
    "guidance": 7.5,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "width": 64,
    "height": 32,
    "model": "shapes",
    "model_hash": "0123456789",
    "date": "2026-01-31",
    "id": 12,
    "init": "photos/red fox.jpg",
    "number": 2,
    "seeds": range(6, 9),
    "clip_skip": 1,
    "strength": 0.75,
}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("word", WORDS)
def test_every_word_has_a_value(word):
    assert re.fullmatch(r"[\w .-]*\.png", expand(f"[{word}].png", VALUES))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("[seed].png", "7.png"),
        ("[seed:06].png", "000007.png"),
        ("[index:03]-[SEED].png", "000-7.png"),
        ("[prompt].png", "a-red-fox-smiling.png"),
        ("[negative]-[label].png", "negative-label.png"),
        ("[width]x[height]-[cfg]-[sampler].png", "64x32-7.5-dpmpp_2m.png"),
        ("[model]/[model_hash]/[date].png", "shapes/0123456789/2026-01-31.png"),
        ("plain [1].png", "plain [1].png"),
        ("[prompt_spaces].png", "a red fox smiling.png"),
        ("[prompt_words]/[generation_number:04].png", "a red fox smiling/0001.png"),
        ("[init]-[id].png", "red-fox-12.png"),
        ("[batch_number] of [batch_size]-[seed_first]-[seed_last].png", "2 of 3-6-8.png"),
        ("[prompt_hash].png", f"{sha256(b'a red fox, smiling').hexdigest()[:8]}.png"),
        ("[prompt_hash<12>].png", f"{sha256(b'a red fox, smiling').hexdigest()[:12]}.png"),
        ("[full_prompt_hash].png", f"{sha256(b'a red fox, smiling ').hexdigest()[:8]}.png"),
        ("[hasprompt<FOX|other><owl|no owl>].png", "FOXno-owl.png"),
        ("a[none][styles].png", "a.png"),
        ("[datetime<year>].png", "year.png"),
    ],
)
def test_templates(template, name):
    assert expand(template, VALUES) == name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("/etc/passwd", "etc-passwd"),
        ("..", "none"),
        ("", "none"),
        ("-rf *", "rf"),
        (".bashrc", "bashrc"),
        ("a\\b:c\x00d\ne", "a-b-c-d-e"),
        ("ﬁancé", "fiancé"),
        ("fiance\u0301", "fiancé"),
        ("狐", "狐"),
        ("微笑的狐狸，在森林里", "微笑的狐狸-在森林里"),
        ("हिन्दी लोमड़ी", "हिन्दी-लोमड़ी"),
        ("Лиса & 🦊!", "Лиса-🦊"),
        ("right\u202egnp.exe", "right-gnp.exe"),
        ("con", "_con"),
        ("COM¹.png", "_COM1.png"),
        ("?!", "none"),
        ("狐" * 300, "狐" * 50),
        ("$(reboot); `x` {0.__class__}", "reboot-x-0.__class"),
        ("x" * 300, "x" * 100),
    ],
)
def test_slugs(value, expected):
    assert slug(value) == expected
    assert re.fullmatch(r'[^\s/\\:*?"<>|$`!&\x00-\x1f\u200b-\u202e]{1,100}', slug(value))
    assert slug(value)[0] not in ".-" and slug(value)[-1] not in ". "
    assert len(os.fsencode(slug(value))) <= 150


def test_long_values_share_the_room_of_a_name():
    values = {**VALUES, "prompt": "狐" * 300, "negative": "犬" * 300}
    name = Output.parse("[prompt]-[negative]-[seed].png").path(values)
    assert name and 100 < len(os.fsencode(name.name)) <= 200 and name.name.endswith("犬-7.png")


def test_dates_in_names():
    before = datetime.now().strftime("%Y%m%d%H%M%S")
    name = expand("[datetime].png", VALUES)
    assert before <= name.removesuffix(".png") <= datetime.now().strftime("%Y%m%d%H%M%S")
    year, month = datetime.now().strftime("%Y %m").split()
    path = Output.parse("out/[datetime<%Y/%m>]/[DateTime<%Y><Asia/Tokyo>]-[seed].png").path(VALUES)
    assert path and path.parent == Path("out", f"{year}-{month}")
    assert re.fullmatch(r"\d{4}-7\.png", path.name)


@pytest.mark.parametrize(
    "where",
    [
        "[sed].png", "[seed.__class__].png[x].png", "[prompt:05].png", "[seed<5>].png",
        "[prompt_hash<65>].png", "[datetime<%Y><Mars/Olympus>].png", "[date<%Y>].png",
    ],
)  # fmt: skip
def test_unknown_fields_are_usage_errors(where):
    with pytest.raises(UsageError):
        Output.parse(where)


def test_the_nearest_field_is_named():
    with pytest.raises(UsageError) as caught:
        Output.parse("[sed].png")
    assert 'did you mean "seed"' in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("where", "many", "path"),
    [
        ("fox.png", False, "fox.png"),
        ("fox.png", True, "fox-0003.png"),
        ("a/b/fox.JPG", False, "a/b/fox.JPG"),
        ("out/[prompt]/[seed].webp", True, "out/a-red-fox-smiling/7.webp"),
        ("[1].png", True, "[1]-0003.png"),
    ],
)
def test_files_and_templates(where, many, path):
    assert Output.parse(where, many=many).path({**VALUES, "index": 3}) == Path(path)


@pytest.mark.parametrize("where", [None, "out/", "there"])
def test_folders_number_their_pictures(where):
    Path("there").mkdir()
    output = Output.parse(where)
    assert output.path(VALUES) is None
    folder = where.rstrip("/") if where else "outputs"
    assert output.write(b"1", None, 7) == Path(folder, "00000-7.png")
    assert output.write(b"2", None, 7) == Path(folder, "00001-7.png")
    Path(folder, "00041-grid.png").touch()
    Path(folder, "junk-99999-1.png").touch()
    assert output.write(b"3", None, 8) == Path(folder, "00042-8.png")


@pytest.mark.parametrize("where", ["out", "fox.gif", "fox.png.bak", ".png"])
def test_what_is_no_picture_name_is_refused(where):
    with pytest.raises(UsageError):
        Output.parse(where)


def test_format_and_ending_must_agree():
    assert Output.parse("out/", format="webp").format == "webp"
    assert Output.parse("x.jpeg").format == "jpg"
    with pytest.raises(UsageError):
        Output.parse("x.png", format="jpg")


def test_parallel_writers_never_share_a_number():
    def write(seed: int) -> Path | None:
        return Output.parse("out/").write(str(seed).encode(), None, seed)

    with ThreadPoolExecutor(8) as pool:
        paths = [path for path in pool.map(write, range(64)) if path]
    assert sorted(path.name[:5] for path in paths) == [f"{n:05d}" for n in range(64)]
    assert {p.read_text(encoding="utf-8") for p in paths} == {str(n) for n in range(64)}
    assert len(os.listdir("out")) == 64


def test_nothing_is_replaced_unasked():
    Path("fox.png").write_text("old", encoding="utf-8")
    with pytest.raises(UsageError, match="exists"):
        Output.parse("fox.png")
    assert Path("fox.png").read_text(encoding="utf-8") == "old"
    output = Output.parse("fox.png", overwrite=True)
    output.write(b"new", output.path(VALUES), 7)
    assert Path("fox.png").read_text(encoding="utf-8") == "new"
    skipping = Output.parse("fox.png", skip_existing=True)
    assert skipping.path(VALUES) == Path("fox.png")
    assert os.listdir() == ["fox.png"]


def test_a_picture_that_appears_meanwhile_is_kept():
    output = Output.parse("[seed].png")
    path = output.path(VALUES)
    Path("7.png").write_text("theirs", encoding="utf-8")
    with pytest.raises(UsageError, match="there already"):
        output.write(b"ours", path, 7)
    assert Path("7.png").read_text(encoding="utf-8") == "theirs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_are_not_followed(overwrite):
    Path("target").write_text("precious", encoding="utf-8")
    os.symlink("target", "fox.png")
    os.symlink("nowhere", "dog.png")
    for name in ("fox.png", "dog.png"):
        if overwrite:
            Output.parse(name, overwrite=True).write(b"new", Path(name), 7)
            assert not Path(name).is_symlink()
        else:
            with pytest.raises(UsageError, match="there already"):
                Output(root=Path()).write(b"new", Path(name), 7)
    assert Path("target").read_text(encoding="utf-8") == "precious" and not Path("nowhere").exists()


@pytest.mark.parametrize(
    "out",
    [
        "../fox.png", "a/../../fox.png", "/tmp/fox.png", "a//fox.png", "./fox.png", ".fox.png",
        "-fox.png", "c:fox.png", "a\\fox.png", "fox\n.png", "con.png", "a/nul.x/fox.png", "fox",
        "fox.gif", "fox.jpg", "a./fox.png", "fox.png ", "fox.png/", "[nope].png", "x" * 250 + ".png"
    ],
)  # fmt: skip
def test_hostile_names_of_requests(out):
    output = Output.parse("out/")
    with pytest.raises(UsageError):
        output.path(VALUES, out)
    assert os.listdir() == []


def test_names_of_requests_lie_below_the_folder():
    output = Output.parse("out/")
    assert output.path(VALUES, "ä b/[seed:04].png") == Path("out/ä b/0007.png")
    path = output.path(VALUES, "a/fox.png")
    assert output.write(b"1", path, 7) == Path("out/a/fox.png")
    assert Path("out/a/fox.png").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["link/fox.png", "link/new/fox.png"])
def test_links_out_of_the_folder_are_refused(name):
    Path("outside").mkdir()
    Path("out").mkdir()
    os.symlink("../outside", "out/link")
    output = Output.parse("out/")
    with pytest.raises(UsageError, match="leads out of"):
        output.write(b"1", output.path(VALUES, name), 7)
    assert os.listdir("outside") == []


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("out/{seed}.png", "[seed]"),
        ("{index:04}.png", "[index]"),
        ("%04d.png", "[index]"),
        ("%(seed)d.png", "[seed]"),
    ],
)
def test_fields_of_other_tools_are_answered(where, hint):
    with pytest.raises(UsageError) as caught:
        Output.parse(where)
    assert caught.value.hint == f"write {hint}"
    Output.parse("50% of {it}.png")


def test_a_template_cannot_climb():
    output = Output.parse("out/[prompt]/../../[seed].png")
    with pytest.raises(UsageError, match="leads out of"):
        output.write(b"1", output.path(VALUES), 7)


def test_a_folder_that_is_a_file_is_a_usage_error():
    Path("out").touch()
    output = Output.parse("out/[seed].png")
    with pytest.raises(UsageError, match="cannot make the folder"):
        output.write(b"1", output.path(VALUES), 7)


@pytest.mark.parametrize(
    ("where", "many", "path"),
    [
        ("castle.png", True, "castle-grid.png"),
        ("out/[seed:06].webp", True, "out/grid.webp"),
        ("out/fox_[seed]_[index].png", True, "out/fox-grid.png"),
        ("out/", True, None),
        (None, True, None),
    ],
)
def test_sheets(where, many, path):
    assert Output.parse(where, many=many).sheet_path() == (Path(path) if path else None)
    if path:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
        with pytest.raises(UsageError, match="exists"):
            Output.parse(where, many=many).sheet_path()
