"""What is said: in our words, about what the user gave, and not over and over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from difftool.cli import console
from difftool.cli.app import main
from difftool.config.schema import SampleConfig, TrainConfig
from difftool.config.validate import validate
from difftool.errors import UsageError, first_line


def run(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["difftool", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": "x"}, 'it is to be a whole number, not "x"'),
        ({"steps": 1.5}, "it is to be a whole number, not 1.5"),
        ({"guidance": None}, "it is to be a number, not null"),
        ({"rederive_eps": 3}, "it is to be true or false, not 3"),
        ({"sampler": 3}, "it is to be a text, not 3"),
        ({"size": 3}, "it is to be a list, not 3"),
        ({"size": [1]}, "the list is too short"),
        ({"size": [1, 2, 3]}, "it is to be a list of at most 2, not [1, 2, 3]"),
        ({"sampler_options": 3}, "it is to be a mapping of keys to values, not 3"),
        ({"clip": "hard"}, "it is to be 'none', 'static' or 'dynamic', not \"hard\""),
    ],
)
def test_wrong_values_are_explained_in_our_words(values, says):
    with pytest.raises(UsageError) as refused:
        validate(SampleConfig, values, "the settings")
    assert str(refused.value).splitlines() == [
        f"the settings: {next(iter(values))} is not valid", says
    ]  # fmt: skip


def test_what_a_part_refuses_is_said_without_the_whole_part():
    with pytest.raises(UsageError) as refused:
        validate(TrainConfig, {"ema_lengths": [1.0]}, "the recipe")
    assert refused.value.why == "ema_lengths are shares of the run, above 0 and at most 0.28"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "a", "--steps", "x"], "error: --steps 'x' is not a whole number\n"),
        (["sample", "a", "--num="], "error: --num is empty\n"),
        (["train", "shapes", "--lr", "fast"], "error: --lr 'fast' is not a number\n"),
        (["noise", "--curve", "--steps", "1e3"], "error: --steps '1e3' is not a whole number\n"),
        (["train", "shapes", "--set", "train.lr=fast"], 'a number, not "fast"'),
    ],
)
def test_numbers_that_are_none_are_named(monkeypatch, capsys, words, says):
    code, said = run(monkeypatch, capsys, *words)
    assert code == 2 and says in said and "valid integer" not in said


def test_no_error_is_without_words():
    assert first_line(ValueError("\n what\nmore")) == "what"
    assert first_line(KeyError()) == "KeyError" and first_line(OSError("\n")) == "OSError"


def test_what_is_said_again_and_again_is_said_a_few_times():
    told = console.Alike()
    shown = [told.is_news(f'out/{n}.png would be the name of "{n}"') for n in range(224)]
    assert sum(shown) == told.MOST and all(shown[: told.MOST])
    assert told.is_news("something else") and not told.is_news("something else")
    assert told.rest() == [
        '219 more like this: out/0.png would be the name of "0"',
        "1 more like this: something else",
    ]


def test_names_that_are_alike_are_numbered(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    fast = ["--steps", "1", "--seed", "1", "--guidance", "1", "--size", "16"]
    code, said = run(monkeypatch, capsys, "sample", "-n", "3", "a fox", "-o", "[prompt].png", *fast)
    assert code == 0, said
    lines = "\n".join(["an owl"] * 3)
    Path("prompts.txt").write_text(lines, encoding="utf-8")
    code, said = run(
        monkeypatch, capsys, "sample", "--prompts", "prompts.txt", "-o", "[prompt].png", *fast
    )
    assert code == 0, said
    names = {"a-fox.png", "a-fox-2.png", "a-fox-3.png"}
    names |= {name.replace("a-fox", "an-owl") for name in names}
    assert {path.name for path in tmp_path.glob("*.png")} == names


def test_prompts_that_come_to_one_name_are_numbered(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    prompts = ["a fox!", "a fox?", "A Fox", "狐", "犬"]
    more = ["-o", "[prompt].png", "--steps", "1", "--guidance", "1", "--seed", "1"]
    for _ in range(2):
        code, said = run(monkeypatch, capsys, "sample", *prompts, *more, "--skip-existing")
        assert code == 0, said
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"a-fox.png", "a-fox-2.png", "A-Fox-3.png", "狐.png", "犬.png"}


def test_settings_of_a_picture_are_not_called_flags(monkeypatch, capsys, tmp_path):
    from PIL import Image

    from difftool.images.write import write_png

    monkeypatch.chdir(tmp_path)
    text = "a fox\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 7, Image CFG scale: 2"
    write_png(Image.new("RGB", (64, 64)), "p.png", {"parameters": text})
    code, said = run(monkeypatch, capsys, "sample", "--from-image", "p.png", "-o", "a.png")
    assert code == 0 and "warning: the picture's image guidance 2 has no effect" in said
    assert "--image-guidance" not in said
    fast = ("a fox", "--steps", "1", "--strength", "0.5", "-o", "b.png")
    assert "--strength 0.5 has no effect" in run(monkeypatch, capsys, "sample", *fast)[1]
