"""Prompts that stand for many, by the grammar that A1111's dynamic prompts publish."""

from __future__ import annotations

from collections import Counter

import pytest
from hangs import ends

from difftool.errors import UsageError
from difftool.text.dice import Dice
from difftool.text.dynamic import Dynamic, is_dynamic
from difftool.text.wildcards import Wildcards

NONE = Dynamic(Wildcards(None).lines)


@pytest.fixture
def wildcards(tmp_path) -> Dynamic:
    files = {
        "colour.txt": "# hues\nred\n\n blue \nred\ndark {green|grey}\n",
        "deep/animal.txt": "fox\nowl\n",
        "deep/plant.txt": "3::oak\n0::elm\n",
        "both.txt": "__colour__ __deep/animal__\n",
        "loop.txt": "a __loop__\n",
        "more.yaml": "size: {small: [tiny, wee], large: huge}\nshape:\n- round\n- {text: flat}",
    }
    for name, text in files.items():
        path = tmp_path / "cards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Dynamic(Wildcards(tmp_path / "cards").lines)


def drawn(dynamic: Dynamic, prompt: str, count: int = 400) -> Counter[str]:
    return Counter(dynamic.one(prompt, Dice("test", i).roll) for i in range(count))


# Each list is what dynamicprompts 0.31 makes of it, in its order.
EVERY = {
    "a {red|blue} fox": ["a red fox", "a blue fox"],
    "{a|{b|c}} {d|e}": ["a d", "a e", "b d", "b e", "c d", "c e"],
    "{ red | blue } x": ["red  x", "blue  x"],
    "{a||b}": ["a", "", "b"],
    "{2$$a|b|c}": ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"],
    "{1-2$$ and $$a|b}": ["a", "b", "a and b", "b and a"],
    "{-1$$a|b}": ["a", "b"],
    "{0-1$$a|b}": ["", "a", "b"],
    "{2-$$ $$a|b}": ["a b", "b a"],
    "{5$$a|b}": ["a,b", "b,a"],
    "{2$$|$$a|b}": ["a|b", "b|a"],
    "{2$$a|a|b}": ["a,b", "b,a"],
    "{0.7::a|.2::b|3::c}": ["a", "b", "c"],
    "{a (x:1.2)|b} [c|d]": ["a (x:1.2) [c|d]", "b [c|d]"],
    "${c={r|b}}${c} ${c}": ["r r", "r b", "b r", "b b"],
    "${x:other} y": ["other y"],
    "{a} b": ["a b"],
    "a}b": ["a}b"],
    "{a|b": ["{a|b"],
    r"\{a\|b\} {c|d}": ["{a|b} c", "{a|b} d"],
}


@pytest.mark.parametrize("prompt", EVERY)
def test_every_prompt_that_one_stands_for(prompt):
    assert list(NONE.all(prompt)) == EVERY[prompt]
    found = drawn(NONE, prompt)
    wanted = set(EVERY[prompt]) - ({"a", "b"} if prompt.startswith("{-1") else set())
    assert wanted <= set(found) <= {*EVERY[prompt], "", "a,a"}


@pytest.mark.parametrize(
    ("prompt", "every"),
    [
        ("__colour__", ["blue", "dark green", "dark grey", "red"]),
        ("__deep/animal__ x", ["fox x", "owl x"]),
        ("__deep/*__", ["elm", "fox", "oak", "owl"]),
        ("__**mal__", ["fox", "owl"]),
        ("{2$$ $$__deep/animal__}", ["fox owl", "owl fox"]),
        ("{__deep/animal__|cat}", ["fox", "owl", "cat"]),
        ("__size/small__ __size/large__", ["tiny huge", "wee huge"]),
        ("__shape__", ["flat", "round"]),
        ("__nothing__ __../both__", ["__nothing__ __../both__"]),
        ("a <lora:my__~style__v2:1> ____", ["a <lora:my__~style__v2:1> ____"]),
    ],
)
def test_wildcards(wildcards, prompt, every):
    assert list(wildcards.all(prompt)) == every
    assert set(drawn(wildcards, prompt)) <= set(every)
    assert len(list(wildcards.all("__both__"))) == 8, "files name files"


def test_choices_are_as_likely_as_they_are_heavy(wildcards):
    found = drawn(NONE, "{0.7::a|0.2::b|0.1::c}", 2000)
    assert [round(found[letter] / 2000, 1) for letter in "abc"] == [0.7, 0.2, 0.1]
    assert set(drawn(wildcards, "__deep/plant__")) == {"oak"}
    counts = Counter(len(text.split(",")) for text in drawn(NONE, "{1-3$$a|b|c}").elements())
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 90
    assert set(drawn(NONE, "${c=!{r|b}}${c}${c}")) == {"rr", "bb"}


def test_wildcards_without_end_are_refused(wildcards):
    with pytest.raises(UsageError, match="without end"):
        wildcards.one("__loop__", Dice("test").roll)
    with pytest.raises(UsageError, match="without end"):
        next(wildcards.all("__loop__"))


def test_words_are_not_chosen_from():
    assert not is_dynamic("a (red:1.2) fox, [a|b] snake_case AND ratio 16:9")


@pytest.mark.parametrize("letters", ["{", "{a|", "{a|b}", "__a", "${a=", "{2$$", "|", "\\", "_"])
def test_no_prompt_takes_long_to_choose_from(letters):
    prompt = (letters * 10_000)[:9_999]
    with ends():
        NONE.one(prompt, Dice("test").roll)
        next(NONE.all(prompt))
