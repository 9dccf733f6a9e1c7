"""A network on its path: the only place where dtypes meet, the mathematics in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difftool.diffusion.path import Level, Path
from difftool.diffusion.prediction import TARGETS, Prediction, recover, split_variance
from difftool.errors import UsageError


class Cond(NamedTuple):
    """All the ways in which anything conditions a U-Net."""

    context: Tensor | None = None
    """[B,L,D], for cross-attention."""
    vector: Tensor | None = None
    """[B,V], added to the time embedding: pooled text, sizes already in sinusoids."""
    concat: Tensor | None = None
    """[B,C',H,W], joined to the channels of x_t: mask, masked image, low resolution."""
    label: Tensor | None = None
    """[B] int, the class."""
    guidance: Tensor | None = None
    """[B], the guidance scale of a guidance-distilled network."""
    length: Tensor | None = None
    """[B] int, how many tokens of the context are read, where the network asks for that."""
    augment: Tensor | None = None
    """[B,E], in training what was done to the pictures, which joins the time embedding."""


UNCONDITIONAL = Cond()


class Denoiser(nn.Module):
    """network + path + target: x_t, level, conditions -> the raw output F, or x0 and eps."""

    def __init__(self, network: nn.Module, path: Path, target: str):
        super().__init__()
        self.network, self.path, self.target = network, path, TARGETS.resolve(target)
        _, alpha, sigma = path.level(path.t_max)
        p, q = TARGETS[target](alpha, sigma)
        if alpha * q == sigma * p:
            what = f"{self.target}-prediction says nothing about the image where alpha = 0"
            why = f"the noise path ends there, at t = {path.t_max:g}"
            raise UsageError(what, why, "use v, x0 or flow, or a path without zero terminal SNR")

    @property
    def dtype(self) -> torch.dtype:
        """The network's own, in which it computes."""
        if (own := getattr(self.network, "computes_in", None)) is not None:
            return own
        parameters = self.network.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def forward(self, x_t: Tensor, level: Level, cond: Cond = UNCONDITIONAL) -> Tensor:
        """F [B,C,H,W], fp32; x_t [B,C,H,W]; level of floats, or of tensors [B] or [B,1,1,1]."""
        output = self._ask(self.network, x_t, level, cond)
        return split_variance(output.float(), x_t.shape[1])[0]

    def features(self, x_t: Tensor, level: Level, cond: Cond = UNCONDITIONAL) -> list[Tensor]:
        """What the network sees in x_t, as it would for its output: [B,C,h,w] each."""
        network: Any = self.network
        return self._ask(network.features, x_t, level, cond)

    def _ask(self, network: Callable[..., Any], x_t: Tensor, level: Level, cond: Cond) -> Any:
        dtype = self.dtype
        _, _, sigma = _columns(level)
        x = (x_t.float() * self.path.input_scale(sigma)).to(dtype)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat.to(dtype)], dim=1)
        more = {} if cond.length is None else {"length": cond.length}
        more |= {} if cond.augment is None else {"augment": cond.augment}
        return network(
            x,
            self.path.network_time(_times(level.t, x_t)),
            context=None if cond.context is None else cond.context.to(dtype),
            vector=None if cond.vector is None else cond.vector.to(dtype),
            label=cond.label,
            guidance=cond.guidance,
            **more,
        )

    def predict(self, x_t: Tensor, level: Level, cond: Cond = UNCONDITIONAL) -> Prediction:
        """x0 and eps, fp32."""
        output = self(x_t, level, cond)
        return recover(x_t.float(), output, _columns(level), self.target)


def _columns(level: Level) -> Level:
    """A level whose tensors are [B,1,1,1]; floats stay floats."""
    values: Any = (v.float().view(-1, 1, 1, 1) if isinstance(v, Tensor) else v for v in level)
    return Level(*values)


def _times(t: Any, x_t: Tensor) -> Tensor:
    """t [B], fp32, on x_t's device; a float is not copied there, which would synchronise."""
    if isinstance(t, Tensor):
        return t.to(x_t.device, torch.float32).reshape(-1).expand(len(x_t))
    return torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
