"""Moving averages of the weights, which is what a diffusion model is sampled with.

decay: an exponential average. power: averages whose window grows with the run, so that their length
is a share of it; of snapshots of two of them `adapters.averages` makes any other afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difftool.adapters.averages import exponent, snapshots
from difftool.storage.runs import step_name
from difftool.storage.safetensors import save_tensors

if TYPE_CHECKING:
    from difftool.config.schema import OptimConfig

EmaRule = Callable[[int], float]
"""What the average keeps of itself at update n = 1, 2, ..."""

SNAPSHOTS = 32
"""As many are kept, spread evenly over the run."""


def exponential(decay: float) -> EmaRule:
    """min(decay, (1 + n)/(10 + n)): a short run does not average in its random start."""
    return lambda n: min(decay, (1 + n) / (10 + n))


def power(length: float) -> EmaRule:
    """(1 - 1/n)^(gamma + 1), by which the weights of step i grow like i^gamma."""
    gamma = exponent(length)
    return lambda n: (1 - 1 / n) ** (gamma + 1)


class Ema:
    """Moving averages of named parameters in fp32, one for each rule; the last is the run's own."""

    def __init__(self, parameters: Mapping[str, Tensor], rules: Mapping[str, EmaRule]):
        self.rules, self.updates = dict(rules), 0
        self.live = dict(parameters)
        self.tracks = {
            rule: {name: p.detach().clone().float() for name, p in self.live.items()}
            for rule in self.rules
        }
        self.average = list(self.tracks.values())[-1]

    @classmethod
    def of(cls, config: OptimConfig, parameters: Mapping[str, Tensor]) -> Ema | None:
        """What a recipe asks for."""
        if not config.ema:
            return None
        if config.ema_profile == "decay":
            return cls(parameters, {"decay": exponential(config.ema)})
        return cls(parameters, {f"{n:g}": power(n) for n in config.ema_lengths})

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live weights by one step."""
        self.updates += 1
        live = [p.detach() for p in self.live.values()]
        for rule, track in zip(self.rules.values(), self.tracks.values(), strict=True):
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(track.values()), live, 1 - rule(self.updates)
            )

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

    def snapshot(self, folder: Path) -> None:
        """Leave the averages in fp16 as step-NNNNNN.safetensors; old ones are thinned out."""
        folder.mkdir(exist_ok=True)
        tensors = {
            f"{rule}/{name}": value.half().contiguous().cpu()
            for rule, track in self.tracks.items()
            for name, value in track.items()
        }
        path = folder / f"{step_name(self.updates)}.safetensors"
        save_tensors(path, tensors, overwrite=True)
        kept = snapshots(folder)
        for later in [step for step in kept if step > self.updates]:
            kept.pop(later).unlink()  # of a future that a resumed run will make anew
        while len(kept) > SNAPSHOTS:  # the one whose neighbours are nearest to one another
            around = zip(kept, list(kept)[1:], list(kept)[2:], strict=False)
            kept.pop(min((after - before, step) for before, step, after in around)[1]).unlink()
