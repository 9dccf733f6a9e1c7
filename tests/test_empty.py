"""Empty values, which are what variables of a shell that are not set come to: always exit 2."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import difftool
from difftool.cli.app import COMMANDS, main
from difftool.config.options import Option
from difftool.data import open_dataset
from difftool.errors import InputError, UsageError
from difftool.sampling.requests import parse_line

FIRST = {
    "train": ["photos"],
    "sample": ["a fox"],
    "noise": ["p.png"],
    "convert": ["emoji", "made"],
}
"""Arguments that each command is content with."""


def cases() -> list:
    """Every option of every command that takes a text."""
    found = []
    for command in COMMANDS:
        for row in import_module(f"difftool.cli.{command}").ROWS:
            if row.type is not bool and not row.blank and row.name != "list":
                found.append(pytest.param(command, row, id=f"{command} {row.flag}"))
    return found


@pytest.mark.parametrize(("command", "row"), cases())
def test_an_empty_value_is_refused_by_name(
    tmp_path, monkeypatch, capsys, command: str, row: Option
):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for path in ("p.png", "photos/a.png"):
        Image.new("RGB", (16, 16)).save(path)
    words = FIRST[command] if not row.argument else []
    given = [""] if row.argument else [row.flag, ""]
    if row.name == "target":
        words = ["emoji"]
    monkeypatch.setattr(sys, "argv", ["difftool", command, *words, *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    with pytest.raises(UsageError, match="is empty"):
        row.value([" "] if row.many else " ")
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert f"error: {row.flag} is empty" in error
    assert sorted(map(str, Path().rglob("*"))) == ["p.png", "photos", "photos/a.png"]


def test_no_prompt_is_a_prompt():
    blank = {
        f"{command} {row.flag}"
        for command in COMMANDS
        for row in import_module(f"difftool.cli.{command}").ROWS
        if row.blank
    }
    assert blank == {
        "sample PROMPT", "sample --negative", "noise --prompt", "train --sample-prompt",
    }  # fmt: skip


@pytest.mark.parametrize(
    "call",
    [
        lambda: difftool.load(""),
        lambda: difftool.load(lora=[""]),
        lambda: difftool.load(lora=[":0.5"]),
        lambda: difftool.load(vae=""),
        lambda: difftool.load(embedding=[""]),
        lambda: difftool.train(""),
        lambda: difftool.train("shapes", out=""),
        lambda: difftool.convert("", "made"),
        lambda: difftool.convert("emoji", "", to="ldm"),
        lambda: difftool.noise(""),
        lambda: difftool.inspect(""),
        lambda: difftool.inspect("a\0b"),
    ],
)
def test_the_library_refuses_them_too(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(difftool.UsageError, match=r"empty|names no file|NUL"):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["noise", "photos"], "photos is a folder and no picture"),
        (["sample", "a fox", "--init", "photos"], "the folder photos holds no picture"),
        (["sample", "--from-image", "photos"], "photos is a folder and no picture"),
        (["sample", "a fox", "--embedding", "photos"], "photos is a folder and no embedding"),
    ],
)
def test_a_folder_is_not_there_for_a_picture(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    monkeypatch.setattr(sys, "argv", ["difftool", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("key", ["init_images", "init", "mask", "sampler_name", "label", "out"])
@pytest.mark.parametrize("value", ['""', '[""]', '"a\\u0000b"'])
def test_so_do_lines_of_json(key, value):
    with pytest.raises(UsageError):
        parse_line(f'{{"prompt": "a", "{key}": {value}}}')
    assert parse_line('{"prompt": "", "negative_prompt": ""}')


@pytest.mark.parametrize("key", ["image_dir", "metadata_file", "caption_extension"])
def test_so_do_files_of_kohya(tmp_path, key):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    lines = ["[[datasets]]", "[[datasets.subsets]]", f"{key} = ''"]
    lines += [] if key == "image_dir" else ["image_dir = '.'"]
    (tmp_path / "d.toml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=f"{key} is empty"):
        open_dataset(str(tmp_path / "d.toml"))
