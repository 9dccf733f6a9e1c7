"""The CLIP text encoders against transformers'."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from difftool.config.networks import TextConfig
from difftool.networks.clip import ClipText
from difftool.text.tokenizer import Tokenizer

SMALL = TextConfig(width=48, layers=4, heads=3, mlp=80, length=20)
PROMPTS = ["a photo of a cat", "", "<|endoftext|> twice", "one two three four " * 9]


def fresh(config: TextConfig, seed: int = 0) -> ClipText:
    """An encoder whose every weight matters: large enough for gelus and softmaxes to bend."""
    encoder = ClipText(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "embedding" in name:
                weight.normal_(generator=generator)
            elif weight.ndim == 2:
                weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.normal_("norm.weight" in name, 0.5, generator=generator)
    return encoder.eval()


def oracle(encoder: ClipText, **changes):
    """transformers' model with the same weights; `changes` to its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        c = encoder.config
        settings = {
            "vocab_size": c.vocab_size, "hidden_size": c.width, "intermediate_size": c.mlp,
            "projection_dim": c.projection or 8, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "max_position_embeddings": c.length,
            "hidden_act": c.activation, "bos_token_id": 1, "eos_token_id": c.end_id,
        }  # fmt: skip
        model = CLIPTextModelWithProjection(CLIPTextConfig(**{**settings, **changes})).eval()
    weights = dict(encoder.state_dict())
    if c.projection is None:
        weights["text_projection.weight"] = torch.zeros(8, c.width)
    model.load_state_dict(weights, strict=True)
    return model


def ids(config: TextConfig, pad_id: int | None = None) -> torch.Tensor:
    return torch.tensor(Tokenizer.clip(pad_id).encode(PROMPTS, config.length))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to how much b varies from entry to entry."""
    assert a.shape == b.shape and b.std() > 0.1
    return float((a - b).abs().max() / b.std())


CASES = {
    "sd1": SMALL,
    "sd2": replace(SMALL, activation="gelu", hidden=-2, pad_id=0),
    "sdxl-1": replace(SMALL, hidden=-2, final_norm=False),
    "sdxl-2": replace(
        SMALL, activation="gelu", hidden=-2, final_norm=False, projection=40, pooled=True, pad_id=0
    ),
    "early": replace(SMALL, hidden=-4, projection=64, pooled=True),
    "embeddings": replace(SMALL, hidden=-5, final_norm=False),
    "one layer": replace(SMALL, layers=1, heads=1, mlp=32),
    "extended vocabulary": replace(SMALL, vocab_size=49412, projection=48, pooled=True),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_agrees_with_transformers(name):
    config = CASES[name]
    encoder = fresh(config)
    tokens = ids(config, config.pad_id)
    if config.vocab_size > 49408:
        tokens[0, 2] = 49411  # an added token, above the end mark
    model = oracle(encoder)
    expected = model(tokens, output_hidden_states=True)
    context, pooled = encoder(tokens)
    state = expected.hidden_states[config.hidden]
    if config.final_norm:
        state = encoder.text_model.final_layer_norm(state)
    assert difference(context, state) < 1e-5
    if config.hidden == -1 and config.final_norm:
        assert difference(context, expected.last_hidden_state) < 1e-5
    if config.pooled:
        assert pooled.shape == (len(tokens), config.projection)
        assert difference(pooled, expected.text_embeds) < 1e-5
    else:
        assert pooled is None


@torch.no_grad()
def test_pooled_without_projection():
    encoder = fresh(replace(SMALL, pooled=True))
    tokens = ids(SMALL)
    context, pooled = encoder(tokens)
    ends = [row.index(49407) for row in tokens.tolist()]
    assert torch.equal(
        pooled, torch.stack([row[end] for row, end in zip(context, ends, strict=True)])
    )


@torch.no_grad()
@pytest.mark.parametrize("control", ["activation", "projection", "hidden", "norm", "mask", "end"])
def test_controls_differ(control):
    """What a wrong encoder would give is far outside the tolerance."""
    config = replace(SMALL, vocab_size=49412, projection=48, pooled=True)
    encoder = fresh(config)
    tokens = ids(config, 0)
    context, pooled = encoder(tokens)
    changed = replace(
        config,
        activation="gelu" if control == "activation" else "quick_gelu",
        hidden=-2 if control == "hidden" else -1,
        final_norm=control != "norm",
    )
    wrong = ClipText(changed).eval()
    weights = encoder.state_dict()
    if control == "projection":
        weights["text_projection.weight"] = weights["text_projection.weight"].T
    wrong.load_state_dict(weights)
    if control == "mask":  # a later token must not reach an earlier one
        other = tokens.clone()
        other[:, 10:] = 5
        assert torch.equal(wrong(other)[0][:, :10], context[:, :10])
        assert difference(wrong(other)[0][:, 10:], context[:, 10:]) > 0.1
    elif control == "end":  # the largest id, which transformers takes for the end if told 2
        tokens[:, 1] = 49411
        argmax = oracle(encoder, eos_token_id=2)(tokens).text_embeds
        assert difference(encoder(tokens)[1], argmax) > 0.1
    elif control == "projection":
        assert difference(wrong(tokens)[1], pooled) > 0.1
    else:
        assert difference(wrong(tokens)[0], context) > 1e-3


@torch.no_grad()
def test_learned_vocabulary_pools_its_own_end_mark():
    tokenizer = Tokenizer.learn(["a red circle", "a red square"], 300)
    config = replace(
        SMALL, vocab_size=tokenizer.vocab_size, tokenizer="learned", projection=24, pooled=True
    )
    encoder = fresh(config)
    short = torch.tensor(tokenizer.encode(["a red circle"], 12))
    long = torch.tensor(tokenizer.encode(["a red circle"], 20))
    assert short[0, :4].tolist()[0] == 1 and (short == 2).sum() == 1
    assert difference(encoder(short)[1], encoder(long)[1]) < 1e-5
    other = torch.tensor(tokenizer.encode(["a red square"], 12))
    assert difference(encoder(other)[1], encoder(short)[1]) > 0.1


@pytest.mark.parametrize(
    "config, run",
    [
        (SMALL, 4),
        (replace(SMALL, hidden=-2), 3),
        (replace(SMALL, hidden=-5), 0),
        (replace(SMALL, hidden=-2, pooled=True), 4),
    ],
)
@torch.no_grad()
def test_runs_no_layer_in_vain(config, run):
    encoder = fresh(config)
    calls = []
    for layer in encoder.text_model.encoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    encoder(ids(config))
    assert len(calls) == run


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (TextConfig(), 123_060_480, 196),
        (TextConfig(width=1024, layers=23, heads=16, mlp=4096), 340_387_840, 372),
        (TextConfig(width=1280, layers=32, heads=20, mlp=5120, projection=1280), 694_659_840, 517),
    ],
    ids=["CLIP-L", "OpenCLIP-H, 23 layers", "OpenCLIP-bigG"],
)
def test_published_sizes(config, parameters, tensors):
    with torch.device("meta"):
        weights = ClipText(config).state_dict()
    assert sum(w.numel() for w in weights.values()) == parameters
    assert len(weights) == tensors


@torch.no_grad()
def test_init_weights_is_a_function_of_the_generator():
    config = replace(SMALL, projection=40)

    def init(seed: int) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            encoder = ClipText(config)
        encoder.to_empty(device="cpu")
        for weight in encoder.parameters():
            weight.fill_(float("nan"))
        encoder.init_weights(torch.Generator().manual_seed(seed))
        return encoder.state_dict()

    first, again, other = init(3), init(3), init(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    layer = "text_model.encoder.layers.1."
    assert not torch.equal(first[layer + "mlp.fc1.weight"], other[layer + "mlp.fc1.weight"])
    scales = {
        "text_model.embeddings.token_embedding.weight": 0.02,
        "text_model.embeddings.position_embedding.weight": 0.01,
        layer + "self_attn.q_proj.weight": 48**-0.5,
        layer + "self_attn.out_proj.weight": (48 * 8) ** -0.5,
        layer + "mlp.fc1.weight": 96**-0.5,
        layer + "mlp.fc2.weight": (48 * 8) ** -0.5,
        "text_projection.weight": 48**-0.5,
    }
    for name, scale in scales.items():
        assert first[name].std() == pytest.approx(scale, rel=0.06), name
    for name, weight in first.items():
        if "norm" in name or name.endswith("bias"):
            assert (weight == float("norm" in name and name.endswith("weight"))).all(), name


def test_trains():
    """Gradients reach every weight that the outputs depend on."""
    encoder = fresh(replace(SMALL, projection=40, pooled=True))
    context, pooled = encoder(ids(SMALL))
    (context.square().mean() + pooled.square().mean()).backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in encoder.parameters())


@pytest.mark.parametrize("change", [{"heads": 5}, {"hidden": 0}, {"hidden": -6}])
def test_impossible_configurations(change):
    with pytest.raises(ValueError, match=r"heads|hidden"):
        replace(SMALL, **change)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="21 tokens"):
        fresh(SMALL)(torch.zeros(1, 21, dtype=torch.long))
