"""Presets: strict YAML read into frozen, typed configuration. Torch-free.

One preset is a whole model and its recipes: networks, noise path, prediction target, sampling
defaults, training defaults. The resolved preset is what run folders, model files and pictures carry.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from difftool.errors import DifftoolError, InputError, UsageError, suggestion
from difftool.models.configs import (
    CodecConfig,
    IdentityConfig,
    SpaceToDepthConfig,
    TextConfig,
    UNetConfig,
    VaeConfig,
)

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How a model is sampled when nothing is asked for."""

    size: tuple[int, int] = (64, 64)
    """Width and height in pixels."""
    steps: int = 20
    sampler: str = "dpmpp_2m"
    sampler_options: Options = field(default_factory=dict)
    schedule: str = "linspace"
    """The grid of levels that the sampler visits."""
    schedule_options: Options = field(default_factory=dict)
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 = off."""
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    """Guidance only where log SNR lies in this range; None = everywhere."""
    clip: Literal["none", "static", "dynamic"] = "none"
    """Thresholding of the predicted x0: none, to [-1, 1], or dynamic (Imagen)."""
    start_noise: Literal["unit", "sigma", "hypot"] = "unit"
    """Amplitude of the start noise: 1, sigma_T, or alpha_T sqrt(rho_T^2 + 1)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained when nothing is asked for; None = chosen from data and device."""

    size: int | None = None
    """Side of the square training pictures, in pixels."""
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 300
    """Steps over which the learning rate rises from zero."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """How the learning rate falls to zero after the warm-up."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 = not clipped."""
    time: Literal["uniform", "logit_normal", "log_normal"] = "uniform"
    """Distribution of the training times."""
    time_options: Options = field(default_factory=dict)
    weight: str = "uniform"
    """Loss weighting by noise level."""
    weight_options: Options = field(default_factory=dict)
    loss: Literal["mse", "huber"] = "mse"
    drop: float = 0.1
    """Share of captions or labels left out, which is what guidance needs."""
    flip: bool | None = None
    """Random horizontal flips; None = only for unconditional and class-conditional photos."""
    ema: float = 0.9995
    """Decay of the moving average of the weights; 0 = none. Early steps use a shorter one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model family or recipe, whole."""

    name: str
    about: str
    """One line for lists and help."""
    family: str = "difftool"
    """The family id that `convert --inspect` prints."""
    codec: CodecConfig = IdentityConfig()
    """Between pictures and x0."""
    unet: UNetConfig
    text: tuple[TextConfig, ...] = ()
    """Text encoders; their contexts are concatenated along the width."""
    size_numbers: int = 0
    """How many size numbers join the conditioning vector, 256 sinusoids each (SDXL 6, refiner 5)."""
    path: Options
    """The noise path: {kind: NAME, option: value, ...}, NAME from diffusion.PATHS."""
    target: str
    """What the network predicts: a name from diffusion.TARGETS."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a class-conditional model, by label."""
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()


# --- strict YAML -----------------------------------------------------------------------------

MAX_BYTES = 1 << 20
MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's traps: no aliases, no duplicate keys, yes/no/on/off and dates
    are strings, and 1e-4 is a number."""

    depth = 0

    def compose_node(self, parent, index):  # type: ignore[override]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):  # type: ignore[override]
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in keys:
                raise yaml.MarkedYAMLError(problem=f'duplicate key "{key}"', problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for tag, pattern, first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # YAML 1.1 would read 0123 as octal and 1:30 as base 60


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document; InputError, naming the source and the line, if it is not sound."""
    if len(text) > MAX_BYTES:
        raise InputError(f"{source} is too large", f"{len(text)} bytes, the limit is {MAX_BYTES}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"cannot read {source}{where}", getattr(error, "problem", str(error))) from None


# --- finding and resolving presets -----------------------------------------------------------


def preset_folder() -> Path:
    """Where presets lie: inside the installed package, else (editable installs) in the checkout."""
    installed = Path(str(resources.files("difftool"))) / "presets"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> Preset:
    """The preset of that name, or in that .yaml file, with `key.path=value` overrides applied."""
    return build_preset(_read(name), overrides, source=f"preset {name}")


def _read(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path, label = Path(name), Path(name).stem
        if not path.is_file():
            raise UsageError(f"preset file {name} does not exist")
    else:
        path, label = preset_folder() / f"{name}.yaml", name
        if not path.is_file():
            raise UsageError(f'there is no preset "{name}"', hint=suggestion(name, preset_names()))
    if name in seen:
        raise InputError(f"preset {name} extends itself", " -> ".join((*seen, name)))
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise InputError(f"preset {name} is not a mapping of keys to values")
    parent = values.pop("extends", None)
    values.setdefault("name", label)
    return merge(_read(parent, (*seen, name)), values) if parent else values


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, mappings key by key. A mapping that names another `kind` replaces."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        if both and not ("kind" in value and value["kind"] != old.get("kind")):
            value = merge(old, value)
        merged[key] = value
    return merged


def build_preset(values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "preset") -> Preset:
    """Validated Preset from plain values (YAML, JSON) and `key.path=value` overrides.

    UsageError names the wrong key or value with its path and the nearest known key.
    """
    values = dict(values)
    for override in overrides:
        values = _override(values, override)
    return _validate(Preset, values, source)


def _override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise UsageError(f'--set "{override}" is not of the form key.path=value')
    value = parse_yaml(text, f"--set {override}")
    for key in reversed(path.split(".")):
        value = {key: value}
    return merge(values, value)


def _validate(cls: type, values: Mapping[str, Any], source: str) -> Any:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.dataclasses import dataclass as checked

    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise UsageError(f"{source} is not valid", *_explain(cls, error.errors()[0])) from None


def to_values(preset: Any) -> dict[str, Any]:
    """Plain values (JSON, YAML) of a configuration; `build_preset` gives the same preset back."""
    return dataclasses.asdict(preset)


def to_yaml(preset: Any) -> str:
    return yaml.safe_dump(_plain(to_values(preset)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
