"""LDM's single files: names and values against diffusers' converters, there and back bit by bit."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ldm_models as ldms
import published
import pytest
import torch
from conversions import convert
from ldm_models import COMPLETE, FAMILIES, OPENCLIP, UNETS, VAE, small
from safetensors.torch import load_file, save_file
from slices import in_turn, slow_but
from torch import Tensor

from difftool.config.layers import load_preset
from difftool.config.validate import build_preset
from difftool.conversion import model as conversion
from difftool.conversion.inspect import inspect
from difftool.conversion.ledger import Ledger
from difftool.conversion.write import assembled
from difftool.errors import CheckError, InputError, UsageError
from difftool.formats import FORMATS, open_model
from difftool.formats.diffusers import networks
from difftool.formats.layouts import encoder_rules, network_rules
from difftool.formats.ldm.names import ema_name, ema_rules, model_rules, text_places
from difftool.formats.ldm.prediction_type import BIAS
from difftool.formats.ldm.tables import unet_rules, vae_rules
from difftool.formats.model_source import ModelSource, Overrides, choose_weights
from difftool.formats.rules import Rule
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.storage.safetensors import read_header
from difftool.storage.tensors import piece_of_tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.loaders import single_file_utils as oracle

    oracle.logger.disabled = True

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    model = Model(build_preset(source.values), source.tokenizer_json)
    return {name: tuple(tensor.shape) for name, tensor in model.tensors().items()}


def run(source: ModelSource, target: Path, kind: str, **options: Any) -> Ledger:
    return convert(source, target, kind, expected=shapes(source), **options)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].equal(tensor), name


# --- against diffusers -----------------------------------------------------------------------


def bare(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def theirs(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' converters make of a single file, by difftool's names."""
    config = networks.write_unet(UNETS[name])
    found = {
        f"unet.{n}": t for n, t in oracle.convert_ldm_unet_checkpoint(dict(tensors), config).items()
    }
    vae = oracle.convert_ldm_vae_checkpoint(dict(tensors), networks.write_vae(VAE, 64))
    found |= {f"vae.{n}": t for n, t in vae.items()}
    preset = small(name)
    for i, (prefix, openclip) in enumerate(text_places(preset.unet, preset.text)):
        text: dict[str, Any] = {}
        if openclip:
            encoder = type("Encoder", (), {"config": type("Config", (), {"hidden_size": 40})})
            part = {n: t for n, t in tensors.items() if n.startswith(prefix)}
            # Their loader leaves this one out where it is not square: the shape here is the file's.
            projection = part.pop(f"{prefix}text_projection", None)
            text = oracle.convert_open_clip_checkpoint(encoder, part, prefix)
            if projection is not None and preset.text[i].pooled:
                text["text_projection.weight"] = projection.T.contiguous()
        else:
            text = oracle.convert_ldm_clip_checkpoint(dict(tensors), prefix)
        found |= {f"text.{i}.{n}": t for n, t in text.items() if "position_ids" not in n}
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_what_diffusers_makes_of_it(name, tmp_path):
    tensors = ldms.write(tmp_path / "m.safetensors", name)
    ours = open_model(tmp_path / "m.safetensors").load()
    found = theirs(name, tensors)
    last = f"encoder.layers.{OPENCLIP.layers}."
    unused = {n for n in found if name in COMPLETE and last in n}
    lcm = {"unet.time_embedding.cond_proj.weight"} & ours.keys()
    wanted = {n: t for n, t in found.items() if n not in unused}
    equal({n: t for n, t in ours.items() if n[:5] != "extra" and n not in lcm}, wanted)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_averaged_weights_are_what_diffusers_extracts(name, tmp_path):
    tensors = ldms.write(tmp_path / "m.safetensors", name, ema=True)
    config = networks.write_unet(UNETS[name])
    wanted = oracle.convert_ldm_unet_checkpoint(dict(tensors), config, extract_ema=True)
    source = open_model(tmp_path / "m.safetensors")
    equal(source.load("ema.unet."), wanted)
    equal(choose_weights(source, "ema").load("unet."), wanted)
    live = oracle.convert_ldm_unet_checkpoint(dict(tensors), config)
    equal(choose_weights(source, "live").load("unet."), live)


def test_the_tables_have_the_published_sizes():
    """Key counts of the published files, and shapes of the networks that diffusers builds."""
    counts = {
        "sd15": (686, 248, [196]),
        "sd21": (686, 248, [280]),
        "sdxl-refiner": (1220, 248, [389]),
    }
    counts["sdxl"] = (1680, 248, [196, 389])
    for name, (unet, vae, text) in counts.items():
        preset = load_preset(name)
        assert isinstance(preset.codec, type(VAE))
        assert len([*network_rules(preset.unet)]) == unet
        assert len([*vae_rules(preset.codec)]) == vae
        for (_, openclip), config, count in zip(
            text_places(preset.unet, preset.text), preset.text, text, strict=True
        ):
            assert len([*encoder_rules(config, openclip)]) == count
    sd1 = model_rules(load_preset("sd15"))
    assert len(sd1) == 1130
    assert len([*ema_rules(sd1)]) == 686
    xl = {rule.theirs: rule.their_shape for rule in model_rules(load_preset("sdxl"))}
    assert xl["model.diffusion_model.label_emb.0.0.weight"] == (1280, 2816)
    assert xl["conditioner.embedders.1.model.text_projection"] == (1280, 1280)
    assert xl["model.diffusion_model.output_blocks.5.2.conv.weight"] == (640, 640, 3, 3)


@pytest.mark.parametrize("name", ["SD1", "SD2", "UNCLIP", "UPSCALER", "SDXL", "REFINER", "SSD_1B"])
def test_the_tables_hold_at_full_size(name):
    config = vars(published)[name]
    given = json.loads(json.dumps({"_class_name": "UNet2DConditionModel"} | config))
    rules = [*unet_rules(networks.read_unet(given, name))]
    with torch.device("meta"):
        network = published.build(config)
    wanted = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    assert {n: rule.shape for rule in rules for n in rule.ours} == wanted
    assert len({rule.theirs for rule in rules}) == len(rules)


# --- there and back --------------------------------------------------------------------------


NOTES = {"format": "pt", "modelspec.author": "me", "ss_note": "x", "modelspec.title": "t"}


def check_rounds(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Single file to folder to difftool's file to single file; and a folder of diffusers to a
    single file and back: equal in every bit, metadata included."""
    ema = name in ("sd1", "sdxl")
    tensors = ldms.write(tmp_path / "m.safetensors", name, NOTES, dtype=dtype, ema=ema)
    source = open_model(tmp_path / "m.safetensors")
    ledger = run(source, tmp_path / "folder", "diffusers", verify=False)
    assert sum(ledger.counts().values()) == len(source.tensors)
    run(open_model(tmp_path / "folder"), tmp_path / "ours", "difftool", verify=False)
    run(open_model(tmp_path / "ours"), tmp_path / "back.safetensors", "ldm", verify=False)
    equal(load_file(tmp_path / "back.safetensors"), tensors)
    assert read_header(tmp_path / "back.safetensors").metadata == NOTES
    assert open_model(tmp_path / "back.safetensors").values == source.values

    for file in (tmp_path / "folder").glob("difftool_extra*"):
        file.unlink()  # a folder as diffusers has it
    folder = open_model(tmp_path / "folder")
    ledger = run(folder, tmp_path / "there.safetensors", "ldm")
    assert ledger.verified.startswith("identical")
    written = open_model(tmp_path / "there.safetensors")
    assert build_preset(written.values) == build_preset(folder.values)
    run(written, tmp_path / "again", "diffusers", verify=False)
    again = open_model(tmp_path / "again")
    equal(again.load(), folder.load())
    assert again.values == folder.values
    for file in sorted((tmp_path / "folder").glob("**/*.json")):
        other = tmp_path / "again" / file.relative_to(tmp_path / "folder")
        assert json.loads(other.read_text(encoding="utf-8")) == json.loads(
            file.read_text(encoding="utf-8")
        ), file.name


ROUNDS = [(name, dtype) for name in FAMILIES for dtype in DTYPES]
SAMPLE = [(name, list(DTYPES)[i % 3]) for i, name in enumerate(FAMILIES)]


@pytest.mark.parametrize(("name", "dtype"), slow_but(SAMPLE[::4], SAMPLE))
def test_ways_there_and_back_are_exact(name, dtype, tmp_path):
    check_rounds(name, DTYPES[dtype], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [r for r in ROUNDS if r not in SAMPLE])
def test_ways_there_and_back_are_exact_in_every_dtype(name, dtype, tmp_path):
    check_rounds(name, DTYPES[dtype], tmp_path)


def test_metadata_that_is_not_there_is_not_added(tmp_path):
    ldms.write(tmp_path / "m.safetensors", "sd1")
    for through in ("diffusers", "difftool"):
        run(open_model(tmp_path / "m.safetensors"), tmp_path / through, through)
        run(open_model(tmp_path / through), tmp_path / "back", "ldm", overwrite=True)
        assert read_header(tmp_path / "back").metadata == {}


PRESETS = {"sd15": "sd1", "sd21-v": "sd2", "sdxl": "sdxl", "sdxl-refiner": "sdxl-refiner"}


@pytest.mark.parametrize(
    ("preset", "ways"), in_turn([*PRESETS], [("ldm",), ("diffusers", "ldm"), ("ldm", "diffusers")])
)
def test_models_of_presets_come_back_with_all_that_they_say(preset, ways, tmp_path):
    like = PRESETS[preset]
    """Such as training makes: their own names, descriptions and training settings too."""
    networks = small(like)
    made = replace(load_preset(preset), unet=networks.unet, text=networks.text, codec=VAE)
    source = tmp_path / "m"
    Model.fresh(made, seed=0).save(source)
    before = open_model(source)
    for way in (*ways, "difftool"):
        run(open_model(source), tmp_path / way, way)
        source = tmp_path / way
    after = open_model(source)
    assert build_preset(after.values) == build_preset(before.values)
    equal(after.load(), before.load())


def test_old_names_come_back_as_they_were(tmp_path):
    tensors = ldms.state("sdxl")
    stage, layers = "conditioner.embedders.1.model.", "first_stage_model."
    renamed = {
        f"{layers}quant_conv.{k}": f"{layers}encoder.quant_conv.{k}" for k in ("weight", "bias")
    }
    renamed |= {n: n.replace("text_model.", "") for n in tensors if "embedders.0" in n}
    attention = [n for n in tensors if ".attn_1." in n and tensors[n].ndim == 4]
    old = {renamed.get(n, n): t[:, :, 0, 0] if n in attention else t for n, t in tensors.items()}
    projection = old.pop(f"{stage}text_projection")
    old[f"{stage}text_projection.weight"] = projection.T
    old = {n: t.contiguous() for n, t in old.items()}
    save_file(old, tmp_path / "old.safetensors")
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "new.safetensors")
    source = open_model(tmp_path / "old.safetensors")
    new = open_model(tmp_path / "new.safetensors")
    for prefix in ("unet.", "vae.", "text."):
        equal(source.load(prefix), new.load(prefix))
    run(source, tmp_path / "there", "diffusers")
    run(open_model(tmp_path / "there"), tmp_path / "back.safetensors", "ldm")
    equal(load_file(tmp_path / "back.safetensors"), old)


def test_sd2_in_sgms_layout_and_sd1_of_old_are_read(tmp_path):
    for name, old in (
        ("sd2", lambda n: n.replace("cond_stage_model.", "conditioner.embedders.0.")),
        ("sd1", lambda n: n.replace("transformer.text_model.", "transformer.")),
    ):
        tensors = {old(n): t.contiguous() for n, t in ldms.state(name).items()}
        save_file(tensors, tmp_path / "old.safetensors")
        ldms.write(tmp_path / "new.safetensors", name)
        source = open_model(tmp_path / "old.safetensors")
        assert source.values["family"] == name
        for prefix in ("unet.", "vae.", "text."):
            equal(source.load(prefix), open_model(tmp_path / "new.safetensors").load(prefix))
        run(source, tmp_path / "there", "difftool", overwrite=True)
        run(open_model(tmp_path / "there"), tmp_path / "back", "ldm", overwrite=True)
        equal(load_file(tmp_path / "back"), tensors)


@pytest.mark.parametrize("wrapped", [0, 1, 2])
def test_a_pickled_checkpoint_is_a_single_file(wrapped, tmp_path):
    tensors = ldms.write(tmp_path / "m.safetensors", "sd1", ema=True)
    content: dict[str, Any] = dict(tensors)
    for _ in range(wrapped):
        content = {"state_dict": content, "global_step": 470000}
    torch.save(content, tmp_path / "m.ckpt")
    source = open_model(tmp_path / "m.ckpt")
    equal(source.load(), open_model(tmp_path / "m.safetensors").load())
    run(source, tmp_path / "out.safetensors", "ldm")
    equal(load_file(tmp_path / "out.safetensors"), tensors)


# --- weights ---------------------------------------------------------------------------------


def test_weights_are_chosen_and_the_others_are_told(tmp_path):
    tensors = ldms.write(tmp_path / "m.safetensors", "sd1", ema=True)
    source = open_model(tmp_path / "m.safetensors")
    assert source.weights == ("live", "ema")
    run(source, tmp_path / "both", "diffusers")
    assert open_model(tmp_path / "both").weights == ("live", "ema")
    equal(
        load_file(tmp_path / "both" / "unet_ema" / "diffusion_pytorch_model.safetensors"),
        source.load("ema.unet."),
    )
    for which in ("live", "ema"):
        chosen = choose_weights(source, which)
        ledger = run(chosen, tmp_path / which, "ldm")
        counted = len(UNETS) and sum(n.startswith("model_ema.") for n in tensors)
        dropped = [e for e in ledger.entries if e.op == f"drop:--weights {which}"]
        assert len(dropped) == counted
        assert all(e.source and e.source_sha256 for e in dropped)
        written = load_file(tmp_path / which)
        assert not any(n.startswith("model_ema.") for n in written)
        name = "model.diffusion_model.out.2.weight"
        assert written[name].equal(tensors[name if which == "live" else ema_name(name)])
        assert open_model(tmp_path / which).weights == (which,)
        with pytest.raises(UsageError, match="weights"):
            choose_weights(open_model(tmp_path / which), {"live": "ema", "ema": "live"}[which])


def test_averaged_weights_that_are_not_whole_are_refused(tmp_path):
    tensors = ldms.state("sd1", ema=True)
    del tensors[ema_name("model.diffusion_model.out.2.weight")]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="not a whole model"):
        open_model(tmp_path / "m.safetensors")


# --- what is decided -------------------------------------------------------------------------


def test_families_are_told(tmp_path):
    for name in FAMILIES:
        ldms.write(tmp_path / "m.safetensors", name)
        found = inspect(tmp_path / "m.safetensors")
        assert found["family"] == {"lcm": "sd1"}.get(name, name)
        assert found["format"] == "ldm"
        assert {"unet", "vae", "text.0"} <= found["components"].keys()


def test_an_lcm_is_sampled_as_one(tmp_path):
    ldms.write(tmp_path / "m.safetensors", "lcm")
    values = open_model(tmp_path / "m.safetensors").values
    assert (values["sample"]["sampler"], values["unet"]["guidance_dim"]) == ("lcm", 16)


def prediction(tmp_path: Path, name: str, metadata: dict[str, str], **more: Tensor) -> ModelSource:
    save_file(ldms.state(name) | more, tmp_path / "m.safetensors", metadata or None)
    return open_model(tmp_path / "m.safetensors")


def test_what_is_said_of_the_prediction_decides(tmp_path):
    empty = torch.tensor([])
    for name, metadata, more, target in (
        ("sd1", {}, {}, "eps"),
        ("sd1", {"modelspec.prediction_type": "v"}, {}, "v"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, "v"),
        ("sd2", {"ss_base_model_version": "sd_v2_v"}, {}, "v"),
        ("sdxl", {}, {"v_pred": empty}, "v"),
        ("x4-upscaler", {}, {}, "v"),
        ("sd2-unclip", {}, {}, "v"),
    ):
        source = prediction(tmp_path, name, metadata, **more)
        assert source.values["target"] == target
        assert any(f"target {target}" in line for line in source.evidence)
    source = prediction(tmp_path, "sdxl", {}, v_pred=empty, ztsnr=empty)
    assert source.values["path"]["zero_snr"] is True
    assert source.values["sample"]["schedule"] == "trailing"
    assert inspect(tmp_path / "m.safetensors")["zero_snr"] is True


def test_a_yaml_beside_the_file_is_read(tmp_path):
    (tmp_path / "m.yaml").write_text(
        "model:\n  params:\n    parameterization: \"v\"\n    linear_start: 0.00085\n"
        "    unet_config:\n      params: {num_heads: 4, use_checkpoint: True}\n"
    )  # fmt: skip
    source = prediction(tmp_path, "sd1", {})
    assert source.values["target"] == "v"
    assert source.values["unet"]["heads"] == 4
    assert any(".yaml" in line for line in source.evidence)


def test_contradictions_name_the_flag_that_settles_them(tmp_path):
    with pytest.raises(InputError) as refused:
        prediction(tmp_path, "sdxl", {"modelspec.prediction_type": "epsilon"}, v_pred=torch.ones(0))
    assert "--prediction eps or --prediction v" in str(refused.value)
    for told in ("eps", "v"):
        source = open_model(tmp_path / "m.safetensors", Overrides(told))
        assert source.values["target"] == told
        run(source, tmp_path / "out.safetensors", "ldm", overwrite=True)
        again = open_model(tmp_path / "out.safetensors")
        assert again.values["target"] == told
        assert ("v_pred" in load_file(tmp_path / "out.safetensors")) == (told == "v")
        spec = {"eps": "epsilon", "v": "v"}[told]
        assert read_header(again.path).metadata["modelspec.prediction_type"] == spec
    with pytest.raises(UsageError, match="exclude"):
        open_model(tmp_path / "m.safetensors", Overrides("eps", True))


def test_eps_with_zero_snr_is_refused(tmp_path):
    with pytest.raises(InputError, match="contradicts itself"):
        prediction(tmp_path, "sdxl", {}, ztsnr=torch.ones(0))


def test_alphas_that_reach_zero_are_zero_snr(tmp_path):
    bars = torch.linspace(0.99, 0, 1000)
    source = prediction(
        tmp_path, "sd1", {"modelspec.prediction_type": "v"}, alphas_cumprod=bars
    )  # fmt: skip
    assert source.values["path"]["zero_snr"] is True
    usual = (1 - torch.linspace(0.001, 0.02, 500).double()).cumprod(0).float()
    source = prediction(tmp_path, "sd1", {}, alphas_cumprod=usual)
    assert len(source.values["path"]["betas"]) == 500
    assert source.values["path"]["betas"][-1] == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize(("deviation", "target"), [(0.05, "eps"), (0.15, "v")])
def test_sd2s_prediction_is_guessed_from_a_bias(deviation, target, tmp_path):
    """A network of four levels, where the tensor lies that ComfyUI looks at."""
    unet = replace(UNETS["sd2"], channels=(32, 64, 64, 96), depth=(1, 1, 1, 0))
    preset = replace(small("sd2"), unet=unet)
    tensors = {r.theirs: torch.randn(r.their_shape) for r in model_rules(preset)}
    tensors[BIAS] = torch.randn(32) / torch.randn(32).std()
    tensors[BIAS] = (tensors[BIAS] / tensors[BIAS].std(unbiased=False) * deviation).half()
    save_file(tensors, tmp_path / "m.safetensors")
    source = open_model(tmp_path / "m.safetensors")
    assert source.values["target"] == target
    assert any("guess" in warning for warning in source.warnings)
    told = open_model(tmp_path / "m.safetensors", Overrides("v"))
    assert told.values["target"] == "v"
    assert not any("guess" in warning for warning in told.warnings)


def test_markers_are_written_where_other_tools_look(tmp_path):
    preset = replace(
        small("sdxl"), target="v", path={"kind": "scaled_linear", "zero_snr": True}, family="sdxl"
    )
    Model.fresh(preset, seed=0).save(tmp_path / "m.safetensors")
    ledger = run(open_model(tmp_path / "m.safetensors"), tmp_path / "x.safetensors", "ldm")
    assert ledger.counts()["synthesise"] == 2
    written = load_file(tmp_path / "x.safetensors")
    assert written["v_pred"].numel() == written["ztsnr"].numel() == 0
    metadata = read_header(tmp_path / "x.safetensors").metadata
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.implementation"].endswith("generative-models")
    assert metadata["modelspec.resolution"] == "64x64"
    run(open_model(tmp_path / "x.safetensors"), tmp_path / "back", "difftool")
    again = open_model(tmp_path / "back")
    assert build_preset(again.values) == preset
    equal(again.load(), open_model(tmp_path / "m.safetensors").load())


# --- refusals --------------------------------------------------------------------------------


def test_an_unknown_file_is_refused_with_the_nearest_family(tmp_path):
    tensors = ldms.state("sd1")
    del tensors["model.diffusion_model.input_blocks.4.0.in_layers.2.weight"]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError) as refused:
        open_model(tmp_path / "m.safetensors")
    assert "nearest family: sd" in str(refused.value)
    assert str(refused.value).count(";") == 2, "the first three differences"
    few = {n: t for i, (n, t) in enumerate(ldms.state("sdxl").items()) if i % 7 == 0}
    save_file(few, tmp_path / "n")
    with pytest.raises(InputError, match="nearest family"):
        open_model(tmp_path / "n")


def test_a_part_of_a_model_is_refused(tmp_path):
    tensors = ldms.state("sd1")
    for prefix, kind in (
        ("first_stage_model.", "unet"),
        ("cond_stage_model.", "unet"),
        ("model.", "vae"),
    ):
        left = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
        save_file(left, tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=f"it is a {kind}, no whole model"):
            open_model(tmp_path / "m.safetensors")
        assert inspect(tmp_path / "m.safetensors")["family"] == kind


@pytest.mark.parametrize("name", ["model.diffusion_model.nobody.knows", "nobody.knows"])
@pytest.mark.parametrize("kind", ["ldm", "diffusers", "difftool"])
def test_an_unexplained_tensor_stops_a_conversion(name, kind, tmp_path):
    save_file(ldms.state("sd1") | {name: torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckError, match=name):
        run(open_model(tmp_path / "m.safetensors"), tmp_path / "out", kind)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(InputError, match="unknown tensor"):
        load_model(str(tmp_path / "m.safetensors"), device="cpu")


def test_spoilt_positions_are_dropped_by_a_named_rule(tmp_path):
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file(ldms.state("sd1") | {name: torch.rand(1, 77).half()}, tmp_path / "m.safetensors")
    source = open_model(tmp_path / "m.safetensors")
    assert any("spoilt" in warning for warning in source.warnings)
    ledger = run(source, tmp_path / "out", "ldm")
    assert [e.source for e in ledger.entries if e.op.startswith("drop")] == [name]


@pytest.mark.parametrize(
    "change",
    [
        {"codec": load_preset("ddpm").codec},
        {"unet": replace(UNETS["sd1"], scale_shift=True)},
        {"unet": replace(UNETS["sd1"], attention="plain", context_dim=None)},
    ],
)
def test_what_ldm_cannot_hold_is_refused(change, tmp_path):
    preset = replace(small("sd1"), **change)
    Model.fresh(preset, seed=0).save(tmp_path / "m.safetensors")
    with pytest.raises(CheckError, match="cannot hold"):
        run(open_model(tmp_path / "m.safetensors"), tmp_path / "out", "ldm")
    assert not (tmp_path / "out").exists()


def test_names_that_would_meet_stop_a_conversion(tmp_path):
    """What a folder remembers of a single file's names may have been tampered with."""
    ldms.write(tmp_path / "m.safetensors", "sd1")
    source = open_model(tmp_path / "m.safetensors")
    one, other = "first_stage_model.quant_conv.bias", "first_stage_model.decoder.conv_out.bias"
    record = source.configs["ldm"] | {"names": {one: other}}
    for configs in ({"ldm": record}, {"ldm": record | {"names": {one: 1}}}, {"ldm": [1]}):
        spoilt = replace(source, configs=configs)
        if configs["ldm"] == record:
            with pytest.raises(CheckError, match="would be called"):
                run(spoilt, tmp_path / "out", "ldm")
        else:
            run(spoilt, tmp_path / "out", "ldm", overwrite=True)


# --- the ledger ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusers", "difftool", "ldm"])
def test_the_ledger_says_what_was_done(kind, tmp_path):
    tensors = ldms.write(tmp_path / "m.safetensors", "sdxl")
    source = open_model(tmp_path / "m.safetensors")
    ledger = run(source, tmp_path / "there", kind)
    report = ledger.report()
    json.dumps(report, allow_nan=False)
    assert {entry["source"] for entry in report["entries"]} == tensors.keys()
    assert all(e["source_sha256"] == e["target_sha256"] for e in report["entries"])
    if kind == "ldm":
        assert ledger.counts() == {"copy": len(source.tensors)}
        return
    counts = ledger.counts()
    assert counts["split"] == 6 * OPENCLIP.layers
    assert (counts["reshape"], counts["transpose"], counts["keep"]) == (8, 1, 3)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size == sum(place.info.size for place in source.tensors.values())
    back = run(open_model(tmp_path / "there"), tmp_path / "back", "ldm").counts()
    assert (back["concat"], back["reshape"], back["transpose"]) == (6 * OPENCLIP.layers, 8, 1)


@pytest.mark.parametrize("kind", ["diffusers", "difftool", "ldm"])
def test_a_cast_leaves_tables_and_counters_alone(kind, tmp_path):
    tensors = ldms.write(tmp_path / "m.safetensors", "sd1", ema=True)
    ledger = run(open_model(tmp_path / "m.safetensors"), tmp_path / "half", kind, dtype="fp16")
    again = open_model(tmp_path / "half")
    for name, place in again.tensors.items():
        kept = name.startswith("extra.")
        assert (place.info.dtype == "F16") != kept, name
    name = "extra.ldm.alphas_cumprod"
    assert again.load(name)[""].equal(tensors["alphas_cumprod"])
    assert set(ledger.casts) == {"unet", "vae", "text.0", "ema.unet"}


def test_a_dry_run_says_what_would_be(tmp_path):
    ldms.write(tmp_path / "m.safetensors", "sdxl")
    source = open_model(tmp_path / "m.safetensors")
    ledger = run(source, tmp_path / "out", "diffusers", dry_run=True)
    assert ledger.counts()["split"] == 6 * OPENCLIP.layers
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# --- mutants of the tables -------------------------------------------------------------------


def mutants(rules: list[Rule], count: int, seed: int) -> list[list[Rule]]:
    """Tables with one fault each: two entries swapped, a transposition or a stack's order lost, an
    index shifted, one part of the name wrong."""
    rng = random.Random(seed)
    found = []
    by_shape: dict[Any, list[int]] = {}
    for i, rule in enumerate(rules):
        by_shape.setdefault((rule.their_shape, rule.op), []).append(i)
    groups = [group for group in by_shape.values() if len(group) > 1]
    special = [i for i, rule in enumerate(rules) if rule.op in ("transpose", "stack")]
    while len(found) < count:
        mutant = list(rules)
        if special and rng.random() < 0.25:
            i = rng.choice(special)
            if rules[i].op == "stack":
                mutant[i] = rules[i]._replace(ours=rules[i].ours[::-1])
            else:
                mutant[i] = rules[i]._replace(op="copy", shape=rules[i].their_shape)
        else:
            i, j = rng.sample(rng.choice(groups), 2)
            side = rng.choice(("theirs", "ours"))
            one, other = getattr(rules[i], side), getattr(rules[j], side)
            mutant[i] = rules[i]._replace(**{side: other})
            mutant[j] = rules[j]._replace(**{side: one})
        found.append(mutant)
    return found


def holds(rules: list[Rule], tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether a table maps a single file's tensors to the wanted ones, and back."""
    for rule in rules:
        there = tensors[rule.theirs]
        if rule.op == "stack":
            parts = list(there.chunk(len(rule.ours)))
        elif rule.op == "transpose":
            parts = [there.T]
        elif there.numel() == torch.Size(rule.shape).numel():
            parts = [there.reshape(rule.shape)]
        else:
            return False
        for name, part in zip(rule.ours, parts, strict=True):
            if name not in wanted or not wanted[name].equal(part):
                return False
        pieces = [piece_of_tensor(part) for part in parts]
        data = b"".join(bytes(c) for c in assembled(rule, pieces).chunks())
        if data != there.contiguous().numpy().tobytes():
            return False
    return True


def killed(count: int) -> int:
    """How many mutants of all families' tables are found out by diffusers' converters."""
    each = -(-count // len(FAMILIES))
    total = 0
    for name in FAMILIES:
        tensors = ldms.state(name)
        wanted = theirs(name, tensors)
        rules = [r for r in ldms.rules(name) if "cond_proj" not in r.theirs]
        assert holds(rules, tensors, wanted), "the control: the table itself holds"
        for mutant in mutants(rules, each, seed=len(name)):
            assert not holds(mutant, tensors, wanted)
            total += 1
    return total


@pytest.mark.slow
def test_hundreds_of_mutants_of_the_tables_are_found_out():
    assert killed(520) >= 520


def test_a_faulty_table_is_found_when_reading_back(tmp_path, monkeypatch):
    """The user's own safety net: --verify, where writer and reader disagree."""
    ldms.write(tmp_path / "m.safetensors", "sdxl")
    source = open_model(tmp_path / "m.safetensors")
    good = FORMATS["ldm"]
    for mutant in range(6):

        def faulty(opened: ModelSource, keep: bool, mutant: int = mutant) -> Any:
            made = good.plan(opened, keep)
            return replace(made, files={"": mutants(made.files[""], 6, seed=1)[mutant]})

        formats = {**FORMATS, "ldm": replace(good, plan=faulty)}
        monkeypatch.setattr(conversion, "FORMATS", formats)
        with pytest.raises(CheckError):
            run(source, tmp_path / "out.safetensors", "ldm")
        assert not (tmp_path / "out.safetensors").exists()


def test_the_source_is_left_as_it_was(tmp_path):
    ldms.write(tmp_path / "m.safetensors", "sd1")
    shutil.copy(tmp_path / "m.safetensors", tmp_path / "copy")
    source = open_model(tmp_path / "m.safetensors")
    for tensor in source.load().values():
        tensor.zero_()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
