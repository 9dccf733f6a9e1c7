"""`difftool convert`: from one model format to another, and what is in a model."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from difftool.cli import console
from difftool.cli.console import Debug, Json, Offline, Overwrite, Quiet, choice, choices
from difftool.errors import CheckError, UsageError

if TYPE_CHECKING:
    from difftool.conversion.convert import Ledger

KINDS = ["ldm", "diffusers", "difftool"]
LORA_KINDS = ["kohya", "peft"]
DTYPES = ["fp32", "fp16", "bf16"]
WEIGHTS = ["live", "ema"]
PREDICTIONS = ["eps", "v"]
SLOW = 256 << 20
"""Bytes from which on a conversion shows its progress."""


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A model: file, folder or name."),
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The file or folder to write.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            callback=choice(KINDS + LORA_KINDS),
            help=choices("Format", KINDS) + "; " + choices("of a LoRA", LORA_KINDS),
        ),
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Say what is in SRC; loads no tensor data.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            callback=choice(DTYPES),
            help=choices("Of the weights", DTYPES) + "  [as they are]",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            callback=choice(WEIGHTS),
            help=choices("Keep only the trained or the averaged weights", WEIGHTS) + "  [both]",
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            "--prediction",
            callback=choice(PREDICTIONS),
            help=choices("What the model predicts, where its files do not say", PREDICTIONS),
        ),
    ] = None,
    zero_snr: Annotated[
        bool | None,
        typer.Option("--zero-snr/--no-zero-snr", help="Whether its noise ends in pure noise."),
    ] = None,
    ema_length: Annotated[
        float | None,
        typer.Option(
            "--ema-length",
            metavar="SHARE",
            help="Average a run's weights over this share of it (train.ema_profile=power).",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write the ledger of tensors here, as JSON.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read back and compare.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and say what would be written; write nothing.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE[:WEIGHT]", help="Merge a LoRA into SRC; repeatable.  \\[1]"
        ),
    ] = None,
    allow_unused: Annotated[
        bool, typer.Option("--allow-unused", help="Though some of a LoRA's tensors have no use.")
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Split larger files: 500MB, 2GiB.  \\[5GB; ldm is not split]",
        ),
    ] = None,
    strip_metadata: Annotated[
        bool, typer.Option("--strip-metadata", help="Leave out notes that no tool needs.")
    ] = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a model to another format without losing anything, or say what is in it.

    [bold]Examples[/bold]

      difftool convert model.safetensors model/ --to diffusers
      difftool convert sd15.safetensors sd15/ --to diffusers --weights ema --report ledger.json
      difftool convert sd15/ sd15.safetensors --to ldm --dtype fp16
      difftool convert sd15.safetensors fox.safetensors --lora fox-lora.safetensors:0.8
      difftool convert kohya-lora.safetensors lora.safetensors --to peft
      difftool convert model.safetensors --inspect --json
    """
    from difftool.hub.find import find_model

    if inspect:
        if target or to or dtype or weights or ema_length or report or dry_run:
            hint = "leave out DST and what belongs to it"
            raise UsageError("--inspect says what is in SRC and writes nothing", hint=hint)
        _inspect(find_model(source), json, prediction, zero_snr)
        return
    if target is None:
        raise UsageError("no DST was given", hint="name what to write, or ask for --inspect")
    if ema_length is not None and weights:
        raise UsageError("--weights says what --ema-length says otherwise", hint="give one of them")
    if to is None and ema_length is not None:
        to = "difftool"
    if to in LORA_KINDS:
        if dtype or weights or prediction or ema_length or lora or max_shard_size:
            hint = "leave out what is about models"
            raise UsageError(f"--to {to} gives a LoRA other names and nothing else", hint=hint)
        _rename(Path(source), target, to, report, verify, dry_run, overwrite, allow_unused, json)
        return
    if to is None and not lora:
        hint = "add --to " + " or --to ".join(KINDS)
        raise UsageError("the format to convert to was not given", hint=hint)
    from difftool.storage.commit import refuse_existing, write_whole
    from difftool.storage.shards import parse_size, written_at

    shard_size = None if max_shard_size is None else parse_size(max_shard_size)

    if report is not None:
        refuse_existing(report, overwrite)

    from difftool.adapters.lora.algebra import open_loras
    from difftool.adapters.lora.file import parse_lora
    from difftool.config.validate import build_preset
    from difftool.conversion import convert as formats
    from difftool.formats import open_model
    from difftool.formats.model_source import Told, choose_weights
    from difftool.pipeline.model import Model

    with _averaged(find_model(source), ema_length) as path:
        opened = choose_weights(open_model(path, Told(prediction, zero_snr)), weights)
        for line in opened.evidence:
            console.say(line)
        to = to or opened.kind
        networks = Model(build_preset(opened.values, str(path)), opened.tokenizer_json)
        expected = {name: tuple(t.shape) for name, t in networks.tensors().items()}
        loras = open_loras(
            map(parse_lora, lora or ()), expected, networks.preset.unet, str(path),
            allow_unused=allow_unused, error=CheckError,
        )  # fmt: skip
        for applied in loras:
            console.say(str(applied))
        size = sum(place.info.end - place.info.start for place in opened.tensors.values())
        shown = (
            console.progress("converting", len(opened.tensors)) if size > SLOW else nullcontext()
        )
        with shown as bar:
            ledger = formats.convert(
                opened,
                target,
                to,
                dtype=dtype,
                keep_metadata=not strip_metadata,
                expected=expected,
                verify=verify,
                dry_run=dry_run,
                overwrite=overwrite,
                shard_size=shard_size,
                loras=loras,
                progress=lambda done: bar.update(done) if bar else None,
            )
    for warning in ledger.warnings:
        console.warn(warning)
    _say(ledger)
    if report is not None:
        write_whole(report, jsonlib.dumps(ledger.report(), indent=1).encode(), overwrite)
    if json:
        told = {key: value for key, value in ledger.report().items() if key != "entries"}
        console.emit(told | {"path": None if dry_run else str(written_at(target))})
    elif not dry_run:
        console.emit(console.plain(written_at(target)))


def _rename(
    source: Path, target: Path, to: str, report: Path | None, verify: bool, dry_run: bool,
    overwrite: bool, allow_unused: bool, json: bool,
) -> None:  # fmt: skip
    """A LoRA under another dialect's names."""
    from difftool.conversion.lora import convert_lora
    from difftool.storage.commit import refuse_existing, write_whole

    for path in (target, report):
        if path is not None:
            refuse_existing(path, overwrite)
    found = convert_lora(
        source, target, to, overwrite=overwrite, allow_unused=allow_unused, verify=verify,
        dry_run=dry_run,
    )  # fmt: skip
    came = found["kinds"][0]
    console.say(f"{came} to {to}: {found['layers']} layers of {found['family']}")
    for name, why in found["unused"].items():
        console.warn(f"left out {name}: {why}")
    if report is not None:
        write_whole(report, jsonlib.dumps({"schema": 1} | found, indent=1).encode(), overwrite)
    if json:
        told = {key: value for key, value in found.items() if key != "tensors"}
        console.emit({"schema": 1} | told | {"path": None if dry_run else str(target)})
    elif not dry_run:
        console.emit(console.plain(target))


@contextmanager
def _averaged(source: Path, length: float | None) -> Iterator[Path]:
    """SRC, or for the time being its model with the weights averaged over a share of its run."""
    if length is None:
        yield source
        return
    from difftool.adapters.averages import write_model

    with TemporaryDirectory(prefix="difftool-") as folder:
        path = Path(folder) / "model.safetensors"
        misfit = write_model(source, length, path)
        console.say(f"averaged over {length:g} of the run, to {misfit:.1%}")
        yield path


def _inspect(source: Path, json: bool, prediction: str | None, zero_snr: bool | None) -> None:
    from difftool.conversion.inspect import inspect
    from difftool.formats.model_source import Told

    found = inspect(source, Told(prediction, zero_snr))
    for warning in found["warnings"]:
        console.warn(warning)
    if json:
        console.emit(found)
        return
    for line in _lines(found):
        console.emit(console.plain(line))


def _lines(found: dict[str, Any]) -> list[str]:
    def row(key: str, value: object) -> str:
        return f"{key:<12}{value}"

    zero_snr = {True: ", zero terminal SNR"}.get(found["zero_snr"], "")
    lines = [
        row("format", found["format"]),
        row("family", found["family"] or "unknown to this version"),
        row("prediction", f"{found['prediction'] or 'not said'}{zero_snr}"),
        row("weights", ", ".join(found["weights"]) or "not said"),
    ]
    lines += [row("evidence", f"{e['source']}: {e['says']}") for e in found["evidence"]]
    for name, part in found["components"].items():
        dtypes = ", ".join(part["dtypes"])
        count = f"{part['parameters']:,} parameters in {part['tensors']} tensors"
        lines.append(row(name[:11], f"{count}, {dtypes}"))
    return lines + [row("metadata", f"{k}: {v[:200]}") for k, v in found["metadata"].items()]


def _say(ledger: Ledger) -> None:
    counts = ", ".join(f"{count} {op}" for op, count in ledger.counts().items())
    console.say(f"{ledger.kinds[0]} to {ledger.kinds[1]}: tensors {counts}")
    for name, cast in ledger.casts.items():
        console.say(
            f"{name}: {cast.tensors} tensors cast, largest error {cast.max_abs_error:.2g} "
            f"({cast.max_rel_error:.2g} relative), {cast.vanished} values became 0"
        )
    console.say(f"verification: {ledger.verified}")
