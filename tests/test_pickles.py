"""Pickled checkpoints: what torch.save writes reads back, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hangs import ends

from difftool.errors import InputError, UsageError
from difftool.storage import pickles
from difftool.storage import torch_archive as checkpoints
from difftool.storage.pickles import read_pickle
from difftool.storage.tensor_file import is_source, open_source
from difftool.storage.tensors import CHUNK, TORCH_NAMES, digest_of, load_located, piece_of_file

LAYOUTS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: Any, path: Path, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def contents(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


# --- what torch.save writes ------------------------------------------------------------------


def every_tensor() -> dict[str, Any]:
    """Tensors of every dtype and of every way to lie in a storage."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        name: torch.randint(0, 2, (3, 5), generator=g).to(getattr(torch, name))
        for name in TORCH_NAMES.values()
        if hasattr(torch, name)
    }
    base, odd = torch.randn(6, 8, generator=g), torch.arange(7, dtype=torch.int16)
    return found | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "base": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "columns": base[:, 1:5:2],
        "every other row": base[::2],
        "permuted": torch.randn(2, 3, 4, 5, generator=g).permute(3, 0, 2, 1),
        "expanded": torch.randn(3, 1, generator=g).expand(3, 4),
        "one element of many": base[3, 3],
        "overlapping": base.reshape(-1).as_strided((5, 4), (2, 1)),
        "channels last": torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
        "odd": odd[1:],
        "parameter": torch.nn.Parameter(torch.randn(4, generator=g)),
        "needs grad": torch.randn(2, generator=g, requires_grad=True),
        "buffer": torch.nn.Buffer(torch.randn(2, generator=g)),
        "half": base.half().t(),
    }


@LAYOUTS
def test_tensors_are_those_that_were_saved(legacy, tmp_path):
    tensors = every_tensor()
    source = open_source(save(tensors, tmp_path / "a.ckpt", legacy))
    assert (source.kind, source.warnings, source.beside) == ("pickle", (), {})
    assert list(source.tensors) == list(tensors)
    loaded = source.load()
    for name, tensor in tensors.items():
        place, found = source.tensors[name], loaded[name]
        assert TORCH_NAMES[place.info.dtype] == str(tensor.dtype).removeprefix("torch.")
        assert place.info.shape == tuple(tensor.shape)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert contents(found) == contents(tensor), name
        streamed = b"".join(map(bytes, piece_of_file(place.file, place.info).chunks()))
        assert streamed == contents(tensor), name


def test_large_strided_tensors_are_streamed_in_pieces(tmp_path):
    tensors = {"a": torch.arange(CHUNK).reshape(-1, 1024).t(), "b": torch.arange(90)[::3]}
    source = open_source(save(tensors, tmp_path / "a.pt"))
    for name, place in source.tensors.items():
        chunks = [bytes(chunk) for chunk in piece_of_file(place.file, place.info).chunks()]
        assert b"".join(chunks) == contents(tensors[name])
    place = source.tensors["a"]
    assert len([*piece_of_file(place.file, place.info).chunks()]) == 8  # of 8 bytes a number


def test_what_is_loaded_is_the_readers_own(tmp_path):
    path = save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "a.pt")
    before = path.read_bytes()
    tensors = open_source(path).load()
    tensors["a"].zero_()
    assert path.read_bytes() == before
    assert open_source(path).load()["a"].equal(torch.ones(4))
    assert tensors["a"].untyped_storage().nbytes() == 16  # not the file: a copy would be as large


@LAYOUTS
def test_state_dicts_of_modules_are_read(legacy, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    source = open_source(save(module.state_dict(), tmp_path / "a.pth", legacy))
    assert source.warnings == ()
    loaded = source.load()
    again = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    again.load_state_dict(loaded)
    for name, tensor in module.state_dict().items():
        assert again.state_dict()[name].equal(tensor)


def test_a_cut_short_file_is_told_when_it_is_loaded(tmp_path):
    path = save({"a": torch.ones(400), "b": torch.ones(400).t()[::2]}, tmp_path / "a.pt")
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:900])
    for name in "ab":
        place = source.tensors[name]
        with pytest.raises(InputError, match="shorter"):
            load_located({name: place})
        with pytest.raises(InputError, match="shorter"):
            digest_of(piece_of_file(place.file, place.info))


def test_headers_are_read_without_torch(tmp_path):
    for legacy in (False, True):
        save({"state_dict": {"a": torch.ones(1)}}, tmp_path / f"{legacy}.ckpt", legacy)
    code = """
import sys
from pathlib import Path
from difftool.storage.tensor_file import open_source
for file in Path(sys.argv[1]).iterdir():
    assert open_source(file).tensors["a"].info.shape == (1,)
assert not {"torch", "numpy", "safetensors", "pydantic", "zipfile"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# --- the trees that trainers save ------------------------------------------------------------

T, U = torch.tensor([1.0]), torch.tensor([2.0])
SD = {"model.a": T, "model.b.c": U}
TREES = {
    "plain": (SD, ["model.a", "model.b.c"], []),
    "lightning": (
        {"state_dict": SD, "epoch": 6, "optimizer_states": [{"state": {0: {"exp_avg": T}}}]},
        ["model.a", "model.b.c"],
        ["optimizer_states.0.state.0.exp_avg"],
    ),
    "twice nested": ({"state_dict": {"state_dict": SD}}, ["model.a", "model.b.c"], []),
    "beside a scalar": ({"state_dict": SD, "best": T}, ["model.a", "model.b.c"], ["best"]),
    "model": ({"model": SD, "optimizer": {"a": T}}, ["model.a", "model.b.c"], ["optimizer.a"]),
    "module": ({"module": {"model": {"w": T}}}, ["w"], []),
    "params_ema": ({"params_ema": {"w": T}}, ["w"], []),
    "best loss": ({"model": {"w": T}, "loss": torch.tensor(1.0)}, ["w"], ["loss"]),
    "two states": ({"model": {"w": T}, "ema": {"w": U}}, ["model.w", "ema.w"], []),
    "components": ({"unet": {"w": T}, "vae": {"w": U}}, ["unet.w", "vae.w"], []),
    "a part named model": ({"w": T, "model": {"v": U}}, ["w", "model.v"], []),
    "lists": ({"layers": [T, (U, T)]}, ["layers.0", "layers.1.0", "layers.1.1"], []),
    "numbers for names": ({0: T, 1: {2: U}}, ["0", "1.2"], []),
    "tied": ({"a": T, "b": T}, ["a", "b"], []),
    "bare": (T, [""], []),
    "embedding": (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": T}, "name": "x"},
        ["string_to_param.*"],
        [],
    ),
}


@LAYOUTS
@pytest.mark.parametrize("case", TREES)
def test_the_tensors_of_a_tree_are_found(case, legacy, tmp_path):
    tree, tensors, beside = TREES[case]
    source = open_source(save(tree, tmp_path / "a.ckpt", legacy))
    assert (list(source.tensors), list(source.beside)) == (tensors, beside)
    assert source.warnings == ()


def test_numbers_and_texts_are_metadata(tmp_path):
    tree = {
        **{"state_dict": {"a": T}, "epoch": 6, "global_step": 470_000, "lr": 1e-4, "amp_on": True},
        **{"pytorch-lightning_version": "1.4.2", "np": np.int64(3), "npf": np.float32(0.5)},
        **{"nothing": None, "raw": b"1", "history": [1, 2, 3], "hyper": {"z": 4}},
        **{"huge": 1 << 5000, "long": "x" * 10_000, "torn": "\ud800"},
    }
    source = open_source(save(tree, tmp_path / "a.ckpt"))
    assert source.metadata == {
        **{"epoch": "6", "global_step": "470000", "lr": "0.0001", "amp_on": "True"},
        **{"pytorch-lightning_version": "1.4.2", "np": "3", "npf": "0.5", "hyper.z": "4"},
    }
    assert source.warnings == ()


def test_metadata_has_an_end(tmp_path):
    tree = {"state_dict": {"a": T}} | {str(i): i for i in range(5000)}
    source = open_source(save(tree, tmp_path / "a.ckpt"))
    assert len(source.metadata) == checkpoints.MAX_METADATA


@pytest.fixture
def foreign():
    """Classes of modules that will not be there when the file is read."""
    made: list[str] = []

    def make(name: str, **attributes: Any) -> Any:
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        for parent in (".".join(parts[: k + 1]) for k in range(len(parts))):
            if parent not in sys.modules:
                made.append(parent)
                sys.modules[parent] = types.ModuleType(parent)
        found = type(kind, (), {"__module__": module, "__qualname__": kind} | attributes)
        setattr(sys.modules[module], kind, found)
        return found

    yield make
    for module in made:
        sys.modules.pop(module, None)


@LAYOUTS
def test_lightning_checkpoints_are_read_without_lightning(legacy, foreign, tmp_path):
    callback = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    config = foreign("omegaconf.dictconfig.DictConfig")
    enum = foreign("mystery.trainer.State")
    made, parent = enum(), config()
    made.hook, made.ema, made.self = callback(), U, made
    parent.child = config()
    parent.child.parent = parent  # as OmegaConf's nodes are
    tree = {
        "epoch": 1,
        "state_dict": collections.OrderedDict(SD),
        "callbacks": {callback: {"best_model_score": T, "best_model_path": Path("/x")}},
        "hyper_parameters": {"config": parent, "args": argparse.Namespace(lr=1, tensor=T)},
        "weird": made,
        "counts": collections.Counter("aab"),
        "lazy": collections.defaultdict(list, a=[1]),
        "array": np.arange(5),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "set": {1, 2},
        "complex": 1j,
    }
    path = save(tree, tmp_path / "a.ckpt", legacy)
    for name in [n for n in sys.modules if n.startswith(("pytorch_lightning", "mystery", "omega"))]:
        del sys.modules[name]
    source = open_source(path)
    assert list(source.tensors) == ["model.a", "model.b.c"]
    assert source.load()["model.b.c"].equal(U)
    assert len(source.beside) == 3  # in the callback, in the arguments, in the object
    assert source.metadata == {"epoch": "1"}
    assert source.warnings == ("a.ckpt: it names code, which was not run: mystery.trainer.State",)
    assert "mystery.trainer" not in sys.modules


def test_objects_among_the_tensors_are_told(tmp_path):
    source = open_source(save({"a": T, "extra": complex(1, 2)}, tmp_path / "a.pt"))
    assert source.warnings == ("a.pt: objects among its tensors are left out: __builtin__.complex",)


def test_whole_modules_are_no_checkpoints(tmp_path):
    path = save(torch.nn.Linear(2, 3), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"object of 'torch\.nn\.modules\.linear\.Linear'"):
        open_source(path)
    with pytest.raises(InputError, match=r"no tensors, but objects: torch\.nn\.mod"):
        open_source(save({"model": torch.nn.Linear(2, 3)}, path))


@pytest.mark.parametrize(
    "tree, says",
    [
        ({}, "no tensors"),
        ({"epoch": 3}, "no tensors"),
        ([1, 2], "no tensors"),
        ({"a": {"b": T}, "a.b": T}, "two tensors"),
        ({1: T, "1": T}, "two tensors"),
        ({"\ud800": T}, "is no text"),
        ({"a": torch.randn(2, dtype=torch.complex64).conj()}, "conjugate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "tree",
)
def test_trees_without_a_meaning_are_refused(tree, says, tmp_path):
    with pytest.raises(InputError, match=says):
        open_source(save(tree, tmp_path / "a.pt"))


def test_tensors_of_other_kinds_are_told_or_refused(tmp_path):
    sparse = torch.eye(3).to_sparse()
    source = open_source(save({"a": T, "sparse": sparse}, tmp_path / "a.pt"))
    assert list(source.tensors) == ["a"]
    assert source.warnings[0].endswith("left out: torch._utils._rebuild_sparse_tensor")
    with pytest.raises(InputError, match="ComplexDoubleStorage"):
        open_source(save({"a": T.to(torch.complex128)}, tmp_path / "a.pt"))


def test_no_file_no_folder_no_kind(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        open_source(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match="0 indices"):
        open_source(tmp_path)
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(InputError, match="not a file"):
        open_source(tmp_path / "pipe.ckpt")
    path = tmp_path / "a.ckpt"
    for data in (
        b"",
        b"PK",
        b"hello",
        b"\x80",
        b"PK\3\4",
        b"{}",
        b"\x93NUMPY",
        b"GGUF" + bytes(99),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError):
            open_source(path)
    assert not is_source(tmp_path)
    assert not is_source(tmp_path / "none.ckpt")
    assert is_source(save({"a": T}, path))
    assert is_source(save({"a": T}, path, legacy=True))


# --- hand-made pickles -----------------------------------------------------------------------


def s(text: str) -> bytes:
    """A text."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def i(number: int) -> bytes:
    """A whole number."""
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def t(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def g(name: str) -> bytes:
    """A global; the attribute is what follows the last dot."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str | bytes, *arguments: bytes) -> bytes:
    return (g(name) if isinstance(name, str) else name) + t(*arguments) + b"R"


def storage(
    key: str = "0", count: int = 4, kind: str = "torch.FloatStorage", *more: bytes
) -> bytes:
    return t(s("storage"), g(kind), s(key), s("cpu"), i(count), *more) + b"Q"


def tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    of: bytes | None = None,
) -> bytes:
    sizes = t(*map(i, shape)), t(*map(i, strides))
    hooks = call("collections.OrderedDict")
    of = storage() if of is None else of
    return call("torch._utils._rebuild_tensor_v2", of, i(offset), *sizes, b"\x89", hooks)


def program(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


def beside_a_tensor(value: bytes) -> bytes:
    """A dict of a sound tensor and another value."""
    return program(b"}(" + s("w") + tensor() + s("x") + value + b"u")


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def archive(data: bytes, **more: bytes) -> bytes:
    """A checkpoint of a hand-made pickle and one storage of four numbers."""
    return zipped({"a/data.pkl": data, "a/data/0": bytes(16), "a/byteorder": b"little"} | more)


MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)


def row(data: bytes, keys: bytes | None = None, numbers: bytes | None = None) -> bytes:
    """The same as a file from before torch 1.6."""
    keys = pickle.dumps(["0"], 2) if keys is None else keys
    numbers = struct.pack("<q", 4) + bytes(16) if numbers is None else numbers
    return MAGIC + SYSTEM + data + keys + numbers


# --- hostile pickles -------------------------------------------------------------------------

CANARY = "CANARY"
"""In a payload: the path of a file that appears when the payload is run."""
TOUCH = f"touch {CANARY}"
WRITE = f"open('{CANARY}','w').close()"
OPENED = t(s(CANARY), s("w"))
OS = call("builtins.__import__", s("os"))
LIVE: dict[str, bytes] = {
    "os.system": call("os.system", s(TOUCH)),
    "posix.system": call("posix.system", s(TOUCH)),
    "os.popen": call("os.popen", s(TOUCH)),
    "os.mkdir": call("os.mkdir", s(CANARY)),
    "os.open": call("os.open", s(CANARY), i(os.O_CREAT | os.O_WRONLY)),
    "os.spawnlp": call("os.spawnlp", i(0), s("touch"), s("touch"), s(CANARY)),
    "subprocess.call": call("subprocess.call", b"](" + s("touch") + s(CANARY) + b"e"),
    "subprocess.getoutput": call("subprocess.getoutput", s(TOUCH)),
    "builtins.eval": call("builtins.eval", s(WRITE)),
    "builtins.exec": call("builtins.exec", s(WRITE)),
    "__builtin__.eval": call("__builtin__.eval", s(WRITE)),
    "builtins.open": g("builtins.open") + OPENED + b"R",
    "io.open": g("io.open") + OPENED + b"R",
    "_io.FileIO": g("_io.FileIO") + OPENED + b"R",
    "pathlib.Path.touch": call(
        call("builtins.getattr", call("pathlib.Path", s(CANARY)), s("touch")),
    ),
    "getattr of a module": call(
        call("builtins.getattr", OS, s("system")), s(TOUCH)
    ),
    "importlib": call(
        call("builtins.getattr", call("importlib.import_module", s("os")), s("system")), s(TOUCH)
    ),
    "operator.attrgetter": call(
        call(call("operator.attrgetter", s("system")), OS),
        s(TOUCH),
    ),
    "operator.methodcaller": call(
        call("operator.methodcaller", s("system"), s(TOUCH)), OS
    ),
    "functools.partial": call(call("functools.partial", g("os.system"), s(TOUCH))),
    "functools.reduce": call(
        call("functools.reduce", g("builtins.getattr"), b"]" + s("system") + b"a", OS), s(TOUCH)
    ),
    "builtins.map": call("builtins.list", call("builtins.map", g("os.system"), t(s(TOUCH)))),
    "timeit.timeit": call("timeit.timeit", s("pass"), s(WRITE)),
    "cProfile.runctx": call("profile.run", s(WRITE), s(os.devnull)),
    "bdb": call(call("builtins.getattr", call("bdb.Bdb"), s("run")), s(WRITE)),
    "code.InteractiveInterpreter": call(
        call("builtins.getattr", call("code.InteractiveInterpreter"), s("runsource")), s(WRITE)
    ),
    "logging.FileHandler": call("logging.FileHandler", s(CANARY)),
    "nested pickle": call("pickle.loads", b"C" + bytes([len(x := program(
        call("os.mkdir", s(CANARY)))
    )]) + x),
    "_pickle.loads": call("_pickle.loads", b"C" + bytes([len(x)]) + x),
    "ctypes": call(
        call("builtins.getattr", call("ctypes.CDLL", b"N"), s("system")),
        b"C" + bytes([len(TOUCH)]) + TOUCH.encode(),
    ),
    "weakref.finalize": call("weakref.finalize", g("builtins.set"), g("os.system"), s(TOUCH)),
    "atexit": call("atexit.register", g("os.system"), s(TOUCH)),
    "numpy runstring": call("numpy.testing._private.utils.runstring", s(WRITE), b"}"),
    "numpy.memmap": call("numpy.memmap", s(CANARY), s("u1"), s("w+"), i(0), t(i(4))),
    "numpy.savetxt": call("numpy.savetxt", s(CANARY), b"]" + i(1) + b"a"),
    "torch collect_env": call("torch.utils.collect_env.run", s(TOUCH)),
    "torch from_type": call(
        "torch._tensor._rebuild_from_type_v2", g("os.system"), g("torch.Tensor"), t(s(TOUCH)), b"}"
    ),
    "torch.save": call("torch.save", i(1), s(CANARY)),
    "torch.from_file": call("torch.from_file", s(CANARY), b"\x88", i(1)),
    "hooks that are called": call(
        "torch._utils._rebuild_parameter", call("os.system", s(TOUCH)), b"\x89", b"}"
    ),
    "INST": b"(" + s(TOUCH) + b"ios\nsystem\n",
    "OBJ": b"(" + g("os.system") + s(TOUCH) + b"o",
    "OBJ of a class": b"(" + g("logging.FileHandler") + s(CANARY) + b"o",
    "NEWOBJ": g("functools.partial") + t(g("os.system"), s(TOUCH)) + b"\x81)R",
    "NEWOBJ_EX": g("functools.partial") + t(g("os.system"), s(TOUCH)) + b"}\x92)R",
    "copyreg.__newobj__": call(
        call("copyreg.__newobj__", g("functools.partial"), g("os.system"), s(TOUCH))
    ),
    "STACK_GLOBAL": s("os") + s("system") + b"\x93" + t(s(TOUCH)) + b"R",
    "STACK_GLOBAL from the memo": s("system") + b"\x940" + s("os") + b"\x940h\x01h\x00\x93"
    + t(s(TOUCH)) + b"R",
    "dotted STACK_GLOBAL": s("shutil") + s("os.system") + b"\x93" + t(s(TOUCH)) + b"R",
    "memo rewritten": b"Nq\x010" + g("os.system") + b"q\x010h\x01" + t(s(TOUCH)) + b"R",
    "memo of huge numbers": g("os.system") + b"r\0\0\1\0" + b"0j\0\0\1\0" + t(s(TOUCH))
    + b"R",
    "text memo": g("os.system") + b"p99\n0g99\n" + t(s(TOUCH)) + b"R",
    "old text": b"cos\nsystem\n(V" + TOUCH.encode() + b"\ntR",
    "old quoted text": b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR",
    "thrown away": call("os.system", s(TOUCH)) + b"0N",
    "thrown away with the mark": b"N(" + call("os.system", s(TOUCH)) + b"1",
    "a key": b"}" + call("os.mkdir", s(CANARY)) + b"Ns",
    "BUILD": call("functools.partial", g("builtins.list"))
    + t(g("os.system"), t(s(TOUCH)), b"}", b"N") + b"b)R",
    "BUILD that sets items": call("argparse.Namespace") + b"}(" + s("a")
    + call("os.system", s(TOUCH)) + b"ub",
    "extended": b"](" + call("os.system", s(TOUCH)) + b"e",
    "deque": call("collections.deque", b"](" + call("os.system", s(TOUCH)) + b"e"),
    "frozenset": b"(" + call("os.system", s(TOUCH)) + b"\x91",
    "DUP": g("os.system") + b"2" + t(s(TOUCH)) + b"R\x86",
    "a frame": b"\x95" + struct.pack("<Q", len(x := call("os.system", s(TOUCH)))) + x,
}  # fmt: skip
"""Programs that Python's pickle runs."""
DEAD: dict[str, bytes] = {
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x01",
    "EXT4": b"\x84\x01\x01\x01\x01",
    "PERSID": b"Pcanary\n",
    "persistent text": s("storage") + b"Q",
    "persistent nothing": b"NQ",
    "persistent list": b"]Q",
    "persistent code": t(s("module"), g("os.system"), s("a.py"), s(WRITE)) + b"Q",
    "persistent call": call("os.system", s("true")) + b"Q",
    "persistent of another kind": t(s("file"), s("/etc/passwd")) + b"Q",
    "storage with a number for a key": t(
        s("storage"), g("torch.FloatStorage"), i(0), s("cpu"), i(4)) + b"Q",
    "storage of a gadget": storage(kind="os.system"),
    "storage of another module": storage(kind="evil.FloatStorage"),
    "storage of objects": storage(kind="torch.ObjectStorage"),
    "storage of fewer numbers": storage(count=3),
    "storage of negative numbers": storage(count=-4),
    "storage of too many numbers": storage(count=1 << 62),
    "storage that is not there": storage(key="1"),
    "storage outside": storage(key="../../data.pkl"),
    "storage of two sizes": t(storage(count=4), storage(count=8, kind="torch.HalfStorage"),
                              storage(count=8)),
    "view beyond": storage("0", 4, "torch.FloatStorage", t(s("v"), i(2), i(3))),
    "view that is odd": storage("0", 4, "torch.FloatStorage", t(s("v"))),
    "tensor of a gadget": tensor(of=call("os.system", s("true"))),
    "tensor beyond": tensor((5,), (1,)),
    "tensor beyond by its offset": tensor((4,), (1,), 1),
    "tensor beyond by its strides": tensor((2, 2), (3, 1)),
    "negative strides": tensor((4,), (-1,), 3),
    "negative offset": tensor((4,), (1,), -1),
    "negative sizes": tensor((-1, -4), (1, 1)),
    "sizes that overflow": tensor((1 << 31, 1 << 31, 4), (0, 0, 1)),
    "endless expansion": tensor((1 << 30, 4), (0, 1)),
    "sizes beyond": tensor((1 << 40,), (0,)),
    "nine dimensions": tensor((1,) * 9, (1,) * 9),
    "strides of other number": tensor((2, 2), (1,)),
    "offset of an empty tensor": tensor((0,), (1,), 1 << 40),
    "strides that overflow": tensor((2,), (1 << 62,)),
    "no arguments": call("torch._utils._rebuild_tensor_v2"),
    "many arguments": call("torch._utils._rebuild_tensor_v2", *[b"N"] * 10),
    "arguments in a list": g("torch._utils._rebuild_tensor_v2") + b"]R",
    "call of a number": i(1) + b")R",
    "call of a text": s("os.system") + b")R",
    "state of a tensor": tensor() + b"}b",
    "state of a number": i(1) + b"}b",
    "items of a number": i(1) + i(2) + b"a",
    "pairs of a list": b"]" + i(1) + i(2) + b"s",
    "a list for a key": b"}]Ns",
    "a tensor for a key": b"}" + tensor() + b"Ns",
    "nested tuples for a key": b"}" + b")" + b"\x85" * 50 + b"Ns",
    "a key without a value": b"}(" + s("a") + b"u",
    "absent memo": b"h\x63",
    "empty stack": b"00000000",
    "no mark": b"t" * 5,
    "name that is no text": i(1) + i(2) + b"\x93",
    "buffers": b"\x97",
    "read-only buffers": b"N\x98",
    "protocol 6": b"\x80\x06N",
    "unknown opcode": b"\xff",
    "not UTF-8": b"X\x01\0\0\0\xff",
    "text beyond": b"X\xff\xff\xff\x7fabc",
    "long text beyond": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
    "negative length": b"\x8b\xff\xff\xff\xff",
    "endless number": b"L" + b"9" * 5000 + b"L\n",
    "endless marks": b"(" * 2000,
    "OrderedDict of odd pairs": call("collections.OrderedDict", b"](" + i(1) + b"e"),
    "Size of texts": call("torch.Size", t(s("a"))),
    "dtype of a gadget": call(
        "torch._utils._rebuild_tensor_v3", storage(), i(0), t(), t(), b"\x89", b"}",
        g("os.system"),
    ),
    "a list in itself": b"]q\x09h\x09a",
    "a dict in itself": b"}q\x09" + s("a") + b"h\x09s",
    "billion laughs": b"]" + s("ha") + b"a" + b"".join(
        b"q" + bytes([20 + k]) + b"](" + (b"h" + bytes([20 + k])) * 10 + b"e" for k in range(30)),
}  # fmt: skip
"""Programs that no pickle of torch's is like: refused, or read without an effect."""
HARMLESS = {"persistent code"}
"""Of the latter, those that are read."""


def armed(payload: bytes, canary: Path) -> bytes:
    """A payload with the path of its canary, in texts whose lengths are then right."""
    old, new = CANARY.encode(), str(canary).encode()
    assert len(new) == len(old), "so that no length changes"
    return payload.replace(old, new)


@pytest.fixture(scope="module")
def canaries(tmp_path_factory):
    """Paths of six letters, as CANARY is; the tests run in their folder."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("canaries"))
    yield {name: Path(f"c{number:05}") for number, name in enumerate(LIVE)}
    os.chdir(before)


def test_the_live_programs_do_harm_where_they_are_run(canaries):
    """Otherwise the next test would prove nothing."""
    for name, payload in LIVE.items():
        protocol = 4 if name.startswith("dotted") else 2
        data = armed(program(payload, protocol), canaries[name])
        canaries[name].with_suffix(".pkl").write_bytes(data)
    code = """
import pickle, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
for file in sorted(Path().glob("*.pkl")):
    try:
        pickle.loads(file.read_bytes())
    except Exception as error:
        print(file, repr(error))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spared = [name for name, path in canaries.items() if not path.exists()]
    assert not spared, ran.stdout
    for path in [*canaries.values(), *Path().glob("*.pkl")]:
        path.rmdir() if path.is_dir() else path.unlink()


WATCHED = """
import json, sys
from pathlib import Path
from difftool.errors import InputError
from difftool.storage.tensor_file import open_source
seen = []
str(b"x", "raw-unicode-escape")  # Python imports this one when it is first used
def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append([event, str(arguments)])
    elif event.split(".")[0] in (
        "import", "exec", "compile", "os", "subprocess", "socket", "ctypes", "pickle", "code",
        "marshal", "shutil", "urllib", "mmap", "tempfile"
    ):
        seen.append([event, str(arguments)])
files = sorted(Path().glob("*.ckpt"))
open_source(files[0])
sys.addaudithook(watch)
outcomes = {}
for file in files[1:]:
    try:
        found = open_source(file)
        outcomes[file.name] = [list(found.tensors), found.warnings]
    except InputError as error:
        outcomes[file.name] = str(error)
watching = list(seen)
print(json.dumps({"seen": watching, "outcomes": outcomes}))
"""


def test_hostile_programs_are_never_run(canaries):
    """In zip archives and before: no canary, no import, no process, no file but the one read."""
    save({"w": T}, Path("0.ckpt"))
    names: dict[str, str] = {}
    for number, (name, payload) in enumerate((LIVE | DEAD).items()):
        data = armed(payload, canaries[name]) if name in LIVE else payload
        for kind, wrap in (("zip", archive), ("legacy", row)):
            for where, around in (("root", program), ("beside", beside_a_tensor)):
                file = Path(f"1-{number:03}-{kind}-{where}.ckpt")
                names[file.name] = name
                file.write_bytes(wrap(around(data)))
    before = set(os.listdir())
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["seen"] == []
    assert set(os.listdir()) == before
    assert said["outcomes"].keys() == names.keys()
    for file, outcome in said["outcomes"].items():
        name = names[file]
        if "root" in file or (name in DEAD and name not in HARMLESS):
            assert isinstance(outcome, str), (file, name)
        else:
            assert outcome[0] == ["w"], (file, name, outcome)
            if name in LIVE:
                assert "names code, which was not run" in outcome[1][0], name
    assert len(LIVE) + len(DEAD) >= 120


@pytest.mark.parametrize("name", ["os.system", "INST", "STACK_GLOBAL"])
def test_what_a_program_names_is_told(name, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(archive(beside_a_tensor(LIVE[name])))
    source = open_source(path)
    assert source.warnings[0] == "a.ckpt: it names code, which was not run: os.system"
    assert source.load()["w"].equal(torch.zeros(4))


def test_pickles_behind_the_end_are_not_read(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(archive(program(b"}" + s("w") + tensor() + b"s") + b"garbage"))
    assert list(open_source(path).tensors) == ["w"]


def refused(value: bytes) -> str:
    with pytest.raises(InputError) as error:
        read_pickle(io.BytesIO(program(value, 4)), "it")
    return str(error.value)


def test_every_limit_holds(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    assert "steps" in refused(b"N0" * 1000)
    # copying costs what it copies
    pairs = b"](" + b"".join(t(i(k), b"N") for k in range(50)) + b"eq\x01"
    again = b"".join(b"0" + g("collections.OrderedDict") + b"h\x01\x85R" for _ in range(100))
    assert "steps" in refused(pairs + again)
    row = b"(" + b"N" * 50 + b"tq\x01"
    again = b"".join(b"0" + g("some.thing") + b"h\x01R" for _ in range(100))
    assert "steps" in refused(row + again)
    text = s("x" * 5_000) + b"q\x01"
    again = b"".join(
        b"0" + g("_codecs.encode") + b"h\x01" + s("latin1") + b"\x86R" for _ in range(100)
    )
    assert "steps" in refused(text + again)
    monkeypatch.setattr(pickles, "MAX_OPCODES", 10**6)
    monkeypatch.setattr(pickles, "MAX_MEMO", 100)
    assert "keeps more" in refused(b"N" + b"\x94" * 101)
    monkeypatch.setattr(pickles, "MAX_STACK", 100)
    assert "wait" in refused(b"N" * 102)
    monkeypatch.setattr(pickles, "MAX_STRING", 100)
    assert "limit" in refused(s("x" * 101))
    assert "malformed" in refused(b"cos\n" + b"x" * 200 + b"\n")
    monkeypatch.setattr(pickles, "MAX_PICKLE", 1000)
    assert "longer" in refused((s("x" * 99) + b"0") * 20)


def test_long_keys_are_not_joined_again_and_again(tmp_path):
    path = tmp_path / "a.ckpt"
    key = s("k" * 4_000) + b"q\x01"
    nested = b"}" + key + b"}" + b"h\x01}" * 50 + s("w") + tensor() + b"s" * 52
    path.write_bytes(archive(program(nested)))
    with pytest.raises(InputError) as error:
        open_source(path)
    assert "a name of 1024 characters or more" in str(error.value)


def test_hostile_programs_are_refused_soon():
    numbers = b"".join(b"\x8a\x08" + (k << 40).to_bytes(8, "little") + b"N" for k in range(40_000))
    with pytest.raises(InputError), ends():  # keys that collide
        read_pickle(io.BytesIO(program(b"}(" + numbers + b"u\x00")), "it")
    for name in ("billion laughs", "a list in itself", "endless marks"):
        data = archive(beside_a_tensor(DEAD[name]))
        path = Path(os.devnull)
        with pytest.raises(InputError), ends():
            entries = zipfile.ZipFile(io.BytesIO(data))
            found = read_pickle(io.BytesIO(entries.read("a/data.pkl")), "it")
            checkpoints._Tree(path, {"0": (0, 16)}, 1 << 20).checkpoint(found)


# --- zip archives ----------------------------------------------------------------------------

GOOD = program(b"}" + s("w") + tensor() + b"s")
ENTRIES = {"a/data.pkl": GOOD, "a/data/0": struct.pack("<4f", 1, 2, 3, 4), "a/version": b"3\n"}


def build(
    entries: dict[str, bytes] | list[tuple[str, bytes]],
    *,
    local: dict[str, Any] | None = None,
    central: dict[str, Any] | None = None,
    end: dict[str, Any] | None = None,
    only: str = "a/data/0",
    before: bytes = b"",
    after: bytes = b"",
    wide: bool = False,
) -> bytes:
    """A zip archive in which any field of the headers of `only`, or of its end, is another."""
    data, directory = bytearray(before), b""
    items = list(entries.items()) if isinstance(entries, dict) else entries
    for name, content in items:
        fields: dict[str, Any] = {
            **{"flags": 0, "method": 0, "crc": zlib.crc32(content), "packed": len(content)},
            **{"size": len(content), "name": name.encode(), "extra": b""},
        }
        inner: dict[str, Any] = fields | ((local or {}) if name == only else {})
        outer: dict[str, Any] = (
            fields | {"start": len(data)} | ((central or {}) if name == only else {})
        )
        numbers = [20, inner["flags"], inner["method"], 0, 0, inner["crc"], inner["packed"]]
        sizes = [inner["size"], len(inner["name"]), len(inner["extra"])]
        data += struct.pack("<4s5H3I2H", b"PK\3\4", *numbers, *sizes)
        data += inner["name"] + inner["extra"] + content
        where = [outer["size"], outer["packed"], outer["start"]]
        if wide:
            outer["extra"] = struct.pack("<2H3Q", 1, 24, *where) + struct.pack(
                "<2H4s", 9, 4, b"odd"
            )
            where = [0xFFFFFFFF] * 3
        numbers = [20, 20, outer["flags"], outer["method"], 0, 0, outer["crc"], where[1], where[0]]
        sizes = [len(outer["name"]), len(outer["extra"]), 0, 0, 0]
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers, *sizes, 0, where[2])
        directory += outer["name"] + outer["extra"]
    last = {"count": len(items), "length": len(directory), "start": len(data), "comment": 0}
    last |= end or {}
    data += directory
    if wide:
        counts = last["count"], last["count"], last["length"], last["start"]
        place = len(data)
        data += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *counts)
        data += struct.pack("<4sIQI", b"PK\6\7", 0, (end or {}).get("place", place), 1)
        last |= {"count": 0xFFFF, "length": 0xFFFFFFFF, "start": 0xFFFFFFFF}
    tail = last["count"], last["count"], last["length"], last["start"], last["comment"]
    return bytes(data) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *tail) + after


def test_archives_with_wide_sizes_are_read(tmp_path):
    path = tmp_path / "a.ckpt"
    for wide in (False, True):
        path.write_bytes(build(ENTRIES, wide=wide))
        assert open_source(path).load()["w"].tolist() == [1, 2, 3, 4]


def test_checksums_may_be_absent(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(build(ENTRIES, central={"crc": 0}, only="a/data.pkl"))
    assert open_source(path).load()["w"].tolist() == [1, 2, 3, 4]


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in ENTRIES.items() if key != name}


ARCHIVES = {
    "encrypted": (build(ENTRIES, central={"flags": 1}), "encrypted"),
    "strongly encrypted": (build(ENTRIES, central={"flags": 64}), "encrypted"),
    "compressed": (build(ENTRIES, central={"method": 8}, local={"method": 8}), "compressed"),
    "compressed by its own header": (build(ENTRIES, local={"method": 8}), "another file"),
    "packed size": (build(ENTRIES, central={"packed": 4}), "two sizes"),
    "another name": (build(ENTRIES, local={"name": b"a/data/1"}), "another file"),
    "name of no text": (build(ENTRIES, central={"name": b"a/data/\xff"}), "malformed"),
    "the same name twice": (build([*ENTRIES.items(), ("a/data/0", bytes(16))]), "same name"),
    "entries in one place": (
        build(ENTRIES, central={"start": 0, "name": b"a/data.pkl"}),
        "overlaps",
    ),
    "start beyond": (build(ENTRIES, central={"start": 1 << 31}), "malformed"),
    "size beyond": (build(ENTRIES, central={"size": 1 << 31, "packed": 1 << 31}), "reaches into"),
    "last into the directory": (
        build(ENTRIES, central={"size": 99, "packed": 99}, only="a/version"),
        "reaches into",
    ),
    "bytes before": (build(ENTRIES, before=b"PK\3\4" + bytes(60)), "does not begin"),
    "bytes behind": (build(ENTRIES, after=b"x"), "cut off"),
    "comment": (build(ENTRIES, end={"comment": 3}, after=b"abc"), "cut off"),
    "fewer entries": (build(ENTRIES, end={"count": 2}), "damaged"),
    "more entries": (build(ENTRIES, end={"count": 4}), "malformed"),
    "no entries": (build(ENTRIES, end={"count": 0, "length": 0}), "not where"),
    "directory elsewhere": (build(ENTRIES, end={"start": 0}), "not where"),
    "wide end elsewhere": (build(ENTRIES, wide=True, end={"place": 0}), "damaged"),
    "two roots": (build(ENTRIES | {"b/x": b""}), "not one that torch.save"),
    "no root": (build(ENTRIES | {"x": b""}), "not one that torch.save"),
    "absolute": (build({"/a/data.pkl": GOOD}), "unsafe name"),
    "parent": (build(ENTRIES | {"a/../../x": b""}), "unsafe name"),
    "backslash": (build(ENTRIES | {"a/..\\x": b""}), "unsafe name"),
    "drive": (build({"c:/data.pkl": GOOD}), "unsafe name"),
    "null": (build(ENTRIES | {"a/x\0": b""}), "unsafe name"),
    "no pickle": (build(without("a/data.pkl")), r"without data\.pkl"),
    "no storage": (build(without("a/data/0")), "is missing"),
    "short storage": (build(ENTRIES | {"a/data/0": bytes(12)}), "12 bytes, not 16"),
    "long storage": (build(ENTRIES | {"a/data/0": bytes(20)}), "20 bytes, not 16"),
    "wrong sum": (build(ENTRIES, central={"crc": 7}, only="a/data.pkl"), "checksum"),
    "big-endian": (build(ENTRIES | {"a/byteorder": b"big"}), "little-endian"),
    "odd byte order": (build(ENTRIES | {"a/byteorder": bytes(100)}), "larger"),
    "TorchScript": (build(ENTRIES | {"a/constants.pkl": b"\x80\2)."}), "TorchScript"),
    "TorchScript code": (build(ENTRIES | {"a/code/x.py": b""}), "TorchScript"),
    "an archive within": (build({"a/data.pkl": build(ENTRIES)}), "malformed or not safe"),
    "numpy's": (build({"arr_0.npy": b"\x93NUMPY"}), "not one that torch.save"),
    "spreadsheet": (build({"xl/workbook.xml": b""}), r"without data\.pkl"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_odd_archives_are_refused(case, tmp_path):
    data, says = ARCHIVES[case]
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        open_source(path)


def test_deflated_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in ENTRIES.items():
            made.writestr(name, data * 100)
    with pytest.raises(InputError, match="compressed"):
        open_source(path)


def test_torchscript_is_refused_by_name(tmp_path):
    import warnings

    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputError, match="TorchScript"):
        open_source(path)


@pytest.mark.slow
def test_archives_of_very_many_entries_are_refused(tmp_path):
    path = save({str(k): torch.zeros(1) for k in range(66_000)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="65536 tensors"):
        open_source(path)


# --- before torch 1.6 ------------------------------------------------------------------------

NUMBERS = struct.pack("<q4f", 4, 1, 2, 3, 4)
ROWS = {
    "another magic": (pickle.dumps(1, 2), r"none of torch\.save"),
    "no number": (pickle.dumps({"a": 1}, 2), r"none of torch\.save"),
    "another protocol": (MAGIC[:-4] + b"K\x07." + SYSTEM, "malformed|protocol"),
    "big-endian": (MAGIC + pickle.dumps({"little_endian": False}, 2), "little-endian"),
    "no system": (MAGIC + pickle.dumps([], 2), "little-endian"),
    "no keys": (row(GOOD, pickle.dumps([], 2)), "not that of its tensors"),
    "keys of numbers": (row(GOOD, pickle.dumps([0], 2)), "list of storages"),
    "keys twice": (row(GOOD, pickle.dumps(["0", "0"], 2), NUMBERS * 2), "not that"),
    "other keys": (row(GOOD, pickle.dumps(["0", "1"], 2), NUMBERS * 2), "not that"),
    "another count": (row(GOOD, None, struct.pack("<q4f", 3, 1, 2, 3, 4)), "another size"),
    "negative count": (row(GOOD, None, struct.pack("<q4f", -4, 1, 2, 3, 4)), "another size"),
    "fewer numbers": (row(GOOD, None, NUMBERS[:-1]), "cut off"),
    "more numbers": (row(GOOD, None, NUMBERS + b"x"), "end at"),
}


@pytest.mark.parametrize("case", ROWS)
def test_odd_old_files_are_refused(case, tmp_path):
    data, says = ROWS[case]
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        open_source(path)


def test_views_of_storages_are_read(tmp_path):
    """As torch wrote them before tensors had offsets of their own."""
    path = tmp_path / "a.pt"
    part = storage("0", 4, "torch.FloatStorage", t(s("v"), i(1), i(3)))
    path.write_bytes(
        row(program(b"}" + s("w") + tensor((2,), (1,), 1, part) + b"s"), None, NUMBERS)
    )
    assert open_source(path).load()["w"].tolist() == [3, 4]


def test_the_tar_format_is_refused_by_name(tmp_path):
    import tarfile

    path = tmp_path / "a.pt"
    for format in (tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(path, "w:", format=format) as made:
            made.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
        with pytest.raises(InputError, match="tar format"):
            open_source(path)


# --- damage ----------------------------------------------------------------------------------


@LAYOUTS
def test_files_that_are_cut_off_anywhere_are_refused(legacy, tmp_path):
    tree = {"state_dict": every_tensor() | {"big": torch.zeros(1000)}, "epoch": 1}
    path = save(tree, tmp_path / "a.ckpt", legacy)
    data = path.read_bytes()
    for part in range(50):
        path.write_bytes(data[: len(data) * part // 50])
        with pytest.raises(InputError):
            open_source(path)
    path.write_bytes(data[:-1])
    with pytest.raises(InputError):
        open_source(path)


def damage(data: bytes, rng: random.Random) -> bytes:
    mutable = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        where = rng.randrange(len(mutable))
        match rng.randrange(4):
            case 0:
                mutable[where] = rng.randrange(256)
            case 1:
                mutable[where] ^= 1 << rng.randrange(8)
            case 2:
                mutable[where] = rng.choice(b"(.0123QRbcehijloqrstu})]\x80\x85\x86\x87\x93\x94")
            case 3:
                other = rng.randrange(len(mutable))
                size = rng.randint(1, 20)
                mutable[where : where + size] = mutable[other : other + size]
    return bytes(mutable)


def check_damaged(path: Path, count: int, seed: int) -> dict[str, int]:
    """Reads damaged checkpoints; how many were refused, and read."""
    rng, outcomes = random.Random(seed), {"refused": 0, "read": 0}
    tree = {"state_dict": every_tensor(), "epoch": 1, "x": argparse.Namespace(a=[1, {"b": 2}])}
    save(tree, path)
    inner = zipfile.ZipFile(path).read(f"{path.stem}/data.pkl")
    zeros = {f"a/data/{k}": bytes(4096) for k in range(40)}
    whole = [save(tree, path, legacy).read_bytes() for legacy in (False, True)]
    for turn in range(count):
        data = damage(whole[turn % 2], rng)
        if turn % 3 == 0:  # a damaged pickle in a sound archive, of which the sizes fit
            data = build({"a/data.pkl": damage(inner, rng)} | zeros)
        path.write_bytes(data)
        try:
            with ends():
                source = open_source(path)
        except InputError as error:
            outcomes["refused"] += 1
            assert "\n" not in error.what
        else:
            outcomes["read"] += 1
            for place in source.tensors.values():
                assert 0 <= place.info.start <= place.info.end <= len(data)
            for tensor in source.load().values():
                tensor.clone()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return outcomes


def test_damaged_checkpoints_never_crash(tmp_path):
    outcomes = check_damaged(tmp_path / "a.ckpt", 400, 0)
    assert min(outcomes.values()) > 20


@pytest.mark.slow
def test_many_damaged_checkpoints_never_crash(tmp_path):
    check_damaged(tmp_path / "a.ckpt", 20_000, 1)
