"""Shards: read as one source, checked against their index; written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from difftool.errors import DifftoolError, InputError, UsageError
from difftool.formats.files import is_source, open_source
from difftool.formats.safetensors import DATA_HASH, save_tensors
from difftool.formats.shards import index_of, parse_size, split, write_shards
from difftool.formats.tensors import Piece, piece_of_tensor

TENSORS = {f"t{k}": torch.full((10,), float(k)) for k in range(7)}
"""Of 40 bytes each."""


def pieces(tensors: dict[str, torch.Tensor] = TENSORS) -> dict[str, Piece]:
    return {name: piece_of_tensor(tensor) for name, tensor in tensors.items()}


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


SET = [f"m-{k:05}-of-00003.safetensors" for k in (1, 2, 3)] + ["m.safetensors.index.json"]


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("2GiB", 2 << 30), ("500MB", 500 * 10**6),
     ("1.5 KB", 1500), ("100", 100), ("3M", 3 * 10**6), (" 7B ", 7)],
)  # fmt: skip
def test_sizes_are_those_that_the_field_writes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5TB", "5 G B", "1e9", "inf", "五GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_tensors_are_split_in_their_order():
    groups = split(pieces(), 120)
    assert [list(group) for group in groups] == [["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6"]]
    assert [len(group) for group in split(pieces(), 1)] == [1] * 7
    assert [len(group) for group in split(pieces(), 280)] == [7]
    assert split({}, 1) == [{}]


def test_a_small_model_is_one_file(tmp_path):
    write_shards(tmp_path / "m.safetensors", pieces(), {"k": "v"})
    assert listed(tmp_path) == ["m.safetensors"]
    assert load_file(tmp_path / "m.safetensors").keys() == TENSORS.keys()


def test_shards_come_back_as_one_source(tmp_path):
    path = tmp_path / "m.safetensors"
    hashes = write_shards(path, pieces(), {"k": "v", DATA_HASH: ""}, limit=120)
    assert listed(tmp_path) == SET
    assert hashes.keys() == TENSORS.keys()
    content = json.loads(index_of(path).read_text())
    assert content["metadata"] == {"total_size": 280}
    for name, shard in content["weight_map"].items():
        assert load_file(tmp_path / shard)[name].equal(TENSORS[name])
    for way in (tmp_path, index_of(path)):
        source = open_source(way)
        assert source.kind == "safetensors"
        assert source.metadata == {"k": "v"}
        assert source.warnings == ()
        loaded = source.load()
        assert loaded.keys() == TENSORS.keys()
        assert all(loaded[name].equal(tensor) for name, tensor in TENSORS.items())
    assert source.load("t1").keys() == {""}
    assert is_source(index_of(path))


def test_the_library_reads_our_shards(tmp_path):
    from diffusers.models.unets.unet_2d import UNet2DModel

    def model() -> UNet2DModel:
        types: Any = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return UNet2DModel(8, 3, 3, block_out_channels=(32,), norm_num_groups=8, **types)

    torch.manual_seed(0)
    theirs: Any = model()
    theirs.save_pretrained(tmp_path / "a", max_shard_size="50KB")
    source = open_source(tmp_path / "a")
    state = theirs.state_dict()
    loaded = source.load()
    assert len({place.file for place in source.tensors.values()}) > 2
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in state.items())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_bytes((tmp_path / "a/config.json").read_bytes())
    target = tmp_path / "b/diffusion_pytorch_model.safetensors"
    write_shards(target, pieces(state), {"format": "pt"}, limit=50_000)
    again: Any = UNet2DModel.from_pretrained(tmp_path / "b", low_cpu_mem_usage=False)
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in state.items())


def pickled(folder: Path, total: int = 280) -> Path:
    """Shards as transformers wrote them before safetensors."""
    names = list(TENSORS)
    shards = {"p-00001-of-00002.bin": names[:4], "p-00002-of-00002.bin": names[4:]}
    for shard, inside in shards.items():
        torch.save({name: TENSORS[name] for name in inside}, folder / shard)
    places = {name: shard for shard, inside in shards.items() for name in inside}
    index = folder / "p.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return index


def test_pickled_shards_are_read(tmp_path):
    source = open_source(pickled(tmp_path))
    assert (source.kind, source.warnings) == ("pickle", ())
    loaded = source.load()
    assert all(loaded[name].equal(tensor) for name, tensor in TENSORS.items())
    assert "says 300 bytes" in open_source(pickled(tmp_path, 300)).warnings[0]


def edit(**changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, content: dict[str, Any]) -> None:
        for key, value in changes.items():
            content["weight_map"][key] = value

    return change


def whole(value: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, content: dict[str, Any]) -> None:
        content.clear()
        content.update(value)

    return change


def absent(folder: Path, content: dict[str, Any]) -> None:
    (folder / SET[0]).unlink()


def unplaced(folder: Path, content: dict[str, Any]) -> None:
    del content["weight_map"]["t0"]


def twice(folder: Path, content: dict[str, Any]) -> None:
    save_tensors(folder / SET[2], {"t6": TENSORS["t6"], "t0": TENSORS["t0"]}, overwrite=True)


def resized(folder: Path, content: dict[str, Any]) -> None:
    content["metadata"]["total_size"] = 281


@pytest.mark.parametrize(
    "spoil, says",
    [
        (absent, "cannot read .*00001"),
        (unplaced, "does not place 't0'"),
        (twice, "does not place 't0'"),
        (resized, "280 bytes, not 281"),
        (edit(t9=SET[0]), "'t9' is in none"),
        (edit(t0=SET[1]), "does not place 't0'"),
        (edit(t0="../m.safetensors"), "not safe"),
        (edit(t0="/etc/m.safetensors"), "not safe"),
        (edit(t0="a\\m.safetensors"), "not safe"),
        (edit(t0=".."), "not safe"),
        (edit(t0=""), "not safe"),
        (edit(t0="m.bin"), "not safe"),
        (edit(t0=3), "no weight_map"),
        (whole({"weight_map": []}), "no weight_map"),
        (whole({}), "no weight_map"),
        (whole({"weight_map": {}, "metadata": []}), "metadata is no object"),
        (whole({"weight_map": {}, "metadata": {"total_size": [1]}}), "does not fit"),
    ],
)
def test_an_index_that_lies_is_refused(spoil, says, tmp_path):
    index = index_of(tmp_path / "m.safetensors")
    write_shards(tmp_path / "m.safetensors", pieces(), limit=120)
    content = json.loads(index.read_text())
    spoil(tmp_path, content)
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        open_source(index)


def test_a_file_in_two_sets_is_none(tmp_path):
    write_shards(tmp_path / "m.safetensors", pieces(), limit=120)
    pickled(tmp_path)
    with pytest.raises(InputError, match="2 indices"):
        open_source(tmp_path)


def test_nothing_is_replaced_unasked(tmp_path):
    path = tmp_path / "m.safetensors"
    for name in ("m.safetensors", *SET):
        (tmp_path / name).write_bytes(b"precious")
        with pytest.raises(UsageError, match="there already"):
            write_shards(path, pieces(), limit=120)
        assert listed(tmp_path) == [name]
        (tmp_path / name).unlink()
    with pytest.raises(UsageError, match="does not exist"):
        write_shards(tmp_path / "none" / "m.safetensors", pieces(), limit=120)


@pytest.mark.parametrize("before", [1000, 120, 80], ids=["one file", "as many", "more"])
@pytest.mark.parametrize("after", [1000, 120])
def test_a_set_takes_the_place_of_another(before, after, tmp_path):
    path = tmp_path / "m.safetensors"
    (tmp_path / "m-bystander.safetensors").write_bytes(b"")
    write_shards(path, pieces({n: t + 1 for n, t in TENSORS.items()}), limit=before)
    write_shards(path, pieces(), overwrite=True, limit=after)
    names = ["m.safetensors"] if after == 1000 else SET
    assert listed(tmp_path) == sorted([*names, "m-bystander.safetensors"])
    loaded = open_source(tmp_path / names[-1]).load()
    assert all(loaded[name].equal(tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("former", [None, 1000, 80])
def test_a_failure_at_any_moment_leaves_what_was_there(former, tmp_path, monkeypatch):
    """Every call that changes a folder fails once: nothing new is there, and all that was."""
    path = tmp_path / "m.safetensors"
    if former:
        write_shards(path, pieces(), limit=former)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = {name: getattr(os, name) for name in ("link", "replace", "fsync")}
    calls = 0

    def failing(name: str, turn: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == turn:
                raise OSError(28, "No space left on device")
            return real[name](*arguments)

        return call

    failures = 0
    for turn in range(1, 60):
        calls = 0
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name, turn))
            try:
                write_shards(path, pieces(), {"new": "1"}, overwrite=True, limit=120)
                if calls < turn:
                    break
            except (OSError, DifftoolError):
                failures += 1
                found = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
                assert found == before, turn
                continue
        assert open_source(tmp_path).metadata == {"new": "1"}  # where a failure can be borne
        for file in tmp_path.iterdir():
            file.unlink()
        for name, data in before.items():
            (tmp_path / name).write_bytes(data)
    assert failures >= 4
    assert listed(tmp_path) == SET
