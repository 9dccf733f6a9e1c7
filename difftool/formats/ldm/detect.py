"""What a set of tensors is, told by their names and shapes alone. Torch-free.

Networks are read off LDM's names block by block, so any depth and width is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from math import gcd, isqrt
from typing import Any

from difftool.config.families import Family
from difftool.config.networks import Depth, TextConfig, UNetConfig, VaeConfig, VisionConfig
from difftool.formats.rules import Shape

TensorShapes = Mapping[str, Shape]


def differences(found: TensorShapes, wanted: TensorShapes) -> Iterator[str]:
    """What distinguishes tensors from those that there should be, by name and shape."""
    for name, shape in wanted.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != shape:
            yield f"{name} is {list(found[name])}, not {list(shape)}"
    for name in found:
        if name not in wanted:
            yield f"{name} is not known"


# --- networks --------------------------------------------------------------------------------


def unet_config(s: TensorShapes, pooled: bool = True) -> UNetConfig:
    """The U-Net that tensors under LDM's names make, all of one head; KeyError, ValueError or
    IndexError if they make none. pooled: whether a pooled text is what its vector is of."""
    widths, down = _levels(s, "input_blocks", 1, lambda there: f"{there}.0.op.weight" in s)
    ups = {f".{k}.conv.weight" for k in (1, 2)}
    _, up = _levels(s, "output_blocks", 0, lambda there: any(f"{there}{end}" in s for end in ups))
    names = [f"middle_block.{j}" for j in range(3)]
    vector = s.get("label_emb.0.0.weight")
    context = next((s[n][1] for n in s if n.endswith("attn2.to_k.weight")), None)
    depths, updepths = [*map(_compact, down)], [*map(_compact, up[::-1])]
    only = {
        int(level)
        for level, (there, width) in enumerate(zip(_first_attention(s), widths, strict=True))
        if there and s[f"{there}.attn1.to_k.weight"][1] not in (width, None)
    }
    return UNetConfig(
        in_channels=s["input_blocks.0.0.weight"][1],
        out_channels=s["out.2.weight"][0],
        channels=tuple(widths),
        blocks=_compact([*map(len, down)]),
        attention="transformer",
        depth=tuple(depths),
        up_depth=None if updepths == depths else tuple(updepths),
        mid_blocks=sum(f"{name}.in_layers.0.weight" in s for name in names),
        mid_depth=max(_depth(s, name) for name in names),
        context_dim=context,
        only_cross=tuple(sorted(only)),
        heads=1,
        linear_projection=any(n.endswith("proj_in.weight") and len(s[n]) == 2 for n in s),
        num_classes=s["label_emb.weight"][0] if "label_emb.weight" in s else None,
        vector_dim=vector[1] if vector else None,
        vector_name="add_embedding" if pooled or not vector else "class_embedding",
        guidance_dim=s.get("time_embedding.cond_proj.weight", (0, None))[1],
    )


def _levels(
    s: TensorShapes, way: str, first: int, ends: Callable[[str], bool]
) -> tuple[list[int], list[list[int]]]:
    """Widths of the levels that a way leads through, and the depths of each one's blocks."""
    widths: list[int] = []
    levels: list[list[int]] = [[]]
    for index in count(first):
        there = f"{way}.{index}"
        resnet = s.get(f"{there}.0.out_layers.3.weight")
        if resnet is not None:
            levels[-1].append(_depth(s, f"{there}.1"))
            widths[len(levels) - 1 :] = [resnet[0]]
        elif not ends(there):
            return widths, levels if levels[-1] else levels[:-1]
        if ends(there):
            levels.append([])
    raise AssertionError("count is endless")


def _first_attention(s: TensorShapes) -> list[str | None]:
    """The first transformer block of each level on the way down, where there is one."""
    found: list[str | None] = [None]
    for index in count(1):
        there = f"input_blocks.{index}"
        if f"{there}.0.op.weight" in s:
            found.append(None)
        elif f"{there}.0.out_layers.3.weight" not in s:
            return found
        elif _depth(s, f"{there}.1"):
            found[-1] = found[-1] or f"{there}.1.transformer_blocks.0"
    raise AssertionError("count is endless")


def _depth(s: TensorShapes, there: str) -> int:
    """Transformer blocks of an attention layer."""
    blocks = (f"{there}.transformer_blocks.{i}.norm1.weight" in s for i in count())
    return next(i for i, block in enumerate(blocks) if not block)


def _compact(row: list[int]) -> Depth:
    return row[0] if len(set(row)) == 1 else tuple(row)


def vae_config(s: TensorShapes) -> VaeConfig:
    """The autoencoder that tensors under LDM's names make; errors as `unet_config`."""
    widths, blocks = [], 0
    for level in count():
        there = f"encoder.down.{level}.block"
        if f"{there}.0.conv1.weight" not in s:
            break
        widths.append(s[f"{there}.0.conv1.weight"][0])
        blocks = next(j for j in count() if f"{there}.{j}.conv1.weight" not in s)
    return VaeConfig(
        channels=s["encoder.conv_in.weight"][1],
        latent_channels=s["decoder.conv_in.weight"][1],
        widths=tuple(widths),
        blocks=blocks,
        groups=groups_of(widths),
        quant_conv="quant_conv.weight" in s,
        mid_attention="encoder.mid.attn_1.q.weight" in s,
    )


def text_config(s: TensorShapes, openclip: bool, spare: int = 0) -> TextConfig:
    """The text encoder that tensors under OpenCLIP's or transformers' names make, without the last
    `spare` layers; errors as `unet_config`."""
    if openclip:
        tokens, places = s["token_embedding.weight"], s["positional_embedding"]
        layer, hidden = "transformer.resblocks.{}", "mlp.c_fc.weight"
    else:
        tokens = s["text_model.embeddings.token_embedding.weight"]
        places = s["text_model.embeddings.position_embedding.weight"]
        layer, hidden = "text_model.encoder.layers.{}", "mlp.fc1.weight"
    layers = next(i for i in count() if f"{layer.format(i)}.{hidden}" not in s) - spare
    projection = s.get("text_projection") or s.get("text_projection.weight", (0,))[::-1]
    return TextConfig(
        width=tokens[1],
        layers=layers,
        heads=tokens[1] // gcd(tokens[1], 64),
        mlp=s[f"{layer.format(0)}.{hidden}"][0],
        activation="gelu" if openclip else "quick_gelu",
        vocab_size=tokens[0],
        length=places[0],
        projection=projection[-1] or None,
        pad_id=0 if openclip else None,
    )


def vision_config(s: TensorShapes) -> VisionConfig:
    """The picture encoder that tensors under OpenCLIP's names make; errors as `unet_config`. No
    tensor shows how many heads attend and by which activation: as published."""
    width, _, _, patch = s["conv1.weight"]
    projection = s["proj"][1]
    dim = 80 if width == 1280 else 64  # ViT-H's, and all others'
    return VisionConfig(
        width=width,
        layers=next(i for i in count() if f"transformer.resblocks.{i}.mlp.c_fc.weight" not in s),
        heads=width // gcd(width, dim),
        mlp=s["transformer.resblocks.0.mlp.c_fc.weight"][0],
        size=isqrt(s["positional_embedding"][0] - 1) * patch,
        patch=patch,
        projection=projection,
        activation="quick_gelu" if projection == 768 else "gelu",  # OpenAI's ViT-L
    )


def groups_of(widths: Iterable[int]) -> int:
    """Groups of the group norms: 32 wherever that is possible."""
    return gcd(32, *widths)


def with_heads(
    config: UNetConfig, family: Family, params: Mapping[str, Any]
) -> tuple[UNetConfig, tuple[str, ...]]:
    """The same network with as many heads as its family has, which no tensor shows; and a warning
    where that is a guess.

    params: num_heads or num_head_channels of a configuration file.
    """
    heads, dim = params.get("num_heads"), params.get("num_head_channels")
    config = replace(config, groups=groups_of(config.channels))
    small = any(width % 64 for width in config.channels) and not params
    guess = ("how many heads attend is not in the tensors of networks this small",)
    if isinstance(dim, int) and dim > 0:
        config = replace(config, heads=None, head_dim=dim)
    elif isinstance(heads, int) and heads > 0:
        config = replace(config, heads=heads)
    elif family.heads:
        config = replace(config, heads=gcd(family.heads, *config.channels))
    else:
        config = replace(config, heads=None, head_dim=gcd(64, *config.channels))
    return config, guess if small else ()
