"""`difftool convert`: from one model format to another, and what is in a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.cli import console
from difftool.cli.options import TALK
from difftool.config.options import Option
from difftool.conversion.options import OPTIONS, OUTPUT
from difftool.images.formats import is_picture

if TYPE_CHECKING:
    from difftool.conversion.ledger import Ledger
    from difftool.formats import ModelSource

ABOUT = """
Convert a model to another format without losing anything, or say what is in it.

Examples
  difftool convert model.safetensors model/ --to diffusers
  difftool convert sd15.safetensors sd15/ --to diffusers --weights ema --report ledger.json
  difftool convert sd15/ sd15.safetensors --to ldm --dtype fp16
  difftool convert sd15.safetensors fox.safetensors --lora fox-lora.safetensors:0.8
  difftool convert kohya-lora.safetensors lora.safetensors --to peft
  difftool convert model.safetensors --inspect --json
  difftool convert picture.png --inspect
"""
REPORT = Option(
    name="report", type=Path, panel=OUTPUT, help="Write the ledger of tensors here, as JSON",
)  # fmt: skip
INSPECT = Option(
    name="inspect", type=bool, panel=OUTPUT, help="Say what is in SRC, a model or a picture",
    excludes=("target", "to", "dtype", "weights", "ema_length", "report", "dry_run"),
)  # fmt: skip
MOST = 40
"""Entries of metadata that are shown."""
ROWS = (*OPTIONS[:-2], INSPECT, REPORT, *OPTIONS[-2:], *TALK)


def run(values: dict[str, Any]) -> None:
    """Convert, or say what is there."""
    if values["inspect"]:
        _inspect(values)
        return
    from difftool.conversion.convert import convert
    from difftool.storage.commit import refuse_existing, write_whole
    from difftool.storage.places import check_ending, check_place
    from difftool.storage.shards import written_at
    from difftool.storage.strict_json import to_json

    report, overwrite = values["report"], bool(values["overwrite"])
    if report is not None:
        check_ending(report, "a report", (".json",))
        refuse_existing(report, overwrite)
        check_place(report, makes=False)
    ledger = convert(values, console.progress, partial(_opened, values["source"]))
    _say(ledger)
    if report is not None:
        write_whole(report, to_json(ledger.report(), indent=1), overwrite)
    path = None if values["dry_run"] else str(written_at(values["target"]))
    if values["json"]:
        shown = {key: value for key, value in ledger.report().items() if key != "entries"}
        console.emit(shown | {"path": path})
    elif path is not None:
        console.emit(console.plain(path))


def _opened(name: str, source: ModelSource) -> None:
    console.say(f"converting {name} ...")
    for finding, line in zip(source.findings, source.evidence, strict=True):
        asked = finding.source.startswith("--")
        (console.say if asked else console.detail)(line)


def _say(ledger: Ledger) -> None:
    for line in ledger.loras:
        console.detail(line)
    for warning in ledger.warnings:
        console.warn(warning)
    counts = ", ".join(f"{count} {op}" for op, count in ledger.counts().items())
    console.say(f"{ledger.kinds[0]} to {ledger.kinds[1]}: tensors {counts}")
    for name, cast in ledger.casts.items():
        console.detail(
            f"{name}: {cast.tensors} tensors cast, largest error {cast.max_abs_error:.2g} "
            f"({cast.max_rel_error:.2g} relative), {cast.vanished} values became 0"
        )
    console.say(f"verification: {ledger.verified}")


def _inspect(values: dict[str, Any]) -> None:
    if is_picture(values["source"]):
        _show(Path(values["source"]), bool(values["json"]))
        return
    from difftool.conversion.inspect import inspect

    found = inspect(values["source"], values["prediction"], values["zero_snr"])
    for warning in found["warnings"]:
        console.warn(warning)
    if values["json"]:
        console.emit(found)
        return
    for line in _lines(found):
        console.emit(console.plain(line))


def _show(picture: Path, as_json: bool) -> None:
    """What a picture says of how it was made."""
    from difftool.sampling.metadata.shown import lines, shown

    told = shown(picture)
    if as_json:
        console.emit(told)
        return
    for word, text in lines(told):
        first, *more = text.split("\n")
        for head, line in ((word, first), *(("", each) for each in more)):
            console.emit(console.plain(f"{head:<18}{line}"))


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
    said = [row("metadata", f"{k[:80]}: {v[:200]}") for k, v in found["metadata"].items()]
    more = len(said) - MOST
    return lines + said[:MOST] + [row("", f"and {more} more: --json shows all")] * (more > 0)
