"""diffusers' and transformers' config.json of each network <-> difftool's. Torch-free.

Fields that are one of ours are rows of a table, read both ways. What diffusers spells otherwise is
a function that reads it, and the one that writes it below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from difftool.config.networks import (
    TextConfig,
    UNetConfig,
    VaeConfig,
)
from difftool.errors import CheckError, InputError
from difftool.formats.diffusers.fields import (
    BOOL,
    FLOAT,
    INT,
    INT_OR_NONE,
    INTS,
    NUMBERS,
    PER_LEVEL,
    UNIFORM,
    WHOLE,
    ZERO_OR_NONE,
    FieldKind,
    Fields,
    Row,
    build,
    choice,
    compact,
    read_rows,
    write_config,
    write_rows,
)

CONDITIONED: dict[str, Any] = {
    "sample_size": None, "in_channels": 4, "out_channels": 4, "center_input_sample": False,
    "flip_sin_to_cos": True, "freq_shift": 0,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "only_cross_attention": False, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0.0,
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "attention_head_dim": 8,
    "num_attention_heads": None, "dual_cross_attention": False, "use_linear_projection": False,
    "class_embed_type": None, "addition_embed_type": None, "addition_time_embed_dim": None,
    "num_class_embeds": None, "upcast_attention": False, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "projection_class_embeddings_input_dim": None,
    "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}  # fmt: skip
"""Defaults of UNet2DConditionModel."""

PLAIN: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D", "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2,
    "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8,
    "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None,
    "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip
"""Defaults of UNet2DModel."""

AUTOENCODER: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1,
    "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32,
    "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
    "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}  # fmt: skip
"""Defaults of AutoencoderKL."""

TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512,
    "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
    "initializer_factor": 1.0, "initializer_range": 0.02, "pad_token_id": 1, "bos_token_id": 49406,
    "eos_token_id": 49407,
}  # fmt: skip
"""Defaults of CLIPTextConfig."""

# --- U-Nets ----------------------------------------------------------------------------------

ROWS = (
    Row("in_channels", "in_channels", INT),
    Row("out_channels", "out_channels", INT),
    Row("block_out_channels", "channels", INTS),
    Row("num_class_embeds", "num_classes", INT_OR_NONE),
    Row("resnet_time_scale_shift", "scale_shift", choice({"default": False, "scale_shift": True})),
    Row("norm_num_groups", "groups", INT),
    Row("norm_eps", "norm_eps", FLOAT),
    Row("dropout", "dropout", FLOAT),
    Row("flip_sin_to_cos", "flip_sin_to_cos", BOOL),
    Row("freq_shift", "freq_shift", WHOLE),
    Row("downsample_padding", "downsample_padding", choice({0: 0, 1: 1})),
    Row("layers_per_block", "blocks", PER_LEVEL),
)
"""What both of diffusers' U-Nets have."""
MIDDLES = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}
CONDITIONED_ROWS = (
    *ROWS,
    Row("mid_block_type", "mid_blocks", choice(MIDDLES)),
    Row("cross_attention_dim", "context_dim", UNIFORM),
    Row("use_linear_projection", "linear_projection", BOOL),
    Row("time_cond_proj_dim", "guidance_dim", INT_OR_NONE),
)
PLAIN_ROWS = (
    *ROWS,
    Row("mid_block_type", "mid_blocks", choice({"UNetMidBlock2D": 2, None: 0})),
    Row("add_attention", "mid_depth", FieldKind(lambda f, name: int(f.get(name, bool)), bool)),
)


def read_unet(config: Mapping[str, Any], where: str) -> UNetConfig:
    """The U-Net of a config.json; InputError if difftool does not have it."""
    name = config.get("_class_name")
    if name == "UNet2DModel":
        f, rows, read = Fields(config, PLAIN, where), PLAIN_ROWS, _read_plain
    elif name == "UNet2DConditionModel":
        f, rows, read = Fields(config, CONDITIONED, where), CONDITIONED_ROWS, _read_conditioned
    else:
        what = f"{where} is of a class that difftool does not have"
        raise InputError(what, f"_class_name = {name}")
    f.ignore("sample_size", "upcast_attention", "num_train_timesteps")
    f.one_of("act_fn", "silu", "swish")
    values = read_rows(f, rows)
    values |= read(f, values)
    f.finish()
    return build(UNetConfig, where, **values)


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a U-Net; CheckError if diffusers has no class for it."""
    if config.attention == "plain":
        rows, fields = write_rows(vars(config), PLAIN_ROWS), _write_plain(config)
        written = write_config("UNet2DModel", PLAIN, **rows | fields)
    else:
        rows, fields = write_rows(vars(config), CONDITIONED_ROWS), _write_conditioned(config)
        written = write_config("UNet2DConditionModel", CONDITIONED, **rows | fields)
    what, hint = f"diffusers' {written['_class_name']} cannot hold this U-Net", "keep it as it is"
    try:
        again = normal_unet(read_unet(written, "it"))
    except InputError as error:
        raise CheckError(what, error.why, hint) from None
    for name, value in normal_unet(config).items():
        if again[name] != value:
            raise CheckError(what, f"{name} = {value}", hint)
    return written


def normal_unet(config: UNetConfig) -> dict[str, Any]:
    """What a U-Net is, in one spelling: equal for configurations of the same network."""
    values = asdict(config)
    for name in ("depth", "up_depth", "heads", "head_dim", "blocks"):
        del values[name]
    middle = config.mid_blocks > 1 and config.mid_depth > 0
    pairs = zip(config.level_heads, _attending(config), strict=True)
    return values | {
        "depth": config.down_depths,
        "up_depth": config.up_depths,
        "heads": [heads if attends else 0 for heads, attends in pairs],
        "mid_depth": config.mid_depth if middle else 0,
        "vector_name": config.vector_name if config.vector_dim else None,
        "linear_projection": config.linear_projection and any(_attending(config)),
        "downsample_padding": 0 if config.resblock_updown else config.downsample_padding,
    }


def _attending(config: UNetConfig) -> list[bool]:
    """Whether anything attends at each level's width, the middle at the last one's."""
    attends = [any(d) or any(u) for d, u in zip(config.down_depths, config.up_depths, strict=True)]
    attends[-1] = attends[-1] or (config.mid_blocks > 1 and config.mid_depth > 0)
    return attends


def _read_blocks(f: Fields, plain: str, *others: str) -> tuple[list[str], list[str]]:
    """Kinds of the blocks on the ways down and up, from full resolution down, by the part of their
    name before "Down" or "Up"."""
    kinds = []
    for name, way in (("down_block_types", "Down"), ("up_block_types", "Up")):
        types = f.get(name, list)
        known = {f"{kind}{way}{tail}": kind for kind, tail in (k.split("|") for k in others)}
        known |= {f"{way}{plain}": ""}
        if len(types) != len(f.values["block_out_channels"]):
            f.refuse(name)
        if not all(isinstance(kind, str) and kind in known for kind in types):
            f.refuse(name)
        kinds.append([known[kind] for kind in types])
    return kinds[0], kinds[1][::-1]


def _read_conditioned(f: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    down, up = _read_blocks(f, "Block2D", "CrossAttn|Block2D")
    only = f.get("only_cross_attention", (bool, list))
    only = only if isinstance(only, list) else [only] * len(down)
    if len(only) != len(down):
        f.refuse("only_cross_attention")
    heads = PER_LEVEL.read(f, "attention_head_dim")  # which means heads, by a famous mistake
    if f.get("num_attention_heads", (int, list, type(None))) is not None:
        heads = PER_LEVEL.read(f, "num_attention_heads")
    f.ignore("mid_block_only_cross_attention", "addition_embed_type_num_heads")
    return {
        "attention": "transformer",
        "only_cross": tuple(i for i in range(len(down)) if only[i] and (down[i] or up[i])),
        "heads": heads,
        **_read_depths(f, down, up),
        **_read_vector(f),
    }


def _write_conditioned(config: UNetConfig) -> dict[str, Any]:
    down, up = config.down_depths, config.up_depths
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(u) else "UpBlock2D" for u in up][::-1],
        "only_cross_attention": compact(i in config.only_cross for i in range(len(down))),
        "attention_head_dim": compact(config.level_heads),
        **_write_depths(config),
        **_write_vector(config),
    }


def _read_depths(f: Fields, down: list[str], up: list[str]) -> dict[str, Any]:
    """Transformer blocks of each level's layers, where its blocks have such, and the middle's."""

    def depths(name: str) -> list[Any]:
        given = f.get(name, (int, list))
        listed = given if isinstance(given, list) else [given] * len(down)
        rows = [depth if isinstance(depth, list) else [depth] for depth in listed]
        if len(rows) != len(down) or not all(r and all(type(d) is int for d in r) for r in rows):
            f.refuse(name)
        return [tuple(depth) if isinstance(depth, list) else depth for depth in listed]

    forth = back = depths("transformer_layers_per_block")
    if f.values["reverse_transformer_layers_per_block"] is not None:
        back = depths("reverse_transformer_layers_per_block")[::-1]
    f.ignore("reverse_transformer_layers_per_block")
    deepest = forth[-1][0] if isinstance(forth[-1], tuple) else forth[-1]
    depth = tuple(d if kind else 0 for d, kind in zip(forth, down, strict=True))
    up_depth = tuple(d if kind else 0 for d, kind in zip(back, up, strict=True))
    return {
        "depth": depth,
        "up_depth": None if up_depth == depth else up_depth,
        "mid_depth": deepest if f.values["mid_block_type"] == "UNetMidBlock2DCrossAttn" else 1,
    }


def _write_depths(config: UNetConfig) -> dict[str, Any]:
    def depths(rows: tuple[tuple[int, ...], ...]) -> list[Any]:
        # Levels without attention: diffusers wants a number, and the last one is the middle's.
        found = [compact(row) or 1 for row in rows]
        if not any(rows[-1]):
            found[-1] = config.mid_depth
        return found

    forth, back = depths(config.down_depths), depths(config.up_depths)
    asymmetric = any(isinstance(depth, list) for depth in (*forth, *back)) or forth != back
    return {
        "transformer_layers_per_block": forth if asymmetric else compact(forth),
        "reverse_transformer_layers_per_block": back[::-1] if asymmetric else None,
    }


def _read_vector(f: Fields) -> dict[str, Any]:
    """What joins the time embedding: SDXL's pooled text and sizes, or unCLIP's picture."""
    joins = f.one_of("addition_embed_type", None, "text_time") is not None
    if joins:
        f.one_of("addition_time_embed_dim", 256)
    f.ignore("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    if not joins and f.one_of("class_embed_type", None, "projection") is None:
        return {"vector_dim": None}
    dim = f.get("projection_class_embeddings_input_dim", int)
    return {"vector_dim": dim, "vector_name": "add_embedding" if joins else "class_embedding"}


def _write_vector(config: UNetConfig) -> dict[str, Any]:
    if not config.vector_dim:
        return {}
    projected = {"projection_class_embeddings_input_dim": config.vector_dim}
    if config.vector_name == "class_embedding":
        return {"class_embed_type": "projection"} | projected
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": 256} | projected


def _read_plain(f: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    down, up = _read_blocks(f, "Block2D", "Attn|Block2D", "Resnet|sampleBlock2D")
    ways = {
        f.one_of("downsample_type", "conv", "resnet") if kind == "Attn" else kind or "conv"
        for kind in down[:-1]
    } | {
        f.one_of("upsample_type", "conv", "resnet") if kind == "Attn" else kind or "conv"
        for kind in up[1:]
    }
    f.ignore("downsample_type", "upsample_type")
    resample = {way.lower() for way in ways}
    if len(resample) > 1:
        f.refuse("down_block_types")
    depth = tuple(int(kind == "Attn") for kind in down)
    up_depth = tuple(int(kind == "Attn") for kind in up)
    if values["mid_blocks"] and values["mid_depth"]:
        # Without its own group norm, the middle's attention has none in networks of this kind.
        normed = values["groups"] if values["scale_shift"] else None
        if f.values["attn_norm_num_groups"] not in (normed, values["groups"]):
            f.refuse("attn_norm_num_groups")
    f.ignore("attn_norm_num_groups")
    head_dim = f.get("attention_head_dim", (int, type(None)))
    return {
        "depth": depth,
        "up_depth": None if up_depth == depth else up_depth,
        "heads": 1 if head_dim is None else None,
        "head_dim": head_dim,
        "resblock_updown": resample == {"resnet"},
    }


def _write_plain(config: UNetConfig) -> dict[str, Any]:
    updown = config.resblock_updown
    kind, tail, way = ("Resnet", "sampleBlock2D", "resnet") if updown else ("", "Block2D", "conv")
    triples = zip(config.channels, config.level_heads, _attending(config), strict=True)
    attending = [(width // heads, heads) for width, heads, attends in triples if attends]
    whole = all(heads == 1 for _, heads in attending)
    down, up = config.down_depths, config.up_depths
    return {
        "down_block_types": ["AttnDownBlock2D" if any(d) else f"{kind}Down{tail}" for d in down],
        "up_block_types": ["AttnUpBlock2D" if any(u) else f"{kind}Up{tail}" for u in up][::-1],
        "downsample_type": way,
        "upsample_type": way,
        "attn_norm_num_groups": config.groups if config.scale_shift else None,
        "attention_head_dim": None if whole else attending[0][0],
    }


# --- the autoencoder -------------------------------------------------------------------------

VAE_ROWS = (
    Row("in_channels", "channels", INT),
    Row("out_channels", "channels", INT),
    Row("block_out_channels", "widths", INTS),
    Row("layers_per_block", "blocks", INT),
    Row("latent_channels", "latent_channels", INT),
    Row("norm_num_groups", "groups", INT),
    Row("scaling_factor", "scale", FLOAT),
    Row("shift_factor", "shift", ZERO_OR_NONE),
    Row("latents_mean", "latents_mean", NUMBERS),
    Row("latents_std", "latents_std", NUMBERS),
    Row("force_upcast", "force_upcast", BOOL),
    Row("use_quant_conv", "quant_conv", BOOL),
    Row("use_post_quant_conv", "quant_conv", BOOL),
    Row("mid_block_add_attention", "mid_attention", BOOL),
)


def _vae_blocks(levels: int) -> dict[str, list[str]]:
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    return {name: [kind] * levels for name, kind in kinds.items()}


def read_vae(config: Mapping[str, Any], where: str) -> VaeConfig:
    """The autoencoder of a config.json; InputError if difftool does not have it."""
    if (name := config.get("_class_name")) != "AutoencoderKL":
        what = f"{where} is of a class that difftool does not have"
        raise InputError(what, f"_class_name = {name}")
    f = Fields(config, AUTOENCODER, where)
    f.ignore("sample_size")
    f.one_of("act_fn", "silu", "swish")
    values = read_rows(f, VAE_ROWS)
    for name, kinds in _vae_blocks(len(values["widths"])).items():
        f.one_of(name, kinds)
    f.finish()
    return build(VaeConfig, where, **values)


def write_vae(config: VaeConfig, sample_size: int) -> dict[str, Any]:
    """The config.json of an autoencoder for pictures of a size in pixels; CheckError if it folds
    pixels into channels, which diffusers' has no word for."""
    if config.patch > 1:
        why = f"its autoencoder works on blocks of {config.patch}x{config.patch} pixels"
        raise CheckError("the model has no counterpart in diffusers", why)
    fields = write_rows(vars(config), VAE_ROWS) | _vae_blocks(len(config.widths))
    return write_config("AutoencoderKL", AUTOENCODER, sample_size=sample_size, **fields)


# --- text encoders ---------------------------------------------------------------------------

TEXT_ROWS = (
    Row("vocab_size", "vocab_size", INT),
    Row("hidden_size", "width", INT),
    Row("intermediate_size", "mlp", INT),
    Row("num_hidden_layers", "layers", INT),
    Row("num_attention_heads", "heads", INT),
    Row("max_position_embeddings", "length", INT),
    Row("hidden_act", "activation", choice({"quick_gelu": "quick_gelu", "gelu": "gelu"})),
)


def read_text(config: Mapping[str, Any], where: str, *, projected: bool, **use: Any) -> TextConfig:
    """The text encoder of a config.json.

    projected: whether it is a CLIPTextModelWithProjection. use: how the pipeline uses it, and its
    tokenizer, which the file does not say.
    """
    if config.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        why = f"model_type = {config['model_type']}"
        raise InputError(f"{where} is of a class that difftool does not have", why)
    f = Fields({key: config[key] for key in TEXT if key in config}, TEXT, where)
    f.one_of("layer_norm_eps", 1e-5)
    projection = f.get("projection_dim", int) if projected else None
    return build(TextConfig, where, projection=projection, **read_rows(f, TEXT_ROWS), **use)


def write_text(config: TextConfig) -> dict[str, Any]:
    """The config.json of a text encoder, as transformers writes it."""
    kind = "CLIPTextModelWithProjection" if config.pooled else "CLIPTextModel"
    written = {"architectures": [kind], "model_type": "clip_text_model"} | TEXT
    written |= write_rows(vars(config), TEXT_ROWS)
    written |= {"projection_dim": config.projection or config.width, "eos_token_id": config.end_id}
    return (
        written if config.tokenizer == "clip" else written | {"pad_token_id": 0, "bos_token_id": 1}
    )
