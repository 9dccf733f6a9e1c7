"""`difftool noise`: the forward process of a picture, and the numbers behind it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftool.cli import console
from difftool.cli.console import (
    Debug,
    Device,
    Dtype,
    Json,
    Offline,
    Overwrite,
    PrintConfig,
    Quiet,
    choice,
    choices,
)
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS
from difftool.errors import DifftoolError, UsageError, suggestion

if TYPE_CHECKING:
    from difftool.diffusion.path import Path as NoisePath
    from difftool.forward.show import Show
    from difftool.pipeline.model import Model

DEFAULT_PATH = "sd15"
FORMATS = ["png", "gif", "webp", "html", "csv"]
CURVE_FORMATS = ["csv", "png", "html"]


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
            help="Levels shown, or steps of the sampler.  \\[8, 40 of a moving picture; 20]",
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
    print_config: PrintConfig = False,
    offline: Offline = False,
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
      difftool noise photo.png --reverse --prompt "a smiling fox"
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

    from difftool.forward.show import Show

    loaded = None
    if latent or reverse:
        loaded = _load(model, device, dtype)
        paths = {loaded.name: loaded.denoiser.path}
    elif model:
        paths = _model_path(model)
    else:
        names = compare.split(",") if compare is not None else [path or DEFAULT_PATH]
        paths = dict(_path(name.strip(), settings) for name in names)
        if len(paths) < len(names):
            raise UsageError("a path is compared with itself", f"--compare {compare}")
    show = Show(
        paths=paths,
        model=loaded,
        schedule=schedule,
        steps=steps,
        seed=seed or 0,
        size=size,
        markov=markov,
        reverse=reverse,
        prompt=prompt,
        label=label,
    )
    if print_config:
        console.print_config(_config(show, settings))
        return
    if curve:
        _curve(show, targets, kind, overwrite)
        return
    if loaded and reverse:
        _check_told(loaded, prompt, label)
    failed = 0
    for image, target in zip(images or [], targets, strict=True):
        try:
            result = _show(show, image, target, kind, overwrite)
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
    from difftool.storage.commit import refuse_existing

    for target in targets:
        refuse_existing(target, overwrite)
        if target.is_dir():
            raise UsageError(f"{target} is a folder")


def _write(target: Path, data: bytes, overwrite: bool) -> None:
    from difftool.storage.commit import write_whole

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
        from difftool.config.layers import merge, override_layers

        for layer in override_layers(settings):
            options = merge(options, layer.values)
    if "kind" in options:
        raise UsageError("the kind of path is not set but named", hint="use --path NAME")
    return name, build_path({"kind": name, **options})


def _model_path(where: str) -> dict[str, NoisePath]:
    """The path of a model by the model's name, read without loading its weights."""
    from difftool.config.validate import build_preset
    from difftool.diffusion.path import build_path
    from difftool.formats import open_model
    from difftool.hub.find import find_model

    file = find_model(where)
    source = open_model(file)
    preset = build_preset(source.values, str(file))
    for note in (f"model {preset.name} ({file})", *source.evidence):
        console.say(note)
    return {preset.name: build_path(preset.path)}


def _load(where: str | None, device: str, dtype: str) -> Model:
    from difftool.pipeline.load import load_model

    model = load_model(where, device=device, dtype=dtype)
    for note in model.notes:
        console.say(note)
    for warning in model.warnings:
        console.warn(warning)
    return model


def _check_told(model: Model, prompt: str | None, label: str | None) -> None:
    """UsageError, before any picture, for what a model cannot be told; what it does not read."""
    from difftool.forward.reverse import condition
    from difftool.pipeline.condition import token_count

    condition(model, model.preset.sample.size, prompt, label)
    tokens, read = token_count(model, prompt or "")
    if tokens > read:
        console.warn(f"the model reads {read} of the prompt's {tokens} tokens")


def _config(show: Show, settings: Sequence[str] | None) -> Iterator[tuple[str, Any, str]]:
    """Every value of what is shown, with its origin."""
    given = {text.partition("=")[0].strip(): f"--set {text}" for text in settings or []}
    for name, path in show.paths.items():
        for key in fields(path):  # type: ignore[arg-type]
            value = getattr(path, key.name)
            if value is not None:
                yield f"{name}.{key.name}", value, given.get(key.name, f"path {name}")
    for flag in ("schedule", "steps", "seed", "size"):
        value = getattr(show, flag)
        yield flag, value, f"--{flag}" if value else "default"


def _show(show: Show, image: Path, target: Path, kind: str, overwrite: bool) -> dict[str, Any]:
    """Show one picture in a file; what is told of it under --json."""
    from difftool.forward.levels import finite
    from difftool.forward.outputs import OUTPUTS
    from difftool.images.read import read_picture

    picture = read_picture(image)
    if show.reverse:
        with console.progress("predicting", len(show.shown(kind))) as bar:
            figure, facts = show.figure(picture.image, kind, bar.update)
    else:
        figure, facts = show.figure(picture.image, kind)
    width, height = figure.size
    said = [f"{width}x{height}", *picture.notes, *show.paths]
    said += [f"{len(figure.strips[0].levels)} levels", f"seed {show.seed}"]
    console.say(f"{image}: {', '.join(said)}")
    _write(target, OUTPUTS[kind].write(figure), overwrite)
    result: dict[str, Any] = {"schema": console.SCHEMA, "path": str(target), "image": str(image)}
    result |= {"width": width, "height": height, "seed": show.seed}
    if figure.comparison:
        result["noise_paths"] = {strip.title: finite(strip.rows()) for strip in figure.strips}
    else:
        result |= {"noise_path": show.name, "levels": finite(figure.rows())}
    return result | facts


def _curve(show: Show, targets: Sequence[Path], kind: str, overwrite: bool) -> None:
    """The numbers: all levels as JSON or in a file, a readable choice of them on the terminal."""
    from difftool.forward.levels import finite, table
    from difftool.forward.outputs import CURVES
    from difftool.forward.show import TABLE_LINES

    for target in targets:
        figure = show.curves(None if kind == "csv" else 0)
        _write(target, CURVES[kind](figure), overwrite)
    if console.mode.json:
        result: dict[str, Any] = {"schema": console.SCHEMA}
        result |= {"path": str(targets[0])} if targets else {}
        tables = {strip.title: finite(strip.rows()) for strip in show.curves(None).strips}
        one = {"noise_path": show.name, "rows": tables[show.name]}
        console.emit(result | (one if len(tables) == 1 else {"noise_paths": tables}))
    elif targets:
        console.emit(str(targets[0]))
    else:
        strips = show.curves(TABLE_LINES).strips
        for strip in strips:
            whole = show.paths[strip.title].steps
            if not (show.schedule or show.steps) and len(strip.levels) < whole:
                text = f"{len(strip.levels)} levels of {strip.title}; all of them: --json"
                console.say(f"{text} or -o FILE.csv")
            if len(strips) > 1:
                console.emit(strip.title)
            for line in table(strip.levels, bars=sys.stdout.isatty()):
                console.emit(line)
