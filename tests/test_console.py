"""What the terminal shows: lines that fit, logs without control characters."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, add_command

from difftool.cli import console
from difftool.cli.console import PlainProgress, RichProgress, clock
from difftool.errors import UsageError

FIELDS = {"loss": "0.1370", "images": "145.3/s", "lr": "7.6e-04"}


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The clock, to be set."""
    time = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: time[0])
    return time


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 120, 200])
def test_a_line_of_progress_fits_and_keeps_what_matters_most(now, width):
    display = RichProgress("training", 40000)
    display.update(100, **FIELDS)
    now[0] = 3600.0
    display.update(1234, **FIELDS)
    line = str(display.line(width))
    assert len(line) <= width
    assert " 1234/40000" in line or width < 11
    wanted = [("loss 0.1370", 40), ("eta 1d 10:11", 80), ("training", 60), ("images 145.3/s", 80)]
    wanted += [("lr 7.6e-04", 80), ("━─", 120), ("1:00:00", 120)]
    for text, least in wanted:
        assert text in line or width < least, text


def test_the_bar_is_as_full_as_the_work_is_done(now):
    display = RichProgress("training", 100)
    for done in (1, 50, 100):
        display.update(done)
        line = str(display.line(80))
        full, empty = line.count("━"), line.count("─")
        assert full / (full + empty) == pytest.approx(done / 100, abs=0.02)


def test_what_is_left_is_reckoned_from_where_a_resumed_work_began(now):
    display = RichProgress("training", 1000)
    now[0] = 100.0  # reading the pictures
    display.update(901)
    assert "eta" not in str(display.line(80))
    now[0] = 110.0
    display.update(911)
    assert "eta 1:29" in str(display.line(80))


def test_a_log_has_a_line_a_tenth_and_ever_fewer(now, capsys):
    display = PlainProgress("training", 1_000_000)
    for minute in range(1, 60 * 48):
        now[0] = 60.0 * minute
        display.update(minute, **FIELDS)
    lines = capsys.readouterr().err.splitlines()
    assert 100 < len(lines) < 400
    assert lines[0].startswith("training       1/1000000  loss 0.1370  images 145.3/s  lr 7.6e-04")
    assert "eta" in lines[-1]
    assert all(line.isprintable() for line in lines)


def test_short_work_leaves_one_line_in_a_log(now, capsys):
    display = PlainProgress("reading", 500)
    for done in range(501):
        now[0] = done / 1000
        display.update(done)
    assert capsys.readouterr().err == "reading 500/500  0:00\n"


def test_a_table_is_wrapped_on_a_terminal_only(monkeypatch, capsys):
    why = "pictures are 28, cpu affords 32, in multiples of 4"
    rows = [("train.size", "28", why), ("a", "b", "")]
    console.table(rows)
    assert capsys.readouterr().err.splitlines() == [
        "train.size  28  pictures are 28, cpu affords 32, in multiples of 4",
        "a           b",
    ]
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    console.table(rows)
    assert capsys.readouterr().err.splitlines() == [
        "train.size  28  pictures are 28, cpu affords 32,",
        "                in multiples of 4",
        "a           b",
    ]
    monkeypatch.setenv("COLUMNS", "30")
    console.table(rows)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["train.size  28", "    pictures are 28, cpu"]
    assert max(map(len, lines)) <= 30


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (185, "3:05"), (3785, "1:03:05"), (176580, "2d 01:03")]
)
def test_times_are_short(seconds, shown):
    assert clock(seconds) == shown


def test_what_a_terminal_cannot_show_ends_no_command(tmp_path):
    code = """
from difftool.cli import console
console.forgive()
console.say("一匹の狐 \\x1b[31m")
console.emit("狐.png")
console.emit({"path": "狐.png \\udc80"})
"""
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "\\u4e00\\u5339\\u306e\\u72d0 \\x1b[31m\n"
    path, report = done.stdout.splitlines()
    assert path == "\\u72d0.png"
    assert json.loads(report) == {"path": "狐.png \udc80"}


def test_results_are_made_safe_for_terminals_and_left_to_programs(monkeypatch, capsys):
    console.emit("a\x1b[31m.png")
    assert capsys.readouterr().out == "a\x1b[31m.png\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.emit("a\x1b[31m.png")
    assert capsys.readouterr().out == "a\\x1b[31m.png\n"


def test_json_has_no_number_that_is_none(capsys):
    console.emit({"a": math.nan, "b": [math.inf, -math.inf, 1.5], "ä": 1})
    text = capsys.readouterr().out
    said = json.loads(text, parse_constant=pytest.fail)
    assert said == {"a": "NaN", "b": ["Infinity", "-Infinity", 1.5], "ä": 1}


def test_an_interrupted_command_says_so(difftool, monkeypatch):
    def run(_: object) -> None:
        raise KeyboardInterrupt

    add_command(monkeypatch, "draw", [], run)
    ran = difftool("draw")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")


def test_speed_is_told_where_it_is_counted(now, capsys):
    display = RichProgress("sampling", 80, "it")
    display.update(1, images="0/4")
    now[0] = 10.0
    display.update(41, images="0/4")
    assert "4.0 it/s" in str(display.line(80)) and "eta" in str(display.line(80))
    now[0] = 100.0
    assert "2.5 s/it" in str(display.line(80)) and "it/s" not in str(display.line(30))
    assert "/s" not in str(RichProgress("training", 80).line(80))


def test_what_is_said_meanwhile_goes_above_the_moving_line(monkeypatch):
    monkeypatch.setattr(console, "interactive", lambda: True)
    said = []
    with console.progress("sampling", 4) as display:
        assert isinstance(display, RichProgress)
        monkeypatch.setattr(display.bar.console, "print", lambda text, **_: said.append(text))
        with console.progress("drawing samples", 4) as inner:
            assert isinstance(inner, RichProgress)
            assert inner.bar.console is display.bar.console is console.mode.moving
        console.warn("that")
        console.fail(UsageError("this", "so", "do"))
    assert said[:2] == ["warning: that", "error: this"] and console.mode.moving is None


def test_what_has_no_end_is_counted_in_its_unit(now):
    display = RichProgress("sampling", None, "it")
    display.update(3, images="1")
    now[0] = 9.0
    display.update(12, images="2")
    assert "12 it  images 2  1.0 s/it" in str(display.line(80))
    done = RichProgress("sampling", 4, "it")
    for number in (1, 4):
        now[0] += 1
        done.update(number)
    assert "eta" not in str(done.line(80))


def test_what_follows_the_last_step_is_told(now, capsys):
    rich, log = RichProgress("sampling", 4, "it"), PlainProgress("sampling", 4, "it")
    for display in (rich, log):
        display.update(3, images="0/1")
        display.during("decoding")
    assert "decoding" in str(rich.line(80)) and "decoding" not in capsys.readouterr().err
    for display in (rich, log):
        display.update(4, images="1/1")
        display.update(4, images="1/1")
    assert "sampling" in str(rich.line(80)) and capsys.readouterr().err.count("sampling 4/4") == 1
    log.during("drawing a grid")
    assert capsys.readouterr().err == "drawing a grid ...\n"
