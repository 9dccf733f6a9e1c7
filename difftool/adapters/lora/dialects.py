"""The dialects of LoRA files: what tensors and layers are called in each.

kohya        lora_unet_down_blocks_0_..._to_q.lora_down.weight, lora_te_..., lora_te1_..., .alpha;
             for SDXL the U-Net's layers have LDM's names: lora_unet_input_blocks_4_1_...
PEFT         unet.down_blocks.0....to_q.lora_A.weight, text_encoder....; scales are in the header or
             in adapter_config.json
diffusers    unet....attn1.processor.to_q_lora.down.weight, text_encoder....lora_linear_layer.down
LyCORIS      kohya's names with hada_* (LoHa), lokr_* (LoKr), dora_scale, or diff (the whole change)

Underscores cannot be turned back into dots, so names are looked up among all that the model's own
layers have. Another dialect to be read is a line here; to be written, ENDS and a function of
conversion/lora.py too. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from difftool.errors import CheckError

if TYPE_CHECKING:
    from difftool.config.kinds import NetworkConfig

ENCODERS = ("text_encoder", "text_encoder_2")
_ADAPTER_NAME = r"(?:\.[^.]+)??"
ROLES = {
    "down": r"\.lora_down\.weight|(?:[._]lora|\.lora_linear_layer)\.down\.weight"
    rf"|\.lora_A{_ADAPTER_NAME}\.weight",
    "up": r"\.lora_up\.weight|(?:[._]lora|\.lora_linear_layer)\.up\.weight"
    rf"|\.lora_B{_ADAPTER_NAME}\.weight",
    "up_bias": rf"\.lora_B{_ADAPTER_NAME}\.bias|\.lora_up\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.alpha",
    "magnitude": rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER_NAME}(?:\.weight)?",
    **{name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: rf"\.{name}" for name in ("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2")},
    **{name: rf"\.{name}" for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")},
    "diff": r"\.diff|\.w_norm",
    "diff_bias": r"\.diff_b|\.b_norm",
}
"""What a tensor is to its layer, by the end of its name."""
PATTERN = re.compile(
    "(?P<layer>.+?)(?:" + "|".join(f"(?P<{role}>{end})" for role, end in ROLES.items()) + ")"
)
ENDS = {
    "peft": {
        "down": "lora_A.weight", "up": "lora_B.weight", "up_bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
    },
    "kohya": {
        "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight",
        "magnitude": "dora_scale",
    },
}  # fmt: skip
"""Ends of tensors' names in each dialect that is written, by role."""


def spellings(layers: Collection[str], unet: NetworkConfig) -> dict[str, str | None]:
    """Every name that layers of a model have in some dialect; None for a name that two have."""
    found: dict[str, str | None] = {}
    encoders = encoders_of(layers, unet)
    for layer in layers:
        for name in names_of(layer, encoders):
            found[name] = layer if found.get(name, layer) == layer else None
    for theirs, layer in ldm_names(unet).items():
        kohya = f"lora_unet_{theirs.replace('.', '_')}"
        for name in (kohya, f"diffusion_model.{theirs}", f"model.diffusion_model.{theirs}"):
            found[name] = layer if found.get(name, layer) == layer else None
    return found


def ldm_names(unet: NetworkConfig) -> dict[str, str]:
    """LDM's names of a network's layers; none for one that it has no names for."""
    from difftool.formats.layouts import network_rules

    try:
        rules = [*network_rules(unet)]
    except CheckError:
        return {}
    return {
        rule.theirs.removesuffix(".weight"): f"unet.{rule.ours[0].removesuffix('.weight')}"
        for rule in rules
        if rule.theirs.endswith(".weight")
    }


def encoders_of(layers: Iterable[str], unet: NetworkConfig) -> tuple[str, ...]:
    """What diffusers calls a model's text encoders: SDXL's refiner has no first one."""
    xl = unet.vector_dim is not None and getattr(unet, "vector_name", "") == "add_embedding"
    two = any(layer.startswith("text.1.") for layer in layers)
    return ENCODERS[1:] if xl and not two else ENCODERS


def names_of(layer: str, encoders: tuple[str, ...]) -> Iterator[str]:
    """Names of a layer under which diffusers', PEFT's and kohya's files change it."""
    first, _, name = layer.partition(".")
    if first == "unet":
        yield f"lora_unet_{name.replace('.', '_')}"
        yield from (f"{prefix}{name}" for prefix in ("unet.", "", "base_model.model."))
        yield f"base_model.model.unet.{name}"
    if first != "text":
        return
    number, _, name = name.partition(".")
    index, encoder = int(number), encoders[int(number)]
    bare = name.removeprefix("text_model.")  # as newer transformers have it
    for each in dict.fromkeys((name, bare)):
        yield f"{encoder}.{each}"
        yield from (f"base_model.model.{encoder}.{each}",) if encoder == ENCODERS[1] else ()
        if not index:
            yield from (f"base_model.model.{each}", each)
    flat = name.replace(".", "_")
    yield f"lora_te{ENCODERS.index(encoder) + 1}_{flat}"
    if not index:
        yield f"lora_te_{flat}"


def kohya_names(
    layers: Iterable[str], ldm: NetworkConfig | None, encoders: tuple[str, ...] = ENCODERS
) -> dict[str, str]:
    """What sd-scripts calls layers. ldm: the U-Net whose layers have LDM's names, as SDXL's have;
    None: they have diffusers', as those of SD1 and SD2 have."""
    layers = list(layers)
    theirs = {} if ldm is None else {ours: ldm_name for ldm_name, ours in ldm_names(ldm).items()}
    two = ldm is not None or any(layer.startswith("text.1.") for layer in layers)
    names = {}
    for layer in layers:
        first, _, name = layer.partition(".")
        if first == "unet":
            prefix, name = "lora_unet", theirs.get(layer, name)
        else:
            number, _, name = name.partition(".")
            place = ENCODERS.index(encoders[int(number)]) + 1
            prefix = f"lora_te{place}" if two else "lora_te"
        names[layer] = f"{prefix}_{name.replace('.', '_')}"
    return names


def variants(name: str) -> Iterator[str]:
    """A layer's name in a file, and as it would be without the detours of old diffusers."""
    yield name
    plain = name.replace(".processor.", ".")
    yield plain
    if ".self_attn.to_" in plain:
        first, _, kind = plain.rpartition(".to_")
        yield f"{first}.{kind}_proj"
    elif plain.endswith(".to_out"):
        yield f"{plain}.0"


def peft_name(layer: str, encoders: tuple[str, ...]) -> str:
    """A layer's name in the files that diffusers writes."""
    first, _, name = layer.partition(".")
    if first == "unet":
        return layer
    number, _, name = name.partition(".")
    return f"{encoders[int(number)]}.{name}"


def dialect_of(names: Iterable[str]) -> str:
    """In words, for people."""
    text = "\n".join(names)
    for dialect, pattern in (
        ("LyCORIS", r"\.hada_|\.lokr_|\.diff$|\.diff_b$|\.w_norm$"),
        ("PEFT", r"\.lora_A\."),
        ("diffusers", r"[._]lora\.down\.|lora_linear_layer"),
    ):
        if re.search(pattern, text, re.MULTILINE):
            return dialect
    return "kohya"
