"""Seeds, sizes and prompt lines, and streams that are read as they come."""

from __future__ import annotations

import json
import os
import threading

import pytest

from difftool.errors import DifftoolError, UsageError
from difftool.sampling.expand import applied
from difftool.sampling.files.prompts import read_requests
from difftool.sampling.requests import Request, parse_line
from difftool.sampling.settings import (
    KEYS,
    MAX_SEED,
    read_interval,
    read_seeds,
    read_size,
)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", (7,)),
        ("0", (0,)),
        ("1,2,5-10", (1, 2, 5, 6, 7, 8, 9, 10)),
        (" 3 , 1 - 2 ", (3, 1, 2)),
        ("-1", ()),
        (str(MAX_SEED), (MAX_SEED,)),
    ],
)
def test_seed_grammar(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,", "1..3", "10-5", "-2", "1.5", "1e3", "--1", str(MAX_SEED + 1), "0-2000000"],
)
def test_bad_seeds_are_usage_errors(text):
    with pytest.raises(UsageError):
        read_seeds(text)


def test_image_k_has_seed_plus_k():
    assert list(Request(seeds=(7,), num=3).images()) == [7, 8, 9]
    assert list(Request(seeds=(5, 1, 9)).images()) == [5, 1, 9]
    assert list(Request(seeds=(5, 1), num=2).images()) == [5, 1]


def test_drawn_seeds_differ_and_are_consecutive():
    first, second = Request(num=2).images(), Request(seeds=(), num=2).images()
    assert first[1] == first[0] + 1 and second[1] == second[0] + 1
    assert first[0] != second[0]


@pytest.mark.parametrize(
    "request_",
    [Request(seeds=(1, 2), num=3), Request(num=0), Request(seeds=(MAX_SEED,), num=2)],
    ids=["count", "zero", "overflow"],
)
def test_impossible_counts(request_):
    with pytest.raises(UsageError):
        request_.images()


def test_sizes():
    assert read_size("512x768") == (512, 768)
    assert read_size("64") == (64, 64)
    assert read_size("64X32") == (64, 32)
    for text in ("", "x", "0x64", "64x", "-64x64", "64x64x64", "100000x64", "6.4x64"):
        with pytest.raises(UsageError):
            read_size(text)


def test_intervals():
    assert read_interval("-2,4") == (-2.0, 4.0)
    assert read_interval("-inf,0") == (float("-inf"), 0.0)
    for text in ("", "1", "4,-2", "1,2,3", "nan,1", "a,b"):
        with pytest.raises(UsageError):
            read_interval(text)


def test_text_lines():
    assert parse_line("  a fox \r") == Request(prompt="a fox")
    assert parse_line("# a comment") is None
    assert parse_line("   ") is None
    assert parse_line("{red|blue} # fox") == Request(prompt="{red|blue} # fox")


def test_every_key_of_a_json_line():
    values = {
        "prompt": "a fox",
        "negative_prompt": "blurry",
        "no": "hills",
        "ar": "3:2",
        "n_iter": 2,
        "batch_size": 3,
        "id": "fox-1",
        "tile": True,
        "chaos": 10.0,
        "stop": 80,
        "template": "a {fox|owl}",
        "negative_template": "{blurry|bad}",
        "label": 3,
        "seed": 7,
        "out": "fox.png",
        "steps": 5,
        "cfg_scale": 4,
        "width": 64,
        "height": 32,
        "sampler_name": "Euler a",
        "scheduler": "karras",
        "init_images": ["photo.png"],
        "mask": "mask.png",
        "depth_map": "depth.png",
        "image_prompt": "other.png",
        "denoising_strength": 0.5,
        "image_guidance": 2.5,
        "noise_level": 3,
        "prior_steps": 9,
        "prior_guidance": 2.5,
        "clip_skip": 2,
        "prompt_syntax": "comfy",
        "prompt_weighting": "compel",
        "eta": 0.5,
        "sampler_options": {"s_noise": 0.9},
        "schedule_options": {"rho": 5},
        "start_noise": "sigma",
        "guidance_rescale": 0.7,
        "guidance_interval": "-2,inf",
        "clip": "static",
        "clip_range": 2.0,
        "clip_quantile": 0.9,
        "rederive_eps": True,
        "rng": "gpu",
        "step_noise": "comfyui",
        "ensd": 31337,
        "vary": 0.2,
        "vary_seed": 9,
        "posterior": "mean",
        "strength_rule": "a1111",
        "rounding": "down",
        "fit": "pad",
        "mask_invert": True,
        "mask_content": 0,
        "mask_grow": -2,
        "mask_blur": 1.5,
        "only_masked": True,
        "mask_padding": 8,
        "outpaint": "left=64,top=32",
        "upscale": "2x",
        "hires": 2,
        "hires_strength": 0.4,
        "hires_steps": 9,
        "upscaler": "Lanczos",
        "window": 512,
        "cache_interval": 3,
        "tome_ratio": 0.5,
    }
    assert {KEYS[key].name for key in values} == {row.name for row in KEYS.values()}
    request = parse_line(json.dumps(values))
    ours = {KEYS[key].json[0]: value for key, value in values.items()}
    assert parse_line(json.dumps(ours)) == request  # by the names that are printed
    assert request == Request(
        prompt="a fox",
        negative="blurry",
        no="hills",
        ar=(3.0, 2.0),
        repeat=2,
        num=3,
        id="fox-1",
        template="a {fox|owl}",
        negative_template="{blurry|bad}",
        label="3",
        seeds=(7,),
        out="fox.png",
        init="photo.png",
        mask="mask.png",
        depth_map="depth.png",
        image_prompt="other.png",
        vary_seed=9,
        settings={
            "rng": "gpu",
            "step_noise": "comfyui",
            "ensd": 31337,
            "vary": 0.2,
            "posterior": "mean",
            "strength_rule": "a1111",
            "rounding": "down",
            "fit": "pad",
            "mask_invert": True,
            "mask_content": "fill",
            "mask_grow": -2,
            "mask_blur": 1.5,
            "only_masked": True,
            "mask_padding": 8,
            "outpaint": (64, 32, 0, 0),
            "upscale": 2.0,
            "hires": 2.0,
            "hires_strength": 0.4,
            "hires_steps": 9,
            "upscaler": "lanczos",
            "window": 512,
            "deepcache": 3,
            "tome": 0.5,
            "strength": 0.5,
            "image_guidance": 2.5,
            "noise_level": 3,
            "prior_steps": 9,
            "prior_guidance": 2.5,
            "clip_skip": 2,
            "prompt_syntax": "comfy",
            "prompt_weighting": "compel",
            "tile": "both",
            "chaos": 10.0,
            "stop": 80,
            "sampler_options": {"eta": 0.5, "s_noise": 0.9},
            "schedule_options": {"rho": 5},
            "start_noise": "sigma",
            "guidance_rescale": 0.7,
            "guidance_interval": (-2.0, float("inf")),
            "clip": "static",
            "clip_range": 2.0,
            "clip_quantile": 0.9,
            "rederive_eps": True,
            "steps": 5,
            "guidance": 4.0,
            "width": 64,
            "height": 32,
            "sampler": "Euler a",
            "schedule": "karras",
        },
    )
    assert parse_line('{"prompt": "x", "seed": "1,3-4", "steps": null}') == Request(
        prompt="x", seeds=(1, 3, 4)
    )


def test_what_other_tools_call_a_key():
    line = {"prompt": "a fox", "cfg": 5, "num_inference_steps": 9, "aspect_ratio": "3:2",
            "tiling": False, "subseed": 3, "subseed_strength": 0.1,
            "sampler_index": "Euler"}  # fmt: skip
    found = parse_line(json.dumps(line))
    assert found is not None and (found.ar, found.vary_seed) == ((3, 2), 3)
    assert found.settings == {
        "guidance": 5, "steps": 9, "tile": "none", "vary": 0.1, "sampler": "Euler"
    }  # fmt: skip


def test_a_line_of_midjourney_s_has_its_own_meaning():
    """--s is its stylize beside what it alone has, and else sd-scripts' steps."""
    found = parse_line("/imagine prompt: a fox --ar 3:2 --v 6 --s 250")
    assert found is not None and "steps" not in found.settings
    read = applied(found)
    assert (read.prompt, read.ar, read.ignored) == ("a fox", (3, 2), ("--v 6", "--s 250"))
    other = parse_line("a fox --ar 3:2 --s 25")
    assert other is not None and other.settings == {"steps": 25}


def test_options_on_a_line_of_text():
    kohya = "a fox --n blurry -- bad --w 64 --h 32 --s 5 --d 1,3-4 --l 4 --t 0.5 --ss euler_a"
    kohya += " --f x.png"
    settings = {"width": 64, "height": 32, "steps": 5, "guidance": 4.0}
    settings |= {"strength": 0.5, "sampler": "euler_a"}
    assert parse_line(kohya) == Request(
        prompt="a fox", negative="blurry -- bad", seeds=(1, 3, 4), out="x.png", settings=settings
    )
    webui = '--prompt "a fox, red" --negative_prompt "bad" --steps 5 --seed 7'
    webui += ' --sampler_name "Euler a"'
    assert parse_line(webui) == Request(
        prompt="a fox, red",
        negative="bad",
        seeds=(7,),
        settings={"steps": 5, "sampler": "Euler a"},
    )
    assert parse_line("a fox -- 5 - 3") == Request(prompt="a fox -- 5 - 3")
    for wrong in ("a fox --ar wide", "a --s many", "a --s 5 --s 6", "a --w 0"):
        with pytest.raises(UsageError):
            parse_line(wrong)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x"',
        '{"prompt": "x", "prompt": "y"}',
        '{"prompt": ["x"]}',
        '{"steps": 0}',
        '{"steps": 2.5}',
        '{"steps": true}',
        '{"steps": "20"}',
        '{"cfg_scale": NaN}',
        '{"cfg_scale": 1e400}',
        '{"seed": -2}',
        '{"seed": [1]}',
        '{"seed": ' + "9" * 5000 + "}",
        '{"width": 99999999}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "a\\u0000b"}',
        '{"prompt": "' + "x" * 20_000 + '"}',
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "a\x1b[31mb",
    ],
)
def test_bad_lines_are_usage_errors(line):
    with pytest.raises(UsageError):
        parse_line(line)


JSON_LINES = [
    *("{bad", "{bad}", '{"prompt": 1e999}', "{'prompt': 'x'}", '{prompt: "x"}', '{"prompt": "x"},'),
    *("[", "[]", '["a", "b"]', '[{"prompt": "x"}]', "[1, 2]", "[[1], [2]]", "[null]"),
    *('"a fox"', '"a fox",', '"a fox', '"prompt": "a fox",', "}", "},", "]", "null", "true"),
    *('{"sampler_options": {"eta": 1e999}}', '{"sampler_options": {"eta": [NaN]}}'),
]
PROMPTS_IN_BRACKETS = [
    *("{red|blue} fox", "{{best}}, fox", "{masterpiece}, fox", "{2$$red|blue}", "{a|{b|c}} fox"),
    *("[cat:dog:0.5] x", "[blurry]", "[[bad]] x", "[1girl] x", "[a|b]", "42", "nullify"),
    *('"Hello" on a wall', '"Hello", typography', "(fox:1.2)", "<lora:x:1> fox"),
]


@pytest.mark.parametrize("line", JSON_LINES)
def test_what_begins_like_json_is_json(line):
    with pytest.raises(UsageError):
        parse_line(line)


def test_a_line_of_json_that_is_no_object_is_refused_with_its_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("a fox\n{bad\n", encoding="utf-8")
    assert read(path)[0] == "a fox" and "prompts.jsonl line 2: not a JSON object" in read(path)[1]


@pytest.mark.parametrize("line", PROMPTS_IN_BRACKETS)
def test_brackets_open_prompts_too(line):
    assert parse_line(line) == Request(prompt=line)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(UsageError, match='no key "promt"') as caught:
        parse_line('{"promt": "a fox"}')
    assert 'did you mean "prompt"' in (caught.value.hint or "")


def test_lines_over_a_base():
    base = Request(
        prompt="base",
        negative="blurry",
        seeds=(1,),
        num=2,
        settings={"sampler": "ddim", "sampler_options": {"eta": 1.0}, "size": (64, 64), "steps": 9},
    )
    line = Request(prompt="a fox", seeds=(), settings={"sampler": "euler", "size": (32, 32)})
    assert line.over(base) == Request(
        prompt="a fox",
        negative="blurry",
        seeds=(),
        num=2,
        settings={"sampler": "euler", "size": (32, 32), "steps": 9},
    )
    assert Request().over(base) == base


def read(path, base=None):
    """Prompts of a file; the messages of its errors."""
    items = read_requests(str(path), base or Request())
    return [str(i) if isinstance(i, DifftoolError) else (i and i.prompt) or "" for i in items]


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeffa fox\r\n# no\n\n".encode()
        + b'{"prompt": "a dog"}\n\xff\xfe\n{"propmt": "x"}\n'
        + "ein Bär".encode()
    )
    prompts = read(path)
    assert prompts[:2] == ["a fox", "a dog"] and prompts[4:] == ["ein Bär"]
    assert "line 5: not UTF-8" in prompts[2] and 'line 6: there is no key "propmt"' in prompts[3]


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a fox\n" + b"x" * 3_000_000)
    assert [p[:15] for p in read(path)] == ["a fox", "prompts.txt lin"]
    path.write_bytes(b"a fox\n" + b"x" * 3_000_000 + b"\nan owl\n")
    assert [p[:24] for p in read(path)] == ["a fox", "prompts.txt line 2: it i", "an owl"]


ARRAY = """
# of another program
[
  {"prompt": "a fox",
   "seed": 7},
  "an owl --s 5", {"promt": "x"},
  {"prompt": "no end}, [and \\" ]},
  [1], {"prompt": "a } ] \\" dog"}
]
"""


def test_an_array_of_json_is_read_element_by_element(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(ARRAY, encoding="utf-8")
    found = list(read_requests(str(path), Request(negative="grey")))
    first, owl, wrong, torn, number, dog = found
    assert isinstance(first, Request) and (first.prompt, first.seeds) == ("a fox", (7,))
    assert (first.negative, first.line, first.source) == ("grey", 4, "prompts.json line 4")
    assert isinstance(owl, Request) and (owl.prompt, owl.settings) == ("an owl", {"steps": 5})
    assert isinstance(wrong, UsageError) and (wrong.line, wrong.what[:20]) == (
        6,
        "prompts.json line 6:",
    )
    assert isinstance(torn, UsageError) and torn.line == 7 and "not JSON" in torn.what
    assert isinstance(number, UsageError) and number.line == 8
    assert isinstance(dog, Request) and dog.prompt == 'a } ] " dog'


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('["a fox", "an owl",]', ["a fox", "an owl"]),
        ('[{"prompt": "a fox"}]', ["a fox"]),
        ("[]", []),
        ("[\n]", []),
        ('[{"prompt": "a fox"}', ["a fox", "it.json line 1: the array has no end"]),
        ('[{"prompt": "a f', ["it.json line 1: not JSON", "it.json line 1: the array has no end"]),
        ('["a"]\nb', ["a", "it.json line 2: something follows the end of the array"]),
        ("[1girl] x\n[a|b]", ["[1girl] x", "[a|b]"]),
        ("[{red|blue}:dog:0.5] x", ["[{red|blue}:dog:0.5] x"]),
        ('a fox\n["b"]', ["a fox", "it.json line 2: not a JSON object"]),
    ],
)
def test_what_is_an_array_and_what_opens_a_prompt(tmp_path, text, prompts):
    path = tmp_path / "it.json"
    path.write_text(text, encoding="utf-8")
    assert [each.split("\n")[0] for each in read(path)] == prompts


def test_an_array_may_be_cut_anywhere(tmp_path, monkeypatch):
    path = tmp_path / "it.json"
    path.write_text(ARRAY + " " * 99, encoding="utf-8")
    whole = read(path)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr("difftool.sampling.files.prompts.CHUNK", size)
        assert read(path) == whole


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UsageError):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_streams_do_not_wait_for_their_end(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    go_on, seen = threading.Event(), []

    def write():
        with open(path, "wb", buffering=0) as pipe:
            pipe.write(b"one\ntwo\nthr")
            assert go_on.wait(10)
            pipe.write(b"ee\nfour")

    writer = threading.Thread(target=write)
    writer.start()
    for request in read_requests(str(path), Request()):
        seen.append(request and getattr(request, "prompt", None))
        if seen[-1] == "two":
            go_on.set()  # a reader that waited for more than the line would wait for ever
    writer.join()
    assert [p for p in seen if p] == ["one", "two", "three", "four"]
    assert None in seen
