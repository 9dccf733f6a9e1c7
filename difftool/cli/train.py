"""`difftool train`: from a dataset folder to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from difftool.cli import console
from difftool.cli.console import (
    Debug,
    Device,
    Json,
    Offline,
    PrintConfig,
    Quiet,
    Set,
    choice,
    choices,
)
from difftool.config.layers import Layer, preset_names
from difftool.config.schema import RECIPES, Part
from difftool.errors import UsageError

if TYPE_CHECKING:
    from difftool.config.schema import Preset
    from difftool.training.run.folder import Run

PRECISIONS = ["auto", "fp32", "bf16", "fp16"]
OPTIMIZERS = ["adamw", "muon"]
MAX_WORKERS = 256
LORA_RANK = 16
PARTS: list[str] = list(RECIPES)
LABELS, CROPS = ["auto", "none", "text", "folders", "prefix"], ["centre", "random"]
DATA = "Data"
KEY, VALUE = 20, 28
"""Columns of a key and of a value in what is said before a run."""


def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help='A folder of pictures, or "shapes".')],
    preset: Annotated[
        str | None,
        typer.Option("--preset", help=choices("Model and recipe", preset_names()) + " Or a .yaml."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder.  \\[runs/DATA-NNN]")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Pictures a batch.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Batches an optimiser step.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side of the pictures.")] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            callback=choice(PARTS),
            help=choices("Train this part alone", PARTS) + " Default: the preset's.",
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Fine-tune this model.")
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA of --from, not the model itself.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Size of the LoRA's matrices.  \\[16]")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            callback=choice(LABELS),
            help=choices("What pictures are conditioned on", LABELS),
            rich_help_panel=DATA,
        ),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(
            "--caption-column",
            help="Column of the metadata with the captions.  \\[text, caption, prompt]",
            rich_help_panel=DATA,
        ),
    ] = None,
    shuffle_captions: Annotated[
        bool | None,
        typer.Option(
            "--shuffle-captions",
            help="Shuffle captions that are tags between commas.",
            rich_help_panel=DATA,
        ),
    ] = None,
    keep_tokens: Annotated[
        int | None,
        typer.Option(
            "--keep-tokens", help="Shuffled tags that stay in front.", rich_help_panel=DATA
        ),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            "--crop",
            callback=choice(CROPS),
            help=choices("Part of a picture that is used", CROPS) + "  \\[centre]",
            rich_help_panel=DATA,
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            "--background",
            metavar="COLOUR",
            help="Below transparent pixels: a name, #rrggbb.  \\[white]",
            rich_help_panel=DATA,
        ),
    ] = None,
    buckets: Annotated[
        bool | None,
        typer.Option(
            "--buckets/--no-buckets",
            help="Frames of the pictures' own shapes, not squares.  \\[chosen]",
            rich_help_panel=DATA,
        ),
    ] = None,
    allow_bad: Annotated[
        bool | None,
        typer.Option(
            "--allow-bad", help="Go on with many unusable pictures.", rich_help_panel=DATA
        ),
    ] = None,
    allow_uncaptioned: Annotated[
        bool | None,
        typer.Option(
            "--allow-uncaptioned",
            help="Go on where many pictures lack a caption.",
            rich_help_panel=DATA,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", metavar="MODEL", help="Work in this model's latents, as they are."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of everything random.  \\[0]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", callback=choice(PRECISIONS), help=choices("Arithmetic", PRECISIONS)
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer", callback=choice(OPTIMIZERS), help=choices("Optimiser", OPTIMIZERS)
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run the U-Net through torch's compiler.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="Threads that prepare batches ahead.  \\[0 on CPU, up to 4 on GPU]"
        ),
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="Moving average of the weights.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option("--resume-from", help="Continue from this checkpoint.")
    ] = None,
    save_every: Annotated[
        int, typer.Option("--save-every", help="Steps between checkpoints.")
    ] = 500,
    keep: Annotated[int, typer.Option("--keep", help="Checkpoints kept.")] = 2,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size", metavar="SIZE", help="Split a larger model: 500MB.  \\[5GB]"
        ),
    ] = None,
    sample_every: Annotated[
        int, typer.Option("--sample-every", help="Steps between sample sheets.")
    ] = 500,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            metavar="SHARE|COUNT",
            help="Pictures that are measured and never trained on; 0 = none.  \\[chosen]",
        ),
    ] = None,
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option("--sample-prompt", help="Prompt of the sample sheets; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the audit, the plan and the estimates.")
    ] = False,
    device: Device = "auto",
    settings: Set = None,
    print_config: PrintConfig = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a diffusion model on a folder of pictures.

    Captions (metadata.jsonl, .txt beside each picture) make a text-to-image model, class folders a
    class-conditional one, neither an unconditional one. What is not given is chosen from the data
    and the device, and said. Prints the path of the model.

    [bold]Examples[/bold]

      difftool train shapes --steps 300
      difftool train ./photos --out runs/photos --steps 20000 --batch-size 64
      difftool train ./photos --from sd15.safetensors --lora --rank 16
      difftool train ./photos --out runs/photos --resume
    """
    resuming = resume or resume_from is not None
    flags: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "lr": lr,
        "size": size,
        "precision": precision,
        "seed": seed,
        "optimizer": optimizer,
        "validation": validation,
    }
    data_flags: dict[str, Any] = {
        "labels": labels,
        "caption_column": caption_column,
        "shuffle_captions": shuffle_captions,
        "keep_tokens": keep_tokens,
        "crop": crop,
        "background": background,
        "buckets": buckets,
        "allow_bad": allow_bad,
        "allow_uncaptioned": allow_uncaptioned,
    }
    reading = [
        Layer(f"--{name.replace('_', '-')}", {"data": {name: value}})
        for name, value in data_flags.items()
        if value is not None
    ]
    for name in ("steps", "batch_size", "accumulate", "lr", "size"):
        value = flags[name]
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not a positive number")
    for name, value in (("save-every", save_every), ("keep", keep), ("sample-every", sample_every)):
        if value < 1:
            raise UsageError(f"--{name} {value} is not a positive number")
    if workers is not None and not 0 <= workers <= MAX_WORKERS:
        raise UsageError(f"--workers {workers} is not a number from 0 to {MAX_WORKERS}")
    if validation is not None and not 0 <= validation < float("inf"):
        raise UsageError(f"--validation {validation:g} is not a share or a count of pictures")
    if resuming and out is None:
        raise UsageError("--resume needs the run to continue", hint="name it with --out")

    if lora and start is None and not resuming:
        hint = "name it: --from MODEL"
        raise UsageError("--lora needs the model that it is to be a LoRA of", hint=hint)
    if lora and part not in (None, "unet"):
        raise UsageError(f"--lora and --part {part} exclude each other")
    if rank is not None and not lora and not resuming:
        raise UsageError("--rank is a LoRA's", hint="add --lora")
    if start is not None and preset is not None:
        raise UsageError("--from brings its own preset", hint="leave --preset out; use --set")

    from difftool.config.layers import (
        data_config,
        load_preset,
        origins,
        override_layers,
        preset_layers,
    )
    from difftool.config.validate import to_yaml
    from difftool.data import open_dataset
    from difftool.formats import open_model
    from difftool.hub.find import find_model
    from difftool.pipeline.load import pick_device
    from difftool.pipeline.model import Model
    from difftool.storage.shards import parse_size
    from difftool.training.report.page import usage
    from difftool.training.run import stages as staged
    from difftool.training.run.estimate import check_disk, estimate
    from difftool.training.run.folder import is_used, new_folder
    from difftool.training.run.plan import plan
    from difftool.training.step import parallel
    from difftool.training.step.batches import buckets_of
    from difftool.training.step.loop import compiler_problem

    shard_size = None if max_shard_size is None else parse_size(max_shard_size)
    where = parallel.join(pick_device(device))
    if out is not None and not resuming and is_used(out):
        hint = "give --resume to continue it, or another --out"
        raise UsageError(f"the run folder {out} is not empty", hint=hint)
    if resuming and out is not None and preset is None:
        preset, start = _preset_of_run(out), None

    with console.progress("looking at files", None) as display:
        said = [*(preset_layers(preset) if preset else ()), *reading]
        config = data_config([*said, *override_layers(settings or [])])
        dataset = open_dataset(data, config, progress=lambda done, total: display.update(done))
    console.table(_columns(dataset.audit.lines()))
    only = cast("Part | None", part)
    key = RECIPES[only or "unet"]
    shared = {"seed", "precision", "validation"}
    given = [
        Layer(
            f"--{name.replace('_', '-')}",
            {k: {name: value} for k in (RECIPES.values() if name in shared else (key,))},
        )
        for name, value in flags.items()
        if value is not None
    ]
    if ema is not None:
        default = getattr(load_preset(preset), key).ema if preset else 0.999
        given.append(Layer("--ema/--no-ema", {key: {"ema": (default or 0.999) if ema else 0.0}}))
    adopt: dict[str, Path] = {}
    begin: list[Layer] = []
    tokenizer = None
    if start is not None:
        base = find_model(start)
        begin, tokenizer = staged.start_layers(base), open_model(base).tokenizer_json
        adopt = dict.fromkeys(("unet", "text", "vae"), base)
        if lora:
            begin += staged.lora_layers(base, rank or LORA_RANK)
    if resuming and rank is not None:
        given.append(Layer("--rank", {"train": {"lora_rank": rank}}))
    if vae is not None:
        adopt["vae"] = find_model(vae)
        given.append(staged.vae_layer(f"--vae {vae}", adopt["vae"]))
        only = only or "unet"
    given += [*reading, *override_layers(settings or [])]

    def planned(vocabulary: str | None) -> tuple[Preset, str | None, list[Layer]]:
        return plan(dataset, where.type, preset, given, vocabulary, only, begin)

    resolved, tokenizer, layers = planned(tokenizer)
    stages, notes = staged.survey(
        out or Path(), resolved.parts, resume=resume, resume_from=resume_from
    )
    for note in notes:
        console.warn(note)
    if known := staged.vocabulary(stages):
        resolved, tokenizer, layers = planned(known)
    if resolved.train.lora_base:
        adopt = dict.fromkeys(("unet", "text", "vae"), find_model(resolved.train.lora_base))
    rows = list(origins(resolved, layers))
    if print_config:
        console.print_config(iter(rows))
        return
    chosen = [
        ("preset" if name == "name" else name, _short(value), origin.rpartition("chosen: ")[2])
        for name, value, origin in rows
        if origin.startswith(("chosen", "data")) or (", chosen" in origin and name == "name")
    ]
    costs = estimate(Model(resolved, tokenizer), keep, where)
    console.table([*chosen, *costs.rows()])
    if frames := buckets_of(resolved, resolved.train.size or 0):
        sizes = [dataset.picture_size(index) for index in range(len(dataset))]
        for line in frames.lines(size for size in sizes if size):
            console.say(line)
    if dry_run:
        return

    check_disk(out or Path("runs"), costs.disk)
    folder = parallel.from_first(lambda: out or new_folder(data))
    folder.mkdir(parents=True, exist_ok=True)
    if not resuming and parallel.is_main():
        (folder / "config.yaml").write_text(to_yaml(resolved))
    console.say(f"run folder {folder}")
    if compiled and (problem := compiler_problem(where)):
        console.warn(f"going on without --compile: {problem}")
        compiled = False
    stages = [s._replace(folder=folder / s.folder.relative_to(out or Path())) for s in stages]
    runs = staged.runs(
        stages,
        resolved,
        dataset,
        adopt=adopt,
        device=where,
        tokenizer_json=tokenizer,
        save_every=save_every,
        keep=keep,
        shard_size=shard_size,
        sample_every=sample_every,
        prompts=sample_prompt or (),
        argument=data,
        workers=workers,
        compiled=compiled,
        choices=[row for row in rows if not row[2].startswith(("default", "preset"))],
        progress=console.progress,
    )
    path, made = folder, None
    for run in runs:
        path = _train(run)
        made = run.preset, run.facts
    hints = [("model", str(path)), ("report", str(folder / "report.html"))]
    if made is not None:
        hints += [("next", command) for command in usage(*made, folder)[:1]]
    console.table(hints)
    result = {"schema": console.SCHEMA, "model": str(path), "steps": resolved.train.steps}
    console.emit(result if json else str(path))


def _train(run: Run) -> Path:
    """Take a run to its end, showing how it goes; the model's path."""
    _tell(run)
    trainer, loss = run.trainer, "-"
    if run.resumed:
        console.say(f"resumed from {run.resumed}")
    name = "training" if run.part == "unet" else f"training the {run.part}"
    with console.progress(name, trainer.config.steps) as display:
        for step in run.steps():
            if step.loss is not None:
                loss = f"{step.loss:.4f}"
            speed = f"{step.images_per_second:.1f}/s"
            display.update(step.step, loss=loss, images=speed, lr=f"{step.lr:.1e}")
            _tell(run)
    path = run.finish()
    _tell(run)
    return path


def _tell(run: Run) -> None:
    """What the run has noted since it was last asked."""
    while run.notes:
        console.warn(run.notes.pop(0))


def _columns(lines: list[str]) -> list[tuple[str, str]]:
    """Lines of the audit, "key: value" where the key is short, as rows."""
    rows = []
    for line in lines:
        key, sign, value = line.partition(": ")
        short = sign and len(key) <= KEY and not line.startswith(" ")
        rows.append((key, value) if short else ("", line.strip()))
    return rows


def _preset_of_run(folder: Path) -> str | None:
    """The configuration that a run folder was made with, as a preset file to resume with."""
    path = folder / "config.yaml"
    if not path.is_file():
        hint = "start without --resume, or point --out at the run to continue"
        raise UsageError(
            f"there is no checkpoint to resume from in {folder}", "it has no config.yaml", hint
        )
    return str(path)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= VALUE else f"{text[: VALUE - 1]}…"
