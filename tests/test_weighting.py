"""Weights, chunks, AND and schedules of prompts against their published definitions, written here
anew: A1111's (sd_emphasis, prompt_parser, cfg_denoiser), ComfyUI's (sd1_clip), and compel's
(embeddings_provider, whose attention masks transformers' encoders apply)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from test_clip import oracle
from torch import Tensor

from difftool.config.layers import load_preset, merged
from difftool.config.networks import TextConfig
from difftool.config.validate import build_preset, to_values
from difftool.diffusion.prediction import recover
from difftool.errors import UsageError
from difftool.pipeline.condition import encode_prompts
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.text.syntax import SYNTAXES
from difftool.text.tokenizer import Tokenizer

LENGTH, ROOM = 77, 75
TINY: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "mlp": 16}
CLIP = Tokenizer.clip()
Pieces = Sequence[tuple[str, float]]


def build(name: str) -> Model:
    values = to_values(load_preset(name))
    texts = [
        text | TINY | ({"projection": 8} if text["projection"] else {}) for text in values["text"]
    ]
    unet = {
        "channels": [8, 8], "blocks": 1, "depth": [0, 1], "groups": 4, "heads": None, "head_dim": 4,
        "context_dim": 16 * len(texts), "up_depth": None, "mid_depth": 1, "only_cross": [],
        "vector_dim": 8 + 6 * 256 if values["size_numbers"] else None,
    }  # fmt: skip
    codec = {"kind": "vae", "widths": [8, 8], "groups": 4, "blocks": 1}
    parts = {"unet": unet, "text": texts, "codec": codec, "family": "difftool"}
    model = Model.fresh(build_preset(merged([values, parts])), seed=1)
    generator = torch.Generator().manual_seed(5)
    for part in (*model.text, model.network):
        for parameter in part.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: build(name) for name in ("sd15", "sd21", "sdxl")}


FAMILIES = ("sd15", "sd21", "sdxl")


# --- the definitions --------------------------------------------------------------------------


def chunks_of_a1111(pieces: Pieces) -> list[list[tuple[int, float]]]:
    """Tokens go on, and at the 76th those after the last comma, if it is one of the last 20, go
    over to the next chunk; a piece "BREAK" of weight -1 ends a chunk."""
    (comma,) = CLIP.tokens(",")
    done: list[list[tuple[int, float]]] = []
    now: list[tuple[int, float]] = []
    last_comma = -1
    for text, weight in pieces:
        if (text, weight) == ("BREAK", -1):
            done.append(now)
            now, last_comma = [], -1
            continue
        for token in CLIP.tokens(text):
            if token == comma:
                last_comma = len(now)
            elif len(now) == 75 and last_comma != -1 and len(now) - last_comma <= 20:
                moved = now[last_comma + 1 :]
                done.append(now[: last_comma + 1])
                now, last_comma = moved, -1
            if len(now) == 75:
                done.append(now)
                now, last_comma = [], -1
            now.append((token, weight))
    return [*done, now] if now or not done else done


def chunks_of_comfy(pieces: Pieces) -> list[list[tuple[int, float]]]:
    """Words of fewer than 8 tokens are whole."""
    done: list[list[tuple[int, float]]] = [[]]
    for text, weight in pieces:
        for word in text.split(" "):
            tokens = CLIP.tokens(word)
            if len(done[-1]) + len(tokens) > 75:
                done.append([])
            done[-1] += [(token, weight) for token in tokens]
    return done


def rows(chunks: list[list[tuple[int, float]]], pad: int) -> tuple[Tensor, Tensor]:
    ids = [[49406, *(t for t, _ in c), 49407] + [pad] * (75 - len(c)) for c in chunks]
    weights = [[1.0, *(w for _, w in c), 1.0] + [1.0] * (75 - len(c)) for c in chunks]
    return torch.tensor(ids), torch.tensor(weights)[..., None]


def encoded(model: Model, chunks: list[list[tuple[int, float]]], rule: str) -> Tensor:
    """[L,D] by definition, of all encoders."""
    sides = []
    for encoder, tokenizer in zip(model.text, model.tokenizers, strict=True):
        ids, weights = rows(chunks, tokenizer.pad_id)
        z = encoder(ids)[0]
        if rule == "a1111":
            pairs = zip(z, weights, strict=True)
            sides.append(torch.cat([c * w * (c.mean() / (c * w).mean()) for c, w in pairs]))
        else:
            empty = encoder(rows([[]], tokenizer.pad_id)[0])[0]
            sides.append(((z - empty) * weights + empty).flatten(0, 1))
    return torch.cat(sides, dim=-1)


def context(model: Model, *prompts: str, **options: Any) -> Tensor:
    found = encode_prompts(model, prompts, **options).context
    assert found is not None
    return found


LONG, OWLS = "a castle on a hill, " * 14, "owl " * 69
PROMPTS: list[tuple[str, list[tuple[str, float]]]] = [
    ("a (red:1.5) fox", [("a ", 1), ("red", 1.5), (" fox", 1)]),
    (
        "((very) big), [small] (x:0.3)",
        [("very", 1.21), (" big", 1.1), (", ", 1), ("small", 1 / 1.1), (" ", 1), ("x", 0.3)],
    ),
    (f"{LONG}(a red fox and:1.4) an owl", [(LONG, 1), ("a red fox and", 1.4), (" an owl", 1)]),
    ("fox " * 80 + "(owl)", [("fox " * 80, 1), ("owl", 1.1)]),
    ("a fox BREAK (an owl:1.2)", [("a fox", 1), ("BREAK", -1), ("an owl", 1.2)]),
    (f"fox , {OWLS}, (red hill:0.7)", [(f"fox , {OWLS}, ", 1), ("red hill", 0.7)]),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "pieces"), PROMPTS)
def test_a1111(models, family, prompt, pieces):
    model = models[family]
    found = context(model, prompt, syntax="a1111")[0]
    expected = encoded(model, chunks_of_a1111(pieces), "a1111")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_comfy(models, family):
    model = models[family]
    long = "a castle on a hill , " * 15
    for prompt, pieces in (
        ("a (red:1.5) fox", [("a ", 1), ("red", 1.5), (" fox", 1)]),
        ("(a (red:0.5) fox) [x]", [("a ", 1.1), ("red", 0.5), (" fox", 1.1), (" [x]", 1)]),
        (f"{long}(a red fox:1.4) owl", [(long, 1), ("a red fox", 1.4), (" owl", 1)]),
    ):
        found = context(model, prompt, syntax="comfy")[0]
        expected = encoded(model, chunks_of_comfy(pieces), "comfy")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def by_compel(model: Model, pieces: Pieces) -> Tensor:
    """The embedding moved from the empty one by the weights; for each text below 1 the same with
    that text masked, tan((1 - w) pi / 2) parts of it, normed."""
    sides = []
    for encoder, tokenizer, config in zip(
        model.text, model.tokenizers, model.preset.text, strict=True
    ):
        reference, shape = oracle(encoder), cast(TextConfig, config)  # type: ignore[arg-type]

        def states(ids: Tensor, mask: Tensor | None, reference=reference, shape=shape) -> Tensor:
            out = reference(ids, mask, output_hidden_states=True)
            if shape.hidden == -1:
                return out.last_hidden_state
            states = out.hidden_states[shape.hidden]
            norm = reference.text_model.final_layer_norm
            return norm(states) if shape.final_norm else states

        tokens = [(t, w, i) for i, (text, w) in enumerate(pieces) for t in CLIP.tokens(text)]
        ids, weights = rows([[(t, w) for t, w, _ in tokens]], tokenizer.pad_id)
        empty = states(rows([[]], tokenizer.pad_id)[0], None)

        def weighted(
            mask: Tensor | None, ids=ids, weights=weights, empty=empty, states=states
        ) -> Tensor:
            return empty + (states(ids, mask) - empty) * weights

        parts, shares = [weighted(None)], [1.0]
        for number, (_, weight) in enumerate(pieces):
            if weight < 1:
                mask = torch.ones_like(ids)
                for place, (_, _, of) in enumerate(tokens, 1):
                    mask[0, place] = int(of != number)
                parts.append(weighted(mask))
                shares.append(math.tan((1 - max(weight, 1e-5)) * math.pi / 2))
        total = torch.stack([s * part[0] for s, part in zip(shares, parts, strict=True)]).sum(0)
        sides.append(total / sum(shares))
    return torch.cat(sides, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (red)1.5 fox", [("a", 1), ("red", 1.5), ("fox", 1)]),
        ("a red- fox on (a (green)0.5 hill)++", [("a", 1), ("red", 0.9), ("fox on", 1),
         ("a", 1.21), ("green", 0.605), ("hill", 1.21)]),
        ("(an owl)0 at night", [("an owl", 0), ("at night", 1)]),
    ],
)  # fmt: skip
def test_compel(models, family, prompt, pieces):
    model = models[family]
    found = context(model, prompt, syntax="compel")[0]
    torch.testing.assert_close(found, by_compel(model, pieces), rtol=2e-4, atol=2e-5)
    # the same arithmetic for another notation
    other = "".join(f"({text}:{weight}) " for text, weight in pieces)
    found = context(model, other, syntax="a1111", weighting="compel")[0]
    torch.testing.assert_close(found, by_compel(model, pieces), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_compel_composes(models, family):
    """Blends are sums of encodings, of the longest's chunks; .and() lays them side by side, each
    moved from the empty prompt by its weight."""
    model = models[family]

    def of(text: str) -> Tensor:
        return context(model, text, syntax="compel")[0]

    long = "an owl and a fox on a hill at night, " * 9
    empty, fox, owl = (of(text) for text in ("", "a (red)1.5 fox", "an owl"))
    many = of(long)
    blocks = len(many) // len(fox)
    assert blocks > 1
    padded = torch.cat([owl, *[empty] * (blocks - 1)])
    half = empty + 0.5 * (owl - empty)
    for prompt, expected in (
        ('("a (red)1.5 fox", "an owl").blend(3, 1)', 0.75 * fox + 0.25 * owl),
        ('("a (red)1.5 fox", "an owl").blend()', (fox + owl) / 2),
        ('("a (red)1.5 fox", "an owl").blend(0.9, -0.4, no_normalize)', 0.9 * fox - 0.4 * owl),
        (f'("{long}", "an owl").blend(1, 1)', (many + padded) / 2),
        ('("a (red)1.5 fox", "an owl").and(1, 0.5)', torch.cat([fox, half])),
        (
            '(("a (red)1.5 fox", "an owl").blend(1, 3), "an owl").and()',
            torch.cat([0.25 * fox + 0.75 * owl, owl]),
        ),
    ):
        torch.testing.assert_close(of(prompt), expected, rtol=1e-4, atol=1e-5)
    both = context(model, '("a (red)1.5 fox", "an owl").blend(3, 1)', long, syntax="compel")
    torch.testing.assert_close(both[1], many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ('("a fox", "an owl").blend(1, 2, 3)', "2 prompts have 3 weights"),
        ('("a fox", "an owl").blend(1, x)', "no numbers"),
        ('("a fox", "an owl").blend(1, -1)', "add no_normalize"),
    ],
)
def test_weights_that_do_not_fit_are_refused(prompt, says):
    with pytest.raises(UsageError) as caught:
        SYNTAXES["compel"].composition(prompt)
    assert says in str(caught.value)


def test_weights_that_are_not_applied(models):
    found = context(models["sd15"], "a (red:1.5) fox", syntax="a1111", weighting="none")
    assert found.equal(context(models["sd15"], "a red fox"))


# --- at the network ---------------------------------------------------------------------------


def told(model: Model, prompts: list[str], **asked: Any) -> list[Tensor]:
    """The contexts that the network is given, call by call."""
    calls: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["context"]), with_kwargs=True
    )
    try:
        settings = {"size": (16, 16), "guidance": 1.0, "sampler": "euler", "steps": 4}
        plan = plan_sampling(model, resolve_settings(model, settings | asked))
        list(generate(plan, [SampleInput(prompt, seed=i) for i, prompt in enumerate(prompts)]))
    finally:
        hook.remove()
    return calls


def test_scheduled_prompts(models):
    """A1111's schedule of [a:b:0.5] in 4 steps is a up to 2, and its counter begins with 0."""
    model = models["sd15"]
    fox, owl = (context(model, f"a {name} on a hill")[0] for name in ("fox", "owl"))
    calls = told(model, ["a [fox:owl:0.5] on a hill"])
    expected = [fox, fox, fox, owl]
    for found, wanted in zip(calls, expected, strict=True):
        torch.testing.assert_close(found[0], wanted)
    calls = told(model, ["a [fox|owl] on a hill"])
    for found, wanted in zip(calls, [fox, fox, owl, fox], strict=True):
        torch.testing.assert_close(found[0], wanted)
    # a second-order method asks twice a step, and is planned for as many
    assert len(told(model, ["a [fox:owl:0.5] on a hill"], sampler="heun")) == 7


def test_texts_of_a_schedule_share_their_mean(models):
    model = models["sd15"]
    calls = told(model, ["[a fox:(an owl:1.5):0.5]"])
    ids = [[(t, w) for t in CLIP.tokens(text)] for text, w in (("a fox", 1.0), ("an owl", 1.5))]
    token_ids, weights = rows(ids, model.tokenizers[0].pad_id)
    z = model.text[0](token_ids)[0]
    scaled = z * weights
    scaled = scaled * (z.mean() / scaled.mean())
    torch.testing.assert_close(calls[0][0], scaled[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calls[3][0], scaled[1], rtol=1e-4, atol=1e-5)


def test_and_adds_the_guidance_of_prompts(models):
    model, scale = models["sd15"], 5.0
    asked = {"size": (16, 16), "guidance": scale, "sampler": "ddim", "steps": 2}
    plan = plan_sampling(model, resolve_settings(model, asked))
    given = SampleInput("a fox AND (an owl:1.2) : 0.5 AND hills:-0.3", "bad", seed=3)
    first = next(iter(generate(plan, [given])))
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    level = plan.levels[0]

    def f(prompt: str) -> Tensor:
        from difftool.diffusion.denoiser import Cond

        return model.denoiser(x, level, Cond(context=context(model, prompt, syntax="a1111")))

    no = f("bad")
    output = no + sum(
        scale * share * (f(prompt) - no)
        for prompt, share in (("a fox", 1.0), ("(an owl:1.2)", 0.5), ("hills", -0.3))
    )
    x0 = recover(x, output, level, model.denoiser.target).x0
    torch.testing.assert_close(first.x0, x0, rtol=1e-3, atol=1e-3)


def test_prompts_of_and_are_as_long_as_the_longest(models):
    model = models["sd15"]
    long = "owl " * 100
    calls = told(model, [f"a fox AND {long}"], steps=1)
    short = context(model, "a fox", syntax="a1111")
    padded = torch.cat([short, short[:, -1:].expand(-1, 77, -1)], dim=1)
    found = torch.cat([contexts for contexts in calls if contexts.shape[1] == 154])
    torch.testing.assert_close(found[:1], padded)
    torch.testing.assert_close(found[1:], context(model, long, syntax="a1111"))


def test_a_picture_is_the_same_in_any_company(models):
    model = models["sd15"]
    prompts = ["a fox", "fox " * 100, "a fox AND an owl", "[a|b] fox", "a (fox:1.4)"]
    asked = {"size": (16, 16), "guidance": 3.0, "sampler": "euler_a", "steps": 3}
    plan = plan_sampling(model, resolve_settings(model, asked))
    inputs = [SampleInput(prompt, seed=7) for prompt in prompts]
    *_, together = generate(plan, inputs)
    for i, one in enumerate(inputs):
        *_, alone = generate(plan, [one])
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=1e-4, atol=1e-4)
