"""What is in a model, from headers and configuration files alone. Torch-free; loads no tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from difftool.conversion.ledger import component
from difftool.conversion.lora import describe
from difftool.diffusion.path import build_path
from difftool.formats.kinds import kind_of
from difftool.formats.ldm.prediction_type import WORDS
from difftool.formats.model_source import (
    ModelSource,
    Overrides,
    free_metadata,
    model_at,
    open_place,
)
from difftool.hub.find import find_model
from difftool.storage.strict_json import to_json
from difftool.storage.tensor_file import TensorSource
from difftool.storage.tensors import Info

SCHEMA = 1
ODD = 5
"""Tensors of no use that are named."""
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def inspect(
    source: str | Path, prediction: str | None = None, zero_snr: bool | None = None
) -> dict[str, Any]:
    """A description of a model, or of any safetensors file, as the JSON object of `--inspect`.

    source: all that a MODEL argument may be. prediction, zero_snr: what is said of it, over what
    its files say. UsageError if there is no such model, InputError if it is malformed or not
    supported.
    """
    opened = open_place(find_model(str(source)))
    if opened.format is None and isinstance(opened.place, TensorSource):
        return _file(opened.place)
    return _model(model_at(opened, Overrides(prediction, zero_snr)))


def _model(source: ModelSource) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "format": source.kind,
        "family": source.preset.family,
        "prediction": source.preset.target,
        "zero_snr": bool(getattr(build_path(source.preset.path), "zero_snr", False)),
        "evidence": [finding._asdict() for finding in source.findings],
        "weights": list(source.weights),
        "components": _components((name, place.info) for name, place in source.tensors.items()),
        "metadata": source.metadata,
        "warnings": list(source.warnings),
        "preset": json.loads(to_json(source.values)),
    }


def _file(header: TensorSource) -> dict[str, Any]:
    names = list(header.tensors)
    family, says = kind_of(names)
    evidence = [{"source": "tensor names", "says": says}]
    prediction = WORDS.get(header.metadata.get("modelspec.prediction_type", ""))
    if prediction:
        evidence.append({"source": "modelspec.prediction_type", "says": f"target {prediction}"})
    if architecture := header.metadata.get("modelspec.architecture"):
        evidence.append({"source": "modelspec.architecture", "says": architecture})
    parts: dict[str, str] = {}
    warnings = [*header.warnings]
    if family == "lora":
        lines, parts, odd = describe(header.path)
        evidence += [{"source": "layers", "says": says} for says in lines]
        warnings += odd[:ODD] + [f"and {len(odd) - ODD} more tensors"] * (len(odd) > ODD)
    else:
        warnings.append("this version does not convert files of this kind")
    return {
        "schema": SCHEMA,
        "format": header.kind,
        "family": family,
        "prediction": prediction,
        "zero_snr": None,
        "evidence": evidence,
        "weights": [],
        "components": _components(
            (parts.get(name, name), place.info) for name, place in header.tensors.items()
        ),
        "metadata": free_metadata(header.metadata),
        "warnings": warnings,
    }


def _components(tensors: Iterable[tuple[str, Info]]) -> dict[str, Any]:
    """Tensors, parameters and dtypes (with how many tensors have them) of each component."""
    found: dict[str, Any] = {}
    for name, info in tensors:
        part = found.setdefault(component(name), {"tensors": 0, "parameters": 0, "dtypes": {}})
        dtype = DTYPES.get(info.dtype, info.dtype.lower())
        part["tensors"] += 1
        part["parameters"] += prod(info.shape)
        part["dtypes"][dtype] = part["dtypes"].get(dtype, 0) + 1
    return found
