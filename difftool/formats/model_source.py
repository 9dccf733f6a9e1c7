"""What every format gives when it is opened, and the table of formats. Torch-free.

A format is one file here and one registration: how it is recognised, read, and (if it can be)
written. Everything in between speaks difftool's own tensor names: unet.*, vae.*, text.0.*, text.1.*
and presets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from difftool.config.kinds import CodecConfig
from difftool.config.schema import Preset
from difftool.config.validate import check_names, to_values
from difftool.errors import InputError, UsageError, missing
from difftool.formats.kinds import kind_of
from difftool.formats.rules import Rule
from difftool.registry import Registry
from difftool.storage.runs import model_of
from difftool.storage.shards import written_at
from difftool.storage.tensor_file import TensorSource, is_source, open_source
from difftool.storage.tensors import Located

EMA, EXTRA, UNKNOWN = "ema.", "extra.", "unknown."
"""Before the names of tensors beside the model: averaged weights (ema.unet.*), what no network of
difftool's has but other tools want back (extra.ldm.*, extra.diffusers.*), and what nobody knows."""
LAYOUT = "ldm"


class Evidence(NamedTuple):
    """Something that was decided about a model, and where it was read."""

    source: str
    says: str


class Overrides(NamedTuple):
    """What the user says of a model, over whatever its files say."""

    prediction: str | None = None
    """The target: eps, v, ..."""
    zero_snr: bool | None = None
    codec: CodecConfig | None = None
    """A learned one, for a model that has none."""

    @property
    def decide(self) -> bool:
        """Whether anything is said of what the model predicts."""
        return self.prediction is not None or self.zero_snr is not None


NO_OVERRIDES = Overrides()


class Drop(NamedTuple):
    """A tensor that is no part of a model."""

    place: Located
    rule: str
    """Why it is none."""


@dataclass(frozen=True, kw_only=True)
class ModelSource(TensorSource):
    """An opened model: everything but the tensors' bytes. Its kind is its format, by the name in
    FORMATS; its tensors are by difftool's names; its metadata is free notes, such as modelspec.*.
    """

    file: Path
    """The file that holds the U-Net, whose hash is the model's."""
    preset: Preset
    findings: tuple[Evidence, ...] = ()
    weights: tuple[str, ...] = ("live",)
    """Which weights are there: live, ema."""
    tokenizer_json: str | None = None
    """A learned vocabulary; None for CLIP's."""
    configs: dict[str, Any] = field(default_factory=dict)
    """Configuration files of a diffusers folder that the model is from, by their place in it; and
    under LAYOUT, in what its single file differed from those that difftool writes."""
    dropped: tuple[Drop, ...] = ()
    """Tensors of the source that are no part of the model."""

    @cached_property
    def values(self) -> dict[str, Any]:
        """The preset, as plain values."""
        return to_values(self.preset)

    @property
    def evidence(self) -> list[str]:
        """The findings as lines for people."""
        return [f"{says} ({source})" for source, says in self.findings]


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


Place = Path | TensorSource
"""A folder, or a file of tensors that is open; a file of another kind is no model."""


@dataclass(frozen=True)
class Format:
    """How one kind of model is recognised, opened and written."""

    recognises: Callable[[Place], bool]
    """Whether a place is of this kind, by a first look; says nothing of its soundness."""
    open: Callable[[Any, Overrides], ModelSource]
    """The model at a place that it recognises; InputError if it is malformed or not supported."""
    plan: Callable[[ModelSource, bool], Plan]
    """What a model (and, if asked, its free metadata) becomes; CheckError if it cannot be held."""
    lacks_codec: Callable[[Place], bool] = lambda place: False
    """Whether a place is of this kind but for an autoencoder."""


FORMATS: Registry[Format] = Registry("model format")


class Opened(NamedTuple):
    """What lies at a path, its headers read once."""

    place: Place
    format: Format | None
    """None: it is no whole model of a format that this version knows."""
    notes: list[str]
    """On checkpoints of a run that were passed over."""

    @property
    def path(self) -> Path:
        """Of the file, or the folder."""
        return self.place if isinstance(self.place, Path) else self.place.path


def open_place(path: Path) -> Opened:
    """Open what a path stands for: a run folder stands for its model, or its newest sound
    checkpoint's; a file that was split, or one of its shards, for their index.

    UsageError if there is nothing at the path, InputError for a malformed file of tensors.
    """
    found = written_at(path)
    if found is None:
        raise missing(path)
    notes: list[str] = []
    if found.is_dir() and not (found / "model_index.json").is_file():
        model, notes = model_of(found)
        found = model or found
    place = open_source(found) if is_source(found) else found
    format = next((each for each in FORMATS.values() if each.recognises(place)), None)
    return Opened(place, format, notes)


def open_model(path: Path, overrides: Overrides = NO_OVERRIDES) -> ModelSource:
    """The model in a file or folder of any format; no tensor is loaded.

    UsageError if there is nothing at the path, InputError if it is not a sound model.
    """
    return model_at(open_place(path), overrides)


def model_at(opened: Opened, overrides: Overrides = NO_OVERRIDES) -> ModelSource:
    """The model that was opened; InputError if it is not a sound one."""
    path, place = opened.path, opened.place
    bare = next((each for each in FORMATS.values() if each.lacks_codec(place)), None)
    format = opened.format or (bare if overrides.codec else None)
    if format is not None:
        source = _overridden(format.open(place, overrides), overrides)
        return replace(source, warnings=(*opened.notes, *source.warnings))
    if isinstance(place, TensorSource):
        kind, says = kind_of(place.tensors)
        why = f"it is a {kind}, no whole model: {says}" if kind else "no family that is known to it"
        hint = "difftool convert FILE --inspect lists what is in it"
        if bare:
            why, hint = f"it has no autoencoder; {why}", "--vae FILE gives it one to sample with"
        raise InputError(f"{path} is a file of tensors unknown to this version", why, hint)
    why = f"formats of this version: {', '.join(FORMATS)}"
    if path.is_dir():
        why = "; ".join(opened.notes) or "it has no model_index.json and no run's model"
    raise InputError(f"{path} is not a model", why)


def _overridden(source: ModelSource, overrides: Overrides) -> ModelSource:
    """The same model with the target and the zero SNR that the user says; UsageError for a
    pair that cannot be."""
    preset, findings = source.preset, list(source.findings)
    path, target = dict(preset.path), overrides.prediction or preset.target
    zero_snr = overrides.zero_snr
    if zero_snr is not None and zero_snr != bool(path.get("zero_snr")):
        path["zero_snr"] = zero_snr
        findings.append(Evidence("--zero-snr", f"zero terminal SNR {zero_snr}"))
    if target != preset.target:
        findings.append(Evidence("--prediction", f"target {target}"))
    if overrides.decide and target == "eps" and path.get("zero_snr"):
        why = "at zero SNR the picture holds no signal, and eps says nothing"
        raise UsageError("target eps and zero terminal SNR exclude each other", why)
    if len(findings) == len(source.findings):
        return source
    preset = replace(preset, path=path, target=target)
    try:
        check_names(preset)
    except UsageError as error:
        raise InputError(error.what, error.why, error.hint) from None
    return replace(source, preset=preset, findings=tuple(findings))


def choose_weights(source: ModelSource, which: str | None) -> ModelSource:
    """The same model with its live or its averaged (ema) weights alone; None keeps what is there.

    UsageError if it has no such weights, InputError if the averaged ones are not whole.
    """
    if which is None or source.weights == (which,):
        return source
    if which not in source.weights:
        hint = "it has " + " and ".join(source.weights)
        raise UsageError(f"{source.path} has no {which} weights", hint=hint)
    tensors, dropped = dict(source.tensors), list(source.dropped)
    unet = {name for name in tensors if name.startswith("unet.")}
    averaged = {name.removeprefix(EMA) for name in tensors if name.startswith(EMA)}
    if which == "ema" and (odd := sorted(unet ^ averaged)):
        what = f"the averaged weights of {source.path} are not those of its U-Net"
        raise InputError(what, f"{odd[0]} is only in one of them")
    counters = f"{EXTRA}ldm.model_ema."
    for name in [name for name in tensors if name.startswith((EMA, counters))]:
        place = tensors.pop(name)
        if which == "ema" and name.startswith(EMA):
            ours = name.removeprefix(EMA)
            tensors[ours], place = place, tensors[ours]
        dropped.append(Drop(place, f"--weights {which}"))
    return replace(source, tensors=tensors, dropped=tuple(dropped), weights=(which,))


def free_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a header's metadata that other tools and people wrote: modelspec, ss_ and the
    like, without what the format itself needs."""
    return {
        key: value
        for key, value in metadata.items()
        if key != "format" and key.split(".")[0] != "difftool"
    }
