"""Checkpoints of torch.save, .ckpt .pt .pth .bin, read without torch and without running them.

Since torch 1.6 they are zip archives of a pickle and one entry a storage, before that a row of
pickles and then the storages. Either way the tensors' bytes are used where they lie in the file.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from difftool.errors import InputError, unreadable
from difftool.storage.pickles import (
    MAX_PICKLE,
    Global,
    Opaque,
    Storage,
    TensorRef,
    Unpickled,
    read_pickle,
)
from difftool.storage.read import open_file
from difftool.storage.strict_json import is_unicode
from difftool.storage.tensors import Info, byte_size

MAX_ENTRIES = 100_000
MAX_DEPTH = 256
MAX_VALUES = 1_000_000
MAX_TENSORS = 65_536
MAX_METADATA = 4_000
MAX_TEXT = 8_192
MAX_NAME = 1_024
MAX_DIRECTORY = 64 << 20
MAX_GROWTH = 16
SMALL = 64 << 20
"""How many times a file's size its tensors may come to, as some share their bytes, and what is
always allowed."""
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
ZIP, PICKLE = b"PK\x03\x04", b"\x80"

STATES = (
    *("state_dict", "model_state_dict", "model", "module", "params", "params_ema"),
    *("ema", "ema_state_dict", "weights", "net"),
)
"""Keys under which trainers put the tensors of a model."""
LEFTOVERS = (
    *("optimizer_states", "optimizer_state_dict", "optimizer", "optimizers", "opt", "scaler"),
    *("lr_schedulers", "lr_scheduler", "scheduler", "callbacks", "loops", "rng_state", "amp"),
)
"""Keys under which they put what only they need."""
USUAL = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter|deque)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.(cuda\.|storage\.)?\w+Storage|torch\.serialization\._get_layout"
    r"|torch\.(Size|device|Tensor|nn\.parameter\.(Parameter|Buffer))"
    r"|torch\.(float|double|half|bfloat|complex|u?int|bool)\w*"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)|_codecs\.encode"
    r"|(pytorch_)?lightning(_fabric|_utilities)?\.[\w.]+|omegaconf\.[\w.]+"
    r"|argparse\.Namespace|pathlib\.\w+Path|typing\.\w+"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|bool|str|bytes|object|slice"
    r"|range|complex|bytearray)"
)
"""Names that honest trainers leave in their checkpoints."""


class Checkpoint(NamedTuple):
    """What a pickled checkpoint holds, but for the tensors' bytes."""

    tensors: dict[str, Info]
    """Of the model, by their keys joined by dots; containers around a single model are left out."""
    beside: dict[str, Info]
    """All others: of optimisers and the like, and of objects that are no plain dicts."""
    metadata: dict[str, str]
    """Numbers and texts beside the tensors, such as epoch and global_step."""
    warnings: tuple[str, ...]


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a file begins as torch's checkpoints do; says nothing of the rest."""
    try:
        with open_file(path) as file:
            start = file.read(4)
    except OSError:
        return False
    return start == ZIP or start.startswith(PICKLE)


def read_checkpoint(path: Path) -> Checkpoint:
    """What a checkpoint of torch.save holds; InputError if it is malformed, unsafe or of another
    kind. Nothing that it names is imported or called, and no tensor is read."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(512)
            file.seek(0)
            if start.startswith(ZIP):
                found, places = _read_zip(file, path, size)
            elif start.startswith(PICKLE):
                found, places = _read_legacy(file, path, size)
            elif start[257:262] == b"ustar" or start[:100].rstrip(b"\0") in TAR:
                raise _refused(path, "it is of torch's tar format, from before 2017")
            else:
                raise _refused(path, "it is neither a zip archive nor a pickle")
    except OSError as error:
        raise unreadable(path, error) from None
    return _Tree(path, places, size).checkpoint(found)


TAR = (b"sys_info", b"pickle", b"storages", b"tensors")
"""Names of the first entry of a tar archive of torch's."""


def _refused(path: Path, why: str, hint: str | None = None) -> InputError:
    return InputError(f"{path} is not a sound checkpoint", why, hint)


Places = Mapping[str, tuple[int, int]]
"""Where each storage lies in the file, start and end, by its key."""


# --- zip archives ----------------------------------------------------------------------------


class _Entry(NamedTuple):
    name: str
    crc: int
    stored: bool
    start: int
    end: int


def _read_zip(file: IO[bytes], path: Path, size: int) -> tuple[Unpickled, Places]:
    entries = _entries(file, path, size)
    if path_of := [name for name in entries if _unsafe(name)]:
        raise _refused(path, f"it has an entry with the unsafe name {path_of[0]!r:.200}")
    roots = {name.partition("/")[0] for name in entries if "/" in name}
    root = next(iter(roots), "")
    inside = {name.removeprefix(f"{root}/"): entry for name, entry in entries.items()}
    if len(roots) != 1 or not all(name.startswith(f"{root}/") for name in entries):
        raise _refused(path, "it is a zip archive, but not one that torch.save writes")
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise _refused(path, "it is a TorchScript program, not a checkpoint")
    if packed := [name for name, entry in entries.items() if not entry.stored]:
        raise _refused(path, f"{packed[0]!r:.200} is compressed, which torch never does")
    if "data.pkl" not in inside:
        raise _refused(path, "it is a zip archive without data.pkl")
    if "byteorder" in inside and _content(file, path, inside["byteorder"], 64) != b"little":
        raise _refused(path, "its numbers are not little-endian")
    data = _content(file, path, inside["data.pkl"], MAX_PICKLE)
    found = read_pickle(io.BytesIO(data), f"the pickle in {path}")
    places: dict[str, tuple[int, int]] = {}
    for key, storage in found.storages.items():
        entry = inside.get(f"data/{key}")
        if entry is None:
            raise _refused(path, f"the storage {key!r:.200} is missing")
        places[key] = _fitting(path, storage, entry.start, entry.end)
    return found, places


def _unsafe(name: str) -> bool:
    parts = name.split("/")
    return name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]


def _content(file: IO[bytes], path: Path, entry: _Entry, limit: int) -> bytes:
    if entry.end - entry.start > limit:
        raise _refused(path, f"{entry.name!r:.200} is larger than {limit} bytes")
    file.seek(entry.start)
    data = file.read(entry.end - entry.start)
    if entry.crc and zlib.crc32(data) != entry.crc:  # torch can be told to leave out the sums
        raise _refused(path, f"the checksum of {entry.name!r:.200} is wrong")
    return data


def _fitting(path: Path, storage: Storage, start: int, end: int) -> tuple[int, int]:
    if end - start != storage.size:
        why = f"the storage {storage.key!r:.200} has {end - start} bytes, not {storage.size}"
        raise _refused(path, why)
    return start, end


def _entries(file: IO[bytes], path: Path, size: int) -> dict[str, _Entry]:
    """The entries of an archive of stored files, each in bytes of its own.

    Stricter than zipfile, which allows bytes before, between and behind the parts of an archive,
    where two readers may find two archives.
    """
    try:
        count, start, end = _directory(file, size)
        if count > MAX_ENTRIES or end - start > MAX_DIRECTORY:
            raise ValueError(f"it has {count} entries, the limit is {MAX_ENTRIES}")
        file.seek(start)
        directory = file.read(end - start)
        found = [*_listed(file, directory, count, start)]
    except (ValueError, struct.error) as error:
        raise _refused(path, f"as a zip archive it is malformed: {error}") from None
    entries = {entry.name: entry for entry in found}
    if len(entries) != len(found):
        raise _refused(path, "it has two entries of the same name")
    return entries


def _directory(file: IO[bytes], size: int) -> tuple[int, int, int]:
    """Number of entries, start and end of an archive's directory, which ends the file."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    magic, disk, disk2, count2, count, length, start, comment = struct.unpack(
        "<4s4H2IH", tail[-22:]
    )
    if magic != b"PK\5\6" or comment:
        raise ValueError("it does not end as an archive does; is it cut off?")
    end = size - 22
    if tail[-42:-38] == b"PK\6\7":  # sizes of 64 bits
        magic, rest, _, _, disk, disk2, count2, count, length, start = struct.unpack(
            "<4sQ2H2I4Q", tail[:56]
        )
        end = size - 98
        if (magic, rest) != (b"PK\6\6", 44) or struct.unpack_from("<Q", tail, 64) != (end,):
            raise ValueError("its end is damaged")
    if (disk, disk2) != (0, 0) or count != count2:
        raise ValueError("it is a part of several")
    if start + length != end:
        raise ValueError("its directory is not where it says")
    return count, start, end


def _listed(file: IO[bytes], directory: bytes, count: int, limit: int) -> Iterator[_Entry]:
    """The entries of a directory that lies at `limit`, checked against their own headers."""
    position, headers = 0, []
    for _ in range(count):
        fields = struct.unpack_from("<4s6H3I5H2I", directory, position)
        magic, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, start = fields
        name_size, extra_size, comment_size = lengths
        position += 46
        name = directory[position : position + name_size]
        extra = directory[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if magic != b"PK\1\2" or len(name) != name_size or len(extra) != extra_size:
            raise ValueError("its directory is damaged")
        size, packed, start = _wide(extra, size, packed, start)
        text = name.decode("utf-8")
        if flags & 0x2041:
            raise ValueError(f"{text!r:.200} is encrypted")
        if method == 0 and size != packed:
            raise ValueError(f"{text!r:.200} has two sizes")
        headers.append((start, packed, crc, method, text, name))
    if position != len(directory):
        raise ValueError("its directory is damaged")
    behind = 0
    for start, size, crc, method, text, name in sorted(headers):
        if start < behind or (start and not behind):
            raise ValueError(f"{text!r:.200} overlaps another entry, or does not begin the file")
        file.seek(start)
        fields = struct.unpack("<4s5H3I2H", file.read(30))
        first = start + 30 + fields[9] + fields[10]
        if fields[0] != ZIP or fields[3] != method or file.read(fields[9]) != name:
            raise ValueError(f"{text!r:.200} is another file than the directory says")
        behind = first + size
        if behind > limit:
            raise ValueError(f"{text!r:.200} reaches into the directory")
        yield _Entry(text, crc, method == 0, first, behind)


def _wide(extra: bytes, *sizes: int) -> list[int]:
    """The numbers of an entry; those that need more than 32 bits are in its extra fields."""
    found, wide = list(sizes), b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    for index, number in enumerate(found):
        if number == 0xFFFFFFFF:
            (found[index],) = struct.unpack_from("<Q", wide)
            wide = wide[8:]
    return found


# --- before torch 1.6 ------------------------------------------------------------------------


def _read_legacy(file: IO[bytes], path: Path, size: int) -> tuple[Unpickled, Places]:
    what = f"the pickle in {path}"
    if read_pickle(file, what).value != MAGIC:
        raise _refused(path, "it is a pickle, but none of torch.save")
    if read_pickle(file, what).value != PROTOCOL:
        raise _refused(path, f"it is not of torch's protocol {PROTOCOL}")
    match read_pickle(file, what).value:
        case {"little_endian": True}:
            pass
        case _:
            raise _refused(path, "its numbers are not little-endian")
    found = read_pickle(file, what)
    keys = read_pickle(file, what).value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _refused(path, "its list of storages is malformed")
    if len(keys) > MAX_ENTRIES or set(keys) != found.storages.keys() or len(set(keys)) < len(keys):
        raise _refused(path, "its list of storages is not that of its tensors")
    position = file.tell()
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = found.storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        start, position = position + 8, position + 8 + storage.size
        if count * byte_size(storage.dtype, (1,)) != storage.size or position > size:
            raise _refused(path, f"the storage {key!r:.200} is cut off, or of another size")
        places[key] = start, position
    if position != size:
        raise _refused(path, f"its storages end at byte {position} of {size}")
    return found, places


# --- the tree of values ----------------------------------------------------------------------


class _Tree:
    """Finds the tensors, numbers and texts in what a pickle says."""

    def __init__(self, path: Path, places: Places, size: int):
        self.path, self.places = path, places
        self.values, self.bytes = MAX_VALUES, MAX_GROWTH * size + SMALL
        self.objects: dict[int, str] = {}
        """The objects seen so far, by their identity: names of those among a model's tensors."""

    def checkpoint(self, found: Unpickled) -> Checkpoint:
        if isinstance(found.value, Opaque | Global):
            why = f"it holds an object of {found.value.name!r:.200}, not the tensors of a model"
            hint = "save the state_dict() of it with the program that it is from"
            raise _refused(self.path, why, hint)
        model, around = _unwrapped(found.value)
        tensors: dict[str, Info] = {}
        metadata: dict[str, str] = {}
        beside: dict[str, Info] = {}
        self.collect(model, None, 0, tensors, metadata, beside)
        objects = [name for name in dict.fromkeys(self.objects.values()) if name]
        for names, value in around:
            self.collect(value, ".".join(names)[:MAX_NAME], 1, beside, metadata, beside)
        if not tensors:
            but = f", but objects: {_some(objects)}" if objects else ""
            raise _refused(self.path, f"it holds no tensors{but}")
        warnings = []
        if odd := [name for name in found.names if not USUAL.fullmatch(name)]:
            warnings.append(f"it names code, which was not run: {_some(odd)}")
        if objects:
            warnings.append(f"objects among its tensors are left out: {_some(objects)}")
        return Checkpoint(tensors, beside, metadata, tuple(warnings))

    def collect(
        self,
        value: Any,
        name: str | None,
        depth: int,
        tensors: dict[str, Info],
        metadata: dict[str, str],
        beside: dict[str, Info],
    ) -> None:
        """Add what lies in a value to the three tables, by its keys joined by dots."""
        self.values -= 1
        if self.values < 0 or depth > MAX_DEPTH:
            raise _refused(self.path, "it is nested without end")
        match value:
            case TensorRef():
                self.add(value, name or "", tensors)
            case dict():
                for key, item in value.items():
                    below = _below(name, _text(key))
                    self.collect(item, below, depth + 1, tensors, metadata, beside)
            case list() | tuple():
                for index, item in enumerate(value):
                    below = _below(name, str(index))
                    self.collect(item, below, depth + 1, tensors, {}, beside)
            case Opaque() if id(value) not in self.objects:  # objects may refer to each other
                self.objects[id(value)] = "" if tensors is beside else value.name
                for index, item in enumerate(value.parts):
                    below = _below(name, str(index))
                    self.collect(item, below, depth + 1, beside, {}, beside)
            case str() | bool() | float() | int() if len(metadata) < MAX_METADATA:
                short = not isinstance(value, int) or value.bit_length() < 1024
                text = str(value) if short else ""
                key = name or ""
                short = short and len(key) < MAX_NAME and len(text) < MAX_TEXT
                if short and is_unicode(key + text):
                    metadata[key] = text

    def add(self, ref: TensorRef, name: str, tensors: dict[str, Info]) -> None:
        if len(name) >= MAX_NAME:
            raise _refused(self.path, f"a tensor has a name of {MAX_NAME} characters or more")
        if not is_unicode(name):
            raise _refused(self.path, f"the name {name!r:.200} is no text")
        if name in tensors:
            raise _refused(self.path, f"it has two tensors of the name {name!r:.200}")
        if len(tensors) >= MAX_TENSORS:
            raise _refused(self.path, f"more than {MAX_TENSORS} tensors")
        self.bytes -= byte_size(ref.dtype, ref.shape)
        if self.bytes < 0:
            why = f"its tensors come to more than {MAX_GROWTH} times the file's size"
            raise _refused(self.path, why)
        start = self.places[ref.storage][0]
        tensors[name] = Info(ref.dtype, ref.shape, start + ref.start, start + ref.end, ref.strides)


def _unwrapped(value: Any) -> tuple[Any, list[tuple[tuple[str, ...], Any]]]:
    """The dict of a model's tensors in a checkpoint's dicts, and what lies around it, by path."""
    around: list[tuple[tuple[str, ...], Any]] = []
    path: tuple[str, ...] = ()
    for _ in range(MAX_DEPTH):
        if not isinstance(value, dict):
            break
        full = [k for k, v in value.items() if k not in LEFTOVERS and _has_tensors(v)]
        alone = not any(isinstance(v, TensorRef) and v.shape for v in value.values())
        if "state_dict" in full:
            key = "state_dict"
        elif len(full) == 1 and full[0] in STATES and alone:
            key = full[0]
        else:
            rest = [((*path, _text(k)), v) for k, v in value.items() if k in LEFTOVERS]
            return {k: v for k, v in value.items() if k not in LEFTOVERS}, around + rest
        around += [((*path, _text(k)), v) for k, v in value.items() if k != key]
        path, value = (*path, key), value[key]
    return value, around


def _has_tensors(value: Any) -> bool:
    """Whether a value is a dict that holds tensors, or dicts of them."""
    ahead, seen = [value] if isinstance(value, dict) else [], set[int]()
    while ahead:
        match ahead.pop():
            case TensorRef():
                return True
            case dict() as inner if id(inner) not in seen:
                seen.add(id(inner))
                ahead.extend(inner.values())
    return False


def _text(key: Any) -> str:
    """A key's part of a name, as far as names go."""
    match key:
        case Global() | Opaque():
            return key.name[:MAX_NAME]
        case tuple():
            return ",".join(_text(part) for part in key)[:MAX_NAME]
        case str() | bytes():
            return str(key[:MAX_NAME])
    return str(key)


def _below(name: str | None, part: str) -> str:
    return part if name is None else f"{name}.{part}"[:MAX_NAME]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name:.100}" for name in names[:3]) + more
