"""Optimisers: (parameters by name, recipe) -> a torch optimiser. Torch-free until one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from difftool.config.schema import OptimConfig
from difftool.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

OPTIMIZERS: Registry[Callable[[Mapping[str, Tensor], OptimConfig], Optimizer]] = Registry(
    "optimizer"
)


@OPTIMIZERS.register("adamw")
def adamw(parameters: Mapping[str, Tensor], config: OptimConfig) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017), fused."""
    from difftool.training.step.muon import fused_adamw

    return fused_adamw(parameters.values(), config)


@OPTIMIZERS.register("muon")
def muon(parameters: Mapping[str, Tensor], config: OptimConfig) -> Optimizer:
    """Muon for the hidden matrices and convolutions, AdamW for everything else."""
    from difftool.training.step.muon import Muon, fused_adamw, is_hidden_matrix

    matrices = [p for name, p in parameters.items() if is_hidden_matrix(name, p)]
    others = fused_adamw((p for n, p in parameters.items() if not is_hidden_matrix(n, p)), config)
    return Muon(matrices, others, lr=config.lr, weight_decay=config.weight_decay)
