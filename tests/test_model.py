"""The whole model: conditioning, checks, fresh and loaded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from diffusers.models.embeddings import get_timestep_embedding

from difftool.config.layers import load_preset
from difftool.errors import InputError, UsageError
from difftool.hub.find import find_model
from difftool.pipeline.condition import build_cond, encode_prompts
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model, pick_device
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings

SMALL = tiny.settings(unet=tiny.UNET)
CLASSES = [*SMALL, "unet.num_classes=4", "classes=[cat, dog, owl]", "sample.size=[16,16]"]


def fresh(*overrides: str, preset: str = "pixel-small") -> Model:
    return Model.fresh(load_preset(preset, list(overrides)), seed=3)


def test_fresh_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    one = fresh(*SMALL).tensors()
    torch.manual_seed(2)
    two = fresh(*SMALL).tensors()
    other = Model.fresh(load_preset("pixel-small", SMALL), seed=4).tensors()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_saved_model_is_the_same_model(tmp_path):
    model = fresh(*CLASSES)
    path = tmp_path / "model.safetensors"
    model.save(path)
    loaded = load_model(str(path), device="cpu")
    assert loaded.preset == model.preset
    theirs = loaded.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.tensors().items())
    with pytest.raises(UsageError, match="there already"):
        model.save(path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = fresh(*SMALL)
    good = model.denoiser.network.state_dict()
    for change, says in (
        (lambda t: t.pop("conv_in.weight"), "lacks tensor unet.conv_in.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensor unet.extra"),
        (
            lambda t: t.update({"conv_in.bias": torch.zeros(3)}),
            "misshapen tensor unet.conv_in.bias",
        ),
    ):
        tensors = dict(good)
        change(tensors)
        with pytest.raises(InputError, match=says):
            model.set_weights("unet", tensors, torch.float32, "file")


def test_labels_by_name_and_by_index():
    model = fresh(*CLASSES)
    assert model.null_label == 3
    assert (model.label("owl"), model.label("1")) == (2, 1)
    for wrong in ("3", "cta", "-1"):
        with pytest.raises(UsageError, match="no class"):
            model.label(wrong)
    with pytest.raises(UsageError, match="no classes"):
        fresh(*SMALL).label("0")


def test_guidance_needs_something_to_guide_from():
    assert fresh(*CLASSES).guidable
    model = fresh(*SMALL)
    assert not model.guidable
    with pytest.raises(UsageError, match="cannot be guided"):
        resolve_settings(model, {"guidance": 2.0})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"guidance": 0.5}, "guidance"),
        ({"size": (17, 16)}, "multiples of 2"),
        ({"sampler": "eulr"}, "euler"),
        ({"schedule": "lcn"}, "lcm"),
        ({"clip": "hard"}, "clip"),
        ({"sampler_options": {"etta": 1}}, "etta"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        model = fresh(*CLASSES)
        plan_sampling(model, resolve_settings(model, given))


def test_another_sampler_drops_the_options_of_the_first():
    model = fresh(*CLASSES, "sample.sampler=ddim", "sample.sampler_options={eta: 0.5}")
    assert resolve_settings(model, {"steps": 3}).sampler_options == {"eta": 0.5}
    assert resolve_settings(model, {"sampler": "DDIM"}).sampler_options == {"eta": 0.5}
    assert resolve_settings(model, {"sampler": "Euler a"}).sampler_options == {}


def test_guidance_1_runs_the_network_once_a_step():
    model = fresh(*CLASSES)
    calls: list[int] = []
    model.denoiser.network.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    for guidance, each in ((1.0, 1), (3.0, 2)):
        calls.clear()
        settings = resolve_settings(model, {"guidance": guidance, "steps": 3, "sampler": "ddim"})
        for _ in generate(plan_sampling(model, settings), [SampleInput(label=0)]):
            pass
        assert calls == [each] * 3


def test_a_picture_is_the_same_in_any_batch():
    model = fresh(*CLASSES)
    last = model.denoiser.network.get_parameter("conv_out.weight")
    torch.nn.init.normal_(last, std=0.1)  # fresh networks say 0
    settings = resolve_settings(model, {"steps": 3, "sampler": "euler_a", "guidance": 2.0})
    plan = plan_sampling(model, settings)
    items = [SampleInput(label=k, seed=10 + k) for k in range(3)]
    *_, together = generate(plan, items)
    *_, alone = generate(plan, items[2:])
    assert (together.x[2] - alone.x[0]).abs().max() < 1e-4
    assert (together.x[0] - together.x[1]).abs().max() > 0.1


def test_sdxl_is_told_pooled_text_and_sizes():
    """The vector is the pooled text, then 256 sinusoids of each size number, in the order height,
    width, top, left, height, width."""
    model = fresh(
        *[f"unet.{key}" for key in ("channels=[8,8]", "depth=[0,1]", "head_dim=4", "groups=4")],
        "unet.heads=null", "unet.blocks=1", "unet.context_dim=48", "unet.vector_dim=1560",
        "codec={kind: vae, widths: [8,8,8,8], groups: 4}",
        "text=[{width: 32, layers: 1, heads: 2, mlp: 8, hidden: -1, final_norm: false},"
        "{width: 16, layers: 1, heads: 2, mlp: 8, hidden: -1, final_norm: false, pooled: true,"
        " projection: 24}]",
        preset="sdxl",
    )  # fmt: skip
    texts = encode_prompts(model, ["a fox", "an owl"])
    cond = build_cond(model, texts, [None, None], (64, 96))
    assert cond.context is not None and cond.context.shape == (2, 77, 48)
    assert cond.vector is not None and cond.vector.shape == (2, 1560)
    numbers = torch.tensor([96.0, 64, 0, 0, 96, 64])
    expected = get_timestep_embedding(numbers, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(cond.vector[0, 24:], expected.flatten(), atol=1e-6)
    assert not torch.allclose(cond.vector[0, :24], cond.vector[1, :24])


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="cannot be used"):
        pick_device("abacus")


def test_models_are_found_by_path_name_and_environment(monkeypatch, tmp_path):
    bundled = find_model(None)
    assert bundled.parent.name == "emoji"
    assert find_model("emoji") == bundled
    monkeypatch.chdir(tmp_path)
    Path("emoji").mkdir()
    assert find_model("emoji") == Path("emoji")
    assert find_model(None) == bundled
    monkeypatch.setenv("DIFFTOOL_MODEL", str(tmp_path))
    assert find_model(None) == tmp_path
    assert find_model("shapes").parent.name == "shapes"
    with pytest.raises(UsageError, match="no model"):
        find_model(str(Path("no/such/model")))


def test_bundled_models_may_be_in_shards(monkeypatch, tmp_path):
    monkeypatch.setattr("difftool.hub.find.preset_folder", lambda: tmp_path)
    for name in ("small", "large", "pictures-only"):
        (tmp_path / name).mkdir()
    model = fresh(*SMALL)
    model.save(tmp_path / "small" / "model.safetensors")
    model.save(tmp_path / "large" / "model.safetensors", limit=20_000)
    assert len([*(tmp_path / "large").iterdir()]) > 2
    tensors = [load_model(name, device="cpu").tensors() for name in ("small", "large")]
    assert all(tensor.equal(tensors[1][name]) for name, tensor in tensors[0].items())
    with pytest.raises(UsageError, match="no model"):
        find_model("pictures-only")
