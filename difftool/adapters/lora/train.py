"""LoRA (Hu et al. 2021) while it is trained: small matrices beside a U-Net's frozen attention."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.adapters.lora.dialects import kohya_names
from difftool.adapters.lora.file import SAMPLE, SAMPLED_BY
from difftool.config.families import family
from difftool.config.schema import Preset, TrainConfig
from difftool.errors import UsageError
from difftool.formats.native import modelspec
from difftool.networks.base import Network
from difftool.storage.safetensors import save_tensors


class Adapter(nn.Module):
    """up(down(x)) alpha / rank, which is added to what a linear layer puts out."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, rank))
        self.scale, self.on = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale

    def add(self, _layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Hook of the layer that it is beside."""
        return output + self(inputs[0]) if self.on else output


class Adapters(nn.Module):
    """An adapter for every linear layer in a network's attention blocks, at work from now on."""

    def __init__(self, network: Network, rank: int, alpha: float | None):
        """UsageError for a network that has no such layer, or a rank that is none."""
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank {rank} of a LoRA is too small", hint="4 to 128 are usual")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        found = network.attention_layers()
        if not found:
            why = "its network has no attention to put it beside"
            raise UsageError("no LoRA can be trained of this model", why, "leave --lora out")
        self.names = [f"unet.{name}" for name in found]
        """Of the layers, as in a model file."""
        self.layers = nn.ModuleList()
        for layer in found.values():
            with torch.device(layer.weight.device):
                adapter = Adapter(layer.in_features, layer.out_features, rank, self.alpha)
            layer.register_forward_hook(adapter.add)
            self.layers.append(adapter)

    @classmethod
    def of(cls, network: Network, config: TrainConfig) -> Adapters | None:
        """The adapters that a recipe trains; None where it trains the network itself."""
        rank = config.lora_rank
        return cls(network, rank, config.lora_alpha) if rank else None

    @contextmanager
    def off(self) -> Iterator[None]:
        """In the block the network is what it is without them."""
        try:
            self._switch(False)
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for adapter in self.layers:
            assert isinstance(adapter, Adapter)
            adapter.on = on

    def init_weights(self, generator: torch.Generator) -> None:
        """At first nothing is added: down is random, up is zero."""
        for adapter in self.layers:
            assert isinstance(adapter, Adapter)
            bound = adapter.down.shape[1] ** -0.5
            start = torch.empty(adapter.down.shape).uniform_(-bound, bound, generator=generator)
            adapter.down.data.copy_(start)
            adapter.up.data.zero_()

    def save(self, path: Path, preset: Preset, weights: Mapping[str, Tensor] | None) -> None:
        """Write what was learned in kohya's names; `weights` (the EMA, say) replace the live ones.

        weights: by name within a model, "lora.layers.0.down"."""
        mine: dict[str, Any] = {f"lora.{name}": p for name, p in self.named_parameters()}
        mine |= {name: t for name, t in (weights or {}).items() if name in mine}
        ldm = family(preset.family).ldm_blocks
        spelled = kohya_names(self.names, preset.unet if ldm else None)
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.names):
            name = spelled[layer]
            for role in ("down", "up"):
                tensor = mine[f"lora.layers.{index}.{role}"].detach().float().cpu()
                tensors[f"{name}.lora_{role}.weight"] = tensor.contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(self.alpha)
        notes = modelspec(preset)
        architecture = "modelspec.architecture"
        if architecture in notes:
            notes[architecture] += "/lora"
        notes |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": f"{self.alpha:g}",
            "ss_sd_model_name": Path(preset.train.lora_base or preset.name).name,
        }
        if preset.train.distill.method != "none":
            notes[SAMPLE] = json.dumps({key: getattr(preset.sample, key) for key in SAMPLED_BY})
        save_tensors(path, tensors, notes, overwrite=True)
