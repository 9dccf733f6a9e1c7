"""What pictures say about themselves, read back by A1111's published rules and by our own."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image

from difftool import __version__
from difftool.config.schema import SampleConfig
from difftool.config.validate import to_values
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.samplers import SAMPLERS
from difftool.errors import InputError, UsageError
from difftool.pipeline.inputs import SampleInput
from difftool.sampling.metadata.a1111 import from_parameters, parameters, parse_parameters
from difftool.sampling.metadata.chunk import chunk, from_chunk, preset_hash
from difftool.sampling.metadata.files import encode, read, texts
from difftool.sampling.requests import Request
from difftool.sampling.sample import Sample

PRESET = tiny.preset()
SETTINGS = SampleConfig(size=(512, 768), guidance=7.0, sampler="dpmpp_2m", schedule="karras")


def picture(
    prompt: str,
    negative: str = "",
    label: str | None = None,
    seed: int = 1,
    settings: SampleConfig = SETTINGS,
    model: str = "tiny",
) -> Sample:
    """A picture of a model of that name."""
    made_by = SimpleNamespace(
        name=model, hash="0123456789", preset=PRESET, base_loras=(), concat="none",
        content="0123", tokenizers=(), single_steps=False, dtype=None,
    )  # fmt: skip
    plan: Any = SimpleNamespace(
        model=made_by, settings=settings, refiner=None, prior=None, levels=()
    )
    request = Request(prompt=prompt, negative=negative, label=label)
    return Sample(index=0, request=request, plan=plan, input=SampleInput(), seed=seed)


def text_of(*args: Any, **more: Any) -> str:
    """What A1111 would say of the picture."""
    return parameters(picture(*args, **more).values())


PROMPTS = [
    "a fox",
    "",
    "two\nlines, with: colons",
    'quotes "x", \\ and {json: "Steps: 1, Seed: 2, Size: 1x1"}',
    "ein Bär, 狐 🦊",
    "Steps: 3, Sampler: Euler, Seed: 1",
]


def published_parse(text: str) -> dict[str, str]:
    """A1111's parse_generation_parameters, as documented: the last line, by its expression."""
    expression = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(expression.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt, negative, in_negative = "", "", False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    values = {"Prompt": prompt, "Negative prompt": negative}
    for key, value in expression.findall(last):
        values[key] = json.loads(value) if value.startswith('"') else value
    return values


def test_the_text_is_exactly_this():
    assert text_of("a fox,\nsmiling", "blurry, bad", None, 123) == (
        "a fox,\nsmiling\n"
        "Negative prompt: blurry, bad\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 123, "
        "Size: 512x768, Model hash: 0123456789, Model: tiny, RNG: CPU, "
        f"Version: difftool-{__version__}"
    )
    assert text_of("").startswith("Steps: 20, ")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "blurry", "one\ntwo: x, y"])
@pytest.mark.parametrize("name", ["tiny", 'my, model: "v2"'])
def test_a1111_reads_it_back(prompt, negative, name):
    text = text_of(prompt, negative, None, 123, model=name)
    values = published_parse(text)
    assert values["Prompt"] == prompt and values["Negative prompt"] == negative
    assert (values["Seed"], values["Steps"], values["Size"]) == ("123", "20", "512x768")
    assert values["Model"] == name and values["Model hash"] == "0123456789"
    assert parse_parameters(text) == values


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_name_reads_back(sampler):
    settings = SampleConfig(sampler=sampler)
    request = from_parameters(text_of("x", settings=settings), "test")
    assert SAMPLERS.resolve(request.settings["sampler"]) == sampler


@pytest.mark.parametrize("schedule", GRIDS)
def test_every_schedule_name_reads_back(schedule):
    settings = SampleConfig(schedule=schedule)
    request = from_parameters(text_of("x", settings=settings), "test")
    assert GRIDS.resolve(request.settings["schedule"]) == schedule


def test_texts_of_other_tools():
    old = "a fox\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 64x96"
    assert from_parameters(old, "old").settings == {
        "steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 7.0, "size": (64, 96),
    }  # fmt: skip
    automatic = "a fox\nSteps: 9, Sampler: Euler a, Schedule type: Automatic, Seed: 5"
    assert from_parameters(automatic, "new").settings["schedule"] == "normal"
    for line in ("", "None", "Steps: 5, Sampler: Euler, Seed: x", "Steps: 1, Size: 64x64"):
        with pytest.raises(InputError):
            from_parameters(f"a fox\n{line}", "bad")


@pytest.mark.parametrize("bad", ["Steps: 20.5", "Clip skip: 0.15", "Size: 3", "CFG scale: high"])
def test_a_value_of_another_type_is_listed_and_the_others_taken_over(bad):
    request = from_parameters(f"a fox\nSteps: 9, Sampler: Euler, Seed: 5, {bad}", "odd")
    assert [text for _, text in request.missed] == [bad]
    assert request.prompt == "a fox" and request.seeds == (5,)
    assert request.settings["sampler"] == "euler"


SETTINGS_LINE = "Steps: 9, Sampler: Euler, Seed: 5, Size: 64x96"


@pytest.mark.parametrize(
    ("more", "missed"),
    [
        (', Wildcard prompt: "a\nb, c: d", Version: v1.5', ("Wildcard prompt: a\nb, c: d",)),
        ("\nTemplate: epic {fox|cat}, 1: 2\nNegative Template: ugly\n, Steps: 3", ()),
        (", Hypertile\nVersion: v1.9", ()),
    ],
)
def test_settings_of_several_lines(more, missed):
    text = f"epic fox\nSteps: many, up the hill\nNegative prompt: ugly\n{SETTINGS_LINE}{more}"
    request = from_parameters(text, "lines")
    assert (request.prompt, request.negative) == ("epic fox\nSteps: many, up the hill", "ugly")
    assert (request.seeds, request.settings["steps"]) == ((5,), 9)
    assert request.settings["size"] == (64, 96)
    assert [text for _, text in request.missed if not text.startswith("RNG")] == [*missed]


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_round_trip_through_files(tmp_path, format, prompt):
    made = picture(prompt, "no, not: this", "fox", 123)
    values, text = chunk(made), parameters(made.values())
    path = tmp_path / f"x.{format}"
    image = Image.new("RGB", (16, 8), (200, 100, 50))
    path.write_bytes(encode(image, format, texts(text, values)))
    request = read(path)
    assert (request.prompt, request.negative) == (prompt, "no, not: this")
    assert (request.label, request.seeds) == ("fox", (123,))
    assert tuple(request.settings["size"]) == (512, 768)
    assert request.settings["sampler"] == "dpmpp_2m"
    with Image.open(path) as back:
        assert back.size == (16, 8) and back.mode == "RGB"
        if format == "png":
            assert back.text["parameters"] == text  # type: ignore[attr-defined]
            assert json.loads(back.text["difftool"]) == values  # type: ignore[attr-defined]
            assert back.getpixel((3, 3)) == (200, 100, 50)
        else:
            comment = back.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"
            assert comment[8:].decode("utf-16-be") == text


def test_the_chunk_names_the_preset_and_holds_what_differs():
    values = json.loads(json.dumps(chunk(picture("x"))))
    assert values["schema"] == 2 and values["version"] == __version__
    assert values["model_hash"] == "0123456789"
    assert values["preset"] == {
        "name": "tiny", "hash": preset_hash(PRESET),
        "sample": {"size": [512, 768], "guidance": 7.0, "schedule": "karras"},
    }  # fmt: skip
    assert len(json.dumps(values)) < 400
    request = from_chunk(json.dumps(values), "test")
    assert request.settings == to_values(SETTINGS)
    assert (request.model, request.made_by) == ("tiny", f"difftool {__version__}")
    assert preset_hash(tiny.preset(5)) != preset_hash(PRESET)


def test_a_chunk_of_an_older_version_has_all_settings_in_its_preset():
    values = json.loads(json.dumps(chunk(picture("x"))))
    whole = to_values(PRESET) | {"sample": {"steps": 7, "schedule": "karras"}}
    request = from_chunk(json.dumps(values | {"schema": 1, "preset": whole}), "test")
    assert request.settings == {"steps": 7, "schedule": "karras"}


USUAL = {
    "size": [64, 64], "steps": 20, "sampler": "dpmpp_2m", "sampler_options": {},
    "schedule": "linspace", "schedule_options": {}, "guidance": 1.0, "guidance_rescale": 0.0,
    "guidance_interval": None, "clip": "none", "clip_range": None, "clip_quantile": 0.995,
    "rederive_eps": None, "start_noise": "unit", "strength": 0.75, "fit": "stretch",
    "image_guidance": 1.5, "noise_level": 0, "prior_steps": None, "prior_guidance": None,
    "clip_skip": None, "prompt_syntax": "a1111", "prompt_weighting": None, "tile": "none",
    "chaos": 0.0, "stop": 100,
}  # fmt: skip


def test_what_a_chunk_leaves_out_is_never_another_value():
    """Pictures that were written rely on it: another default needs another schema."""
    assert {name: to_values(SampleConfig())[name] for name in USUAL} == USUAL


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_without_metadata_nothing_is_said(tmp_path, format):
    path = tmp_path / f"x.{format}"
    path.write_bytes(encode(Image.new("RGB", (8, 8)), format))
    assert b"difftool" not in path.read_bytes()
    with pytest.raises(InputError, match="does not say"):
        read(path)


def test_what_does_not_fit_is_a_usage_error():
    with pytest.raises(UsageError, match="jpg"):
        encode(Image.new("RGB", (8, 8)), "jpg", texts("🦊" * 40_000, None))


def test_a_long_text_goes_before_the_chunk(tmp_path):
    """Both are more than a JPEG has room for: the text alone was written before, and still is."""
    generator = random.Random(0)
    prompt = "".join(chr(generator.randrange(0x4E00, 0x9FFF)) for _ in range(9_999))
    made = picture(prompt, prompt, None, 123)
    for format in ("jpg", "webp"):
        data = encode(
            Image.new("RGB", (8, 8)), format, texts(parameters(made.values()), chunk(made))
        )
        (tmp_path / f"x.{format}").write_bytes(data)
        request = read(tmp_path / f"x.{format}")
        assert (request.prompt, request.negative, request.seeds) == (prompt, prompt, (123,))


def unsound(sample: Any = None, **changes: Any) -> str:
    request = {"prompt": "", "negative": "", "label": None, "seed": 1} | changes
    return json.dumps({"request": request, "preset": {"sample": {} if sample is None else sample}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"request": {}}',
        "[" * 100_000,
        "x" * 2_000_000,
        unsound(prompt=1),
        unsound(label=2),
        unsound(seed=True),
        unsound(seed=1.5),
        unsound(sample=[]),
        unsound(loras=[["x.safetensors", float("nan")]]),
        unsound(loras=[["x.safetensors", float("inf")]]),
    ],
    ids=range(14),
)
def test_unsound_chunks_are_refused(text):
    with pytest.raises(InputError):
        from_chunk(text, "test")


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(UsageError):
        read(tmp_path / "none.png")
    for content in (b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"x" * 100):
        path = tmp_path / "x.png"
        path.write_bytes(content)
        with pytest.raises(InputError):
            read(path)


LONG = 300_000


@pytest.mark.parametrize(
    "text",
    [
        "Steps: 20, " + "A" * LONG,
        "Steps: 1," + " " * LONG + "x",
        'x: "' * LONG,
        'x:"a"b' * LONG,
        'Steps: 20, x: "' + '\\"' * LONG,
        "a " * LONG,
        "Negative prompt:\n" * 10_000,
    ],
    ids=range(7),
)
def test_a_long_line_is_read_in_one_pass(text):
    """Gone through again from each letter, these would take hours."""
    assert {"Prompt", "Negative prompt"} <= parse_parameters(text).keys()


def test_a_text_without_end_is_refused(tmp_path):
    path, exif = tmp_path / "a.webp", Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "x".encode("utf-16-be") * (2 << 20)
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    with pytest.raises(InputError) as caught:
        read(path)
    assert "longer than" in str(caught.value)
