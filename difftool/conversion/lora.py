"""LoRAs from kohya's names to PEFT's and back, nothing lost, without a model at hand.

What one dialect does not say (unusual names, which alphas were there and of what dtype) goes into
the header under NOTES, and comes back from there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from difftool.adapters.lora.dialects import ENDS, kohya_names, peft_name
from difftool.adapters.lora.file import (
    ADAPTER,
    NUMBERS,
    Change,
    Lora,
    fits,
    read_lora,
    scale_of,
)
from difftool.config.families import PUBLISHED, Family
from difftool.config.kinds import NetworkConfig
from difftool.config.layers import load_preset
from difftool.conversion.ledger import Ledger, LedgerEntry
from difftool.conversion.model import AS_IT_IS, WriteOptions
from difftool.errors import CheckError, InputError
from difftool.formats.layouts import encoder_rules, network_rules
from difftool.formats.rules import Shape
from difftool.storage.safetensors import DATA_HASH, digests, write_pieces
from difftool.storage.shards import atomic_set
from difftool.storage.strict_json import parse_json
from difftool.storage.tensors import (
    Located,
    Piece,
    load_located,
    piece_of_file,
    piece_of_tensor,
    torch_dtype,
)

NOTES = "difftool.lora"


class Known(NamedTuple):
    """A LoRA, understood by the names of a family's layers."""

    lora: Lora
    family: Family
    unet: NetworkConfig
    fits: bool
    """Whether its layers are as wide as the family's too; else it is for a model like these."""


def open_lora(path: Path) -> Known:
    """A LoRA of one of the published families; UsageError if there is no such file, InputError if
    it is none, or malformed."""
    found: list[tuple[int, int, Known]] = []
    for family in PUBLISHED.values():
        layers, unet = _layers(family.id)
        lora = read_lora(path, dict.fromkeys(layers), unet)
        strange = sum(not fits(change, layers[n]) for n, change in lora.changes.items())
        found.append((len(lora.changes), -strange, Known(lora, family, unet, not strange)))
        if not lora.unused and not strange:
            break
    best = max(found, key=lambda entry: entry[:2])[2]
    if not best.fits:  # by its widths it is for no family: its header may name one
        whole = (known for *_, known in found if not known.lora.unused)
        return next((k for k in whole if _is_named(k.family, k.lora.metadata)), best)
    return best


def _is_named(family: Family, metadata: Mapping[str, str]) -> bool:
    """Whether a header says that a LoRA is of a family."""
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    base = metadata.get("ss_base_model_version", "")
    named = architecture and architecture in (family.modelspec, family.modelspec_v)
    return bool(named or (family.base_version and base.startswith(family.base_version)))


@cache
def _layers(family: str) -> tuple[dict[str, Shape], NetworkConfig]:
    """The shapes of all layers' weights of a family's networks, and its denoising network."""
    preset = load_preset(PUBLISHED[family].preset)
    tables = {"unet": network_rules(preset.unet)}
    tables |= {f"text.{i}": encoder_rules(config) for i, config in enumerate(preset.text)}
    return {
        f"{part}.{name.removesuffix('.weight')}": rule.shape
        for part, rules in tables.items()
        for rule in rules
        for name in rule.ours
        if name.endswith(".weight")
    }, preset.unet


# --- conversion ------------------------------------------------------------------------------


def convert_lora(
    path: Path,
    target: Path,
    kind: str,
    options: WriteOptions = AS_IT_IS,
    allow_unused: bool = False,
) -> Ledger:
    """Write a LoRA in kohya's or PEFT's names, whole or not at all.

    InputError if it is malformed; CheckError if the other dialect cannot hold it, or something in
    it is not understood (unless that may be left out); UsageError if the target is there already.
    """
    known = open_lora(path)
    lora = known.lora
    if not lora.changes:
        raise InputError(f"{path} is a LoRA for no family that this version knows")
    if lora.unused and not allow_unused:
        name, why = next(iter(lora.unused.items()))
        hint = "--allow-unused leaves it out"
        raise CheckError(f"converting {path} would lose {name}", why, hint)
    pieces, origins, metadata = WRITERS[kind](known, _kept(lora))
    ledger = Ledger(
        source=str(path),
        target=str(target),
        kinds=(lora.dialect, kind),
        evidence=[{"source": "layers", "says": f"{len(lora.changes)} {_whose(known)}"}],
        warnings=[f"left out {name}: {why}" for name, why in lora.unused.items()],
        family=known.family.id if known.fits else None,
        layers=len(lora.changes),
    )
    hashes: dict[str, str] = {}
    if not options.dry_run:
        with atomic_set(target, options.overwrite) as place:
            hashes = write_pieces(place, pieces, metadata)
            if options.verify:
                if digests(place) != hashes:
                    raise CheckError(f"{target} does not read back as it was written")
                ledger.verified = "identical, tensor by tensor, after reading back"
    ledger.entries = [*_entries(lora, pieces, origins, hashes)]
    return ledger


def _whose(known: Known) -> str:
    """Of which family the layers are; where their widths are no family's, which has such names."""
    return (
        f"of {known.family.id}" if known.fits else f"named as {known.family.id}'s, of other widths"
    )


def _entries(
    lora: Lora, pieces: Mapping[str, Piece], origins: Mapping[str, Located], hashes: dict[str, str]
) -> Iterator[LedgerEntry]:
    """A line on every tensor; those that are the header's in one dialect are made, or dropped."""
    for name, piece in pieces.items():
        place = origins.get(name)
        if place is None:
            op = "synthesise"
        else:
            op = "copy" if place.info.shape == piece.shape else "reshape"
        yield LedgerEntry(
            **({} if place is None else _origin(place)),
            target=name,
            target_file="",
            op=op,
            shape=piece.shape,
            target_shape=piece.shape,
            target_dtype=piece.dtype,
            source_sha256=None if place is None else hashes.get(name),
            target_sha256=hashes.get(name),
        )
    kept = {place.name for place in origins.values()}
    for change in lora.changes.values():
        for place in change.tensors.values():
            if place.name not in kept:
                op = "drop:the header says it"
                yield LedgerEntry(**_origin(place), op=op, shape=place.info.shape)
    for name, why in lora.unused.items():
        yield LedgerEntry(source=name, source_file=lora.path.name, op=f"drop:{why}", shape=())


def _origin(place: Located) -> dict[str, Any]:
    return {
        "source": place.name,
        "source_file": place.file.name,
        "source_shape": place.info.shape,
        "source_dtype": place.info.dtype,
    }


def _kept(lora: Lora) -> dict[str, Any]:
    """What an earlier conversion noted in the header; InputError if that is malformed."""
    text = lora.metadata.get(NOTES)
    notes = {} if text is None else parse_json(text, f"{NOTES} of {lora.path}")
    kinds: dict[str, Any] = {"names": dict, "alphas": dict | str | None, "adapter": str | None}
    sound = isinstance(notes, dict) and all(
        isinstance(value, kinds.get(key, object)) for key, value in notes.items()
    )
    dtypes = notes.get("alphas") if sound else None
    dtypes = dtypes.values() if isinstance(dtypes, dict) else [dtypes]
    if not sound or not {d for d in dtypes if d is not None} <= set(NUMBERS):
        raise InputError(f"{lora.path} is malformed", f"its header's {NOTES} is")
    return notes


def _alpha(change: Change) -> float:
    """By which, over the rank, a change is scaled."""
    rank = change.rank
    assert rank is not None
    if "alpha" in change.tensors:
        return float(load_located({"alpha": change.tensors["alpha"]})["alpha"].double())
    alpha = float(rank) if change.alpha is None else change.alpha
    return alpha * rank**0.5 if change.rooted else alpha


def _pieces(
    lora: Lora, kind: str, layers: Mapping[str, str]
) -> tuple[dict[str, Piece], dict[str, Located]]:
    """A LoRA's tensors but for its alphas under a dialect's names, and what they were before.

    layers: the layers' names there. CheckError for changes that the dialect has no names for.
    """
    what = f"{lora.path} cannot be written as {kind}"
    pieces: dict[str, Piece] = {}
    origins: dict[str, Located] = {}
    for layer, change in lora.changes.items():
        if change.kind != "lora":
            hint = "difftool convert MODEL DST --lora FILE merges it into a model"
            raise CheckError(what, f"{layer} is changed by a {change.kind}, not by a LoRA", hint)
        for role, place in change.tensors.items():
            if role == "alpha":
                continue
            if role not in ENDS[kind]:
                raise CheckError(what, f"it has no place for {place.name}")
            name = f"{layers[layer]}.{ENDS[kind][role]}"
            piece = piece_of_file(place.file, place.info)
            if role == "magnitude" and (kind == "peft" or change.by_row):
                piece = piece._replace(shape=_magnitude_shape(what, kind, change))
            pieces[name], origins[name] = piece, place
    return pieces, origins


def _magnitude_shape(what: str, kind: str, change: Change) -> Shape:
    """Of the lengths of a weight's rows, as a dialect has them; CheckError for those of inputs."""
    if not change.by_row:
        why = f"{change.tensors['magnitude'].name} is of inputs; PEFT's magnitudes are of rows"
        raise CheckError(what, why)
    rows, axes = change.tensors["up"].info.shape[0], len(change.tensors["down"].info.shape)
    if kind == "kohya":
        return rows, *[1] * (axes - 1)
    return (1, rows, 1, 1) if axes == 4 else (rows,)


def _free(lora: Lora) -> dict[str, str]:
    """The header's notes without those that are about the dialect."""
    return {k: v for k, v in lora.metadata.items() if k not in (DATA_HASH, ADAPTER, NOTES)}


def _peft(
    known: Known, notes: Mapping[str, Any]
) -> tuple[dict[str, Piece], dict[str, Located], dict[str, str]]:
    """Tensors, what they were before, and the header of the file that diffusers and PEFT read."""
    lora, came = known.lora, "adapter" in notes  # from PEFT's
    unusual = notes.get("names", {}) if came else {}
    layers = {n: str(unusual.get(n, peft_name(n, lora.encoders))) for n in lora.changes}
    pieces, origins = _pieces(lora, "peft", layers)
    metadata, kept = _free(lora), notes.get("adapter")
    if not came:
        metadata[NOTES] = json.dumps(_notes(known), sort_keys=True)
    if came and _same_scales(known, kept or "{}"):  # as it was before it was kohya's
        metadata |= {ADAPTER: kept} if kept else {}
    else:
        metadata[ADAPTER] = json.dumps(_adapter(lora), sort_keys=True)
    return pieces, origins, metadata


def _kohya(
    known: Known, notes: Mapping[str, Any]
) -> tuple[dict[str, Piece], dict[str, Located], dict[str, str]]:
    """The same of the file that kohya's scripts and the interfaces read."""
    lora, came = known.lora, bool(notes) and "adapter" not in notes  # from kohya's
    noted = notes.get("names", {}) if came else {}
    dtypes = notes.get("alphas", "F32") if came else "F32"
    layers = {n: str(noted.get(n, usual)) for n, usual in _kohya_names(known).items()}
    pieces, origins = _pieces(lora, "kohya", layers)
    for layer, change in lora.changes.items():
        dtype, alpha = dtypes.get(layer) if isinstance(dtypes, dict) else dtypes, _alpha(change)
        if dtype is None and not isclose(alpha, change.rank or 0):
            dtype = "F32"
        if dtype is not None:
            pieces[f"{layers[layer]}.alpha"] = _number(alpha, str(dtype))
    metadata = _free(lora)
    if not came:
        unusual = {n: s for n, s in lora.names.items() if s != peft_name(n, lora.encoders)}
        metadata[NOTES] = json.dumps({"adapter": lora.metadata.get(ADAPTER), "names": unusual})
    return pieces, origins, metadata


WRITERS = {"peft": _peft, "kohya": _kohya}


def _number(value: float, dtype: str) -> Piece:
    import torch

    return piece_of_tensor(torch.tensor(value, dtype=torch.float64).to(torch_dtype(dtype)))


def _notes(known: Known) -> dict[str, Any]:
    """What kohya's file says that PEFT's does not."""
    lora, usual = known.lora, _kohya_names(known)
    dtypes = {
        layer: change.tensors["alpha"].info.dtype if "alpha" in change.tensors else None
        for layer, change in lora.changes.items()
    }
    notes: dict[str, Any] = {"alphas": dtypes}
    if len(set(dtypes.values())) == 1:
        notes["alphas"] = next(iter(dtypes.values()))
    if unusual := {n: s for n, s in lora.names.items() if n in usual and s != usual[n]}:
        notes["names"] = unusual
    return notes


def _kohya_names(known: Known) -> dict[str, str]:
    """Layers' names as sd-scripts writes them for a family."""
    ldm = known.unet if known.family.ldm_blocks and known.fits else None
    return kohya_names(known.lora.changes, ldm, known.lora.encoders)


def _adapter(lora: Lora) -> dict[str, Any]:
    """PEFT's configuration of a LoRA: the commonest rank and alpha, and those of all others.

    Its keys fit the ends of layers' names: transformers' have begun in two ways.
    """
    parts: dict[str, dict[str, Change]] = {}
    for layer, change in lora.changes.items():
        component, _, name = peft_name(layer, lora.encoders).partition(".")
        parts.setdefault(component, {})[name.removeprefix("text_model.")] = change
    adapter: dict[str, Any] = {}
    for component, changes in sorted(parts.items()):
        ranks = {name: change.rank or 0 for name, change in changes.items()}
        alphas = {name: _alpha(change) for name, change in changes.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        config = {
            "r": rank,
            "lora_alpha": _plain(alpha),
            "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {n: _plain(a) for n, a in alphas.items() if a != alpha},
            "target_modules": sorted(changes),
            "use_dora": any("magnitude" in change.tensors for change in changes.values()),
            "lora_bias": any("up_bias" in change.tensors for change in changes.values()),
        }
        adapter |= {f"{component}.{key}": value for key, value in config.items()}
    return adapter


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _same_scales(known: Known, adapter: str) -> bool:
    """Whether PEFT's configuration, kept from before, still says what the file's alphas say."""
    config = parse_json(adapter, ADAPTER)
    for layer, change in known.lora.changes.items():
        alpha, rooted = scale_of(config, peft_name(layer, known.lora.encoders))
        before = change._replace(
            alpha=alpha, rooted=rooted, tensors={k: v for k, v in change.tensors.items()
                                                 if k != "alpha"},
        )  # fmt: skip
        if not isclose(_alpha(before), _alpha(change), rel_tol=1e-6):
            return False
    return True


def describe(path: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """What a LoRA is, in words; the component ("unet", "text_encoder") of each of its tensors; and
    what is odd about it. Errors as `open_lora`."""
    known = open_lora(path)
    lora = known.lora
    ranks = Counter(str(c.rank) for c in lora.changes.values() if c.rank is not None)
    kinds = Counter(c.kind + "+dora" * ("magnitude" in c.tensors) for c in lora.changes.values())
    says = [
        f"{lora.dialect}'s names",
        f"layers {_whose(known)}",
    ]
    says += [f"{count} layers by {kind}" for kind, count in kinds.most_common()]
    says += [f"rank {rank} in {count} layers" for rank, count in ranks.most_common(4)]
    components = {
        place.name: peft_name(layer, lora.encoders).partition(".")[0]
        for layer, change in lora.changes.items()
        for place in change.tensors.values()
    }
    return says, components, [f"{name}: {why}" for name, why in lora.unused.items()]
