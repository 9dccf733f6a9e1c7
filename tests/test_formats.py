"""Model formats: difftool's files and diffusers' folders, there and back, against diffusers."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from conversions import convert
from safetensors.torch import load_file, save_file

from difftool.config.families import family_of
from difftool.config.layers import load_preset, preset_names
from difftool.config.networks import SpaceToDepthConfig, TextConfig, UNetConfig, VaeConfig
from difftool.config.schema import Preset, SampleConfig
from difftool.config.validate import build_preset, to_values
from difftool.conversion import model as conversion
from difftool.conversion.inspect import inspect
from difftool.conversion.ledger import Ledger, component
from difftool.diffusion import SAMPLERS
from difftool.diffusion.path import Discrete, build_path
from difftool.errors import CheckError, DifftoolError, InputError, UsageError
from difftool.formats import FORMATS, open_model
from difftool.formats.diffusers import networks, schedulers
from difftool.formats.diffusers.components import EXTRA_JSON, EXTRA_TENSORS, LEGACY
from difftool.formats.diffusers.read import open_diffusers
from difftool.formats.diffusers.tokenizers import pad_id, tokenizer_files
from difftool.formats.model_source import ModelSource
from difftool.formats.native import open_native, write_native
from difftool.formats.rules import Rule
from difftool.networks.unet import UNet
from difftool.pipeline.model import Model
from difftool.storage import shards, tensor_file
from difftool.storage.runs import save_checkpoint
from difftool.storage.safetensors import read_header
from difftool.text.tokenizer import Tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    oracle: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    oracle.logging.set_verbosity_error()
    oracle.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# --- small models ----------------------------------------------------------------------------

PLAIN = UNetConfig(
    in_channels=3, out_channels=3, channels=(16, 32), blocks=1, depth=(0, 1), head_dim=8, groups=8
)
CROSS = UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(16, 32),
    blocks=1,
    attention="transformer",
    depth=(1, 1),
    context_dim=16,
    heads=(2, 4),
    groups=8,
)
VAE = VaeConfig(widths=(8, 16), blocks=1, groups=4)
TEXT = TextConfig(width=16, layers=2, heads=2, mlp=32)
POOLED = replace(TEXT, hidden=-2, final_norm=False, projection=8, pooled=True, pad_id=0)
XL = replace(CROSS, depth=(0, 2), mid_depth=2, context_dim=32, vector_dim=8 + 6 * 256)
SD_PATH = {"kind": "sd15"}
SAMPLE = SampleConfig(size=(32, 32), sampler="ddim", schedule="leading")


def preset(**changes: Any) -> Preset:
    """A tiny model; Stable Diffusion's parts unless changed."""
    values: dict[str, Any] = {
        "name": "tiny", "about": "a tiny model", "unet": CROSS, "codec": VAE, "text": (TEXT,),
        "path": SD_PATH, "target": "eps", "sample": SAMPLE,
    }  # fmt: skip
    return Preset(**(values | changes))


PRESETS: dict[str, Preset] = {
    "sd": preset(),
    "sd-v-zero-snr": preset(path={"kind": "sd21-zsnr"}, target="v"),
    "sd-linear": preset(unet=replace(CROSS, heads=None, head_dim=8, linear_projection=True)),
    "sd-inpaint": preset(unet=replace(CROSS, in_channels=9)),
    "sd-edit": preset(unet=replace(CROSS, in_channels=8)),
    "sd-cosine": preset(path={"kind": "cosine"}, classes=(), sample=SampleConfig(size=(64, 32))),
    "sd-sigmoid": preset(path={"kind": "sigmoid"}),
    "lcm": preset(unet=replace(CROSS, guidance_dim=32), sample=replace(SAMPLE, sampler="lcm")),
    "xl": preset(
        unet=XL,
        size_numbers=6,
        text=(replace(TEXT, hidden=-2, final_norm=False), POOLED),
        codec=replace(VAE, scale=0.13025, force_upcast=True),
    ),
    "xl-refiner": preset(
        unet=replace(XL, context_dim=16, vector_dim=8 + 5 * 256), size_numbers=5, text=(POOLED,)
    ),
    "flow": preset(path={"kind": "flow", "shift": 3.0}, target="flow"),
    "vae-moments": preset(
        codec=replace(
            VAE,
            latents_mean=(0.1, 0.2, 0.3, 0.4),
            latents_std=(1.0, 2.0, 3.0, 4.0),
            quant_conv=False,
            mid_attention=False,
        )
    ),
    "pixel": preset(unet=PLAIN, codec=load_preset("ddpm").codec, text=(), path={"kind": "ddpm"}),
    "pixel-edm": preset(
        unet=replace(PLAIN, in_channels=12, out_channels=12),
        codec=SpaceToDepthConfig(),
        text=(),
        path={"kind": "edm", "sigma_max": 40.0},
        target="edm",
    ),
    "classes": preset(
        unet=replace(PLAIN, num_classes=4, scale_shift=True, resblock_updown=True),
        codec=load_preset("ddpm").codec,
        text=(),
        classes=("a", "b", "c"),
        target="x0",
    ),
    "text-pixel": preset(
        unet=replace(CROSS, in_channels=12, out_channels=12, context_dim=32),
        codec=SpaceToDepthConfig(),
        text=(TEXT, replace(TEXT, pad_id=0)),
    ),
    "three-encoders": preset(unet=replace(CROSS, context_dim=48), text=(TEXT,) * 3),
    "unusual-use": preset(text=(replace(TEXT, hidden=-2),)),
}
EXACT = {
    *("sd", "sd-v-zero-snr", "sd-linear", "sd-inpaint", "sd-edit", "sd-cosine", "lcm", "xl"),
    *("xl-refiner", "flow", "vae-moments", "pixel", "sd-sigmoid"),
}
"""Models that diffusers can hold whole: no warning is due."""


def write(p: Preset, path: Path, dtype: str | None = None, **metadata: str) -> ModelSource:
    """A difftool file of random weights, opened."""
    model, generator = Model.fresh(p, seed=3), torch.Generator().manual_seed(3)
    weights = {n: torch.randn(t.shape, generator=generator) for n, t in model.tensors().items()}
    model.save(path, weights=weights, dtype=dtype, metadata=metadata)
    return open_model(path)


def shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    model = Model(build_preset(source.values), source.tokenizer_json)
    return {name: tuple(tensor.shape) for name, tensor in model.tensors().items()}


def run(source: ModelSource, target: Path, kind: str, **options: Any) -> Ledger:
    return convert(source, target, kind, expected=shapes(source), **options)


def same_tensors(a: ModelSource, b: ModelSource) -> None:
    ours, theirs = a.load(), b.load()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.equal(theirs[name]), name


def pipeline(folder: Path) -> Any:
    """The folder in diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.DiffusionPipeline.from_pretrained(folder)


# --- difftool's own file ---------------------------------------------------------------------


def test_a_model_file_describes_itself(tmp_path):
    path, p = tmp_path / "m.safetensors", PRESETS["sd"]
    source = write(p, path, **{"modelspec.author": "somebody", "difftool.weights": "ema"})
    assert source.kind == "difftool"
    assert source.file == path
    assert build_preset(source.values) == p
    assert source.weights == ("ema",)
    assert source.metadata["modelspec.author"] == "somebody"
    assert source.metadata["modelspec.prediction_type"] == "epsilon"
    assert source.metadata["modelspec.resolution"] == "32x32"
    assert any("eps" in line for line in source.evidence)
    weights = load_file(path)
    assert source.tensors.keys() == weights.keys() == Model.fresh(p, seed=3).tensors().keys()
    assert source.load("unet.").keys() == {n[5:] for n in weights if n.startswith("unet.")}
    name = "text_model.final_layer_norm.weight"
    assert source.load("text.0.")[name].equal(weights[f"text.0.{name}"])


def test_infinite_settings_survive(tmp_path):
    interval = (-float("inf"), 3.0)
    p = preset(sample=replace(SAMPLE, guidance_interval=interval))
    assert build_preset(write(p, tmp_path / "m").values).sample.guidance_interval == interval
    run(open_model(tmp_path / "m"), tmp_path / "d", "diffusers")
    assert build_preset(open_model(tmp_path / "d").values) == p


def test_a_learned_vocabulary_goes_along(tmp_path):
    tokenizer = Tokenizer.learn(["a red dog and a red cat"] * 3, 300)
    text = replace(TEXT, vocab_size=tokenizer.vocab_size, tokenizer="learned")
    p = preset(text=(text,))
    model = Model.fresh(p, seed=0, tokenizer_json=tokenizer.to_json())
    model.save(tmp_path / "m")
    run(open_model(tmp_path / "m"), tmp_path / "d", "diffusers")
    run(open_model(tmp_path / "d"), tmp_path / "back", "difftool")
    back = open_model(tmp_path / "back")
    assert build_preset(back.values) == p
    assert back.tokenizer_json == tokenizer.to_json()


def about(**changes: Any) -> str:
    return json.dumps({"schema": 1, "version": "9", "preset": to_values(PRESETS["sd"])} | changes)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "unknown to this version"),
        ({"difftool": "{"}, "malformed"),
        ({"difftool": "[]"}, "malformed"),
        ({"difftool": about(schema=2)}, "newer difftool"),
        ({"difftool": about(schema="1")}, "malformed"),
        ({"difftool": about(preset=[])}, "malformed"),
        ({"difftool": about(preset={})}, "missing"),
        ({"difftool": about(preset={"nonsense": 1})}, "m.safetensors"),
        ({"difftool": about(preset=to_values(PRESETS["sd"]) | {"target": "hope"})}, "hope"),
    ],
)
def test_a_malformed_description_is_refused(metadata, says, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"unet.x": torch.ones(1)}, path, metadata)
    with pytest.raises(InputError) as refused:
        open_model(path)
    assert says in str(refused.value)


def test_what_is_no_model_is_refused_by_kind(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        open_model(tmp_path / "none")
    with pytest.raises(InputError, match="not a model"):
        open_model(tmp_path)
    for name, content in (("a.ckpt", b"PK"), ("a.bin", b"\x80"), ("a.pt", b"PK")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"not a|not safe"):
            open_model(tmp_path / name)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="not a model"):
        open_model(tmp_path / "a.txt")
    with pytest.raises(InputError, match="not a difftool model"):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        open_native(tensor_file.open_source(tmp_path / "a.safetensors"))


def test_a_run_folder_stands_for_its_newest_model(tmp_path):
    p, steps = PRESETS["pixel"], tmp_path / "checkpoints"
    for step, names in ((5, ["model", "ema"]), (40, ["model"]), (100, ["model", "ema"])):
        save_checkpoint(tmp_path, step, lambda place, names=names: [
            write(p, place / f"{name}.safetensors") for name in names
        ], keep=9)  # fmt: skip
    assert open_model(tmp_path).file == steps / "step-000100" / "ema.safetensors"
    (steps / "step-000100" / "model.safetensors").write_bytes(b"")
    found = open_model(tmp_path)
    assert found.file == steps / "step-000040" / "model.safetensors"
    assert "step-000100 is damaged and was passed over" in found.warnings[0]
    assert inspect(tmp_path)["warnings"] == list(found.warnings)
    for step in ("step-000005", "step-000040"):
        (steps / step / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a model") as error:
        open_model(tmp_path)
    assert str(error.value.why).count("passed over") == 3
    write(p, tmp_path / "model.safetensors")
    assert open_model(tmp_path).file == tmp_path / "model.safetensors"


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_difftool_to_diffusers_and_back_loses_nothing(name, tmp_path):
    source = write(PRESETS[name], tmp_path / "m.safetensors", **{"modelspec.author": "me"})
    there = run(source, tmp_path / "folder", "diffusers")
    assert bool(there.warnings) == (name not in EXACT)
    assert there.verified.startswith("identical")
    folder = open_model(tmp_path / "folder")
    back = run(folder, tmp_path / "back.safetensors", "difftool")
    assert set(back.counts()) == {"copy"}
    again = open_model(tmp_path / "back.safetensors")
    same_tensors(source, again)
    assert build_preset(again.values) == PRESETS[name]
    assert again.metadata == source.metadata
    assert again.configs == {}, "nothing foreign is left behind by a folder of our own"


@pytest.mark.parametrize("name", PRESETS)
def test_diffusers_loads_what_is_written(name, tmp_path):
    source = write(PRESETS[name], tmp_path / "m.safetensors")
    run(source, tmp_path / "folder", "diffusers")
    loaded = pipeline(tmp_path / "folder")
    parts = {"unet.": "unet", "vae.": "vae"}
    sd = hasattr(loaded, "text_encoder") and loaded.text_encoder is not None
    if sd:
        parts |= {"text.0.": "text_encoder"}
    if getattr(loaded, "text_encoder_2", None) is not None:
        parts |= {"text.1." if sd else "text.0.": "text_encoder_2"}
    for prefix, part in parts.items():
        module = getattr(loaded, part, None)
        if module is None:
            continue
        ours = source.load(prefix)
        theirs = module.state_dict()
        if prefix.startswith("text"):  # newer transformers drop the prefix
            plain = lambda n: n.removeprefix("text_model.")  # noqa: E731
            ours = {plain(n): t for n, t in ours.items()}
            theirs = {plain(n): t for n, t in theirs.items() if "position_ids" not in n}
        assert theirs.keys() == ours.keys()
        assert all(tensor.equal(theirs[n]) for n, tensor in ours.items())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["sd", "xl"])
def test_every_precision_survives(name, dtype, tmp_path):
    source = write(PRESETS[name], tmp_path / "m", dtype=dtype)
    run(source, tmp_path / "d", "diffusers")
    run(open_model(tmp_path / "d"), tmp_path / "back", "difftool")
    same_tensors(source, open_model(tmp_path / "back"))


def tokenizer(**changes: Any) -> Any:
    """CLIP's tokenizer in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer_files(replace(TEXT, **changes)).items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(folder)


def small_pipeline(name: str) -> Any:
    """A pipeline made by diffusers itself, of random weights."""
    torch.manual_seed(0)
    block = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    ways = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    vae = oracle.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=64,
    )
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=16,
    )  # fmt: skip
    text = transformers.CLIPTextModel(config)
    if name == "ddpm":
        net = oracle.UNet2DModel(
            sample_size=32,
            **block,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            freq_shift=1,
            flip_sin_to_cos=False,
            downsample_padding=0,
            attention_head_dim=None,
            norm_eps=1e-6,
        )
        return oracle.DDPMPipeline(net, oracle.DDPMScheduler(variance_type="fixed_large"))
    if name == "sd":
        net = oracle.UNet2DConditionModel(
            sample_size=32, **block, **ways, cross_attention_dim=32, attention_head_dim=4,
            upcast_attention=True,
        )  # fmt: skip
        scheduler = oracle.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        )  # fmt: skip
        return oracle.StableDiffusionPipeline(
            vae, text, tokenizer(), net, scheduler, None, None, requires_safety_checker=False
        )
    net = oracle.UNet2DConditionModel(
        sample_size=64, **block,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), cross_attention_dim=64, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=16 + 6 * 256,
    )  # fmt: skip
    scheduler = oracle.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading", use_karras_sigmas=True,
    )  # fmt: skip
    second = transformers.CLIPTextModelWithProjection(config)
    pair = (tokenizer(), tokenizer(pad_id=0))
    return oracle.StableDiffusionXLPipeline(vae, text, second, *pair, net, scheduler)


PIPELINES = ["ddpm", "sd", "xl"]
ROUNDS = [("ddpm", "difftool")] + [(n, kind) for n in ("sd", "xl") for kind in ("difftool", "ldm")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders that diffusers wrote, by name."""
    root = tmp_path_factory.mktemp("pipelines")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PIPELINES:
            small_pipeline(name).save_pretrained(root / name)
    return {name: root / name for name in PIPELINES}


@pytest.mark.parametrize(("name", "kind"), ROUNDS)
def test_a_folder_of_diffusers_comes_back_with_equal_tensors_and_files(
    name, kind, folders, tmp_path
):
    source = open_model(folders[name])
    run(source, tmp_path / "m.safetensors", kind)
    run(open_model(tmp_path / "m.safetensors"), tmp_path / "back", "diffusers")
    same_tensors(source, open_model(tmp_path / "back"))
    for file in [folders[name] / "model_index.json", *folders[name].glob("*/*config.json")]:
        if file.name == "tokenizer_config.json":
            continue
        again = tmp_path / "back" / file.relative_to(folders[name])
        wanted, found = (
            json.loads(file.read_text(encoding="utf-8")),
            json.loads(again.read_text(encoding="utf-8")),
        )
        assert found == wanted, file.name
    before, after = pipeline(folders[name]), pipeline(tmp_path / "back")
    assert type(before) is type(after)
    for part, module in before.components.items():
        if isinstance(module, torch.nn.Module):
            theirs = after.components[part].state_dict()
            for key, tensor in module.state_dict().items():
                assert theirs[key].equal(tensor), key


@pytest.mark.parametrize("name", PIPELINES)
def test_the_networks_of_a_folder_compute_what_diffusers_computes(name, folders):
    """Values, not only names: the configuration was read right."""
    source, theirs = open_model(folders[name]), pipeline(folders[name])
    config = build_preset(source.values).unet
    assert isinstance(config, UNetConfig)
    net = UNet(config).eval()
    net.load_state_dict(source.load("unet."))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, 16, 16, generator=generator)
    t = torch.tensor([3.0, 700.0])
    given: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    if config.context_dim:
        context = torch.randn(2, 5, config.context_dim, generator=generator)
        given, asked = {"context": context}, {"encoder_hidden_states": context}
    if config.vector_dim:
        pooled = torch.randn(2, 16, generator=generator)
        numbers = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        waves = theirs.unet.add_time_proj(numbers.flatten()).reshape(2, -1)
        given["vector"] = torch.cat([pooled, waves], dim=1)
        asked["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": numbers}
    with torch.no_grad():
        ours, expected = net(x, t, **given), theirs.unet(x, t, **asked).sample
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_no_name_of_code_survives_in_an_index(folders, tmp_path):
    """The file that a model came from may lie about what it was."""
    run(open_model(folders["sd"]), tmp_path / "m", "difftool")
    source = open_model(tmp_path / "m")
    index = source.configs.get("model_index.json", {}) | {
        "_class_name": "StableDiffusionImg2ImgPipeline",
        "unet": ["mine", "Evil"],
        "scheduler": ["mine", "Evil"],
        "extra": ["mine", "Evil"],
        "hook": {"run": "Evil"},
        "requires_safety_checker": True,
    }
    for evil in ({"model_index.json": index}, {"model_index.json": []}, {"unet/config.json": [1]}):
        spoilt = replace(source, configs=source.configs | evil)
        run(spoilt, tmp_path / "d", "diffusers", overwrite=True)
        written = (tmp_path / "d" / "model_index.json").read_text(encoding="utf-8")
        assert "Evil" not in written
        assert json.loads(written)["unet"] == ["diffusers", "UNet2DConditionModel"]
        assert json.loads(written)["requires_safety_checker"] is False
        pipeline(tmp_path / "d")


def test_what_a_folder_says_is_what_is_decided(folders):
    sd = open_model(folders["sd"])
    p = build_preset(sd.values)
    assert p.target == "v"
    assert p.path == {
        "kind": "discrete", "schedule": "scaled_linear", "steps": 1000,
        "beta_start": 0.00085, "beta_end": 0.012,
    }  # fmt: skip
    assert (p.sample.sampler, p.sample.sampler_options) == ("plms", {"target": "v"})
    assert p.sample.schedule_options == {"offset": 1, "end": "first"}
    assert p.sample.size == (64, 64)
    assert p.sample.guidance == 7.5
    (text,) = p.text
    assert isinstance(text, TextConfig) and text.final_norm and text.hidden == -1
    assert any("PNDMScheduler" in line for line in sd.evidence)
    xl = build_preset(open_model(folders["xl"]).values)
    assert xl.size_numbers == 6
    texts = [text for text in xl.text if isinstance(text, TextConfig)]
    assert [(e.hidden, e.final_norm, e.pooled) for e in texts] == [
        (-2, False, False),
        (-2, False, True),
    ]
    assert xl.text[1].projection == 16
    assert xl.sample.schedule == "karras"
    assert xl.sample.schedule_options == {"range": {"kind": "leading", "offset": 1}}
    assert xl.sample.start_noise == "hypot"


# --- what a folder may look like -------------------------------------------------------------


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of the Stable Diffusion folder that may be spoilt."""
    shutil.copytree(folders["sd"], tmp_path / "sd")
    return tmp_path / "sd"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )


def test_the_half_precision_variant_is_read_where_there_is_no_other(folder, folders):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_model(folder).tensors["unet.conv_in.weight"].info.dtype == "F32"
    weights.unlink()
    source = open_model(folder)
    assert source.tensors["unet.conv_in.weight"].info.dtype == "F16"
    assert source.load("unet.")["conv_in.weight"].equal(half["conv_in.weight"])


def shard(folder: Path, variant: str = "") -> Path:
    """Split the U-Net's weights in two, with an index as diffusers writes it."""
    stem = f"diffusion_pytorch_model{variant}"
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    places: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"{stem}-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, whole.with_name(file))
        places |= dict.fromkeys(part, file)
    whole.unlink()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": places}
    index = whole.with_name(f"diffusion_pytorch_model.safetensors.index{variant}.json")
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_read(variant, folder, folders, tmp_path):
    shard(folder, variant)
    same_tensors(open_model(folders["sd"]), open_model(folder))
    run(open_model(folder), tmp_path / "m", "difftool")
    same_tensors(open_model(folders["sd"]), open_model(tmp_path / "m"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda places, key: places.update({key: "../../x.safetensors"}), "not safe"),
        (lambda places, key: places.update({key: "/etc/x.safetensors"}), "not safe"),
        (lambda places, key: places.update({key: "a\\b.safetensors"}), "not safe"),
        (lambda places, key: places.update({key: "a.bin"}), "not safe"),
        (lambda places, key: places.update({key: "absent.safetensors"}), "cannot read"),
        (lambda places, key: places.update({key: 1}), "malformed"),
        (lambda places, key: places.update({"ghost": places[key]}), "in none"),
        (lambda places, key: places.pop(key), "place"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(spoil, says, folder):
    index = shard(folder)
    content = json.loads(index.read_text(encoding="utf-8"))
    spoil(content["weight_map"], "conv_in.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(InputError) as refused:
        open_model(folder)
    assert says in str(refused.value)


def test_an_index_of_another_size_is_refused(folder):
    index = shard(folder)
    edit(index, metadata={"total_size": 1})
    with pytest.raises(InputError, match="does not fit"):
        open_model(folder)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"_class_name": "EvilPipeline"}, "EvilPipeline"),
        ("model_index.json", {"_class_name": ["a", "b"]}, "pipeline"),
        ("model_index.json", {"unet": ["mine", "MyUNet"]}, "MyUNet"),
        ("model_index.json", {"unet": [None, None]}, "lacks"),
        ("model_index.json", {"unet": ["diffusers"]}, "malformed"),
        ("model_index.json", {"hook": ["os", "system"]}, "hook"),
        ("model_index.json", {"image_encoder": ["mine", "CLIPVisionModel"]}, "image_enc"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3D"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn"),
        ("unet/config.json", {"center_input_sample": True}, "center_input_sample"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"encoder_hid_dim": 64}, "encoder_hid_dim"),
        ("unet/config.json", {"conv_in_kernel": 5}, "conv_in_kernel"),
        ("unet/config.json", {"time_embedding_dim": 99}, "time_embedding_dim"),
        ("unet/config.json", {"a_field_of_the_future": "yes"}, "a_field_of_the_future"),
        ("unet/config.json", {"in_channels": "4"}, "in_channels"),
        ("unet/config.json", {"norm_num_groups": 7}, "groups"),
        ("unet/config.json", {"down_block_types": ["KDownBlock2D"] * 2}, "down_block_types"),
        ("unet/config.json", {"block_out_channels": [32]}, "down_block_types"),
        ("unet/config.json", {"only_cross_attention": []}, "only_cross_attention"),
        ("unet/config.json", {"norm_num_groups": 0}, "groups"),
        ("vae/config.json", {"_class_name": "VQModel"}, "VQModel"),
        ("vae/config.json", {"act_fn": "relu"}, "act_fn"),
        ("vae/config.json", {"out_channels": 4}, "out_channels"),
        ("vae/config.json", {"use_post_quant_conv": False}, "use_post_quant_conv"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("text_encoder/config.json", {"model_type": "bert"}, "bert"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "heads"),
        ("scheduler/scheduler_config.json", {"_class_name": "MyScheduler"}, "MyScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "hope"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "hope"}, "beta_schedule"),
        ("scheduler/scheduler_config.json", {"trained_betas": ["x"]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1}, "steps"),
    ],
)
def test_what_difftool_does_not_have_is_refused_by_name(file, changes, says, folder):
    edit(folder / file, **changes)
    with pytest.raises(InputError) as refused:
        open_model(folder)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", ["", "[]", "{", '{"a":1,"a":2}', '{"a":NaN}', "[" * 99_999])
def test_malformed_configuration_files_are_refused(file, content, folder):
    (folder / file).write_text(content)
    with pytest.raises(InputError):
        open_model(folder) if file != "model_index.json" else open_diffusers(folder)


def test_pickled_weights_are_read_as_data(folder, folders):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    weights.unlink()
    text.unlink()
    same_tensors(open_model(folders["sd"]), open_model(folder))
    weights.with_suffix(".bin").unlink()
    with pytest.raises(InputError, match="no weights"):
        open_model(folder)


def test_code_in_a_folder_is_reported_and_never_run(folder):
    (folder / "unet" / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "pipeline.py").write_text("raise SystemExit('ran')")
    source = open_model(folder)
    assert sum("never runs" in warning for warning in source.warnings) == 2


@pytest.mark.parametrize("spoilt", [False, True])
def test_position_ids_are_dropped_by_a_named_rule(spoilt, folder, folders, tmp_path):
    weights = folder / "text_encoder" / "model.safetensors"
    ids = torch.arange(77)[None]
    stored = ids.half() + 0.25 if spoilt else ids
    save_file(load_file(weights) | {"embeddings.position_ids": stored}, weights)
    source = open_model(folder)
    assert any("spoilt" in warning for warning in source.warnings) == spoilt
    ledger = run(source, tmp_path / "m", "difftool")
    assert ledger.counts()["drop"] == 1
    same_tensors(open_model(folders["sd"]), open_model(tmp_path / "m"))


def test_old_names_are_read(folder, folders):
    """Plain attention before diffusers 0.17, and text encoders before transformers 5.6."""
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {new: legacy for legacy, new in LEGACY.items()}

    def renamed(name: str) -> str:
        for new, legacy in old.items():
            name = name.replace(f".{new}.", f".{legacy}.")
        return name

    tensors = {renamed(name): tensor for name, tensor in load_file(vae).items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, vae)
    text = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(text).items()}, text)
    same_tensors(open_model(folders["sd"]), open_model(folder))


def test_a_safety_checker_is_dropped_by_a_named_rule(folder, folders, tmp_path):
    checker = folder / "safety_checker"
    checker.mkdir()
    save_file({"a": torch.ones(2)}, checker / "model.safetensors")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    source = open_model(folder)
    assert any("safety checker" in warning for warning in source.warnings)
    ledger = run(source, tmp_path / "m", "difftool")
    assert ledger.counts()["drop"] == 1
    run(open_model(tmp_path / "m"), tmp_path / "back", "diffusers")
    assert pipeline(tmp_path / "back").safety_checker is None


def test_the_projections_width_is_the_tensors(folders, tmp_path):
    shutil.copytree(folders["xl"], tmp_path / "xl")
    edit(tmp_path / "xl" / "text_encoder_2" / "config.json", projection_dim=512)
    assert build_preset(open_model(tmp_path / "xl").values).text[1].projection == 16


# --- tokenizers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder of two tokenizers that difftool wrote."""
    root = tmp_path_factory.mktemp("xl")
    run(write(PRESETS["xl"], root / "m"), root / "folder", "diffusers")
    return root / "folder"


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", None), ("tokenizer_2", 0)])
def test_transformers_reads_the_tokenizers(name, pad, written):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.CLIPTokenizer.from_pretrained(written / name)
    # Where "!" pads, transformers reads it in a prompt as padding too; difftool does not.
    prompts = ["", f"a smiling fox, 4k{'!' * (pad is None)}", "ÀÉ naïve 東京 🦊", "word " * 100]
    found = theirs(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert found == Tokenizer.clip(pad_id=pad).encode(prompts, 77)
    assert pad_id(written / name) == pad


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_tokenizers_that_transformers_saves_are_read(name, written, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.CLIPTokenizer.from_pretrained(written / name).save_pretrained(tmp_path)
    assert pad_id(tmp_path) == pad_id(written / name)


def test_another_vocabulary_is_refused(written, tmp_path):
    shutil.copytree(written, tmp_path / "xl")
    merges = tmp_path / "xl" / "tokenizer" / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines()
    lines[5], lines[6] = lines[6], lines[5]
    merges.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match="not CLIP's vocabulary"):
        open_model(tmp_path / "xl")


@pytest.mark.parametrize("content", [{}, {"model": []}, {"model": {"merges": [[1], None]}}])
def test_a_malformed_vocabulary_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not CLIP's vocabulary"):
        pad_id(tmp_path)


def test_added_tokens_are_refused(written, tmp_path):
    shutil.copytree(written, tmp_path / "xl")
    (tmp_path / "xl" / "tokenizer" / "added_tokens.json").write_text('{"<cat-toy>": 49408}')
    with pytest.raises(InputError, match="added"):
        open_model(tmp_path / "xl")


# --- what only difftool reads ----------------------------------------------------------------


def test_whoever_edits_a_folder_is_right(tmp_path):
    p = replace(PRESETS["sd"], sample=replace(SAMPLE, guidance=3.0, steps=7))
    run(write(p, tmp_path / "m"), tmp_path / "d", "diffusers")
    config = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    edit(config, prediction_type="v_prediction")
    source = open_model(tmp_path / "d")
    assert source.values["target"] == "v"
    assert source.values["sample"]["steps"] == 7, "what was not edited is kept"
    edit(config, timestep_spacing="trailing")
    source = open_model(tmp_path / "d")
    assert source.values["sample"]["schedule"] == "trailing"
    assert any("edited" in line for line in source.evidence)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": None},
        {"sections": []},
        {"sections": {"unet": 1}},
        {"weights": 1.0},
        {"tokenizer": []},
        {"metadata": {"k": 1}},
        {"plain": {"train": {"nonsense": 1}}},
        {"plain": {"nonsense": 1}},
    ],
)
def test_a_malformed_extra_file_is_refused(changes, tmp_path):
    run(write(PRESETS["pixel"], tmp_path / "m"), tmp_path / "d", "diffusers")
    edit(tmp_path / "d" / EXTRA_JSON, **changes)
    with pytest.raises(InputError):
        open_model(tmp_path / "d")


def test_tensors_without_a_place_lie_beside_the_model(tmp_path):
    ledger = run(write(PRESETS["three-encoders"], tmp_path / "m"), tmp_path / "d", "diffusers")
    assert ledger.counts()["keep"] == len(load_file(tmp_path / "d" / EXTRA_TENSORS))
    assert all((e.source or "").startswith("text.2.") for e in ledger.entries if e.op == "keep")
    shutil.copy(tmp_path / "m", tmp_path / "d" / EXTRA_TENSORS)
    with pytest.raises(InputError, match="second time"):
        open_model(tmp_path / "d")


def test_a_u_net_that_diffusers_cannot_have_is_refused(tmp_path):
    for changes in (
        {"context_dim": None},
        {"depth": (2, 1), "up_depth": (1, 1)},
        {"mid_depth": 3},
        {"scale_shift": True, "resblock_updown": True},
    ):
        config = replace(CROSS, **changes)
        if config.up_depth is None or config.mid_depth == 3 or config.resblock_updown:
            with pytest.raises(CheckError, match="cannot hold"):
                networks.write_unet(config)
        else:
            assert networks.normal_unet(
                networks.read_unet(networks.write_unet(config), "it")
            ) == networks.normal_unet(config)


# --- the ledger ------------------------------------------------------------------------------


def test_the_ledger_accounts_for_every_tensor(tmp_path):
    source = write(PRESETS["sd"], tmp_path / "m")
    report = run(source, tmp_path / "d", "diffusers").report()
    json.dumps(report, allow_nan=False)
    assert {entry["source"] for entry in report["entries"]} == source.tensors.keys()
    assert report["counts"] == {"copy": len(source.tensors)}
    files = {p.relative_to(tmp_path / "d"): p for p in (tmp_path / "d").glob("**/*.safetensors")}
    headers = {str(name): read_header(path).tensors for name, path in files.items()}
    for entry in report["entries"]:
        assert entry["source_sha256"] == entry["target_sha256"]
        assert headers[entry["target_file"]].pop(entry["target"]).shape == entry["shape"]
    assert not any(headers.values())


def test_a_cast_is_measured(tmp_path):
    source = write(PRESETS["sd"], tmp_path / "m")
    ledger = run(source, tmp_path / "half", "difftool", dtype="fp16")
    again = open_model(tmp_path / "half")
    worst: dict[str, float] = {}
    for name, tensor in source.load().items():
        half = again.load()[name] if name == "unet.conv_in.weight" else None
        assert half is None or half.equal(tensor.half())
        part = component(name)
        error = (tensor.double() - tensor.half().double()).abs().max().item()
        worst[part] = max(worst.get(part, 0.0), error)
    assert {part: cast.max_abs_error for part, cast in ledger.casts.items()} == worst
    assert all(cast.max_rel_error < 0.5 for cast in ledger.casts.values())
    assert ledger.counts() == {"cast": len(source.tensors)}
    assert run(again, tmp_path / "same", "difftool", dtype="fp16").counts() == {
        "copy": len(source.tensors)
    }


def spoil(path: Path, **changed: torch.Tensor) -> ModelSource:
    """The same file with some tensors changed, added or (None) taken away."""
    source = open_model(path)
    tensors = load_file(path) | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_native(path, source.preset, kept, tokenizer_json=source.tokenizer_json, overwrite=True)
    return open_model(path)


def test_values_that_would_become_infinite_stop_a_cast(tmp_path):
    source = write(PRESETS["pixel"], tmp_path / "m")
    big = source.load()["unet.conv_in.bias"].clone()
    big[0] = 1e6
    source = spoil(tmp_path / "m", **{"unet.conv_in.bias": big})
    with pytest.raises(CheckError, match="1 values of unet"):
        run(source, tmp_path / "half", "difftool", dtype="fp16")
    assert not (tmp_path / "half").exists()
    assert run(source, tmp_path / "bf16", "difftool", dtype="bf16").casts["unet"].infinite == 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"unet.conv_in.weight": None}, "missing"),
        ({"unet.conv_in.weight": torch.ones(1)}, "not"),
        ({"unet.nobody_knows": torch.ones(1)}, "no network has"),
        ({"elsewhere": torch.ones(1)}, "no network has"),
    ],
)
@pytest.mark.parametrize("kind", ["difftool", "diffusers"])
def test_unexplained_tensors_stop_a_conversion(changed, says, kind, tmp_path):
    write(PRESETS["pixel"], tmp_path / "m")
    source = spoil(tmp_path / "m", **changed)
    with pytest.raises(CheckError) as stopped:
        run(source, tmp_path / "out", kind)
    assert says in str(stopped.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_plan_that_forgets_or_doubles_a_tensor_is_stopped(tmp_path, monkeypatch):
    source = write(PRESETS["pixel"], tmp_path / "m")
    good = FORMATS["difftool"]

    def forget(rules: list[Rule]) -> list[Rule]:
        return rules[1:]

    def double(rules: list[Rule]) -> list[Rule]:
        return [*rules, rules[0]._replace(theirs="again")]

    for fault in (forget, double):

        def plan(opened: ModelSource, keep: bool, fault: Any = fault) -> Any:
            made = good.plan(opened, keep)
            return replace(made, files={"": fault(made.files[""])})

        faulty = {**FORMATS, "difftool": replace(good, plan=plan)}
        monkeypatch.setattr(conversion, "FORMATS", faulty)
        with pytest.raises(CheckError, match="lose a tensor"):
            run(source, tmp_path / "out", "difftool")
        assert not (tmp_path / "out").exists()


def test_a_swapped_tensor_is_found_when_reading_back(tmp_path, monkeypatch):
    """Every mutant of the mapping is killed, even where names and shapes still fit."""
    source = write(preset(unet=replace(CROSS, context_dim=48), text=()), tmp_path / "m")
    good = FORMATS["diffusers"]
    by_shape: dict[Any, list[str]] = {}
    for name, place in source.tensors.items():
        by_shape.setdefault((place.info.shape, name.split(".")[0]), []).append(name)
    pairs = [names[:2] for names in by_shape.values() if len(names) > 1]
    assert len(pairs) > 20
    for one, other in pairs[:12]:
        swap = {one: other, other: one}

        def plan(opened: ModelSource, keep: bool, swap: Any = swap) -> Any:
            made = good.plan(opened, keep)
            files = {
                file: [r._replace(ours=tuple(swap.get(n, n) for n in r.ours)) for r in rules]
                for file, rules in made.files.items()
            }
            return replace(made, files=files)

        faulty = {**FORMATS, "diffusers": replace(good, plan=plan)}
        monkeypatch.setattr(conversion, "FORMATS", faulty)
        with pytest.raises(CheckError, match="differs"):
            run(source, tmp_path / "out", "diffusers")
        assert not (tmp_path / "out").exists()


def test_a_byte_changed_on_the_disk_is_found_when_reading_back(tmp_path, monkeypatch):
    source = write(PRESETS["pixel"], tmp_path / "m")
    real = shards.write_pieces

    def flipped(path: Path, *args: Any) -> Any:
        hashes = real(path, *args)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return hashes

    monkeypatch.setattr(shards, "write_pieces", flipped)
    for kind in ("difftool", "diffusers"):
        with pytest.raises(CheckError, match="bytes"):
            run(source, tmp_path / "out", kind)
        assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["difftool", "diffusers"])
def test_a_failure_half_way_leaves_nothing(kind, tmp_path, monkeypatch):
    source = write(PRESETS["pixel"], tmp_path / "m")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is ill")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        run(source, tmp_path / "out", kind)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_dry_run_writes_nothing_and_says_what_would_be(tmp_path):
    source = write(PRESETS["pixel-edm"], tmp_path / "m")
    ledger = run(source, tmp_path / "out", "diffusers", dry_run=True)
    assert len(ledger.entries) == len(source.tensors)
    assert ledger.warnings
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_only_folders_with_models_are_replaced(tmp_path):
    source = write(PRESETS["pixel"], tmp_path / "m")
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="there already"):
        run(source, precious, "diffusers")
    for kind in ("difftool", "diffusers"):
        with pytest.raises(UsageError, match="cannot be replaced"):
            run(source, precious, kind, overwrite=True)
    assert (precious / "letter.txt").read_text(encoding="utf-8") == "dear"
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out", "diffusers", overwrite=True)
    run(source, tmp_path / "out", "diffusers", overwrite=True)
    same_tensors(source, open_model(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "m", "out"]


def test_a_source_is_never_its_own_target(tmp_path):
    source = write(PRESETS["pixel"], tmp_path / "m")
    run(source, tmp_path / "d", "diffusers")
    folder = open_model(tmp_path / "d")
    for target in (tmp_path / "d", tmp_path / "d" / "m.safetensors", tmp_path):
        with pytest.raises(UsageError):
            run(folder, target, "difftool", overwrite=True)
    with pytest.raises(UsageError):
        run(source, tmp_path / "m", "difftool", overwrite=True)


def test_metadata_goes_along_or_is_stripped(tmp_path):
    notes = {"ss_tag_frequency": "private", "modelspec.title": "mine", "x": "y"}
    source = write(PRESETS["pixel"], tmp_path / "m", **notes)
    run(source, tmp_path / "d", "diffusers")
    assert open_model(tmp_path / "d").metadata.items() >= {"x": "y"}.items()
    run(source, tmp_path / "bare", "diffusers", keep_metadata=False)
    assert open_model(tmp_path / "bare").metadata == {}
    run(source, tmp_path / "kept", "difftool")
    assert "ss_tag_frequency" in open_model(tmp_path / "kept").metadata
    run(source, tmp_path / "stripped", "difftool", keep_metadata=False)
    assert not {"ss_tag_frequency", "x"} & open_model(tmp_path / "stripped").metadata.keys()


# --- configuration files ---------------------------------------------------------------------

NETWORKS = {
    name: value
    for name, value in vars(published).items()
    if name.isupper() and isinstance(value, dict) and name not in ("VAE", "UNCLIP", "UPSCALER")
}


SPREAD = {
    *("attention_head_dim", "transformer_layers_per_block", "only_cross_attention"),
    "reverse_transformer_layers_per_block",
}
"""Fields that can be written in several ways, or that speak of levels without attention."""


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    name = "UNet2DConditionModel" if "cross_attention_dim" in config else "UNet2DModel"
    return json.loads(json.dumps({"_class_name": name} | config))


@pytest.mark.parametrize("name", [*NETWORKS, "UNCLIP", "UPSCALER"])
def test_published_u_nets_are_read_and_written(name):
    given = published_config(vars(published)[name])
    config = networks.read_unet(given, name)
    with torch.device("meta"):
        ours, theirs = UNet(config), published.build(vars(published)[name])
    wanted = {n: t.shape for n, t in theirs.state_dict().items()}
    assert {n: t.shape for n, t in ours.state_dict().items()} == wanted
    written = networks.write_unet(config)
    cls = getattr(oracle, written["_class_name"])
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = cls.from_config(written)
    assert {n: t.shape for n, t in again.state_dict().items()} == wanted
    assert networks.normal_unet(networks.read_unet(written, name)) == networks.normal_unet(config)
    # What diffusers makes of our file is, field by field, what it makes of the published one.
    for field, value in dict(theirs.config).items():
        found = again.config.get(field)
        spread = [found] * len(value) if isinstance(value, tuple) and type(found) is int else found
        if field[0] != "_" and field not in SPREAD:
            assert spread == value or list(spread) == list(value), field


def test_a_published_autoencoder_is_read_and_written():
    given = json.loads(json.dumps({"_class_name": "AutoencoderKL"} | published.VAE))
    config = networks.read_vae(given, "vae")
    assert config.force_upcast, "the class's default"
    written = networks.write_vae(config, 512)
    assert networks.read_vae(written, "vae") == config
    with torch.device("meta"):
        theirs = oracle.AutoencoderKL.from_config(written)
    assert dict(theirs.config)["block_out_channels"] == [128, 256, 512, 512]


@pytest.mark.parametrize("name", [n for n in preset_names() if load_preset(n).family != "difftool"])
def test_families_are_told_by_their_structure(name):
    p = load_preset(name)
    assert family_of(p.unet, p.codec, p.text) == p.family


CLASS_NAMES = list(schedulers.CLASSES)


def defaults(name: str) -> dict[str, Any]:
    import inspect as python

    given = python.signature(getattr(oracle, name).__init__).parameters
    return {key: value.default for key, value in given.items() if key != "self"}


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_class_is_asked_for_by_its_name_too(name):
    assert SAMPLERS.resolve(name) == schedulers.CLASSES[name].sampler


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_missing_fields_have_the_class_default(name):
    assert schedulers.CLASSES[name].defaults == defaults(name)


def spread(name: str) -> list[dict[str, Any]]:
    """Configurations of a class that differ from its defaults in one way each."""
    known = schedulers.CLASSES[name].defaults
    ways: dict[str, list[Any]] = {
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "steps_offset": [1],
        "prediction_type": ["v_prediction", *([] if name.startswith("EDM") else ["sample"])],
        "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"],
        "trained_betas": [[0.1, 0.2, 0.3]],
        "num_train_timesteps": [500],
        "clip_sample": [True, False],
        "set_alpha_to_one": [True, False],
        "final_sigmas_type": ["sigma_min"],
        "use_karras_sigmas": [True],
        "use_exponential_sigmas": [True],
        "use_beta_sigmas": [True],
        "use_lu_lambdas": [True],
        "solver_order": [1, 2, 3],
        "solver_type": ["heun", "bh1"],
        "algorithm_type": ["sde-dpmsolver++", "dpmsolver"],
        "lower_order_final": [False],
        "euler_at_final": [True],
        "predict_x0": [False],
        "disable_corrector": [[0, 1]],
        "variance_type": ["fixed_large"],
        "original_inference_steps": [25],
        "shift": [3.0],
        "shift_terminal": [0.1],
        "stochastic_sampling": [True],
        "sigma_schedule": ["exponential"],
        "rho": [5.0],
        "sigma_max": [40.0],
    }
    for start, field in (
        ("DEIS", "algorithm_type"),
        ("DPM", "variance_type"),
        ("SA", "variance_type"),
        ("SA", "algorithm_type"),
        ("UniPC", "shift_terminal"),
        ("FlowMatch", "use_beta_sigmas"),
        ("FlowMatch", "use_karras_sigmas"),
        ("FlowMatch", "use_exponential_sigmas"),
    ):
        if name.startswith(start):
            ways.pop(field)
    found = [{}]
    for field in ways.keys() & known.keys():
        found += [{field: value} for value in ways[field] if value != known[field]]
    for one in found:
        if one.get("solver_type") == "heun" and not name.startswith(("DPM", "EDM")):
            one.clear()
        if one.get("solver_type") == "bh1" and not name.startswith("UniPC"):
            one.clear()
        if one.get("algorithm_type") == "dpmsolver" and name.startswith("EDM"):
            one.clear()
        if name.startswith("EDM") and one.get("prediction_type"):
            one["sigma_data"] = 1.0
    return found


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_schedulers_are_read_and_written_back(name):
    for given in spread(name):
        config = {"_class_name": name} | given
        read = schedulers.read_scheduler(config, name)
        assert not read.warnings or name == "PNDMScheduler", given
        p = preset(
            path=read.path,
            target=read.target,
            sample=SampleConfig(steps=10, **read.sample),
        )
        built = build_preset(to_values(p))
        written = schedulers.write_scheduler(build_path(built.path), built.target, built.sample)
        again = schedulers.read_scheduler(written, name)
        assert (again.path, again.target) == (read.path, read.target), given
        exact = given.get("algorithm_type") or given.get("solver_order") == 1
        if not exact and "trained_betas" not in given:
            assert again.sample == read.sample, given


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n.startswith("KDPM2") else [])
        for n in CLASS_NAMES
        if schedulers.CLASSES[n].grids != "edm"
    ],
)
def test_the_noise_path_is_that_of_diffusers(name):
    for given in spread(name):
        if not {"final_sigmas_type", "solver_type", "algorithm_type"}.isdisjoint(given):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(oracle, name)(**given)
        path = build_path(schedulers.read_scheduler({"_class_name": name} | given, name).path)
        if not isinstance(path, Discrete):
            continue
        bars = theirs.alphas_cumprod.double()
        ours = torch.tensor([path.level(t).alpha ** 2 for t in range(path.steps)])
        assert len(bars) == path.steps
        assert (bars - ours).abs().max() < 1e-6


def test_zero_terminal_snr_is_read():
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match="contradicts"):
        schedulers.read_scheduler(config, "it")
    config |= {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    path = build_path(schedulers.read_scheduler(config, "it").path)
    assert path.level(999).alpha == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del config["_class_name"]
        bars = oracle.DDIMScheduler(**config).alphas_cumprod.double()
    ours = torch.tensor([path.level(t).alpha ** 2 for t in range(1000)])
    assert (bars - ours).abs().max() < 1e-6


def test_options_that_difftool_has_not_are_said():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    assert any("use_dynamic_shifting" in w for w in schedulers.read_scheduler(config, "").warnings)
    config = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}
    assert any("interpolation_type" in w for w in schedulers.read_scheduler(config, "").warnings)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0},
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3,
        },
    ],
)
def test_schedulers_that_cannot_be_meant_are_refused(config):
    with pytest.raises(InputError):
        schedulers.read_scheduler(config, "it")


def test_a_clip_that_is_not_said_is_the_classes(folder):
    """DDIM clips unless told otherwise, which spoils latents: Stable Diffusion's pipelines do not,
    whatever the file says."""
    for clip, expected in ((None, "none"), (False, "none"), (True, "none")):
        config = {"_class_name": "DDIMScheduler"} | ({} if clip is None else {"clip_sample": clip})
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        assert open_model(folder).values["sample"]["clip"] == expected


# --- work done once --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["difftool", "ldm", "diffusers"])
def test_loading_reads_a_header_and_checks_a_preset_once(tmp_path, folders, monkeypatch, kind):
    from difftool.config import validate
    from difftool.pipeline.load import load_model

    source, path = open_model(folders["sd"]), tmp_path / "m.safetensors"
    if kind == "diffusers":
        path = folders["sd"]
    else:
        run(source, path, kind)
    headers, checked = [], []
    read, check = tensor_file.read_header, validate.validate

    def reads(file: Path) -> Any:
        headers.append(file)
        return read(file)

    def checks(cls: type, values: Any, where: str) -> Any:
        checked.append(where)
        return check(cls, values, where)

    monkeypatch.setattr(tensor_file, "read_header", reads)
    monkeypatch.setattr(validate, "validate", checks)
    load_model(str(path), device="cpu")
    assert len(headers) == len(set(headers)) > 0
    assert [where for where in checked if str(path) in where] == [f"the preset in {path}"]
    assert len(checked) == 1 + (kind == "ldm"), "and that of the family, where a file has none"


# --- inspection ------------------------------------------------------------------------------


def test_inspection_of_a_model(tmp_path, folders):
    write(PRESETS["sd-v-zero-snr"], tmp_path / "m", dtype="fp16", **{"difftool.weights": "ema"})
    found = inspect(tmp_path / "m")
    assert found.items() >= {"schema": 1, "family": "difftool", "prediction": "v"}.items()
    assert found["zero_snr"] is True
    assert found["weights"] == ["ema"]
    weights = Model.fresh(PRESETS["sd-v-zero-snr"], seed=3).tensors()
    unet = [tensor for name, tensor in weights.items() if name.startswith("unet.")]
    assert found["components"]["unet"] == {
        "tensors": len(unet),
        "parameters": sum(tensor.numel() for tensor in unet),
        "dtypes": {"fp16": len(unet)},
    }
    assert set(found["components"]) == {"unet", "vae", "text.0"}
    assert all(e.keys() == {"source", "says"} for e in found["evidence"])
    for name in PIPELINES:
        found = inspect(folders[name])
        assert found["format"] == "diffusers"
        assert found["zero_snr"] is False
        json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "lora"),
        ("unet.down_blocks.0.attn1.to_q.lora.up.weight", "lora"),
        ("control_model.zero_convs.0.0.weight", "controlnet"),
        ("emb_params", "embedding"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "vae"),
        ("text_model.final_layer_norm.weight", "text-encoder"),
        ("down_blocks.0.resnets.0.conv1.weight", "unet"),
        ("cond_stage_model.model.ln_final.weight", "text-encoder"),
        ("model.diffusion_model.middle_block.0.weight", "unet"),
        ("something", None),
    ],
)
def test_inspection_of_other_files_says_what_it_can(name, family, tmp_path):
    save_file(
        {name: torch.ones(2, 3)}, tmp_path / "x", {"modelspec.prediction_type": "v", "k": "v"}
    )
    found = inspect(tmp_path / "x")
    assert found["family"] == family
    assert found["prediction"] == "v"
    assert found["metadata"]["k"] == "v"
    assert sum(part["parameters"] for part in found["components"].values()) == 6
    with pytest.raises(InputError, match="unknown to this version"):
        open_model(tmp_path / "x")


def test_inspection_loads_neither_torch_nor_tensors(tmp_path, folders):
    write(PRESETS["pixel"], tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    code = """
import sys
from pathlib import Path
from difftool.conversion.inspect import inspect
from difftool.formats.rules import Rule
for path in sys.argv[1:]:
    assert inspect(Path(path))["components"]
assert not {"torch", "numpy", "safetensors"} & set(sys.modules)
"""
    paths = [str(tmp_path / "m"), *(str(folders[name]) for name in PIPELINES)]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    assert bytes(data) == (tmp_path / "m").read_bytes()


def test_mutated_folders_never_crash(folder):
    """Whatever a configuration file says, the answer is a model or a plain refusal."""
    import random

    rng = random.Random(0)
    edit(folder / "model_index.json", tokenizer=[None, None])  # reading one takes its time
    shutil.rmtree(folder / "tokenizer")
    files = sorted(folder.glob("**/*.json"))
    junk: list[Any] = [None, True, -1, 0, 1e9, "", "x", [], [[]], {}, {"a": 1}, ["x", None]]
    refused = 0
    originals = {file: file.read_text(encoding="utf-8") for file in files}
    for _ in range(150):
        file = rng.choice(files)
        content = json.loads(originals[file])
        for key in rng.sample(sorted(content), k=min(len(content), rng.randint(1, 2))):
            content[key] = rng.choice(junk)
        file.write_text(json.dumps(content))
        try:
            open_model(folder)
        except DifftoolError as error:
            assert isinstance(error, InputError), error
            refused += 1
        file.write_text(originals[file])
    assert refused > 70
