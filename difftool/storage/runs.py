"""Run folders: what lies where, and which checkpoint counts. Torch-free.

    config.yaml             the preset, resolved
    metrics.jsonl           what was measured, a line at a time
    run.json                what the report tells beside
    samples/step-000500.png
    loss.png  report.html
    cache/                  what frozen networks have computed
    checkpoints/step-000500/
        model.safetensors ema.safetensors ema-RULE.safetensors     weights, and averages of them
        optimizer.safetensors helpers.safetensors state.json       what the next step needs beside
        manifest.json       size and hash of each of these, written last
    ema/step-000500.safetensors     averages among which one is chosen after the run
    vae/  clip/             run folders of parts that were trained first
    best.safetensors        of --stop-when-worse: weights by which held-out pictures were best
    model.safetensors       in the end; lora.safetensors where a LoRA was trained

A checkpoint is whole or absent, and counts if all its files are as its manifest says. Training goes
on from the newest that does, and a run without a model yet is sampled by it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from difftool.errors import DifftoolError, UsageError
from difftool.storage.commit import atomic_folder, remove_folder, sha256_of, sweep, write_whole
from difftool.storage.shards import written_at
from difftool.storage.strict_json import read_json

CONFIG, METRICS, FACTS, LOCK = "config.yaml", "metrics.jsonl", "run.json", ".lock"
PLOT, REPORT = "loss.png", "report.html"
SAMPLES, CACHE, CHECKPOINTS, AVERAGES = "samples", "cache", "checkpoints", "ema"
MODEL, LORA, AVERAGED = "model.safetensors", "lora.safetensors", "ema.safetensors"
BEST = "best.safetensors"
OPTIMIZER, HELPERS = "optimizer.safetensors", "helpers.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"


def step_name(step: int) -> str:
    """What is of a step is called so, and by its ending."""
    return f"step-{step:06d}"


def by_step(folder: Path, ending: str = "") -> dict[int, Path]:
    """What a folder has of steps, by step, in order."""
    found = {p.name.removesuffix(ending)[5:]: p for p in folder.glob(f"step-*{ending}")}
    return dict(sorted((int(number), p) for number, p in found.items() if number.isdecimal()))


# --- checkpoints -----------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, sound or not."""
    return [path for path in by_step(run / CHECKPOINTS).values() if path.is_dir()]


def save_checkpoint(run: Path, step: int, write: Callable[[Path], object], keep: int) -> Path:
    """Let `write` fill a new checkpoint folder for this step, seal it, prune all but `keep`.

    Those of later steps go: they are of a future that a resumed run makes anew.
    """
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for stale in folder.glob(".*"):  # of other versions, or where nothing can be locked
        shutil.rmtree(stale, ignore_errors=True)
    path = folder / step_name(step)
    with atomic_folder(path, overwrite=True) as place:
        write(place)
        files = sorted(file for file in place.iterdir() if not file.name.startswith("."))
        manifest = {f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in files}
        write_whole(place / MANIFEST, json.dumps(manifest, indent=1))
    found = checkpoints(run)
    number = found.index(path) + 1
    for old in found[number:] + found[: max(number - max(keep, 1), 0)]:
        remove_folder(old)
    return path


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there with its hash."""
    try:
        manifest = read_json(path / MANIFEST)
        if MODEL not in manifest:
            return "its manifest names no model"
        for name, entry in manifest.items():
            file = path / name
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, DifftoolError, TypeError, KeyError, ValueError) as error:
        return f"its manifest or a file is missing or unreadable ({error})"
    return None


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and a note on every newer one that was passed over."""
    notes = []
    for path in reversed(checkpoints(run)):
        problem = verify_checkpoint(path)
        if problem is None:
            return path, notes
        notes.append(f"checkpoint {path.name} is damaged and was passed over: {problem}")
    return None, notes


def checkpoint_to_resume(run: Path) -> tuple[Path, list[str]]:
    """The same; UsageError if there is none."""
    path, notes = newest_checkpoint(run)
    if path is None:
        raise nothing_to_resume(run, "; ".join(notes))
    return path, notes


def nothing_to_resume(run: Path, why: str | None = None) -> UsageError:
    """What is said of a folder that has no run to go on with."""
    hint = "start without --resume, or point --out at the run to continue"
    return UsageError(f"there is no checkpoint to resume from in {run}", why, hint)


def model_of(run: Path) -> tuple[Path | None, list[str]]:
    """The file that a run is sampled by, or the index of its shards: its model, else that of its
    newest sound checkpoint, averaged weights before live ones; and notes as `newest_checkpoint`."""
    if (model := written_at(run / MODEL)) and model.is_file():
        return model, []
    checkpoint, notes = newest_checkpoint(run)
    if checkpoint is None:
        return None, notes
    averaged = checkpoint / AVERAGED
    return averaged if averaged.is_file() else checkpoint / MODEL, notes
