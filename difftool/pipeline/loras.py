"""The LoRAs of a loaded model, changed from picture to picture."""

from __future__ import annotations

from collections.abc import Sequence

from difftool.adapters.lora.algebra import Applied
from difftool.pipeline.model import Model, has_weights


def use_loras(model: Model, loras: Sequence[Applied]) -> None:
    """Let these LoRAs, and no others, be applied. Of the networks that they change, or that the
    former ones did, the weights are read again from the model's file: adding and taking away in
    turn would leave rounding behind."""
    if list(loras) == model.loras:
        return
    layers = {layer for each in (*model.loras, *loras) for layer in each.lora.changes}
    model.loras = list(loras)
    for prefix, part in model.all_parts().items():
        changes = any(layer.startswith(f"{prefix}.") for layer in layers)
        if changes and has_weights(part):
            model.loaders[prefix]()
