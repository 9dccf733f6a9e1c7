"""Training runs begun for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftool.config.layers import Layer
from difftool.config.schema import Part
from difftool.data import open_dataset
from difftool.formats import open_model
from difftool.storage.runs import checkpoint_to_resume
from difftool.training.options import RunOptions
from difftool.training.run.folder import RunFolder
from difftool.training.run.plan import plan
from difftool.training.run.run import Run

RUNS: list[Run] = []


def start_run(
    folder: Path,
    data: str,
    *values: dict[str, Any],
    preset: str | None,
    resume: bool,
    part: Part = "unet",
    **options: Any,
) -> Run:
    """A run in a folder, from nothing or from its newest checkpoint, as `values` has it."""
    checkpoint = checkpoint_to_resume(folder)[0] if resume else None
    vocabulary = open_model(checkpoint / "model.safetensors").tokenizer_json if checkpoint else None
    dataset, given = open_dataset(data), [Layer("test", each) for each in values]
    resolved, tokenizer_json, _ = plan(dataset, preset, given).complete("cpu", vocabulary)
    run = Run(
        RunFolder(folder),
        resolved,
        dataset,
        RunOptions(**options),
        part=part,
        tokenizer_json=tokenizer_json,
        resume=checkpoint,
    )
    RUNS.append(run)
    return run


def close_runs() -> None:
    """Let go of the folders of all runs that were begun."""
    while RUNS:
        RUNS.pop().folder.close()
