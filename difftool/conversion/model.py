"""A model in another format, whole or not at all. Torch-free unless dtypes or weights change.

Each tensor of the source ends as mapped, kept beside the model for difftool alone, or dropped by a
named rule; anything else stops the conversion. What was written is read back and compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from difftool.conversion.ledger import Ledger
from difftool.conversion.write import Conversion, bytes_of
from difftool.errors import CheckError, UsageError
from difftool.formats.model_source import EMA, EXTRA, FORMATS, ModelSource, Plan, open_model
from difftool.storage.commit import atomic_folder, refuse_existing
from difftool.storage.places import check_place
from difftool.storage.shards import MAX_SHARD_SIZE, atomic_set, index_of, parse_size
from difftool.storage.tensors import byte_size, digest_of

if TYPE_CHECKING:
    from difftool.adapters.lora.algebra import Applied

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a model is to be written."""

    dtype: str | None = None
    """fp32, fp16 or bf16; None keeps each tensor's own."""
    keep_metadata: bool = True
    shard_size: int | None = None
    """Bytes from which on a file is split into shards with an index; None: 5 GB, and never one of
    LDM's, whose other readers know no shards."""
    verify: bool = True
    """Read back and compare."""
    dry_run: bool = False
    """Check everything, and write nothing."""
    overwrite: bool = False


AS_IT_IS = WriteOptions()


def convert_model(
    source: ModelSource,
    target: Path,
    kind: str,
    options: WriteOptions = AS_IT_IS,
    *,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    loras: Sequence[Applied] = (),
    progress: Callable[[int], None] = lambda tensors: None,
) -> Ledger:
    """Write a model in another format, whole or not at all; with LoRAs, as they have changed it.

    expected: shapes of the tensors that the preset's networks have, by name; the source must hold
    exactly these. CheckError if anything would be lost or reads back otherwise; UsageError if the
    target is there already.
    """
    refuse_existing(target, options.overwrite)
    _refuse_inside(source, target)
    if expected is not None:
        _check_expected(source, expected)
    plan = FORMATS[kind].plan(source, options.keep_metadata)
    is_file = "" in plan.files
    if is_file:
        refuse_existing(index_of(target), options.overwrite)
    elif target.is_dir() and not _replaceable(target):
        why = "a folder is replaced only if it holds a model or nothing"
        raise UsageError(f"{target} cannot be replaced", why)
    ledger = Ledger(
        source=str(source.path),
        target=str(target),
        kinds=(source.kind, kind),
        evidence=[finding._asdict() for finding in source.findings],
        loras=[str(applied) for applied in loras],
        warnings=[*source.warnings, *plan.warnings],
        family=source.preset.family,
    )
    _check_complete(source, plan)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    work = Conversion(source, plan, dtype, loras, ledger.casts)
    sizes = (
        byte_size(work.target_dtype(n), place.info.shape) for n, place in source.tensors.items()
    )
    check_place(target, sum(sizes), makes=False)
    if not options.dry_run:
        limit = options.shard_size
        if limit is None and kind != "ldm":
            limit = parse_size(MAX_SHARD_SIZE)
        with (atomic_set if is_file else atomic_folder)(target, options.overwrite) as place:
            work.write(place, limit, progress)
            if kind == "ldm" and not place.exists():
                ledger.warnings.append("other tools read no shards of a single file")
            _check_casts(ledger)
            if options.verify:
                _verify(work, place, kind)
                ledger.verified = "identical, tensor by tensor, after reading back"
    ledger.entries = [*work.entries()]
    return ledger


def _refuse_inside(source: ModelSource, target: Path) -> None:
    """UsageError for a target that would replace what is read."""
    one, other = source.path.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UsageError(
            f"{target} is, or lies within, what is converted", hint="name another place"
        )


def _replaceable(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or not any(folder.iterdir())


# --- nothing lost, nothing invented ----------------------------------------------------------


def _check_complete(source: ModelSource, plan: Plan) -> None:
    """CheckError unless the plan gives every tensor of the source exactly one place."""
    places = dict.fromkeys(plan.dropped, 1)
    for rules in plan.files.values():
        for name in (name for rule in rules for name in rule.ours):
            places[name] = places.get(name, 0) + 1
    for name in source.tensors:
        if places.pop(name, 0) != 1:
            why = f"{name} has no place there"
            raise CheckError(f"converting {source.path} would lose a tensor", why)
    assert not places, "a plan names only tensors that there are"
    for rules in plan.files.values():
        names = Counter(rule.theirs for rule in rules)
        if twice := [name for name, count in names.items() if count > 1]:
            why = f"two of its tensors would be called {twice[0]}"
            raise CheckError(f"converting {source.path} would lose a tensor", why)


def _check_expected(source: ModelSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckError unless the tensors are those that the configured networks have."""
    what = f"the tensors of {source.path} are not those of its configuration"
    wanted = dict(expected)
    if any(name.startswith(EMA) for name in source.tensors):  # averages are of a whole U-Net
        unet = (item for item in expected.items() if item[0].startswith("unet."))
        wanted |= {f"{EMA}{name}": shape for name, shape in unet}
    for name, shape in wanted.items():
        if name not in source.tensors:
            raise CheckError(what, f"{name} is missing")
        found = source.tensors[name].info.shape
        if found != tuple(shape):
            raise CheckError(what, f"{name} is {list(found)}, not {list(shape)}")
    if extra := [n for n in source.tensors if n not in wanted and not n.startswith(EXTRA)]:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        name = source.tensors[extra[0]].name
        raise CheckError(what, f"no network has the tensor {name}{more}")


def _check_casts(ledger: Ledger) -> None:
    """CheckError if a cast has made finite values infinite."""
    for name, cast in ledger.casts.items():
        if cast.unsound:
            ledger.warnings.append(f"{name} holds {cast.unsound} values that are not finite")
        if cast.infinite:
            what = f"{cast.infinite} values of {name} do not fit the dtype and would be infinite"
            raise CheckError(what, hint="use --dtype bf16, or keep the source's dtype")


def _verify(work: Conversion, written: Path, kind: str) -> None:
    """CheckError unless what was written opens as the same model, byte for byte."""
    what = "what was written differs from what was read"
    source, again = work.source, open_model(written)
    if again.kind != kind or again.tensors.keys() != source.tensors.keys():
        raise CheckError(what, "it does not hold the same tensors")
    for name, place in again.tensors.items():
        meant = (work.target_dtype(name), source.tensors[name].info.shape)
        if (place.info.dtype, place.info.shape) != meant:
            raise CheckError(what, f"{name} has another dtype or shape")
        if digest_of(bytes_of(place)) != work.after[name]:
            raise CheckError(what, f"the bytes of {name} are others")
    for file in sorted({place.file for place in again.tensors.values()}):
        _check_opens_elsewhere(file)
    # a single file's model is called as the file is, where nothing names it
    name = source.preset.name if kind == "ldm" else again.preset.name
    if replace(again.preset, name=name) != source.preset:
        raise CheckError(what, "the preset does not come back as it was")
    if again.tokenizer_json != source.tokenizer_json:
        raise CheckError(what, "the vocabulary does not come back as it was")


def _check_opens_elsewhere(file: Path) -> None:
    """CheckError unless the format's own package, which other tools read by, opens the file."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except Exception as error:  # whatever it finds wrong
        raise CheckError(f"the safetensors package cannot open {file.name}", str(error)) from None
