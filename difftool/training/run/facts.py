"""What a run's report tells beside its measures: data, device, sizes. run.json holds it."""

from __future__ import annotations

from typing import Any

import torch

from difftool.data import Audit, Dataset
from difftool.training.options import RunOptions
from difftool.training.run.previews import Previews
from difftool.version import __version__


def facts_of(
    previews: Previews, audit: Audit, held: Dataset | None, options: RunOptions
) -> dict[str, Any]:
    """The facts of a run at its start, with no session yet."""
    trainer, model = previews.trainer, previews.model
    recipe, preset = trainer.config, model.preset
    assert recipe.batch_size
    threads = torch.get_num_threads()
    device = f"{model.device}, {threads} thread{'s' * (threads != 1)}"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    return {
        "schema": 1,
        "part": trainer.part,
        "data": audit.source,
        "argument": options.data or audit.source,
        "example": next((item.prompt for item in previews.items() if item.prompt), ""),
        "kind": "text" if preset.text else "class" if preset.classes else "none",
        "audit": audit.lines(),
        "images": len(trainer.dataset),
        "held_out": len(held) if held else 0,
        "size": recipe.size,
        "steps": recipe.steps,
        "batch": recipe.batch_size * recipe.accumulate,
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in model.parts().items()
            if name in trainer.kept_parts()
        },
        "device": device,
        "version": __version__,
        "torch": torch.__version__,
        "choices": [list(choice) for choice in options.choices],
        "sessions": [],
        "finished": False,
    }
