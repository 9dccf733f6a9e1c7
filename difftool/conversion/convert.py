"""The whole work of `difftool convert` without its talk: from the options' values to a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from difftool.conversion.ledger import Ledger
from difftool.conversion.lora import convert_lora
from difftool.conversion.model import WriteOptions, convert_model
from difftool.conversion.options import DIALECTS, FORMATS, OF_MODELS
from difftool.errors import CheckError, UsageError
from difftool.formats.model_source import (
    Evidence,
    ModelSource,
    Overrides,
    choose_weights,
    open_model,
)
from difftool.hub.find import find_model
from difftool.progress import Progress, silent
from difftool.storage.commit import refuse_existing
from difftool.storage.places import WEIGHTS, check_ending, check_place

SLOW = 256 << 20
"""Bytes from which on a conversion shows its progress."""


def convert(
    values: Mapping[str, Any],
    progress: Progress = silent,
    opened: Callable[[ModelSource], None] = lambda source: None,
) -> Ledger:
    """Convert a model, or a LoRA, and say what became of every tensor.

    values: every option by name, as `read_options` gives them. opened: called with the source
    before what takes its time. UsageError for what cannot be asked
    for, InputError for a source that is malformed, CheckError if anything would be lost or reads
    back otherwise; then nothing is written.
    """
    kind, target = _kind(values), values["target"]
    if kind is not None:
        _check_name(target, kind)
    refuse_existing(target, bool(values["overwrite"]))
    check_place(target, makes=False)
    options = WriteOptions(
        dtype=values["dtype"],
        keep_metadata=not values["strip_metadata"],
        shard_size=values["max_shard_size"],
        verify=values["verify"] is not False,
        dry_run=bool(values["dry_run"]),
        overwrite=bool(values["overwrite"]),
    )
    if kind in DIALECTS:
        allow_unused = bool(values["allow_unused"])
        return convert_lora(Path(values["source"]), target, kind, options, allow_unused)
    path = find_model(values["source"])
    with _averaged(path, values["ema_length"]) as (read, findings):
        overrides = Overrides(values["prediction"], values["zero_snr"])
        source = choose_weights(open_model(read, overrides), values["weights"])
        source = replace(source, findings=(*findings, *source.findings))
        opened(source)
        ledger = _convert(values, source, kind, options, progress)
    ledger.source = str(path)
    return ledger


def _kind(values: Mapping[str, Any]) -> str | None:
    """The format or dialect that is asked for, None being the source's own; UsageError for options
    that do not go together."""
    kind = values["to"]
    if values["target"] is None:
        raise UsageError("no DST was given", hint="name what to write, or ask for --inspect")
    if kind in DIALECTS and any(values[name] for name in OF_MODELS):
        hint = "leave out what is about models"
        raise UsageError(f"--to {kind} gives a LoRA other names and nothing else", hint=hint)
    if kind is None and values["ema_length"] is not None:
        return "difftool"
    if kind is None and not values["lora"]:
        hint = "add --to " + " or --to ".join(FORMATS)
        raise UsageError("the format to convert to was not given", hint=hint)
    return kind


def _check_name(target: Path, kind: str) -> None:
    """UsageError for a name that promises something else than is written there."""
    if kind == "diffusers":
        check_ending(target, "a folder")
    else:
        check_ending(target, "a safetensors file", WEIGHTS)


def _convert(
    values: Mapping[str, Any],
    source: ModelSource,
    kind: str | None,
    options: WriteOptions,
    progress: Progress,
) -> Ledger:
    from difftool.adapters.lora.algebra import open_loras, sampled_by
    from difftool.pipeline.model import Model

    _check_name(values["target"], kind or source.kind)
    networks = Model(source.preset, source.tokenizer_json)
    shapes = {name: tuple(tensor.shape) for name, tensor in networks.tensors().items()}
    loras = open_loras(
        values["lora"] or (), shapes, networks.preset.unet, str(source.path),
        allow_unused=bool(values["allow_unused"]), error=CheckError,
    )  # fmt: skip
    source = replace(source, preset=sampled_by(source.preset, loras))
    size = sum(place.info.end - place.info.start for place in source.tensors.values())
    slow = size > SLOW and not options.dry_run
    with (progress if slow else silent)("converting", len(source.tensors)) as bar:
        return convert_model(
            source, values["target"], kind or source.kind, options, expected=shapes, loras=loras,
            progress=bar.update,
        )  # fmt: skip


@contextmanager
def _averaged(path: Path, length: float | None) -> Iterator[tuple[Path, list[Evidence]]]:
    """A model, or for the time being one with its run's weights averaged over a share of it; and
    what was found out."""
    if length is None:
        yield path, []
        return
    from difftool.adapters.averages import write_model

    with TemporaryDirectory(prefix="difftool-") as folder:
        averaged = Path(folder) / "model.safetensors"
        misfit, odd = write_model(path, length, averaged)
        says = (f"averaged over {length:g} of the run, to {misfit:.1%}", *odd)
        yield averaged, [Evidence("--ema-length", each) for each in says]
