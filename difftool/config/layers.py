"""From names, files and overrides to a preset: layers of plain values, each with its origin.
Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from difftool.config.schema import DataConfig, Preset
from difftool.config.validate import build_preset, to_values, validate
from difftool.errors import InputError, UsageError, missing, unknown
from difftool.storage.yaml import parse_yaml, read_yaml

PACKAGE = Path(__file__).parent.parent
DEFAULT_MODEL = "emoji"
"""The preset whose model, which ships, is used where none is named."""


class Layer(NamedTuple):
    """Plain values and where they come from; later layers are laid over earlier ones."""

    origin: str
    values: Mapping[str, Any]


def preset_folder(package: Path = PACKAGE) -> Path:
    """Where presets lie: inside the installed package, else (editable installs) in the checkout."""
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The presets that ship, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def preset_layers(name: str, seen: tuple[str, ...] = ()) -> list[Layer]:
    """The preset of that name or .yaml file, and below it those that it extends, base first."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise missing(f"preset file {name}")
    else:
        path = preset_folder() / f"{name}.yaml"
        if not path.is_file():
            raise unknown("preset", name, preset_names())
    if name in seen:
        raise InputError(f"preset {name} extends itself", " -> ".join((*seen, name)))
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"preset {name} is not a mapping of keys to values")
    parent = values.pop("extends", None)
    if not isinstance(parent, str | None):
        raise InputError(f"preset {name} extends what is no name of a preset", repr(parent)[:60])
    values.setdefault("name", path.stem)
    below = preset_layers(parent, (*seen, name)) if parent else []
    return [*below, Layer(f"preset {path.stem}", values)]


def override_layers(overrides: Sequence[str]) -> list[Layer]:
    """`key.path=value` texts, values in YAML, as layers."""
    return [Layer(f"--set {text.partition('=')[0]}", _override(text)) for text in overrides]


def _override(text: str) -> dict[str, Any]:
    path, sign, value_text = text.partition("=")
    if not sign or not all(path.split(".")):
        raise UsageError(f'--set "{text}" is not of the form key.path=value')
    value = parse_yaml(value_text, f"--set {text}")
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, mappings key by key. The options of a component go when another is
    named, or none are: a mapping with another `kind` replaces, and another `schedule`, or empty
    `schedule_options`, drop `schedule_options`."""
    merged = dict(base)
    for key in base:
        chooser = key.removesuffix("_options")
        if chooser != key and chooser in top and top[chooser] != base.get(chooser):
            del merged[key]
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and (
            value or not key.endswith("_options")
        ):  # fmt: skip
            replaces = "kind" in value and value["kind"] != old.get("kind")
            merged[key] = dict(value) if replaces else merge(old, value)
        else:
            merged[key] = value
    return merged


def merged(values: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All of them, each laid over those before it."""
    return reduce(merge, values, {})


def resolve(layers: Sequence[Layer]) -> Preset:
    """The Preset that the layers make together; UsageError names a wrong key or value."""
    source = layers[-1].origin if layers else "preset"
    return build_preset(merged(layer.values for layer in layers), source)


def data_config(layers: Sequence[Layer]) -> DataConfig:
    """What the layers say of how data is read: needed before the rest of a preset is known."""
    values = merged({"data": layer.values.get("data", {})} for layer in layers).get("data", {})
    if not isinstance(values, Mapping):
        raise UsageError(f"{layers[-1].origin}: data is not a mapping of keys to values")
    return validate(DataConfig, values, "data")


def load_preset(name: str, overrides: Sequence[str] = ()) -> Preset:
    """The preset of that name with `key.path=value` overrides applied."""
    return resolve([*preset_layers(name), *override_layers(overrides)])


def origins(preset: Preset, layers: Sequence[Layer]) -> Iterator[tuple[str, Any, str]]:
    """(key path, value, origin) of every value of a preset that the layers make."""
    for path, value in leaves(to_values(preset)):
        setters = [layer.origin for layer in layers if _has(layer.values, path)]
        yield ".".join(path), value, setters[-1] if setters else "default"


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in nested mappings that is no mapping, or an empty one."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True
