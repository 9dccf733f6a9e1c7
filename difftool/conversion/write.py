"""The tensors of a model as another format has them, and what becomes of each.

Torch-free unless dtypes or weights change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.adapters.lora.file import changed_by
from difftool.conversion.ledger import Cast, LedgerEntry, component
from difftool.errors import CheckError
from difftool.formats.model_source import EMA, EXTRA, ModelSource, Plan
from difftool.formats.rules import Rule
from difftool.storage.commit import write_whole
from difftool.storage.shards import write_set
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

SLICE = 1 << 20
"""Numbers of a tensor that are looked at together."""
NEVER_CAST = re.compile(r"extra\.ldm\.([^.]+|.*logit_scale|(model_ema|denoiser|edm_\w+)\..*)")
"""Tables, counters and markers: what they say would be spoilt."""


@dataclass
class Conversion:
    """A model on its way to another format."""

    source: ModelSource
    plan: Plan
    dtype: str | None
    """Of the weights, by safetensors' name; None: each keeps its own."""
    loras: Sequence[Applied]
    casts: dict[str, Cast] = field(default_factory=dict)
    """By component."""
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every tensor as it was and as it is written, by difftool's name."""

    def __post_init__(self) -> None:
        self._changed = changed_by(applied.lora for applied in self.loras)

    def merges(self, name: str) -> bool:
        """Whether LoRAs change that tensor, averaged weights like live ones."""
        return name.removeprefix(EMA) in self._changed

    def target_dtype(self, name: str) -> str:
        """What a tensor is written as; whole numbers and 8-bit floats stay as they are."""
        dtype = self.source.tensors[name].info.dtype
        same = self.dtype is None or dtype not in FLOATS or NEVER_CAST.fullmatch(name)
        return dtype if same else str(self.dtype)

    # --- what becomes of tensors -------------------------------------------------------------

    def entries(self) -> Iterator[LedgerEntry]:
        """A line on every tensor; hashes of those that were written."""
        for file, rules in self.plan.files.items():
            for rule in rules:
                if not rule.ours:
                    yield LedgerEntry(
                        target=rule.theirs, target_file=file, op="synthesise", shape=rule.shape,
                        target_shape=rule.shape, target_dtype="F32",
                    )  # fmt: skip
                for name in rule.ours:
                    yield self._entry(file, rule, name)
        planned = [(self.source.tensors[name], why) for name, why in self.plan.dropped.items()]
        for place, why in (*self.source.dropped, *planned):
            digest = digest_of(bytes_of(place))
            yield LedgerEntry(**self._origin(place), op=f"drop:{why}", source_sha256=digest)

    def _entry(self, file: str, rule: Rule, name: str) -> LedgerEntry:
        place, dtype = self.source.tensors[name], self.target_dtype(name)
        kept = file in self.plan.sidecars or rule.theirs.startswith((EXTRA, f"difftool.{EXTRA}"))
        return LedgerEntry(
            **self._origin(place),
            target=rule.theirs,
            target_file=file,
            op="keep" if kept else _op(place, rule, dtype, self.merges(name)),
            target_shape=rule.their_shape,
            target_dtype=dtype,
            source_sha256=self.before.get(name),
            target_sha256=self.after.get(name),
        )

    def _origin(self, place: Located) -> dict[str, Any]:
        root = self.source.path if self.source.path.is_dir() else self.source.path.parent
        whole = Rule("", ("",) * 3, place.info.shape, place.op)  # a part of a stack is of three
        return {
            "source": place.name,
            "source_file": str(place.file.relative_to(root)),
            "shape": place.info.shape,
            "source_shape": whole.their_shape,
            "source_dtype": place.info.dtype,
        }

    # --- writing -----------------------------------------------------------------------------

    def write(self, place: Path, limit: int | None, progress: Callable[[int], None]) -> None:
        """Write all files of the plan at a place, split where they are larger than a limit in
        bytes."""
        done = 0

        def counted(piece: Piece) -> Piece:
            def chunks() -> Iterator[Any]:
                nonlocal done
                yield from piece.chunks()
                done += 1
                progress(done)

            return piece._replace(chunks=chunks)

        for name, text in self.plan.texts.items():
            (place / name).parent.mkdir(exist_ok=True)
            write_whole(place / name, text)
        for name, rules in self.plan.files.items():
            path = place / name
            if name:
                path.parent.mkdir(exist_ok=True)
            pieces: dict[str, Piece] = {}
            for rule in rules:
                parts = [counted(self._piece(ours)) for ours in rule.ours]
                if rule.op in ("stack", "transpose"):
                    parts = [self._hashed(*pair) for pair in zip(rule.ours, parts, strict=True)]
                pieces[rule.theirs] = assembled(rule, parts)
            largest = None if name in self.plan.sidecars else limit
            hashes = write_set(path, pieces, self.plan.metadata, largest)
            for rule in rules:
                if rule.ours and rule.op in ("copy", "reshape"):
                    self.after[rule.ours[0]] = hashes[rule.theirs]
        self.before = self.after | self.before

    def _piece(self, name: str) -> Piece:
        """One of difftool's tensors as it will be; where its bytes change, those before hashed."""
        place, dtype = self.source.tensors[name], self.target_dtype(name)
        if not self.merges(name) and dtype == place.info.dtype:
            return bytes_of(place)
        self.before[name] = digest_of(bytes_of(place))
        if self.merges(name):
            return self._merged(name, dtype)
        return _cast(place, dtype, self.casts.setdefault(component(name), Cast()))

    def _hashed(self, name: str, piece: Piece) -> Piece:
        def chunks() -> Iterator[Any]:
            digest = hashlib.sha256()
            for chunk in piece.chunks():
                digest.update(chunk)
                yield chunk
            self.after[name] = digest.hexdigest()

        return piece._replace(chunks=chunks)

    def _merged(self, name: str, dtype: str) -> Piece:
        """A tensor as LoRAs have changed it."""
        from difftool.adapters.lora.algebra import apply

        tensors = self.source.tensors
        average = EMA if name.startswith(EMA) else ""
        layer, _, last = name.removeprefix(EMA).rpartition(".")

        def chunks() -> Iterator[Any]:
            names = [f"{layer}.{end}" for end in ("weight", "bias")]
            loaded = load_located(
                {n: tensors[average + n] for n in names if average + n in tensors}
            )
            apply(loaded, "", self.loras)
            made = loaded[f"{layer}.{last}"]
            cast = made.to(torch_dtype(dtype))
            if made.isfinite().all() and not cast.isfinite().all():
                what = f"{name} with what is merged does not fit {dtype}"
                raise CheckError(what, hint="--dtype fp32")
            yield from piece_of_tensor(cast).chunks()

        return Piece(dtype, tensors[name].info.shape, chunks)


def _op(place: Located, rule: Rule, dtype: str, merged: bool) -> str:
    """What is done to a tensor between two files; what one undoes of the other is nothing."""
    steps = ["merge"] * merged
    if place.op != rule.op:
        steps += {"copy": [], "stack": ["split"]}.get(place.op, [place.op])
        steps += {"copy": [], "stack": ["concat"]}.get(rule.op, [rule.op])
    if dtype != place.info.dtype:
        steps.append("cast")
    return "+".join(steps) or "copy"


def bytes_of(place: Located) -> Piece:
    """A tensor as it lies in its file."""
    return piece_of_file(place.file, place.info)


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
        raise CheckError(f"{rule.theirs} cannot be made as it should be", why)
    if rule.op == "transpose":
        return transposed(parts[0])

    def chunks() -> Iterator[Any]:
        for part in parts:
            yield from part.chunks()

    return Piece(parts[0].dtype, rule.their_shape, chunks)


# --- casts -----------------------------------------------------------------------------------


def _cast(place: Located, dtype: str, cast: Cast) -> Piece:
    """A tensor in another dtype; what that does to its values is added to `cast`."""

    def chunks() -> Iterator[Any]:
        tensor = load_located({place.name: place})[place.name]
        done = tensor.to(torch_dtype(dtype))
        _judge(tensor, done, cast)
        yield from piece_of_tensor(done).chunks()

    return Piece(dtype, place.info.shape, chunks)


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
