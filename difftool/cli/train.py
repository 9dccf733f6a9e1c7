"""`difftool train`: from a dataset folder to a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from difftool.cli import console
from difftool.cli.options import PRINT_CONFIG, TALK
from difftool.config.options import RUN, Option
from difftool.training.options import OPTIONS

if TYPE_CHECKING:
    from difftool.training.prepared import Training
    from difftool.training.run.run import Run

ABOUT = """
Train a diffusion model on a folder of pictures. Prints the path of the model.

Captions (metadata.jsonl, .txt beside each picture) make a text-to-image model,
class folders a class-conditional one, neither an unconditional one. What is not
given is chosen from the data and the device, and said.

Examples
  difftool train shapes --steps 300
  difftool train ./photos --out runs/photos --steps 20000 --batch-size 64
  difftool train ./photos --from sd15.safetensors --lora --rank 16
  difftool train ./photos --out runs/photos --resume
"""
DRY_RUN = Option(
    name="dry_run", type=bool, panel=RUN, help="Stop after the audit, the plan and the estimates"
)
ROWS = (*OPTIONS, DRY_RUN, PRINT_CONFIG, *TALK)
KEY, VALUE = 20, 28
"""Columns of a key and of a value in what is said before a run."""
STDERR = 2
STOPPING = "finishing this step, then saving; again: stop now"


def run(values: dict[str, Any]) -> None:
    """Train, saying what is decided and how it goes; the model's path is the result."""
    from difftool.training.report.page import usage
    from difftool.training.run.start import prepare

    training = prepare(
        values, console.progress, lambda audit: console.table(_columns(audit.lines()))
    )
    notes = [*training.notes]
    _tell(training)
    if values["print_config"]:
        console.print_config(iter(training.origins))
        return
    console.table([*map(_choice, training.choices()), *training.forecast()])
    for line in training.buckets():
        console.say(line)
    warnings = training.out_of_reach()
    for warning in warnings:
        console.warn(warning)
    console.table([(c.key, _short(c.now), f"it was {c.before}") for c in training.changes])
    if values["dry_run"]:
        training.check()
        if values["json"]:
            console.emit(_plan(training, [*notes, *warnings]))
        return
    folder = training.begin(console.progress, _stopping)
    console.say(f"run folder {folder}")
    _tell(training)
    for part in training.parts():
        _show(part)
    judgement = training.evaluate(console.progress)
    if judgement is not None:
        console.table(judgement.lines())
    path, steps = str(training.path), training.steps
    commands = usage(training.preset, training.facts, folder)
    hints = [("model", path), ("report", str(training.report))]
    console.table([*hints, *(("next", command) for command in commands[:1])])
    result: dict[str, Any] = {"schema": console.SCHEMA, "model": path, "steps": steps}
    if judgement is not None:
        result["evaluation"] = judgement._asdict()
    console.emit(result if values["json"] else path)


def _show(run: Run) -> None:
    """Take a run to its end, showing how it goes."""
    _tell(run)
    trainer, loss = run.trainer, "-"
    if run.resumed:
        console.say(f"resumed from {run.resumed}")
    name = "training" if run.part == "unet" else f"training the {run.part}"
    with console.progress(name, trainer.config.steps) as display:
        try:
            for step in run.steps():
                if step.loss is not None:
                    loss = f"{step.loss:.4f}"
                speed = f"{step.images_per_second:.1f}/s"
                display.update(step.step, loss=loss, images=speed, lr=f"{step.lr:.1e}")
                _tell(run)
            run.finish()
        finally:
            _tell(run)


def _tell(noting: Training | Run) -> None:
    """What it has noted since it was last asked."""
    while noting.notes:
        console.warn(noting.notes.pop(0))


def _stopping(signum: int, first: bool) -> None:
    """Answer a first signal, past Python's buffers, whose locks what was interrupted may hold; end
    the process at a second."""
    if not first:
        os._exit(128 + signum)
    if not (console.mode.quiet or console.mode.follower):
        start, end = ("\r", "\x1b[K\n") if console.interactive() else ("", "\n")
        os.write(STDERR, f"{start}{STOPPING}{end}".encode())


def _choice(row: tuple[str, Any, str]) -> tuple[str, str, str]:
    key, value, why = row
    return "preset" if key == "name" else key, _short(value), why


def _plan(training: Training, warnings: Sequence[str]) -> dict[str, Any]:
    """All that a dry run says, as JSON."""
    costs = training.estimate
    return {
        "schema": console.SCHEMA,
        "data": training.dataset.audit.lines(),
        "plan": {key: {"value": value, "why": why} for key, value, why in training.choices()},
        "parameters": sum(costs.parameters.values()),
        "memory": costs.memory,
        "memory_free": training.free,
        "disk": costs.disk,
        "seconds": round(training.seconds[1], 1),
        "forecast": {
            name: f"{value} {words}".strip() for name, value, words in training.forecast()
        },
        "warnings": list(warnings),
    }


def _columns(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Lines of the audit, "key: value" where the key is short, as rows."""
    rows = []
    for line in lines:
        key, sign, value = line.partition(": ")
        short = sign and len(key) <= KEY and not line.startswith(" ")
        rows.append((key, value) if short else ("", line.strip()))
    return rows


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= VALUE else f"{text[: VALUE - 1]}…"
