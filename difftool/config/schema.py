"""Presets: strict YAML read into frozen, typed configuration. Torch-free.

One preset is a whole model and its recipes: networks, noise path, prediction target, sampling
defaults, training defaults. The resolved preset is what run folders, model files and pictures
carry.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import yaml

from difftool.config.networks import CodecConfig, IdentityConfig, TextConfig, UNetConfig
from difftool.errors import InputError, UsageError, missing, suggestion, unknown

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
    rederive_eps: bool | None = None
    """Whether eps follows a thresholded x0; None = as published: with every sampler but ddim."""
    start_noise: Literal["unit", "sigma", "hypot"] = "unit"
    """Amplitude of the start noise: 1, sigma_T, or alpha_T sqrt(rho_T^2 + 1)."""
    strength: float = 0.75
    """Share of the steps that are run on a picture to start from."""
    image_guidance: float = 1.5
    """How closely an edited picture is followed (InstructPix2Pix); 1 = off."""
    noise_level: int = 0
    """How much noise a picture's embedding gets before it is varied (unCLIP); 0 to 999."""
    clip_skip: int | None = None
    """The hidden state of the text encoders that is told, counted from the end as A1111 does: 1 =
    the last one; None = the model's own."""
    prompt_syntax: Literal["none", "a1111", "comfy"] = "none"
    """Whether brackets in prompts are weights, and by whose arithmetic."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a part of a model is trained when nothing is asked for; None = chosen from data and
    device."""

    size: int | None = None
    """Side of the square training pictures, in pixels."""
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the hidden matrices, and AdamW for the rest; with the same learning rate."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 300
    """Steps over which the learning rate rises from zero."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """How the learning rate falls to zero after the warm-up."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 = not clipped."""
    flip: bool | None = None
    """Random horizontal flips; None = only for unconditional and class-conditional photos."""
    ema: float = 0.9995
    """Decay of the moving average of the weights; 0 = none. Early steps use a shorter one."""
    ema_profile: Literal["decay", "power"] = "decay"
    """power: averages over a share of the run; its length can be chosen after the run."""
    ema_lengths: tuple[float, ...] = (0.05, 0.1)
    """Lengths of the power profiles that are tracked, relative to the run; the last is the run's
    own."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    """Seed of everything random in a run, the first weights included."""
    validation: float | None = None
    """Pictures that are never trained on but measured: below 1 a share of the set, else how many;
    0 = none."""

    def __post_init__(self) -> None:
        if not self.ema_lengths or not all(0 < n <= 0.28 for n in self.ema_lengths):
            raise ValueError("ema_lengths are shares of the run, above 0 and at most 0.28")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimConfig):
    """How the U-Net is trained, and with it any text encoder with a vocabulary of its own."""

    time: str = "uniform"
    """Distribution of the training times: uniform, logit_normal or log_normal."""
    time_options: Options = field(default_factory=dict)
    weight: str = "uniform"
    """Loss weighting by noise level: uniform, min_snr, soft_min_snr or edm."""
    weight_options: Options = field(default_factory=dict)
    loss: Literal["mse", "huber"] = "mse"
    drop: float = 0.1
    """Share of captions or labels left out, which is what guidance needs."""
    lora_rank: int = 0
    """Of the matrices that are trained in place of the model's weights; 0 = the weights are."""
    lora_alpha: float | None = None
    """What they add is scaled by this over the rank; None = the rank."""
    lora_base: str | None = None
    """The model whose LoRA it is."""
    checkpointing: bool = False
    """Compute what a block put out again on the way back instead of keeping it: much less memory,
    about a third more time."""


@dataclass(frozen=True, kw_only=True)
class VaeTrainConfig(OptimConfig):
    """How the autoencoder is trained."""

    kl: float = 1e-4
    """Weight of the latent's divergence from a unit normal, of its share a picture value."""
    structure: float = 1.0
    """Weight of the Laplacian pyramid distance beside the mean absolute error."""
    adversarial: float = 0.0
    """Weight of a patch discriminator's opinion; 0 = there is none."""
    adversarial_from: int = 0
    """The step from which it has a say."""


@dataclass(frozen=True, kw_only=True)
class ClipTrainConfig(OptimConfig):
    """How the text encoders are trained beforehand, against a picture encoder."""

    width: int = 32
    """Width of the picture encoder's first layer."""


Labels = Literal["auto", "none", "text", "folders", "prefix"]
"""Where labels come from: found out, nowhere, captions, folder names, or the part of a file name
before its first "_" (OpenAI's guided-diffusion)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a folder of pictures is read."""

    labels: Labels = "auto"
    caption_column: str | None = None
    """The column of the metadata that captions are in; None = text, caption, prompt, ..."""
    wildcards: bool = True
    """Of {a|b} in a caption one is drawn each time; {{ and }} are braces."""
    shuffle_captions: bool = False
    """Captions that are tags between commas have them in another order each time."""
    keep_tokens: int = 0
    """Of shuffled tags, the first so many stay in front."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of a picture is used where its shape is not the frame's."""
    buckets: bool | None = None
    """Train in frames of the pictures' own shapes, a batch of one shape each, and not in squares;
    None = where squares would lose much."""
    bucket_step: int | None = None
    """What the sides of those frames are multiples of; None = as the model needs it."""
    background: str = "white"
    """What shows through transparent pixels: a colour's name, or #rrggbb."""
    allow_bad: bool = False
    """Go on where many of the pictures are unusable."""
    allow_uncaptioned: bool = False
    """Go on where many of the pictures have no caption while others do."""


Part = Literal["vae", "clip", "unet"]
"""What can be trained by itself."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model family or recipe, whole."""

    name: str
    about: str
    """One line for lists and help."""
    family: str = "difftool"
    """The family id that `convert --inspect` prints."""
    codec: CodecConfig = field(default_factory=IdentityConfig)
    """Between pictures and x0."""
    unet: UNetConfig
    text: tuple[TextConfig, ...] = ()
    """Text encoders; their contexts are concatenated along the width."""
    size_numbers: int = 0
    """Size numbers that join the conditioning vector, 256 sinusoids each (SDXL 6, refiner 5)."""
    path: Options
    """The noise path: {kind: NAME, option: value, ...}, NAME from diffusion.PATHS."""
    target: str
    """What the network predicts: a name from diffusion.TARGETS."""
    scheduler: Options = field(default_factory=dict)
    """Fields of diffusers' scheduler_config.json, but for path and target, from which every sampler
    is built as diffusers builds it; empty: samplers are built as they stand here."""
    zero_negative: bool = False
    """Whether an empty negative prompt is told as zeros and not read (SDXL)."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a class-conditional model, by label."""
    sample: SampleConfig = SampleConfig()
    parts: tuple[Part, ...] = ("unet",)
    """What `train` trains, one after the other."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    train_vae: VaeTrainConfig = VaeTrainConfig()
    train_clip: ClipTrainConfig = ClipTrainConfig()

    def recipe(self, part: Part) -> OptimConfig:
        """How that part is trained."""
        return getattr(self, RECIPES[part])


RECIPES: dict[Part, str] = {"vae": "train_vae", "clip": "train_clip", "unet": "train"}
"""The key of a preset that holds each part's recipe."""


# --- strict YAML -----------------------------------------------------------------------------

MAX_BYTES = 1 << 20
MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's traps: no aliases, no duplicate keys, yes/no/on/off and dates
    are strings, and 1e-4 is a number."""

    depth = 0

    def compose_node(self, parent, index):  # type: ignore[override]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed", problem_mark=self.peek_event().start_mark
            )
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
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not text", problem_mark=key_node.start_mark
                )
            if key in keys:
                raise yaml.MarkedYAMLError(
                    problem=f'duplicate key "{key}"', problem_mark=key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for tag, pattern, first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first)
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # YAML 1.1 would read 0123 as octal and 1:30 as base 60


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document; InputError, naming source and line, if it is not sound."""
    if len(text) > MAX_BYTES:
        raise InputError(f"{source} is too large", f"{len(text)} bytes, the limit is {MAX_BYTES}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(
            f"cannot read {source}{where}", getattr(error, "problem", str(error))
        ) from None


# --- finding and resolving presets -----------------------------------------------------------


class Layer(NamedTuple):
    """Plain values and where they come from; later layers are laid over earlier ones."""

    origin: str
    values: Mapping[str, Any]


def preset_folder() -> Path:
    """Where presets lie: inside the installed package, else (editable installs) in the checkout."""
    package = Path(__file__).parent.parent
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
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise InputError(f"preset {name} is not a mapping of keys to values")
    parent = values.pop("extends", None)
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
    named: a mapping with another `kind` replaces, another `schedule` drops `schedule_options`."""
    merged = dict(base)
    for key in base:
        chooser = key.removesuffix("_options")
        if chooser != key and chooser in top and top[chooser] != base.get(chooser):
            del merged[key]
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            replaces = "kind" in value and value["kind"] != old.get("kind")
            merged[key] = dict(value) if replaces else merge(old, value)
        else:
            merged[key] = value
    return merged


def resolve(layers: Sequence[Layer]) -> Preset:
    """The Preset that the layers make together; UsageError names a wrong key or value."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
    preset = validate(Preset, values, layers[-1].origin if layers else "preset")
    _check_names(preset)
    return preset


def data_config(layers: Sequence[Layer]) -> DataConfig:
    """What the layers say of how data is read: needed before the rest of a preset is known."""
    values: Mapping[str, Any] = {}
    for layer in layers:
        values = merge(values, {"data": layer.values.get("data", {})})
    if not isinstance(values.get("data", {}), Mapping):
        raise UsageError(f"{layers[-1].origin}: data is not a mapping of keys to values")
    return validate(DataConfig, values.get("data", {}), "data")


def load_preset(name: str, overrides: Sequence[str] = ()) -> Preset:
    """The preset of that name with `key.path=value` overrides applied."""
    return resolve([*preset_layers(name), *override_layers(overrides)])


def build_preset(values: Mapping[str, Any], source: str = "preset") -> Preset:
    """The Preset of plain values, as `to_values` gives them."""
    return resolve([Layer(source, values)])


def origins(preset: Preset, layers: Sequence[Layer]) -> Iterator[tuple[str, Any, str]]:
    """(key path, value, origin) of every value of a preset that the layers make."""
    for path, value in _leaves(to_values(preset)):
        setters = [layer.origin for layer in layers if _has(layer.values, path)]
        yield ".".join(path), value, setters[-1] if setters else "default"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


# --- validation ------------------------------------------------------------------------------


@cache
def _adapter(cls: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    for part in _dataclasses(cls):
        part.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return TypeAdapter(cls)


def _dataclasses(annotation: Any) -> set[Any]:
    """The dataclasses that a type is made of."""
    if not dataclasses.is_dataclass(annotation):
        return set().union(*map(_dataclasses, get_args(annotation)))
    hints = get_type_hints(annotation).values()
    return {annotation}.union(*map(_dataclasses, hints))


def validate(cls: type, values: Mapping[str, Any], source: str) -> Any:
    """An instance of a configuration dataclass from plain values, checked key by key."""
    from pydantic import ValidationError

    try:
        # Through JSON, where strict typing still reads a list as a tuple.
        return _adapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UsageError(*_explain(cls, values, error.errors(), source)) from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source} is not valid", str(error)) from None


def _explain(
    cls: type, values: Mapping[str, Any], errors: Sequence[Any], source: str
) -> tuple[str, str | None, str | None]:
    """What is wrong with the values, why, and the nearest right key."""

    def chosen(error: Any) -> bool:
        """Whether the error is about the member of a union that the values' `kind` names."""
        name = next((str(p) for p in error["loc"] if str(p).endswith("Config")), None)
        codec = values.get("codec")
        kind = codec.get("kind", "identity") if isinstance(codec, Mapping) else None
        kinds = {c.__name__: c.kind for c in get_args(CodecConfig)}
        return name is None or kinds.get(name) == kind

    error = next(filter(chosen, errors), errors[0])
    path = [str(part) for part in error["loc"] if not str(part).endswith(("Config", "]"))]
    where = ".".join(path) or source
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_at(cls, error["loc"][:-1])
        return f'{source}: there is no key "{where}"', None, suggestion(path[-1], known)
    if error["type"].startswith("missing"):
        return f'{source}: the key "{where}" is missing', None, None
    got = json.dumps(error["input"], default=str)[:60]
    return f"{source}: {where} is not valid", f"{error['msg']}, got {got}", None


def _fields_at(cls: Any, loc: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass that an error's location leads to."""
    for part in loc:
        parts = {c.__name__: c for c in _dataclasses(cls)}
        if part in parts:
            cls = parts[part]
        elif dataclasses.is_dataclass(cls) and part in get_type_hints(cls):
            inner = _dataclasses(get_type_hints(cls)[part])
            cls = next(iter(inner)) if len(inner) == 1 else get_type_hints(cls)[part]
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _check_names(preset: Preset) -> None:
    """Names and options that live in registries: paths, targets, samplers, grids."""
    from difftool.diffusion import GRIDS, SAMPLERS, TARGETS
    from difftool.diffusion.path import build_path

    TARGETS.resolve(preset.target)
    GRIDS.resolve(preset.sample.schedule)
    SAMPLERS[preset.sample.sampler](build_path(preset.path), **preset.sample.sampler_options)


# --- plain values ----------------------------------------------------------------------------


def to_values(config: Any) -> dict[str, Any]:
    """Plain values (JSON, YAML) of a configuration; `build_preset` gives the same one back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The same as YAML text."""
    return yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True)
