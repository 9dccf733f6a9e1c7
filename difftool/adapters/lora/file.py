"""LoRA (Hu et al. 2021) and its kin: which layers of a model a file changes, and how.

Torch-free; no tensor is loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, nan, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from difftool.adapters.lora.dialects import (
    PATTERN,
    ROLES,
    dialect_of,
    encoders_of,
    spellings,
    variants,
)
from difftool.config.kinds import NetworkConfig
from difftool.config.numbers import FINITE
from difftool.errors import InputError, UsageError
from difftool.formats.rules import Shape
from difftool.storage.read import open_file
from difftool.storage.safetensors import looks_like_safetensors
from difftool.storage.strict_json import parse_json, read_json
from difftool.storage.tensor_file import TensorSource, open_source
from difftool.storage.tensors import FLOATS, Located, file_chunks

LoraKind = Literal["lora", "loha", "lokr", "full"]
ADAPTER = "lora_adapter_metadata"
"""Key of diffusers' headers for PEFT's configuration, a prefix of a component before each key."""
PEFT_ALPHA = 8
"""Of an adapter_config.json that does not say: the default of PEFT's LoraConfig."""
SAMPLE = "difftool.sample"
"""Key of a header for how a model is sampled with the LoRA, where that is not the model's own way:
a JSON object of settings."""
SAMPLED_BY = (
    *("steps", "sampler", "sampler_options", "schedule", "schedule_options", "start_noise"),
    *("guidance", "guidance_rescale", "guidance_interval"),
)
"""Those settings."""
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora.safetensors")
"""What LoRAs are called in folders of diffusers, of PEFT and of runs; and the same with .bin."""

NEEDED: dict[LoraKind, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"down", "up"}),),
    "loha": (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    "lokr": tuple(
        frozenset(first + second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "full": (frozenset({"diff"}), frozenset({"diff_bias"}), frozenset({"diff", "diff_bias"})),
}
"""The tensors that a change is made of, in each of the ways that it can be."""
ALLOWED: dict[LoraKind, frozenset[str]] = {
    "lora": frozenset({"up_bias", "mid", "alpha", "magnitude"}),
    "loha": frozenset({"hada_t1", "hada_t2", "alpha", "magnitude"}),
    "lokr": frozenset({"lokr_t2", "alpha", "magnitude"}),
    "full": frozenset({"alpha"}),
}
"""Tensors that may be there besides."""


NUMBERS = (*FLOATS, "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
"""Dtypes of an alpha, which some tools write as a whole number."""


class Change(NamedTuple):
    """What a file does to a layer."""

    kind: LoraKind
    tensors: dict[str, Located]
    """By role."""
    alpha: float | None = None
    """What the rank is scaled by, where no tensor says so; None: the rank, so a scale of 1."""
    rooted: bool = False
    """Whether the scale is alpha over the square root of the rank (rsLoRA)."""

    @property
    def rank(self) -> int | None:
        """Of its matrices; None for changes that are whole."""
        for role, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if role in self.tensors:
                return self.tensors[role].info.shape[axis]
        return None

    @property
    def by_row(self) -> bool:
        """DoRA: whether magnitudes are of a weight's rows, as PEFT's are, or of its inputs, as
        LyCORIS' may be, with ones on all other axes."""
        place = self.tensors["magnitude"]
        shape = place.info.shape
        return ".dora_scale" not in place.name or len(shape) < 2 or shape[0] != 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and columns times kernel, of what is added to the weight."""
        s = {role: place.info.shape for role, place in self.tensors.items()}
        match self.kind:
            case "lora":
                kernel = prod((s["mid"] if "mid" in s else s["down"])[2:])
                return s["up"][0], s["down"][1] * kernel * prod(s["up"][2:])
            case "loha" if "hada_t1" in s:
                return s["hada_w1_a"][1], s["hada_w1_b"][1] * prod(s["hada_t1"][2:])
            case "loha":
                return s["hada_w1_a"][0], s["hada_w1_b"][1]
            case "lokr":
                first, second = (_factor(s, f"lokr_w{i}") for i in (1, 2))
                return first[0] * second[0], first[1] * second[1]
        shape = s["diff"] if "diff" in s else s["diff_bias"]
        return _flat(shape)


@dataclass(frozen=True)
class Lora:
    """An opened file: what it changes, and what in it changes nothing."""

    path: Path
    dialect: str
    changes: dict[str, Change]
    """By layer of difftool: unet.mid_block.attentions.0...to_q, text.0...."""
    unused: dict[str, str]
    """Tensors that say nothing to the model, and why."""
    metadata: dict[str, str]
    names: dict[str, str]
    """What layers are called in the file."""
    encoders: tuple[str, ...]
    """What the model's text encoders are called in diffusers' folders."""

    @cached_property
    def targets(self) -> frozenset[str]:
        """The model's tensors that it changes."""
        found = set()
        for layer, change in self.changes.items():
            if change.kind != "full" or "diff" in change.tensors:
                found.add(f"{layer}.weight")
            if change.tensors.keys() & {"diff_bias", "up_bias"}:
                found.add(f"{layer}.bias")
        return frozenset(found)

    @cached_property
    def hash(self) -> str:
        """By which other tools know the file."""
        return lora_hash(self.path)


def lora_hash(path: Path) -> str:
    """By which other tools know a LoRA: of what follows a safetensors header."""
    digest, start = hashlib.sha256(), 0
    if looks_like_safetensors(path):
        with open_file(path) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
    for chunk in file_chunks(path, start, path.stat().st_size):
        digest.update(chunk)
    return digest.hexdigest()[:12]


def changed_by(loras: Iterable[Lora]) -> set[str]:
    """The model's tensors that any of them changes."""
    return {name for lora in loras for name in lora.targets}


# --- reading ---------------------------------------------------------------------------------


def read_lora(path: Path, layers: Mapping[str, Shape | None], unet: NetworkConfig) -> Lora:
    """What a file changes of a model with layers whose weights have these shapes (None: any).

    UsageError if there is no such file; InputError if it is malformed, holds no LoRA, or does not
    fit the model.
    """
    source, config = _open(path)
    known = spellings(layers, unet)
    grouped: dict[str, dict[str, Located]] = {}
    names: dict[str, str] = {}
    unused: dict[str, str] = {}
    for name, place in source.tensors.items():
        found = PATTERN.fullmatch(name)
        if not found:
            unused[name] = "no tensor of a LoRA that this version knows"
            continue
        spelled = found["layer"]
        layer = next((known[n] for n in variants(spelled) if n in known), None)
        if layer is None:
            unused[name] = "the model has no such layer"
            continue
        role = next(role for role in ROLES if found[role] is not None)
        if role in grouped.setdefault(layer, {}):
            raise InputError(f"{path} is malformed", f"it changes {layer} twice ({name})")
        if place.info.dtype not in (NUMBERS if role == "alpha" else FLOATS):
            raise InputError(f"{path} is malformed", f"{name} is {place.info.dtype}")
        grouped[layer][role], names[layer] = place, spelled
    if not any(PATTERN.fullmatch(name) for name in source.tensors):
        raise InputError(f"{path} is no LoRA", "none of its tensors is one of a LoRA")
    changes, alphas = {}, _plain_alphas(source, known)
    for layer, tensors in grouped.items():
        kind = _kind(tensors)
        if kind is None:
            for role, place in tensors.items():
                unused[place.name] = f"its layer has no more than {', '.join(tensors)}"
                assert role
            continue
        alpha, rooted = scale_of(config, names[layer]) if kind == "lora" else (None, False)
        if layer in alphas:
            alpha, rooted = alphas[layer], False
        changes[layer] = Change(kind, tensors, alpha, rooted)
        _check(path, layer, changes[layer], layers[layer])
    dialect, encoders = dialect_of(source.tensors), encoders_of(layers, unet)
    return Lora(source.path, dialect, changes, unused, source.metadata, names, encoders)


def _plain_alphas(source: TensorSource, known: Mapping[str, str | None]) -> dict[str, float]:
    """Alphas by layer that a pickled file holds as numbers of Python's, and not as tensors."""
    found: dict[str, float] = {}
    for name, text in source.metadata.items() if source.kind == "pickle" else ():
        match = PATTERN.fullmatch(name)
        if match is None or match["alpha"] is None:
            continue
        layer = next((known[n] for n in variants(match["layer"]) if n in known), None)
        try:
            alpha = float(text)
        except ValueError:
            alpha = nan
        if not isfinite(alpha):
            raise InputError(f"{source.path} is malformed", f"{name} is {text:.40}")
        if layer is not None:
            found[layer] = alpha
    return found


def _open(path: Path) -> tuple[TensorSource, dict[str, Any]]:
    """The tensors of a file or of a folder's, and PEFT's configuration of them."""
    if path.is_dir():
        wanted = [path / name.replace(".safetensors", end) for end in (".safetensors", ".bin")
                  for name in FILES]  # fmt: skip
        found = [file for file in wanted if file.is_file()]
        if not found:
            what = f"{path} is no LoRA"
            raise InputError(what, f"it has no {' or '.join(FILES)}", "name the file itself")
        path = found[0]
    source = open_source(path)
    beside = path.parent / "adapter_config.json"
    if ADAPTER in source.metadata:
        config = parse_json(source.metadata[ADAPTER], f"{ADAPTER} of {path}")
    elif path.name in (FILES[1], "adapter_model.bin") and beside.is_file():
        config = {".lora_alpha": PEFT_ALPHA}
        config |= {f".{key}": value for key, value in read_json(beside).items()}
    else:
        config = {}
    if not isinstance(config, dict):
        raise InputError(f"{path} is malformed", f"{ADAPTER} is no object")
    return source, config


def scale_of(config: Mapping[str, Any], name: str) -> tuple[float | None, bool]:
    """A layer's alpha and whether it is rsLoRA's, by PEFT's configuration; None: the rank."""
    if not config:
        return None, False
    components = {key.partition(".")[0] for key in config}
    prefix = next((c for c in components if c and name.startswith(f"{c}.")), "")
    inner = name.removeprefix(f"{prefix}.") if prefix else name

    def value(key: str) -> Any:
        return config.get(f"{prefix}.{key}")

    alpha, patterns = value("lora_alpha"), value("alpha_pattern") or {}
    if isinstance(patterns, dict):
        inner = inner.removeprefix("base_model.model.")
        fitting = (k for k in patterns if _fits(k, inner))
        if (key := next(fitting, None)) is not None:
            alpha = patterns[key]
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise InputError("PEFT's configuration is malformed", f"lora_alpha is {alpha!r}")
    return None if alpha is None else float(alpha), bool(value("use_rslora"))


def _fits(pattern: str, name: str) -> bool:
    """Whether a key of PEFT's patterns is about a layer: its end, as a regular expression."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", name) is not None
    except re.error:
        return False


def _kind(tensors: Iterable[str]) -> LoraKind | None:
    """What change tensors of those roles make; None if none, or not one alone."""
    roles = frozenset(tensors)
    for kind, ways in NEEDED.items():
        if any(way <= roles <= way | ALLOWED[kind] for way in ways):
            return kind
    return None


# --- fit -------------------------------------------------------------------------------------


def _flat(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _factor(s: Mapping[str, Shape], name: str) -> tuple[int, int]:
    """Rows, and columns times kernel, of one of LoKr's factors."""
    if name in s:
        return _flat(s[name])
    if "lokr_t2" in s and name == "lokr_w2":
        return s[f"{name}_a"][1], s[f"{name}_b"][1] * prod(s["lokr_t2"][2:])
    return s[f"{name}_a"][0], prod(s[f"{name}_b"][1:])


def fits(change: Change, shape: Shape) -> bool:
    """Whether a weight of that shape, and its bias, can be changed so."""
    roles = change.tensors.keys()
    biases = {change.tensors[role].info.shape for role in roles & {"diff_bias", "up_bias"}}
    whole = change.kind != "full" or "diff" in roles
    return (not whole or change.shape == _flat(shape)) and biases <= {shape[:1]}


MATRICES = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w1", "lokr_w2"),
    "full": (),
}
PAIRS = (("up", "down"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"),
         ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))  # fmt: skip
TUCKER = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w2_a": "lokr_t2"}
"""Cores, with which the first matrix of a pair lies the other way round."""


def _check(path: Path, layer: str, change: Change, shape: Shape | None) -> None:
    """InputError unless a change can be made, and of a weight of that shape."""
    s = {role: place.info.shape for role, place in change.tensors.items()}
    what = f"{path} is malformed"
    for role in MATRICES[change.kind]:
        if role in s and (len(s[role]) not in (2, 4) or 0 in s[role]):
            raise InputError(what, f"{change.tensors[role].name} is {list(s[role])}")
    for first, second in PAIRS:
        if first in s and second in s:
            rows = s[first][0 if TUCKER.get(first) in s else 1]
            core = s.get("mid" if first == "up" else TUCKER.get(first, ""))
            expected = (rows, s[second][0])
            if core is not None and core[:2] != expected:
                raise InputError(what, f"the core of {layer} is {list(core)}")
            if core is None and expected[0] != expected[1]:
                why = f"{change.tensors[first].name} is {list(s[first])}, which does not go with "
                raise InputError(what, why + f"{change.tensors[second].name}, {list(s[second])}")
    if "alpha" in s and prod(s["alpha"]) != 1:
        raise InputError(what, f"{change.tensors['alpha'].name} is no number")
    if shape is None:
        return
    if not fits(change, shape):
        there = [*(s["diff_bias"] if "diff_bias" in s else change.shape)]
        why = f"it changes {layer} by {there}, whose weight is {list(shape)}"
        raise InputError(f"{path} was made for another model", why, "try the model it is for")
    if "magnitude" in s and prod(s["magnitude"]) != shape[0 if change.by_row else 1]:
        raise InputError(what, f"{change.tensors['magnitude'].name} is {list(s['magnitude'])}")


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT; UsageError for a weight that is none."""
    first, colon, last = text.rpartition(":")
    if colon and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", last.strip()):
        if not first.strip():
            raise UsageError(f'--lora "{text}" names no file', hint="give FILE, or FILE:WEIGHT")
        FINITE.check(weight := float(last), f"--lora {first}: the weight")
        return Path(first), weight
    if colon and not Path(text).exists() and Path(first).exists():
        hint = "give a number: --lora FILE:0.8"
        raise UsageError(f'"{last}" is not the weight of a LoRA', hint=hint)
    return Path(text), 1.0
