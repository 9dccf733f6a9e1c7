"""Random numbers that depend on their coordinates alone, on any machine. Torch-free."""

from __future__ import annotations

import hashlib


def uniforms(*coordinates: object) -> list[float]:
    """Eight numbers in [0, 1)."""
    text = "/".join(map(str, coordinates)).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text).digest()
    return [(int.from_bytes(digest[i : i + 8]) >> 11) / (1 << 53) for i in range(0, 64, 8)]


def coarse_uniforms(*coordinates: object) -> list[float]:
    """Sixteen numbers in [0, 1), in steps of 2**-32."""
    digest = hashlib.blake2b("/".join(map(str, coordinates)).encode()).digest()
    return [int.from_bytes(digest[i : i + 4]) / 2**32 for i in range(0, 64, 4)]


class Dice:
    """Uniform numbers in [0, 1), one after the other, that depend on the coordinates alone."""

    def __init__(self, *coordinates: object):
        self._coordinates, self._block = coordinates, 0
        self._ready: list[float] = []

    def roll(self) -> float:
        """The next number."""
        if not self._ready:
            self._ready = uniforms(*self._coordinates, self._block)
            self._block += 1
        return self._ready.pop()

    def pick(self, n: int) -> int:
        """One of n; nothing is drawn where there is no choice."""
        return int(self.roll() * n) if n > 1 else 0
