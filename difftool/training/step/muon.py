"""Muon, and the AdamW that serves what it does not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from difftool.config.schema import OptimConfig

MODEL = ("unet.", "vae.", "text.")
"""Networks of the model; those that only help it to learn are AdamW's."""
ENDS = {
    *("conv_in", "conv_out", "quant_conv", "post_quant_conv", "text_projection"),
    *("class_embedding", "token_embedding", "position_embedding"),
}
"""First and last layers and tables: their rows and columns are no rotations of one another."""
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter maps hidden features to hidden features."""
    return name.startswith(MODEL) and p.dim() > 1 and ENDS.isdisjoint(name.split("."))


def fused_adamw(parameters: Iterable[Tensor], config: OptimConfig) -> AdamW:
    """AdamW in one kernel, as a recipe has it."""
    options: Any = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    return AdamW(parameters, **options, fused=True)


class Muon(Optimizer):
    """Momentum whose singular values are all set to about 1 (Jordan et al. 2024).

    Nesterov momentum 0.95; the quintic Newton-Schulz iteration, 5 steps; an update is scaled by
    0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's (Liu et al. 2025, 2502.16982),
    so that one learning rate and one decoupled weight decay serve both. Convolutions are matrices
    [out, in k k]. `rest` optimises the other parameters; the groups and the state are of both.
    """

    def __init__(self, matrices: Iterable[Tensor], rest: AdamW, *, lr: float, weight_decay: float):
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay})
        self.rest = rest
        self.matrices = self.param_groups[0]
        # The same objects: a learning rate that is set or a state that is restored reaches both.
        self.param_groups += rest.param_groups
        self.state = rest.state = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        lr, decay = self.matrices["lr"], self.matrices["weight_decay"]
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in self.matrices["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for shape, group in by_shape.items():  # equal shapes in one go
            updates = []
            for p in group:
                assert p.grad is not None
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                updates.append(p.grad.lerp(momentum, MOMENTUM).flatten(1))
            rows, columns = updates[0].shape
            scale = 0.2 * math.sqrt(max(rows, columns))
            for p, update in zip(group, orthogonal(torch.stack(updates)), strict=True):
                p.mul_(1 - lr * decay).sub_(update.view(shape), alpha=lr * scale)
        self.rest.step()


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N,R,C] with their singular values brought near 1 (into about 0.7 to 1.2), fp32.

    An iteration is a polynomial of the Gram matrix, so all of them run on that, small as it is, and
    the matrices, mostly far longer than wide, are only multiplied at the beginning and at the end.
    """
    a, b, c = QUINTIC
    x = matrices.float()
    upright = x.shape[1] > x.shape[2]
    x = x.mT if upright else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    unit = a * torch.eye(gram.shape[1], device=x.device)
    factors = []
    for _ in range(ITERATIONS):
        factors.append(torch.baddbmm(b * gram + unit, gram, gram, alpha=c))
        gram = factors[-1] @ gram @ factors[-1]
    x = reduce(torch.matmul, factors) @ x
    return x.mT if upright else x
