"""Safetensors: what is written reads back, what is malformed is refused, nothing is half done."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hangs import ends
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftool.errors import InputError, ResourceError, UsageError
from difftool.formats import open_model
from difftool.storage import safetensors
from difftool.storage.commit import atomic_file
from difftool.storage.safetensors import (
    digests,
    load_tensors,
    read_header,
    save_tensors,
    write_pieces,
)
from difftool.storage.tensor_file import open_source
from difftool.storage.tensors import CHUNK, TORCH_NAMES, load_located, piece_of_file


def copied(source: Path, name: str, target: Path) -> dict[str, str]:
    """A file of one tensor of another, byte for byte."""
    return write_pieces(target, {name: piece_of_file(source, read_header(source).tensors[name])})


def f32(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def raw(header: bytes | str | dict[str, Any], data: bytes = b"", length: int = -1) -> bytes:
    """The bytes of a file with this header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return (len(header) if length < 0 else length).to_bytes(8, "little") + header + data


A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = bytes(4)
MALFORMED = {
    "empty file": (b"", "cut off"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "cut off"),
    "header longer than the file": (raw("{}", length=100), "cut off"),
    "length of all ones": (raw("{}", length=2**64 - 1), "cut off"),
    "header too long": (raw(b"{" + b" " * (16 << 20) + b"}"), "limit"),
    "not an object": (raw("[]"), "begin with"),
    "space before the brace": (raw(" {}"), "begin with"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "begin with"),
    "not JSON": (raw("{oops}"), "malformed"),
    "zeros for padding": (raw(b"{}\0\0\0\0\0\0"), "malformed"),
    "not UTF-8": (raw(b'{"\xff":1}'), "malformed"),
    "lone surrogate": (raw('{"\\ud800":' + A[4:] + "}", FOUR), "malformed"),
    "NaN": (raw('{"a":NaN}'), "malformed"),
    "negative infinity": (raw('{"a":-Infinity}'), "malformed"),
    "number for the header": (raw("{1}"), "malformed"),
    "endless number": (raw('{"a":' + "9" * 10_000 + "}"), "malformed"),
    "deep nesting": (raw('{"a":' + "[" * 100_000), "malformed"),
    "deep objects": (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "malformed"),
    "key of a tensor twice": (raw("{" + A[:-1] + ',"dtype":"F32"}}', FOUR), "duplicate"),
    "tensor named twice": (raw("{" + A + "," + A + "}", FOUR), "duplicate"),
    "named twice with another dtype": (
        raw("{" + A + "," + A.replace("F32", "I32") + "}", FOUR),
        "duplicate",
    ),
    "metadata key twice": (raw('{"__metadata__":{"k":"1","k":"2"}}'), "duplicate"),
    "metadata that is no text": (raw('{"__metadata__":{"k":1}}'), "metadata"),
    "metadata that is no object": (raw('{"__metadata__":[]}'), "metadata"),
    "tensor that is no object": (raw('{"a":1}'), "described"),
    "missing key": (raw('{"a":{"dtype":"F32","shape":[]}}'), "described"),
    "unknown key": (raw("{" + A[:-1] + ',"x":1}}', FOUR), "described"),
    "metadata of null": (raw('{"__metadata__":null}'), "metadata"),
    "shape that is no list": (raw({"a": f32([1], 0, 4) | {"shape": 1}}, FOUR), "described"),
    "shape in a list": (raw({"a": f32([1], 0, 4) | {"shape": [[1]]}}, FOUR), "whole"),
    "shape of text": (raw({"a": f32([1], 0, 4) | {"shape": ["1"]}}, FOUR), "whole"),
    "shape beyond floats": (
        raw('{"a":' + A[4:].replace("[1]", "[1e999]") + "}", FOUR),
        "1e999 is too large",
    ),
    "dtype that is no text": (raw({"a": f32([1], 0, 4) | {"dtype": 1}}, FOUR), "described"),
    "dtype in lower case": (raw({"a": f32([1], 0, 4) | {"dtype": "f32"}}, FOUR), "dtype"),
    "offsets that are no list": (
        raw({"a": f32([1], 0, 4) | {"data_offsets": 4}}, FOUR),
        "described",
    ),
    "offset of 2^200": (raw({"a": f32([1], 2**200, 2**200 + 4)}, FOUR), "overlap"),
    "half a byte": (raw({"a": f32([1], 0, 1) | {"dtype": "F4"}}, b"\0"), "bytes"),
    "three offsets": (raw({"a": f32([1], 0, 4) | {"data_offsets": [0, 4, 4]}}, FOUR), "described"),
    "fractional size": (raw({"a": f32([1], 0, 4) | {"shape": [1.0]}}, FOUR), "whole"),
    "true for 1": (raw({"a": f32([1], 0, 4) | {"shape": [True]}}, FOUR), "whole"),
    "unknown dtype": (raw({"a": f32([1], 0, 4) | {"dtype": "F31"}}, FOUR), "dtype"),
    "negative size": (raw({"a": f32([-1], 0, 4)}, FOUR), "shape"),
    "size 0 x 2^63": (raw({"a": f32([0, 2**63 - 1], 0, 0)}), "shape"),
    "nine dimensions": (raw({"a": f32([1] * 9, 0, 4)}, FOUR), "shape"),
    "offsets reversed": (raw({"a": f32([1], 4, 0)}, FOUR), "bytes"),
    "negative offset": (raw({"a": f32([1], -4, 0)}, FOUR), "bytes"),
    "more bytes than the shape": (raw({"a": f32([1], 0, 8)}, FOUR * 2), "bytes"),
    "size that overflows": (raw({"a": f32([2**31] * 8, 0, 4)}, FOUR), "bytes"),
    "trailing byte": (raw({"a": f32([1], 0, 4)}, FOUR + b"\0"), "end at"),
    "cut off data": (raw({"a": f32([2], 0, 8)}, FOUR), "end at"),
    "hole": (raw({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, FOUR * 3), "gap"),
    "hole at the start": (raw({"a": f32([1], 4, 8)}, FOUR * 2), "gap"),
    "overlap": (raw({"a": f32([2], 0, 8), "b": f32([1], 4, 8)}, FOUR * 2), "overlap"),
    "too many tensors": (raw({str(i): f32([0], 0, 0) for i in range(65_537)}), "limit"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, tmp_path):
    data, says = MALFORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        read_header(path)
    assert says in str(refused.value)
    with pytest.raises(InputError):
        load_tensors(path)


@pytest.mark.parametrize(
    ("data", "says", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git-lfs", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a page of the web", "logged in"),
        (b"\n<HTML><head>", "a page of the web", "again"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_what_downloads_leave_is_called_by_name(data, says, hint, name, tmp_path):
    (tmp_path / name).write_bytes(data)
    for opened in (open_source, open_model):
        with pytest.raises(InputError, match="was not downloaded") as error:
            opened(tmp_path / name)
        assert says in (error.value.why or "") and hint in (error.value.hint or "")


def test_files_that_are_not_there_or_no_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot read"):
            read_header(path)


def test_odd_but_sound_files_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    names = ["", "../../etc/passwd", "\x1b[31mred", "[bold]", "名前", "a\0b"]
    tensors = {name: f32([], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    tensors |= {"empty": f32([0, 5], 24, 24)}
    path.write_bytes(raw(json.dumps(tensors) + " " * 5, bytes(24)))
    header = read_header(path)
    assert list(header.tensors) == [*names, "empty"]
    assert header.tensors["empty"].shape == (0, 5)
    assert header.metadata == {}
    path.write_bytes(raw("{}"))
    assert read_header(path) == ({}, {})


def test_dtypes_that_torch_lacks_are_listed_and_not_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    narrow = {
        "a": f32([1], 0, 4),
        "f4": {"dtype": "F4", "shape": [3, 2], "data_offsets": [4, 7]},
        "f6": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [7, 10]},
    }
    path.write_bytes(raw(narrow, bytes(range(10))))
    assert {n: i.dtype for n, i in read_header(path).tensors.items()} == {
        **{"a": "F32", "f4": "F4", "f6": "F6_E2M3"}
    }
    for name in ("f4", "f6"):
        with pytest.raises(InputError, match="torch has no such numbers"):
            load_tensors(path, [name])
    assert load_tensors(path, ["a"])["a"].shape == (1,)
    copied(path, "f4", tmp_path / "y")
    assert (tmp_path / "y").read_bytes().endswith(b"\4\5\6")
    with pytest.raises(InputError, match="no tensor 'none'"):
        load_tensors(path, ["none"])


def test_tensors_that_are_not_aligned_are_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": f32([], 0, 4) | {"dtype": "I32"}, "b": f32([1], 5, 9)}
    tensors["c"] = {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}
    path.write_bytes(raw(tensors, b"\1\0\0\0\7" + b"\0\0\x80\x3f"))
    assert {n: t.item() for n, t in load_tensors(path).items()} == {"a": 1, "b": 1.0, "c": 7}


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 3, dtype=torch.float16)}
    found["strided"] = torch.randn(4, 6, generator=generator).t()
    for name in (name for name in TORCH_NAMES.values() if hasattr(torch, name)):
        values = torch.randint(0, 2, (3, 5), generator=generator)
        found[name] = values.to(getattr(torch, name))
    return found


def test_what_is_written_reads_back_here_and_in_the_library(tmp_path):
    path, tensors = tmp_path / "x.safetensors", every_dtype()
    metadata = {"format": "pt", "k": 'quotes " and ünicode\n'}
    hashes = save_tensors(path, tensors, metadata)
    for found in (load_file(path), load_tensors(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert found[name].equal(tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    assert read_header(path).metadata == metadata
    assert digests(path) == hashes
    assert load_tensors(path, ["scalar"]).keys() == {"scalar"}
    for name, info in read_header(path).tensors.items():
        width = tensors[name].element_size()
        assert info.start % width == 0, f"{name} is not aligned"


def test_files_of_the_library_are_read(tmp_path):
    path, tensors = tmp_path / "x.safetensors", every_dtype()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"a": "b"})
    header = read_header(path)
    assert header.metadata == {"a": "b"}
    for name, info in header.tensors.items():
        assert TORCH_NAMES[info.dtype] == str(tensors[name].dtype).removeprefix("torch.")
        assert info.shape == tuple(tensors[name].shape)
        data = path.read_bytes()[info.start : info.end]
        assert data == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    tensors = every_dtype()
    backwards = dict(reversed(tensors.items()))
    save_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    save_tensors(tmp_path / "b", backwards, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_data_hash_is_that_of_all_bytes_after_the_header(tmp_path):
    import hashlib

    path = tmp_path / "x.safetensors"
    save_tensors(path, every_dtype(), {safetensors.DATA_HASH: ""})
    data = path.read_bytes()
    after = data[8 + int.from_bytes(data[:8], "little") :]
    written = read_header(path).metadata[safetensors.DATA_HASH]
    assert written == "0x" + hashlib.sha256(after).hexdigest()


def test_tensors_are_renamed_without_torch(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.arange(5), "y": torch.ones(2).bfloat16()})
    save_tensors(tmp_path / "b", {"x": torch.zeros(3, dtype=torch.int8)})
    code = f"""
import sys
import time
from pathlib import Path
from difftool.storage.safetensors import read_header, write_pieces
from difftool.storage.tensors import piece_of_file
here, pieces = Path({str(tmp_path)!r}), {{}}
for file in (here / "a", here / "b"):
    for name, info in read_header(file).tensors.items():
        pieces[file.name + name] = piece_of_file(file, info)
write_pieces(here / "c", pieces)
assert not {{"torch", "numpy", "safetensors"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found = load_file(tmp_path / "c")
    assert found["ax"].equal(torch.arange(5))
    assert found["ay"].equal(torch.ones(2).bfloat16())
    assert found["bx"].equal(torch.zeros(3, dtype=torch.int8))


def test_large_tensors_are_copied_in_pieces(tmp_path):
    tensor = torch.randn(CHUNK // 2 + 123, generator=torch.Generator().manual_seed(0))
    before = save_tensors(tmp_path / "a", {"x": tensor})
    after = copied(tmp_path / "a", "x", tmp_path / "b")
    assert before["x"] == after["x"]
    assert load_file(tmp_path / "b")["x"].equal(tensor)


@pytest.mark.parametrize("held", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_cast_while_they_are_read(held, wanted, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (2 * CHUNK // 41 + 1, 41 + 82), "whole": (CHUNK, 2), "number": ()}
    shapes |= {"none": (0, 3), "kept": (3,)}
    held_tensors = {n: torch.randn(s, generator=generator).to(held) for n, s in shapes.items()}
    save_tensors(tmp_path / "a", held_tensors)
    places = open_source(tmp_path / "a").tensors
    found = load_located(places, dtype=wanted, as_is=("kept",))
    for name, tensor in held_tensors.items():
        kept = held if name == "kept" else wanted
        assert found[name].dtype == kept and found[name].equal(tensor.to(kept)), name
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[: places["large"].info.end - 1])
    with pytest.raises(InputError, match="shorter"):
        load_located({"large": places["large"]}, dtype=wanted)


def test_nothing_is_replaced_unasked(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="there already"):
        save_tensors(path, {})
    assert path.read_bytes() == b"precious"
    save_tensors(path, {"a": torch.ones(1)}, overwrite=True)
    assert load_file(path)["a"].item() == 1
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="there already"):
        save_tensors(dangling, {})
    assert not (tmp_path / "elsewhere").exists()


def test_a_name_taken_while_writing_is_not_replaced(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(UsageError, match="there already"):
        with atomic_file(path) as file:
            file.write(b"new")
            path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_place_that_cannot_be_written_to_is_the_users_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "x", tmp_path / "file" / "x"):
        with pytest.raises(UsageError):
            save_tensors(path, {})


@pytest.mark.parametrize("moment", ["write", "fsync", "link"])
@pytest.mark.parametrize("old", [None, b"precious"])
def test_a_full_disk_leaves_what_was_there(moment, old, tmp_path, monkeypatch):
    path = tmp_path / "x"
    if old:
        path.write_bytes(old)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise full

    def chunks() -> Any:
        yield b"\0\0"
        if moment == "write":
            raise full
        yield b"\0\0"

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif moment == "link":
        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr(os, "replace", fail)
    piece = safetensors.Piece("F32", (1,), chunks)
    with pytest.raises(ResourceError, match="No space"):
        safetensors.write_pieces(path, {"a": piece}, overwrite=old is not None)
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if old else [])
    assert old is None or path.read_bytes() == old


def test_the_mode_follows_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            save_tensors(tmp_path / "x", {}, overwrite=True)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A sound file with something wrong, or perhaps still sound."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    mutable = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        where = rng.randrange(header_end)
        match rng.randrange(5):
            case 0:
                mutable[where] = rng.randrange(256)
            case 1:
                mutable[where] = rng.choice(b'0123456789{}[]",:-e')
            case 2:
                del mutable[where : where + rng.randint(1, 9)]
            case 3:
                mutable[where:where] = mutable[rng.randrange(header_end) :][: rng.randint(1, 30)]
            case 4:
                mutable = mutable[: rng.randrange(len(mutable) + 1)] or bytearray(b"\0")
        header_end = min(header_end, len(mutable))
    if rng.random() < 0.5 and len(mutable) > 8:  # a length that fits again, to come further
        mutable[:8] = (max(header_end - 8, 0)).to_bytes(8, "little")
    return bytes(mutable)


def check_mutated(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Reads mutated files here and in the library; how many were refused, and read."""
    save_tensors(folder / "good", every_dtype(), {"format": "pt", "k": "v"})
    good, path, rng = (folder / "good").read_bytes(), folder / "bad", random.Random(seed)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(count):
        path.write_bytes(mutated(good, rng))
        try:
            with ends():
                header = read_header(path)
        except InputError as error:
            outcomes["refused"] += 1
            assert "\n" not in error.what
            continue
        outcomes["read"] += 1
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(header.tensors)
    assert {file.name for file in folder.iterdir()} == {"good", "bad"}
    return outcomes


def test_mutated_files_never_crash_nor_load_what_the_library_refuses(tmp_path):
    outcomes = check_mutated(tmp_path, 2_000, 0)
    assert outcomes["refused"] > 1_000
    assert outcomes["read"] > 5


@pytest.mark.slow
def test_many_mutated_files_never_crash(tmp_path):
    check_mutated(tmp_path, 20_000, 1)


def test_the_header_reader_needs_neither_torch_nor_the_library(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(1)})
    code = """
import sys
import time
from pathlib import Path
from difftool.storage.safetensors import read_header
assert list(read_header(Path(sys.argv[1])).tensors) == ["a"]
assert not {"torch", "numpy", "safetensors", "tokenizers", "pydantic"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(Path(tmp_path / "x"))], check=True)
