"""The weights that LoRAs and their relatives make of a model's.

    LoRA   W + s up down                              Hu et al. 2021; with a core, Tucker's
    LoHa   W + s (a1 b1) * (a2 b2)                    Hyeon-Woo et al. 2021, element by element
    LoKr   W + s (w1 kron w2)                         Edalati et al. 2022
    full   W + diff
    DoRA   m (W + dW) / |W + dW|                      Liu et al. 2024, on top of any of the first

s is the strength asked for, times alpha over the rank; LoKr of two whole factors has no rank. All
of it is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difftool.adapters.lora.file import SAMPLE, SAMPLED_BY, Change, Lora, read_lora
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.errors import DifftoolError, InputError
from difftool.formats.rules import Shape
from difftool.storage.strict_json import parse_json
from difftool.storage.tensors import load_located

if TYPE_CHECKING:
    from difftool.config.kinds import NetworkConfig


@dataclass(frozen=True)
class Applied:
    """A file, and how strongly it is applied to a model."""

    lora: Lora
    strength: float
    text: float | None = None
    """How strongly to the text encoders; None = as to the rest."""

    def at(self, layer: str) -> float:
        """How strongly it is applied to a layer."""
        of_text = self.text is not None and layer.startswith("text.")
        return self.text if of_text and self.text is not None else self.strength

    def __str__(self) -> str:
        parts: dict[str, int] = {}
        for layer in self.lora.changes:
            part = "unet" if layer.startswith("unet.") else ".".join(layer.split(".", 2)[:2])
            parts[part] = parts.get(part, 0) + 1
        layers = ", ".join(f"{count} layers of {part}" for part, count in sorted(parts.items()))
        kinds = "+".join(sorted({change.kind for change in self.lora.changes.values()}))
        what = f"{self.lora.dialect}'s {kinds}"
        return f"lora {self.lora.path} at {self.strength:g}: {layers} ({what})"


def open_loras(
    files: Iterable[tuple[Path, float]],
    shapes: Mapping[str, Shape],
    unet: NetworkConfig,
    name: str,
    *,
    allow_unused: bool = False,
    error: type[DifftoolError] = InputError,
) -> list[Applied]:
    """LoRAs for a model of these tensors; no tensor of theirs is read.

    error is raised for a file that has tensors for layers that the model lacks, unless that is
    allowed; InputError for one that changes nothing, or does not fit.
    """
    layers = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith(".weight")}
    found = []
    for path, strength in files:
        lora = read_lora(path, layers, unet)
        if not lora.changes:
            first, why = next(iter(lora.unused.items()))
            hint = "difftool convert FILE --inspect says what it is for"
            raise InputError(f"{path} changes nothing of the model {name}", f"{first}: {why}", hint)
        if lora.unused and not allow_unused:
            first, why = next(iter(lora.unused.items()))
            count = f"{len(lora.unused)} of its tensors have"
            if len(lora.unused) == 1:
                count = "one of its tensors has"
            hint = "--allow-unused leaves them out"
            what = f"{path} does not fit the model {name}: {count} no use"
            raise error(what, f"{first}: {why}", hint)
        needed = {f"{layer}.bias" for layer, c in lora.changes.items()
                  if c.tensors.keys() & {"diff_bias", "up_bias"}}  # fmt: skip
        if missing := sorted(needed - shapes.keys()):
            raise InputError(f"{path} was made for another model", f"{missing[0]} is not there")
        found.append(Applied(lora, strength))
    return found


def sampled_by(preset: Preset, loras: Iterable[Applied]) -> Preset:
    """A model's preset with the way of sampling that LoRAs ask for: those that were distilled.

    InputError for one that says what no model can be sampled by.
    """
    for applied in loras:
        text, path = applied.lora.metadata.get(SAMPLE), applied.lora.path
        if text is None or applied.strength <= 0:
            continue
        says = parse_json(text, f"{SAMPLE} of {path}")
        if not isinstance(says, dict) or not says.keys() <= set(SAMPLED_BY):
            raise InputError(f"{path} says how a model is sampled in words that have no meaning")
        values = to_values(preset) | {"sample": to_values(preset.sample) | says}
        preset = build_preset(values, f"{SAMPLE} of {path}", InputError)
    return preset


def apply(tensors: dict[str, Tensor], prefix: str, loras: Sequence[Applied]) -> None:
    """Replace those weights that are there by what LoRAs make of them, in order, in fp32.

    tensors: by name within a network, before which in whole stands the prefix ("unet.").
    """
    lost: list[tuple[Path, str, Tensor]] = []  # looked at once, in the end: each look is a wait
    for applied in loras:
        for layer, change in applied.lora.changes.items():
            name = layer.removeprefix(prefix)
            if not layer.startswith(prefix) or f"{name}.weight" not in tensors:
                continue
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            made, moved = changed(weight, bias, change, applied.at(layer))
            sound = made.isfinite().all()
            if not (sound.is_cpu and sound):  # where a look is no wait
                lost.append((applied.lora.path, layer, weight.isfinite().all() & ~sound))
            tensors[f"{name}.weight"] = made
            if moved is not None:
                tensors[f"{name}.bias"] = moved
    if lost and torch.stack([broken for *_, broken in lost]).any():
        path, layer = next((path, layer) for path, layer, broken in lost if broken)
        raise InputError(f"{path} cannot be used", f"{layer} is not finite")


@torch.no_grad()
def changed(
    weight: Tensor, bias: Tensor | None, change: Change, strength: float
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias [out] that a change at some strength makes of a layer's, fp32."""
    # alpha is a number of the host's: in float64, which not every device has, and without a wait
    places = {role: place for role, place in change.tensors.items() if role != "alpha"}
    numbers = {role: place for role, place in change.tensors.items() if role == "alpha"}
    t = {n: each.float() for n, each in load_located(places, str(weight.device)).items()}
    t |= {n: each.double() for n, each in load_located(numbers, "cpu").items()}
    scale = strength * _scale(change, t)
    new = weight.float()
    if change.kind != "full" or "diff" in t:
        new = new + scale * difference(change, t).reshape(weight.shape)
    if "magnitude" in t:
        new = _normed(new, t["magnitude"], change.by_row)
    moved = None
    for role, by in (("diff_bias", strength), ("up_bias", scale)):
        if role in t:
            assert bias is not None
            moved = (bias.float() if moved is None else moved) + by * t[role]
    return new, moved


def _scale(change: Change, t: Mapping[str, Tensor]) -> float:
    """alpha / rank, or what stands for it."""
    rank = change.rank
    if rank is None:  # nothing has a rank: alpha has no meaning
        return 1.0
    alpha = float(t["alpha"]) if "alpha" in t else change.alpha
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if change.rooted else rank)


def difference(change: Change, t: Mapping[str, Tensor]) -> Tensor:
    """What is added to the weight at scale 1, of as many elements as it has."""
    match change.kind:
        case "lora":
            return _lora(t)
        case "loha":
            return _product(t, "hada_w1", "hada_t1") * _product(t, "hada_w2", "hada_t2")
        case "lokr":
            return _kron(*(t.get(n, _product(t, n, "lokr_t2")) for n in ("lokr_w1", "lokr_w2")))
    return t["diff"]


def _lora(t: Mapping[str, Tensor]) -> Tensor:
    up, down = t["up"], t["down"]
    if "mid" in t:
        return torch.einsum("mn..., im, nj -> ij...", t["mid"], up.flatten(1), down.flatten(1))
    if up.dim() > 2 and up[0, 0].numel() > 1:
        # A convolution after a 1x1 one: kernels of the second, mixed over the rank.
        return torch.einsum("or..., ri -> oi...", up, down.flatten(1))
    return up.flatten(1) @ down.flatten(1)


def _product(t: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """The matrix (or kernel) that a pair of factors, and possibly a core, is of."""
    if f"{name}_a" not in t:
        return torch.empty(0)
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    if core in t and name[-1] == core[-1]:
        return torch.einsum("ij..., ip, jr -> pr...", t[core], a, b)
    return a @ b.flatten(1)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    for _ in range(second.dim() - first.dim()):
        first = first[..., None]
    return torch.kron(first, second)


def _normed(weight: Tensor, magnitude: Tensor, by_row: bool) -> Tensor:
    """DoRA: each row of a weight (or each of its inputs) as long as its magnitude says."""
    axis = 0 if by_row else 1
    others = [a for a in range(weight.dim()) if a != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return magnitude.reshape(norm.shape) * weight / norm
