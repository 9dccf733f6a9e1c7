"""The values of tensors that are too small to wait for. Torch-free."""

from __future__ import annotations

import struct

from difftool.storage.tensors import Located, piece_of_file

MAX_NUMBERS = 65_536
CODES = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H", "I64": "q", "I32": "i"}


def numbers(place: Located) -> list[float]:
    """The values of a small tensor; empty if it is large, or neither of floats nor of whole
    numbers."""
    code, size = CODES.get(place.info.dtype), place.info.size
    if code is None or size > 8 * MAX_NUMBERS:
        return []
    data = b"".join(piece_of_file(place.file, place.info).chunks())
    values = struct.unpack(f"<{size // struct.calcsize('<' + code)}{code}", data)
    if place.info.dtype == "BF16":  # the upper half of an fp32 number
        return [struct.unpack("<f", struct.pack("<I", value << 16))[0] for value in values]
    return list(values)


def counts_up(place: Located) -> bool:
    """Whether the values are 0, 1, 2, ..., as position_ids are unless a merge has spoilt them."""
    values = numbers(place)
    return bool(values) and values == [*range(len(values))]
