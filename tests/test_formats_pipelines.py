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
from PIL import Image
from safetensors.torch import load_file

from difftool.config.networks import TextConfig
from difftool.config.validate import build_preset
from difftool.errors import UsageError
from difftool.formats import open_model
from difftool.formats.diffusers.tokenizers import tokenizer_files
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings

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


def drawn(model: Model, asked: dict[str, Any], given: SampleInput) -> torch.Tensor:
    """The picture that difftool makes, [H,W,3] in [0, 1]."""
    settings = resolve_settings(model, {"steps": 4, "guidance": 3.0, **asked}, "diffusers")
    plan = plan_sampling(model, settings, from_picture=given.init is not None)
    *_, last = generate(plan, [given])
    return decode(model, last.x)[0].permute(1, 2, 0) / 2 + 0.5


def largest(one: torch.Tensor, other: Any) -> float:
    """Largest difference, in the 255ths that a file has."""
    return float(((one * 255).round() - torch.tensor(other * 255).round()).abs().max())


def test_the_upscaler_draws_as_diffusers_does(folders):
    pipe = oracle.StableDiffusionUpscalePipeline.from_pretrained(folders["x4-upscaler"])
    pipe.low_res_scheduler = oracle.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear"
    )
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made = pipe(
        "a fox", image=picture, num_inference_steps=4, guidance_scale=3.0, noise_level=150,
        generator=torch.Generator().manual_seed(5), output_type="np",
    ).images[0]  # fmt: skip
    model = load_model(str(folders["x4-upscaler"]), device="cpu")
    given = SampleInput("a fox", seed=5, init=picture[0])
    found = drawn(model, {"size": (32, 32), "noise_level": 150}, given)
    assert found.std() > 0.01 and largest(found, made) <= 1
    other = drawn(model, {"size": (32, 32), "noise_level": 300}, given)
    assert largest(other, made) > 1
    with pytest.raises(UsageError, match="enlarges pictures"):
        drawn(model, {"size": (32, 32)}, SampleInput("a fox"))


def test_a_model_of_depth_draws_as_diffusers_does(folders):
    pipe = oracle.StableDiffusionDepth2ImgPipeline.from_pretrained(folders["sd2-depth"])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    depth = torch.rand(1, 24, 24, generator=generator)
    made = pipe(
        "a fox", image=picture, depth_map=depth, num_inference_steps=4, guidance_scale=3.0,
        strength=0.75, generator=torch.Generator().manual_seed(5), output_type="np",
    ).images[0]  # fmt: skip
    model = load_model(str(folders["sd2-depth"]), device="cpu")
    given = SampleInput("a fox", seed=5, init=picture[0], depth=depth[0])
    found = drawn(model, {"size": (16, 16), "strength": 0.75}, given)
    assert found.std() > 0.01 and largest(found, made) <= 1
    other = drawn(
        model, {"size": (16, 16), "strength": 0.75}, given._replace(depth=depth[0].flip(0))
    )
    assert largest(other, made) > 1
    for wrong, said in (
        ({"depth": None}, "--depth-map"),
        ({"depth": torch.ones(4, 4)}, "one depth"),
    ):
        with pytest.raises(UsageError, match=said):
            drawn(model, {"size": (16, 16)}, given._replace(**wrong))


@pytest.mark.slow
def test_the_commands_of_models_that_go_by_pictures(folders, tmp_path, monkeypatch, difftool):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save("small.png")
    common = ("sample", "a fox", "--device", "cpu", "--steps", 2, "--seed", 5)
    ran = difftool(*common, "-m", folders["x4-upscaler"], "--init", "small.png", "-o", "large.png")
    assert ran.code == 0, ran.err
    with Image.open("large.png") as image:
        assert image.size == (32, 32)
    assert "small.png is 16x16, made 2 times larger and drawn at 32x32" in " ".join(ran.err.split())
    ran = difftool(*common, "-m", folders["sd2-depth"], "--depth-map", "small.png", "--size", 16,
                   "-o", "near.png")  # fmt: skip
    assert ran.code == 0, ran.err
    ran = difftool("sample", "--from-image", "near.png", "-m", folders["sd2-depth"], "--device",
                   "cpu", "-o", "again.png")  # fmt: skip
    assert ran.code == 0, ran.err
    assert Path("near.png").stat().st_size == Path("again.png").stat().st_size
    ran = difftool(*common, "-m", folders["sd2-depth"], "--size", 16)
    assert ran.code == 2 and "--depth-map" in ran.err
