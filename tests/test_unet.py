"""The U-Net against diffusers', family by family, scaled down, with the same random weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import published
import pytest
import torch
import torch.nn.functional as F
from slices import slow_but
from torch import Tensor

from difftool.config.networks import UNetConfig
from difftool.networks.layers import Transformer, sinusoids
from difftool.networks.unet import UNet

TOLERANCE = 1e-5
VISIBLE = 1e-4
"""What a wrong build must at least differ by."""

SD1 = UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(32, 64, 96, 96),
    groups=16,
    attention="transformer",
    depth=(1, 1, 1, 0),
    context_dim=24,
    heads=4,
)
SD2 = replace(SD1, heads=None, head_dim=16, linear_projection=True)
SDXL = replace(SD2, channels=(32, 64, 96), depth=(0, 2, 3), mid_depth=3, vector_dim=116)
DDPM = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(32, 64, 64, 64),
    groups=16,
    depth=(0, 1, 0, 0),
    heads=1,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
)


class Case(NamedTuple):
    """A family: our configuration, and the published one scaled down likewise."""

    config: UNetConfig
    oracle: dict[str, Any]


def scaled(family: dict[str, Any], config: UNetConfig, **changes: Any) -> dict[str, Any]:
    """A published configuration with our widths."""
    small: dict[str, Any] = {"block_out_channels": config.channels, "norm_num_groups": 16}
    if "cross_attention_dim" in family:
        small |= {"cross_attention_dim": 24, "attention_head_dim": config.level_heads}
    return family | small | changes


NUMBERS = {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 116}
"""SDXL's vector, scaled down: 20 pooled and 6 numbers of 16 sinusoids each."""

REFINER = replace(SDXL, channels=(32, 64, 96, 96), depth=(0, 2, 2, 0), mid_depth=2, vector_dim=100)
SSD_1B = replace(
    SDXL, depth=(0, 2, 3), up_depth=(0, (2, 1, 1), (3, 3, 4)), mid_blocks=1, mid_depth=0
)
UNCLIP = replace(SD2, vector_dim=40, vector_name="class_embedding")
UPSCALER = replace(
    SD2, in_channels=7, depth=(0, 1, 1, 1), only_cross=(0, 1, 2), head_dim=None, heads=4,
    num_classes=10,
)  # fmt: skip
KOALA = replace(SDXL, blocks=1, mid_blocks=0)
LCM = replace(SD1, guidance_dim=32)
ADM = UNetConfig(
    in_channels=3,
    out_channels=6,
    channels=(32, 64, 96, 96),
    blocks=3,
    groups=16,
    depth=(0, 1, 1, 1),
    head_dim=16,
    num_classes=10,
    scale_shift=True,
    resblock_updown=True,
)
# Each level its own number of blocks.
UNEVEN = replace(SD1, blocks=(1, 3, 2, 1), dropout=0.3)

CASES = {
    "sd1": Case(SD1, scaled(published.SD1, SD1)),
    "sd1-inpaint": Case(
        replace(SD1, in_channels=9), scaled(published.SD1, SD1, in_channels=9)
    ),
    "sd2": Case(SD2, scaled(published.SD2, SD2)),
    "sd2-unclip": Case(
        UNCLIP, scaled(published.UNCLIP, UNCLIP, projection_class_embeddings_input_dim=40)
    ),
    "x4-upscaler": Case(UPSCALER, scaled(published.UPSCALER, UPSCALER, num_class_embeds=10)),
    "sdxl": Case(
        SDXL, scaled(published.SDXL, SDXL, transformer_layers_per_block=(1, 2, 3), **NUMBERS)
    ),
    "sdxl-refiner": Case(
        REFINER,
        scaled(
            published.REFINER, REFINER, transformer_layers_per_block=2,
            **NUMBERS | {"projection_class_embeddings_input_dim": 100},
        ),
    ),
    "ssd-1b": Case(
        SSD_1B,
        scaled(
            published.SSD_1B, SSD_1B, transformer_layers_per_block=((1, 1), (2, 2), (3, 3)),
            reverse_transformer_layers_per_block=((3, 3, 4), (2, 1, 1), (1, 1, 1)), **NUMBERS,
        ),
    ),
    "koala": Case(
        KOALA,
        scaled(
            published.SDXL, KOALA, transformer_layers_per_block=(1, 2, 3), layers_per_block=1,
            mid_block_type=None, **NUMBERS,
        ),
    ),
    "uneven": Case(UNEVEN, scaled(published.SD1, UNEVEN, layers_per_block=UNEVEN.blocks)),
    "lcm": Case(LCM, scaled(published.LCM, LCM, time_cond_proj_dim=32)),
    "ddpm": Case(DDPM, scaled(published.DDPM, DDPM)),
    "ddpm-no-mid-attention": Case(
        replace(DDPM, mid_depth=0), scaled(published.DDPM, DDPM, add_attention=False)
    ),
    "adm": Case(
        ADM,
        scaled(
            published.ADM, ADM, attention_head_dim=16, attn_norm_num_groups=16,
            num_class_embeds=10,
        ),
    ),
}  # fmt: skip


def fill(network: torch.nn.Module, seed: int = 0) -> None:
    """Weights with which everything shows: branches of unit size, every bias and norm in use.

    The residual stream is small, so that an error in the eps of a norm is seen; what is put out is
    not, as it is read through a norm.
    """
    generator = torch.Generator().manual_seed(seed)
    to_stream = ("conv_in", "conv2", "conv_shortcut", "proj_out", "attentions.0.to_out.0")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            module, _, kind = name.rpartition(".")
            small = module.endswith(to_stream) or "samplers.0.conv." in name
            if weight.ndim > 1:
                std = 1.0 if "class_embedding.weight" in name else weight[0].numel() ** -0.5
                weight.normal_(0, std * (0.03 if small else 1.5), generator=generator)
            elif "norm" in module and kind == "weight":
                weight.normal_(1, 0.3, generator=generator)
            else:
                weight.normal_(0, 0.01 if small else 0.3, generator=generator)


class Inputs(NamedTuple):
    x: Tensor
    t: Tensor
    cond: dict[str, Tensor]
    numbers: Tensor
    """SDXL's size numbers, which `vector` holds as sinusoids."""


def inputs(config: UNetConfig, size: tuple[int, int] = (16, 24)) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cond: dict[str, Tensor] = {}
    count = 6 if config.vector_dim == 116 else 5
    numbers = torch.tensor(
        [[512.0, 768, 0, 64, 1024, 1024][:count], [64.0, 8, 3, 5, 99, 7][:count]]
    )
    if config.context_dim:
        cond["context"] = normal(2, 7, config.context_dim)
    if config.vector_dim and config.vector_name == "add_embedding":
        pooled = normal(2, config.vector_dim - 16 * count)
        cond["vector"] = torch.cat([pooled, sinusoids(numbers, 16).flatten(1)], dim=1)
    elif config.vector_dim:
        cond["vector"] = normal(2, config.vector_dim)
    if config.num_classes:
        cond["label"] = torch.tensor([3, 8])
    if config.guidance_dim:
        cond["guidance"] = torch.tensor([6.5, 0.0])
    return Inputs(normal(2, config.in_channels, *size), torch.tensor([981.0, 17.0]), cond, numbers)


@torch.no_grad()
def expected(oracle: Any, config: UNetConfig, given: Inputs) -> Tensor:
    """What diffusers' network puts out."""
    cond, options = given.cond, {}
    if not config.context_dim:
        return oracle(given.x, given.t, class_labels=cond.get("label")).sample
    if config.vector_dim and config.vector_name == "add_embedding":
        pooled = cond["vector"][:, : -given.numbers[0].numel() * 16]
        options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": given.numbers}
    elif config.vector_dim:
        options["class_labels"] = cond["vector"]
    if config.num_classes:
        options["class_labels"] = cond["label"]
    if config.guidance_dim:
        options["timestep_cond"] = guidance_embedding(cond["guidance"], config.guidance_dim)
    return oracle(given.x, given.t, cond["context"], **options).sample


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.latent_consistency_models import (
            pipeline_latent_consistency_text2img as pipeline,
        )

        embed: Any = pipeline.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        return embed(None, w, dim)


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def run(config: UNetConfig, weights: dict[str, Tensor], given: Inputs, **changes: Tensor) -> Tensor:
    network = UNet(config).eval()
    network.load_state_dict(weights, strict=True)
    return network(given.x, given.t, **given.cond | changes)


@pytest.fixture(scope="module")
def oracles() -> Callable[[str], Any]:
    """diffusers' networks by name of the case, built once, with filled weights."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = published.build(CASES[name].oracle)
            fill(built[name])
        return built[name]

    return get


@pytest.mark.parametrize("name", slow_but([*CASES][::2], [*CASES]))
def test_output_equals_diffusers(name, oracles):
    config, oracle = CASES[name].config, oracles(name)
    given = inputs(config)
    theirs = expected(oracle, config, given)
    assert theirs.std() > 0.1
    assert error(run(config, oracle.state_dict(), given), theirs) <= TOLERANCE
    # Everything that is told is heard.
    told = given.cond | {"t": given.t}
    for key, value in told.items():
        swapped = dict(given.cond, **{key: value.flip(0)})
        t = swapped.pop("t", given.t)
        heard = run(config, oracle.state_dict(), given._replace(t=t, cond=swapped))
        assert error(heard, theirs) > 0.01, f"{key} is not heard"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].config.context_dim])
@pytest.mark.parametrize("size", [(9, 23), (17, 18)])
def test_odd_sizes_equal_diffusers(name, size, oracles):
    config, oracle = CASES[name].config, oracles(name)
    given = inputs(config, size)
    theirs = expected(oracle, config, given)
    assert theirs.shape[2:] == size
    assert error(run(config, oracle.state_dict(), given), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_pixel_networks_take_odd_sizes(name, oracles):
    config = CASES[name].config
    given = inputs(config, (13, 18))
    assert run(config, oracles(name).state_dict(), given).shape == (2, config.out_channels, 13, 18)


@pytest.mark.parametrize("name", CASES)
def test_weights_return_to_diffusers(name, oracles):
    network = UNet(CASES[name].config)
    published.build(CASES[name].oracle).load_state_dict(network.state_dict(), strict=True)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {"heads": 8}),
    ("sd1", {"heads": None, "head_dim": 4}),
    ("sd1", {"flip_sin_to_cos": False}),
    ("sd2", {"head_dim": 32}),
    ("sd2-unclip", {"freq_shift": 1}),
    ("x4-upscaler", {"heads": 8}),
    ("sdxl", {"norm_eps": 1e-6}),
    ("sdxl-refiner", {"flip_sin_to_cos": False}),
    ("ssd-1b", {"norm_eps": 1e-6}),
    ("koala", {"head_dim": 32}),
    ("lcm", {"freq_shift": 1}),
    ("ddpm", {"heads": 2}),
    ("ddpm", {"freq_shift": 0}),
    ("ddpm", {"flip_sin_to_cos": True}),
    ("ddpm", {"norm_eps": 1e-5}),
    ("ddpm", {"downsample_padding": 1}),
    ("adm", {"head_dim": 32}),
    ("adm", {"norm_eps": 1e-6}),
]


@pytest.mark.parametrize("name,changes", WRONG, ids=str)
def test_a_wrong_configuration_is_seen(name, changes, oracles):
    config, oracle = CASES[name].config, oracles(name)
    given = inputs(config)
    wrong = run(replace(config, **changes), oracle.state_dict(), given)
    assert error(wrong, expected(oracle, config, given)) > VISIBLE


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].config.attention == "transformer"])
def test_an_approximate_gelu_is_seen(name, oracles, monkeypatch):
    config, oracle, gelu = CASES[name].config, oracles(name), F.gelu
    given = inputs(config)
    theirs = expected(oracle, config, given)
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))
    assert error(run(config, oracle.state_dict(), given), theirs) > TOLERANCE


def test_a_wrong_eps_of_the_transformers_norm_is_seen(oracles):
    config, oracle = CASES["sd1"].config, oracles("sd1")
    given = inputs(config)
    network = UNet(config).eval()
    network.load_state_dict(oracle.state_dict())
    for module in network.modules():
        if isinstance(module, Transformer):
            module.norm.eps = 1e-5
    with torch.no_grad():
        wrong = network(given.x, given.t, **given.cond)
    assert error(wrong, expected(oracle, config, given)) > VISIBLE


def test_lcm_takes_w_and_not_the_guidance_scale(oracles):
    config, oracle = CASES["lcm"].config, oracles("lcm")
    given = inputs(config)
    wrong = run(config, oracle.state_dict(), given, guidance=given.cond["guidance"] + 1)
    assert error(wrong, expected(oracle, config, given)) > VISIBLE


@pytest.mark.parametrize("dim", [6, 7, 320])
@pytest.mark.parametrize("cosines_first", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoids_equal_diffusers(dim, cosines_first, shift):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.5, 37.25, 999.0])
    theirs = get_timestep_embedding(t, dim, cosines_first, shift)
    assert torch.equal(sinusoids(t, dim, cosines_first=cosines_first, shift=shift), theirs)


def test_sinusoids_are_what_the_formula_says():
    t = torch.tensor([[3.0, 0.25], [1.0, 7.0]])
    ours = sinusoids(t, 8)
    for i in range(4):
        angle = t.double() * 10_000 ** (-i / 4)
        torch.testing.assert_close(ours[..., i], angle.cos().float())
        torch.testing.assert_close(ours[..., 4 + i], angle.sin().float())


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl", "adm", "lcm"])
def test_conditioning_must_be_what_the_config_says(name):
    config = CASES[name].config
    network, given = UNet(config), inputs(config)
    for key in given.cond:
        missing = {k: v for k, v in given.cond.items() if k != key}
        with pytest.raises(ValueError, match=f"needs a {key}"):
            network(given.x, given.t, **missing)
    for key in {"context", "vector", "label", "guidance"} - set(given.cond):
        with pytest.raises(ValueError, match=f"takes no {key}"):
            network(given.x, given.t, **given.cond, **{key: torch.ones(2, 1)})
    for key in {"context", "vector"} & set(given.cond):
        with pytest.raises(ValueError, match=f"{key} is 23 wide"):
            network(given.x, given.t, **given.cond | {key: given.cond[key][..., :23]})
    with pytest.raises(ValueError, match=f"takes {config.in_channels}"):
        network(given.x[:, :2], given.t, **given.cond)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"heads": None}, "exactly one"),
        ({"head_dim": 8}, "exactly one"),
        ({"heads": 5}, "equal heads"),
        ({"heads": None, "head_dim": 64}, "equal heads"),
        ({"heads": (4, 4)}, "heads has 2 entries for 4 levels"),
        ({"groups": 32, "channels": (48, 64, 96, 96)}, "width 48"),
        ({"depth": (1, 1)}, "depth has 2 entries"),
        ({"depth": ((1, 0), 1, 1, 0), "up_depth": (1, 1, 1, 0)}, "all blocks"),
        ({"depth": ((1, 1), 1, 1, 0)}, "up_depth .* does not fit 3 blocks"),
        ({"depth": ((1,), 1, 1, 0)}, "depth .* does not fit 2 blocks"),
        ({"up_depth": (-1, 1, 1, 0)}, "up_depth"),
        ({"blocks": (1, 2)}, "blocks has 2 entries"),
        ({"attention": "plain"}, "context_dim"),
        ({"attention": "plain", "context_dim": None, "depth": (2, 0, 0, 0)}, "one layer deep"),
        ({"only_cross": (4,)}, "only_cross"),
        (
            {"num_classes": 3, "vector_dim": 8, "vector_name": "class_embedding"},
            "class_embedding cannot name both",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SD1, **changes)


def test_heads_are_not_needed_where_nothing_attends():
    config = replace(DDPM, depth=(), mid_depth=0, heads=None)
    assert config.level_heads == (1, 1, 1, 1)
    assert not any("attentions" in name for name in UNet(config).state_dict())


# --- arithmetic and memory -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl", "adm"])
@torch.no_grad()
def test_channels_last_changes_rounding_only(name, oracles):
    config, given = CASES[name].config, inputs(CASES[name].config)
    network = UNet(config).eval()
    network.load_state_dict(oracles(name).state_dict())
    plain = network(given.x, given.t, **given.cond)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = given.x.contiguous(memory_format=torch.channels_last)
    result = network(x, given.t, **given.cond)
    assert error(result, plain) <= TOLERANCE
    assert result.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix(oracles):
    config, given = SDXL, inputs(SDXL)
    both = run(config, oracles("sdxl").state_dict(), given)
    second = {key: value[1:] for key, value in given.cond.items()}
    alone = given._replace(x=given.x[1:], t=given.t[1:], cond=second)
    assert error(run(config, oracles("sdxl").state_dict(), alone), both[1:]) <= TOLERANCE


@pytest.mark.parametrize("name", ["sdxl", "lcm", "adm"])
@torch.no_grad()
def test_half_precision_networks_take_conditioning_in_fp32(name, oracles):
    config, given = CASES[name].config, inputs(CASES[name].config)
    network = UNet(config).eval()
    network.load_state_dict(oracles(name).state_dict())
    full = network(given.x, given.t, **given.cond)
    half = network.bfloat16()(given.x.bfloat16(), given.t, **given.cond)
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.99


# --- fresh weights ---------------------------------------------------------------------------


def started(config: UNetConfig, seed: int) -> UNet:
    with torch.device("meta"):
        network = UNet(config)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(math.nan)
    network.init_weights(torch.Generator().manual_seed(seed))
    return network


@pytest.mark.parametrize("name", ["sd2", "sdxl", "lcm", "ddpm", "adm"])
def test_fresh_weights_are_whole_and_a_function_of_the_seed(name):
    config = CASES[name].config
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = started(config, 5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = started(config, 5).state_dict(), started(config, 6).state_dict()
    assert all(weight.isfinite().all() for weight in first.values())
    assert all(torch.equal(weight, again[key]) for key, weight in first.items())
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


@pytest.mark.parametrize("name", ["sd2", "adm"])
def test_fresh_networks_start_at_zero_and_learn_everywhere(name):
    config = CASES[name].config
    network, given = started(config, 0), inputs(config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    assert network(given.x, given.t, **given.cond).abs().max() == 0
    for _ in range(4):  # from the output inwards, a step opens one more zero
        optimizer.zero_grad()
        (network(given.x, given.t, **given.cond) - 1).pow(2).mean().backward()
        optimizer.step()
    still = [
        key
        for key, weight in network.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    assert still == []


def test_fresh_layers_keep_the_size_of_their_input():
    weight = started(ADM, 0).get_parameter("up_blocks.0.resnets.0.conv1.weight")
    out, inner, *kernel = weight.shape
    mean_fan = (out + inner) / 2 * math.prod(kernel)
    assert weight.var().item() == pytest.approx(1 / mean_fan, rel=0.02)
