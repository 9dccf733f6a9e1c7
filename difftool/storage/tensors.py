"""Where a tensor's bytes lie in a file, and the ways to them. Torch-free until tensors are made.

Every reader of files gives `Located` tensors, whatever the format; nothing is read for that.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from difftool.errors import InputError
from difftool.storage.read import open_file

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

Op = Literal["copy", "reshape", "stack", "transpose"]
"""What is done to a tensor of another layout; formats.rules says when."""
MAX_DIM = 1 << 31
MAX_RANK = 8
CHUNK = 1 << 20

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Size of an element of every dtype of safetensors, by its name there."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are computed with; 8-bit floats are only stored."""
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""torch's names of dtypes, by safetensors' names; it has no 4- and 6-bit numbers, and old versions
of it lack others."""


class Info(NamedTuple):
    """What a file says of a tensor; start and end are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None
    """In elements, of a tensor whose bytes do not lie row by row without gaps from start to end;
    None for all others."""

    @property
    def size(self) -> int:
        """Bytes of the tensor when it lies row by row."""
        return byte_size(self.dtype, self.shape)


class Located(NamedTuple):
    """Where a tensor lies, or the part of one that it is."""

    file: Path
    name: str
    """Of the tensor in the file."""
    info: Info
    """Dtype and shape of what is meant, and the bytes that hold it."""
    op: Op = "copy"
    """What it is of the tensor in the file: that itself, a reshaped or a transposed one, or some of
    its rows."""


class Piece(NamedTuple):
    """A tensor to be written: its description and a way to its bytes."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]
    """Buffers that joined are its bytes, little-endian, row by row."""


def byte_size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor, rounded up."""
    return -(-prod(shape) * BITS[dtype] // 8)


def rows_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor that lies row by row, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- bytes -----------------------------------------------------------------------------------


def file_chunks(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from start to end, a few megabytes at a time."""
    with open_file(path) as file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(CHUNK, end - start))
            if not chunk:
                raise _shorter(path)
            start += len(chunk)
            yield chunk


def _strided_chunks(path: Path, info: Info) -> Iterator[bytes]:
    """The bytes of a tensor of any strides, row by row, a few megabytes at a time."""
    import numpy as np

    assert info.strides is not None
    width = BITS[info.dtype] // 8
    if not info.size:
        return
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < info.end:
            raise _shorter(path)
        # numpy refuses an array that would reach beyond the buffer
        strides = (*(step * width for step in info.strides), 1)
        view = np.ndarray((*info.shape, width), np.uint8, data, info.start, strides)
        rows = view if info.shape[1:] else view[np.newaxis]
        step = max(1, CHUNK // (info.size // len(rows)))
        try:
            for first in range(0, len(rows), step):
                yield rows[first : first + step].tobytes()
        finally:
            del view, rows  # a mapping that is looked at cannot be closed


def _shorter(path: Path) -> InputError:
    return InputError(f"{path} became shorter while it was read")


def piece_of_file(path: Path, info: Info) -> Piece:
    """A tensor of another file, streamed."""
    if info.strides is not None:
        return Piece(info.dtype, info.shape, lambda: _strided_chunks(path, info))
    return Piece(info.dtype, info.shape, lambda: file_chunks(path, info.start, info.end))


def piece_of_tensor(tensor: Tensor) -> Piece:
    """A torch tensor of any device and strides."""
    import torch

    names = {getattr(torch, name, None): dtype for dtype, name in TORCH_NAMES.items()}

    def chunks() -> list[Any]:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return [flat.view(torch.uint8).numpy().data] if flat.numel() else []

    return Piece(names[tensor.dtype], tuple(tensor.shape), chunks)


def digest_of(piece: Piece) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    digest = hashlib.sha256()
    for chunk in piece.chunks():
        digest.update(chunk)
    return digest.hexdigest()


# --- tensors ---------------------------------------------------------------------------------


def torch_dtype(name: str) -> Dtype:
    """torch's dtype for a name of safetensors; InputError if this torch has none."""
    import torch

    found = getattr(torch, TORCH_NAMES.get(name, ""), None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"tensors of dtype {name} cannot be loaded", "torch has no such numbers")
    return found


def load_located(
    places: Mapping[str, Located],
    device: str = "cpu",
    dtype: Dtype | None = None,
    as_is: Collection[str] = (),
) -> dict[str, Tensor]:
    """Tensors by the same names, mapped into memory; nothing is read before it is used.

    dtype: to which tensors are cast, but those named in as_is; on the CPU while they are read, so
    that their files take no memory. Writing to a tensor never reaches its file. InputError if a
    file has become shorter or torch has no such dtype.
    """
    mapped: dict[Path, Any] = {}
    found = {}
    for name, place in places.items():
        held = torch_dtype(place.info.dtype)
        wanted = held if dtype is None or name in as_is else dtype
        if wanted != held and device == "cpu" and place.info.strides is None:
            found[name] = _cast(place, wanted)
        else:
            found[name] = _load(place, mapped).to(device, wanted)
    return found


def _cast(place: Located, dtype: Dtype) -> Tensor:
    import torch

    info, theirs, done = place.info, torch_dtype(place.info.dtype), 0
    tensor = torch.empty(info.shape, dtype=dtype)
    flat, buffer = tensor.view(-1), memoryview(bytearray(min(4 * CHUNK, info.end - info.start)))
    with open_file(place.file) as file:
        file.seek(info.start)
        while done < len(flat):
            wanted = min(len(buffer), (len(flat) - done) * theirs.itemsize)
            if file.readinto(buffer[:wanted]) != wanted:
                raise _shorter(place.file)
            numbers = torch.frombuffer(buffer[:wanted], dtype=theirs)
            flat[done : done + len(numbers)] = numbers
            done += len(numbers)
    return tensor


def _load(place: Located, mapped: dict[Path, Any]) -> Tensor:
    import torch

    file, info = place.file, place.info
    dtype = torch_dtype(info.dtype)
    tensor = torch.empty(0, dtype=dtype)
    if not info.size:
        return tensor.reshape(info.shape)
    if file not in mapped:
        try:
            size = file.stat().st_size
            mapped[file] = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot read {file}", str(error)) from None
    if mapped[file].nbytes() < info.end:
        raise _shorter(file)
    storage = mapped[file][info.start : info.end]
    if info.start % dtype.itemsize:  # not every processor reads numbers from everywhere
        storage = storage.clone()
    strides = rows_strides(info.shape) if info.strides is None else info.strides
    return tensor.set_(storage, 0, info.shape, strides)
