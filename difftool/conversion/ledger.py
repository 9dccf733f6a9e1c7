"""The ledger of a conversion: what became of every tensor. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from difftool.version import __version__

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """The ledger's line on one tensor."""

    source: str | None = None
    """Its name in the file that it comes from; None: it is made: an empty marker, or a number of
    the header's."""
    source_file: str | None = None
    target: str | None = None
    target_file: str | None = None
    """None: it was dropped."""
    op: str
    """copy, reshape, split, concat, transpose, cast, merge (of LoRAs), several of these joined by
    "+"; keep (for tools that know it, or for difftool alone), drop:RULE, or synthesise."""
    shape: tuple[int, ...]
    """In difftool's layout, of the part that this line is about, as are the hashes: whatever the
    operation, they are equal unless values were cast."""
    source_shape: tuple[int, ...] | None = None
    """Of the whole tensor in the file that it comes from."""
    target_shape: tuple[int, ...] | None = None
    source_dtype: str | None = None
    target_dtype: str | None = None
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
    """A conversion of a model or a LoRA, tensor by tensor."""

    source: str
    target: str
    kinds: tuple[str, str]
    """Formats, or a LoRA's dialects, of both."""
    evidence: list[dict[str, str]]
    entries: list[LedgerEntry] = field(default_factory=list)
    casts: dict[str, Cast] = field(default_factory=dict)
    """By component."""
    loras: list[str] = field(default_factory=list)
    """Those that were merged, and into what."""
    verified: str = "not asked for"
    warnings: list[str] = field(default_factory=list)
    family: str | None = None
    layers: int | None = None
    """Of a LoRA: how many layers it changes."""

    def counts(self) -> dict[str, int]:
        """How many tensors went which way."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.op.split(":")[0]] = found.get(entry.op.split(":")[0], 0) + 1
        return found

    def report(self) -> dict[str, Any]:
        """The ledger as a JSON object."""
        return {"schema": SCHEMA, "version": __version__, "counts": self.counts()} | asdict(self)


def component(name: str) -> str:
    """unet, vae, text.0, ema.unet, ...: the component that a tensor of that name belongs to."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("text", "ema", "extra") else first
