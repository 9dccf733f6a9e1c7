"""What every format gives when it is opened, and the table of formats. Torch-free.

A format is one file here and one registration: how it is recognised, read, and (if it can be)
written. Everything in between speaks difftool's own tensor names: unet.*, vae.*, text.0.*, text.1.*
and preset values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from difftool.config.validate import build_preset, to_values
from difftool.errors import InputError, UsageError, missing
from difftool.formats.kinds import kind_of
from difftool.formats.rules import Rule
from difftool.registry import Registry
from difftool.storage.runs import model_of
from difftool.storage.shards import written_at
from difftool.storage.tensor_file import is_source, open_source
from difftool.storage.tensors import Located, load_located

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

COMPONENTS = ("unet", "vae", "text")
"""First parts of the names of a model's tensors."""
EMA, EXTRA, UNKNOWN = "ema.", "extra.", "unknown."
"""Before the names of tensors beside the model: averaged weights (ema.unet.*), what no network of
difftool's has but other tools want back (extra.ldm.*, extra.diffusers.*), and what nobody knows."""
LAYOUT = "ldm"


class Evidence(NamedTuple):
    """Something that was decided about a model, and where it was read."""

    source: str
    says: str


class Told(NamedTuple):
    """What the user says of a model, over whatever its files say."""

    prediction: str | None = None
    """The target: eps, v, ..."""
    zero_snr: bool | None = None


NOTHING_TOLD = Told()


class Drop(NamedTuple):
    """A tensor that is no part of a model."""

    place: Located
    rule: str
    """Why it is none."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """An opened model: everything but the tensors' bytes."""

    kind: str
    """The format, by its name in FORMATS."""
    path: Path
    file: Path
    """The file that holds the U-Net, whose hash is the model's."""
    values: dict[str, Any]
    """The preset, as plain values."""
    tensors: dict[str, Located]
    """By difftool's name."""
    findings: tuple[Evidence, ...] = ()
    weights: tuple[str, ...] = ("live",)
    """Which weights are there: live, ema."""
    tokenizer_json: str | None = None
    """A learned vocabulary; None for CLIP's."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Free notes of the header, such as modelspec.*."""
    configs: dict[str, Any] = field(default_factory=dict)
    """Configuration files of a diffusers folder that the model is from, by their place in it; and
    under LAYOUT, in what its single file differed from those that difftool writes."""
    dropped: tuple[Drop, ...] = ()
    """Tensors of the source that are no part of the model."""
    warnings: tuple[str, ...] = ()

    @property
    def evidence(self) -> list[str]:
        """The findings as lines for people."""
        return [f"{says} ({source})" for source, says in self.findings]

    def load(
        self,
        prefix: str = "",
        device: str = "cpu",
        dtype: Dtype | None = None,
        as_is: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, by the rest of the name; memory-mapped, or
        cast, but those whose whole names are in as_is."""
        places = {n[len(prefix) :]: p for n, p in self.tensors.items() if n.startswith(prefix)}
        exact = {name.removeprefix(prefix) for name in as_is}
        return load_located(places, device, dtype, exact)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model becomes in another format."""

    files: dict[str, list[Rule]]
    """Safetensors files by their place in the target folder ("": the target is this one file), and
    what is in them. A rule of no tensor here is an empty marker."""
    metadata: dict[str, str]
    """For the header of each of them."""
    texts: dict[str, str] = field(default_factory=dict)
    """Other files of the target folder."""
    sidecars: frozenset[str] = frozenset()
    """Files that only difftool reads."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors that must not be there, and the rules that say so."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """How one kind of model is recognised, opened and written."""

    recognises: Callable[[Path], bool]
    """Whether a file or folder is of this kind, by a first look; says nothing of its soundness."""
    open: Callable[[Path, Told], ModelSource]
    """InputError if it is malformed or not supported."""
    plan: Callable[[ModelSource, bool], Plan]
    """What a model (and, if asked, its free metadata) becomes; CheckError if it cannot be held."""


FORMATS: Registry[Format] = Registry("model format")


def open_model(path: Path, told: Told = NOTHING_TOLD) -> ModelSource:
    """The model in a file or folder of any format; no tensor is loaded.

    UsageError if there is nothing at the path, InputError if it is not a sound model.
    """
    path, notes = locate(path)
    for format in FORMATS.values():
        if format.recognises(path):
            source = _as_told(format.open(path, told), told)
            return replace(source, warnings=(*notes, *source.warnings))
    known = ", ".join(FORMATS)
    if path.is_dir():
        why = "; ".join(notes) or "it has no model_index.json and no run's model"
        raise InputError(f"{path} is not a model", why)
    if is_source(path):
        kind, says = kind_of(open_source(path).tensors)
        why = f"it is a {kind}, no whole model: {says}" if kind else "no family that is known to it"
        hint = "difftool convert FILE --inspect lists what is in it"
        raise InputError(f"{path} is a file of tensors unknown to this version", why, hint)
    raise InputError(f"{path} is not a model", f"formats of this version: {known}")


def _as_told(source: ModelSource, told: Told) -> ModelSource:
    """The same model with the target and the zero SNR that the user says; UsageError for a
    pair that cannot be."""
    values, findings = dict(source.values), list(source.findings)
    path = dict(values["path"])
    if told.zero_snr is not None and told.zero_snr != bool(path.get("zero_snr")):
        path["zero_snr"] = told.zero_snr
        findings.append(Evidence("--zero-snr", f"zero terminal SNR {told.zero_snr}"))
    if told.prediction is not None and told.prediction != values["target"]:
        values["target"] = told.prediction
        findings.append(Evidence("--prediction", f"target {told.prediction}"))
    if told != NOTHING_TOLD and values["target"] == "eps" and path.get("zero_snr"):
        why = "at zero SNR the picture holds no signal, and eps says nothing"
        raise UsageError("target eps and zero terminal SNR exclude each other", why)
    values = checked_values(values | {"path": path}, str(source.path))
    return replace(source, values=values, findings=tuple(findings))


def choose_weights(source: ModelSource, which: str | None) -> ModelSource:
    """The same model with its live or its averaged (ema) weights alone; None keeps what is there.

    UsageError if it has no such weights.
    """
    if which is None or source.weights == (which,):
        return source
    if which not in source.weights:
        hint = "it has " + " and ".join(source.weights)
        raise UsageError(f"{source.path} has no {which} weights", hint=hint)
    tensors, dropped = dict(source.tensors), list(source.dropped)
    counters = f"{EXTRA}ldm.model_ema."
    for name in [name for name in tensors if name.startswith((EMA, counters))]:
        place = tensors.pop(name)
        if which == "ema" and name.startswith(EMA):
            ours = name.removeprefix(EMA)
            tensors[ours], place = place, tensors[ours]
        dropped.append(Drop(place, f"--weights {which}"))
    return replace(source, tensors=tensors, dropped=tuple(dropped), weights=(which,))


def locate(path: Path) -> tuple[Path, list[str]]:
    """The model behind a path: a run folder stands for its model, or its newest sound checkpoint's;
    a file that was split, or one of its shards, for their index. And notes on checkpoints that were
    passed over."""
    found = written_at(path)
    if found is None:
        raise missing(path)
    if not found.is_dir() or (found / "model_index.json").is_file():
        return found, []
    model, notes = model_of(found)
    return model or found, notes


def checked_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Preset values from a file, complete; InputError if they make no preset."""
    try:
        return to_values(build_preset(values, f"the preset in {where}"))
    except UsageError as error:
        raise InputError(error.what, error.why, error.hint) from None


def free_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a header's metadata that other tools and people wrote: modelspec, ss_ and the
    like, without what the format itself needs."""
    return {
        key: value
        for key, value in metadata.items()
        if key != "format" and key.split(".")[0] != "difftool"
    }
