"""Names and shapes of networks' tensors in LDM's single files <-> ours, as bijective tables.
Torch-free.

A table is generated from a network's configuration, so it holds for any depth and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from difftool.config.networks import TextConfig, UNetConfig, VaeConfig, VisionConfig
from difftool.errors import CheckError
from difftool.formats.rules import Rule, Shape
from difftool.storage.tensors import Op

# --- layers ----------------------------------------------------------------------------------


def _layer(theirs: str, ours: str, shape: Shape, bias: bool = True, op: Op = "copy"):
    yield Rule(f"{theirs}.weight", (f"{ours}.weight",), shape, op)
    if bias:
        yield Rule(f"{theirs}.bias", (f"{ours}.bias",), shape[:1])


def _conv(theirs: str, ours: str, inner: int, width: int, size: int = 3) -> Iterator[Rule]:
    return _layer(theirs, ours, (width, inner, size, size))


def _resnet(theirs: str, ours: str, inner: int, width: int, emb: int) -> Iterator[Rule]:
    yield from _layer(f"{theirs}.in_layers.0", f"{ours}.norm1", (inner,))
    yield from _conv(f"{theirs}.in_layers.2", f"{ours}.conv1", inner, width)
    yield from _layer(f"{theirs}.emb_layers.1", f"{ours}.time_emb_proj", (width, emb))
    yield from _layer(f"{theirs}.out_layers.0", f"{ours}.norm2", (width,))
    yield from _conv(f"{theirs}.out_layers.3", f"{ours}.conv2", width, width)
    if inner != width:
        yield from _conv(f"{theirs}.skip_connection", f"{ours}.conv_shortcut", inner, width, 1)


def _transformer(
    theirs: str, ours: str, width: int, depth: int, config: UNetConfig, cross: bool
) -> Iterator[Rule]:
    """Names are the same on both sides. cross: the self-attention looks at the context too."""
    context = config.context_dim or width
    project: Shape = (width, width) if config.linear_projection else (width, width, 1, 1)
    yield from _layer(f"{theirs}.norm", f"{ours}.norm", (width,))
    yield from _layer(f"{theirs}.proj_in", f"{ours}.proj_in", project)
    for i in range(depth):
        shapes: dict[str, Shape] = {"ff.net.0.proj": (8 * width, width)}
        shapes["ff.net.2"] = (width, 4 * width)
        for attention, source in (("attn1", context if cross else width), ("attn2", context)):
            shapes[f"{attention}.to_q"] = (width, width)
            shapes |= {f"{attention}.to_{kv}": (width, source) for kv in "kv"}
            shapes[f"{attention}.to_out.0"] = (width, width)
        shapes |= {f"norm{k}": (width,) for k in (1, 2, 3)}
        for name, shape in shapes.items():
            path = f"transformer_blocks.{i}.{name}"
            bias = not name.endswith(("to_q", "to_k", "to_v"))
            yield from _layer(f"{theirs}.{path}", f"{ours}.{path}", shape, bias)
    yield from _layer(f"{theirs}.proj_out", f"{ours}.proj_out", project)


# --- the U-Net -------------------------------------------------------------------------------


def unet_rules(c: UNetConfig) -> Iterator[Rule]:
    """A U-Net's table; CheckError for networks that LDM's code cannot build."""
    plain = c.attention == "plain" and (any(map(any, c.down_depths)) or c.mid_depth > 0)
    if plain or c.scale_shift or c.resblock_updown:
        what = "LDM's single files cannot hold this U-Net"
        raise CheckError(what, "it is not of Stable Diffusion's kind", "use --to diffusers")
    channels, emb, last = c.channels, 4 * c.channels[0], len(c.channels) - 1

    def attention(theirs: str, ours: str, i: int, depth: int, middle: bool = False):
        cross = i in c.only_cross and not middle
        return _transformer(theirs, ours, channels[i], depth, c, cross) if depth else iter(())

    yield from _conv("input_blocks.0.0", "conv_in", c.in_channels, channels[0])
    for theirs, ours in (("time_embed.0", "linear_1"), ("time_embed.2", "linear_2")):
        inner = channels[0] if ours == "linear_1" else emb
        yield from _layer(theirs, f"time_embedding.{ours}", (emb, inner))
    if c.guidance_dim:  # no other tool has a name for it in this layout
        name, shape = "time_embedding.cond_proj.weight", (channels[0], c.guidance_dim)
        yield Rule(name, (name,), shape)
    if c.num_classes:
        shape = (c.num_classes, emb)
        yield Rule("label_emb.weight", ("class_embedding.weight",), shape)
    if c.vector_dim:
        yield from _layer("label_emb.0.0", f"{c.vector_name}.linear_1", (emb, c.vector_dim))
        yield from _layer("label_emb.0.2", f"{c.vector_name}.linear_2", (emb, emb))

    before, skips, block = channels[0], [channels[0]], count(1)
    for i, (width, depths) in enumerate(zip(channels, c.down_depths, strict=True)):
        for j, depth in enumerate(depths):
            theirs, ours = f"input_blocks.{next(block)}", f"down_blocks.{i}"
            yield from _resnet(f"{theirs}.0", f"{ours}.resnets.{j}", before, width, emb)
            yield from attention(f"{theirs}.1", f"{ours}.attentions.{j}", i, depth)
            before = width
            skips.append(width)
        if i < last:
            theirs = f"input_blocks.{next(block)}.0.op"
            yield from _conv(theirs, f"down_blocks.{i}.downsamplers.0.conv", width, width)
            skips.append(width)

    middle = count(0)
    for j in range(c.mid_blocks):
        theirs, ours = f"middle_block.{next(middle)}", f"mid_block.resnets.{j}"
        yield from _resnet(theirs, ours, before, before, emb)
        if c.mid_depth and j + 1 < c.mid_blocks:
            theirs, ours = f"middle_block.{next(middle)}", f"mid_block.attentions.{j}"
            yield from attention(theirs, ours, last, c.mid_depth, middle=True)

    block = count(0)
    for i in range(last, -1, -1):
        width, depths = channels[i], c.up_depths[i]
        for j, depth in enumerate(depths):
            theirs, ours = f"output_blocks.{next(block)}", f"up_blocks.{last - i}"
            inner = before + skips.pop()
            yield from _resnet(f"{theirs}.0", f"{ours}.resnets.{j}", inner, width, emb)
            yield from attention(f"{theirs}.1", f"{ours}.attentions.{j}", i, depth)
            before = width
            if i and j + 1 == len(depths):
                theirs = f"{theirs}.{2 if depth else 1}.conv"
                yield from _conv(theirs, f"{ours}.upsamplers.0.conv", width, width)
    yield from _layer("out.0", "conv_norm_out", (channels[0],))
    yield from _conv("out.2", "conv_out", channels[0], c.out_channels)


# --- the autoencoder -------------------------------------------------------------------------


def _vae_resnet(theirs: str, ours: str, inner: int, width: int) -> Iterator[Rule]:
    yield from _layer(f"{theirs}.norm1", f"{ours}.norm1", (inner,))
    yield from _conv(f"{theirs}.conv1", f"{ours}.conv1", inner, width)
    yield from _layer(f"{theirs}.norm2", f"{ours}.norm2", (width,))
    yield from _conv(f"{theirs}.conv2", f"{ours}.conv2", width, width)
    if inner != width:
        yield from _conv(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut", inner, width, 1)


def _vae_middle(side: str, width: int, attends: bool) -> Iterator[Rule]:
    theirs, ours = f"{side}.mid", f"{side}.mid_block"
    for j in (0, 1):
        yield from _vae_resnet(f"{theirs}.block_{j + 1}", f"{ours}.resnets.{j}", width, width)
    if attends:
        theirs, ours = f"{theirs}.attn_1", f"{ours}.attentions.0"
        yield from _layer(f"{theirs}.norm", f"{ours}.group_norm", (width,))
        layers = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        for layer, renamed in layers.items():
            shape = (width, width)
            yield from _layer(f"{theirs}.{layer}", f"{ours}.{renamed}", shape, op="reshape")


def vae_rules(c: VaeConfig) -> Iterator[Rule]:
    """An autoencoder's table; CheckError if LDM's code cannot build it. Levels on the way up count
    from the deepest in ours, and from full resolution in theirs."""
    if c.patch > 1:
        what = "LDM's single files cannot hold this model"
        raise CheckError(what, "its autoencoder folds pixels into channels")
    widths, last = c.widths, len(c.widths) - 1
    for side, outer, inner in (
        ("encoder", c.channels, 2 * c.latent_channels),
        ("decoder", c.channels, c.latent_channels),
    ):
        encodes = side == "encoder"
        first, final = (outer, inner) if encodes else (inner, outer)
        order = range(last + 1) if encodes else range(last, -1, -1)
        before = widths[order[0]]
        yield from _conv(f"{side}.conv_in", f"{side}.conv_in", first, before)
        if not encodes:
            yield from _vae_middle(side, before, c.mid_attention)
        way = "down" if encodes else "up"
        for i, level in enumerate(order):
            theirs, ours = f"{side}.{way}.{level}", f"{side}.{way}_blocks.{i}"
            for j in range(c.blocks + (not encodes)):
                names = (f"{theirs}.block.{j}", f"{ours}.resnets.{j}")
                yield from _vae_resnet(*names, before, widths[level])
                before = widths[level]
            if i < last:
                names = (f"{theirs}.{way}sample.conv", f"{ours}.{way}samplers.0.conv")
                yield from _conv(*names, before, before)
        if encodes:
            yield from _vae_middle(side, before, c.mid_attention)
        yield from _layer(f"{side}.norm_out", f"{side}.conv_norm_out", (before,))
        yield from _conv(f"{side}.conv_out", f"{side}.conv_out", before, final)
    if c.quant_conv:
        for name, width in (("quant_conv", 2), ("post_quant_conv", 1)):
            yield from _conv(name, name, width * c.latent_channels, width * c.latent_channels, 1)


# --- text encoders ---------------------------------------------------------------------------


def clip_rules(c: TextConfig) -> Iterator[Rule]:
    """The table of a text encoder under transformers' names, which are difftool's too."""
    for rule in openclip_rules(c):
        for name in rule.ours:
            yield Rule(name, (name,), rule.shape)


def openclip_rules(c: TextConfig) -> Iterator[Rule]:
    """The table of a text encoder under OpenCLIP's names."""
    width, ours = c.width, "text_model.embeddings"
    shape = (c.vocab_size, width)
    yield Rule("token_embedding.weight", (f"{ours}.token_embedding.weight",), shape)
    name = f"{ours}.position_embedding.weight"
    yield Rule("positional_embedding", (name,), (c.length, width))
    yield from _blocks("text_model", c.layers, width, c.mlp)
    yield from _layer("ln_final", "text_model.final_layer_norm", (width,))
    if c.projection is not None:
        name = ("text_projection.weight",)
        yield Rule("text_projection", name, (c.projection, width), "transpose")


def _blocks(ours: str, layers: int, width: int, mlp: int) -> Iterator[Rule]:
    """The transformer of one of OpenCLIP's towers."""
    for i in range(layers):
        theirs, place = f"transformer.resblocks.{i}", f"{ours}.encoder.layers.{i}"
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            names = tuple(f"{place}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Rule(f"{theirs}.attn.in_proj_{kind}", names, shape, "stack")
        for layer, renamed, shape in (
            ("attn.out_proj", "self_attn.out_proj", (width, width)),
            ("ln_1", "layer_norm1", (width,)),
            ("ln_2", "layer_norm2", (width,)),
            ("mlp.c_fc", "mlp.fc1", (mlp, width)),
            ("mlp.c_proj", "mlp.fc2", (width, mlp)),
        ):
            yield from _layer(f"{theirs}.{layer}", f"{place}.{renamed}", shape)


def vision_rules(c: VisionConfig) -> Iterator[Rule]:
    """The table of a picture encoder under OpenCLIP's names, which are OpenAI's too."""
    width, ours = c.width, "vision_model"
    name = f"{ours}.embeddings.patch_embedding.weight"
    yield Rule("class_embedding", (f"{ours}.embeddings.class_embedding",), (width,))
    yield Rule("conv1.weight", (name,), (width, 3, c.patch, c.patch))
    places = (c.size // c.patch) ** 2 + 1
    name = f"{ours}.embeddings.position_embedding.weight"
    yield Rule("positional_embedding", (name,), (places, width))
    yield from _layer("ln_pre", f"{ours}.pre_layrnorm", (width,))
    yield from _blocks(ours, c.layers, width, c.mlp)
    yield from _layer("ln_post", f"{ours}.post_layernorm", (width,))
    yield Rule("proj", ("visual_projection.weight",), (c.projection, width), "transpose")
