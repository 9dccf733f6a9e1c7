"""The pipeline classes of diffusers that difftool knows, and what each says of its models.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from difftool.config.families import FAMILIES, Family, concat_of, family, family_of
from difftool.config.schema import Preset


class PipelineClass(NamedTuple):
    """What a pipeline class says of the models that it is for."""

    text: str = ""
    """How it reads its text encoders: "" (it has none), "sd" or "xl"."""
    guidance: float = 1.0
    steps: int = 50
    scheduler: Mapping[str, Any] = {}
    """Fields that it gives its scheduler, whatever the file of that says or does not say."""
    vae: Mapping[str, Any] = {}
    """Fields that it gives its autoencoder."""
    old_sizes: bool = False
    """Whether it takes a sample_size under 64 for a mistake in files older than diffusers 0.9."""


_OFFSET = {"steps_offset": 1}
_UNCLIPPED = _OFFSET | {"clip_sample": False}
_ONE_START = _OFFSET | {"skip_prk_steps": True}
_X4 = {"scaling_factor": 0.08333}

PIPELINES = {
    "StableDiffusionPipeline": PipelineClass("sd", 7.5, 50, _UNCLIPPED, old_sizes=True),
    "StableDiffusionImg2ImgPipeline": PipelineClass("sd", 7.5, 50, _UNCLIPPED, old_sizes=True),
    "StableDiffusionInpaintPipeline": PipelineClass("sd", 7.5, 50, _ONE_START, old_sizes=True),
    "StableDiffusionInstructPix2PixPipeline": PipelineClass("sd", 7.5, 100),
    "LatentConsistencyModelPipeline": PipelineClass("sd", 8.5, 4),
    "LatentConsistencyModelImg2ImgPipeline": PipelineClass("sd", 8.5, 4),
    "StableDiffusionXLPipeline": PipelineClass("xl", 5.0),
    "StableDiffusionXLImg2ImgPipeline": PipelineClass("xl", 5.0),
    "StableDiffusionXLInpaintPipeline": PipelineClass("xl", 7.5),
    "StableDiffusionDepth2ImgPipeline": PipelineClass("sd", 7.5, old_sizes=True),
    "StableDiffusionUpscalePipeline": PipelineClass("sd", 9.0, 75, vae=_X4),
    "StableUnCLIPImg2ImgPipeline": PipelineClass("sd", 10.0, 20),
    "StableUnCLIPPipeline": PipelineClass("sd", 10.0, 20),
    "DDPMPipeline": PipelineClass(steps=1000),
    "DDIMPipeline": PipelineClass(scheduler={"_class_name": "DDIMScheduler"}),
    "PNDMPipeline": PipelineClass(scheduler={"_class_name": "PNDMScheduler"}),
}
"""The pipeline classes that difftool knows; no other is read."""
TASKS = {"inpaint": "Inpaint", "edit": "InstructPix2Pix"}
"""Words in the names of classes for what joins x_t."""


def pipeline_family(preset: Preset) -> Family:
    """The family whose pipeline a model is for, or comes nearest to by how its text is read."""
    row = family(family_of(preset.unet, preset.codec, preset.text))
    if row.pipeline or not preset.codec.learned or not preset.text:
        return row
    if not any(encoder.pooled for encoder in preset.text):
        return FAMILIES["sd1"]
    return FAMILIES["sdxl-refiner" if len(preset.text) == 1 else "sdxl"]


def pipeline_class(preset: Preset) -> str:
    """The pipeline class that a model is for, or comes nearest to."""
    pattern = pipeline_family(preset).pipeline
    if not pattern:
        return "DDPMPipeline"
    if preset.unet.guidance_dim and not any(encoder.pooled for encoder in preset.text):
        return "LatentConsistencyModelPipeline"
    name = pattern.format(TASKS.get(concat_of(preset.unet, preset.codec), ""))
    return name if name in PIPELINES else pattern.format("")
