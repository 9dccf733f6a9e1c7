"""Signals end every command as Ctrl-C does: nothing half done is left."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

import pytest
import tiny
from PIL import Image

from difftool.signals import Interrupted, code_of, ended_by_signals
from difftool.training.run.stop import graceful_stop, interrupt_again

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        *(("noise", number) for number in SIGNALS),
        *(("convert", signal.SIGTERM), ("sample", signal.SIGHUP), ("train", signal.SIGHUP)),
    ],
)
def test_a_signal_while_a_file_is_written_leaves_nothing(
    difftool, tmp_path, monkeypatch, command, number
):
    tiny.model(tiny.preset()).save(tmp_path / "model.safetensors")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "photos" / "a.png")
    words = {
        "convert": ["model.safetensors", "out", "--to", "diffusers"],
        "noise": ["photos/a.png", "-o", "out/a.png"],
        "sample": ["-m", "model.safetensors", "--size", "16x16", "--steps", 1, "-o", "out/a.png"],
        "train": ["photos", "--out", "out", "--size", 16, "--steps", 1, "--batch-size", 1],
    }[command]
    if command == "noise":
        (tmp_path / "out").mkdir()
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        fsync(descriptor)
        signal.raise_signal(number)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr(os, "fsync", interrupted)
    ran = difftool(command, *words)
    assert ran.code == 128 + number and "interrupted" in ran.err and ran.out == ""
    left = [path.name for path in tmp_path.rglob("*") if path.name not in ("out", ".lock")]
    assert sorted(left) == ["a.png", "model.safetensors", "photos"]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_a_signal_before_a_command_is_under_way_has_its_own_code(difftool, monkeypatch):
    def parsed(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("difftool.cli.options.read_options", parsed)
    assert difftool("noise", "a.png").code == 143
    monkeypatch.setattr("difftool.cli.options.Command.make_context", parsed)
    ran = difftool("noise", "a.png")
    assert (ran.code, ran.err) == (143, "interrupted\n")


def test_what_is_ignored_stays_so():
    """nohup difftool train ... &"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals(), graceful_stop(interrupt_again) as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_without_a_signal_goes_without(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with ExitStack() as stack, pytest.raises(Interrupted) as caught:
        stack.enter_context(ended_by_signals())
        signal.raise_signal(signal.SIGTERM)
    assert code_of(caught.value) == 143 and code_of(KeyboardInterrupt()) == 130
