"""The families of published models: a row each, with all that the package knows of one. Torch-free.

A family is told by the structure of its networks alone. Their usual widths, and its usual way of
sampling, are its preset's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from difftool.config.kinds import CodecConfig, EncoderConfig, NetworkConfig

OWN = "difftool"
"""The family of models that no row describes: whatever difftool trains from nothing."""

CONCAT = {"none": (0, 0), "edit": (1, 0), "inpaint": (1, 1), "depth": (0, 1), "low_res": (0, 3)}
"""What joins x_t where the network takes more channels than x0 has: nothing; the latent of a
picture to edit; a mask and the latent of the masked picture; a depth map; a small picture. How many
channels that is: so many latents, and so many more."""


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
    """Its text encoders; None = whatever they are."""
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


def _convolutional(unet: Any) -> bool:
    """Told nothing beside the text, projections as 1x1 convolutions."""
    plain = not unet.num_classes and not unet.vector_dim
    return unet.attention == "transformer" and plain and not unet.linear_projection


def _linear(unet: Any) -> bool:
    """The same, projections as linear layers."""
    plain = not unet.num_classes and not unet.vector_dim
    return unet.attention == "transformer" and plain and unet.linear_projection


# --- the rows -------------------------------------------------------------------------------------

_GUIDED = {"guidance": "lcm"}


def _sd1(id: str, concat: str, **more: Any) -> Family:
    row: dict[str, Any] = {
        "fits": _convolutional, "encoders": ("clip",), "concat": concat, "heads": 8,
        "pipeline": "StableDiffusion{}Pipeline",
    }  # fmt: skip
    return Family(id=id, **row | more)


def _sd2(id: str, concat: str | None, **more: Any) -> Family:
    row: dict[str, Any] = {
        "fits": _linear, "encoders": ("openclip",), "concat": concat, "preset": "sd21",
        "variants": _GUIDED | {"v": "sd21-v"}, "pipeline": "StableDiffusion{}Pipeline",
    }  # fmt: skip
    return Family(id=id, **row | more)


def _sdxl(id: str, **more: Any) -> Family:
    row: dict[str, Any] = {
        "fits": _sized, "encoders": ("clip", "openclip"), "preset": "sdxl", "scale": 0.13025,
        "force_upcast": True, "pipeline": "StableDiffusionXL{}Pipeline",
    }  # fmt: skip
    return Family(id=id, **row | more)


FAMILIES = {
    row.id: row
    for row in (
        _sd1("sd1", "none", published=True, modelspec="stable-diffusion-v1"),
        _sd1("pix2pix", "edit"),
        _sd1("sd1-inpaint", "inpaint", modelspec="stable-diffusion-v1-inpainting"),
        _sd2(
            *("sd2", "none"),
            published=True,
            targets=("eps", "v"),
            modelspec="stable-diffusion-v2-512",
            modelspec_v="stable-diffusion-v2-768-v",
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
            path={
                **{"kind": "discrete", "schedule": "scaled_linear"},
                **{"beta_start": 1e-4, "beta_end": 0.02},
            },
            pipeline="StableDiffusionUpscalePipeline",
        ),
        _sdxl("ssd-1b", fits=_pruned, v_markers=True),
        _sdxl("sdxl-inpaint", concat="inpaint", v_markers=True, ldm_blocks=True),
        _sdxl(
            "sdxl",
            published=True,
            variants=_GUIDED | {"turbo": "sdxl-turbo"},
            modelspec="stable-diffusion-xl-v1-base",
            v_markers=True,
            ldm_blocks=True,
        ),
        _sdxl(
            "sdxl-refiner",
            published=True,
            encoders=("openclip",),
            preset="sdxl-refiner",
            modelspec="stable-diffusion-xl-v1-refiner",
            pipeline="StableDiffusionXLImg2ImgPipeline",
            ldm_blocks=True,
        ),
        Family(id="unet", fits=lambda unet: True, latent=False),
        Family(id=OWN, fine_tune_share=0.1, lora_lr=1e-3),
    )
}
"""By id; a model is of the first that its structure fits."""
PUBLISHED = {row.id: row for row in FAMILIES.values() if row.published}


def family(id: str) -> Family:
    """The row of a family; of one that a preset made up, a row with nothing special about it."""
    return FAMILIES.get(id) or Family(id=id)


def family_of(network: NetworkConfig, codec: CodecConfig, text: Sequence[EncoderConfig]) -> str:
    """The family id of a model by the structure of its networks, whatever their widths."""

    def is_of(row: Family) -> bool:
        same = row.network == network.kind and row.latent == codec.learned
        if not same or row.fits is None or not row.fits(network):
            return False
        if row.concat is not None and not _joins(row.concat, network, codec):
            return False
        reads = len(text) == len(row.encoders or ()) and all(t.tokenizer == "clip" for t in text)
        return reads or row.encoders is None

    return next((id for id, row in FAMILIES.items() if is_of(row)), OWN)
