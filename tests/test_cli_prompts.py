"""What stands in a prompt for something else, from the command line to the picture and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from commands import Ran
from PIL import Image

from difftool.storage.safetensors import save_tensors
from difftool.text.midjourney import parameters
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


def test_every_combination_is_drawn(sample, monkeypatch):
    args = ("--negative", "{dog|hill}", "--combinatorial", "--json", "--seed", 1, "-n", 2)
    ran = sample("a {2$$ $$red|blue} fox", *args, "-o", "out/[index].png")
    told = [(item["prompt"], item["negative"], item["seed"]) for item in ran.objects]
    assert told == [
        (f"a {colours} fox", negative, seed)
        for colours in ("red blue", "blue red")
        for negative in ("dog", "hill")
        for seed in (1, 2)
    ]
    monkeypatch.setattr("difftool.sampling.expand.MAX_COMBINATIONS", 50)
    ran = sample("{0|1|2|3|4|5|6|7|8|9}" * 2, "--combinatorial")
    assert ran.code == 2 and "too many combinations" in ran.err


def test_wildcards_that_are_not_there_are_words_and_that_is_said(sample):
    ran = sample("a __beast__ fox", "--json")
    assert ran.object["prompt"] == "a __beast__ fox" and "--wildcard-dir" in ran.err
    assert sample("a fox", "--wildcard-dir", "none").code == 2
    ran = sample("a {red|blue} fox", "--prompt-syntax", "none", "--json")
    assert ran.object["prompt"] == "a {red|blue} fox"


# --- LoRAs and learned words ------------------------------------------------------------------


def write_lora(path: str, seed: int) -> None:
    """A change of a layer of the U-Net, and of one of the text encoder, in kohya's names."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q": (8, 8),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (64, 32),
    }
    tensors = {}
    for layer, (out, into) in layers.items():
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2, into, generator=generator)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(Path(path), tensors, {})


def test_loras_that_a_prompt_names_are_applied_to_its_picture_alone(sample):
    write_lora("styles/ink.safetensors", 1)
    write_lora("styles/deep/Pen.safetensors", 2)
    sample("a red fox", "--seed", 1, "-o", "plain.png")
    sample("a red fox", "--seed", 1, "--lora", "styles/ink.safetensors:0.8", "-o", "flag.png")
    prompts = ["a red fox", "a red fox <lora:ink:0.8>", "a red fox", "<lora:pen:1> a red fox",
               "a red fox <lora:ink:0.8>", "a red fox <lora:ink:0:0.8>"]  # fmt: skip
    ran = sample(*prompts, "--seed", 1, "--lora-dir", "styles", "--json", "-o", "p.png")
    assert ran.code == 0 and "warning" not in ran.err
    made = [pixels(f"p-000{i}.png") for i in range(6)]
    assert made[0] == made[2] == pixels("plain.png")
    assert made[1] == made[4] == pixels("flag.png")
    assert len({made[0], made[1], made[3], made[5]}) == 4, "weights apart in the text encoder"
    with Image.open("p-0001.png") as image:
        text = image.info["parameters"]
    assert text.startswith("a red fox <lora:ink:0.8>\n") and 'Lora hashes: "ink: ' in text
    # again: by the name in its prompt, and said where the file is another
    assert sample("--from-image", "p-0001.png", "-o", "x.png").code == 2
    ran = sample("--from-image", "p-0001.png", "--lora-dir", "styles", "-o", "again.png")
    assert pixels("again.png") == made[1] and "warning" not in ran.err
    write_lora("loras/ink.safetensors", 3)
    ran = sample("--from-image", "p-0001.png", "-o", "other.png")
    assert ran.code == 0 and "not the LoRA that the picture was made with" in ran.err


def test_loras_that_are_nowhere_fail_their_picture_alone(sample):
    write_lora("lora/ink.safetensors", 1)
    ran = sample("a <lora:inc:1> fox", "a <lora:ink:1:0.5:dyn=3> fox", "-o", "out/")
    assert ran.code == 1 and 'there is no LoRA "inc"' in ran.err and "ink" in ran.err
    ran = sample("a fox", "--negative", "bad <lora:ink:1>")
    assert ran.code == 0 and "negative prompt names has no meaning here" in ran.err


def test_words_of_a_folder_are_read_by_their_names(sample):
    Path("words/deep").mkdir(parents=True)
    table = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    save_tensors(Path("words/deep/Ink.safetensors"), {"emb_params": table}, {})
    save_tensors(Path("words/wide.safetensors"), {"emb_params": torch.randn(1, 40)}, {})
    save_tensors(Path("words/other.safetensors"), {"emb_params": table + 1}, {})
    sample(
        "an (ink:1.2) fox", "--seed", 1, "--embedding", "words/deep/Ink.safetensors", "-o", "a.png"
    )
    sample("an (ink:1.2) fox", "--seed", 1, "-o", "plain.png")
    ran = sample("a fox", "an (ink:1.2) fox", "a wide fox", "--seed", 1, "--embedding-dir", "words",
                 "-o", "b.png")  # fmt: skip
    assert ran.code == 0 and "wide is drawn as words" in ran.err and "other" not in ran.err
    assert pixels("b-0001.png") == pixels("a.png") != pixels("plain.png")
    assert chunk("b-0001.png")["embeddings"] == ["words/deep/Ink.safetensors"]
    sample("--from-image", "b-0001.png", "--embedding-dir", "words", "-o", "again.png")
    assert pixels("again.png") == pixels("a.png")


# --- Midjourney's parameters, and the flags that they are ------------------------------------


@pytest.mark.parametrize(
    ("prompt", "left", "values", "others"),
    [
        ("a fox --ar 3:2", "a fox", {"ar": "3:2"}, ()),
        ("a fox --aspect 16:9 --c 20 --r 3", "a fox",
         {"ar": "16:9", "chaos": "20", "repeat": "3"}, ()),
        ("a fox \u2014ar 2:1 --no hills, big trees --seed 5", "a fox",
         {"ar": "2:1", "no": "hills, big trees", "seed": "5"}, ()),
        ("--tile a fox --stop 80", "a fox", {"tile": "", "stop": "80"}, ()),
        ("a fox --tile x --no a --no b", "a fox", {"tile": "x", "no": "a, b"}, ()),
        ("a fox --v 5.2 --style raw --stylize 500 --niji on a hill", "a fox on a hill", {},
         ("--v 5.2", "--style raw", "--stylize 500", "--niji")),
        ("a {fox --ar 3:2|owl} --iw 2", "a {fox --ar 3:2|owl}", {}, ("--iw 2",)),
        ("a \u2014raw and wild \u2014no tail", "a \u2014raw and wild \u2014no tail", {}, ()),
        ("a well--known fox -- so --steps 5", "a well--known fox -- so --steps 5", {}, ()),
    ],
)  # fmt: skip
def test_parameters(prompt, left, values, others):
    assert parameters(prompt) == (left, values, others)


def test_parameters_in_a_prompt_are_what_the_flags_are(sample):
    prompt = (
        "a red fox --ar 2:1 --no hill --seed 5 --tile x --stop 50 --chaos 30 --repeat 2 --s 250"
    )
    ran = sample(prompt, "--steps", 4, "--size", "32x32", "--json", "-o", "in/[seed].png")
    assert ran.code == 0 and "--s 250 has no meaning here" in ran.err
    item, second = ran.objects
    assert [item["prompt"], item["negative"], item["seed"]] == ["a red fox", "hill", 5]
    assert (item["width"], item["height"]) == (22, 12) and second["seed"] == 6
    assert (item["tile"], item["stop"], item["chaos"]) == ("x", 50, 30)
    flags = ("--ar", "2:1", "--no", "hill", "--seed", 5, "--tile", "x", "--stop", 50, "--chaos", 30)
    sample("a red fox", *flags, "--repeat", 2, "--steps", 4, "-o", "by/[seed].png")
    sample("--from-image", "in/6.png", "-o", "again.png")
    assert pixels("by/5.png") == pixels("in/5.png")
    assert pixels("by/6.png") == pixels("in/6.png") == pixels("again.png")
    Path("lines.txt").write_text(
        "a red fox --ar 2:1 --no hill --d 6 --tile x --stop 50 --chaos 30 --s 4 --weird 9\n",
        encoding="utf-8",
    )
    ran = sample("--prompts", "lines.txt", "-o", "lines.png")
    assert "--weird 9 has no meaning" in ran.err and pixels("lines-0000.png") == pixels("in/6.png")
    ran = sample("a {fox --ar 2:1 --seed 4|fox --ar 2:1 --seed 4}", "--json", "--seed", 1)
    assert "--seed 4 has no meaning here" in ran.err and ran.object["width"] == 22


def test_parameters_that_say_nothing_sound_are_refused(sample):
    for prompt, said in (
        ("a --ar wide", '"wide" is not a shape'),
        ("a --stop 200", "--stop in the"),
    ):
        ran = sample(prompt)
        assert ran.code == 2 and said in ran.err
    assert sample("a", "--ar", "3:2", "--size", "16x16").code == 2
    assert sample("a", "--repeat", 2, "--seed", "1,2").code == 2


def test_a_flag_that_may_stand_alone(sample):
    for args, way in ((["--tile", "a fox"], "both"), (["a fox", "--tile", "y"], "y")):
        ran = sample(*args, "--seed", 1, "--json")
        assert (ran.object["prompt"], ran.object["tile"]) == ("a fox", way)


def test_chaos_and_stop_change_a_picture_and_none_is_none(sample):
    for name, args in (("plain", []), ("none", ["--chaos", 0, "--stop", 100]),
                       ("chaos", ["--chaos", 50]), ("stop", ["--stop", 50])):  # fmt: skip
        sample("a red fox", "--seed", 1, "--steps", 4, *args, "-o", f"{name}.png")
    assert pixels("plain.png") == pixels("none.png")
    assert len({pixels(f"{name}.png") for name in ("plain", "chaos", "stop")}) == 3
    ran = sample("a red fox", "--seed", 1, "--steps", 4, "--stop", 50, "-o", "more.png")
    assert "2 of 4 steps are run" in ran.err


def test_where_diffusers_is_matched_prompts_are_read_as_they_stand(sample):
    ran = sample("a (red:1.3) {fox|dog}", "--match", "diffusers", "--json", "--seed", 1)
    item = ran.object
    assert (item["prompt"], item["prompt_syntax"]) == ("a (red:1.3) {fox|dog}", "none")


@pytest.mark.parametrize(
    ("name", "flag"), [("prompts.txt", "--prompts"), ("p.jsonl", "--prompts"), ("a.png", "--init")]
)
def test_a_file_that_is_given_as_a_prompt_is_answered_with_its_option(sample, name, flag):
    Path(name).write_text("a red fox\n", encoding="utf-8")
    ran = sample(name)
    assert ran.code == 2 and f"{flag} {name}" in ran.err
