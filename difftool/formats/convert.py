"""From one model format to another, with a ledger of every tensor. Torch-free unless dtypes change.

Each tensor of the source ends as mapped, kept beside the model for difftool alone, or dropped by a
named rule; anything else stops the conversion. What was written is read back and compared.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool import __version__
from difftool.errors import CheckError, UsageError
from difftool.formats.safetensors import (
    atomic_file,
    make_folder,
    move,
    refuse_existing,
    sync_folder,
    write_pieces,
)
from difftool.formats.source import FORMATS, ModelSource, Plan, open_model
from difftool.formats.tensors import (
    Located,
    Piece,
    digest_of,
    load_located,
    piece_of_file,
    piece_of_tensor,
    torch_dtype,
)

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that a cast applies to; whole numbers and 8-bit floats stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The ledger's line on one tensor."""

    source: str
    """Its name in the file that it comes from."""
    source_file: str
    target: str | None
    target_file: str | None
    """None: it was dropped."""
    op: str
    """copy, cast, keep (beside the model, for difftool alone), or drop:RULE."""
    shape: tuple[int, ...]
    source_dtype: str
    target_dtype: str | None
    source_sha256: str | None = None
    target_sha256: str | None = None


@dataclass
class Cast:
    """What a change of dtype has done to a component."""

    tensors: int = 0
    infinite: int = 0
    """Finite values that became infinite."""
    vanished: int = 0
    """Values that became zero."""
    unsound: int = 0
    """Values that were not finite to begin with."""
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0


@dataclass
class Ledger:
    """A conversion, tensor by tensor."""

    source: str
    target: str
    kinds: tuple[str, str]
    """Formats of both."""
    evidence: list[dict[str, str]]
    entries: list[Entry] = field(default_factory=list)
    casts: dict[str, Cast] = field(default_factory=dict)
    """By component."""
    verified: str = "not asked for"
    warnings: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many tensors went which way."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.op.split(":")[0]] = found.get(entry.op.split(":")[0], 0) + 1
        return found

    def report(self) -> dict[str, Any]:
        """The ledger as a JSON object."""
        return {"schema": SCHEMA, "version": __version__, "counts": self.counts()} | asdict(self)


def convert(
    source: ModelSource,
    target: Path,
    kind: str,
    *,
    dtype: str | None = None,
    keep_metadata: bool = True,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    verify: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda tensors: None,
) -> Ledger:
    """Write a model in another format, whole or not at all.

    dtype: fp32, fp16 or bf16; None keeps each tensor's own. expected: shapes of the tensors that
    the preset's networks have, by name; the source must hold exactly these. CheckError if anything
    would be lost or reads back otherwise; UsageError if the target is there already.
    """
    refuse_existing(target, overwrite)
    _refuse_inside(source, target)
    plan = FORMATS[kind].plan(source, keep_metadata)
    ledger = Ledger(
        source=str(source.path),
        target=str(target),
        kinds=(source.kind, kind),
        evidence=[finding._asdict() for finding in source.findings],
        warnings=[*source.warnings, *plan.warnings],
    )
    _check_complete(source, plan)
    if expected is not None:
        _check_expected(source, expected)
    wanted = None if dtype is None else DTYPES[dtype]
    if dry_run:
        ledger.entries = [*_entries(source, plan, wanted, {}, {}), *_drops(source)]
        return ledger
    with _target(target, "" in plan.files, overwrite) as place:
        hashes = _write(source, plan, place, wanted, ledger, progress)
        ledger.entries = [*_entries(source, plan, wanted, *hashes), *_drops(source)]
        _check_casts(ledger)
        if verify:
            _verify(source, place, kind, wanted, hashes[1])
            ledger.verified = "identical, tensor by tensor, after reading back"
    return ledger


def _refuse_inside(source: ModelSource, target: Path) -> None:
    """UsageError for a target that would replace what is read."""
    here, there = source.path.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(
            f"{target} is, or lies within, what is converted", hint="name another place"
        )


# --- nothing lost, nothing invented ----------------------------------------------------------


def _check_complete(source: ModelSource, plan: Plan) -> None:
    """CheckError unless the plan gives every tensor of the source exactly one place."""
    places: dict[str, int] = {}
    for names in plan.files.values():
        for name in names.values():
            places[name] = places.get(name, 0) + 1
    for name in source.tensors:
        if places.pop(name, 0) != 1:
            why = f"{name} has no place there"
            raise CheckError(f"converting {source.path} would lose a tensor", why)
    assert not places, "a plan names only tensors that there are"


def _check_expected(source: ModelSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckError unless the tensors are those that the configured networks have."""
    what = f"the tensors of {source.path} are not those of its configuration"
    for name, shape in expected.items():
        if name not in source.tensors:
            raise CheckError(what, f"{name} is missing")
        found = source.tensors[name].info.shape
        if found != tuple(shape):
            raise CheckError(what, f"{name} is {list(found)}, not {list(shape)}")
    if extra := [name for name in source.tensors if name not in expected]:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckError(what, f"no network has the tensor {extra[0]}{more}")


def _entries(
    source: ModelSource,
    plan: Plan,
    wanted: str | None,
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> Iterator[Entry]:
    for file, names in plan.files.items():
        for there, name in names.items():
            place = source.tensors[name]
            dtype = _target_dtype(place, wanted)
            op = (
                "keep" if file in plan.sidecars else "copy" if dtype == place.info.dtype else "cast"
            )
            yield Entry(
                source=place.name,
                source_file=_relative(place.file, source.path),
                target=there,
                target_file=file,
                op=op,
                shape=place.info.shape,
                source_dtype=place.info.dtype,
                target_dtype=dtype,
                source_sha256=before.get(name),
                target_sha256=after.get(name),
            )


def _drops(source: ModelSource) -> Iterator[Entry]:
    for place, rule in source.dropped:
        yield Entry(
            source=place.name,
            source_file=_relative(place.file, source.path),
            target=None,
            target_file=None,
            op=f"drop:{rule}",
            shape=place.info.shape,
            source_dtype=place.info.dtype,
            target_dtype=None,
            source_sha256=digest_of(piece_of_file(place.file, place.info)),
        )


def _relative(file: Path, root: Path) -> str:
    return file.name if file == root else str(file.relative_to(root))


# --- writing ---------------------------------------------------------------------------------


@contextmanager
def _target(target: Path, is_file: bool, overwrite: bool) -> Iterator[Path]:
    """A temporary place beside the target, which becomes the target if all goes well."""
    if target.is_dir() and (is_file or not _replaceable(target)):
        why = "a folder is replaced by a folder only, and only if that holds a model or nothing"
        raise UsageError(f"{target} cannot be replaced", why)
    place = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        if not is_file:
            make_folder(place)
        yield place
        if not is_file:
            for folder in {file.parent for file in place.glob("**/*")}:
                sync_folder(folder)
        if is_file:
            move(place, target, overwrite)
        else:
            _move_folder(place, target)
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def _replaceable(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or not any(folder.iterdir())


def _move_folder(place: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if os.path.lexists(target):
        target.rename(old)
    place.rename(target)
    sync_folder(target.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _write(
    source: ModelSource,
    plan: Plan,
    place: Path,
    wanted: str | None,
    ledger: Ledger,
    progress: Callable[[int], None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Write all files of a plan; SHA-256 of every tensor before and after, by difftool's name."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    done = 0

    def counted(piece: Piece) -> Piece:
        def chunks() -> Iterator[Any]:
            nonlocal done
            yield from piece.chunks()
            done += 1
            progress(done)

        return piece._replace(chunks=chunks)

    for name, text in plan.texts.items():
        (place / name).parent.mkdir(exist_ok=True)
        with atomic_file(place / name, overwrite=False) as file:
            file.write(text.encode())
    for name, names in plan.files.items():
        path = place / name
        if name:
            path.parent.mkdir(exist_ok=True)
        pieces: dict[str, Piece] = {}
        for there, ours in names.items():
            tensor = source.tensors[ours]
            piece = piece_of_file(tensor.file, tensor.info)
            if _target_dtype(tensor, wanted) != tensor.info.dtype:
                before[ours] = digest_of(piece)
                piece = _cast(tensor, str(wanted), ledger.casts.setdefault(component(ours), Cast()))
            pieces[there] = counted(piece)
        hashes = write_pieces(path, pieces, plan.metadata)
        after |= {ours: hashes[there] for there, ours in names.items()}
    return after | before, after


def component(name: str) -> str:
    """unet, vae, text.0 ...: the component that a tensor of that name belongs to."""
    first, _, rest = name.partition(".")
    return f"text.{rest.partition('.')[0]}" if first == "text" else first


def _target_dtype(place: Located, wanted: str | None) -> str:
    dtype = place.info.dtype
    return dtype if wanted is None or dtype not in FLOATS else wanted


def _cast(place: Located, wanted: str, cast: Cast) -> Piece:
    """A tensor in another dtype; what that does to its values is added to `cast`."""

    def chunks() -> Iterator[Any]:
        tensor = load_located({place.name: place})[place.name]
        done = tensor.to(torch_dtype(wanted))
        _judge(tensor, done, cast)
        yield from piece_of_tensor(done).chunks()

    return Piece(wanted, place.info.shape, chunks)


def _judge(before: Tensor, after: Tensor, cast: Cast) -> None:
    old, new = before.double(), after.double()
    sound = old.isfinite()
    cast.tensors += 1
    cast.unsound += int((~sound).sum())
    cast.infinite += int((sound & ~new.isfinite()).sum())
    cast.vanished += int(((old != 0) & (new == 0)).sum())
    error = (new - old).abs()[sound & new.isfinite()]
    scale = old.abs()[sound & new.isfinite()]
    if error.numel():
        cast.max_abs_error = max(cast.max_abs_error, float(error.max()))
        relative = (error / scale)[(scale > 0) & (error < scale)]
        cast.max_rel_error = max(
            cast.max_rel_error, float(relative.max()) if len(relative) else 0.0
        )


def _check_casts(ledger: Ledger) -> None:
    """CheckError if a cast has made finite values infinite."""
    for name, cast in ledger.casts.items():
        if cast.unsound:
            ledger.warnings.append(f"{name} holds {cast.unsound} values that are not finite")
        if cast.infinite:
            what = f"{cast.infinite} values of {name} do not fit the dtype and would be infinite"
            raise CheckError(what, hint="use --dtype bf16, or keep the source's dtype")


# --- reading back ----------------------------------------------------------------------------


def _verify(
    source: ModelSource, written: Path, kind: str, wanted: str | None, hashes: Mapping[str, str]
) -> None:
    """CheckError unless what was written opens as the same model, byte for byte.

    hashes: of the bytes meant to be written, by difftool's names.
    """
    from difftool.config import build_preset

    what = "what was written differs from what was read"
    again = open_model(written)
    if again.kind != kind or again.tensors.keys() != source.tensors.keys():
        raise CheckError(what, "it does not hold the same tensors")
    for name, place in again.tensors.items():
        before = source.tensors[name]
        meant = (_target_dtype(before, wanted), before.info.shape)
        if (place.info.dtype, place.info.shape) != meant:
            raise CheckError(what, f"{name} has another dtype or shape")
        if digest_of(piece_of_file(place.file, place.info)) != hashes[name]:
            raise CheckError(what, f"the bytes of {name} are others")
    if build_preset(again.values) != build_preset(source.values):
        raise CheckError(what, "the preset does not come back as it was")
    if again.tokenizer_json != source.tokenizer_json:
        raise CheckError(what, "the vocabulary does not come back as it was")
