"""difftool's own model file: one safetensors file, or shards of one, that describes itself.
Torch-free.

Tensors: unet.* vae.* text.0.* text.1.*, within each the names of diffusers and transformers.
Metadata: "difftool", a JSON object with the resolved preset; "difftool.tokenizer", a learned
vocabulary; "difftool.diffusers", configuration files of the folder that the model came from;
modelspec.* and whatever else people put there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.config.families import family
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.errors import InputError
from difftool.formats.model_source import (
    EMA,
    NO_OVERRIDES,
    Evidence,
    ModelSource,
    Overrides,
    Place,
    Plan,
    free_metadata,
)
from difftool.formats.rules import Rule
from difftool.storage.safetensors import DATA_HASH, save_tensors
from difftool.storage.shards import write_shards
from difftool.storage.strict_json import parse_json
from difftool.storage.tensor_file import TensorSource
from difftool.storage.tensors import piece_of_tensor
from difftool.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
KEY, TOKENIZER, DIFFUSERS = "difftool", "difftool.tokenizer", "difftool.diffusers"
WEIGHTS = "difftool.weights"
PREDICTIONS = {"eps": "epsilon", "v": "v"}
"""modelspec's words for targets; it has none for others."""


def _read_about(header: TensorSource) -> dict[str, Any]:
    """The preset's values in a header; InputError if it holds none."""
    path = header.path
    if KEY not in header.metadata:
        raise InputError(f"{path} is not a difftool model", 'its metadata has no key "difftool"')
    about = parse_json(header.metadata[KEY], f"the metadata of {path}", infinite=True)
    match about:
        case {"schema": int(schema)} if schema > SCHEMA:
            by = about.get("version")
            why = f"it was written by difftool {by if isinstance(by, str) else 'of a later time'}"
            raise InputError(f"{path} needs a newer difftool", why)
        case {"schema": 1, "preset": dict(values)}:
            sample = values.get("sample")
            # The default of older versions, which nobody chose: prompts are read as by today's.
            if isinstance(sample, dict) and sample.get("prompt_syntax") == "none":
                del sample["prompt_syntax"]
            return values
    raise InputError(f"the metadata of {path} is malformed", "it does not hold a preset")


def write_native(
    path: Path,
    preset: Preset,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_json: str | None = None,
    extra_metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    limit: int | None = None,
) -> dict[str, str]:
    """Write a model file, or beyond a limit in bytes its shards, whole or not at all; SHA-256 of
    each tensor, by name.

    UsageError if the file exists and is not to be replaced.
    """
    metadata = native_metadata(preset, tokenizer_json) | dict(extra_metadata or {})
    if limit is None:
        return save_tensors(path, tensors, metadata, overwrite)
    pieces = {name: piece_of_tensor(tensor) for name, tensor in tensors.items()}
    return write_shards(path, pieces, metadata, overwrite, limit)


def native_metadata(preset: Preset, tokenizer_json: str | None) -> dict[str, str]:
    """The header's metadata for a preset."""
    about = {"schema": SCHEMA, "version": __version__, "preset": to_values(preset)}
    metadata = {"format": "pt", KEY: json.dumps(about, ensure_ascii=False)} | modelspec(preset)
    return metadata if tokenizer_json is None else metadata | {TOKENIZER: tokenizer_json}


def modelspec(preset: Preset, implementation: str | None = None) -> dict[str, str]:
    """The ModelSpec keys that a preset has an answer for.

    implementation: whose names the tensors have; None: as diffusers has them.
    """
    row, (width, height) = family(preset.family), preset.sample.size
    architecture = row.modelspec or row.id
    if row.modelspec_v and preset.target == "v":
        architecture = row.modelspec_v
    if implementation is None:
        implementation = "diffusers" if row.modelspec else "difftool"
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": preset.name,
        DATA_HASH: "",
        "modelspec.resolution": f"{width}x{height}",
    }
    if preset.target in PREDICTIONS:
        spec["modelspec.prediction_type"] = PREDICTIONS[preset.target]
    return spec


def recognises_native(place: Place) -> bool:
    """Whether it is difftool's own file, or the index of its shards."""
    return isinstance(place, TensorSource) and KEY in place.metadata


def open_native(header: TensorSource, _overrides: Overrides = NO_OVERRIDES) -> ModelSource:
    """A difftool model file, or the index of its shards, as a source."""
    path, metadata = header.path, header.metadata
    preset = build_preset(_read_about(header), f"the preset in {path}", InputError)
    kept = metadata.get(DIFFUSERS)
    says = f"family {preset.family}, target {preset.target}, path {preset.path['kind']}"
    weights = "ema" if metadata.get(WEIGHTS) == "ema" else "live"
    return ModelSource(
        kind="difftool",
        path=path,
        file=next((p.file for n, p in header.tensors.items() if n.startswith("unet.")), path),
        preset=preset,
        tensors=header.tensors,
        findings=(Evidence("its own preset", says), Evidence(WEIGHTS, f"{weights} weights")),
        weights=(weights, *(("ema",) if any(n.startswith(EMA) for n in header.tensors) else ())),
        tokenizer_json=metadata.get(TOKENIZER),
        metadata=free_metadata(metadata),
        configs=parse_json(kept, f"the metadata of {path}", infinite=True) if kept else {},
    )


def plan_native(source: ModelSource, keep_metadata: bool) -> Plan:
    """Any model as one difftool file."""
    metadata = source.metadata if keep_metadata else {}
    metadata = metadata | native_metadata(source.preset, source.tokenizer_json)
    metadata[WEIGHTS] = source.weights[0]
    if source.configs:
        metadata[DIFFUSERS] = json.dumps(source.configs, ensure_ascii=False)
    rules = [Rule(name, (name,), place.info.shape) for name, place in source.tensors.items()]
    return Plan(files={"": rules}, metadata=metadata)
