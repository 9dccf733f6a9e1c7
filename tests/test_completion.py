"""What shells are told: values with their meanings, whole or after KEY=, and nothing of paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import add_command

from difftool.config.options import DEVICE, SET, Option
from difftool.diffusion import SAMPLERS

ROWS = [
    Option(name="photo", argument=True, type=Path, panel="Panel", help="A picture"),
    Option(name="sampler", panel="Panel", help="The method", choices=lambda: SAMPLERS),
    Option(name="out", type=Path, panel="Panel", help="A file"),
    SET,
    DEVICE,
]


@pytest.fixture
def complete(monkeypatch, difftool):
    """The values after a command line of a command of these rows; the last word may be begun."""
    add_command(monkeypatch, "draw", ROWS, pytest.fail)

    def run(line: str, shell: str = "bash") -> list[str]:
        for name in ("COMP_WORDS", "COMP_CWORD", "_TYPER_COMPLETE_ARGS", "_DIFFTOOL_COMPLETE_KEY"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setenv("_DIFFTOOL_COMPLETE", f"complete_{shell}")
        if shell == "bash":
            words = [w for part in line.split(" ") for w in part.replace("=", " = ").split(" ")]
            words = [*filter(None, words), *([""] if line.endswith(" ") else [])]
            monkeypatch.setenv("COMP_WORDS", "\n".join(words))
            monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        else:
            monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        ran = difftool()
        assert (ran.code, ran.err) == (0, "")
        return ran.lines

    return run


def test_commands_options_and_values(complete):
    assert complete("difftool d") == ["draw"]
    assert complete("difftool draw --samp") == ["--sampler"]
    assert complete("difftool draw --sampler dpmpp_3") == ["dpmpp_3m", "dpmpp_3m_sde"]
    assert complete("difftool draw --sampler=dpmpp_3") == ["dpmpp_3m", "dpmpp_3m_sde"]
    assert set(complete("difftool draw --sampler ")) == set(SAMPLERS)
    assert complete("difftool draw --device c") == ["cpu", "cuda"]


def test_the_keys_of_set_and_then_their_values(complete):
    keys = complete("difftool draw --set train.w")
    assert {"train.warmup=", "train.weight=", "train.weight_decay="} <= set(keys)
    whole = ["train.decay=none", "train.decay=linear", "train.decay=cosine"]
    assert complete("difftool draw --set train.dec") == whole
    assert complete("difftool draw --set train.decay=") == ["none", "linear", "cosine"]
    assert complete("difftool draw --set train.decay=c") == ["cosine"]
    assert complete("difftool draw --set train.lr=1e-4 --set train.decay=c") == ["cosine"]
    assert complete("difftool draw --set train.lr=1e-4 --device m") == ["mps"]
    assert complete("difftool draw --set train.lr=") == ["", "0.001"]


def test_paths_are_left_to_the_shell(complete):
    for line in ("difftool draw --out ", "difftool draw pho", "difftool draw photo.png --out=a"):
        assert not any(complete(line))
    assert complete("difftool draw --out ", "zsh") == ["_files"]


def test_other_shells_are_told_what_values_mean(complete):
    (line,) = complete("difftool draw --sampler heunp", "fish")
    assert line == f"heunpp2\t{SAMPLERS.about('heunpp2')}"
    shown = " ".join(complete("difftool draw --sampler heu", "zsh"))
    assert '"heun":"Heun in rho' in shown
    (line,) = complete("difftool draw --set train.decay=c", "fish")
    assert line.startswith("train.decay=cosine\tHow the learning rate falls")


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("sample fox --set sample.clip=", ["none", "static", "dynamic"]),
        ("sample fox --set train", []),
        ("noise --set zero", ["zero_snr=true", "zero_snr=false"]),
        ("train photos --preset pixel-m", ["pixel-medium"]),
        ("convert a b --to di", ["diffusers", "difftool"]),
        ("--list sa", ["samplers"]),
    ],
)
def test_each_command_completes_its_own(difftool, monkeypatch, line, values):
    words = ["difftool", *line.replace("=", " = ").split()]
    monkeypatch.setenv("_DIFFTOOL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setenv("_DIFFTOOL_COMPLETE_KEY", "")
    assert list(filter(None, difftool().lines)) == values
