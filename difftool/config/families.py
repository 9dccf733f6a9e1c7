"""The families of published models: a row each, with all that the package knows of one. Torch-free.

A family is told by all that its networks show: what they are told (their structure), whose text
encoders they have, how wide the context is, and the form of their transformers. Their other widths,
and its usual way of sampling, are its preset's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from difftool.config.kinds import CodecConfig, EncoderConfig, NetworkConfig
from difftool.config.networks import TextConfig, UNetConfig

OWN = "difftool"
"""The family of models that no row describes: whatever difftool trains from nothing."""

CONCAT = {"none": (0, 0), "edit": (1, 0), "inpaint": (1, 1), "depth": (0, 1), "low_res": (0, 3)}
"""What joins x_t where the network takes more channels than x0 has: nothing; the latent of a
picture to edit; a mask and the latent of the masked picture; a depth map; a small picture. How many
channels that is: so many latents, and so many more."""


LOW_RES_PATH: dict[str, Any] = {
    **{"kind": "discrete", "schedule": "scaled_linear"},
    **{"beta_start": 1e-4, "beta_end": 0.02},
}
"""By which the small picture gets its noise."""


def concat_of(network: NetworkConfig, codec: CodecConfig) -> str:
    """What joins x_t at a network's input: the first key of CONCAT with as many channels, or
    "other"."""
    return next((name for name in CONCAT if _joins(name, network, codec)), "other")


def _joins(concat: str, network: NetworkConfig, codec: CodecConfig) -> bool:
    latents, more = CONCAT[concat]
    return network.in_channels == (1 + latents) * codec.latent_channels + more


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart; the defaults are those of most."""

    id: str
    """Its name in presets, and that `convert --inspect` prints."""

    # what it is told by
    network: str = "unet"
    """Kind of its network."""
    fits: Callable[[Any], bool] | None = None
    """Whether a network of that kind has its structure; None = it is not told by structure."""
    encoders: tuple[str, ...] | None = None
    """Its text encoders, by `encoder_name`; None = whatever they are."""
    width: int | None = None
    """Of the context that its published models read."""
    linear: bool = False
    """Whether its transformers' projections are linear layers, and not 1x1 convolutions."""
    deep: bool = False
    """Whether its transformers are of several blocks each."""
    latent: bool = True
    """Whether its x0 is an autoencoder's latent."""
    concat: str | None = None
    """What joins x_t, a key of CONCAT; None = whatever does."""

    # what no tensor shows
    preset: str = "sd15"
    """The preset whose way of sampling it has."""
    variants: Mapping[str, str] = field(default_factory=lambda: {"guidance": "lcm"})
    """Presets of those whose network is told the guidance scale ("guidance"), whose metadata call
    them "turbo", or that predict "v"."""
    scale: float = 0.18215
    """Of its latents."""
    force_upcast: bool = False
    """Whether its autoencoder overflows fp16."""
    heads: int | None = None
    """Attention heads of each level; None = as many as are 64 channels wide."""
    targets: tuple[str, ...] = ("eps",)
    """What its models predict, the usual target first."""
    path: Mapping[str, Any] = field(default_factory=dict)
    """Its noise path, where it has one of its own."""
    vision: bool = False
    """Whether the embedding of a picture conditions it."""

    # its names elsewhere
    published: bool = False
    """Whether its preset has its very networks, with which unknown files and LoRAs are compared."""
    pipeline: str = ""
    """Its class in diffusers; {} stands for the task that goes with what joins x_t."""
    needs: tuple[str, ...] = ()
    """Components without which that class does not load, and that difftool does not make."""
    modelspec: str = ""
    """Its architecture in ModelSpec's metadata, where there is a word."""
    modelspec_v: str = ""
    """The same of its models that predict v, where that is another."""
    base_version: str = ""
    """How sd-scripts' word for it, of what a LoRA was trained on, begins."""
    v_markers: bool = False
    """Whether other tools know its v-models by empty tensors."""
    ldm_blocks: bool = False
    """Whether kohya's scripts number its LoRAs' blocks as LDM does, and not as diffusers."""

    # how gently it is trained further
    fine_tune_share: float | None = None
    """Share of the recipe's learning rate; None = `fine_tune_lr` whatever the recipe's is."""
    fine_tune_lr: float = 1e-5
    lora_lr: float = 1e-4

    def preset_for(self, *traits: str) -> str:
        """The preset of a model with traits ("guidance", "turbo", "v"), the first that has one."""
        return next((self.variants[t] for t in traits if t in self.variants), self.preset)


# --- structures of U-Nets -------------------------------------------------------------------------


def _labelled(unet: Any) -> bool:
    """Told a number: of the small picture's noise."""
    return unet.attention == "transformer" and bool(unet.num_classes)


def _pictured(unet: Any) -> bool:
    """Told the embedding of a picture."""
    told = bool(unet.vector_dim) and unet.vector_name == "class_embedding"
    return unet.attention == "transformer" and told and not unet.num_classes


def _sized(unet: Any) -> bool:
    """Told sizes and the pooled text."""
    told = bool(unet.vector_dim) and unet.vector_name == "add_embedding"
    return unet.attention == "transformer" and told and not unet.num_classes


def _pruned(unet: Any) -> bool:
    """As `_sized`, with blocks left out or half as deep as they are wide."""
    rows = (*unet.down_depths, *unet.up_depths)
    regular = unet.mid_blocks == 2 and all(len(set(row)) == 1 for row in rows)
    regular = regular and [r[0] for r in unet.down_depths] == [r[0] for r in unet.up_depths]
    halved = unet.mid_depth < 10 and unet.channels == (320, 640, 1280)
    return _sized(unet) and (not regular or halved)


def _plain(unet: Any) -> bool:
    """Told nothing beside the text."""
    return unet.attention == "transformer" and not unet.num_classes and not unet.vector_dim


# --- the rows -------------------------------------------------------------------------------------

_GUIDED = {"guidance": "lcm"}


def _sd1(id: str, concat: str, **more: Any) -> Family:
    row: dict[str, Any] = {
        "fits": _plain, "encoders": ("clip",), "width": 768, "concat": concat, "heads": 8,
        "pipeline": "StableDiffusion{}Pipeline",
    }  # fmt: skip
    return Family(id=id, **row | more)


def _sd2(id: str, concat: str | None, **more: Any) -> Family:
    row: dict[str, Any] = {
        "fits": _plain, "encoders": ("openclip",), "width": 1024, "linear": True,
        "concat": concat, "preset": "sd21", "variants": _GUIDED | {"v": "sd21-v"},
        "pipeline": "StableDiffusion{}Pipeline",
    }  # fmt: skip
    return Family(id=id, **row | more)


def _sdxl(id: str, **more: Any) -> Family:
    row: dict[str, Any] = {
        "fits": _sized, "encoders": ("clip", "openclip"), "width": 2048, "linear": True,
        "deep": True, "preset": "sdxl", "scale": 0.13025, "force_upcast": True,
        "pipeline": "StableDiffusionXL{}Pipeline",
    }  # fmt: skip
    return Family(id=id, **row | more)


FAMILIES = {
    row.id: row
    for row in (
        _sd1(
            *("sd1", "none"),
            published=True,
            modelspec="stable-diffusion-v1",
            base_version="sd_v1",
        ),
        _sd1("pix2pix", "edit"),
        _sd1("sd1-inpaint", "inpaint", modelspec="stable-diffusion-v1-inpainting"),
        _sd2(
            *("sd2", "none"),
            published=True,
            targets=("eps", "v"),
            modelspec="stable-diffusion-v2-512",
            modelspec_v="stable-diffusion-v2-768-v",
            base_version="sd_v2",
        ),
        _sd2("sd2-inpaint", "inpaint", modelspec="stable-diffusion-v2-inpainting"),
        _sd2(
            *("sd2-depth", "depth"),
            modelspec="stable-diffusion-v2-depth",
            pipeline="StableDiffusionDepth2ImgPipeline",
            needs=("depth_estimator", "feature_extractor"),
        ),
        _sd2(
            *("sd2-unclip", None),
            fits=_pictured,
            vision=True,
            targets=("v",),
            modelspec="stable-diffusion-v2-unclip-h",
            pipeline="StableUnCLIPImg2ImgPipeline",
            needs=(
                *("image_encoder", "image_normalizer", "image_noising_scheduler"),
                "feature_extractor",
            ),
        ),
        _sd2(
            *("x4-upscaler", "low_res"),
            fits=_labelled,
            scale=0.08333,
            heads=8,
            targets=("v",),
            path=LOW_RES_PATH,
            pipeline="StableDiffusionUpscalePipeline",
        ),
        _sdxl("ssd-1b", fits=_pruned, v_markers=True),
        _sdxl("sdxl-inpaint", concat="inpaint", v_markers=True, ldm_blocks=True),
        _sdxl(
            "sdxl",
            published=True,
            variants=_GUIDED | {"turbo": "sdxl-turbo"},
            modelspec="stable-diffusion-xl-v1-base",
            base_version="sdxl",
            v_markers=True,
            ldm_blocks=True,
        ),
        _sdxl(
            "sdxl-refiner",
            published=True,
            encoders=("openclip",),
            width=1280,
            preset="sdxl-refiner",
            modelspec="stable-diffusion-xl-v1-refiner",
            pipeline="StableDiffusionXLImg2ImgPipeline",
            ldm_blocks=True,
        ),
        Family(id="unet", fits=lambda unet: True, latent=False),
        Family(id="unclip-prior", network="prior", fits=lambda prior: True, latent=False),
        Family(id=OWN, fine_tune_share=0.1, lora_lr=1e-3),
    )
}
"""By id; a model is of the first that its structure fits, and that nothing fits better."""
PUBLISHED = {row.id: row for row in FAMILIES.values() if row.published}


def family(id: str) -> Family:
    """The row of a family; of one that a preset made up, a row with nothing special about it."""
    return FAMILIES.get(id) or Family(id=id)


def encoder_name(config: EncoderConfig) -> str:
    """Whose text encoder one is by its activation: OpenAI's ("clip"), OpenCLIP's ("openclip")."""
    gelu = isinstance(config, TextConfig) and config.activation == "gelu"
    return "openclip" if gelu else "clip"


def has_structure(
    row: Family, network: NetworkConfig, codec: CodecConfig, text: Sequence[EncoderConfig]
) -> bool:
    """Whether networks are told what a family's are, by as many text encoders, and make what its
    make."""
    same = row.network == network.kind and row.latent == codec.learned
    if not same or row.fits is None or not row.fits(network):
        return False
    if row.concat is not None and not _joins(row.concat, network, codec):
        return False
    reads = len(text) == len(row.encoders or ()) and all(t.tokenizer == "clip" for t in text)
    return reads or row.encoders is None


class Verdict(NamedTuple):
    """Of which family a model is."""

    id: str
    conflicts: tuple[str, ...] = ()
    """What another family's networks have: it is doubtful whether it is a model of this one."""
    odd: tuple[str, ...] = ()
    """In what form its layers differ from the family's, though they can compute the same."""


def judge(network: NetworkConfig, codec: CodecConfig, text: Sequence[EncoderConfig]) -> Verdict:
    """The family of a model by all that its networks show, whatever else their widths are."""
    best, least = Verdict(OWN), None
    for row in FAMILIES.values():
        if has_structure(row, network, codec, text):
            found = Verdict(row.id, *_differences(row, network, text))
            weight = 2 * len(found.conflicts) + len(found.odd)
            if least is None or weight < least:
                best, least = found, weight
    return best


def family_of(network: NetworkConfig, codec: CodecConfig, text: Sequence[EncoderConfig]) -> str:
    """The family id of a model; see `judge`."""
    return judge(network, codec, text).id


def _differences(
    row: Family, network: NetworkConfig, text: Sequence[EncoderConfig]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """In what a model of a family's structure is not as its models are: what is another's, and what
    is but another form."""
    if row.encoders is None or not isinstance(network, UNetConfig):
        return (), ()
    conflicts, odd = [], []
    names = tuple(map(encoder_name, text))
    if names != row.encoders:
        conflicts.append(
            f"its text encoder is {' and '.join(names)}, not {' and '.join(row.encoders)}"
        )
    width = network.context_dim
    if width != row.width and any(width == other.width for other in FAMILIES.values()):
        conflicts.append(f"its context is {width} wide, not {row.width}")
    if network.linear_projection != row.linear:
        forms = ("1x1 convolutions", "linear layers")
        odd.append(f"its projections are {forms[network.linear_projection]}")
    depths = [depth for row in (*network.down_depths, *network.up_depths) for depth in row]
    if (max(*depths, network.mid_depth) > 1) != row.deep:
        odd.append(f"its transformers are of {'one block' if row.deep else 'several blocks'} each")
    return tuple(conflicts), tuple(odd)
