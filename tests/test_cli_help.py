"""Help: nothing but help, at once, every word whole in a narrow terminal."""

from __future__ import annotations

from importlib import import_module
from itertools import groupby

import pytest

from difftool.cli import help
from difftool.cli.app import COMMANDS
from difftool.config.options import RUN, Option

ROWS = [
    Option(name="prompt", argument=True, many=True, panel="Prompt", help="What to draw"),
    Option(
        name="sampler", flags=("--sampler", "-s"), panel="Sampler", help="How noise is taken away",
        choices=lambda: [f"dpmpp_{n}m_sde_{kind}" for n in range(9) for kind in ("heun", "gpu")],
        default="dpmpp_2m",
    ),
    Option(
        name="ema", type=bool, flags=("--ema/--no-ema",), panel="Sampler", help="Average [of all]"
    ),
    Option(name="lr", type=float, panel="Sampler", help="Peak rate", default=lambda: "0.001"),
]  # fmt: skip


@pytest.mark.parametrize("width", [80, 160])
def test_every_word_of_a_row_is_shown_whole(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    help.show("difftool draw", "Draw.\n\nExamples\n\n  difftool draw", ROWS)
    shown = capsys.readouterr().out
    assert all(len(line) <= min(width, help.WIDTH) for line in shown.splitlines())
    assert "…" not in shown
    words = shown.replace("│", " ").split()
    for row in ROWS:
        for text in (help.names(row), help.metavar(row), help.meaning(row)):
            assert set(text.split()) <= set(words)
    for text in (
        "[dpmpp_2m]",
        "[0.001]",
        "--[no-]ema",
        "-s,",
        "PROMPT",
        "NUMBER",
        "Examples",
        "[PROMPT]...",
    ):
        assert text in words
    assert shown.index("Prompt") < shown.index("Sampler") < shown.index("--sampler")


def test_no_arguments_are_answered_with_help_and_nothing_else(difftool):
    ran = difftool()
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == difftool("--help").out
    for name, about in COMMANDS.items():
        assert name in ran.out
        assert about.split()[-1] in ran.out


def test_no_command_is_a_misuse(difftool):
    ran = difftool("--json")
    assert ran.code == 2
    assert "sample" in ran.object["error"]["hint"]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_a_command_s_help_is_cut(difftool, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    rows = import_module(f"difftool.cli.{command}").ROWS
    ran = difftool(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.lines)) <= 80
    assert "…" not in ran.out
    words = set(ran.out.replace("│", " ").split())
    for row in rows:
        for text in (help.names(row), help.metavar(row), help.meaning(row)):
            assert set(text.split()) <= words, row
    panels = [panel for panel, _ in groupby(row.panel for row in rows)]
    assert len(panels) == len(set(panels)), "a panel's rows are together, in one order"
    assert panels[-1] == RUN


def test_an_unknown_command_is_answered_with_the_nearest(difftool):
    ran = difftool("smaple", "a fox")
    assert ran.code == 2
    assert 'did you mean "sample"' in ran.err
