"""Flags that other tools have taught are answered with ours."""

from __future__ import annotations

import pytest

from difftool.cli import habits
from difftool.config.options import Option


def row(name: str, **fields) -> Option:
    return Option(name=name, panel="Panel", help="", **fields)


ROWS = [
    row("prompt", argument=True, many=True, metavar="[PROMPT]..."),
    row("num", flags=("--num", "-n"), type=int),
    row("size", metavar="WxH"),
    row("sampler", choices=lambda: [str(n) for n in range(20)]),
    row("guidance", type=float, habits=("--creativity",)),
    row("dtype", choices=lambda: ("fp32", "fp16")),
    row("ema", type=bool, flags=("--ema/--no-ema",)),
]


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--cfg", "use --guidance"),
        ("--cfg_scale", "use --guidance"),
        ("--creativity", "use --guidance"),
        ("--width", "use --size WxH"),
        ("-W", "use --size WxH"),
        ("--fp16", "use --dtype: fp32, fp16"),
        ("--prompt", "PROMPT is given without a flag"),
        ("--scheduler", "--sampler names the method, --schedule the levels that it visits"),
        ("--nun", 'did you mean "--num"?'),
        ("--no-emma", 'did you mean "--no-ema"?'),
        ("--epochs", "see difftool draw --help"),
        ("--xyzzy", "see difftool draw --help"),
    ],
)
def test_a_flag_of_another_tool_is_answered_with_ours(flag, hint):
    error = habits.answer(flag, ROWS, "difftool draw")
    assert error.what == f"there is no {flag} here"
    assert error.hint == hint


def test_no_flag_means_two_things_in_one_place():
    for words in habits.COUNTERPARTS.values():
        assert len(words.split()) == len(set(words.split()))
    for said in habits.ANSWERS.values():
        words = " ".join(said).split()
        assert len(words) == len(set(words))
