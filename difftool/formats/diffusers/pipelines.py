"""The pipeline classes of diffusers that difftool knows, and what each says of its models.
Torch-free.
"""

from __future__ import annotations

from typing import NamedTuple

from difftool.config.networks import VaeConfig
from difftool.config.schema import Preset
from difftool.formats.ldm.detect import family_of


class Pipeline(NamedTuple):
    """What a pipeline class says of the models that it is for."""

    text: str = ""
    """How it reads its text encoders: "" (it has none), "sd" or "xl"."""
    guidance: float = 1.0
    steps: int = 50


PIPELINES = {
    "StableDiffusionPipeline": Pipeline("sd", 7.5),
    "StableDiffusionImg2ImgPipeline": Pipeline("sd", 7.5),
    "StableDiffusionInpaintPipeline": Pipeline("sd", 7.5),
    "StableDiffusionInstructPix2PixPipeline": Pipeline("sd", 7.5),
    "LatentConsistencyModelPipeline": Pipeline("sd", 8.5, 4),
    "LatentConsistencyModelImg2ImgPipeline": Pipeline("sd", 8.5, 4),
    "StableDiffusionXLPipeline": Pipeline("xl", 5.0),
    "StableDiffusionXLImg2ImgPipeline": Pipeline("xl", 5.0),
    "StableDiffusionXLInpaintPipeline": Pipeline("xl", 5.0),
    "StableDiffusionDepth2ImgPipeline": Pipeline("sd", 7.5),
    "StableDiffusionUpscalePipeline": Pipeline("sd", 9.0, 75),
    "StableUnCLIPImg2ImgPipeline": Pipeline("sd", 10.0, 20),
    "DDPMPipeline": Pipeline(),
    "DDIMPipeline": Pipeline(),
    "PNDMPipeline": Pipeline(),
}
"""The pipeline classes that difftool knows; no other is read."""

CLASSES_OF_FAMILIES = {
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "sd2-unclip": "StableUnCLIPImg2ImgPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
}
NEEDED = {
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    "StableUnCLIPImg2ImgPipeline": (
        *("image_encoder", "image_normalizer", "image_noising_scheduler", "feature_extractor"),
    ),
}
"""Components without which a pipeline class does not load, and that difftool does not make."""


def pipeline_class(preset: Preset) -> str:
    """The pipeline class that a model is for, or comes nearest to."""
    if not isinstance(preset.codec, VaeConfig) or not preset.text:
        return "DDPMPipeline"
    inpaints = preset.unet.in_channels == 2 * preset.codec.latent_channels + 1
    if any(encoder.pooled for encoder in preset.text):
        refiner = len(preset.text) == 1
        kind = "Img2Img" if refiner else "Inpaint" if inpaints else ""
        return f"StableDiffusionXL{kind}Pipeline"
    if preset.unet.guidance_dim:
        return "LatentConsistencyModelPipeline"
    family = family_of(preset.unet, preset.codec, preset.text)
    if family in CLASSES_OF_FAMILIES:
        return CLASSES_OF_FAMILIES[family]
    edits = preset.unet.in_channels == 2 * preset.codec.latent_channels
    kind = "Inpaint" if inpaints else "InstructPix2Pix" if edits else ""
    return f"StableDiffusion{kind}Pipeline"
