"""The moving average of the weights, which is what a diffusion model is sampled with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Exponential moving average of named parameters, kept in fp32.

    After n updates the decay is min(decay, (1 + n)/(10 + n)), so that a short run does not average
    in its random start.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay, self.updates = decay, 0
        self.live = dict(parameters)
        self.average = {name: p.detach().clone().float() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [p.detach() for p in self.live.values()]
        average = list(self.average.values())
        torch._foreach_lerp_(average, live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the model computes with the averaged weights."""
        live = {name: p.data for name, p in self.live.items()}
        try:
            for name, p in self.live.items():
                p.data = self.average[name]
            yield
        finally:
            for name, p in self.live.items():
                p.data = live[name]
