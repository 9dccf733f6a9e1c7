"""Pickles, read without running them. Torch-free.

A pickle is a program for a small stack machine, and Python's runs whatever it names. The machine
here knows plain values and what torch's tensors are made of. All else that a pickle names or calls
becomes an `Opaque`, a record of it; nothing is ever imported or called.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

from difftool.errors import InputError
from difftool.storage.tensors import BITS, MAX_DIM, MAX_RANK, TORCH_NAMES, rows_strides

MAX_PICKLE = 64 << 20
MAX_STRING = 16 << 20
MAX_OPCODES = 1_000_000
MAX_MEMO = 1_000_000
MAX_STACK = 100_000
MAX_MARKS = 1_000
MAX_ARGUMENTS = 16
PROTOCOL = 5

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}  # fmt: skip
"""Dtypes of torch's storages; an untyped one is bytes."""
DTYPES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}
SCALARS = {
    "f8": "d", "f4": "f", "f2": "e", "b1": "?",
    "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B",
}  # fmt: skip
"""Formats of numpy's numbers."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle refers to."""

    name: str
    """module.attribute"""


@dataclass(eq=False, slots=True)
class Opaque:
    """An object that is no plain value: what would have been called, and all that belongs to it."""

    name: str
    parts: list[Any] = field(default_factory=list)
    """Arguments, state, items."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors lie in, or a part of them."""

    key: str
    dtype: str
    size: int
    """Bytes of the whole storage."""
    start: int = 0
    end: int = 0
    """The part that is meant, in bytes."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor without its bytes, of which `Storage` says where they lie."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """In elements; None if it lies row by row."""
    storage: str
    start: int
    """In bytes, from the storage's beginning."""
    end: int


class Unpickled(NamedTuple):
    """What a pickle says."""

    value: Any
    """Of dict, list, tuple, None, bool, int, float, str, bytes, TensorRef, Global and Opaque."""
    storages: dict[str, Storage]
    """By key; each was named with one size only."""
    names: list[str]
    """All names that it refers to, sorted."""


def read_pickle(file: IO[bytes], what: str) -> Unpickled:
    """The value of the pickle at a file's position, which is then behind it.

    InputError, that begins with `what`, if it is malformed, beyond the limits or asks for what no
    checkpoint needs.
    """
    machine = _Machine()
    try:
        value = machine.run(cast("IO[bytes]", _Limited(file)))
    except (ValueError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise InputError(f"{what} is malformed or not safe", str(error)[:200]) from None
    return Unpickled(value, machine.storages, sorted(machine.names))


class _Limited:
    """A file as pickletools reads it, that never gives too much."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, MAX_PICKLE
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_STRING:
            raise ValueError(f"a value of {size} bytes, the limit is {MAX_STRING}")
        return self._counted(self.file.read(size))

    def readline(self) -> bytes:
        line = self._counted(self.file.readline(MAX_STRING))
        if b"\\" in line:  # pickletools would undo escapes where pickle does not
            raise ValueError("a name or a text has escapes, which torch never writes")
        return line

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it is longer than {MAX_PICKLE} bytes")
        return data


# --- the machine -----------------------------------------------------------------------------


class _Machine:
    """The stack, the memo, and what has been seen so far."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = [[]]
        """The stack, from each mark to the next."""
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.names: set[str] = set()
        self.work = MAX_OPCODES

    def run(self, file: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            self.spend(1)
            stack = self.frames[-1]
            if opcode.name == "STOP":
                if len(self.frames) > 1 or len(stack) != 1:
                    raise ValueError("it ends before all is put together")
                return stack[0]
            self.step(opcode.name, argument, stack)
            if len(self.frames[-1]) > MAX_STACK:
                raise ValueError(f"more than {MAX_STACK} values wait on its stack")
        raise ValueError("it is cut off")

    def spend(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            raise ValueError(f"it takes more than {MAX_OPCODES} steps")

    def items(self) -> list[Any]:
        """What lies above the last mark, taken from the stack with it."""
        if len(self.frames) == 1:
            raise ValueError("a mark is missing on its stack")
        return self.frames.pop()

    def step(self, name: str, argument: Any, stack: list[Any]) -> None:
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memorise(argument, stack[-1])
            case "MEMOIZE":
                self.memorise(len(self.memo), stack[-1])
            case "BINGET" | "LONG_BINGET" | "GET":
                if argument not in self.memo:
                    raise ValueError(f"it recalls the value {argument}, which it has not kept")
                stack.append(self.memo[argument])
            case (
                "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE"
                | "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "LONG4"
                | "BINFLOAT" | "FLOAT" | "STRING" | "BINSTRING" | "SHORT_BINSTRING"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                stack.append(argument)
            case "BYTEARRAY8":
                stack.append(bytes(argument))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "MARK":
                self.frames.append([])
                if len(self.frames) > MAX_MARKS:
                    raise ValueError(f"it is nested more than {MAX_MARKS} times")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise ValueError("values are missing on its stack")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE" | "FROZENSET":
                items = self.items()
                self.frames[-1].append(tuple(items))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST":
                items = self.items()
                self.frames[-1].append(items)
            case "DICT":
                items = self.items()
                self.frames[-1].append({})
                self.set_items(self.frames[-1][-1], items)
            case "APPEND":
                item = stack.pop()
                self.extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self.items()
                self.extend(self.frames[-1][-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self.items()
                self.set_items(self.frames[-1][-1], items)
            case "GLOBAL":
                stack.append(self.refer(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.refer(module, attribute))
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "NEWOBJ_EX":
                keywords, arguments, function = stack.pop(), stack.pop(), stack.pop()
                made = Opaque(_name(function), [arguments, keywords])
                stack.append(made if keywords else self.call(function, arguments))
            case "INST":
                items = self.items()
                function = self.refer(*argument.split(" ", 1))
                self.frames[-1].append(self.call(function, tuple(items)))
            case "OBJ":
                function, *items = self.items()
                self.frames[-1].append(self.call(function, tuple(items)))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case "POP":
                if stack or len(self.frames) == 1:
                    stack.pop()
                else:
                    self.frames.pop()
            case "POP_MARK":
                self.items()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO":
                if argument > PROTOCOL:
                    raise ValueError(f"pickles of protocol {argument} are not known")
            case "FRAME":
                pass
            case _:  # EXT1 and such, out-of-band buffers, persistent identities as text
                raise ValueError(f"{name} has no place in a checkpoint")

    def memorise(self, index: int, value: Any) -> None:
        if len(self.memo) >= MAX_MEMO:
            raise ValueError(f"it keeps more than {MAX_MEMO} values")
        self.memo[index] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        match target:
            case list():
                target.extend(items)
            case Opaque():
                target.parts.extend(items)
            case _:
                raise ValueError(f"items are added to {_kind(target)}")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key has no value")
        match target:
            case dict():
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_key(key)] = value
            case Opaque():
                target.parts.extend(items)
            case _:
                raise ValueError(f"items are set in {_kind(target)}")

    def refer(self, module: Any, attribute: Any = None) -> Global:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("it refers to a name that is no text")
        name = f"{module}.{attribute}"
        self.spend(len(name) // 100)
        self.names.add(name)
        return Global(name)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call gives: a plain value for the few names that have a meaning here."""
        if not isinstance(arguments, tuple):
            raise ValueError(f"it calls something with {_kind(arguments)} for arguments")
        name = _name(function)
        # What is made holds them anew, and one tuple can be the arguments of many calls.
        self.spend(sum(1 + _length(argument) // 100 for argument in arguments))
        if isinstance(function, Global) and len(arguments) <= MAX_ARGUMENTS:
            if name == "collections.OrderedDict":
                return self.ordered(*arguments)
            if name in MEANINGS:
                return MEANINGS[name](*arguments)
        return Opaque(name, [*arguments])

    def ordered(self, pairs: Any = (), *rest: Any) -> dict[Any, Any]:
        if rest or not isinstance(pairs, list | tuple | dict):
            raise ValueError("an OrderedDict is made of something odd")
        self.spend(len(pairs))
        if isinstance(pairs, dict):
            return dict(pairs)
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("an OrderedDict is made of something odd")
        return {_key(key): value for key, value in pairs}

    def build(self, target: Any, state: Any) -> None:
        match target:
            case dict():  # attributes of an OrderedDict: torch keeps versions of modules there
                pass
            case Opaque():
                target.parts.append(state)
            case _:
                raise ValueError(f"a state is given to {_kind(target)}")

    def persistent(self, identity: Any) -> Any:
        """What torch keeps outside of the pickle: storages, and the source code of modules."""
        self.spend(_length(identity))
        match identity:
            case ("module", Global() as kind, *source):
                return Opaque(kind.name, source)
            case ("storage", Global(kind), str(key), str(), count, *view) if len(view) <= 1:
                return self.storage(kind, key, count, view[0] if view else None)
        raise ValueError("it refers to something outside that is no storage")

    def storage(self, kind: str, key: str, count: Any, view: Any) -> Storage:
        module, _, name = kind.rpartition(".")
        if module not in ("torch", "torch.cuda", "torch.storage") or name not in STORAGES:
            raise ValueError(f"storages of {kind} are not known")
        dtype = STORAGES[name]
        width = BITS[dtype] // 8
        size = _count(count) * width
        start, end = 0, size
        if view is not None:
            match view:
                case (str(), first, length):
                    start = _count(first) * width
                    end = start + _count(length) * width
                case _:
                    raise ValueError("a view of a storage is described oddly")
            if end > size:
                raise ValueError(f"a view reaches beyond storage {key!r}")
        found = Storage(key, dtype, size, start, end)
        known = self.storages.setdefault(key, found)
        if known.size != size:
            raise ValueError(f"storage {key!r} has two sizes")
        return found


def _name(function: Any) -> str:
    if not isinstance(function, Global | Opaque):
        raise ValueError(f"it calls {_kind(function)}")
    return function.name


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | tuple | list) else 0


def _key(key: Any) -> Any:
    """A key that is cheap to hash, however it was made."""
    parts = key if isinstance(key, tuple) and len(key) <= 64 else (key,)
    for part in parts:
        number = isinstance(part, int) and abs(part) < 1 << 63
        if not (number or part is None or isinstance(part, str | bytes | Global | Opaque)):
            raise ValueError(f"{_kind(part)} is a key")
    return key


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError("a size is not a whole number, or an absurd one")
    return number


# --- what is known of torch and numpy --------------------------------------------------------


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    """_rebuild_tensor(_v2): rest is requires_grad, backward hooks, notes."""
    if rest[2:] and rest[2]:
        raise ValueError("a tensor is kept as the conjugate or the negative of its bytes")
    return _rebuilt(storage, None, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, *rest: Any
) -> TensorRef:
    """_rebuild_tensor_v3: rest is dtype, notes."""
    if not rest or (rest[1:] and rest[1]):
        raise ValueError("a tensor is kept in a way that is not known")
    if not isinstance(rest[0], Global) or rest[0].name not in DTYPES:
        raise ValueError("a tensor is of a dtype that is not known")
    return _rebuilt(storage, DTYPES[rest[0].name], offset, shape, strides)


def _rebuilt(storage: Any, dtype: str | None, offset: Any, shape: Any, strides: Any) -> TensorRef:
    """A tensor that lies within its storage in every element."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    dtype = dtype or storage.dtype
    sizes, steps = _numbers(shape), _numbers(strides)
    if len(sizes) != len(steps) or len(sizes) > MAX_RANK or any(n > MAX_DIM for n in sizes):
        raise ValueError("a tensor has an absurd shape")
    width = BITS[dtype] // 8
    start = end = storage.start + _count(offset) * width
    if 0 not in sizes:
        end += sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) * width
        end += width
    if end > storage.end and (start != end or start > storage.size):
        raise ValueError(f"a tensor reaches beyond storage {storage.key!r}")
    rows = rows_strides(sizes)
    plain = 0 in sizes or all(
        step == row or size == 1 for size, step, row in zip(sizes, steps, rows, strict=True)
    )
    return TensorRef(dtype, sizes, None if plain else steps, storage.key, start, end)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise ValueError("a shape is no tuple")
    return tuple(_count(value) for value in values)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """_rebuild_from_type_v2: a tensor of a class of its own, or with attributes."""
    name = _name(function)
    if name in TENSORS and isinstance(arguments, tuple) and len(arguments) <= MAX_ARGUMENTS:
        return TENSORS[name](*arguments)
    return Opaque(name, [kind, arguments])


def _size(values: Any = ()) -> tuple[int, ...]:
    return _numbers(values)


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """A number of numpy's."""
    match dtype, data:
        case Opaque("numpy.dtype", [str(kind), *_]), bytes() if kind in SCALARS:
            form = f"<{SCALARS[kind]}"
            if struct.calcsize(form) == len(data):
                return struct.unpack(form, data)[0]
    return Opaque("numpy.scalar", [dtype, data])


def _encoded(text: Any = None, encoding: Any = None, *_: Any) -> Any:
    """Bytes, which protocol 2 has no opcode for."""
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin-1")
    return Opaque("_codecs.encode", [text, encoding])


TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
MEANINGS: dict[str, Callable[..., Any]] = TENSORS | {
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encoded,
}
"""The only calls that mean anything here, beside that of OrderedDict."""
