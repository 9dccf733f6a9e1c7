"""Checkpoints that are whole or absent, and found again after anything.

A checkpoint is written under a temporary name, synced, sealed by a manifest with the hash of every
file, and renamed into place; only then are older ones pruned. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from difftool.errors import UsageError
from difftool.storage.commit import sha256_of

MANIFEST = "manifest.json"


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Let `write` fill a new checkpoint folder for this step, seal it, prune all but `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(step)
    for stale in folder.glob(".*"):
        shutil.rmtree(stale, ignore_errors=True)  # leavings of a process that was killed
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(temporary.iterdir())
        manifest = {f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (*files, temporary / MANIFEST, temporary):
            _sync(file)
        if final.exists():
            os.rename(final, folder / f".{final.name}.old")
        os.rename(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder / f".{final.name}.old", ignore_errors=True)
    for old in checkpoints(folder)[: -max(keep, 1)]:
        # Renamed first: a half-deleted checkpoint must not look like one.
        trash = folder / f".trash-{old.name}"
        os.rename(old, trash)
        shutil.rmtree(trash, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, sound or not."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there with its hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest.items():
            file = path / name
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest or a file is missing or unreadable ({error})"
    return None


def newest_good(folder: Path) -> tuple[Path, list[str]]:
    """The newest sound checkpoint, and a note on every newer one that was passed over."""
    notes = []
    for path in reversed(checkpoints(folder)):
        problem = verify_checkpoint(path)
        if problem is None:
            return path, notes
        notes.append(f"checkpoint {path.name} is damaged and was passed over: {problem}")
    hint = "start without --resume, or point --out at the run to continue"
    raise UsageError(f"there is no checkpoint to resume from in {folder}", "; ".join(notes), hint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
