"""Files of others: pipes, devices, folders and long names end a command at once and in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from difftool.errors import InputError, shortened
from difftool.storage.read import open_file, read_bytes, read_text
from difftool.storage.strict_json import parse_json, read_json


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or a device"):
        open_file(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot read"):
        read_bytes(tmp_path / "pipe", 10)


def test_a_device_and_a_folder_are_no_files(tmp_path):
    for path in (Path(os.devnull), tmp_path):
        with pytest.raises(InputError):
            read_bytes(path, 10)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="too large"):
        read_bytes(path, 4)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read_text(path, 4)
    assert caught.value.why == "it is not UTF-8"


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    """Windows' editors save it, and PowerShell."""
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_text(path, 99) == '{"a": "é"}'
    assert read_json(path) == {"a": "é"}


PIPES = [
    ("sample", "-m", "folder"),
    ("sample", "-m", "pipe"),
    ("sample", "a fox", "--init", "pipe"),
    ("sample", "--from-image", "pipe"),
    ("sample", "--lora", "pipe"),
    ("noise", "pipe"),
    ("convert", "pipe", "out.safetensors", "--to", "difftool"),
    ("convert", "folder", "out.safetensors", "--to", "ldm"),
    ("train", "pipe", "--dry-run"),
    ("train", "photos", "--config", "pipe", "--dry-run"),
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("arguments", PIPES, ids=" ".join)
def test_no_command_waits_for_a_pipe(arguments, difftool, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "model_index.json")
    ran = difftool(*arguments)
    assert ran.code in (2, 3) and "inside difftool" not in ran.err, ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "a fox", "-m", "{long}"),
        ("sample", "a fox", "-o", "{long}.png"),
        ("sample", "a fox", "--init", "{long}.png"),
        ("sample", "a fox", "--lora", "{long}.safetensors"),
        ("sample", "a fox", "--vae", "{long}"),
        ("sample", "--prompts", "{long}"),
        ("sample", "--from-image", "{long}.png"),
        ("noise", "{long}.png"),
        ("noise", "photo.png", "-o", "{long}.png"),
        ("convert", "{long}", "out"),
        ("convert", "model.safetensors", "{long}/a", "--to", "diffusers"),
        ("train", "{long}"),
        ("train", "photos", "--out", "{long}", "--dry-run"),
        ("train", "photos", "--preset", "{long}"),
        ("train", "photos", "--from", "{long}"),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_name_that_no_file_can_have_is_told(arguments, difftool):
    ran = difftool(*(word.format(long="x" * 300) for word in arguments))
    assert ran.code in (2, 3) and "inside difftool" not in ran.err, ran.err


def test_what_a_file_says_of_itself_is_cut_in_messages():
    assert shortened("short\nlines") == "short\nlines"
    assert len(shortened("x" * 10**6)) < 500
    assert len(str(InputError("x" * 10**5, "y" * 10**5))) < 1000


@pytest.mark.parametrize("value", ["{}", "[[[]]]", "1e308", '""'])
def test_json_of_values_without_end_is_refused_before_they_are_made(value):
    text = '{"a": [' + ",".join([value] * 1_100_000) + "]}"
    with pytest.raises(InputError) as caught:
        parse_json(text, "a file")
    assert caught.value.why and "more than 1000000 values" in caught.value.why
