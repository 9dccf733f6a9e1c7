"""What differs by kind of device. Torch-free."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class ByDevice(dict[str, T]):
    """Values by kind of device, "cpu", "cuda" and "mps"; any other is taken for a GPU."""

    def __missing__(self, device: str) -> T:
        return self["cuda"]
