"""--list: what there is, of every kind, for people and for programs; and what plugins add to it."""

from __future__ import annotations

import sys

import pytest
from commands import add_command
from test_plugins import OWN

from difftool.cli.lists import KINDS
from difftool.cli.options import TALK
from difftool.config.layers import preset_names
from difftool.config.options import Option
from difftool.diffusion import GRIDS, SAMPLERS


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_has_a_name_and_a_line_about_it(difftool, kind):
    ran = difftool("--list", kind, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.object["schema"] == 1
    assert ran.object["list"] == kind
    for item in ran.object["items"]:
        assert item["name"] and item["about"], item
        assert isinstance(item["also"], list)
    lines = difftool("--list", kind).lines
    names = [item["name"] for item in ran.object["items"]]
    assert [line.split()[0] for line in lines] == names
    assert all(line == line.rstrip() for line in lines)


def test_lists_are_the_registries(difftool):
    items = difftool("--list", "samplers", "--json").object["items"]
    assert [item["name"] for item in items] == list(SAMPLERS)
    also = {item["name"]: item["also"] for item in items}
    assert also["dpm2_a"] == ["dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"]
    presets = difftool("--list=presets", "--json").object["items"]
    assert [item["name"] for item in presets] == preset_names()
    assert [item["name"] for item in presets if item["ships"]] == ["emoji"]


def test_a_list_is_given_after_a_command_too(difftool):
    assert difftool("train", "--list", "targets").out == difftool("--list", "targets").out


@pytest.mark.parametrize("words", [["--list", "samplrs"], ["--list"]])
def test_an_unknown_list_is_a_misuse(difftool, words):
    ran = difftool(*words)
    assert ran.code == 2
    assert "samplers" in ran.err


def test_a_table_fits_the_terminal(difftool, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # no colours
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for kind in KINDS:
        ran = difftool("--list", kind)
        assert max(map(len, ran.lines)) <= 80
        assert "…" not in ran.out


@pytest.mark.usefixtures("forget")
def test_what_a_plugin_adds_is_listed_helped_with_and_taken(difftool, monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    schedule = Option(name="schedule", panel="Panel", help="Levels", choices=lambda: GRIDS)
    given = []
    add_command(monkeypatch, "draw", [schedule, *TALK], given.append)
    assert difftool("draw", "--schedule", "half").code == 2
    assert ", half" in difftool("draw", "--plugin", "own.py", "--help").out
    assert difftool("--plugin=own.py", "draw", "--schedule", "half").code == 0
    assert given[0]["schedule"] == "half"
    items = difftool("--list", "schedules", "--plugin", "own.py", "--json").object["items"]
    assert items[-1] == {"name": "half", "about": "its half", "also": [], "plugin": "own.py"}


def test_a_plugin_that_is_not_there_is_a_misuse(difftool):
    ran = difftool("--list", "samplers", "--plugin", "none.py")
    assert ran.code == 2
    assert "none.py" in ran.err
