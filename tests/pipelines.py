"""Small pipelines of diffusers of every family, of random weights: the oracle of whole pictures."""

from __future__ import annotations

import json
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import published
import torch
from torch import nn

from difftool.config.networks import TextConfig
from difftool.formats.diffusers.tokenizers import tokenizer_files

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers: Any = import_module("diffusers")
    transformers: Any = import_module("transformers")

SD_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading",
    "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip
V = {"prediction_type": "v_prediction"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TRAILING = {"timestep_spacing": "trailing"}
WORDS = "a fox on a hill, red and blue"


def scaled(module: nn.Module, seed: int, gain: float = 1.0) -> Any:
    """Weights of some size everywhere, so that every part of a network shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            fan = parameter[0].numel() if "embedding" not in name else 4
            deviation = gain * fan**-0.5
        else:
            deviation = 0.1
        noise = deviation * torch.randn(parameter.shape, generator=generator)
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1 + noise if norm else noise
    return module.eval().requires_grad_(False)


def tokenizer(folder: Path, pad: int | None) -> Any:
    """CLIP's, padding with the end mark or with "!"."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer_files(TextConfig(pad_id=pad)).items():
        (folder / name).write_text(text, encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def text(
    seed: int,
    width: int,
    layers: int,
    act: str,
    projection: int | None = None,
    *,
    widening: int = 2,
    head: int = 8,
) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=widening * width, num_hidden_layers=layers,
        num_attention_heads=width // head, hidden_act=act, projection_dim=projection or width,
        bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return scaled(kind(config), seed)


def unet(seed: int, **config: Any) -> Any:
    """Two levels, attention at the second; as many heads and groups as single files imply."""
    values = {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (32, 64), "cross_attention_dim": 24, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 32,
    } | config  # fmt: skip
    made = scaled(diffusers.UNet2DConditionModel(**values), seed, 0.8)
    for name, parameter in made.named_parameters():
        if "attn2.to_out.0.weight" in name:
            parameter.data *= 8  # what is told shows
    return made


def vae(seed: int = 9, scale: float = 0.18215) -> Any:
    """Four times smaller latents, whose pictures have contrast."""
    made = scaled(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4,
            norm_num_groups=8, sample_size=64, scaling_factor=scale,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        seed,
    )  # fmt: skip
    made.decoder.conv_out.weight.data *= 0.6
    made.decoder.conv_out.bias.data.zero_()
    return made


SDXL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 20 + 6 * 256, "cross_attention_dim": 24 + 40,
    "attention_head_dim": (1, 2), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}  # fmt: skip
REFINER = SDXL | {
    "projection_class_embeddings_input_dim": 20 + 5 * 256, "cross_attention_dim": 40,
}  # fmt: skip
SD2 = {"cross_attention_dim": 40, "attention_head_dim": (1, 2), "use_linear_projection": True}


def build(family: str, folder: Path) -> Any:
    """The pipeline of a family, saved into the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = _build(family, folder)
        # Published files keep fields of other classes too, which from_config hands on.
        pipe.scheduler.register_to_config(**SD_SCHEDULER | dict(pipe.scheduler.config))
        pipe.save_pretrained(folder / family)
        pipe.set_progress_bar_config(disable=True)
    index = json.loads((folder / family / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == type(pipe).__name__
    return pipe


def _build(family: str, folder: Path) -> Any:
    plain = tokenizer(folder / "plain", None)
    marked = tokenizer(folder / "marked", 0)
    base: dict[str, Any] = {"vae": vae(), "safety_checker": None, "feature_extractor": None}
    sd1 = base | {
        "tokenizer": plain, "text_encoder": text(1, 24, 2, "quick_gelu"),
        "scheduler": diffusers.PNDMScheduler(**_of(diffusers.PNDMScheduler, SD_SCHEDULER)),
        "requires_safety_checker": False,
    }  # fmt: skip
    sd2 = sd1 | {"tokenizer": marked, "text_encoder": text(2, 40, 3, "gelu")}
    xl = {
        "vae": vae(scale=0.13025), "tokenizer": plain, "tokenizer_2": marked,
        "text_encoder": text(1, 24, 2, "quick_gelu"),
        "text_encoder_2": text(2, 40, 3, "gelu", 20),
        "scheduler": diffusers.EulerDiscreteScheduler(
            **_of(diffusers.EulerDiscreteScheduler, SD_SCHEDULER)),
        "add_watermarker": False,
    }  # fmt: skip
    match family:
        case "sd1":
            return diffusers.StableDiffusionPipeline(unet=unet(3), **sd1)
        case "sd2-v" | "sd2-zsnr":
            told = SD_SCHEDULER | (V if family == "sd2-v" else ZERO_SNR)
            sd2["scheduler"] = diffusers.DDIMScheduler(**_of(diffusers.DDIMScheduler, told))
            return diffusers.StableDiffusionPipeline(unet=unet(4, **SD2), **sd2)
        case "sdxl":
            return diffusers.StableDiffusionXLPipeline(unet=unet(5, **SDXL), **xl)
        case "sdxl-turbo":
            told = SD_SCHEDULER | TRAILING
            kind = diffusers.EulerAncestralDiscreteScheduler
            xl["scheduler"] = kind(**_of(kind, told))
            return diffusers.StableDiffusionXLPipeline(unet=unet(5, **SDXL), **xl)
        case "refiner":
            xl |= {"tokenizer": None, "text_encoder": None, "requires_aesthetics_score": True}
            xl["force_zeros_for_empty_prompt"] = False
            return diffusers.StableDiffusionXLImg2ImgPipeline(unet=unet(6, **REFINER), **xl)
        case "lcm":
            sd1["scheduler"] = diffusers.LCMScheduler(**_of(diffusers.LCMScheduler, SD_SCHEDULER))
            net = unet(3, time_cond_proj_dim=16)
            return diffusers.LatentConsistencyModelPipeline(unet=net, **sd1)
        case "inpaint":
            return diffusers.StableDiffusionInpaintPipeline(unet=unet(7, in_channels=9), **sd1)
        case "pix2pix":
            kind = diffusers.StableDiffusionInstructPix2PixPipeline
            return kind(unet=unet(8, in_channels=8), **sd1)
        case "unclip":
            return _unclip(sd2)
        case "unclip-text":
            return _unclip_text(sd2, plain)
    raise ValueError(family)


def build_whole(family: str, folder: Path) -> Any:
    """The pipeline of a family at its published size: sd15, sd21-v or sdxl."""
    told = SD_SCHEDULER | (V if family == "sd21-v" else {})
    whole = partial(text, widening=4, head=64)
    clip_l = {"width": 768, "layers": 12, "act": "quick_gelu"}
    xl = family == "sdxl"
    codec = published.VAE | {"scaling_factor": 0.13025 if xl else 0.18215}
    parts: dict[str, Any] = {
        "vae": scaled(published.build(codec), 9),
        "scheduler": diffusers.DDIMScheduler(**_of(diffusers.DDIMScheduler, told)),
    }  # fmt: skip
    parts["vae"].decoder.conv_out.weight.data *= 0.6
    words = {pad: tokenizer(folder / f"words-{pad}", pad) for pad in (None, 0)}
    if xl:
        parts |= {
            "text_encoder": whole(1, **clip_l), "tokenizer": words[None],
            "text_encoder_2": whole(2, width=1280, layers=32, act="gelu", projection=1280),
            "tokenizer_2": words[0], "unet": scaled(published.build(published.SDXL), 3, 0.8),
        }  # fmt: skip
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        first = family == "sd15"
        clip_h = {"width": 1024, "layers": 23, "act": "gelu"}
        parts |= {
            "text_encoder": whole(1, **(clip_l if first else clip_h)),
            "tokenizer": words[None if first else 0],
            "unet": scaled(published.build(published.SD1 if first else published.SD2), 3, 0.8),
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
        }  # fmt: skip
        pipe = diffusers.StableDiffusionPipeline(**parts)
    pipe.save_pretrained(folder / family, max_shard_size="1GB")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unclip(sd2: dict[str, Any]) -> Any:
    vision = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, projection_dim=20, hidden_act="gelu",
        )
    )  # fmt: skip
    return diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        image_encoder=scaled(vision, 11),
        **_told_pictures(sd2),
    )


def _told_pictures(sd2: dict[str, Any]) -> dict[str, Any]:
    """What both of the unCLIP pipelines have, told embeddings that are 20 wide."""
    stable = "diffusers.pipelines.stable_diffusion"
    normal: Any = import_module(f"{stable}.stable_unclip_image_normalizer")
    normalizer = normal.StableUnCLIPImageNormalizer(20)
    normalizer.mean.data = torch.linspace(-1, 1, 20)[None]
    normalizer.std.data = torch.linspace(0.5, 1.5, 20)[None]
    net = unet(4, **SD2, class_embed_type="projection", projection_class_embeddings_input_dim=40)
    told = SD_SCHEDULER | V
    return {
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": sd2["tokenizer"], "text_encoder": sd2["text_encoder"], "unet": net,
        "vae": sd2["vae"],
        "scheduler": diffusers.DDIMScheduler(**_of(diffusers.DDIMScheduler, told)),
    }  # fmt: skip


PRIOR_SCHEDULER: dict[str, Any] = {
    "variance_type": "fixed_small_log", "clip_sample": True, "clip_sample_range": 5.0,
    "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2",
}  # fmt: skip
"""karlo's."""


def prior_parts(words: Any, width: int = 20) -> dict[str, Any]:
    """A prior with its text encoder, whose pooled text has another width than its tokens."""
    net = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=width,
        embedding_proj_dim=12,
    )  # fmt: skip
    scaled(net, 21)
    net.clip_mean.data = torch.linspace(-0.5, 0.5, width)[None]
    net.clip_std.data = torch.linspace(0.4, 0.8, width)[None]
    net.positional_embedding.data *= 3
    return {
        "prior_tokenizer": words,
        "prior_text_encoder": text(22, width, 2, "quick_gelu", 12, head=4),
        "prior": net,
        "prior_scheduler": diffusers.UnCLIPScheduler(**PRIOR_SCHEDULER),
    }


def _unclip_text(sd2: dict[str, Any], words: Any) -> Any:
    parts = prior_parts(words)
    parts["prior_scheduler"] = diffusers.DDPMScheduler(**PRIOR_SCHEDULER)
    return diffusers.StableUnCLIPPipeline(**parts, **_told_pictures(sd2))


def karlo(folder: Path, width: int = 20) -> dict[str, Any]:
    """What a folder of UnCLIPPipeline has of a prior, written there; and the parts."""
    parts = prior_parts(tokenizer(folder / "tokenizer", None), width)
    for name in ("prior", "prior_scheduler"):
        parts[name].save_pretrained(folder / name)
    parts["prior_text_encoder"].save_pretrained(folder / "text_encoder")
    return parts


def _of(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Those fields that a scheduler knows."""
    import inspect

    known = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in fields.items() if name in known}


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""difftool's name of a sampler, with its schedule, and what it is in diffusers."""


def reschedule(pipe: Any, sampler: str) -> None:
    """Give a pipeline that sampler, built from the scheduler that it was saved with."""
    name, more = SCHEDULERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.saved_scheduler, **more)
