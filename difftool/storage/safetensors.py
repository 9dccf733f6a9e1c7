"""Safetensors files: a strict reader of headers, an atomic writer, bytes from file to file.

Torch-free but for `load_tensors` and `save_tensors`. A file is an unsigned 64-bit length N,
N bytes of JSON, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.errors import InputError, unreadable
from difftool.storage.commit import atomic_file
from difftool.storage.read import open_file
from difftool.storage.strict_json import parse_json
from difftool.storage.tensors import (
    BITS,
    MAX_DIM,
    MAX_RANK,
    Info,
    Located,
    Piece,
    byte_size,
    digest_of,
    load_located,
    piece_of_file,
    piece_of_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 16 << 20
MAX_TENSORS = 65_536
DATA_HASH = "modelspec.hash_sha256"
"""Metadata key that the writer fills with the hash of all bytes after the header."""


class Header(NamedTuple):
    """A file's metadata, and its tensors in the order of their bytes."""

    metadata: dict[str, str]
    tensors: dict[str, Info]


# --- reading ---------------------------------------------------------------------------------


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do; says nothing of the rest."""
    try:
        with open_file(path) as file:
            return file.read(9)[8:] in (b"{", b" ")
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a safetensors file; InputError for anything that the format does not allow.

    Stricter than the safetensors library: refuses duplicate names and keys, bytes before the
    opening brace, absurd sizes and counts.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _refused(path, "it is cut off, or not a safetensors file")
            if length > MAX_HEADER:
                raise _refused(path, f"a header of {length} bytes, the limit is {MAX_HEADER}")
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    if not text.startswith(b"{"):
        raise _refused(path, "its header does not begin with {")
    values = parse_json(text, f"the header of {path}")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refused(path, "its metadata is not text by name")
    if len(values) > MAX_TENSORS:
        raise _refused(path, f"{len(values)} tensors, the limit is {MAX_TENSORS}")
    found = {name: _info(path, name, value, 8 + length) for name, value in values.items()}
    tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, info in tensors.items():
        if info.start != position:
            raise _refused(path, f"a gap or an overlap before tensor {name!r}")
        position = info.end
    if position != size:
        hint = "it is cut off: download or copy it again" if position > size else None
        raise _refused(path, f"its tensors end at byte {position} of {size}", hint)
    return Header(metadata, tensors)


def _info(path: Path, name: str, value: Any, base: int) -> Info:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if (
            not rest
        ):
            if not all(type(number) is int for number in (*shape, start, end)):
                raise _refused(path, f"tensor {name!r} has a size that is not a whole number")
        case _:
            raise _refused(path, f"tensor {name!r} is not described as the format demands")
    if dtype not in BITS:
        raise _refused(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if len(shape) > MAX_RANK or not all(0 <= dim <= MAX_DIM for dim in shape):
        raise _refused(path, f"tensor {name!r} has an absurd shape")
    if not 0 <= start <= end or (end - start) * 8 != prod(shape) * BITS[dtype]:
        raise _refused(path, f"the bytes of tensor {name!r} do not fit its shape")
    return Info(dtype, tuple(shape), base + start, base + end)


def _refused(path: Path, why: str, hint: str | None = None) -> InputError:
    return InputError(f"{path} is not a sound safetensors file", why, hint)


def load_tensors(
    path: Path, names: Iterable[str] | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Tensors of a file (None: all), mapped into memory; InputError as `read_header`."""
    tensors = read_header(path).tensors
    try:
        wanted = {name: tensors[name] for name in (tensors if names is None else names)}
    except KeyError as error:
        raise InputError(f"{path} has no tensor {error}") from None
    places = {name: Located(path, name, info) for name, info in wanted.items()}
    return load_located(places, device)


def digests(path: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of tensors' bytes, in hex, by name (None: all)."""
    tensors = read_header(path).tensors
    return {name: digest_of(piece_of_file(path, tensors[name])) for name in names or tensors}


# --- writing ---------------------------------------------------------------------------------


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write tensors as a safetensors file; see `write_pieces`."""
    pieces = {name: piece_of_tensor(tensor) for name, tensor in tensors.items()}
    return write_pieces(path, pieces, metadata, overwrite)


def write_pieces(
    path: Path,
    pieces: Mapping[str, Piece],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write a safetensors file whole or not at all; the SHA-256 of each tensor's bytes, by name.

    The same tensors and metadata give the same bytes. UsageError if the file exists and is not to
    be replaced. Metadata that names DATA_HASH has it filled in.
    """
    metadata = dict(sorted((metadata or {}).items()))
    if DATA_HASH in metadata:
        metadata[DATA_HASH] = "0x" + "0" * 64
    header, hashes, everything = _header(pieces, metadata), {}, hashlib.sha256()
    # Hashed beside the writing: each takes about as long as the other, and neither holds the GIL.
    with atomic_file(path, overwrite) as file, ThreadPoolExecutor(2) as pool:
        file.write(header)
        for name in _order(pieces):
            digest = hashlib.sha256()
            wanted = (digest, everything) if DATA_HASH in metadata else (digest,)
            for chunk in pieces[name].chunks():
                hashing = [pool.submit(each.update, chunk) for each in wanted]
                file.write(chunk)
                for each in hashing:
                    each.result()
            hashes[name] = digest.hexdigest()
        if DATA_HASH in metadata:
            metadata[DATA_HASH] = f"0x{everything.hexdigest()}"
            file.seek(0)
            file.write(_header(pieces, metadata))
    return hashes


def _order(pieces: Mapping[str, Piece]) -> list[str]:
    """Wide dtypes first, so that every tensor is aligned; then by name."""
    return sorted(pieces, key=lambda name: (-BITS[pieces[name].dtype], name))


def _header(pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> bytes:
    values: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name in _order(pieces):
        dtype, shape, _ = pieces[name]
        end = position + byte_size(dtype, shape)
        values[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError("the model's metadata is too large", f"{len(text)} bytes of header")
    return len(text).to_bytes(8, "little") + text
