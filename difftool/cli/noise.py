"""`difftool noise`: the forward process of a picture, and the numbers behind it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftool.cli import console
from difftool.cli.console import Debug, Json, Overwrite, Quiet, choices
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS
from difftool.errors import DifftoolError, UsageError

if TYPE_CHECKING:
    from difftool.diffusion.path import Level
    from difftool.diffusion.path import Path as NoisePath

DEFAULT_PATH = "sd15"
FRAMES, SAMPLER_STEPS, TABLE_LINES = 8, 20, 21


def noise(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures; a strip of each.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A .png, or a folder; with --curve a .csv. Default: IMAGE-noise.png.",
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option("--path", help=choices("Noise path", PATHS) + f" Default: {DEFAULT_PATH}."),
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
            help=f"Levels shown ({FRAMES}), or steps of the sampler ({SAMPLER_STEPS}).",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help=choices("The levels a sampler visits", GRIDS)),
    ] = None,
    markov: Annotated[
        bool,
        typer.Option("--markov", help="Also walk the chain q(x_t | x_t-1), one picture at a time."),
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="No picture: alpha, sigma and log-SNR as a table.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="N", help="Of the noise. Default: 0.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            min=8,
            max=4096,
            metavar="PIXELS",
            help="Longest side of a frame. Default: the picture's, at most 256.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show how noise takes a picture apart: x_t from the picture to static, with t and SNR.

    [bold]Examples[/bold]

      difftool noise photo.png
      difftool noise photo.png -o strip.png --steps 10 --path cosine
      difftool noise photo.png --compare linear,cosine,sd15,sd21-zsnr,flow,edm
      difftool noise photo.png --markov
      difftool noise --curve --path sd21-zsnr -o curve.csv
      difftool noise --curve --schedule karras --steps 25
    """
    if curve:
        whole = {"a picture": images, "--markov": markov, "--compare": compare}
        _refuse("--curve shows numbers alone", whole | {"--size": size, "--seed": seed})
    elif not images:
        hint = "difftool noise photo.png, or difftool noise --curve for the numbers"
        raise UsageError("no picture was given", hint=hint)
    if compare:
        one = {"--path": path, "--set": settings, "--schedule": schedule, "--markov": markov}
        _refuse("--compare shows whole paths as they are named", one)

    name, walked = _path(path, settings)
    visited = GRIDS[schedule](walked, steps or SAMPLER_STEPS) if schedule else None
    if curve:
        _curve(name, walked, visited, steps, output, overwrite)
        return
    assert images

    from difftool import forward
    from difftool.data.images import read_image, write_png

    targets = _targets(images, output, overwrite)
    count, seed = steps or min(FRAMES, walked.steps), seed or 0
    levels = visited[::-1] if visited else forward.even_levels(walked, count)
    rivals = dict(_path(rival.strip(), None) for rival in compare.split(",")) if compare else {}

    def make(image: Path, target: Path) -> dict[str, Any]:
        x0 = forward.picture(read_image(image), size)
        height, width = x0.shape[:2]
        result: dict[str, Any] = {"schema": console.SCHEMA, "path": str(target)}
        result |= {"image": str(image), "width": width, "height": height, "seed": seed}
        if rivals:
            sheet = forward.compare_sheet(x0, rivals, count, seed)
            rows = {band.title: forward.json_rows(band.levels) for band in sheet.bands}
            result |= {"noise_paths": rows}
        else:
            result |= {"noise_path": name, "levels": forward.json_rows(levels)}
            if markov:
                sheet, check = forward.markov_sheet(x0, name, walked, levels, seed)
                result["chain"] = check._asdict()
            else:
                sheet = forward.strip_sheet(x0, name, walked, levels, seed)
        shown = f"{', '.join(rivals)}, {count}" if rivals else f"{name}, {len(levels)}"
        console.say(f"{image}: {width}x{height}, {shown} levels, seed {seed}")
        _make_folder(target)
        write_png(forward.draw(sheet), target, overwrite=overwrite)
        return result

    failed = 0
    for image, target in zip(images, targets, strict=True):
        try:
            result = make(image, target)
            console.emit(result if json else str(target))
        except DifftoolError as error:
            if len(images) == 1:
                raise
            console.fail(error)
            failed += 1
    if failed:
        console.warn(f"{failed} of {len(images)} pictures could not be shown")
        raise typer.Exit(1)


def _refuse(what: str, flags: Mapping[str, object]) -> None:
    """UsageError if any of the flags, by name, was given."""
    given = [flag for flag, value in flags.items() if value not in (None, False, [])]
    if given:
        raise UsageError(what, f"{given[0]} does not go with it", "leave one of them out")


def _path(name: str | None, settings: Sequence[str] | None) -> tuple[str, NoisePath]:
    """The path of that name with key=value options, under the spelling that was given."""
    from difftool.diffusion.path import build_path

    name = name or DEFAULT_PATH
    options: dict[str, Any] = {}
    if settings:
        from difftool.config import merge, override_layers

        for layer in override_layers(settings):
            options = merge(options, layer.values)
    if "kind" in options:
        raise UsageError("the kind of path is not set but named", hint="use --path NAME")
    return name, build_path({"kind": name, **options})


def _targets(images: Sequence[Path], output: str | None, overwrite: bool) -> list[Path]:
    """Where each strip goes; UsageError, before any work, where one cannot."""
    folder = Path(output or ".")
    if output is not None and not output.endswith(("/", os.sep)) and not folder.is_dir():
        if len(images) > 1:
            what = f"{len(images)} pictures do not fit in one file"
            raise UsageError(what, f"--output {output}", f"{output}/ is a folder for them")
        targets = [_suffixed(output, ".png")]
    else:
        targets = [folder / f"{image.stem}-noise.png" for image in images]
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not image.exists():
            raise UsageError(f"picture {image} does not exist")
        if target in targets[:index]:
            hint = "show them one at a time, with --output"
            raise UsageError(f"two pictures would be shown in {target}", hint=hint)
        _check_free(target, overwrite)
    return targets


def _suffixed(output: str, suffix: str) -> Path:
    """The output file; UsageError if it is of another kind than what is written here."""
    if Path(output).suffix.lower() != suffix:
        raise UsageError(f"--output {output} is not a {suffix} file", hint=f"{suffix} is made here")
    return Path(output)


def _check_free(target: Path, overwrite: bool) -> None:
    """UsageError, before any work, if the file is there and is not to be replaced."""
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists", hint="give --overwrite to replace it")


def _make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {target.parent}", error.strerror) from None


def _curve(
    name: str,
    path: NoisePath,
    visited: list[Level] | None,
    steps: int | None,
    output: str | None,
    overwrite: bool,
) -> None:
    """The numbers: all levels as JSON or .csv, a readable choice of them on the terminal."""
    from difftool import forward
    from difftool.data.images import write_whole

    target = _suffixed(output, ".csv") if output else None
    if target:
        _check_free(target, overwrite)
    readable = not (target or console.mode.json)
    count = steps or (min(TABLE_LINES, path.steps) if readable else None)
    levels = visited or forward.even_levels(path, count)
    if target:
        _make_folder(target)
        write_whole(target, forward.csv_text(levels).encode(), overwrite)
    if console.mode.json:
        result: dict[str, Any] = {"schema": console.SCHEMA, "noise_path": name}
        result |= {"path": str(target)} if target else {}
        console.emit(result | {"rows": forward.json_rows(levels)})
    elif target:
        console.emit(str(target))
    else:
        if not (visited or steps) and len(levels) < path.steps:
            console.say(f"{len(levels)} levels of {name}; all of them: --json or -o FILE.csv")
        for line in forward.table(levels, bars=sys.stdout.isatty()):
            console.emit(line)
