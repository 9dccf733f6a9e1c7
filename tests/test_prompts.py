"""Weights and chunks of prompts, in the syntax of other tools."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hangs import ends
from torch import Tensor

from difftool.config.layers import load_preset
from difftool.pipeline.condition import encode_prompts
from difftool.pipeline.model import Model
from difftool.sampling.expand import is_plain
from difftool.sampling.requests import Request
from difftool.text import compel
from difftool.text.a1111 import conjunction, schedule, weighted
from difftool.text.comfy import nested
from difftool.text.constructs import unread
from difftool.text.syntax import SYNTAXES, chunks
from difftool.text.tokenizer import Tokenizer

CLIP = Tokenizer.clip()
LENGTH = 77


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a fox", [("a fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("((red))", [("red", 1.1**2)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("([red])", [("red", 1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(a (red:1.5) b)", [("a ", 1.1), ("red", 1.65), (" b", 1.1)]),
        (r"a \b", [("a b", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("(a BREAK b:1.2)", [("a", 1.2), ("b", 1.2)]),
        (r"\(red\)", [("(red)", 1)]),
        (r"a \\ b", [("a \\ b", 1)]),
        ("(red", [("red", 1.1)]),
        ("red)", [("red)", 1)]),
        ("(red:x)", [("red:x", 1.1)]),
        ("a:1.3", [("a:1.3", 1)]),
        ("", []),
    ],
)
def test_a1111_weights(prompt, pieces):
    found = weighted(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [w for _, w in found] == pytest.approx([w for _, w in pieces])


# What A1111's prompt_parser publishes beside its grammar, for 10 steps.
SCHEDULES = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(i, ("(b:1.1)", "a")[i % 2]) for i in range(1, 11)],
    "[fe|]male": [(i, ("male", "female")[i % 2]) for i in range(1, 11)],
    "[fe|||]male": [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)],
    # and what follows from the grammar
    "a [b::4] c": [(4, "a b c"), (10, "a  c")],
    "a [b:1.5] c": [(10, "a  c")],
    "[cat:dog]": [(10, "[cat:dog]")],
    "[from:to: 0.5 ]": [(5, "from"), (10, "to")],
    r"[\[a\]:b\|:5]": [(5, r"\[a\]"), (10, r"b\|")],
    "a | [b:3]": [(10, "a | [b:3]")],
    "[b:0] c": [(10, "b c")],
}


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_a1111_schedules(prompt):
    assert schedule(prompt, 10) == SCHEDULES[prompt]


def test_a1111_joins_prompts_by_and():
    assert conjunction("a fox AND a hill : 0.5 AND (x:1.3):-1.") == [
        ("a fox ", 1.0), (" a hill", 0.5), (" (x:1.3)", -1.0)
    ]  # fmt: skip
    assert conjunction("a clock at 10:30") == [("a clock at 10:30", 1.0)]
    assert conjunction("BRAND, ANDES") == [("BRAND, ANDES", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a tall (man)1.2 at a \"picnic area\"++, happy-", [[("a tall", 1), ("man", 1.2),
         ("at a", 1), ("picnic area", 1.21), (",", 1), ("happy", 0.9)]]),
        ("(very (deep)0.5 x)1.1", [[("very", 1.1), ("deep", 0.55), ("x", 1.1)]]),
        ("man.attend(1.4) state-of-the-art", [[("man", 1.4), ("state-of-the-art", 1)]]),
        ('("a fox", "a hill+").and()', [[("a fox", 1)], [("a", 1), ("hill", 1.1)]]),
        (r"a\+ \(b\) (open", [[("a+ (b) ( open", 1)]]),
    ],
)  # fmt: skip
def test_compel_s_weights(prompt, parts):
    found = compel.parts(prompt)
    assert [[text for text, _ in part] for part in found] == [[t for t, _ in p] for p in parts]
    weights = [weight for part in found for _, weight in part]
    assert weights == pytest.approx([weight for part in parts for _, weight in part])


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("(a (red:1.5) b)", [("a ", 1.1), ("red", 1.5), (" b", 1.1)]),
        ("((red))", [("red", 1.1**2)]),
        ("[red]", [("[red]", 1)]),
        (r"\(red\) (x)", [("(red) ", 1), ("x", 1.1)]),
        ("(red", [("(red", 1)]),
    ],
)
def test_comfy_weights(prompt, pieces):
    found = nested(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [w for _, w in found] == pytest.approx([w for _, w in pieces])


def test_without_a_syntax_brackets_are_text_and_the_rest_is_cut():
    (chunk,) = chunks(CLIP, "(red:1.3)", LENGTH)
    assert [chunk.ids] == CLIP.encode(["(red:1.3)"], LENGTH) and set(chunk.weights) == {1.0}
    assert len(chunks(CLIP, "fox " * 200, LENGTH)) == 1


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_short_prompt_is_read_alike(syntax):
    for prompt in ("", "a red fox, on a hill"):
        (chunk,) = chunks(CLIP, prompt, LENGTH, syntax)
        assert [chunk.ids] == CLIP.encode([prompt], LENGTH)


@pytest.mark.parametrize("syntax", ["a1111", "comfy"])
def test_long_prompts_are_chunks_that_lose_nothing(syntax):
    prompt = "a (red:1.4) fox on hills, " * 40
    found = chunks(CLIP, prompt, LENGTH, syntax)
    tokens = [
        (id, weight)
        for chunk in found
        for id, weight in zip(chunk.ids[1:], chunk.weights[1:], strict=True)
        if id != CLIP.end_id
    ]
    assert [id for id, _ in tokens] == CLIP.tokens("a red fox on hills, " * 40)
    (red,) = CLIP.tokens("red")
    assert all((weight == 1.4) == (id == red) for id, weight in tokens)
    assert len(found) > 2 and all(len(chunk.ids) == LENGTH for chunk in found)
    assert all(chunk.ids[0] == CLIP.start_id for chunk in found)


def test_a1111_parts_chunks_at_commas_and_breaks():
    found = chunks(CLIP, "fox " * 70 + ", " + "owl " * 20, LENGTH, "a1111")
    (comma,), (owl,) = CLIP.tokens(","), CLIP.tokens("owl")
    assert found[0].ids[71] == comma and owl not in found[0].ids
    found = chunks(CLIP, "fox , " + "owl " * 90, LENGTH, "a1111")  # too far back
    assert found[0].ids.count(owl) == 73
    one, two = chunks(CLIP, "a fox BREAK an owl", LENGTH, "a1111")
    assert [one.ids] == CLIP.encode(["a fox"], LENGTH)
    assert [two.ids] == CLIP.encode(["an owl"], LENGTH)


def test_comfy_parts_no_short_word():
    word = "antidisestablishmentarianism"
    assert 1 < len(CLIP.tokens(word)) < 8
    found = chunks(CLIP, "fox " * 74 + word, LENGTH, "comfy")
    assert found[0].ids[75] == CLIP.end_id and found[1].ids[1:4] == CLIP.tokens(word)[:3]


UNREAD = [
    ("a (red:1.2) fox", "(red:1.2)", "comfy a1111"),
    ("a (red (dark) x:.5) fox", "(red (dark) x:.5)", "comfy a1111"),
    ("((red)) fox", "((red))", "comfy a1111"),
    ("a [red] fox", "[red]", "a1111 novelai"),
    ("a fox BREAK a hill", "BREAK", "a1111"),
    ("a {red|blue} fox", "{red|blue}", ""),
    ("a {2$$red|blue} fox", "{2$$red|blue}", ""),
    ("{{masterpiece}}, fox", "{masterpiece}", "novelai"),
    ("a __colour/dark__ fox", "__colour/dark__", ""),
    ("a fox <lora:ink:0.8>", "<lora:ink:0.8>", "a1111 comfy compel"),
    ("a fox <hypernet:ink:1>", "<hypernet:ink:1>", ""),
    ("a fox in embedding:ink", "embedding:ink", ""),
    ("a <cat-toy> fox", "<cat-toy>", ""),
    ("a fox AND a hill", "AND", "a1111"),
    ("a [fox:owl:0.5]", "[fox:owl:0.5]", "a1111"),
    ("a [fox|owl]", "[fox|owl]", "a1111"),
    ("a fox --ar 3:2", "--ar 3:2", ""),
    ("a fox --no hills", "--no", ""),
    ("hot:: dog::2", "::", "novelai"),
    ("1.5::fox::, hill", "1.5::", "novelai"),
    ("a fox++ on a hill", "fox++", "compel"),
    ("a (red fox)1.3", ")1.3", "compel"),
    ('("a fox", "a hill").and()', ").and()", "compel"),
    ('("a fox", "a hill").blend(1, 2)', ").blend(", "compel"),
    ('("a fox", "a hill").and(1, 2)', ").and(1", "compel"),
    ("a cat.swap(dog)", ".swap(", ""),
]
WORDS = [
    *("a fox (smiling), 3d", r"a fox \(red:1.2\)", "C++ for a book, 10:30", "a -- b - c"),
    *("snake_case names", "wow!! <3", "PRISON BREAKOUT", "a well--known fox", "x < y > z"),
    *("(one (two)) three", "std::vector of foxes", "it's ratio 16:9 (wide)", ""),
]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("{{fox}}, [hill]", [("fox", 1.05**2), (", ", 1), ("hill", 1 / 1.05)]),
        ("{a [b] c}", [("a ", 1.05), ("b", 1), (" c", 1.05)]),
        ("{red fox", [("red fox", 1.05)]),
        ("a fox} (1.3) at 10:30", [("a fox} (1.3) at 10:30", 1)]),
        ("1.5::rain, {night}::, x", [("rain, ", 1.5), ("night", 1.575), (", x", 1)]),
        ("-1::hat::a fox", [("hat", -1), ("a fox", 1)]),
    ],
)
def test_novelai_s_weights(prompt, pieces):
    (found,) = SYNTAXES["novelai"].parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_braces_are_weights_where_the_syntax_says_so():
    request = Request(prompt="{a|b} {fox} --ar 3:2", settings={"prompt_syntax": "novelai"})
    assert is_plain(request, None) and not is_plain(replace(request, settings={}), None)


@pytest.mark.parametrize(("prompt", "text", "readers"), UNREAD)
def test_what_is_not_read_is_found_in_every_syntax_but_its_own(prompt, text, readers):
    for syntax in SYNTAXES:
        found = [said for _, said in unread(prompt, syntax)]
        assert (text in found) == (syntax not in readers.split()), syntax


@pytest.mark.parametrize("prompt", WORDS)
def test_words_are_words(prompt):
    assert not [*unread(prompt, "none")]


def test_words_of_embeddings_are_read():
    assert not [*unread("an embedding:Ink and <ink> fox", "none", ["ink"])]
    assert [text for _, text in unread("embedding:pen, embedding:ink", "none", ["ink"])] == [
        "embedding:pen"
    ]


@pytest.mark.parametrize("letter", ["(", "[", "{", "<", "_", "(a:", "[a:", "{|", "a::", "--a "])
def test_no_prompt_takes_long_to_look_through(letter):
    with ends():
        list(unread((letter * 10_000)[:10_000], "none"))


@pytest.mark.parametrize("letters", ["(", "[", "[a:", "[a|", "(a:", "[a:b:", "((a) ", ":", "\\"])
def test_no_prompt_takes_long_to_read(letters):
    prompt = (letters * 10_000)[:10_000]
    with ends():
        schedule(prompt, 10)
        for syntax in SYNTAXES.values():
            syntax.parts(prompt)


@pytest.fixture(scope="module")
def model() -> Model:
    small = [
        "unet.channels=[8,8]", "unet.depth=[1,1]", "unet.groups=4", "unet.heads=2", "unet.blocks=1",
        "unet.context_dim=16", "codec={kind: vae, widths: [8,8], groups: 4, blocks: 1}",
        "text=[{width: 16, layers: 2, heads: 2, mlp: 16}]",
    ]  # fmt: skip
    return Model.fresh(load_preset("sd15", small), seed=1)


def context(model: Model, prompts: list[str], syntax: str = "none") -> Tensor:
    found = encode_prompts(model, prompts, syntax=syntax).context
    assert found is not None
    return found


def test_weights_scale_tokens_and_keep_the_mean(model):
    plain = context(model, ["a red fox"])
    found = context(model, ["a (red:1.5) fox"], syntax="a1111")
    scaled = plain.clone()
    scaled[:, 2] *= 1.5
    assert torch.allclose(found, scaled * (plain.mean() / scaled.mean()), rtol=1e-4, atol=1e-5)


def test_comfy_weights_go_away_from_nothing(model):
    plain = context(model, ["a red fox"])
    nothing = context(model, [""])
    found = context(model, ["a (red:1.5) fox"], syntax="comfy")
    expected = plain.clone()
    expected[:, 2] = (plain[:, 2] - nothing[:, 2]) * 1.5 + nothing[:, 2]
    assert torch.allclose(found, expected, atol=1e-5)


def test_chunks_are_joined_and_short_prompts_filled(model):
    long = "a fox, " * 40
    both = context(model, [long, "an owl"], syntax="a1111")
    alone = context(model, ["an owl"])
    empty = context(model, [""])
    count = both.shape[1] // LENGTH
    assert count == len(chunks(CLIP, long, LENGTH, "a1111")) > 1
    assert torch.allclose(both[1, :LENGTH], alone[0], atol=1e-5)
    assert torch.allclose(both[1, LENGTH : 2 * LENGTH], empty[0], atol=1e-5)
