"""`difftool sample`: pictures from a model."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
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
    Set,
    choice,
    choices,
)
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import SAMPLERS, split_spelling
from difftool.errors import DifftoolError, UsageError
from difftool.images.formats import OUTPUT_FORMATS

if TYPE_CHECKING:
    from difftool.config.layers import Layer
    from difftool.config.schema import SampleConfig
    from difftool.pipeline.model import Model
    from difftool.sampling.run import Event, Result

FORMATS = list(OUTPUT_FORMATS)
SYNTAXES = ["none", "a1111", "comfy"]
MATCHES = ["diffusers"]


def _sampler(value: str | None) -> str | None:
    if value is not None:
        split_spelling(value)
    return value


def _grid(value: str | None) -> str | None:
    return None if value is None else GRIDS.resolve(value)


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model file, run folder, diffusers folder or name."),
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="What not to draw; needs guidance above 1.")
    ] = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", min=1, help="Images of each prompt.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Class, by name or index; repeatable, or a,b,c."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Width and height in pixels.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampler steps.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", callback=_sampler, help=choices("Sampler", SAMPLERS)),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", callback=_grid, help=choices("Grid of levels", GRIDS)),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Classifier-free guidance scale; 1 = off.")
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option("--guidance-rescale", min=0, max=1, help="0 to 1; 0 = off.")
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            "--guidance-interval", metavar="LOW,HIGH", help="Guidance only at these log SNRs."
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", min=0, help="Fresh noise of samplers that have it.")
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option("--seed", help="7, or 1,2,5-10, or -1 to draw one.  \\[drawn and printed]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Images made together.  \\[by size]")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="One image at a time: the same bits in any company.")
    ] = False,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE|-", help="A prompt or a JSON object a line; - is stdin."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="Picture to start from; to repaint with --mask; to edit."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", help="Share of the steps run on --init, above 0 to 1.  \\[0.75]"
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option("--mask", help="White is repainted, grey is soft; the rest of --init stays."),
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option("--image-guidance", help="How closely an edit follows --init.  \\[1.5]"),
    ] = None,
    image_prompt: Annotated[
        str | None, typer.Option("--image-prompt", help="Picture to vary (unCLIP models).")
    ] = None,
    noise_level: Annotated[
        int | None,
        typer.Option("--noise-level", help="How freely --image-prompt is varied, 0 to 999."),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option("--refiner", metavar="MODEL", help="Takes over for the last steps."),
    ] = None,
    refiner_start: Annotated[
        float | None,
        typer.Option("--refiner-start", min=0, max=1, help="Share of the path before it.  \\[0.8]"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:WEIGHT]", help="Apply a LoRA; repeatable.  \\[1]"),
    ] = None,
    allow_unused: Annotated[
        bool, typer.Option("--allow-unused", help="Though the model lacks layers of a --lora.")
    ] = False,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(
            "--embedding", help="Textual inversion: a word, as its file is called; repeatable."
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", metavar="MODEL", help="Autoencoder, or a model whose is taken."),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option("--clip-skip", min=1, help="Text encoder's layer from the end; 1 = the last."),
    ] = None,
    prompt_syntax: Annotated[
        str | None,
        typer.Option(
            "--prompt-syntax",
            callback=choice(SYNTAXES),
            help=choices("Weights and long prompts as in", SYNTAXES),
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Sample as this preset does: sdxl-turbo, lcm, ..."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            "--match", callback=choice(MATCHES), help=choices("Numbers exactly as in", MATCHES)
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Hold one network at a time; slower."),
    ] = False,
    strict_prompt: Annotated[
        bool, typer.Option("--strict-prompt", help="Refuse prompts longer than the model reads.")
    ] = False,
    from_image: Annotated[
        Path | None,
        typer.Option("--from-image", help="Start from what a picture's metadata say."),
    ] = None,
    from_latents: Annotated[
        list[Path] | None,
        typer.Option("--from-latents", help="Decode a file of --save-latents; repeatable."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File, folder/, name with \\[seed] \\[index] \\[prompt]..., or - for stdout."
            "  \\[outputs/NNNNN-SEED.png]",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", callback=choice(FORMATS), help=choices("Pictures", FORMATS)),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also one sheet of all images.")] = False,
    save_latents: Annotated[
        bool, typer.Option("--save-latents", help="Also PICTURE.latents.safetensors.")
    ] = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Pictures say nothing about themselves.")
    ] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out pictures that are there already.")
    ] = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    settings: Set = None,
    print_config: PrintConfig = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make pictures. Prints the path of each as soon as it is written.

    [bold]Examples[/bold]

      difftool sample "a smiling fox"
      difftool sample "a castle" -m model.safetensors -n 4 --size 64x64 --seed 7 -o castle.png
      difftool sample --prompts prompts.txt -o out/ --json | jq -r .path
      generate-prompts | difftool sample --prompts - -o out/
      difftool sample --from-image castle.png --steps 40
      difftool sample "as a watercolour" -m sd15 --init photo.png --strength 0.6
      difftool sample "a castle" -m sdxl --refiner sdxl-refiner --refiner-start 0.8
      difftool sample "a castle" -m sd15 --lora watercolour.safetensors:0.8
    """
    from difftool.sampling.output import Output
    from difftool.sampling.requests import (
        Request,
        parse_interval,
        parse_seeds,
        parse_size,
        read_requests,
    )

    if prompts and prompt_file:
        raise UsageError("prompts are given twice", hint="leave out PROMPT or --prompts")
    if from_latents and (prompts or prompt_file or from_image):
        raise UsageError("--from-latents decodes and reads no prompt", hint="leave one of them out")
    if refiner_start is not None and refiner is None:
        raise UsageError("--refiner-start has no model to start", hint="give --refiner")
    if from_latents and (init or image_prompt or refiner):
        raise UsageError("--from-latents decodes and nothing else", hint="leave the others out")
    if exact and batch_size not in (None, 1):
        raise UsageError(f"--exact and --batch-size {batch_size} exclude each other")
    if skip_existing and overwrite:
        raise UsageError("--skip-existing and --overwrite exclude each other")
    layers = _layers(
        {
            "size": parse_size(size) if size else None,
            "steps": steps,
            "sampler": sampler,
            "schedule": schedule,
            "guidance": guidance,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": parse_interval(guidance_interval) if guidance_interval else None,
            "eta": eta,
            "strength": strength,
            "image_guidance": image_guidance,
            "noise_level": noise_level,
            "clip_skip": clip_skip,
            "prompt_syntax": prompt_syntax,
        },
        settings or [],
    )
    flags = Request(
        negative=negative,
        seeds=None if seed is None else parse_seeds(seed),
        num=num,
        init=init,
        mask=mask,
        image=image_prompt,
        settings=_asked(layers),
    )
    labels = [part for text in label or [] for part in text.split(",")] or [None]
    base = flags
    if from_image:
        from difftool.sampling.metadata import read

        base = flags.over(read(from_image))
    count = len(base.images())
    requests = [
        dataclasses.replace(base, prompt=base.prompt if p is None else p, label=name or base.label)
        for p, name in itertools.product(prompts or [None], labels)
    ]
    if prompt_file and len(labels) > 1:
        raise UsageError("one --label goes with --prompts", hint='put a "label" on each line')
    total = None if prompt_file else len(from_latents or ()) or len(requests) * count
    where = Output.parse(
        output,
        format=format,
        many=total != 1,
        overwrite=overwrite,
        skip_existing=skip_existing,
    )
    if where.stdout:
        _check_stdout(total, grid, json, save_latents)
    stream: Iterable[Request | DifftoolError | None] = requests
    if prompt_file:
        stream = read_requests(prompt_file, requests[0])

    from difftool.adapters.lora.file import parse_lora
    from difftool.config.layers import Layer, origins
    from difftool.config.validate import to_values
    from difftool.pipeline.load import load_model
    from difftool.pipeline.settings import plan_sampling, resolve_settings
    from difftool.pipeline.words import add_embeddings
    from difftool.sampling.run import Run

    loras = [parse_lora(text) for text in lora] if lora else [(Path(p), w) for p, w in base.loras]
    loaded = load_model(
        model, device=device, dtype=dtype, vae=vae, recipe=preset, low_memory=low_memory,
        loras=loras, allow_unused=allow_unused,
    )  # fmt: skip
    second = None
    if refiner:
        second = load_model(refiner, device=device, dtype=dtype, low_memory=low_memory)
    for each in (loaded, second) if second else (loaded,):
        each.set_padding(match)
        add_embeddings(each, embedding or map(Path, base.embeddings))
    for note in (*loaded.notes, *(second.notes if second else ())):
        console.say(note)
    for word in loaded.words:
        console.say(f"word {word} ({word.path})")
    resolved = resolve_settings(loaded, base.settings, match)
    plan_sampling(loaded, resolved)  # refuses options that the sampler lacks
    console.say(_recipe(resolved))
    if print_config:
        below = [Layer(f"model {loaded.name}", to_values(loaded.preset))]
        if from_image:
            below.append(Layer(f"--from-image {from_image}", {"sample": base.settings}))
        whole = dataclasses.replace(loaded.preset, sample=resolved)
        console.print_config(origins(whole, below + layers))
        return
    run = Run(
        model=loaded,
        output=where,
        batch_size=1 if exact else batch_size,
        metadata=not no_metadata,
        latents=save_latents,
        strict=strict_prompt,
        grid=grid,
        match=match,
        refiner=second,
        refiner_start=0.8 if refiner_start is None else refiner_start,
    )
    events = run.decode(from_latents) if from_latents else run.events(stream)
    raise typer.Exit(_show(events, loaded, total, resolved.steps))


def _recipe(settings: SampleConfig) -> str:
    """How pictures are made, in a line."""
    width, height = settings.size
    how = f"{settings.steps} steps of {settings.sampler}, schedule {settings.schedule}"
    return f"{how}, guidance {settings.guidance:g}, {width}x{height}"


def _layers(flags: dict[str, Any], overrides: list[str]) -> list[Layer]:
    """What was asked for on the command line, flag by flag, as layers over the model's preset."""
    from difftool.config.layers import Layer, override_layers

    # Fresh noise is an option of the sampler; every other flag is a setting of its own.
    layers = [
        Layer(
            f"--{name.replace('_', '-')}",
            {"sample": {"sampler_options": {"eta": value}} if name == "eta" else {name: value}},
        )
        for name, value in flags.items()
        if value is not None
    ]
    for layer in override_layers(overrides):
        if not isinstance(layer.values.get("sample"), dict):
            why = "the model's weights fix the rest"
            raise UsageError(f"{layer.origin}: only sample.KEY is set here", why)
        layers.append(layer)
    return layers


def _asked(layers: list[Layer]) -> dict[str, Any]:
    from difftool.config.layers import merge

    asked: dict[str, Any] = {}
    for layer in layers:
        asked = merge(asked, layer.values["sample"])
    return asked


def _check_stdout(total: int | None, grid: bool, json: bool, save_latents: bool) -> None:
    """UsageError unless exactly one picture, and nothing else, can go to stdout."""
    if json:
        raise UsageError("-o - and --json both want stdout", hint="leave one of them out")
    if save_latents:
        raise UsageError("--save-latents needs a picture's name", hint="give -o FILE")
    if total != 1 and not grid:
        hint = "--grid puts them on one sheet, -o out/ writes files"
        raise UsageError("-o - takes one image", f"{total or 'a stream'} asked for", hint)
    if sys.stdout.isatty():
        raise UsageError("-o - does not write a picture to a terminal", hint="redirect: > fox.png")


def _show(events: Iterator[Event], model: Model, total: int | None, steps: int) -> int:
    """Print what happens; the exit code of it all."""
    from difftool.sampling import run

    made = drawn = skipped = work = 0
    errors: list[DifftoolError] = []

    def finished() -> str:
        return f"{drawn}/{total}" if total else str(drawn)

    with console.progress("sampling", total and total * steps) as display:
        for event in events:
            match event:
                case run.Working(images, step, last):
                    work += images
                    if step < last:  # what is finished is told with the next steps, or at the end
                        display.update(work, images=finished())
                case run.Result():
                    made += 1
                    drawn += 1
                    _emit(event.path, _report(event, model))
                case run.Grid(path, images):
                    drawn = max(drawn, images)
                    report = {"schema": console.SCHEMA, "path": str(path), "grid": images}
                    _emit(path, report)
                case run.Failure(_, error):
                    errors.append(error)
                    console.fail(error)
                case run.Skipped():
                    skipped += 1
                case run.Note(text, warning):
                    (console.warn if warning else console.say)(text)
        if work:
            display.update(work, images=finished())
    if skipped or (errors and made):
        console.say(f"{made} made, {skipped} there already, {len(errors)} failed")
    codes = {error.code for error in errors}
    if not codes:
        return 0
    return 1 if made or skipped or len(codes) > 1 else codes.pop()


def _emit(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        console.emit(report if console.mode.json else str(path))


def _report(result: Result, model: Model) -> dict[str, Any]:
    recipe, settings = result.recipe, result.recipe.settings
    width, height = settings.size
    report = {
        "schema": console.SCHEMA,
        "path": str(result.path),
        "index": result.index,
        "prompt": recipe.prompt,
        "negative": recipe.negative,
        "label": recipe.label,
        "seed": recipe.seed,
        "sampler": settings.sampler,
        "schedule": settings.schedule,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "width": width,
        "height": height,
        "model": model.name,
        "model_hash": model.hash,
        "seconds": round(result.seconds, 3),
    }
    more = {"init": recipe.init, "mask": recipe.mask, "image_prompt": recipe.image}
    more |= {"refiner": recipe.refiner, "latents": result.latents}
    return report | {name: str(value) for name, value in more.items() if value is not None}
