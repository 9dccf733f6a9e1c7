"""`difftool noise`: the forward process of a picture, and the numbers behind it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from difftool.cli import console
from difftool.cli.options import PRINT_CONFIG, TALK
from difftool.config.options import by_panels
from difftool.errors import DifftoolError
from difftool.forward.options import FIGURES, OPTIONS, PANELS

if TYPE_CHECKING:
    from difftool.forward.command import NoiseTask

ABOUT = """
Show how noise takes a picture apart: x_t from the picture to static, with t and SNR.

Examples
  difftool noise photo.png
  difftool noise photo.png -o strip.gif --steps 10 --path cosine
  difftool noise photo.png -o play.html
  difftool noise photo.png --compare linear,cosine,sd15,sd21-zsnr,flow,edm
  difftool noise photo.png --markov
  difftool noise photo.png --reverse --prompt "a smiling fox"
  difftool noise photo.png --likelihood -m model.safetensors
  difftool noise --curve --schedule karras --steps 25 -o curve.png
"""
OF_NOISE = by_panels((*FIGURES, *OPTIONS), PANELS)
ROWS = (*OF_NOISE, PRINT_CONFIG, *TALK)


def run(values: dict[str, Any]) -> int:
    """Show pictures, or the curves; the exit code."""
    from difftool.forward.command import configuration, load, prepare

    task = prepare(values)
    if task.source is not None:
        console.say(f"loading {task.source} ...")
    task = load(task)
    for note in task.notes:
        console.detail(note)
    for warning in task.warnings:
        console.warn(warning)
    if values["print_config"]:
        console.print_config(configuration(task))
        return 0
    return _curve(task) if values["curve"] else _pictures(task)


def _pictures(task: NoiseTask) -> int:
    from difftool.forward.command import noise

    failed, count = 0, len(task.targets)
    for each in noise(task, console.progress):
        if isinstance(each, DifftoolError):
            if count == 1:
                raise each
            console.fail(each)
            failed += 1
            continue
        width, height = each.figure.size
        said = [f"{width}x{height}", *each.notes, *task.paths]
        said += [f"{len(each.figure.strips[0].levels)} levels", f"seed {task.seed}"]
        console.say(f"{each.image}: {', '.join(said)}")
        table, words = each.lines()
        console.table(table)
        for line in words:
            console.say(line)
        result = {"schema": console.SCHEMA} | each.report(task)
        console.emit(result if console.mode.json else str(each.target))
    if failed:
        console.warn(f"{failed} of {count} pictures could not be shown")
    return 1 if failed else 0


def _curve(task: NoiseTask) -> int:
    """The numbers: all levels as JSON or in a file, a readable choice of them on the terminal."""
    from difftool.forward.command import TABLE_LINES, curve_rows, curves, save_curves
    from difftool.forward.levels import table

    save_curves(task)
    if console.mode.json:
        result: dict[str, Any] = {"schema": console.SCHEMA}
        result |= {"path": str(task.targets[0])} if task.targets else {}
        rows = curve_rows(task)
        one = {"noise_path": task.name, "rows": rows[task.name]}
        console.emit(result | (one if len(rows) == 1 else {"noise_paths": rows}))
        return 0
    for target in task.targets:
        console.emit(str(target))
        return 0
    strips = curves(task, TABLE_LINES).strips
    for strip in strips:
        whole = task.paths[strip.title].steps
        if not (task.values["schedule"] or task.values["steps"]) and len(strip.levels) < whole:
            text = f"{len(strip.levels)} levels of {strip.title}; all of them: --json"
            console.say(f"{text} or -o FILE.csv")
        if len(strips) > 1:
            console.emit(strip.title)
        for line in table(strip.levels, bars=sys.stdout.isatty()):
            console.emit(line)
    return 0
