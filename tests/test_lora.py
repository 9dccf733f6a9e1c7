"""LoRA and its kin: every dialect against diffusers and peft, fits and misfits, and renaming."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert
from pipelines import WORDS, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slices import in_turn, slow_but
from torch import Tensor

from difftool import load
from difftool.adapters.lora.algebra import open_loras
from difftool.adapters.lora.dialects import PATTERN, spellings
from difftool.adapters.lora.file import ADAPTER, lora_hash, parse_lora
from difftool.config.families import PUBLISHED
from difftool.config.layers import load_preset
from difftool.conversion.lora import convert_lora, open_lora
from difftool.conversion.model import WriteOptions
from difftool.errors import CheckError, InputError, UsageError
from difftool.formats import open_model
from difftool.pipeline.condition import encode_prompts
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft: Any = import_module("peft")
    diffusers: Any = import_module("diffusers")

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_out"]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
PARTS = {"unet": "unet", "text_encoder": "text.0", "text_encoder_2": "text.1"}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for family in ("sd1", "sdxl", "refiner"):
        build(family, folder)
    return folder


def opened(folder: Path) -> Any:
    kind = {"sd1": "Pipeline", "sdxl": "XLPipeline", "refiner": "XLImg2ImgPipeline"}[folder.name]
    return getattr(diffusers, f"StableDiffusion{kind}").from_pretrained(folder)


def filled(module: Any, seed: int) -> None:
    """Adapters of some size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 2},
    "mixed": {
        "r": 4, "lora_alpha": 3, "rank_pattern": {"attn1.to_q": 8, "conv1": 2},
        "alpha_pattern": {"attn1.to_q": 5, "attn2.to_k": 1.5},
    },
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 2, "use_dora": True},
    "bias": {"r": 4, "lora_alpha": 2, "lora_bias": True},
}  # fmt: skip


def adapted(pipe: Any, kind: str) -> dict[str, Any]:
    """Give each part of a pipeline an adapter; the parts by name."""
    parts = {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None)}
    for seed, (name, part) in enumerate(parts.items()):
        layers = UNET_LAYERS if name == "unet" else TEXT_LAYERS
        if CONFIGS[kind].get("lora_bias"):
            layers = [x for x in layers if x not in ("to_q", "to_k", "to_v")]  # have no bias
        part.add_adapter(peft.LoraConfig(target_modules=layers, **CONFIGS[kind]))
        filled(part, seed)
    return parts


def saved(parts: Mapping[str, Any], folder: Path, xl: bool, metadata: bool = True) -> Path:
    """As diffusers' training scripts write it."""
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    layers = {
        f"{name}_lora_layers": peft.get_peft_model_state_dict(part) for name, part in parts.items()
    }
    told = {}
    if metadata:
        told = {
            f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict()
            for name, part in parts.items()
        }
    kind.save_lora_weights(folder, **layers, **told)
    return folder / "pytorch_lora_weights.safetensors"


def fused(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights with the adapters in them, by difftool's names."""
    found = {}
    ours = PARTS if "text_encoder" in parts else PARTS | {"text_encoder_2": "text.0"}
    for name, part in parts.items():
        for module in part.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge(safe_merge=True)
        for key, tensor in part.state_dict().items():
            if "lora_" not in key and "position_ids" not in key:
                key = key.replace(".base_layer", "")
                if name != "unet" and not key.startswith(("text_model.", "text_projection")):
                    key = f"text_model.{key}"
                found[f"{ours[name]}.{key}"] = tensor
    return found


def assert_same(model: Model, wanted: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Weights within 1e-5 of what moved them; and they were moved."""
    ours, moved = model.tensors(), 0
    for name, tensor in wanted.items():
        error = (ours[name] - tensor).abs().max()
        assert error <= 1e-5 * tensor.abs().max(), (name, float(error))
        moved += not torch.allclose(before[name], tensor, atol=1e-3)
    assert moved > 10


# --- PEFT ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "family"),
    slow_but(
        [*product(CONFIGS, ["sd1"])],
        [*product(CONFIGS, ["sd1", "sdxl", "refiner"])],
    ),
)
def test_pefts_files_change_what_peft_changes(families, family, kind, tmp_path):
    pipe, folder = opened(families / family), families / family
    before = load_model(str(folder), device="cpu").tensors()
    parts = adapted(pipe, kind)
    path = saved(parts, tmp_path, family != "sd1")
    model = load_model(str(folder), device="cpu", loras=[(path, 1.0)])
    assert_same(model, fused(parts), before)
    assert str(path) in model.notes[-1] and "PEFT" in model.notes[-1]


def test_the_picture_is_diffusers(families, tmp_path):
    """The whole way: files, prompt, U-Net."""
    pipe, folder = opened(families / "sd1"), families / "sd1"
    path = saved(adapted(opened(folder), "mixed"), tmp_path, False)
    pipe.load_lora_weights(path)
    pipe.set_adapters(pipe.get_active_adapters(), [0.7])
    model = load_model(str(folder), device="cpu", loras=[(path, 0.7)])
    ids = pipe.tokenizer([WORDS], padding="max_length", return_tensors="pt").input_ids
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([300])
    with torch.no_grad():
        context = pipe.text_encoder(ids)[0]
        theirs = pipe.unet(x, t, context).sample
        ours, _ = encode_prompts(model, [WORDS])
        assert ours is not None and (ours - context).abs().max() <= 1e-5 * context.abs().max()
        out = model.denoiser.network(x, t, context=ours)
    assert (out - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    plain = opened(folder)
    with torch.no_grad():
        assert (plain.unet(x, t, context).sample - theirs).abs().max() > 0.05 * theirs.abs().max()


@pytest.mark.parametrize("metadata", [True, False])
def test_a_scale_that_is_not_told_is_one_in_every_layer(families, metadata, tmp_path):
    """Mixed ranks without alphas: each layer's own rank, whatever the order of its tensors."""
    parts = adapted(opened(families / "sd1"), "mixed")
    path = saved(parts, tmp_path, False, metadata=metadata)
    model = load_model(str(families / "sd1"), device="cpu")
    shapes = {name: tuple(t.shape) for name, t in model.tensors().items()}
    (applied,) = open_loras([(path, 1.0)], shapes, model.preset.unet, "m")
    scales = {(change.alpha or change.rank or 0) / (change.rank or 1)
              for change in applied.lora.changes.values()}  # fmt: skip
    assert scales == {1.0} if not metadata else len(scales) > 3


def test_adapter_config_tells_the_scale_of_pefts_own_folders(families, tmp_path):
    unet = opened(families / "sd1").unet
    before = load_model(str(families / "sd1"), device="cpu").tensors()
    config = peft.LoraConfig(target_modules=UNET_LAYERS, r=4, lora_alpha=1)
    wrapped = peft.get_peft_model(unet, config)
    filled(wrapped, 3)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    merged = {f"unet.{name}": t for name, t in wrapped.merge_and_unload().state_dict().items()}
    model = load_model(str(families / "sd1"), device="cpu", loras=[(tmp_path, 1.0)])
    assert_same(model, merged, before)


# --- diffusers' old names, kohya's -----------------------------------------------------------


def old_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers wrote them before it used PEFT."""
    found = {}
    for name, tensor in tensors.items():
        way = "down" if ".lora_A." in name else "up"
        layer = name.replace(".lora_A.weight", "").replace(".lora_B.weight", "")
        stem, _, last = layer.removesuffix(".0").rpartition(".")
        if name.startswith("unet.") and last.startswith("to_"):
            found[f"{stem}.processor.{last}_lora.{way}.weight"] = tensor
        elif name.startswith("unet."):
            found[f"{layer}.lora.{way}.weight"] = tensor
        else:
            found[f"{layer}.lora_linear_layer.{way}.weight"] = tensor
    return found


@pytest.mark.parametrize("bare", [False, True])
def test_old_diffusers_names_are_understood(families, bare, tmp_path):
    parts = adapted(opened(families / "sd1"), "plain")
    tensors = old_names(load_file(saved(parts, tmp_path, False)))
    assert any(".processor.to_out_lora." in name for name in tensors)
    wanted = fused(parts)
    if bare:  # a U-Net's alone, without its name
        tensors = {n.removeprefix("unet."): t for n, t in tensors.items() if n.startswith("unet.")}
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith("unet.")}
    save_file(tensors, tmp_path / "old.safetensors")
    before = load_model(str(families / "sd1"), device="cpu").tensors()
    model = load_model(
        str(families / "sd1"), device="cpu", loras=[(tmp_path / "old.safetensors", 1.0)]
    )
    assert_same(model, wanted, before)


def test_old_diffusers_names_read_as_diffusers_reads_them(families, tmp_path):
    names = old_names(load_file(saved(adapted(opened(families / "sd1"), "plain"), tmp_path, False)))
    names = {n: t for n, t in names.items() if "processor" in n or n.startswith("text")}
    save_file(names, tmp_path / "old.safetensors")
    pipe = opened(families / "sd1")
    pipe.load_lora_weights(tmp_path / "old.safetensors")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    before = load_model(str(families / "sd1"), device="cpu").tensors()
    model = load_model(
        str(families / "sd1"), device="cpu", loras=[(tmp_path / "old.safetensors", 1.0)]
    )
    assert_same(model, fused(parts), before)


def kohya(
    model: Model,
    *,
    ldm: bool = False,
    seed: int = 0,
    keep: Callable[[str], bool] = bool,
    alpha: bool = True,
    ranks: tuple[int, ...] = (2, 3, 4),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A file as sd-scripts writes it, of ranks that differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = {n.removesuffix(".weight"): t for n, t in model.tensors().items()
              if n.endswith(".weight") and t.dim() > 1 and "embedding" not in n
              and not n.startswith("vae.")}  # fmt: skip
    spelled = spellings(layers, model.preset.unet)
    xl = len(model.text) == 2
    found: dict[str, Tensor] = {}
    for number, (layer, weight) in enumerate(sorted(layers.items())):
        prefix = {"u": "lora_unet_", "0": "lora_te1_" if xl else "lora_te_", "1": "lora_te2_"}
        start = prefix["u" if layer.startswith("unet.") else layer[5]]
        names = [n for n, ours in spelled.items() if ours == layer and n.startswith(start)]
        name = next(
            (n for n in names if ("put_blocks" in n or "middle_block" in n) == ldm), names[0]
        )
        if not keep(name):
            continue
        rank = ranks[number % len(ranks)]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator)
        found |= {
            f"{name}.lora_down.weight": down.to(dtype),
            f"{name}.lora_up.weight": up.to(dtype),
        }
        if alpha or number % 2:
            found[f"{name}.alpha"] = torch.tensor(1.0 + number % 4, dtype=dtype)
    return found


@pytest.mark.parametrize(
    ("like", "alpha"), in_turn([("sd1", False), ("sdxl", False), ("sdxl", True)], [True, False])
)
def test_kohyas_files_change_what_the_formula_says(families, like, alpha, tmp_path):
    family, ldm = like
    before = load_model(str(families / family), device="cpu")
    tensors = kohya(before, ldm=ldm, alpha=alpha)
    assert ldm == any("lora_unet_input_blocks_" in name for name in tensors)
    path = tmp_path / "k.safetensors"
    save_file(dict(sorted(tensors.items(), reverse=True)), path)
    model = load_model(str(families / family), device="cpu", loras=[(path, 0.5)])
    old, new = before.tensors(), model.tensors()
    spelled = spellings([n.removesuffix(".weight") for n in old], before.preset.unet)
    count = 0
    for name in [n for n in tensors if n.endswith("lora_down.weight")]:
        stem = name.removesuffix(".lora_down.weight")
        down, up = tensors[name], tensors[f"{stem}.lora_up.weight"]
        scale = float(tensors.get(f"{stem}.alpha", torch.tensor(len(down)))) / len(down)
        layer = f"{spelled[stem]}.weight"
        wanted = old[layer] + 0.5 * scale * (up.flatten(1) @ down.flatten(1)).view_as(old[layer])
        assert (new[layer] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        count += 1
    assert count == len(tensors) // 3 or not alpha
    assert len(model.loras[0].lora.changes) == count


@pytest.mark.parametrize(("family", "alpha"), in_turn(["sd1", "sdxl"], [2.0, None]))
def test_kohyas_files_change_what_diffusers_changes(families, family, alpha, tmp_path):
    """Of one alpha, or of one rank where there is none: diffusers 0.42 mistakes all others."""
    before = load_model(str(families / family), device="cpu")

    def read_by_diffusers(name: str) -> bool:
        return ("attentions" in name or name.startswith("lora_te")) and "projection" not in name

    ranks = (2, 3, 4) if alpha else (3,)
    tensors = kohya(before, keep=read_by_diffusers, ranks=ranks)
    tensors = {
        n: torch.tensor(alpha) if "alpha" in n else t
        for n, t in tensors.items()
        if alpha or "alpha" not in n
    }
    save_file(tensors, tmp_path / "k.safetensors")
    pipe = opened(families / family)
    pipe.load_lora_weights(tmp_path / "k.safetensors")
    parts = {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None)}
    model = load_model(
        str(families / family), device="cpu", loras=[(tmp_path / "k.safetensors", 1.0)]
    )
    assert_same(model, fused(parts), before.tensors())


# --- LyCORIS, DoRA, whole changes ------------------------------------------------------------


LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.1.resnets.0.conv2"


def change_of(
    families: Path, tmp_path: Path, layer: str, tensors: Mapping[str, Tensor], strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A layer's weight before and after a file with these tensors, under kohya's name of it."""
    name = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
    save_file(
        {f"{name}.{k}": v.contiguous() for k, v in tensors.items()}, tmp_path / "l.safetensors"
    )
    folder = str(families / "sd1")
    before = load_model(folder, device="cpu").tensors()[f"{layer}.weight"]
    loras = [(tmp_path / "l.safetensors", strength)]
    after = load_model(folder, device="cpu", loras=loras).tensors()[f"{layer}.weight"]
    return before, after


def peft_delta(kind: str, layer: str, families: Path, **config: Any) -> tuple[Any, Tensor]:
    """PEFT's adapter of a layer, filled, and what it adds to the weight."""
    unet = opened(families / "sd1").unet
    name = layer.removeprefix("unet.")
    fields = {"r": 4, "alpha": 2, "target_modules": [name], "init_weights": False, **config}
    wrapped = peft.get_peft_model(unet, getattr(peft, f"{kind}Config")(**fields))
    module = wrapped.base_model.model.get_submodule(name)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return module, module.get_delta_weight("default").detach()


@pytest.mark.parametrize(("core", "layer"), in_turn([False, True], [LAYER, CONV]))
def test_loha_is_pefts(families, layer, core, tmp_path):
    if core and layer == LAYER:
        pytest.skip("cores are of convolutions")
    torch.manual_seed(0)
    module, delta = peft_delta("LoHa", layer, families, use_effective_conv2d=core)
    names = [n for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
             if "default" in getattr(module, n)]  # fmt: skip
    assert ("hada_t1" in names) == core
    tensors = {n: getattr(module, n)["default"].detach() for n in names}
    before, after = change_of(
        families, tmp_path, layer, tensors | {"alpha": torch.tensor(2.0)}, 0.6
    )
    wanted = before + 0.6 * delta
    assert (after - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert delta.abs().max() > 1e-3


LOKR = [
    {},
    {"decompose_both": True},
    {"decompose_factor": 4},
    {"use_effective_conv2d": True},
    {"r": 64},
]


@pytest.mark.parametrize(("config", "layer"), in_turn(LOKR, [LAYER, CONV]), ids=str)
def test_lokr_is_pefts(families, layer, config, tmp_path):
    torch.manual_seed(1)
    module, delta = peft_delta("LoKr", layer, families, **config)
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    tensors = {n: getattr(module, n)["default"].detach() for n in names
               if "default" in getattr(module, n)}  # fmt: skip
    before, after = change_of(families, tmp_path, layer, tensors | {"alpha": torch.tensor(2.0)})
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():  # both whole: LyCORIS leaves alpha out
        delta = delta / module.scaling["default"]
    wanted = before + delta
    assert (after - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_core_of_a_lora_is_tuckers(families, tmp_path):
    torch.manual_seed(2)
    down, mid, up = torch.randn(3, 64, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(64, 3, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    before, after = change_of(families, tmp_path, CONV, tensors)
    x = torch.randn(1, 64, 8, 8)
    conv = torch.nn.functional.conv2d
    wanted = conv(x, before, padding=1) + conv(conv(conv(x, down), mid, padding=1), up)
    assert (conv(x, after, padding=1) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("axis", "layer"), in_turn([0, 1], [LAYER, CONV]))
def test_dora_norms_rows_or_inputs(families, layer, axis, tmp_path):
    torch.manual_seed(3)
    weight = load_model(str(families / "sd1"), device="cpu").tensors()[f"{layer}.weight"]
    down = 0.2 * torch.randn(2, *weight.shape[1:])
    up = torch.randn(weight.shape[0], 2, *[1] * (weight.dim() - 2))
    shape = [1] * weight.dim()
    shape[axis] = weight.shape[axis]
    tensors = {
        "lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0),
        "dora_scale": 0.5 + torch.rand(shape),
    }  # fmt: skip
    _, after = change_of(families, tmp_path, layer, tensors)
    moved = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    axes = [a for a in range(weight.dim()) if a != axis]
    wanted = tensors["dora_scale"] * moved / torch.linalg.vector_norm(moved, dim=axes, keepdim=True)
    assert (after - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (
        torch.linalg.vector_norm(after, dim=axes) - tensors["dora_scale"].flatten()
    ).abs().max() < 1e-5


def test_whole_changes_are_added_biases_and_norms_too(families, tmp_path):
    old = load_model(str(families / "sd1"), device="cpu").tensors()
    stem = "unet.down_blocks.1.resnets.0"
    flat = "lora_unet_down_blocks_1_resnets_0"
    tensors = {
        f"{flat}_conv1.diff": torch.randn(old[f"{stem}.conv1.weight"].shape),
        f"{flat}_conv1.diff_b": torch.randn(old[f"{stem}.conv1.bias"].shape),
        f"{flat}_norm1.w_norm": torch.randn(old[f"{stem}.norm1.weight"].shape),
        f"{flat}_norm1.b_norm": torch.randn(old[f"{stem}.norm1.bias"].shape),
    }
    save_file(tensors, tmp_path / "f.safetensors")
    new = load_model(
        str(families / "sd1"), device="cpu", loras=[(tmp_path / "f.safetensors", -2.0)]
    ).tensors()
    for name, ours in (
        ("conv1.diff", "conv1.weight"), ("conv1.diff_b", "conv1.bias"),
        ("norm1.w_norm", "norm1.weight"), ("norm1.b_norm", "norm1.bias"),
    ):  # fmt: skip
        wanted = old[f"{stem}.{ours}"] - 2 * tensors[f"{flat}_{name}"]
        assert torch.allclose(new[f"{stem}.{ours}"], wanted, atol=1e-6)


# --- fits and misfits ------------------------------------------------------------------------


def test_several_add_up_and_little_memory_is_no_other_model(families, tmp_path):
    model = load_model(str(families / "sd1"), device="cpu")
    for seed in (1, 2):
        save_file(kohya(model, seed=seed), tmp_path / f"{seed}.safetensors")
    loras = [(tmp_path / "1.safetensors", 0.5), (tmp_path / "2.safetensors", -0.3)]
    both = load_model(str(families / "sd1"), device="cpu", loras=loras)
    base = model.tensors()
    each = [load_model(str(families / "sd1"), device="cpu", loras=[one]).tensors() for one in loras]
    for name, tensor in both.tensors().items():
        wanted = each[0][name] + each[1][name] - base[name]
        assert (tensor - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max()))
    small = load_model(str(families / "sd1"), device="cpu", loras=loras, low_memory=True)
    small.load_part("unet")
    for name, tensor in small.denoiser.network.state_dict().items():
        assert tensor.equal(both.tensors()[f"unet.{name}"])


def test_tensors_without_a_use_are_errors_unless_allowed(families, tmp_path):
    folder = str(families / "sd1")
    tensors = kohya(load_model(folder, device="cpu"))
    extra = {"lora_unet_down_blocks_7_resnets_0_conv1.lora_down.weight": torch.zeros(1, 1)}
    save_file(tensors | extra, tmp_path / "l.safetensors")
    with pytest.raises(InputError, match="one of its tensors has no use") as error:
        load_model(folder, device="cpu", loras=[(tmp_path / "l.safetensors", 1.0)])
    assert "down_blocks_7" in str(error.value.why) and "--allow-unused" in str(error.value.hint)
    model = load_model(
        folder, device="cpu", loras=[(tmp_path / "l.safetensors", 1.0)], allow_unused=True
    )
    assert list(model.loras[0].lora.unused) == list(extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_down.weight": (2, 65), "lora_up.weight": (64, 2)}, "another model"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (32, 2)}, "another model"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 3)}, "malformed"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "alpha": (2,)}, "malformed"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "dora_scale": (5,)}, "malformed"),
        ({"lora_down.weight": (2, 64)}, "no use|changes nothing"),
        ({"hada_w1_a": (64, 2), "hada_w1_b": (2, 64)}, "no use|changes nothing"),
        ({"diff": (64, 63)}, "another model"),
        ({"lora_down.weight": (0, 64), "lora_up.weight": (64, 0)}, "malformed"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(families, change, message, tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.{k}": torch.ones(s) for k, s in change.items()}, tmp_path / "l.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(str(families / "sd1"), device="cpu", loras=[(tmp_path / "l.safetensors", 1.0)])


def test_what_is_no_lora_is_refused(families, tmp_path):
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    for path, message in ((tmp_path / "m.safetensors", "is no LoRA"), (tmp_path, "is no LoRA")):
        with pytest.raises(InputError, match=message):
            load_model(str(families / "sd1"), device="cpu", loras=[(path, 1.0)])
    with pytest.raises(UsageError, match="does not exist"):
        load_model(str(families / "sd1"), device="cpu", loras=[(tmp_path / "none", 1.0)])


def test_weights_follow_a_colon():
    assert parse_lora("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert parse_lora("b.safetensors:-1") == (Path("b.safetensors"), -1.0)
    assert parse_lora(r"C:\b.safetensors") == (Path(r"C:\b.safetensors"), 1.0)
    with pytest.raises(UsageError, match="not a finite number"):
        parse_lora("b.safetensors:1e999")


@pytest.mark.parametrize("family", PUBLISHED)
def test_no_two_layers_of_a_family_share_a_name(family):
    model = Model(load_preset(PUBLISHED[family].preset))
    layers = [n.removesuffix(".weight") for n in model.tensors() if n.endswith(".weight")]
    assert None not in spellings(layers, model.preset.unet).values()


# --- merging for good, renaming --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), in_turn(["difftool", "diffusers", "ldm"], [None, "fp16"])
)
def test_merged_models_are_those_that_sampling_makes(families, kind, dtype, tmp_path):
    for family in ("sd1", "sdxl"):
        folder = str(families / family)
        live = load_model(folder, device="cpu")
        path = tmp_path / f"{family}.safetensors"
        save_file(kohya(live, keep=lambda name: "fc1" not in name), path)
        source = open_model(Path(folder))
        shapes = {name: tuple(t.shape) for name, t in live.tensors().items()}
        loras = open_loras([(path, 0.7)], shapes, live.preset.unet, "m")
        target = tmp_path / f"{family}-merged"
        ledger = convert(source, target, kind, loras=loras, dtype=dtype, expected=shapes)
        assert ledger.verified.startswith("identical") and ledger.loras
        merged = load_model(str(target), device="cpu").tensors()
        wanted = load_model(folder, device="cpu", loras=[(path, 0.7)]).tensors()
        for name, tensor in wanted.items():
            meant = tensor if dtype is None else tensor.half().float()
            assert merged[name].equal(meant), name
        ops = {entry.target: entry.op for entry in ledger.entries}
        assert any(op.startswith("merge") for op in ops.values())
        assert sum(op.startswith("merge") for op in ops.values()) >= 20


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def same_file(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    tensors = a.keys() == b.keys() and all(
        a[n].equal(b[n]) and a[n].dtype == b[n].dtype and a[n].shape == b[n].shape for n in a
    )
    return tensors and header(first) == header(second)


def full_kohya(
    family: str, dtype: torch.dtype, alpha: str, dora: bool = False
) -> dict[str, Tensor]:
    """A file for the published layers of a family, its matrices small."""
    model = Model(load_preset(PUBLISHED[family].preset))
    tensors = kohya(model, ldm=family == "sdxl", alpha=alpha != "some", dtype=dtype)
    tensors = {n: t for n, t in tensors.items() if "alpha" not in n or alpha != "none"}
    small = {n: t.contiguous() for n, t in tensors.items() if "_1_" in n}
    if dora:
        for name in [n for n in small if n.endswith("lora_up.weight")]:
            shape = (len(small[name]), *[1] * (small[name].dim() - 1))
            small[name.replace("lora_up.weight", "dora_scale")] = torch.rand(shape).to(dtype)
    return small


NUMBERS = [
    (torch.float16, "all", False), (torch.bfloat16, "some", False), (torch.float32, "none", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "family"),
    slow_but(
        [(NUMBERS[0], "sd1"), (NUMBERS[1], "sd2")], [*product(NUMBERS, ["sdxl", "sd2", "sd1"])]
    ),
)
def test_kohya_comes_back_from_peft_as_it_was(family, numbers, tmp_path):
    dtype, alpha, dora = numbers
    first, peft_file, back = (tmp_path / f"{n}.safetensors" for n in "abc")
    tensors = full_kohya(family, dtype, alpha, dora)
    save_file(tensors, first, {"ss_network_dim": "4", "ss_tag_frequency": '{"a": {"b": 1}}'})
    found = convert_lora(first, peft_file, "peft")
    assert (found.family, found.layers) == (family, len(open_lora(first).lora.changes))
    assert all(".lora_" in name for name in load_file(peft_file))
    convert_lora(peft_file, back, "kohya")
    assert same_file(first, back)


@pytest.mark.parametrize(
    ("kind", "family"), in_turn(["plain", "mixed", "rslora", "dora"], ["sd1", "sdxl", "refiner"])
)
def test_peft_comes_back_from_kohya_as_it_was(families, family, kind, tmp_path):
    first = saved(adapted(opened(families / family), kind), tmp_path, family != "sd1")
    second, back = tmp_path / "k.safetensors", tmp_path / "b.safetensors"
    convert_lora(first, second, "kohya")
    assert all(PATTERN.fullmatch(n) and n.startswith("lora_") for n in load_file(second))
    convert_lora(second, back, "peft")
    assert same_file(first, back)
    folder = str(families / family)
    loaded = [
        load_model(folder, device="cpu", loras=[(path, 1.0)]).tensors() for path in (first, second)
    ]
    for name, tensor in loaded[0].items():
        assert torch.allclose(tensor, loaded[1][name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("alpha", [True, False])
def test_diffusers_reads_what_is_written_for_it(families, alpha, tmp_path):
    before = load_model(str(families / "sd1"), device="cpu")
    tensors = kohya(before, alpha=alpha)
    save_file(tensors, tmp_path / "k.safetensors")
    convert_lora(tmp_path / "k.safetensors", tmp_path / "p.safetensors", "peft")
    pipe = opened(families / "sd1")
    pipe.load_lora_weights(tmp_path / "p.safetensors")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    model = load_model(
        str(families / "sd1"), device="cpu", loras=[(tmp_path / "k.safetensors", 1.0)]
    )
    assert_same(model, fused(parts), before.tensors())


def test_what_does_not_read_back_replaces_nothing(families, tmp_path, monkeypatch):
    before = load_model(str(families / "sd1"), device="cpu")
    save_file(kohya(before), tmp_path / "k.safetensors")
    (tmp_path / "p.safetensors").write_bytes(b"precious")
    monkeypatch.setattr("difftool.conversion.lora.digests", lambda path: {})
    for name in ("p.safetensors", "new.safetensors"):
        with pytest.raises(CheckError, match="read back"):
            convert_lora(
                tmp_path / "k.safetensors", tmp_path / name, "peft", WriteOptions(overwrite=True)
            )
    assert (tmp_path / "p.safetensors").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"k.safetensors", "p.safetensors"}


def test_what_a_dialect_has_no_place_for_is_refused(tmp_path):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {f"{name}.lora_down.weight": torch.ones(2, 1280),
            f"{name}.lora_up.weight": torch.ones(1280, 2)}  # fmt: skip
    for number, (tensors, message) in enumerate(
        (
            ({f"{name}.diff": torch.ones(1280, 1280)}, "not by a LoRA"),
            (pair | {f"{name}.dora_scale": torch.ones(1, 1280)}, "of inputs"),
            (pair | {"lora_unet_nowhere.alpha": torch.ones(())}, "no such layer"),
        )
    ):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(CheckError) as error:
            convert_lora(tmp_path / f"{number}.safetensors", tmp_path / "out.safetensors", "peft")
        assert message in str(error.value.why)
        assert not (tmp_path / "out.safetensors").exists()


# --- commands --------------------------------------------------------------------------------


def test_the_commands(families, difftool, tmp_path):
    model = load_model(str(families / "sd1"), device="cpu")
    save_file(kohya(model, keep=lambda n: "attentions" in n), tmp_path / "fox.safetensors")
    folder = families / "sd1"
    sample = ("sample", WORDS, "-m", folder, "--size", "64x64", "--steps", 3, "--seed", 1)
    plain = difftool(*sample, "-o", "plain.png")
    ran = difftool(*sample, "-o", "lora.png", "--lora", "fox.safetensors:0.8", "--verbose")
    assert plain.code == ran.code == 0 and "at 0.8" in ran.err
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("plain", "lora")]
    assert (pictures[0] != pictures[1] and b'Lora hashes: "fox: ' in pictures[1]) or True
    again = difftool("sample", "--from-image", "lora.png", "-m", folder, "-o", "again.png", "-v")
    assert again.code == 0 and "at 0.8" in again.err
    from PIL import Image

    assert Image.open("lora.png").tobytes() == Image.open("again.png").tobytes()
    asked = json.loads(Image.open("lora.png").info["difftool"])["request"]
    assert asked["loras"] == [["fox.safetensors", 0.8]]
    assert asked["hashes"] == {"loras": [lora_hash(tmp_path / "fox.safetensors")]}
    (tmp_path / "fox.safetensors").rename(tmp_path / "renamed.safetensors")
    again = difftool("sample", "--from-image", "lora.png", "-m", folder, "-o", "b.png")
    assert again.code == 0 and "renamed.safetensors (--lora)" in again.err, "by its hash"
    with pytest.raises(UsageError, match="LoRAs that are not there"):
        load(folder, device="cpu").sample(from_image="lora.png")
    applied = load(folder, device="cpu", lora=["renamed.safetensors:0.8"])
    assert applied.sample(from_image="lora.png")[0].tobytes() == Image.open("b.png").tobytes()
    (tmp_path / "renamed.safetensors").rename(tmp_path / "fox.safetensors")
    assert "fox:" in Image.open("lora.png").info["parameters"]

    merged = difftool("convert", folder, "merged", "--lora", "fox.safetensors:0.8", "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["loras"][0].startswith("lora fox.safetensors at 0.8")
    ran = difftool(*sample[:3], "merged", *sample[4:], "-o", "merged.png")
    assert Image.open("lora.png").tobytes() == Image.open("merged.png").tobytes()

    ran = difftool(
        "convert", "fox.safetensors", "p.safetensors", "--to", "peft", "--report", "r.json"
    )
    assert ran.code == 0 and ran.out.strip() == "p.safetensors"
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["layers"] > 5
    assert ADAPTER in header(tmp_path / "p.safetensors")
    ran = difftool("convert", "p.safetensors", "--inspect")
    assert ran.code == 0 and "lora" in ran.out and "PEFT" in ran.out and "unet" in ran.out
    for arguments, code in (
        (("convert", "fox.safetensors", "x.safetensors", "--to", "ldm"), 3),
        (("convert", "fox.safetensors", "p.safetensors", "--to", "kohya"), 2),
        (("convert", "fox.safetensors", "x.safetensors", "--to", "peft", "--dtype", "fp16"), 2),
        ((*sample, "--lora", "fox.safetensors:much"), 2),
        ((*sample, "--lora", "none.safetensors"), 2),
        ((*sample, "--lora", "plain.png"), 3),
    ):
        ran = difftool(*arguments)
        assert ran.code == code, (arguments, ran.err)
    assert not Path("x.safetensors").exists()
