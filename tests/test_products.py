"""Settings of which several are given: every combination, counted, named and ordered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from difftool.config.listed import names, numbers, replacements, sizes, weighted
from difftool.config.options import read_options
from difftool.errors import DifftoolError, UsageError
from difftool.sampling.command import SampleTask, prepare
from difftool.sampling.expand import Expander, applied
from difftool.sampling.requests import Request
from difftool.sampling.settings import OPTIONS, SETTINGS


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("10,20", [10, 20]),
        ("10, 20, 10", [10, 20]),
        ("1-3", [1, 2, 3]),
        ("10-30:10,40", [10, 20, 30, 40]),
        ("1-9(+4)", [1, 5, 9]),
        ("1-10 [4]", [1, 4, 7, 10]),
        ("0.2-0.8:0.2", [0.2, 0.4, 0.6, 0.8]),
        ("0-1[3]", [0, 0.5, 1]),
        ("-1-1", [-1, 0, 1]),
        ("-2--1:0.5", [-2, -1.5, -1]),
        ([4, 7.5], [4, 7.5]),
        (8, [8]),
        ("1e-3,1e-2", [0.001, 0.01]),
        ("ten,20", ["ten", 20]),
    ],
)
def test_numbers_are_lists_and_ranges(given, values):
    assert [*numbers(given).values()] == values


@pytest.mark.parametrize("given", ["5-1", "0.2-0.8", "1-5:0", "1-9[0]", "1-5000"])
def test_ranges_that_are_none_are_refused(given):
    with pytest.raises(UsageError):
        numbers(given)


def test_names_files_sizes_and_texts_are_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [*names("euler, DPM++ 2M Karras")] == ["euler", "DPM++ 2M Karras"]
    Path("a,b").touch()
    assert names("a,b") == {"a,b": "a,b"} and [*names("a,c")] == ["a", "c"]
    assert [*sizes("64x64,96x64").values()] == ["64x64", "96x64"]
    assert [*sizes((64, 48)).values()] == [(64, 48)]
    assert sizes([(64, 48), (32, 32)]) == {"64x48": (64, 48), "32x32": (32, 32)}
    assert [*weighted("ink.pt:0.4,0.8")] == ["ink.pt:0.4", "ink.pt:0.8"]
    assert [*weighted("ink.pt:0.4, oil.pt:1,2")] == ["ink.pt:0.4", "oil.pt:1", "oil.pt:2"]
    assert replacements('red,"blue, dark",green') == {
        "red": ("red", "red"), "blue, dark": ("red", "blue, dark"), "green": ("red", "green"),
    }  # fmt: skip
    with pytest.raises(UsageError, match="nothing to put"):
        replacements("red")
    with pytest.raises(UsageError, match="no list"):
        replacements("red\nfox,blue")


def task(prompt: Any = "a fox", **given: Any) -> SampleTask:
    return prepare(read_options(OPTIONS, {"prompt": prompt, **given}))


def asked(made: SampleTask) -> list[Request]:
    requests = []
    for request in made.requests():
        assert isinstance(request, Request)
        requests.append(request)
    return requests


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_combination_is_asked_for_the_later_setting_the_faster():
    made = task(["a", "b"], sampler="euler,dpmpp_2m", steps="10,20", guidance=[4, 7], seed="1-3")
    found = asked(made)
    settings = [
        (r.prompt, *(r.settings[n] for n in ("sampler", "steps", "guidance"))) for r in found
    ]
    assert settings == [
        (p, sampler, steps, guidance)
        for p in "ab" for sampler in ("euler", "dpmpp_2m") for steps in (10, 20)
        for guidance in (4, 7)
    ]  # fmt: skip
    assert found[1].place == (("sampler", "euler"), ("steps", "10"), ("guidance", "7"))
    assert made.total == 48 and {r.seeds for r in found} == {(1, 2, 3)}
    assert made.said == "48 pictures: sampler 2 x steps 2 x guidance 2 x images 6"
    assert made.steps(50) == 48 * 15 and task("a").said == ""


def test_a_combination_is_what_its_values_alone_ask_for():
    made = task(sampler="euler, DDIM", eta="0,0.5", size="64x64,32x32", set=["sample.clip=static"])
    for request in asked(made):
        values: dict[str, Any] = dict(request.place)
        values["eta"] = float(values["eta"])
        alone = task(**values, seed=made.base.seeds, set=["sample.clip=static"])
        assert request.settings == alone.base.settings and alone.total == 1


def test_a_seed_that_is_drawn_is_one_for_all():
    made = task(["a", "b"], steps="1,2")
    assert len({request.seeds for request in asked(made)}) == 1


def test_any_setting_with_a_column_for_it_is_listed():
    listed = {row.name for row in SETTINGS if row.listed}
    assert listed >= {"sampler", "steps", "guidance", "model", "lora", "schedule", "replace", "ar"}
    for row in SETTINGS:
        numbers = row.type in (int, float) and (row.key or row.field) and row.option
        if numbers and row.name not in ("num", "repeat"):
            assert row.listed, row.name


def test_texts_of_prompts_are_replaced_in_turn():
    made = task("a red fox", negative="red eyes", replace=["red,blue", "fox,owl,cat"], seed=1)
    assert [r.prompt for r in asked(made)] == [
        *("a red fox", "a red owl", "a red cat", "a blue fox", "a blue owl", "a blue cat"),
    ]
    assert asked(made)[3].negative == "blue eyes"
    assert asked(made)[5].place == (("replace red", "blue"), ("replace fox", "cat"))
    with pytest.raises(UsageError, match='no "owl" to replace'):
        task("a fox", replace="owl,cat")


def test_what_stands_for_many_is_replaced_before_it_is_chosen():
    made = task("a {red|green} fox", replace="red,blue", combinatorial=True, seed=1)
    assert made.total == 4
    assert [r.prompt for r in asked(made)] == ["a {red|green} fox", "a {blue|green} fox"]


def test_lines_are_each_drawn_in_every_combination_but_for_what_they_say_themselves():
    lines = ["a fox", {"prompt": "an owl", "steps": 3}, {"promt": "x"}, "a cat"]
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    Path("lines.txt").write_text(text, encoding="utf-8")
    made = task(None, prompts="lines.txt", steps="1,2", sampler="euler,heun", seed=4)
    told = [
        (r.prompt, r.settings["sampler"], r.settings["steps"])
        if isinstance(r, Request)
        else "error"
        for r in made.requests()
        if r is not None
    ]
    every = [("euler", 1), ("euler", 2), ("heun", 1), ("heun", 2)]
    assert told == [
        *(("a fox", *each) for each in every),
        *(("an owl", sampler, 3) for sampler in ("euler", "heun")),
        "error",
        *(("a cat", *each) for each in every),
    ]
    assert made.total is None and made.said.startswith("4 pictures in place of each")


@pytest.mark.parametrize(
    ("prompt", "given", "told"),
    [
        ("a fox --ar 3:2", {"ar": "1:1,2:1"}, "not with --ar 1:1,2:1"),
        ("a fox --ar 3:2", {"size": "64,64x32"}, "not with --size 64,64x32"),
        ("a fox --chaos 20", {"chaos": "10,50"}, "not with --chaos 10,50"),
        ("a fox --seed 7", {"seed": "1-3"}, "not with the 3 seeds of --seed"),
        ("a red fox --ar 1:1", {"ar": "1:1,2:1", "replace": "red,blue"}, "not with --ar 1:1,2:1"),
        ("a fox", {"ar": "1:1,2:1"}, None),
        ("a fox --ar 3:2", {"ar": "1:1,2:1", "prompt_syntax": "none"}, None),
        ({"prompt": "a fox", "ar": "3:2"}, {"size": "64,32"}, ""),
        ({"prompt": "a fox", "width": 64, "height": 32}, {"size": "64,32"}, ""),
        ({"prompt": "a fox", "width": 64}, {"ar": "1:1,3:2"}, ""),
        ({"prompt": "a fox", "sampler": "euler_a"}, {"eta": "0,1"}, ""),
    ],
)
def test_no_value_is_drawn_that_a_prompt_or_a_line_overrules(prompt, given, told):
    """Else the cells of an axis would be one picture again and again. told: what is said of it."""
    file = None
    if isinstance(prompt, dict):
        Path("l.jsonl").write_text(json.dumps(prompt), encoding="utf-8")
        prompt, file = None, "l.jsonl"
    made = task(prompt, prompts=file, steps="1,2", **{"seed": 4} | given)
    found = [each for each in made.requests() if isinstance(each, Request)]
    blue = 2 if "replace" in given else 1
    seeds = {len(applied(each).images()) for each in found}
    assert len(found) == 2 * blue * (1 if told is not None else 2) and seeds == {1}
    assert all(bool(each.changed) == bool(told) for each in found)
    if told:
        assert told in found[0].changed[0] and made.total == len(found)
        assert made.said.startswith(f"{len(found)} pictures: ")


def test_a_parameter_within_braces_takes_its_picture_off_the_axis():
    (request,) = asked(task("{a fox --ar 3:2}", seed=1))
    chosen = Expander().chosen(replace(request, place=(("ar", "1:1"), ("steps", "2"))), 1)
    assert chosen.place == (("steps", "2"),) and chosen.ar == (3, 2)
    assert "not with ar 1:1" in chosen.changed[0]


def test_weights_of_loras_are_listed():
    Path("ink.safetensors").touch()
    Path("oil.safetensors").touch()
    made = task(lora=["ink.safetensors:0.4,0.8", "oil.safetensors"], seed=1)
    ink, oil = Path("ink.safetensors"), Path("oil.safetensors")
    assert [r.applied for r in asked(made)] == [[(ink, 0.4), (oil, 1)], [(ink, 0.8), (oil, 1)]]
    with pytest.raises(UsageError, match=r"none\.safetensors"):
        task(lora="ink.safetensors:0.4,none.safetensors:1")


def test_models_are_loaded_in_turn():
    made = task(model="emoji,shapes", steps="2,3", seed=1)
    assert [(v["model"], place) for v, place in made.product.loads()] == [
        ("emoji", (("model", "emoji"),)), ("shapes", (("model", "shapes"),)),
    ]  # fmt: skip
    assert made.total == 4 and made.model == "emoji and shapes"
    with pytest.raises(DifftoolError, match="nowhere"):
        task(model="emoji,nowhere")


@pytest.mark.parametrize(
    "given",
    [
        {"steps": "10,ten"},
        {"steps": "1-2[5]"},
        {"sampler": "euler,eulr"},
        {"guidance": "4,0.5"},
        {"sampler": "euler,"},
        {"steps": "1-1000", "guidance": "1-100", "stop": "1-2"},
    ],
)
def test_what_is_wrong_with_one_value_is_said_before_a_model_is_loaded(given):
    with pytest.raises(UsageError):
        task(**given)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of two models."""
    folder = tmp_path_factory.mktemp("models")
    for name, size in {"one": 16, "two": 32}.items():
        preset = tiny.preset(name=name, sample={"size": [size, size], "steps": 2})
        tiny.model(preset).save(folder / f"{name}.safetensors")
    return folder


def test_pictures_of_a_product_are_those_that_are_asked_for_alone(difftool, models):
    common = ("-m", models / "one.safetensors", "--seed", "7")
    several = ("--eta", "0,0.5", "--sampler", "ddim,euler_a", "--steps", "1-2")
    ran = difftool("sample", *common, *several, "-o", "all/[sampler]-[steps]-[index].png")
    assert ran.code == 0 and len(ran.lines) == 8, ran.err
    assert ran.err.splitlines()[0] == "8 pictures: sampler 2 x steps 2 x eta 2"
    assert "sampling 12/12" in ran.err
    alone = ("--eta", "0.5", "--sampler", "euler_a", "--steps", "2")
    (path,) = difftool("sample", *common, *alone, "-o", "one.png").lines
    assert Path(path).read_bytes() == Path("all/euler_a-2-7.png").read_bytes()


def test_pictures_of_several_models_are_numbered_on(difftool, models):
    Path("lines.txt").write_text('{"seed": 1}\n{"seed": 2}\n', encoding="utf-8")
    ran = difftool(
        *("sample", "--prompts", "lines.txt", "-o", "[index]-[model]-[seed].png"),
        *("-m", f"{models / 'one.safetensors'},{models / 'two.safetensors'}"),
    )
    assert ran.lines == ["0-one-1.png", "1-one-2.png", "2-two-1.png", "3-two-2.png"], ran.err
    assert len({Path(path).read_bytes() for path in ran.lines}) == 4
