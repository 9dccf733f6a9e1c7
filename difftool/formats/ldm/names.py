"""Names of the tensors of a whole model in LDM's single files <-> ours. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from difftool.config.kinds import EncoderConfig, NetworkConfig
from difftool.config.networks import TextConfig
from difftool.config.schema import Preset
from difftool.errors import CheckError
from difftool.formats.layouts import CODECS, encoder_rules, network_rules
from difftool.formats.model_source import EMA
from difftool.formats.rules import Rule, placed

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Before LDM's names of the tensors of those networks."""
AVERAGED = "model_ema."
AVERAGE = f"{AVERAGED}diffusion_model"
OLD_TEXT = re.compile(
    r"((?:cond_stage_model|conditioner\.embedders\.\d)\.transformer\.)"
    r"(?:embeddings|encoder|final_layer_norm)\."
)
"""Names of text encoders from before, and after, transformers put text_model. in them."""
VAE_ATTENTION = re.compile(
    rf"({re.escape(VAE)}(?:en|de)coder\.mid\.attn_1\.)(to_q|to_k|to_v|to_out\.0|group_norm)\."
)
"""Names of diffusers' that a converter has left in an autoencoder's attention, and LDM's."""
VAE_LAYERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
WORDS = re.compile(
    r"((?:in|out)put_blocks)(\d+)(\d)|(label_emb)(\d)(\d)|(\d+)|(input_blocks|output_blocks|"
    r"middle_block|time_embed|label_emb|in_layers|out_layers|emb_layers|skip_connection|"
    r"transformer_blocks|attn[12]|norm[123]?|to_out|to_[qkv]|ff|net|proj_in|proj_out|proj|out|op|"
    r"conv|weight|bias)"
)
"""What the names of a U-Net's tensors are made of, where the dots between them are lost."""


def usual_names(names: Iterable[str]) -> dict[str, str]:
    """The names that difftool writes, by those that other tools have written. Of a file that has
    only averaged weights of its U-Net these have the names of the live ones."""
    names = list(names)
    bare_vae = not any(name.startswith(VAE) for name in names)
    averaged = is_averaged(names)
    vector = f"{UNET}label_emb.0.0.weight" in names or f"{AVERAGE}label_emb00weight" in names
    found = {}
    for name in names:
        usual = (averaged and live_name(name)) or name
        if bare_vae and usual.startswith("vae."):
            usual = VAE + usual.removeprefix("vae.")
        if layer := VAE_ATTENTION.match(usual):
            usual = f"{layer[1]}{VAE_LAYERS[layer[2]]}.{usual[layer.end() :]}"
        for side in ("encoder.quant_conv", "decoder.post_quant_conv"):
            if usual.startswith(f"{VAE}{side}."):
                usual = VAE + usual.removeprefix(VAE).partition(".")[2]
        if not vector and usual.startswith("conditioner.embedders.0."):
            usual = "cond_stage_model." + usual.removeprefix("conditioner.embedders.0.")
        if found_old := OLD_TEXT.match(usual):
            usual = f"{found_old[1]}text_model.{usual.removeprefix(found_old[1])}"
        usual = usual.replace("text_projection.weight.weight", "text_projection.weight")
        if usual.endswith(".model.text_projection.weight"):
            usual = usual.removesuffix(".weight")
        found[name] = usual
    return found


def ema_name(name: str) -> str:
    """The averaged tensor's name in LDM's files, which has no dots left."""
    return AVERAGED + name.removeprefix("model.").replace(".", "")


def is_averaged(names: Iterable[str]) -> bool:
    """Whether a U-Net is there by its averaged weights alone."""
    return any(n.startswith(AVERAGE) for n in names) and not any(n.startswith(UNET) for n in names)


def live_name(name: str) -> str | None:
    """The inverse of `ema_name`; None for what is no U-Net's."""
    words = (
        word for match in WORDS.finditer(name.removeprefix(AVERAGE)) for word in match.groups()
    )
    live = UNET + ".".join(word for word in words if word)
    return live if ema_name(live) == name else None


def text_places(network: NetworkConfig, text: tuple[EncoderConfig, ...]) -> list[tuple[str, bool]]:
    """The prefix of each text encoder, and whether its names are OpenCLIP's."""
    xl = bool(network.vector_dim) and any(t.pooled for t in text)
    if len(text) == 1 and not xl:
        openclip = isinstance(text[0], TextConfig) and text[0].activation == "gelu"
        return [(f"cond_stage_model.{'model' if openclip else 'transformer'}.", openclip)]
    return [
        (f"conditioner.embedders.{i}.{'model' if t.pooled else 'transformer'}.", t.pooled)
        for i, t in enumerate(text)
    ]


def model_rules(preset: Preset) -> list[Rule]:
    """The table of a whole model; CheckError if LDM's layout cannot hold it."""
    what = "LDM's single files cannot hold this model"
    if preset.codec.kind not in CODECS:
        raise CheckError(what, f"its codec is {preset.codec.kind}", "use --to diffusers")
    codec = [*placed(CODECS[preset.codec.kind].rules(preset.codec), VAE, "vae.")]
    rules = [*placed(network_rules(preset.unet), UNET, "unet."), *codec]
    for i, (prefix, openclip) in enumerate(text_places(preset.unet, preset.text)):
        rules += placed(encoder_rules(preset.text[i], openclip), prefix, f"text.{i}.")
    return rules


def ema_rules(rules: Iterable[Rule]) -> Iterator[Rule]:
    """The table of the U-Net's averaged weights."""
    for rule in rules:
        if rule.theirs.startswith(UNET):
            names = tuple(f"{EMA}{name}" for name in rule.ours)
            yield rule._replace(theirs=ema_name(rule.theirs), ours=names)
