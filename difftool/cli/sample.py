"""`difftool sample`: pictures from a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.cli import console
from difftool.cli.options import PRINT_CONFIG, TALK
from difftool.config.options import RUN, by_panels
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import SAMPLERS
from difftool.errors import DifftoolError
from difftool.evaluation.options import EVALUATION
from difftool.sampling import events
from difftool.sampling.settings import OPTIONS
from difftool.signals import code_of

if TYPE_CHECKING:
    from difftool.sampling.command import SampleTask
    from difftool.sampling.reading import Reading

ABOUT = """
Make pictures. Prints the path of each as soon as it is written.

Examples
  difftool sample "a smiling fox"
  difftool sample "a castle" -m model.safetensors -n 4 --size 64x64 --seed 7 -o castle.png
  difftool sample "a (smiling:1.2) {red|orange} fox --ar 3:2" -n 4 --grid
  difftool sample --prompts prompts.txt -o out/ --json | jq -r .path
  generate-prompts | difftool sample --prompts - -o out/
  difftool sample --from-image castle.png --steps 40
  difftool sample "as a watercolour" -m sd15 --init photo.png --strength 0.6
  difftool sample "a castle" -m sdxl --refiner sdxl-refiner --refiner-start 0.8
  difftool sample "a castle" -m sd15 --lora watercolour.safetensors:0.8
  difftool sample -m runs/photos --seed 0-999 -o "made/[seed].png" --skip-existing --evaluate photos
"""
OF_RUN = tuple(row for row in OPTIONS if row.panel == RUN)
OF_PICTURES = by_panels(row for row in OPTIONS if row.panel != RUN)
ROWS = (*OF_PICTURES, *EVALUATION, *OF_RUN, PRINT_CONFIG, *TALK)


def run(values: dict[str, Any]) -> int:
    """Make the pictures; the exit code."""
    from difftool.sampling.command import configuration, prepare, readings, sample

    task = prepare(values)
    _doubt(values["prompt"] or ())
    if task.said:
        console.say(task.said)
    if not values["skip_existing"]:  # else it may not be needed
        console.say(f"loading {task.model} ...")
    if values["print_config"]:
        console.print_config(configuration(task))
        return 0
    if values["tokens"]:
        return _tell(readings(task))
    return _Show(task).all(sample(task))


def _tell(found: Iterator[Reading | events.Note | events.Failure]) -> int:
    """Print how prompts are read; the exit code."""
    told, codes = console.Alike(), {0}
    for each in found:
        match each:
            case events.Failure(index, error):
                console.fail(error, index)
                codes.add(error.code)
            case events.Note(text, warning):
                if warning and told.is_news(text):
                    console.warn(text)
            case _:
                report = {"schema": console.SCHEMA} | each.report()
                console.emit(report if console.mode.json else "\n".join(each.lines()))
    return max(codes)


def _doubt(prompts: Sequence[str]) -> None:
    """Say how one prompt is given where several of one word each look like the words of one, and
    how several values of an option are."""
    if len(prompts) > 1 and not any(len(prompt.split()) > 1 for prompt in prompts):
        sentence = " ".join(prompts)
        console.warn(f'{len(prompts)} prompts of a word each; one prompt is given as "{sentence}"')
        return
    for prompt in prompts if len(prompts) > 1 else ():
        kinds = ("sampler", prompt in SAMPLERS), ("schedule", prompt in GRIDS)
        if kind := next((kind for kind, named in kinds if named), ""):
            several = f"several are given with commas, --{kind} A,{prompt}"
            console.warn(f'the prompt "{prompt}" is the name of a {kind}; {several}')
        elif re.fullmatch(r"-?[\d.]+", prompt):
            console.warn(f'the prompt "{prompt}" is a number; several are given with commas')


class _Show:
    """What happens, as results on stdout and talk on stderr."""

    def __init__(self, task: SampleTask):
        self.total, self.shows = task.total, bool(task.values["preview"])
        self.varied = {axis.name for axis in task.product.axes}
        """Settings of which there are several, said before."""
        self.made = self.drawn = self.skipped = self.work = 0
        self.due = 0
        """Pictures whose steps are done, and that are not written yet."""
        self.errors: list[DifftoolError] = []
        self.told = console.Alike()
        self.notes: list[str] = []
        """Talk that comes in one line."""

    def all(self, made: Iterator[events.Event]) -> int:
        """Show all of it; the exit code."""
        try:
            if self.shows and (why := console.blind()):
                console.warn(f"--preview {why}; --preview-path FILE is renewed")
            work = self.start(next(made))
            with console.progress("sampling", work, "it") as display:
                for event in made:
                    self.event(event, display)
                self.say_notes()
                if self.work:
                    display.update(self.work, images=self.finished())
        except KeyboardInterrupt as stop:
            return self.interrupted(code_of(stop))
        self.say_rest()
        if self.skipped or (self.errors and self.made):
            counts = {"there already": self.skipped, "failed": len(self.errors)}
            rest = [f"{count} {what}" for what, count in counts.items() if count]
            console.say(", ".join([f"{self.made} made", *rest]))
        codes = {error.code for error in self.errors}
        if not codes:
            return 0
        return 1 if self.made or self.skipped or len(codes) > 1 else codes.pop()

    def start(self, event: events.Event) -> int | None:
        """Say how pictures are made, in a line; how many steps there are in all."""
        assert isinstance(event, events.Started)
        settings = event.settings
        for note in event.notes:
            console.detail(note)
        width, height = settings.size
        of = {"steps": f"{settings.steps} steps", "sampler": settings.sampler}
        how = {
            "": " of ".join(text for name, text in of.items() if name not in self.varied),
            "schedule": f"schedule {settings.schedule}",
            "guidance": f"guidance {settings.guidance:g}",
            "size": f"{width}x{height}",
        }
        common = [text for name, text in how.items() if text and name not in self.varied]
        if common:
            console.say(", ".join(common))
        return event.work

    def event(self, event: events.Event, display: Any) -> None:
        """Show what happened."""
        if not isinstance(event, events.Note):
            self.say_notes()
        match event:
            case events.Started():
                self.start(event)
            case events.Working(images, step, last):
                self.work += images
                if event.preview is not None and self.shows:
                    display.show(event.preview)
                if not images:
                    return
                if step < last:
                    display.update(self.work, images=self.finished())
                else:
                    self.due = images
                    display.during("decoding")
            case events.Result():
                self.made += 1
                self.drawn += 1
                emit(event.path, event.report())
                self.due -= 1
                display.update(self.work - max(0, self.due), images=self.finished())
                if self.due > 0:
                    display.during("writing")
            case events.Finishing(work):
                display.during(work)
            case events.Sheet():
                if console.mode.json or not event.existing:
                    emit(event.path, event.report())
            case events.Failure(index, error):
                self.errors.append(error)
                if console.mode.json or self.told.is_news(error.what):
                    console.fail(error, index)
            case events.Existing(path=path):
                self.skipped += 1
                self.drawn += 1
                if console.mode.json:
                    emit(path, event.report())
            case events.Loading(model):
                console.say(f"loading {model} ...")
            case events.Judged(judgement):
                self.say_notes()
                console.table(judgement.lines())
                if console.mode.json:
                    console.emit({"schema": console.SCHEMA, "evaluation": judgement._asdict()})
            case events.Note(text, warning=True):
                if self.told.is_news(text):
                    console.warn(text)
            case events.Note(text):
                self.notes.append(text)

    def say_notes(self) -> None:
        """Say what has come up, in a line."""
        if self.notes:
            console.say(", ".join(self.notes))
            self.notes = []

    def say_rest(self) -> None:
        """Say how much was not said again."""
        for text in self.told.rest():
            console.warn(text)

    def finished(self) -> str:
        """How many pictures are made."""
        return f"{self.drawn}/{self.total}" if self.total else str(self.drawn)

    def interrupted(self, code: int) -> int:
        """Say what was made before a signal; the exit code, which is given."""
        of = f"{self.drawn} of {self.total}" if self.total else f"{self.drawn}"
        self.say_rest()
        console.say(f"interrupted: {of} pictures made")
        return code


def emit(path: Path | None, report: dict[str, Any]) -> None:
    """A result on stdout, where it is a file."""
    if path is not None:
        console.emit({"schema": console.SCHEMA} | report if console.mode.json else str(path))
