"""`difftool noise`: the forward process of a picture, and the numbers behind it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftool.cli import console
from difftool.cli.console import Debug, Device, Dtype, Json, Overwrite, Quiet, choice, choices
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS
from difftool.errors import DifftoolError, UsageError, suggestion

if TYPE_CHECKING:
    from difftool.diffusion.path import Level
    from difftool.diffusion.path import Path as NoisePath
    from difftool.forward.sheets import Sheet
    from difftool.model import Model

DEFAULT_PATH = "sd15"
FORMATS = ["png", "gif", "webp", "html", "csv"]
CURVE_FORMATS = ["csv", "png", "html"]
FRAMES, SAMPLER_STEPS, TABLE_LINES = 8, 20, 21


def _grid(value: str | None) -> str | None:
    return None if value is None else GRIDS.resolve(value)


def noise(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures; a file of each.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A file, of the kind that its ending says, or a folder.  \\[IMAGE-noise.png]",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            callback=choice(FORMATS),
            help=choices("Strip, animations, a page to play with, table", FORMATS),
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option("--path", help=choices("Noise path", PATHS) + f"  \\[{DEFAULT_PATH}]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the path; repeatable."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="A,B,...", help="A row a path, SNR curves beside them."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            max=100_000,
            metavar="N",
            help=f"Levels shown, or steps of the sampler.  \\[{FRAMES}, as many as a moving "
            f"picture needs, or {SAMPLER_STEPS}]",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule", callback=_grid, help=choices("The levels a sampler visits", GRIDS)
        ),
    ] = None,
    markov: Annotated[
        bool,
        typer.Option("--markov", help="Also walk the chain q(x_t | x_t-1), one picture at a time."),
    ] = False,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve", help="No picture: alpha, sigma, log-SNR; table, .csv, .png or .html."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The path of a model: file, run folder, or name."),
    ] = None,
    latent: Annotated[
        bool,
        typer.Option("--latent", help="Noise where the model works, decoded at each level."),
    ] = False,
    reverse: Annotated[
        bool,
        typer.Option("--reverse", help="And back: the model's x0 at each level, with its error."),
    ] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What --reverse tells the model is there.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="The same by class, its name or index.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="N", help="Of the noise.  \\[0]")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            min=8,
            max=4096,
            metavar="PIXELS",
            help="Longest side of a frame.  \\[the picture's, at most 256; the model's own]",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show how noise takes a picture apart: x_t from the picture to static, with t and SNR.

    [bold]Examples[/bold]

      difftool noise photo.png
      difftool noise photo.png -o strip.gif --steps 10 --path cosine
      difftool noise photo.png -o play.html
      difftool noise photo.png --compare linear,cosine,sd15,sd21-zsnr,flow,edm
      difftool noise photo.png --markov
      difftool noise photo.png --reverse --prompt "a large red circle"
      difftool noise --curve --schedule karras --steps 25 -o curve.png
    """
    if curve:
        whole = {"a picture": images, "--markov": markov, "--latent": latent, "--reverse": reverse}
        _refuse("--curve shows numbers alone", whole | {"--size": size, "--seed": seed})
    elif not images:
        hint = "difftool noise photo.png, or difftool noise --curve for the numbers"
        raise UsageError("no picture was given", hint=hint)
    if compare is not None:
        one = {"--path": path, "--set": settings, "--markov": markov, "--model": model}
        whole = one | {"--latent": latent, "--reverse": reverse}
        _refuse("--compare shows whole paths as they are named", whole)
    if reverse:
        _refuse("--reverse shows x_t and the way back", {"--markov": markov})
    else:
        _refuse("only --reverse asks the model", {"--prompt": prompt, "--label": label})
    if model or latent or reverse:
        own = {"--path": path, "--set": settings}
        _refuse("a model has a noise path of its own", own)

    kind = _format(output, format, CURVE_FORMATS if curve else FORMATS)
    if curve:
        targets = [Path(output)] if output and not _is_folder(output) else []
        if output and not targets:
            raise UsageError(f"--output {output} is a folder", hint="give a file: curve.png")
        if format and not targets:
            raise UsageError(f"--format {format} needs --output with --curve")
    else:
        targets = _targets(images or [], output, kind)
    _check_free(targets, overwrite)

    work = _Work(schedule=schedule, steps=steps, seed=seed or 0, size=size, markov=markov)
    if latent or reverse:
        work.load(model, device, dtype, prompt, label, reverse)
    elif model:
        work.paths = _model_path(model)
    else:
        names = compare.split(",") if compare is not None else [path or DEFAULT_PATH]
        work.paths = dict(_path(name.strip(), settings) for name in names)
        if len(work.paths) < len(names):
            raise UsageError("a path is compared with itself", f"--compare {compare}")
    if curve:
        _curve(work, targets, kind, overwrite)
        return

    failed = 0
    for image, target in zip(images or [], targets, strict=True):
        try:
            result = _show(work, image, target, kind, overwrite)
            console.emit(result if json else str(target))
        except DifftoolError as error:
            if len(targets) == 1:
                raise
            console.fail(error)
            failed += 1
    if failed:
        console.warn(f"{failed} of {len(targets)} pictures could not be shown")
        raise typer.Exit(1)


def _refuse(what: str, flags: Mapping[str, object]) -> None:
    """UsageError if any of the flags, by name, was given."""
    given = [flag for flag, value in flags.items() if value not in (None, False, [])]
    if given:
        raise UsageError(what, f"{given[0]} does not go with it", "leave one of them out")


# --- where it goes ---------------------------------------------------------------------------


def _is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def _format(output: str | None, format: str | None, known: Sequence[str]) -> str:
    """The kind of file that is written, from its ending or by name."""
    if format is not None and format not in known:
        raise UsageError(
            f"--format {format} is not made of curves", hint="made: " + ", ".join(known)
        )
    if output is None or _is_folder(output):
        return format or known[0]
    ending = Path(output).suffix.lower()
    if ending.lstrip(".") not in known:
        what = f"--output {output} has an unknown ending"
        nearest = suggestion(ending, [f".{name}" for name in known])
        raise UsageError(what, f'"{ending}"' if ending else None, nearest)
    if format is not None and f".{format}" != ending:
        raise UsageError(f"--output {output} and --format {format} differ")
    return ending[1:]


def _targets(images: Sequence[Path], output: str | None, kind: str) -> list[Path]:
    """Where each picture goes; UsageError, before any work, where one cannot."""
    if output is not None and not _is_folder(output):
        if len(images) > 1:
            what = f"{len(images)} pictures do not fit in one file"
            raise UsageError(what, f"--output {output}", f"{output}/ is a folder for them")
        targets = [Path(output)]
    else:
        targets = [Path(output or ".") / f"{image.stem}-noise.{kind}" for image in images]
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not image.exists():
            raise UsageError(f"picture {image} does not exist")
        if target in targets[:index]:
            hint = "show them one at a time, with --output"
            raise UsageError(f"two pictures would be shown in {target}", hint=hint)
    return targets


def _check_free(targets: Sequence[Path], overwrite: bool) -> None:
    """UsageError, before any work, if a file is there and is not to be replaced, or cannot be."""
    from difftool.files import refuse_existing

    for target in targets:
        refuse_existing(target, overwrite)
        if target.is_dir():
            raise UsageError(f"{target} is a folder")


def _write(target: Path, data: bytes, overwrite: bool) -> None:
    from difftool.files import write_whole

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {target.parent}", error.strerror) from None
    write_whole(target, data, overwrite)


# --- what is shown ---------------------------------------------------------------------------


def _path(name: str, settings: Sequence[str] | None) -> tuple[str, NoisePath]:
    """The path of that name with key=value options, under the spelling that was given."""
    from difftool.diffusion.path import build_path

    options: dict[str, Any] = {}
    if settings:
        from difftool.config import merge, override_layers

        for layer in override_layers(settings):
            options = merge(options, layer.values)
    if "kind" in options:
        raise UsageError("the kind of path is not set but named", hint="use --path NAME")
    return name, build_path({"kind": name, **options})


def _model_path(where: str) -> dict[str, NoisePath]:
    """The path of a model by the model's name, read without loading its weights."""
    from difftool.config import build_preset
    from difftool.diffusion.path import build_path
    from difftool.formats import open_model
    from difftool.model import find_model

    file = find_model(where)
    source = open_model(file)
    preset = build_preset(source.values, str(file))
    for note in (f"model {preset.name} ({file})", *source.evidence):
        console.say(note)
    return {preset.name: build_path(preset.path)}


@dataclass
class _Work:
    """What is shown of each picture."""

    schedule: str | None
    steps: int | None
    seed: int
    size: int | None
    markov: bool
    paths: dict[str, NoisePath] = field(default_factory=dict)
    model: Model | None = None
    reverse: bool = False
    prompt: str | None = None
    label: str | None = None

    def load(
        self,
        where: str | None,
        device: str,
        dtype: str,
        prompt: str | None,
        label: str | None,
        reverse: bool,
    ) -> None:
        """Load the model in whose space noise is added; UsageError if it cannot be told that."""
        from difftool.forward.reverse import condition
        from difftool.model import Model

        self.model = Model.load(where, device=device, dtype=dtype)
        for note in self.model.notes:
            console.say(note)
        self.paths = {self.model.name: self.model.denoiser.path}
        self.prompt, self.label, self.reverse = prompt, label, reverse
        if reverse:
            condition(self.model, (8, 8), prompt, label)
            tokens, read = self.model.tokens(prompt or "")
            if tokens > read:
                console.warn(f"the model reads {read} of the prompt's {tokens} tokens")

    @property
    def name(self) -> str:
        return next(iter(self.paths))

    @property
    def path(self) -> NoisePath:
        return self.paths[self.name]

    def levels(self, path: NoisePath, usual: int | None) -> list[Level]:
        """The levels shown, clean to noisy: a sampler's, or `usual` even ones (None: all)."""
        from difftool.forward.levels import even_levels

        if self.schedule:
            return GRIDS[self.schedule](path, self.steps or SAMPLER_STEPS)[::-1]
        count = self.steps or (usual and min(usual, path.steps))
        return even_levels(path, count)

    def sheet(self, image: Any, kind: str) -> tuple[Sheet, dict[str, Any]]:
        """What is drawn of a picture, and what is told of it."""
        from difftool.forward import sheets
        from difftool.forward.outputs import OUTPUTS
        from difftool.forward.process import PixelSpace

        def shown(path: NoisePath) -> list[Level]:
            return self.levels(path, OUTPUTS[kind].steps)

        seed, levels = self.seed, shown(self.path)
        if self.model:
            from difftool.forward.reverse import ModelSpace, condition

            space = ModelSpace(self.model, image, self.size)
            told = {"model": self.model.name, "model_hash": self.model.hash}
            if self.reverse:
                cond = condition(self.model, space.size, self.prompt, self.label)
                about = f'"{self.prompt}"' if self.prompt else self.label or ""
                with console.progress("predicting", len(levels)) as bar:
                    sheet = sheets.reverse_sheet(space, levels, seed, cond, about, bar.update)
                return sheet, told | {"prompt": self.prompt, "label": self.label}
        else:
            space, told = PixelSpace(image, self.size), {}
        if self.markov:
            sheet, check = sheets.markov_sheet(space, self.name, self.path, levels, seed)
            return sheet, told | {"chain": check._asdict()}
        if kind == "html" and not self.model:
            every = {n: self.levels(p, None) for n, p in self.paths.items()}
            return sheets.live_sheet(space, self.paths, every, seed), told
        if len(self.paths) > 1:
            return sheets.compare_sheet(space, self.paths, shown, seed), told
        return sheets.strip_sheet(space, self.name, self.path, levels, seed), told


def _show(work: _Work, image: Path, target: Path, kind: str, overwrite: bool) -> dict[str, Any]:
    """Show one picture in a file; what is told of it under --json."""
    from difftool.data.images import read_picture
    from difftool.forward.levels import finite
    from difftool.forward.outputs import OUTPUTS

    picture = read_picture(image)
    sheet, told = work.sheet(picture.image, kind)
    bands = sheet.bands
    width, height = sheet.size
    notes = [f"{width}x{height}", *picture.notes, ", ".join(work.paths)]
    console.say(f"{image}: {', '.join(notes)}, {len(bands[0].levels)} levels, seed {work.seed}")
    _write(target, OUTPUTS[kind].write(sheet), overwrite)
    result: dict[str, Any] = {"schema": console.SCHEMA, "path": str(target), "image": str(image)}
    result |= {"width": width, "height": height, "seed": work.seed}
    if sheet.rivals:
        result["noise_paths"] = {band.title: finite(band.rows()) for band in bands}
    else:
        result |= {"noise_path": work.name, "levels": finite(sheet.rows())}
    return result | told


def _curve(work: _Work, targets: Sequence[Path], kind: str, overwrite: bool) -> None:
    """The numbers: all levels as JSON or in a file, a readable choice of them on the terminal."""
    from difftool.forward import sheets
    from difftool.forward.levels import finite, table
    from difftool.forward.outputs import CURVES

    readable = not (targets or console.mode.json)
    drawn = bool(targets) and kind != "csv"
    visited = {}
    for name, path in work.paths.items():
        if work.schedule:
            visited[name] = GRIDS[work.schedule](path, work.steps or SAMPLER_STEPS)
        elif drawn:
            visited[name] = work.levels(path, 0) if work.steps else []
        else:
            visited[name] = work.levels(path, TABLE_LINES if readable else None)
    sheet = sheets.curve_sheet(work.paths, visited)
    if work.schedule:
        steps = work.steps or SAMPLER_STEPS
        sheet = sheet._replace(caption=f"dots: the levels of {work.schedule} in {steps} steps")
    for target in targets:
        _write(target, CURVES[kind](sheet), overwrite)
    if console.mode.json:
        result: dict[str, Any] = {"schema": console.SCHEMA}
        result |= {"path": str(targets[0])} if targets else {}
        tables = {
            band.title: finite((band if band.levels else band._replace(levels=curve)).rows())
            for band, curve in zip(sheet.bands, sheet.curves, strict=True)
        }
        if len(tables) > 1:
            console.emit(result | {"noise_paths": tables})
        else:
            console.emit(result | {"noise_path": work.name, "rows": tables[work.name]})
        return
    for target in targets:
        console.emit(str(target))
    for band in sheet.bands if readable else ():
        whole = work.paths[band.title].steps
        if not (work.schedule or work.steps) and len(band.levels) < whole:
            console.say(f"{len(band.levels)} levels of {band.title}; all: --json or -o FILE.csv")
        if len(sheet.bands) > 1:
            console.emit(band.title)
        for line in table(band.levels, bars=sys.stdout.isatty()):
            console.emit(line)
