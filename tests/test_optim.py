"""Optimisers: Muon against torch's own and against singular values; which parameters it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difftool.config.keys import values_of
from difftool.config.layers import Layer, load_preset
from difftool.config.networks import TextConfig, UNetConfig, VaeConfig
from difftool.config.options import by_name
from difftool.config.schema import TrainConfig
from difftool.config.validate import build_preset, to_values
from difftool.data.shapes import ShapesDataset
from difftool.errors import UsageError
from difftool.networks.clip import ClipText
from difftool.networks.unet import UNet
from difftool.networks.vae import Vae
from difftool.training.options import OPTIONS
from difftool.training.run.plan import plan
from difftool.training.step.muon import QUINTIC, is_hidden_matrix, orthogonal
from difftool.training.step.optim import OPTIMIZERS


def test_an_optimizer_of_ones_own_is_a_name_like_the_others():
    given = [Layer("test", {"train": {"optimizer": "mine"}})]
    with pytest.raises(UsageError, match='no optimizer "mine"'):
        plan(ShapesDataset(), "pixel-small", given)
    OPTIMIZERS.add("mine", OPTIMIZERS["adamw"])
    try:
        assert plan(ShapesDataset(), "pixel-small", given).preset.train.optimizer == "mine"
        assert by_name(OPTIONS)["optimizer"].value("mine") == "mine"
        assert "mine" in values_of("train_vae.optimizer")
    finally:
        OPTIMIZERS.remove("mine")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"time": "gaussian"}, "no time distribution"),
        ({"weight": "min_sbr"}, "min_snr"),
        ({"loss": "l3"}, 'no loss "l3"'),
    ],
)
def test_names_of_a_recipe_are_checked_where_it_is_planned(values, says):
    with pytest.raises(UsageError) as caught:
        plan(ShapesDataset(), "pixel-small", [Layer("test", {"train": values})])
    assert says in str(caught.value)
    values = to_values(load_preset("pixel-small")) | {"train": values}
    assert build_preset(values)  # of a model that is sampled, and was trained with a plugin


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 7, 7)])
def test_singular_values_follow_the_quintic_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    a, b, c = QUINTIC
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    wanted = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonal(matrices), wanted.float(), atol=2e-4, rtol=0)


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "unet.mid.weight": (20, 30),
        "unet.up.weight": (40, 8),
        "unet.mid.bias": (20,),
        "unet.conv_in.weight": (6, 3, 3, 3),
    }
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def descend(optimizer: torch.optim.Optimizer, over: list[Tensor], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p in over:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brought it")
def test_matrices_move_as_torchs_muon_moves_them():
    ours = parameters()
    before = [p.detach().clone() for p in list(ours.values())[:2]]
    theirs = [p.clone().requires_grad_() for p in before]
    config = TrainConfig(optimizer="muon", lr=1e-2, weight_decay=0.1)
    descend(OPTIMIZERS["muon"](ours, config), list(ours.values())[:2])
    reference = torch.optim.Muon(
        theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    descend(reference, theirs)
    for a, b, start in zip(ours.values(), theirs, before, strict=False):
        # torch iterates in bfloat16, which is good to about 1 %.
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_everything_else_moves_as_by_adamw():
    ours, theirs = parameters(), parameters()
    rest = ["unet.mid.bias", "unet.conv_in.weight"]
    config = TrainConfig(lr=1e-2, weight_decay=0.1)
    descend(OPTIMIZERS["muon"](ours, config), [ours[name] for name in rest])
    reference = torch.optim.AdamW(
        [theirs[name] for name in rest], lr=1e-2, betas=config.betas, weight_decay=0.1
    )
    descend(reference, [theirs[name] for name in rest])
    for name in rest:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_a_new_learning_rate_reaches_both_halves():
    ours = parameters()
    optimizer = OPTIMIZERS["muon"](ours, TrainConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in ours.items()}
    descend(optimizer, list(ours.values()))
    assert all(torch.equal(before[name], p) for name, p in ours.items())
    assert all(optimizer.state[p] for p in ours.values())


def test_convolutions_are_matrices_whatever_their_memory_layout():
    made = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = torch.zeros(8, 4, 3, 3).to(memory_format=memory_format).requires_grad_()
        optimizer = OPTIMIZERS["muon"]({"unet.x.weight": p, "unet.x.bias": torch.zeros(8)},
                                       TrainConfig(lr=1.0))  # fmt: skip
        descend(optimizer, [p], 1)
        made.append(p.detach())
        values = torch.linalg.svdvals(p.detach().flatten(1)) / (0.2 * 36**0.5)
        assert 0.6 < values.min() <= values.max() < 1.3
    torch.testing.assert_close(made[0], made[1], atol=1e-6, rtol=0)


def test_hidden_matrices_are_those_between_features():
    unet = UNet(
        UNetConfig(
            in_channels=3, out_channels=3, channels=(8, 8), groups=4, depth=(0, 1), head_dim=4,
            num_classes=3,
        )
    )  # fmt: skip
    vae = Vae(VaeConfig(widths=(8, 8), groups=4))
    text = ClipText(TextConfig(width=8, layers=1, heads=2, mlp=16, vocab_size=9, projection=4))
    names = {
        f"{prefix}.{name}": p
        for prefix, network in (("unet", unet), ("vae", vae), ("text.0", text))
        for name, p in network.named_parameters()
    }
    left = {name for name, p in names.items() if p.dim() > 1 and not is_hidden_matrix(name, p)}
    assert left == {
        "unet.conv_in.weight", "unet.conv_out.weight", "unet.class_embedding.weight",
        "vae.encoder.conv_in.weight", "vae.encoder.conv_out.weight",
        "vae.decoder.conv_in.weight", "vae.decoder.conv_out.weight",
        "vae.quant_conv.weight", "vae.post_quant_conv.weight",
        "text.0.text_model.embeddings.token_embedding.weight",
        "text.0.text_model.embeddings.position_embedding.weight",
        "text.0.text_projection.weight",
    }  # fmt: skip
    assert not is_hidden_matrix("critic.layers.3.weight", torch.zeros(4, 4))
