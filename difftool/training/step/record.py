"""What steps measure (see training.metrics), summed on the device and fetched once a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difftool.training.metrics import LEVELS
from difftool.training.step import parallel
from difftool.training.step.objectives import LossOutput


class Record:
    """Sums since the last report: loss, its terms, gradient norm, loss by noise level."""

    def __init__(self, device: torch.device):
        self.device = device
        self.edges = torch.tensor(LEVELS, dtype=torch.float32, device=device)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.levels = torch.zeros(2, len(LEVELS) + 1, device=self.device)

    @torch.no_grad()
    def add(self, output: LossOutput) -> None:
        """Count a batch in."""
        self._sum("loss", output.loss.detach().mean())
        for name, term in output.terms.items():
            self._sum(f"terms.{name}", term)
        if output.log_snr is not None:
            bins = torch.bucketize(output.log_snr, self.edges)
            both = torch.stack([output.loss.detach(), torch.ones_like(output.loss)])
            self.levels.index_add_(1, bins, both)

    def add_norm(self, norm: Tensor) -> None:
        """Count a step's gradient norm in."""
        self._sum("grad_norm", norm)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.counts[name] = self.counts.get(name, 0) + 1

    def reduce(self) -> None:
        """Make the sums the means over all processes; those by level keep their ratios."""
        if parallel.size() > 1:
            *sums, self.levels = parallel.mean([*self.sums.values(), self.levels])
            self.sums = dict(zip(self.sums, sums, strict=True))

    def report(self) -> dict[str, Any]:
        """The means, as numbers, and a new start."""
        names = list(self.sums)
        values = torch.stack([self.sums[n].float() for n in names]).tolist()  # one fetch
        means = {n: value / self.counts[n] for n, value in zip(names, values, strict=True)}
        totals, counts = self.levels.tolist()
        by_level = [t / c if c else None for t, c in zip(totals, counts, strict=True)]
        self._clear()
        terms = {n.removeprefix("terms."): v for n, v in means.items() if n.startswith("terms.")}
        return {
            "loss": means["loss"],
            "grad_norm": means.get("grad_norm"),
            "terms": terms,
            "levels": by_level if any(counts) else [],
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON; fp32 numbers survive it exactly."""
        return {
            "sums": {name: float(value) for name, value in self.sums.items()},
            "counts": self.counts,
            "levels": (self.levels * parallel.size()).tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.sums = {n: torch.tensor(v, device=self.device) for n, v in state["sums"].items()}
        self.counts = dict(state["counts"])
        self.levels = torch.tensor(state["levels"], device=self.device) / parallel.size()
