"""Weights that stay as small as they are in their file: each layer's become fp32 while it works.

The numbers are those of weights that were made fp32 when they were read, bit for bit; a network
takes half the memory, and of a file that is mapped the system can take back what it needs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from difftool.networks.base import Network

WORK = torch.float32


class Resident(nn.Module):
    """A layer without parts, in front of its own class: its weights are fp32 while it works."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """What its class makes of the same."""
        held = self._parameters
        self.__dict__["_parameters"] = {
            name: None if weight is None else weight.to(WORK) for name, weight in held.items()
        }
        try:
            return super().forward(*args, **options)  # type: ignore[misc]
        finally:
            self.__dict__["_parameters"] = held


@cache
def _resident(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Resident{kind.__name__}", (Resident, kind), {})


def hold(network: Network) -> None:
    """Let a network compute in fp32 whatever its weights are kept in."""
    network.computes_in = WORK
    for module in network.modules():
        if module._parameters and not module._modules and not isinstance(module, Resident):
            module.__class__ = _resident(type(module))
