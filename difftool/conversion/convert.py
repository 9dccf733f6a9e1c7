"""From one model format to another, with a ledger of every tensor. Torch-free unless dtypes change.

Each tensor of the source ends as mapped, kept beside the model for difftool alone, or dropped by a
named rule; anything else stops the conversion. What was written is read back and compared.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool import __version__
from difftool.adapters.lora.file import changed_by
from difftool.errors import CheckError, UsageError
from difftool.formats.model_source import EMA, EXTRA, FORMATS, ModelSource, Plan, open_model
from difftool.formats.rules import Rule
from difftool.storage.commit import atomic_folder, refuse_existing, write_whole
from difftool.storage.shards import MAX_SHARD_SIZE, atomic_set, index_of, parse_size, write_set
from difftool.storage.tensors import (
    BITS,
    FLOATS,
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

    from difftool.adapters.lora.algebra import Applied

SCHEMA = 1
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
SLICE = 1 << 20
"""Numbers of a tensor that are looked at together."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The ledger's line on one tensor."""

    source: str | None
    """Its name in the file that it comes from; None: an empty marker that was added."""
    source_file: str | None
    target: str | None
    target_file: str | None
    """None: it was dropped."""
    op: str
    """copy, reshape, split, concat, transpose, cast, merge (of LoRAs), several of these joined by
    "+"; keep (for tools that know it, or for difftool alone), drop:RULE, or synthesise."""
    shape: tuple[int, ...]
    """In difftool's layout, of the part that this line is about, as are the hashes: whatever the
    operation, they are equal unless values were cast."""
    source_shape: tuple[int, ...] | None
    """Of the whole tensor in the file that it comes from."""
    target_shape: tuple[int, ...] | None
    source_dtype: str | None
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
    loras: list[str] = field(default_factory=list)
    """Those that were merged, and into what."""
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
    shard_size: int | None = None,
    loras: Sequence[Applied] = (),
    progress: Callable[[int], None] = lambda tensors: None,
) -> Ledger:
    """Write a model in another format, whole or not at all; with LoRAs, as they have changed it.

    dtype: fp32, fp16 or bf16; None keeps each tensor's own. expected: shapes of the tensors that
    the preset's networks have, by name; the source must hold exactly these. shard_size: bytes from
    which on a file is split into shards with an index; None: 5 GB, and never one of LDM's, whose
    other readers know no shards. CheckError if anything would be lost or reads back otherwise;
    UsageError if the target is there already.
    """
    refuse_existing(target, overwrite)
    _refuse_inside(source, target)
    plan = FORMATS[kind].plan(source, keep_metadata)
    if "" in plan.files:
        refuse_existing(index_of(target), overwrite)
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
    )
    _check_complete(source, plan)
    if expected is not None:
        _check_expected(source, expected)
    wanted = None if dtype is None else DTYPES[dtype]
    if dry_run:
        ledger.entries = [*_entries(source, plan, wanted, loras, {}, {}), *_drops(source, plan)]
        return ledger
    limit = shard_size
    if limit is None and kind != "ldm":
        limit = parse_size(MAX_SHARD_SIZE)
    new = atomic_set if "" in plan.files else atomic_folder
    with new(target, overwrite) as place:
        hashes = _write(source, plan, place, wanted, ledger, limit, loras, progress)
        if kind == "ldm" and not place.exists():
            ledger.warnings.append("other tools read no shards of a single file")
        ledger.entries = [*_entries(source, plan, wanted, loras, *hashes), *_drops(source, plan)]
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


def _replaceable(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or not any(folder.iterdir())


# --- nothing lost, nothing invented ----------------------------------------------------------


def _check_complete(source: ModelSource, plan: Plan) -> None:
    """CheckError unless the plan gives every tensor of the source exactly one place."""
    places = dict.fromkeys(plan.dropped, 1)
    for rules in plan.files.values():
        for name in (name for rule in rules for name in rule.here):
            places[name] = places.get(name, 0) + 1
    for name in source.tensors:
        if places.pop(name, 0) != 1:
            why = f"{name} has no place there"
            raise CheckError(f"converting {source.path} would lose a tensor", why)
    assert not places, "a plan names only tensors that there are"
    for rules in plan.files.values():
        names = Counter(rule.there for rule in rules)
        if twice := [name for name, count in names.items() if count > 1]:
            why = f"two of its tensors would be called {twice[0]}"
            raise CheckError(f"converting {source.path} would lose a tensor", why)


def _check_expected(source: ModelSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckError unless the tensors are those that the configured networks have."""
    what = f"the tensors of {source.path} are not those of its configuration"
    for name, shape in expected.items():
        if name not in source.tensors:
            raise CheckError(what, f"{name} is missing")
        found = source.tensors[name].info.shape
        if found != tuple(shape):
            raise CheckError(what, f"{name} is {list(found)}, not {list(shape)}")
    beside = {name for name in source.tensors if name.startswith(EXTRA)}
    for name in (name for name in source.tensors if name.startswith(EMA)):
        if source.tensors[name].info.shape == expected.get(name.removeprefix(EMA)):
            beside.add(name)
    if extra := [n for n in source.tensors if n not in expected and n not in beside]:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        name = source.tensors[extra[0]].name
        raise CheckError(what, f"no network has the tensor {name}{more}")


def _entries(
    source: ModelSource,
    plan: Plan,
    wanted: str | None,
    loras: Sequence[Applied],
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> Iterator[Entry]:
    changed = changed_by(applied.lora for applied in loras)
    for file, rules in plan.files.items():
        for rule in rules:
            if not rule.here:
                yield Entry(
                    source=None,
                    source_file=None,
                    target=rule.there,
                    target_file=file,
                    op="synthesise",
                    shape=rule.shape,
                    source_shape=None,
                    target_shape=rule.shape,
                    source_dtype=None,
                    target_dtype="F32",
                )
            for name in rule.here:
                place = source.tensors[name]
                dtype = _target_dtype(name, place, wanted)
                kept = file in plan.sidecars or rule.there.startswith((EXTRA, f"difftool.{EXTRA}"))
                yield Entry(
                    source=place.name,
                    source_file=_relative(place.file, source.path),
                    target=rule.there,
                    target_file=file,
                    op="keep"
                    if kept
                    else _op(place, rule, dtype, name.removeprefix(EMA) in changed),
                    shape=place.info.shape,
                    source_shape=_whole(place),
                    target_shape=rule.shape_there,
                    source_dtype=place.info.dtype,
                    target_dtype=dtype,
                    source_sha256=before.get(name),
                    target_sha256=after.get(name),
                )


def _whole(place: Located) -> tuple[int, ...]:
    """The shape of the tensor in the file that a part is of; stacks are of three."""
    return Rule("", ("",) * 3, place.info.shape, place.op).shape_there


def _op(place: Located, rule: Rule, dtype: str, changed: bool) -> str:
    """What is done to a tensor between two files; what one undoes of the other is nothing."""
    steps = ["merge"] * changed
    if place.op != rule.op:
        steps += {"copy": [], "stack": ["split"]}.get(place.op, [place.op])
        steps += {"copy": [], "stack": ["concat"]}.get(rule.op, [rule.op])
    if dtype != place.info.dtype:
        steps.append("cast")
    return "+".join(steps) or "copy"


def _drops(source: ModelSource, plan: Plan) -> Iterator[Entry]:
    planned = [(source.tensors[name], rule) for name, rule in plan.dropped.items()]
    for place, rule in (*source.dropped, *planned):
        yield Entry(
            source=place.name,
            source_file=_relative(place.file, source.path),
            target=None,
            target_file=None,
            op=f"drop:{rule}",
            shape=place.info.shape,
            source_shape=_whole(place),
            target_shape=None,
            source_dtype=place.info.dtype,
            target_dtype=None,
            source_sha256=digest_of(_bytes(place)),
        )


def _relative(file: Path, root: Path) -> str:
    return str(file.relative_to(root if root.is_dir() else root.parent))


# --- writing ---------------------------------------------------------------------------------


def _write(
    source: ModelSource,
    plan: Plan,
    place: Path,
    wanted: str | None,
    ledger: Ledger,
    limit: int | None,
    loras: Sequence[Applied],
    progress: Callable[[int], None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Write all files of a plan; SHA-256 of every tensor before and after, by difftool's name."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    changed = changed_by(applied.lora for applied in loras)
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
        write_whole(place / name, text.encode())

    def part(name: str) -> Piece:
        """One of difftool's tensors as it will be, hashed where it lies otherwise there."""
        tensor = source.tensors[name]
        if name.removeprefix(EMA) in changed:
            before[name] = digest_of(_bytes(tensor))
            return counted(_merged(source, name, _target_dtype(name, tensor, wanted), loras))
        if _target_dtype(name, tensor, wanted) == tensor.info.dtype:
            return counted(_bytes(tensor))
        before[name] = digest_of(_bytes(tensor))
        return counted(_cast(tensor, str(wanted), ledger.casts.setdefault(component(name), Cast())))

    def hashed(name: str, piece: Piece) -> Piece:
        def chunks() -> Iterator[Any]:
            digest = hashlib.sha256()
            for chunk in piece.chunks():
                digest.update(chunk)
                yield chunk
            after[name] = digest.hexdigest()

        return piece._replace(chunks=chunks)

    for name, rules in plan.files.items():
        path = place / name
        if name:
            path.parent.mkdir(exist_ok=True)
        pieces: dict[str, Piece] = {}
        for rule in rules:
            parts = [part(ours) for ours in rule.here]
            if rule.op in ("stack", "transpose"):
                parts = [hashed(*pair) for pair in zip(rule.here, parts, strict=True)]
            pieces[rule.there] = assembled(rule, parts)
        hashes = write_set(path, pieces, plan.metadata, None if name in plan.sidecars else limit)
        after |= {
            rule.here[0]: hashes[rule.there] for rule in rules if rule.op in ("copy", "reshape")
            and rule.here
        }  # fmt: skip
    return after | before, after


def _bytes(place: Located) -> Piece:
    return piece_of_file(place.file, place.info)


def _merged(source: ModelSource, name: str, dtype: str, loras: Sequence[Applied]) -> Piece:
    """A tensor as LoRAs have changed it, averaged weights like live ones."""
    from difftool.adapters.lora.algebra import apply

    average = EMA if name.startswith(EMA) else ""
    layer, _, last = name.removeprefix(EMA).rpartition(".")

    def chunks() -> Iterator[Any]:
        ends = [end for end in ("weight", "bias") if f"{average}{layer}.{end}" in source.tensors]
        places = {f"{layer}.{end}": source.tensors[f"{average}{layer}.{end}"] for end in ends}
        tensors = load_located(places)
        apply(tensors, "", loras)
        made = tensors[f"{layer}.{last}"]
        cast = made.to(torch_dtype(dtype))
        if made.isfinite().all() and not cast.isfinite().all():
            raise CheckError(
                f"{name} with what is merged does not fit {dtype}", hint="--dtype fp32"
            )
        yield from piece_of_tensor(cast).chunks()

    return Piece(dtype, source.tensors[name].info.shape, chunks)


def transposed(piece: Piece) -> Piece:
    """The transpose of a matrix, in whose bytes rows and columns change places."""
    rows, columns = piece.shape
    code: Any = {8: "B", 16: "H", 32: "I", 64: "Q"}[BITS[piece.dtype]]

    def chunks() -> Iterator[bytes]:
        data: Any = memoryview(b"".join(piece.chunks())).cast("B").cast(code)
        return (bytes(data[i::columns]) for i in range(columns))

    return Piece(piece.dtype, (columns, rows), chunks)


def assembled(rule: Rule, parts: Sequence[Piece]) -> Piece:
    """The tensor of a file that difftool's tensors make by a rule."""
    if not parts:
        return Piece("F32", rule.shape, lambda: ())
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or any(part.shape != rule.shape for part in parts):
        why = f"its parts are of {', '.join(sorted(dtypes))}, or of several shapes"
        raise CheckError(f"{rule.there} cannot be made as it should be", why)
    if rule.op == "transpose":
        return transposed(parts[0])

    def chunks() -> Iterator[Any]:
        for part in parts:
            yield from part.chunks()

    return Piece(parts[0].dtype, rule.shape_there, chunks)


def component(name: str) -> str:
    """unet, vae, text.0, ema.unet, ...: the component that a tensor of that name belongs to."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("text", "ema", "extra") else first


NEVER_CAST = re.compile(r"extra\.ldm\.([^.]+|.*logit_scale|(model_ema|denoiser|edm_\w+)\..*)")
"""Tables, counters and markers: what they say would be spoilt."""


def _target_dtype(name: str, place: Located, wanted: str | None) -> str:
    dtype = place.info.dtype
    same = wanted is None or dtype not in FLOATS or NEVER_CAST.fullmatch(name)
    return dtype if same else str(wanted)


def _cast(place: Located, wanted: str, cast: Cast) -> Piece:
    """A tensor in another dtype; what that does to its values is added to `cast`."""

    def chunks() -> Iterator[Any]:
        tensor = load_located({place.name: place})[place.name]
        done = tensor.to(torch_dtype(wanted))
        _judge(tensor, done, cast)
        yield from piece_of_tensor(done).chunks()

    return Piece(wanted, place.info.shape, chunks)


def _judge(before: Tensor, after: Tensor, cast: Cast) -> None:
    """Count what a cast has done, a slice at a time: whole tensors would not fit the caches."""
    import torch

    # The difference of neighbours in a narrower dtype is exact in fp32 (Sterbenz).
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    cast.tensors += 1
    slices = zip(before.flatten().split(SLICE), after.flatten().split(SLICE), strict=True)
    for old, new in ((old.to(wide), new.to(wide)) for old, new in slices):
        sound, kept = old.isfinite(), new.isfinite()
        cast.unsound += int((~sound).sum())
        cast.infinite += int((sound & ~kept).sum())
        cast.vanished += int(((old != 0) & (new == 0)).sum())
        error = (new - old).abs().where(sound & kept, 0.0)
        if error.numel():
            relative = error / old.abs()  # 0 / 0 and what vanished are passed over
            cast.max_abs_error = max(cast.max_abs_error, float(error.max()))
            largest = float(relative.where(relative < 1, 0.0).max())
            cast.max_rel_error = max(cast.max_rel_error, largest)


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
    from difftool.config.validate import build_preset

    what = "what was written differs from what was read"
    again = open_model(written)
    if again.kind != kind or again.tensors.keys() != source.tensors.keys():
        raise CheckError(what, "it does not hold the same tensors")
    for name, place in again.tensors.items():
        before = source.tensors[name]
        meant = (_target_dtype(name, before, wanted), before.info.shape)
        if (place.info.dtype, place.info.shape) != meant:
            raise CheckError(what, f"{name} has another dtype or shape")
        if digest_of(_bytes(place)) != hashes[name]:
            raise CheckError(what, f"the bytes of {name} are others")
    # a single file's model is called as the file is, where nothing names it
    values = again.values | ({"name": source.values["name"]} if kind == "ldm" else {})
    if build_preset(values) != build_preset(source.values):
        raise CheckError(what, "the preset does not come back as it was")
    if again.tokenizer_json != source.tokenizer_json:
        raise CheckError(what, "the vocabulary does not come back as it was")
