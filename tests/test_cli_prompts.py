"""What stands in a prompt for something else, from the command line to the picture and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import Ran
from PIL import Image

from difftool.text.tokenizer import Tokenizer

SAMPLE = {
    "size": [16, 16], "steps": 2, "sampler": "euler", "schedule": "linspace", "guidance": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    tokenizer = Tokenizer.learn(["a red fox", "a blue dog on a green hill"] * 9, 300)
    text = {"width": 32, "layers": 1, "heads": 2, "mlp": 64, "length": 12, "tokenizer": "learned"}
    preset = tiny.preset(
        12,
        name="text",
        codec=tiny.BLOCKS,
        unet={"attention": "transformer", "depth": [0, 1], "context_dim": 32},
        text=[text | {"vocab_size": tokenizer.vocab_size}],
        path={"kind": "flow"},
        target="flow",
        sample=SAMPLE,
    )
    path = tmp_path_factory.mktemp("models") / "text.safetensors"
    tiny.model(preset, seed=1, tokenizer_json=tokenizer.to_json()).save(path)
    return str(path)


@pytest.fixture
def sample(model, difftool):
    """Run `difftool sample` in an empty folder."""

    def run(*args: object) -> Ran:
        return difftool("sample", "-m", model, "--device", "cpu", *args)

    return run


def chunk(path: str) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["difftool"])["request"]


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# --- dynamic prompts --------------------------------------------------------------------------

TEMPLATE = "a {red|blue|green} __beast__ {fox|dog}"


def test_what_is_chosen_follows_the_seed_and_stands_in_the_picture(sample):
    Path("wildcards").mkdir()
    Path("wildcards/beast.txt").write_text("small {1|2}\nbig\n", encoding="utf-8")
    ran = sample(TEMPLATE, "-n", 8, "--seed", 3, "--json", "-o", "[seed].png")
    assert ran.code == 0 and "warning" not in ran.err
    prompts = [item["prompt"] for item in ran.objects]
    assert len(set(prompts)) > 3 and not any("{" in prompt for prompt in prompts)
    assert {item["template"] for item in ran.objects} == {TEMPLATE}
    assert (chunk("5.png")["prompt"], chunk("5.png")["template"]) == (prompts[2], TEMPLATE)
    # alone, from its metadata, and as a line of --prompts it is the same
    assert sample(TEMPLATE, "--seed", 5, "-o", "alone.png").code == 0
    Path("wildcards/beast.txt").write_text("none\n", encoding="utf-8")
    assert sample("--from-image", "5.png", "-o", "again.png").code == 0
    line = {k: v for k, v in ran.objects[2].items() if k != "path"}
    Path("lines.jsonl").write_text(json.dumps(line), encoding="utf-8")
    assert sample("--prompts", "lines.jsonl", "-o", "fed.png").code == 0
    assert pixels("alone.png") == pixels("5.png") == pixels("again.png")
    with Image.open("fed-0000.png") as image:
        assert image.tobytes() == pixels("5.png")
    assert chunk("again.png") == chunk("5.png") == chunk("fed-0000.png")
    # another prompt is not of that template
    assert sample("--from-image", "5.png", "a {x|x}", "-o", "other.png").code == 0
    assert (chunk("other.png")["prompt"], chunk("other.png")["template"]) == ("a x", "a {x|x}")


def test_every_combination_is_drawn(sample):
    args = ("--negative", "{dog|hill}", "--combinatorial", "--json", "--seed", 1, "-n", 2)
    ran = sample("a {2$$ $$red|blue} fox", *args, "-o", "out/[index].png")
    told = [(item["prompt"], item["negative"], item["seed"]) for item in ran.objects]
    assert told == [
        (f"a {colours} fox", negative, seed)
        for colours in ("red blue", "blue red")
        for negative in ("dog", "hill")
        for seed in (1, 2)
    ]
    ran = sample("{0|1|2|3|4|5|6|7|8|9}" * 7, "--combinatorial")
    assert ran.code == 2 and "too many combinations" in ran.err


def test_wildcards_that_are_not_there_are_words_and_that_is_said(sample):
    ran = sample("a __beast__ fox", "--json")
    assert ran.object["prompt"] == "a __beast__ fox" and "--wildcard-dir" in ran.err
    assert sample("a fox", "--wildcard-dir", "none").code == 2
    ran = sample("a {red|blue} fox", "--prompt-syntax", "none", "--json")
    assert ran.object["prompt"] == "a {red|blue} fox"
