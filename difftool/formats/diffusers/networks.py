"""diffusers' and transformers' config.json of each network <-> difftool's. Torch-free.

A field that is missing has its class's default. A field that difftool has no answer for and that
does not have its default is refused by name, so that no architecture is read as another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from difftool.config.networks import TextConfig, UNetConfig, VaeConfig
from difftool.errors import CheckError, InputError

T = TypeVar("T")

VERSION = "0.42.1"
"""Of diffusers, whose configuration files are written."""

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
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 49406,
    "eos_token_id": 49407,
}  # fmt: skip
"""Defaults of CLIPTextConfig, of the fields that change results."""


class Fields:
    """A configuration over its class's defaults, that knows which of its fields were understood."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        self.values, self.defaults, self.where = {**defaults, **given}, defaults, where
        self.seen: set[str] = set()

    def get(self, name: str, kind: type[T] | tuple[type, ...]) -> Any:
        """A field's value; InputError if it is of another type."""
        self.seen.add(name)
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.refuse(name)
        return value

    def ints(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        return tuple(self._int(name, item) for item in self.get(name, list))

    def one_of(self, name: str, *known: Any) -> Any:
        """A field that must have one of these values."""
        self.seen.add(name)
        value = self.values[name]
        if value not in known:
            self.refuse(name)
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change no result."""
        self.seen.update(names)

    def finish(self) -> None:
        """InputError for the first field that was not understood and is not at its default."""
        for name, value in self.values.items():
            if name not in self.seen and value != self.defaults.get(name) and value is not False:
                self.refuse(name)

    def refuse(self, name: str) -> NoReturn:
        why = f"{name} = {str(self.values.get(name))[:80]}"
        raise InputError(f"{self.where} describes what difftool does not have", why)

    def _int(self, name: str, value: Any) -> int:
        if type(value) is not int:
            self.refuse(name)
        return value


def build(cls: type[T], where: str, **values: Any) -> T:
    """A configuration of difftool's; InputError if its values do not fit together."""
    try:
        return cls(**values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{where} describes what difftool does not have", str(error)) from None


# --- U-Nets ----------------------------------------------------------------------------------


def read_unet(config: Mapping[str, Any], where: str) -> UNetConfig:
    """The U-Net of a config.json; InputError if difftool does not have it."""
    name = config.get("_class_name")
    if name == "UNet2DModel":
        return _read_plain(Fields(config, PLAIN, where))
    if name == "UNet2DConditionModel":
        return _read_conditioned(Fields(config, CONDITIONED, where))
    raise InputError(f"{where} is of a class that difftool does not have", f"_class_name = {name}")


def _common(f: Fields) -> dict[str, Any]:
    """What both of diffusers' U-Nets have."""
    f.ignore("sample_size", "upcast_attention", "num_train_timesteps")
    f.one_of("act_fn", "silu", "swish")
    shift = f.one_of("resnet_time_scale_shift", "default", "scale_shift") == "scale_shift"
    return {
        "in_channels": f.get("in_channels", int),
        "out_channels": f.get("out_channels", int),
        "channels": f.ints("block_out_channels"),
        "num_classes": f.get("num_class_embeds", (int, type(None))),
        "scale_shift": shift,
        "groups": f.get("norm_num_groups", int),
        "norm_eps": float(f.get("norm_eps", (int, float))),
        "dropout": float(f.get("dropout", (int, float))),
        "flip_sin_to_cos": f.get("flip_sin_to_cos", bool),
        "freq_shift": float(f.get("freq_shift", (int, float))),
        "downsample_padding": f.one_of("downsample_padding", 0, 1),
    }


def _blocks(f: Fields, plain: str, *others: str) -> tuple[list[str], list[str]]:
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


def _read_conditioned(f: Fields) -> UNetConfig:
    values = _common(f)
    levels = len(values["channels"])
    down, up = _blocks(f, "Block2D", "CrossAttn|Block2D")

    def depths(name: str) -> list[Any]:
        given = f.get(name, (int, list))
        listed = given if isinstance(given, list) else [given] * levels
        rows = [depth if isinstance(depth, list) else [depth] for depth in listed]
        if len(rows) != levels or not all(r and all(type(d) is int for d in r) for r in rows):
            f.refuse(name)
        return [tuple(depth) if isinstance(depth, list) else depth for depth in listed]

    per_level = depths("transformer_layers_per_block")
    upwards = per_level
    if f.values["reverse_transformer_layers_per_block"] is not None:
        upwards = depths("reverse_transformer_layers_per_block")[::-1]
    f.ignore("reverse_transformer_layers_per_block")
    depth = tuple(d if kind else 0 for d, kind in zip(per_level, down, strict=True))
    up_depth = tuple(d if kind else 0 for d, kind in zip(upwards, up, strict=True))

    mid = f.one_of("mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
    deepest = per_level[-1]
    mid_depth = deepest[0] if isinstance(deepest, tuple) else deepest
    heads = f.get("num_attention_heads", (int, list, type(None)))
    given = f.get("attention_head_dim", (int, list))  # which means heads, by a famous mistake
    heads = given if heads is None else heads
    context = f.get("cross_attention_dim", (int, list))
    if isinstance(context, list):
        if not context or context != [context[0]] * len(context):
            f.refuse("cross_attention_dim")
        context = context[0]
    blocks = f.get("layers_per_block", (int, list))
    only = f.get("only_cross_attention", (bool, list))
    only = only if isinstance(only, list) else [only] * levels
    if len(only) != levels:
        f.refuse("only_cross_attention")
    f.ignore("mid_block_only_cross_attention", "addition_embed_type_num_heads")

    vector, vector_name = None, "add_embedding"
    if f.one_of("addition_embed_type", None, "text_time") == "text_time":
        f.one_of("addition_time_embed_dim", 256)
        vector = f.get("projection_class_embeddings_input_dim", int)
    elif f.one_of("class_embed_type", None, "projection") == "projection":
        vector = f.get("projection_class_embeddings_input_dim", int)
        vector_name = "class_embedding"
    f.ignore("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    guidance = f.get("time_cond_proj_dim", (int, type(None)))
    linear = f.get("use_linear_projection", bool)
    f.finish()
    return build(
        UNetConfig,
        f.where,
        **values,
        blocks=tuple(blocks) if isinstance(blocks, list) else blocks,
        attention="transformer",
        depth=depth,
        up_depth=None if up_depth == depth else up_depth,
        mid_blocks={"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}[mid],
        mid_depth=mid_depth if mid == "UNetMidBlock2DCrossAttn" else 1,
        context_dim=context,
        only_cross=tuple(i for i in range(levels) if only[i] and (down[i] or up[i])),
        heads=tuple(heads) if isinstance(heads, list) else heads,
        linear_projection=linear,
        vector_dim=vector,
        vector_name=vector_name,
        guidance_dim=guidance,
    )


def _read_plain(f: Fields) -> UNetConfig:
    values = _common(f)
    down, up = _blocks(f, "Block2D", "Attn|Block2D", "Resnet|sampleBlock2D")
    last = len(down) - 1
    ways = {
        f.one_of("downsample_type", "conv", "resnet") if kind == "Attn" else kind or "conv"
        for kind in down[:last]
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
    mid = f.one_of("mid_block_type", "UNetMidBlock2D", None) is not None
    attends = f.get("add_attention", bool)
    if mid and attends:
        # Without its own group norm, the middle's attention has none in networks of this kind.
        normed = values["groups"] if values["scale_shift"] else None
        if f.values["attn_norm_num_groups"] not in (normed, values["groups"]):
            f.refuse("attn_norm_num_groups")
    f.ignore("attn_norm_num_groups")
    head_dim = f.get("attention_head_dim", (int, type(None)))
    blocks = f.get("layers_per_block", int)
    f.finish()
    return build(
        UNetConfig,
        f.where,
        **values,
        blocks=blocks,
        depth=depth,
        up_depth=None if up_depth == depth else up_depth,
        mid_blocks=2 if mid else 0,
        mid_depth=int(attends),
        heads=1 if head_dim is None else None,
        head_dim=head_dim,
        resblock_updown=resample == {"resnet"},
    )


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a U-Net; CheckError if diffusers has no class for it."""
    written = _write_plain(config) if config.attention == "plain" else _write_conditioned(config)
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
    from dataclasses import asdict

    values = asdict(config)
    for name in ("depth", "up_depth", "heads", "head_dim", "blocks"):
        del values[name]
    attends = [any(d) or any(u) for d, u in zip(config.down_depths, config.up_depths, strict=True)]
    middle = config.mid_blocks > 1 and config.mid_depth > 0
    attends[-1] = attends[-1] or middle
    pairs = zip(config.level_heads, attends, strict=True)
    return values | {
        "depth": config.down_depths,
        "up_depth": config.up_depths,
        "heads": [heads if there else 0 for heads, there in pairs],
        "mid_depth": config.mid_depth if middle else 0,
        "vector_name": config.vector_name if config.vector_dim else None,
        "linear_projection": config.linear_projection and any(attends),
        "downsample_padding": 0 if config.resblock_updown else config.downsample_padding,
    }


def _written(name: str, defaults: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A configuration file with all of its class's fields, sorted as diffusers sorts them."""
    fields = dict(sorted({**defaults, **values}.items()))
    return {"_class_name": name, "_diffusers_version": VERSION, **fields}


def _common_fields(config: UNetConfig) -> dict[str, Any]:
    shift = config.freq_shift
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "num_class_embeds": config.num_classes,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": int(shift) if shift == int(shift) else shift,
        "downsample_padding": config.downsample_padding,
    }


def _compact(values: list[Any]) -> Any:
    """A list by level as one value where all are the same."""
    return values[0] if all(value == values[0] for value in values) else values


def _write_conditioned(config: UNetConfig) -> dict[str, Any]:
    down, up = config.down_depths, config.up_depths

    def depths(rows: tuple[tuple[int, ...], ...]) -> list[Any]:
        found = [_compact(list(row)) for row in rows]
        # Levels without attention: diffusers wants a number, and the last one is the middle's.
        found = [depth or 1 for depth in found]
        if not any(rows[-1]):
            found[-1] = config.mid_depth
        return found

    forth, back = depths(down), depths(up)
    asymmetric = any(isinstance(depth, list) for depth in (*forth, *back)) or forth != back
    projected = {"projection_class_embeddings_input_dim": config.vector_dim}
    if config.vector_name == "class_embedding":
        vector: dict[str, Any] = {"class_embed_type": "projection"} | projected
    else:
        vector = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256} | projected
    only = [i in config.only_cross for i in range(len(down))]
    return _written(
        "UNet2DConditionModel",
        CONDITIONED,
        **_common_fields(config),
        down_block_types=["CrossAttnDownBlock2D" if any(row) else "DownBlock2D" for row in down],
        up_block_types=["CrossAttnUpBlock2D" if any(row) else "UpBlock2D" for row in up][::-1],
        mid_block_type={2: "UNetMidBlock2DCrossAttn", 1: "UNetMidBlock2D"}.get(config.mid_blocks),
        layers_per_block=_compact([len(row) for row in down]),
        transformer_layers_per_block=forth if asymmetric else _compact(forth),
        reverse_transformer_layers_per_block=back[::-1] if asymmetric else None,
        cross_attention_dim=config.context_dim,
        only_cross_attention=_compact(only),
        attention_head_dim=_compact(list(config.level_heads)),
        use_linear_projection=config.linear_projection,
        time_cond_proj_dim=config.guidance_dim,
        **(vector if config.vector_dim else {}),
    )


def _write_plain(config: UNetConfig) -> dict[str, Any]:
    attends = [*map(any, config.down_depths)]
    back = [*map(any, config.up_depths)]
    updown = config.resblock_updown
    kind, tail, way = ("Resnet", "sampleBlock2D", "resnet") if updown else ("", "Block2D", "conv")
    either = [a or b for a, b in zip(attends, back, strict=True)]
    either[-1] = either[-1] or (config.mid_blocks > 1 and config.mid_depth > 0)
    triples = zip(config.channels, config.level_heads, either, strict=True)
    attending = [(width // heads, heads) for width, heads, there in triples if there]
    whole = all(heads == 1 for _, heads in attending)
    return _written(
        "UNet2DModel",
        PLAIN,
        **_common_fields(config),
        down_block_types=["AttnDownBlock2D" if a else f"{kind}Down{tail}" for a in attends],
        up_block_types=["AttnUpBlock2D" if b else f"{kind}Up{tail}" for b in back][::-1],
        downsample_type=way,
        upsample_type=way,
        mid_block_type="UNetMidBlock2D" if config.mid_blocks else None,
        add_attention=bool(config.mid_depth),
        attn_norm_num_groups=config.groups if config.scale_shift else None,
        layers_per_block=len(config.down_depths[0]),
        attention_head_dim=None if whole else attending[0][0],
    )


# --- the autoencoder -------------------------------------------------------------------------


def read_vae(config: Mapping[str, Any], where: str) -> VaeConfig:
    """The autoencoder of a config.json; InputError if difftool does not have it."""
    if (name := config.get("_class_name")) != "AutoencoderKL":
        what = f"{where} is of a class that difftool does not have"
        raise InputError(what, f"_class_name = {name}")
    f = Fields(config, AUTOENCODER, where)
    f.ignore("sample_size")
    f.one_of("act_fn", "silu", "swish")
    channels, widths = f.get("in_channels", int), f.ints("block_out_channels")
    f.one_of("out_channels", channels)
    for name, kind in (("down_block_types", "DownEncoder"), ("up_block_types", "UpDecoder")):
        f.one_of(name, [f"{kind}Block2D"] * len(widths))
    shift = f.get("shift_factor", (int, float, type(None)))
    quant = f.get("use_quant_conv", bool)
    f.one_of("use_post_quant_conv", quant)
    moments = {n: f.get(n, (list, type(None))) for n in ("latents_mean", "latents_std")}
    values: dict[str, Any] = {}
    for name, numbers in moments.items():
        if numbers is not None and not all(type(n) in (int, float) for n in numbers):
            f.refuse(name)
        values[name] = None if numbers is None else tuple(map(float, numbers))
    values |= {
        "channels": channels,
        "latent_channels": f.get("latent_channels", int),
        "widths": widths,
        "blocks": f.get("layers_per_block", int),
        "groups": f.get("norm_num_groups", int),
        "scale": float(f.get("scaling_factor", (int, float))),
        "shift": float(shift or 0.0),
        "quant_conv": quant,
        "mid_attention": f.get("mid_block_add_attention", bool),
        "force_upcast": f.get("force_upcast", bool),
    }
    f.finish()
    return build(VaeConfig, where, **values)


def write_vae(config: VaeConfig, sample_size: int) -> dict[str, Any]:
    """The config.json of an autoencoder for pictures of a size in pixels; CheckError if it folds
    pixels into channels, which diffusers' has no word for."""
    if config.patch > 1:
        why = f"its autoencoder works on blocks of {config.patch}x{config.patch} pixels"
        raise CheckError("the model has no counterpart in diffusers", why)
    levels = len(config.widths)
    return _written(
        "AutoencoderKL",
        AUTOENCODER,
        in_channels=config.channels,
        out_channels=config.channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(config.widths),
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=sample_size,
        scaling_factor=config.scale,
        shift_factor=config.shift or None,
        latents_mean=None if config.latents_mean is None else list(config.latents_mean),
        latents_std=None if config.latents_std is None else list(config.latents_std),
        force_upcast=config.force_upcast,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.quant_conv,
        mid_block_add_attention=config.mid_attention,
    )


# --- text encoders ---------------------------------------------------------------------------


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
    f.ignore("pad_token_id", "bos_token_id", "eos_token_id", "projection_dim")
    return build(
        TextConfig,
        where,
        width=f.get("hidden_size", int),
        layers=f.get("num_hidden_layers", int),
        heads=f.get("num_attention_heads", int),
        mlp=f.get("intermediate_size", int),
        activation=f.one_of("hidden_act", "quick_gelu", "gelu"),
        vocab_size=f.get("vocab_size", int),
        length=f.get("max_position_embeddings", int),
        projection=f.get("projection_dim", int) if projected else None,
        **use,
    )


def write_text(config: TextConfig) -> dict[str, Any]:
    """The config.json of a text encoder, as transformers writes it."""
    clip = config.tokenizer == "clip"
    projected = config.projection is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "projection_dim": config.projection or config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.length,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "pad_token_id": 1 if clip else 0,
        "bos_token_id": 49406 if clip else 1,
        "eos_token_id": config.end_id,
    }
