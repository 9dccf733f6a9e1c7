"""Files that a picture's metadata name: written so that they are found again, and opened only
where they lie in its folder or the user trusts it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hangs import ends
from PIL import Image
from safetensors.torch import save_file

from difftool.adapters.lora.file import lora_hash
from difftool.config.options import read_options
from difftool.errors import InputError, UsageError
from difftool.sampling.command import prepare
from difftool.sampling.metadata.chunk import from_chunk
from difftool.sampling.metadata.files import encode, texts
from difftool.sampling.metadata.named import digest_of, written
from difftool.sampling.requests import Request
from difftool.sampling.settings import OPTIONS


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """In a folder with pictures in `shared`, which hold none of what lies beside."""
    (tmp_path / "work/shared/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")


def put(path: str, shade: int = 1) -> str:
    """A file of that name, a LoRA or a picture; its hash."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".safetensors"):
        save_file({"x": torch.full((2,), float(shade))}, path)
        return lora_hash(Path(path))
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    return digest_of("init", path)


def naming(hashes: dict[str, Any] | None = None, /, **files: Any) -> Path:
    """A picture that names these files."""
    asked = {"prompt": "a fox", "negative": "", "label": None, "seed": 1, **files}
    asked |= {"hashes": hashes} if hashes else {}
    picture = Path("shared/fox.png")
    told = texts(None, {"request": asked, "preset": {"sample": {}}})
    picture.write_bytes(encode(Image.new("RGB", (8, 8)), "png", told))
    return picture


def made_from(picture: Path, **options: Any) -> Request:
    """What is asked for with --from-image."""
    return prepare(read_options(OPTIONS, {"from_image": picture, **options})).base


def refused(picture: Path, **options: Any) -> str:
    """What is said instead."""
    with pytest.raises(UsageError) as error:
        made_from(picture, **options)
    return str(error.value)


OPTIONS_OF = {"init": "init", "mask": "mask", "image_prompt": "image_prompt"}
OPTIONS_OF |= {"embeddings": "embedding", "loras": "lora"}


def named(key: str, path: str) -> Any:
    return {"embeddings": [path], "loras": [[path, 0.5]]}.get(key, path)


@pytest.mark.parametrize("key", OPTIONS_OF)
@pytest.mark.parametrize("form", ["above", "absolute", "from here", "link"])
def test_what_lies_outside_of_the_picture_s_folder_needs_trust(key, form):
    ending = ".safetensors" if key in ("loras", "embeddings") else ".png"
    put(f"other{ending}")
    path = {"above": f"../other{ending}", "absolute": os.path.abspath(f"other{ending}")}.get(form)
    path = path or f"other{ending}"
    if form == "link":
        (Path("shared") / path).symlink_to(os.path.abspath(f"other{ending}"))
    picture = naming(**{key: named(key, path)})
    option = OPTIONS_OF[key]
    flag = f"--{option.replace('_', '-')}"
    said = refused(picture)
    assert "outside of its folder" in said and path in said and flag in said
    assert "--trust-image" in said
    request = made_from(picture, trust_image=True)
    assert f"other{ending}" in request.opened and flag in request.opened
    put(f"mine{ending}")
    own = made_from(picture, **{option: f"mine{ending}"})
    assert own.opened == ""


def test_every_file_is_listed_and_none_of_it_is_read(monkeypatch):
    files = {"init": "../a.png", "mask": "/etc/b.png", "loras": [["../c.safetensors", 1.0]]}
    put("a.png")
    put("c.safetensors")
    picture = naming(None, embeddings=["//server/share/d.pt", "\\\\server\\e.pt"], **files)
    looked_at: list[str] = []
    monkeypatch.setattr(os.path, "exists", lambda path: not looked_at.append(str(path)))
    said = refused(picture)
    assert all(name in said for name in ("../a.png", "/etc/b.png", "../c.safetensors", "/d.pt"))
    assert "\\\\server\\e.pt" in said or os.name != "nt"
    assert not any("server" in path and path.startswith("//") for path in looked_at)


def test_a_name_cannot_write_to_the_terminal_or_hide_others():
    put("a\n  b.png")
    said = refused(naming(init="../a\n  b.png", mask="/x" + "y" * 5_000))
    assert "'../a\\n  b.png'" in said and len(said) < 1_000
    with pytest.raises(InputError):
        made_from(naming(embeddings=["a.pt"] * 5_000))


@pytest.mark.parametrize("path", ["hill.png", "sub/hill.png", "sub\\hill.png"])
def test_what_lies_in_the_picture_s_folder_is_opened(path):
    put("shared/" + path.replace("\\", "/"))
    request = made_from(naming(init=path))
    assert Path(request.init or "") == Path("shared", *path.replace("\\", "/").split("/"))
    assert (
        request.opened.endswith(f"names them: picture {request.init} (--init)")
        and not request.changed
    )


def test_files_are_found_by_name_and_hash():
    digest = put("shared/elsewhere.png")
    by_hash = made_from(naming({"init": digest}, init="hill.png"))
    assert Path(by_hash.init or "") == Path("shared/elsewhere.png")
    put("shared/hill.png", 2)
    other = made_from(naming({"init": digest}, init="hill.png"))
    assert Path(other.init or "") == Path("shared/elsewhere.png"), "the same one goes before"
    Path("shared/elsewhere.png").unlink()
    changed = made_from(naming({"init": digest}, init="hill.png"))
    assert Path(changed.init or "") == Path("shared/hill.png")
    assert "is not as it was" in changed.changed[0]
    lora = put("loras/ink.safetensors")
    picture = naming({"loras": [lora]}, loras=[["pen.safetensors", 0.5]])
    said = refused(picture)
    assert all(word in said for word in ("there is no LoRA", lora, "--lora", "--trust-image"))
    assert made_from(picture, trust_image=True).loras == (
        (os.path.join("loras", "ink.safetensors"), 0.5),
    )
    put("pen.safetensors", 3)
    assert "outside" in refused(picture), "that of its name in the working folder"


def test_two_files_of_one_name_are_told_apart_by_their_hashes():
    digests = [put(f"shared/loras/{name}.safetensors", i) for i, name in enumerate("ab")]
    picture = naming({"loras": digests}, loras=[["v.safetensors", 0.5], ["v.safetensors", 0.7]])
    names = [(Path(path).name, weight) for path, weight in made_from(picture).loras]
    assert names == [("a.safetensors", 0.5), ("b.safetensors", 0.7)]


def test_a_folder_is_looked_through_once_for_all_that_is_named():
    for i in range(300):
        Path(f"shared/{i}.pt").write_bytes(bytes([i % 256]))
    names = [f"none{i}.pt" for i in range(100)]
    picture = naming({"embeddings": ["0123456789ab"] * 100}, embeddings=names)
    with ends():
        assert "none0.pt" in refused(picture)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes in folders")
def test_a_pipe_is_not_waited_for():
    os.mkfifo("shared/hill.png")
    request = made_from(naming({"init": "0123456789ab"}, init="hill.png"))
    assert "is not as it was" in request.changed[0]


def test_the_hash_of_a_file_that_the_user_gives_is_its_own():
    put("shared/hill.png")
    request = made_from(naming({"init": "0123456789ab"}, init="hill.png"), init="shared/hill.png")
    assert not request.hashes and not request.changed


def test_what_is_nowhere_is_named_with_its_hash_and_its_option():
    for trusted in (False, True):
        said = refused(
            naming({"mask": "0123456789ab"}, mask="none.png"), trust_image=trusted or None
        )
        assert all(word in said for word in ("none.png", "0123456789ab", "--mask"))
        assert ("--trust-image" in said) != trusted


def test_a_lora_of_another_tool_s_picture_is_no_link_out_of_the_folders():
    outside = Path("../outside").absolute()
    put(str(outside / "ink.safetensors"))
    Path("loras").mkdir()
    Path("loras/ink.safetensors").symlink_to(outside / "ink.safetensors")
    text = "a <lora:ink:0.5> fox\nSteps: 2, Sampler: Euler, Seed: 5"
    Path("shared/a.png").write_bytes(encode(Image.new("RGB", (8, 8)), "png", texts(text, None)))
    assert "ink.safetensors" in refused(Path("shared/a.png"))
    ((path, weight),) = made_from(Path("shared/a.png"), trust_image=True).loras
    assert Path(path).name == "ink.safetensors" and weight == 0.5
    Path("loras/ink.safetensors").unlink()
    put("loras/ink.safetensors")
    assert made_from(Path("shared/a.png")).loras


def test_trust_is_about_a_picture():
    with pytest.raises(UsageError, match="--trust-image"):
        read_options(OPTIONS, {"prompt": "a fox", "trust_image": True})


@pytest.mark.parametrize(
    ("path", "folder", "name"),
    [
        ("hill.png", "out", "../hill.png"),
        ("out/in/hill.png", "out", "in/hill.png"),
        ("in/hill.png", ".", "in/hill.png"),
        ("../hill.png", "out", "hill.png"),
        ("hill.png", "../out", "hill.png"),
        ("../out/in/hill.png", "../out", "in/hill.png"),
        ("/somewhere/hill.png", ".", "hill.png"),
    ],
)
def test_files_are_named_from_the_picture_s_folder_and_never_absolutely(path, folder, name):
    assert written(path, Path(folder)) == name
    assert written(os.path.abspath(path), Path(os.path.abspath(folder))) == name


@pytest.mark.parametrize(
    "more",
    [
        {"init": "a.png", "hashes": ["init"]},
        {"init": "a.png", "hashes": "x"},
        {"init": "a.png", "hashes": {"init": 7}},
        {"init": "a.png", "hashes": {"init": "0123"}},
        {"init": "a\0.png"},
        {"init": ["a.png"]},
        {"loras": [["a.safetensors"]]},
        {"loras": [["a.safetensors", 1, 2]]},
        {"loras": [["a.safetensors", 10**400]]},
        {"loras": "ab"},
        {"embeddings": ["a.pt"], "hashes": {"embeddings": ["0123456789ab"] * 2}},
        {"embeddings": [["a.pt"]]},
        {"embeddings": {"a.pt": 1}},
    ],
    ids=range(13),
)
def test_unsound_names_are_refused(more):
    asked = {"prompt": "", "negative": "", "label": None, "seed": 1, **more}
    with pytest.raises(InputError):
        from_chunk(json.dumps({"request": asked, "preset": {"sample": {}}}), "test")
