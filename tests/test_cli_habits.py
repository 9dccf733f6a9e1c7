"""Flags that other tools have taught are answered with ours."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest
from commands import add_command

from difftool.cli import habits
from difftool.cli.app import COMMANDS
from difftool.config.options import Option, read_options
from difftool.errors import DifftoolError
from difftool.sampling.settings import OPTIONS


def row(name: str, **fields) -> Option:
    return Option(name=name, panel="Panel", help="", **fields)


ROWS = [
    row("prompt", argument=True, many=True, metavar="[PROMPT]..."),
    row("num", flags=("--num", "-n"), type=int),
    row("size", metavar="WxH"),
    row("sampler", choices=lambda: [str(n) for n in range(20)]),
    row("guidance", type=float),
    row("dtype", choices=lambda: ("fp32", "fp16")),
    row("ema", type=bool, flags=("--ema/--no-ema",)),
]


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--cfg", "use --guidance"),
        ("--cfg_scale", "use --guidance"),
        ("--guidance-scale", "use --guidance"),
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


ISSUE = """
sample: --width --height --W --H --cfg --cfg-scale --negative-prompt --count --batch-count
sample: --tiling --variation-seed --scheduler --ckpt --denoising-strength --num-inference-steps
sample: --subseed --subseed-strength --hires-fix --enable-hr --hr-upscaler --upscale-by --plms
sample: --inpainting-fill --inpaint-full-res --masked-content --randomness-source --xyz-plot
sample: --karras --timestep-spacing --image-strength --resize-mode --save-intermediates --cfg-end
sample: --dry-run --lora-scale --solver-order --sigma-max --flow-shift --zsnr --nsfw --watermark
sample: --dynamic-thresholding --listen --show --threads --log --list-samplers -i
sample: --s-churn --freeu --jpeg --stylize --niji --v --q --sref --weird --script --skip_grid
sample: --guidance-scale --n_iter --prompt --fp16 --lowvram --xformers --controlnet
train: --learning-rate --max_train_steps --train_batch_size --resolution --output_dir
train: --mixed_precision --pretrained_model_name_or_path --train_data_dir --network_dim --report_to
train: --epochs --lr_scheduler --gradient_checkpointing --gradient_accumulation_steps
convert: --half --checkpoint_path --dump_path --extract_ema --original_config_file --model
noise: --image --beta-schedule
"""


def rows_of(command: str) -> tuple[Option, ...]:
    return import_module(f"difftool.cli.{command}").ROWS


@pytest.mark.parametrize("line", ISSUE.strip().splitlines())
def test_habits_of_other_tools_are_known_to_the_command(line):
    command, flags = line.split(": ")
    rows = rows_of(command)
    named = {name for row in rows for name in row.spellings}
    for flag in flags.split():
        assert flag not in named
        hint = str(habits.answer(flag, rows, command).hint)
        assert "did you mean" not in hint
        assert "--help" not in hint
        assert set(re.findall(r"--[a-z][a-z-]+", hint.partition("torchrun")[0])) <= named, hint


def test_what_is_answered_with_is_there():
    rows = [row for command in COMMANDS for row in rows_of(command)]
    known = {name for row in rows for name in (*row.spellings, row.flag.strip("[]."))}
    assert habits.COUNTERPARTS.keys() | habits.ANSWERS.keys() <= known


class Odd:
    """A value that no option is ever given by a command line."""


@pytest.mark.parametrize("command", ["train", "sample", "noise", "convert"])
def test_a_value_of_any_type_is_taken_or_refused_in_words(command):
    values = ({}, [{}], [[1]], {"a": [1]}, Odd(), b"x", ("a",), {1}, [None], float("nan"), 2**70)
    for row in rows_of(command):
        for value in values:
            with suppress(DifftoolError):
                row.value(value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"dtype": "half"}, "fp16"), ({"dtype": "Float32"}, "fp32"), ({"device": "gpu"}, "cuda"),
        ({"tile": "horizontal"}, "x"), ({"format": "jpeg"}, "jpg"), ({"rng": "NV"}, "gpu"),
        ({"seed": "random"}, ()), ({"mask_content": "latent nothing"}, "nothing"),
    ],
)  # fmt: skip
def test_values_as_other_tools_call_them(given, meant):
    ((name, _),) = given.items()
    assert read_options(OPTIONS, given)[name] == meant


def test_a_value_of_a_flag_that_may_stand_alone_is_no_prompt(monkeypatch, difftool):
    seen: list[dict[str, Any]] = []
    rows = [row for row in OPTIONS if row.name in ("prompt", "tile")]
    add_command(monkeypatch, "draw", rows, seen.append)
    for words in (["a fox", "--tile", "horizontal"], ["--tile", "a fox"]):
        difftool("draw", *words)
    assert [values["prompt"] for values in seen] == [["a fox"], ["a fox"]]
    assert [values["tile"] for values in seen] == ["x", "both"]


def test_values_that_became_prompts_are_said(difftool):
    words = ("sample", "a fox", "--sampler", "euler", "heun", "--steps", "10", "20", "--tokens")
    said = difftool(*words).err
    assert 'the prompt "heun" is the name of a sampler' in said
    assert 'the prompt "20" is a number' in said
