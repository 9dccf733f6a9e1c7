"""CLIP's tokenizer against transformers' on hostile prompts; learned ones by their promises."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import unicodedata
import warnings

import pytest

from difftool.config.networks import LEARNED_MARKS, TextConfig
from difftool.errors import InputError, UsageError
from difftool.text.tokenizer import MERGES_FILE, Tokenizer

WORDS = [
    "a photo of a cat", "a photo of an astronaut riding a horse on mars",
    "Trending on ArtStation", "don't", "it's", "they'll've", "I'M", "we'd're", "'s", "'", "''''",
    "o'clock's", "‘quoted’s", "1234567890", "3.14159", "1,000,000", "½ ¾ ²", "٣٤٥", "Ⅻ", "①②③",
    "4k 8K", "(word:1.2)", "[[[deep]]] {{}}", "a|b", "<lora:x:1>", "<|endoftext|>",
    "<|startoftext|>", "a<|endoftext|>b", "<|ENDOFTEXT|>", "<|endoftext|><|endoftext|>",
    "<|endoftext", "cat <|startoftext|> dog", "</w>", "a</w>b", "Ġ", "Ġcat</w>", "!", "!!!",
    "!?!?.,;:", "#hashtag @mention", "a_b-c/d\\e", "&amp; &lt;b&gt; &#39; &eacute;",
    "<b>bold</b>", "https://example.com/?q=a%20b&c=d#e", "", " ", "   ", "\t", "\n\n", "\r\n",
    "\u00a0", "\u2003\u3000", "\u200b", "a\u200bb", "\ufeffbom", "  leading", "trailing  ",
    "in   between", "tab\tnew\nline", "\x00", "a\x00b", "\x01\x1b[31m", "\x7f",
    "\x1c\x1d\x1e\x1f", "\x85", "\u2028\u2029", "café", "cafe\u0301", "é", "e\u0301\u0302\u0303",
    "Z̷͓͒a̵͔͝l̶̰͑g̶̯̈o̸͙͂", "ﬁne ﬂag", "ﷺ", "Å Å A\u030a", "ǅ ǆ Ǆ", "İstanbul ısı", "ΑΒΓς Σ",
    "ẞ ß SS", "ＦＵＬＬ　ＷＩＤＴＨ", "𝓯𝓪𝓷𝓬𝔂 𝕋𝕖𝕩𝕥", "𐐀𐐨", "猫の写真", "一只猫的照片，高清",
    "고양이 사진", "고양이", "รูปแมว", "ภาพถ่าย", "बिल्ली की तस्वीर", "বিড়াল", "பூனை", "ຮູບແມວ",
    "រូបភាព", "صورة قطة", "گربهٔ سیاه", "תמונה של חתול", "\u202eright to left\u202c",
    "\u200fabc\u200e", "Фото кота", "ЁЖИК", "ფოტო", "կատու", "🐱", "🐱🐶", "👩‍👩‍👧‍👦",
    "👩🏽‍🚀", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "☃️ ☃", "❤️‍🔥", "🧑🏿‍🤝‍🧑🏻", "a🐱b", "©®™", "€£¥₿",
    "—–-‐", "…", "«guillemets»", "“quotes”", "№ § ¶", "∑∫√∞", "→⇒", "a\u0300", "\u0300",
    "\u0300\u0301", "\ue000", "\U0010ffff", "\ufffd", "\U000e0041\U000e0042", "a\u00adb",
    "x\u034fy", "\u115f", "ㄱㅏ", "word " * 100, "x" * 1000, "é" * 200, "🐱" * 90, "1" * 200,
    "a,b;" * 60, "'s" * 50, " " * 500 + "x", "supercalifragilisticexpialidocious",
    "MiXeD CaSe WoRdS", "ALLCAPS", "snake_case camelCase", "l'été", "rock'n'roll", "'tis",
    "y'all'd've", "the dogs' bowls", "'Re 'Ve 'LL 'S", "’s ’ll", "a  'll", "1's 2nd 3rd", "'1",
    "x²+y²=z²", "H₂O", "10µm", "5′11″", "a=b", "¿qué?", "naïve coöperation",
]  # fmt: skip


def hostile() -> list[str]:
    """WORDS, and random mixtures of their characters: 200 prompts, always the same."""
    rng = random.Random(0)
    characters = sorted(set("".join(WORDS)))
    mixed = ["".join(rng.choices(characters, k=rng.randint(1, 60))) for _ in range(200)]
    return (WORDS + mixed)[:200]


def byte_symbols() -> list[str]:
    """GPT-2's printable characters for the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """transformers' tokenizer over a vocabulary written down apart from the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTokenizer

        lines = gzip.decompress(MERGES_FILE.read_bytes()).decode().splitlines()
        symbols = byte_symbols()
        tokens = [*symbols, *(s + "</w>" for s in symbols), *(li.replace(" ", "") for li in lines)]
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        folder = tmp_path_factory.mktemp("clip")
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
        return CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [
        f"a {size} {colour} {shape} {place} the {ground}"
        for size in ("small", "large", "tiny")
        for colour in ("red", "green", "blue", "yellow")
        for shape in ("circle", "square", "triangle")
        for place in ("on", "above")
        for ground in ("grass", "Straße", "café")
    ]


@pytest.fixture(scope="module")
def learned(captions) -> Tokenizer:
    return Tokenizer.learn(captions, 400)


def test_clip_agrees_with_transformers(oracle):
    prompts = hostile()
    assert len(prompts) == len(set(prompts)) == 200
    clip = Tokenizer.clip()
    assert len(oracle) == clip.vocab_size == 49408
    expected = oracle(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    for prompt, ours, theirs in zip(prompts, clip.encode(prompts, 77), expected, strict=True):
        assert ours == theirs, repr(prompt)
    full = oracle(prompts, add_special_tokens=False)["input_ids"]
    assert [clip.tokens(p) for p in prompts] == full
    assert [clip.count(p) for p in prompts] == [len(ids) for ids in full]


def test_clip_published_ids():
    clip = Tokenizer.clip()
    assert clip.tokens("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (clip.start_id, clip.end_id, clip.pad_id) == (49406, 49407, 49407)
    assert TextConfig().end_id == clip.end_id and TextConfig().vocab_size == clip.vocab_size


@pytest.mark.parametrize("pad_id, filled", [(None, 49407), (0, 0)])
def test_clip_pads(pad_id, filled):
    rows = Tokenizer.clip(pad_id).encode(["a cat", ""], 6)
    assert rows == [[49406, 320, 2368, 49407, filled, filled], [49406, 49407, *[filled] * 4]]


@pytest.mark.parametrize("length", [2, 3, 7, 8])
def test_truncation_keeps_the_end_mark(length):
    clip = Tokenizer.clip()
    (row,) = clip.encode(["a photo of a cat"], length)
    body = [320, 1125, 539, 320, 2368][: length - 2]
    assert row == ([49406, *body, 49407] + [49407] * 6)[:length]
    with pytest.raises(ValueError, match="length 1"):
        clip.encode(["a"], 1)


def test_wrong_pad_id():
    with pytest.raises(UsageError, match="49408"):
        Tokenizer.clip(pad_id=49408)


def test_the_module_imports_no_library():
    script = (
        "import sys; import difftool.text.tokenizer\n"
        "assert not {'tokenizers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_learned_is_independent_of_order_and_process(captions, learned):
    text = learned.to_json()
    rng = random.Random(1)
    for _ in range(5):
        assert Tokenizer.learn(rng.sample(captions, len(captions)), 400).to_json() == text
    script = (
        "import sys; from difftool.text.tokenizer import Tokenizer\n"
        "sys.stdout.reconfigure(encoding='utf-8')\n"
        "sys.stdin.reconfigure(encoding='utf-8')\n"
        "lines = sys.stdin.read().splitlines()\n"
        "print(Tokenizer.learn(reversed(lines), 400).to_json(), end='')"
    )
    for threads in ("1", "3"):
        run = subprocess.run(
            [sys.executable, "-c", script], input="\n".join(captions), encoding="utf-8",
            capture_output=True, check=True, env=os.environ | {"RAYON_NUM_THREADS": threads},
        )  # fmt: skip
        assert run.stdout == text
    # A control: other captions do make another vocabulary.
    assert Tokenizer.learn(captions[:40], 400).to_json() != text


def test_learned_words_become_tokens(captions, learned):
    assert learned.vocab_size <= 400
    for caption in captions:
        assert learned.count(caption) == len(caption.split())
        assert max(learned.tokens(caption)) < learned.vocab_size
    assert learned.tokens("a  SMALL\n red circle ") == learned.tokens("a small red circle")
    assert learned.tokens("no where") != learned.tokens("nowhere")


def test_learned_size_is_a_limit(captions, learned):
    assert Tokenizer.learn(captions, 300).vocab_size == 300
    assert Tokenizer.learn(captions, 5000).vocab_size == learned.vocab_size < 400
    assert Tokenizer.learn([], 1000).vocab_size == 259
    with pytest.raises(UsageError, match="258"):
        Tokenizer.learn(captions, 258)


def test_learned_marks(learned):
    assert (learned.pad_id, learned.start_id, learned.end_id) == (0, 1, 2)
    assert TextConfig(tokenizer="learned").end_id == learned.end_id
    row = learned.encode(["a red circle"], 8)[0]
    assert row[0] == 1 and row[4:] == [2, 0, 0, 0] and min(row[1:4]) > 2
    for mark in LEARNED_MARKS:
        assert min(learned.tokens(f"{mark} a{mark}")) >= len(LEARNED_MARKS)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of learned tokens, from the stored merges and the byte table alone."""
    symbols = byte_symbols()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [b for b in range(256) if b not in order]
    tokens = [*LEARNED_MARKS, *symbols]
    for line in json.loads(tokenizer.to_json())["merges"]:
        if line.replace(" ", "") not in tokens:
            tokens.append(line.replace(" ", ""))
    text = "".join(tokens[i] for i in ids)
    return bytes(order[symbols.index(c)] for c in text).decode()


def test_learned_encodes_anything_without_loss(learned):
    for prompt in WORDS:
        plain = unicodedata.normalize("NFC", prompt).lower().replace("ς", "σ")
        text = decoded(learned, learned.tokens(prompt)).replace("ς", "σ")
        assert "".join(text.split()) == "".join(plain.split()), repr(prompt)


@pytest.mark.parametrize("make", [lambda c: Tokenizer.clip(0), lambda c: Tokenizer.learn(c, 320)])
def test_json_round_trip(make, captions):
    first = make(captions)
    second = Tokenizer.from_json(first.to_json())
    assert second.to_json() == first.to_json()
    for name in ("vocab_size", "start_id", "end_id", "pad_id"):
        assert getattr(first, name) == getattr(second, name)
    prompts = hostile()
    assert first.encode(prompts, 40) == second.encode(prompts, 40)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", "3", '{"kind":"bert"}', '{"kind":"clip","pad_id":-1}',
        '{"kind":"clip"}', '{"kind":"clip","pad_id":0,"more":1}', '{"kind":"learned"}',
        '{"kind":"learned","merges":"a b"}', '{"kind":"learned","merges":["ab"]}',
        '{"kind":"learned","merges":["a b c"]}', '{"kind":"learned","merges":[1]}',
        '{"kind":"learned","merges":["a bc"]}', '{"kind":"learned","merges":["猫 a"]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)  # fmt: skip
def test_malformed_json_is_an_input_error(text):
    with pytest.raises(InputError, match="malformed"):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("name", ["clip", "learned"])
def test_surrogates_do_not_fail(name, learned):
    tokenizer = Tokenizer.clip() if name == "clip" else learned
    assert tokenizer.tokens("a \udcff cat") == tokenizer.tokens("a ? cat")


def test_no_prompts(learned):
    assert learned.encode([], 8) == []
