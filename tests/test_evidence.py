"""What a model is by all that its files show: odd forms, conflicts, parts that are missing."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ldm_models as ldms
import pytest
import torch
from conversions import convert
from ldm_models import small
from peft import LoraConfig
from pipelines import build, diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftool.adapters.lora.algebra import changed
from difftool.adapters.lora.file import read_lora
from difftool.config.families import judge
from difftool.config.layers import load_preset
from difftool.config.networks import UNetConfig
from difftool.config.schema import Preset
from difftool.conversion.lora import convert_lora, describe
from difftool.errors import CheckError, InputError, UsageError
from difftool.formats import open_model
from difftool.formats.ldm.names import ema_name, model_rules
from difftool.formats.model_source import choose_weights
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.storage.safetensors import read_header


def written(path: Path, preset: Preset, metadata: Any = None) -> dict[str, Tensor]:
    """A single file of a preset's networks, that says no more of them; its tensors."""
    tensors = {r.theirs: torch.randn(r.their_shape) / 20 for r in model_rules(preset)}
    save_file(tensors, path, metadata)
    return tensors


def altered(name: str, **network: Any) -> Preset:
    preset = small(name)
    assert isinstance(preset.unet, UNetConfig)
    return replace(preset, unet=replace(preset.unet, **network))


# --- the family ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("sd2", {"linear_projection": False}),
        ("sd1", {"linear_projection": True}),
        ("sd1", {"depth": (1, 2, 0)}),
        ("sdxl", {"linear_projection": False}),
        ("sdxl", {"depth": (0, 1, 1), "mid_depth": 1}),
        ("sdxl-refiner", {"linear_projection": False}),
        ("sd2-inpaint", {"linear_projection": False}),
    ],
)
def test_layers_of_another_form_are_of_their_own_family_and_it_is_said(name, network, tmp_path):
    """1x1 convolutions and linear layers compute the same; heads, which differ, follow the text."""
    preset = altered(name, **network)
    written(tmp_path / "m.safetensors", preset)
    source = open_model(tmp_path / "m.safetensors")
    assert source.preset.family == name
    assert isinstance(source.preset.unet, UNetConfig) and isinstance(preset.unet, UNetConfig)
    assert source.preset.unet.level_heads == preset.unet.level_heads
    assert any("guess" in warning and "unlike that" in warning for warning in source.warnings)


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        (altered("sd1", context_dim=40), "the text is 24 wide, and the network reads 40"),
        (altered("sdxl", context_dim=40), "the text is 64 wide, and the network reads 40"),
        (altered("sdxl", vector_dim=None), "label_emb is missing"),
        (altered("sd1", in_channels=6), "not of a family known"),
        (altered("sd1", in_channels=5), "its text encoder is clip, not openclip"),
        (altered("sd1", num_classes=10), "not of a family known"),
        (
            altered("sd1", vector_dim=80, vector_name="class_embedding"),
            "its text encoder is clip, not openclip",
        ),
    ],
)
def test_networks_of_several_families_are_refused(preset, says, tmp_path):
    written(tmp_path / "m.safetensors", preset)
    with pytest.raises(InputError, match=says):
        open_model(tmp_path / "m.safetensors")


def test_a_conflict_is_settled_by_whoever_tells_the_heads(tmp_path):
    sd1 = load_preset("sd15")
    verdict = judge(replace(sd1.unet, context_dim=1024), sd1.codec, load_preset("sd21").text)
    assert (verdict.id, verdict.conflicts) == ("sd2", ())
    verdict = judge(replace(sd1.unet, context_dim=1024), sd1.codec, sd1.text)
    assert verdict == ("sd1", ("its context is 1024 wide, not 768",), ())
    path = tmp_path / "m.safetensors"
    written(path, altered("sd1", in_channels=5))
    with pytest.raises(InputError, match="num_heads"):
        open_model(path)
    network = "model:\n  params:\n    unet_config:\n      params: "
    path.with_suffix(".yaml").write_text(network + "{num_heads: 4}\n", encoding="utf-8")
    source = open_model(path)
    assert source.values["unet"]["heads"] == 4 and source.warnings
    told = network + "{num_heads: 4, context_dim: 1024}\n"
    path.with_suffix(".yaml").write_text(told, encoding="utf-8")
    with pytest.raises(InputError, match="context_dim is 24, and 1024 in the"):
        open_model(path)


def test_metadata_of_another_family_is_no_evidence(tmp_path):
    metadata = {"modelspec.architecture": "stable-diffusion-v2-768-v"}
    written(tmp_path / "m.safetensors", small("sd1"), metadata)
    source = open_model(tmp_path / "m.safetensors")
    assert source.preset.target == "eps"
    assert any("modelspec.architecture says" in warning for warning in source.warnings)


def test_what_difftool_writes_says_itself_what_it_is(tmp_path):
    """Networks of no published family survive as a single file, though others cannot tell them."""
    preset = altered("sd1", in_channels=6)
    Model.fresh(preset, seed=0).save(tmp_path / "m.safetensors")
    convert(open_model(tmp_path / "m.safetensors"), tmp_path / "there.safetensors", "ldm")
    assert open_model(tmp_path / "there.safetensors").preset.unet == preset.unet


@pytest.mark.parametrize(
    ("name", "override", "says"),
    [
        ("sd15", "unet.context_dim=1024", "the text is 768 wide"),
        ("sdxl", "size_numbers=5", "the network is told 2560"),
        ("sd15", "family=sdxl", "not of family sdxl"),
        ("sdxl", "family=sdxl-refiner", "not of family sdxl-refiner"),
    ],
)
def test_presets_that_do_not_fit_together_are_refused(name, override, says):
    with pytest.raises(UsageError, match=says):
        load_preset(name, [override])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Small pipelines of diffusers."""
    place = tmp_path_factory.mktemp("pipelines")
    for name in ("sd1", "sdxl"):
        build(name, place)
    return place


def edited(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text(encoding="utf-8"))
    (target / file).write_text(json.dumps(content | changes), encoding="utf-8")
    return target


UNET_JSON, TEXT_JSON = "unet/config.json", "text_encoder/config.json"
INDEX_JSON = "model_index.json"


@pytest.mark.parametrize(
    ("name", "file", "changes", "says"),
    [
        ("sd1", UNET_JSON, {"cross_attention_dim": 40}, "the text is 24 wide"),
        ("sd1", INDEX_JSON, {"_class_name": "StableDiffusionXLPipeline"}, "lacks SDXL's vector"),
        ("sdxl", UNET_JSON, {"addition_embed_type": None}, "lacks SDXL's vector"),
        ("sd1", INDEX_JSON, {"vae": [None, None]}, "has no autoencoder"),
        ("sd1", UNET_JSON, {"block_out_channels": [-32, 64]}, "channels -32 is not"),
        ("sd1", UNET_JSON, {"layers_per_block": 10**9}, "layers are more than"),
        ("sdxl", UNET_JSON, {"transformer_layers_per_block": 10**9}, "layers are more than"),
        ("sd1", UNET_JSON, {"in_channels": 10**12}, "in channels"),
        ("sd1", "vae/config.json", {"layers_per_block": 10**9}, "layers are more than"),
        ("sd1", "vae/config.json", {"block_out_channels": [-8, 16, 16]}, "widths -8"),
        ("sd1", TEXT_JSON, {"num_hidden_layers": 10**9}, "layers 1000000000 is not"),
        ("sd1", TEXT_JSON, {"vocab_size": 10**12}, "vocab size"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(
    folders, name, file, changes, says, tmp_path
):
    with pytest.raises(InputError, match=says):
        open_model(edited(folders / name, tmp_path / "m", file, **changes))


@pytest.mark.parametrize("override", ["unet.blocks=1000000000", "unet.channels=[-32,32,32,32]"])
def test_presets_of_no_size_are_refused_before_anything_is_built(override):
    with pytest.raises(UsageError, match=r"more than 2048|is not a number from 1"):
        load_preset("sd15", [override])


def test_a_folder_of_eps_is_not_said_to_be_taken_for_eps(folders, tmp_path):
    ledger = convert(open_model(folders / "sd1"), tmp_path / "m.safetensors", "ldm")
    assert not any("other tools" in warning for warning in ledger.warnings)


# --- parts of single files -------------------------------------------------------------------

LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def with_diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's attention as converters have left it that do not know diffusers' names."""
    found = {}
    for name, tensor in tensors.items():
        place, middle, layer = name.partition(".attn_1.")
        kind, _, end = layer.rpartition(".")
        if middle and kind in LAYERS:
            name = f"{place}.attn_1.{LAYERS[kind]}.{end}"
            tensor = tensor.reshape(tensor.shape[:2])
        found[name] = tensor.contiguous()
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_diffusers_names_in_an_autoencoder_are_read_and_come_back(tmp_path):
    tensors = written(tmp_path / "m.safetensors", small("sd1"))
    odd = with_diffusers_names(tensors)
    save_file(odd, tmp_path / "odd.safetensors")
    source = open_model(tmp_path / "odd.safetensors")
    equal(source.load(), open_model(tmp_path / "m.safetensors").load())
    convert(source, tmp_path / "folder", "diffusers")
    convert(open_model(tmp_path / "folder"), tmp_path / "back.safetensors", "ldm")
    equal(load_file(tmp_path / "back.safetensors"), odd)


def test_an_autoencoder_that_is_given_stands_in_for_one_that_is_not_there(folders, tmp_path):
    tensors = written(tmp_path / "whole.safetensors", small("sd1"))
    prefix = "first_stage_model."
    bare = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    save_file(bare, tmp_path / "m.safetensors")
    vae = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    save_file(with_diffusers_names(vae), tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="--vae") as refused:
        load_model(str(tmp_path / "m.safetensors"), device="cpu")
    assert "has no autoencoder" in str(refused.value)
    whole = load_model(str(tmp_path / "whole.safetensors"), device="cpu").tensors()
    for stand_in in ("vae.safetensors", "whole.safetensors"):
        vae_file = str(tmp_path / stand_in)
        model = load_model(str(tmp_path / "m.safetensors"), device="cpu", vae=vae_file)
        assert model.preset.family == "sd1"
        equal(model.tensors(), whole)
    folder = edited(folders / "sd1", tmp_path / "folder", INDEX_JSON, vae=[None, None])
    model = load_model(str(folder), device="cpu", vae=str(folders / "sd1" / "vae"))
    assert model.preset == replace(load_model(str(folders / "sd1")).preset, name="folder")


def test_averaged_weights_alone_are_a_model(tmp_path):
    tensors = ldms.state("sdxl")
    live = "model.diffusion_model."
    averaged = {ema_name(n) if n.startswith(live) else n: t for n, t in tensors.items()}
    averaged |= {"model_ema.decay": torch.tensor(0.9999)}
    save_file({n: t.contiguous() for n, t in averaged.items()}, tmp_path / "m.safetensors")
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "live.safetensors")
    source = open_model(tmp_path / "m.safetensors")
    assert (source.preset.family, source.weights) == ("sdxl", ("ema",))
    equal(source.load("unet."), open_model(tmp_path / "live.safetensors").load("unet."))
    convert(source, tmp_path / "out.safetensors", "ldm")
    assert tensors.keys() < load_file(tmp_path / "out.safetensors").keys(), "as others read it"
    assert open_model(tmp_path / "out.safetensors").weights == ("ema",)


def test_averaged_weights_that_are_not_whole_are_never_mixed_with_live_ones(tmp_path):
    Model.fresh(small("sd1"), seed=0).save(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    unet = {n: t for n, t in tensors.items() if n.startswith("unet.") and "conv_in" not in n}
    tensors |= {f"ema.{name}": tensor.clone() for name, tensor in unet.items()}
    save_file(tensors, tmp_path / "n.safetensors", read_header(tmp_path / "m.safetensors").metadata)
    with pytest.raises(InputError, match="averaged weights"):
        choose_weights(open_model(tmp_path / "n.safetensors"), "ema")


@pytest.mark.parametrize("part", ["conditioner.embedders.1.model.text_projection",
                                  "conditioner.embedders.1."])  # fmt: skip
def test_sdxl_that_is_not_whole_is_told_in_the_names_of_its_file(part, tmp_path):
    tensors = written(tmp_path / "m.safetensors", small("sdxl"))
    save_file({n: t for n, t in tensors.items() if not n.startswith(part)}, tmp_path / "n")
    with pytest.raises(InputError, match=r"embedders\.1\.model\.text_projection is missing"):
        open_model(tmp_path / "n")


def test_a_projection_that_sdxl_does_not_use_is_kept_from_diffusers(folders, tmp_path):
    convert(open_model(folders / "sdxl"), tmp_path / "whole.safetensors", "ldm")
    tensors = load_file(tmp_path / "whole.safetensors")
    name = "conditioner.embedders.0.transformer.text_projection.weight"
    tensors |= {name: torch.randn(24, 24)}
    save_file(tensors, tmp_path / "m.safetensors")
    convert(open_model(tmp_path / "m.safetensors"), tmp_path / "folder", "diffusers")
    pictures = []
    for folder in (tmp_path / "folder", folders / "sdxl"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(str(folder))
            pipe.scheduler = diffusers.DDIMScheduler()
            pipe.set_progress_bar_config(disable=True)
            given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
            generator = torch.Generator().manual_seed(0)
            pictures.append(pipe("a fox", generator=generator, **given).images)
    assert (pictures[0] - pictures[1]).abs().max() < 1 / 255
    convert(open_model(tmp_path / "folder"), tmp_path / "back.safetensors", "ldm")
    equal(load_file(tmp_path / "back.safetensors"), tensors)


# --- tensors that are missing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("unet.conv_in.weight", "ldm"),
        ("vae.decoder.conv_in.bias", "diffusers"),
        ("text.0.text_model.final_layer_norm.weight", "ldm"),
    ],
)
def test_a_missing_tensor_is_named_whatever_is_written(part, kind, tmp_path):
    Model.fresh(small("sd1"), seed=0).save(tmp_path / "m.safetensors")
    source = open_model(tmp_path / "m.safetensors")
    left = replace(source, tensors={n: p for n, p in source.tensors.items() if n != part})
    expected = {name: place.info.shape for name, place in source.tensors.items()}
    with pytest.raises(CheckError, match=f"{part} is missing"):
        convert(left, tmp_path / "out", kind, expected=expected)


# --- LoRAs -----------------------------------------------------------------------------------

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora_file(path: Path, alpha: Any, metadata: dict[str, str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {
        f"{LAYER}.lora_down.weight": torch.randn(4, 320, generator=generator),
        f"{LAYER}.lora_up.weight": torch.randn(320, 4, generator=generator),
        f"{LAYER}.alpha": alpha,
    }
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("end", [".safetensors", ".pt"])
@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor(2, dtype=torch.uint8), 2, 2.0])
def test_an_alpha_that_is_a_whole_number_scales_as_any_other(alpha, end, tmp_path):
    if not isinstance(alpha, Tensor) and end == ".safetensors":
        pytest.skip("safetensors holds tensors alone")
    unet = load_preset("sd15").unet
    layers = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320)}
    made = []
    for name, given in (("whole", alpha), ("usual", torch.tensor(2.0))):
        lora = read_lora(lora_file(tmp_path / f"{name}{end}", given), layers, unet)
        (change,) = lora.changes.values()
        made.append(changed(torch.zeros(320, 320), None, change, 1.0)[0])
    assert made[0].equal(made[1]) and made[0].any()
    convert_lora(tmp_path / f"whole{end}", tmp_path / "peft.safetensors", "peft")
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "back.safetensors", "kohya")
    back = load_file(tmp_path / "back.safetensors")[f"{LAYER}.alpha"]
    assert float(back) == 2 and (not isinstance(alpha, Tensor) or back.dtype == alpha.dtype)


def test_an_alpha_that_pefts_configuration_leaves_out_is_pefts_own(tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    name = f"base_model.model.{layer}.lora"
    tensors = {f"{name}_A.weight": torch.ones(4, 320), f"{name}_B.weight": torch.ones(320, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4}', encoding="utf-8")
    unet = load_preset("sd15").unet
    lora = read_lora(tmp_path, {f"unet.{layer}": (320, 320)}, unet)
    assert lora.changes[f"unet.{layer}"].alpha == LoraConfig().lora_alpha


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    lora_file(tmp_path / "m.pt", "two")
    with pytest.raises(InputError, match="alpha is two"):
        describe(tmp_path / "m.pt")


def test_a_small_lora_is_not_said_to_be_of_a_family_that_it_does_not_fit(tmp_path):
    """SDXL has layers of all these names, and more of them than others, but none so narrow."""
    names = [f"lora_unet_{way}_attentions_0_proj_in" for way in ("up_blocks_0", "down_blocks_1")]
    tensors = {f"{n}.lora_down.weight": torch.zeros(2, 64) for n in names}
    tensors |= {f"{n}.lora_up.weight": torch.zeros(64, 2) for n in names}
    save_file(tensors, tmp_path / "m.safetensors")
    says, *_ = describe(tmp_path / "m.safetensors")
    assert "layers named as sdxl's, of other widths" in says
    ledger = convert_lora(tmp_path / "m.safetensors", tmp_path / "peft.safetensors", "peft")
    assert ledger.family is None
    down = {n: t for n, t in tensors.items() if "down_blocks" in n}
    save_file(down, tmp_path / "n.safetensors", {"ss_base_model_version": "sd_v2"})
    assert "layers named as sd2's, of other widths" in describe(tmp_path / "n.safetensors")[0]
