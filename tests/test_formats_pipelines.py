"""diffusers' pipelines that have more than difftool's networks: depth, upscaler, unCLIP."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert
from safetensors.torch import load_file

from difftool.config.networks import TextConfig
from difftool.config.validate import build_preset
from difftool.formats import open_model
from difftool.formats.diffusers.tokenizers import tokenizer_files

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    oracle: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    normalizers: Any = importlib.import_module(
        "diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer"
    )
    oracle.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FAMILIES = ["sd2-depth", "x4-upscaler", "sd2-unclip"]
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pipeline(name: str, folder: Path) -> Any:
    """A small pipeline of a family, as diffusers makes it."""
    torch.manual_seed(0)
    for file, text in tokenizer_files(TextConfig(pad_id=0)).items():
        (folder / file).write_text(text, encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            projection_dim=32, hidden_act="gelu",
        )
    )  # fmt: skip
    vae = oracle.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    special: dict[str, Any] = {
        "sd2-depth": {"in_channels": 5},
        "x4-upscaler": {"in_channels": 7, "num_class_embeds": 1000},
        "sd2-unclip": {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 48,
        },
    }
    unet = oracle.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=(2, 4), use_linear_projection=True, sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **special[name],
    )  # fmt: skip
    scheduler = oracle.DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, steps_offset=1, **SCHEDULER
    )
    common = {
        "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet,
        "scheduler": scheduler,
    }  # fmt: skip
    if name == "x4-upscaler":
        noise = oracle.DDPMScheduler(**SCHEDULER)
        return oracle.StableDiffusionUpscalePipeline(
            **common, low_res_scheduler=noise, max_noise_level=250
        )
    if name == "sd2-depth":
        config = transformers.DPTConfig(
            image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=4,
            num_attention_heads=4, intermediate_size=24, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        )  # fmt: skip
        return oracle.StableDiffusionDepth2ImgPipeline(
            **common,
            depth_estimator=transformers.DPTForDepthEstimation(config),
            feature_extractor=transformers.DPTImageProcessor(),
        )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=16,
    )  # fmt: skip
    return oracle.StableUnCLIPImg2ImgPipeline(
        **common,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        feature_extractor=transformers.CLIPImageProcessor(),
        image_normalizer=normalizers.StableUnCLIPImageNormalizer(embedding_dim=24),
        image_noising_scheduler=oracle.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )


def short(name: str) -> str:
    """Without the prefix that newer transformers leave out."""
    return re.sub("^(text|vision)_model[.]", "", name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder a family, that diffusers wrote."""
    root = tmp_path_factory.mktemp("families")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in FAMILIES:
            (root / f"{name}-tokenizer").mkdir()
            pipeline(name, root / f"{name}-tokenizer").save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize("kind", ["difftool", "ldm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_comes_back_whole(name, kind, folders, tmp_path):
    source = open_model(folders[name])
    assert source.values["family"] == name
    convert(source, tmp_path / "there", kind)
    there = open_model(tmp_path / "there")
    assert build_preset(there.values) == build_preset(source.values)
    ledger = convert(there, tmp_path / "back", "diffusers")
    assert not any("not there" in warning for warning in ledger.warnings)
    for file in sorted(folders[name].glob("**/*.safetensors")):
        wanted, found = (
            load_file(file),
            load_file(tmp_path / "back" / file.relative_to(folders[name])),
        )
        assert {short(n) for n in found} == {short(n) for n in wanted}, file.name
        ours = {short(n): t for n, t in found.items()}
        for key, tensor in wanted.items():
            assert ours[short(key)].equal(tensor), key
    for file in [folders[name] / "model_index.json", *folders[name].glob("*/*config.json")]:
        if file.name != "tokenizer_config.json":
            again = tmp_path / "back" / file.relative_to(folders[name])
            assert json.loads(again.read_text(encoding="utf-8")) == json.loads(
                file.read_text(encoding="utf-8")
            ), file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = oracle.DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert (
        type(loaded).__name__
        == json.loads((folders[name] / "model_index.json").read_text(encoding="utf-8"))[
            "_class_name"
        ]
    )
