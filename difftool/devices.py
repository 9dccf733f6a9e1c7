"""What differs by kind of device. Torch-free at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class ByDevice(dict[str, T]):
    """Values by kind of device, "cpu", "cuda" and "mps"; any other is taken for a GPU."""

    def __missing__(self, device: str) -> T:
        return self["cuda"]


def on_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """These numbers, or this tensor of the machine's own memory, on a device, without waiting for
    what it is still at.

    CUDA puts memory that is not pinned aside before the call returns; MPS may read it later.
    """
    import torch

    device = torch.device(device)
    made = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    return made.to(device, dtype, non_blocking=device.type != "mps")
