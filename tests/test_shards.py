"""Shards: read as one source, checked against their index; written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ldm_models as ldms
import pytest
import torch
from conversions import convert
from PIL import Image
from safetensors.torch import load_file

from difftool.errors import CheckError, DifftoolError, InputError, UsageError
from difftool.formats import ModelSource, open_model
from difftool.pipeline.load import load_model
from difftool.storage import shards as shards_module
from difftool.storage import tensors as tensors_module
from difftool.storage.safetensors import DATA_HASH, save_tensors
from difftool.storage.shards import index_of, parse_size, split, write_shards, written_at
from difftool.storage.tensor_file import is_source, open_source
from difftool.storage.tensors import Piece, digest_of, piece_of_file, piece_of_tensor

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
    content = json.loads(index_of(path).read_text(encoding="utf-8"))
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
    content = json.loads(index.read_text(encoding="utf-8"))
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


# --- models -----------------------------------------------------------------------------------


BUNDLED = Path(__file__).parent.parent / "presets/shapes/model.safetensors"
LIMIT = 1_000_000


def data_of(source: ModelSource) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Of each tensor its dtype, its shape and the hash of its bytes."""
    return {
        name: (p.info.dtype, p.info.shape, digest_of(piece_of_file(p.file, p.info)))
        for name, p in source.tensors.items()
    }


@pytest.mark.parametrize("kind", ["difftool", "diffusers"])
def test_models_in_shards_come_back_bit_for_bit(kind, tmp_path):
    source = open_model(BUNDLED)
    target = tmp_path / ("m.safetensors" if kind == "difftool" else "m")
    convert(source, target, kind, shard_size=LIMIT)
    weights = target if kind == "difftool" else target / "unet/diffusion_pytorch_model.safetensors"
    shards = sorted(weights.parent.glob("*-of-*.safetensors"))
    assert len(shards) > 2 and index_of(weights).is_file() and not weights.exists()
    assert all(shard.stat().st_size < LIMIT + 100_000 for shard in shards)
    split_up = open_model(target)
    assert data_of(split_up) == data_of(source) and split_up.values == source.values
    assert split_up.file in shards, "by its hash a model is known"
    convert(split_up, tmp_path / "again.safetensors", "difftool")
    convert(source, tmp_path / "whole.safetensors", "difftool")
    whole, again = (tmp_path / f"{name}.safetensors" for name in ("whole", "again"))
    assert data_of(open_model(again)) == data_of(open_model(whole))
    if kind == "difftool":
        for other in (index_of(target), shards[0], shards[-1]):
            assert open_model(other).values == source.values, "any of its files stands for it"
        loaded, plain = (load_model(str(p), device="cpu") for p in (target, BUNDLED))
        assert all(t.equal(plain.tensors()[name]) for name, t in loaded.tensors().items())


def test_converting_to_shards_holds_no_more_than_before(tmp_path, monkeypatch):
    """No piece is larger than a chunk, and no more than one is there at a time."""
    real, largest = shards_module.write_pieces, 0

    def measured(path: Path, pieces: dict[str, Piece], *rest: Any) -> dict[str, str]:
        def watched(piece: Piece) -> Piece:
            def chunks() -> Iterator[Any]:
                nonlocal largest
                for chunk in piece.chunks():
                    largest = max(largest, len(chunk))
                    yield chunk

            return piece._replace(chunks=chunks)

        return real(path, {name: watched(piece) for name, piece in pieces.items()}, *rest)

    monkeypatch.setattr(shards_module, "write_pieces", measured)
    monkeypatch.setattr(tensors_module, "CHUNK", 4096)
    convert(open_model(BUNDLED), tmp_path / "m.safetensors", "difftool", shard_size=LIMIT)
    assert 0 < largest <= 4096


def test_a_failed_conversion_to_shards_leaves_nothing(tmp_path):
    target = tmp_path / "m.safetensors"
    index_of(target).write_text("mine")
    lacking: dict[str, Any] = {"expected": {"unet.nothing": (1,)}, "overwrite": True}
    for options, error in (({}, UsageError), (lacking, CheckError)):
        with pytest.raises(error):
            convert(open_model(BUNDLED), target, "difftool", shard_size=LIMIT, **options)
        assert listed(tmp_path) == [index_of(target).name]
    convert(open_model(BUNDLED), target, "difftool", shard_size=LIMIT, overwrite=True)
    convert(open_model(BUNDLED), target, "difftool", overwrite=True)
    assert listed(tmp_path) == ["m.safetensors"]


def test_single_files_of_ldm_are_split_only_where_asked(tmp_path):
    ldms.write(tmp_path / "m.safetensors", "sd1")
    source, target = open_model(tmp_path / "m.safetensors"), tmp_path / "n.safetensors"
    ledger = convert(source, target, "ldm", shard_size=100_000)
    assert "other tools read no shards of a single file" in ledger.warnings
    assert index_of(target).is_file() and data_of(open_model(target)) == data_of(source)


def test_the_command_names_the_index(difftool):
    ran = difftool("convert", "shapes", "m.safetensors", "--to", "difftool",
                   "--max-shard-size", "1MB")  # fmt: skip
    assert ran.code == 0 and ran.out == "m.safetensors.index.json\n"
    ran = difftool("convert", "m.safetensors", "n", "--to", "diffusers", "--max-shard-size", "1MB")
    assert ran.code == 0 and ran.out == "n\n"
    ran = difftool("convert", "n", "--inspect", "--json")
    assert ran.code == 0 and ran.object["components"].keys() >= {"unet", "text.0"}
    ran = difftool("convert", "n", "o", "--to", "diffusers", "--max-shard-size", "much")
    assert ran.code == 2 and "not a size" in ran.err


@pytest.mark.slow
def test_training_writes_shards_and_goes_on_from_them(difftool):
    Path("photos").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 100, 200)).save(f"photos/{i}.png")
    sizes = ("channels=[8,8]", "groups=4", "head_dim=4", "blocks=1")
    common = ["train", "photos", "--device", "cpu", "--batch-size", 2, "--size", 16]
    common += [part for size in sizes for part in ("--set", f"unet.{size}")]
    ran = difftool(*common, "--steps", 2, "--out", "run", "--max-shard-size", "20KB")
    assert ran.code == 0, ran.err
    assert ran.out == "run/model.safetensors.index.json\n"
    assert not Path("run/model.safetensors").exists()
    assert open_model(Path("run")).path == Path("run/model.safetensors.index.json")
    again = difftool(*common, "--steps", 3, "--out", "run", "--resume", "--allow-change")
    assert again.code == 0 and again.out == "run/model.safetensors\n", again.err
    assert not Path("run/model.safetensors.index.json").exists()


@pytest.mark.parametrize("path", [Path("/"), Path(".")], ids=str)
def test_a_folder_without_a_name_is_there(path):
    assert written_at(path) == path
