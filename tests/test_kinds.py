"""A backbone that this package has never heard of trains and samples: a network, its configuration
and a row. Nothing else has to be told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from folders import lay
from torch import Tensor, nn

from difftool.config.families import FAMILIES, Family, family_of
from difftool.config.layers import Layer, preset_layers, resolve
from difftool.config.networks import NETWORK_KINDS, IdentityConfig, VaeConfig
from difftool.config.schema import Preset
from difftool.config.validate import build_preset, to_values
from difftool.conversion.model import convert_model
from difftool.data import open_dataset
from difftool.errors import CheckError, UsageError
from difftool.formats import layouts, open_model
from difftool.formats.diffusers.write import plan_diffusers
from difftool.formats.layouts import network_rules
from difftool.formats.ldm.names import UNET, VAE
from difftool.formats.ldm.preset_of_file import derive
from difftool.formats.ldm.tables import vae_rules
from difftool.formats.rules import Rule, placed
from difftool.networks.base import Network
from difftool.networks.kinds import NETWORKS
from difftool.networks.layers import sinusoids
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.training.run.costs import costs_of
from difftool.training.step.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """A transformer over the patches of x_t."""

    kind: Literal["patches"] = "patches"
    in_channels: int
    out_channels: int
    width: int = 16
    patch: int = 2
    num_classes: int | None = None
    vector_dim: None = None
    guidance_dim: None = None
    dropout: float = 0.0

    @property
    def multiple(self) -> int:
        return self.patch

    def kept(self, height: int, width: int) -> int:
        return height * width // self.patch**2 * self.width


class PatchNetwork(Network):
    """One layer of attention, told the time and the class."""

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config, side = config, config.patch
        self.conv_in = nn.Conv2d(config.in_channels, config.width, side, stride=side)
        self.attentions = nn.ModuleList([nn.Linear(config.width, config.width) for _ in range(4)])
        self.conv_out = nn.ConvTranspose2d(config.width, config.out_channels, side, stride=side)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes, config.width)

    def forward(
        self, x: Tensor, t: Tensor, *, label: Tensor | None = None, **others: None
    ) -> Tensor:
        assert set(others.values()) <= {None}
        h = self.conv_in(x)
        tokens = h.flatten(2).transpose(1, 2) + sinusoids(t, h.shape[1])[:, None].to(h.dtype)
        if label is not None:
            tokens = tokens + self.class_embedding(label)[:, None]
        query, key, value, out = (layer(tokens) for layer in self.attentions)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value) + out
        return self.conv_out(mixed.transpose(1, 2).reshape(h.shape))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.normal_(0, 0.1, generator=generator)


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    NETWORK_KINDS.add("patches", PatchConfig)
    NETWORKS.add("patches", PatchNetwork)
    row = Family(id="toy", network="patches", fits=lambda config: True, latent=False, lora_lr=0.5)
    monkeypatch.setitem(FAMILIES, "toy", row)
    yield
    NETWORKS.remove("patches")
    NETWORK_KINDS.remove("patches")


NETWORK = {"kind": "patches", "in_channels": 12, "out_channels": 12}
RECIPE = {"size": 16, "steps": 2, "batch_size": 4, "precision": "fp32", "flip": False}


def preset(**network: object) -> Preset:
    values = {"unet": NETWORK | network, "family": "toy", "train": RECIPE}
    values["sample"] = {"size": [16, 16], "steps": 2}
    return resolve([*preset_layers("pixel-small"), Layer("test", values)])


@pytest.mark.usefixtures("patches")
def test_a_new_backbone_is_trained_sampled_saved_and_loaded(tmp_path):
    chosen = preset()
    assert build_preset(to_values(chosen)) == chosen
    assert to_values(chosen)["unet"] == NETWORK | {
        "width": 16, "patch": 2, "num_classes": None, "vector_dim": None, "guidance_dim": None,
        "dropout": 0.0,
    }  # fmt: skip
    assert family_of(chosen.unet, chosen.codec, ()) == "toy"
    assert costs_of(chosen).parts["unet"].activations > 0
    model = Model.fresh(chosen, seed=0)
    assert len(model.network.attention_layers()) == 4
    before = model.network.get_parameter("conv_out.bias").clone()
    photos = lay(tmp_path / "photos", {f"{number}.png": None for number in range(8)})
    trainer = Trainer(model, open_dataset(photos))
    assert [step.step for step in trainer.run()] == [1, 2]
    assert not before.equal(model.network.get_parameter("conv_out.bias"))
    made = picture(model)
    path = tmp_path / "toy.safetensors"
    model.save(path)
    again = load_model(str(path), device="cpu")
    assert isinstance(again.network, PatchNetwork) and again.preset == chosen
    torch.testing.assert_close(picture(again), made)
    with pytest.raises(UsageError, match="multiples of 4"):
        resolve_settings(model, {"size": (18, 18)})
    with pytest.raises(CheckError, match="kind patches"):
        convert_model(open_model(path), tmp_path / "folder", "diffusers")
    with pytest.raises(CheckError, match="kind patches"):
        network_rules(chosen.unet)
    convert_model(open_model(path), tmp_path / "again.safetensors", "difftool")


def picture(model: Model) -> Tensor:
    model.network.eval()
    plan = plan_sampling(model, resolve_settings(model, {"steps": 2}))
    *_, last = generate(plan, [SampleInput(seed=3)])
    return decode(model, last.x)


@pytest.mark.usefixtures("patches")
def test_a_preset_that_names_another_kind_replaces_the_network_and_a_wrong_key_is_told():
    assert isinstance(preset().unet, PatchConfig)
    with pytest.raises(UsageError, match=r'no key "unet\.widht"') as told:
        preset(widht=3)
    assert 'did you mean "width"' in str(told.value)
    with pytest.raises(UsageError, match='no unet of kind "patch"') as told:
        preset(kind="patch")
    assert "patches" in str(told.value)


@pytest.mark.usefixtures("patches")
def test_other_tools_files_hold_a_new_backbone_once_it_has_a_layout(monkeypatch, tmp_path):
    def write(config: PatchConfig) -> dict[str, Any]:
        return {"_class_name": "PatchModel", "sample_size": None, "width": config.width}

    def read(config: Mapping[str, Any], where: str) -> PatchConfig:
        return PatchConfig(in_channels=3, out_channels=3, width=config["width"])

    def rules(config: PatchConfig) -> Iterator[Rule]:
        yield Rule("patches.weight", ("conv_in.weight",), (config.width, 3, 2, 2))

    layout = layouts.NetworkLayout(
        classes=("PatchModel",),
        read=read,
        write=write,
        rules=rules,
        mark="patches.weight",
        detect=lambda shapes, pooled: read({"width": shapes["patches.weight"][0]}, ""),
        settle=lambda config, family, params: (config, ()),
    )
    monkeypatch.setitem(layouts.NETWORKS, "patches", layout)
    chosen = replace(preset(in_channels=3, out_channels=3, width=24), codec=IdentityConfig())
    assert layouts.read_network(layouts.write_network(chosen.unet), "it") == chosen.unet
    Model.fresh(chosen, seed=0).save(tmp_path / "toy.safetensors")
    plan = plan_diffusers(open_model(tmp_path / "toy.safetensors"), keep_metadata=True)
    assert json.loads(plan.texts["model_index.json"])["unet"] == ["diffusers", "PatchModel"]
    table = [*placed(layouts.network_rules(chosen.unet), UNET, "unet.")]
    table += placed(vae_rules(VaeConfig(widths=(32, 64), blocks=1)), VAE, "vae.")
    shapes = {rule.theirs: rule.their_shape for rule in table}
    meaning = derive("it", shapes, {}, lambda name: None, name="toy")
    assert meaning.values["unet"] == to_values(chosen.unet)


def test_a_kind_is_known_only_while_it_is_registered(patches):
    chosen = preset()
    NETWORK_KINDS.remove("patches")
    with pytest.raises(UsageError, match="kind"):
        build_preset(to_values(chosen))
    NETWORK_KINDS.add("patches", PatchConfig)
    with pytest.raises(ValueError, match="twice"):
        NETWORK_KINDS.add("patches", PatchConfig)
    assert build_preset(to_values(chosen)) == replace(chosen)
