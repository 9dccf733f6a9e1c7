"""Batches, order, failures and files of a run, with a model that is a few lines of arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from difftool.config.schema import SampleConfig
from difftool.diffusion.path import build_path
from difftool.errors import DifftoolError, ResourceError, UsageError
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.settings import resolve_settings
from difftool.sampling import resolve
from difftool.sampling import run as running
from difftool.sampling.batches import default_batch
from difftool.sampling.events import (
    Event,
    Existing,
    Failure,
    Note,
    Result,
    Working,
)
from difftool.sampling.metadata.files import read
from difftool.sampling.output import Output
from difftool.sampling.requests import Request
from difftool.sampling.run import SampleRun
from difftool.storage.safetensors import load_tensors, save_tensors

PRESET = tiny.preset(
    name="fake",
    unet={"attention": "transformer", "depth": [0, 1], "context_dim": 8},
    text=[{"width": 8, "layers": 1, "heads": 1, "mlp": 8}],
    sample={"size": [8, 8], "steps": 3, "guidance": 2.0, "sampler": "ddim"},
)


class FakeModel:
    """Pictures of one colour, the seed's; remembers the batches that it was asked for."""

    name, hash, content, preset, null_label = "fake", "0123456789", "0123", PRESET, None
    tokenizers, single_steps, deferred = (), False, False
    concat, vision, prior, words, loras = "none", None, None, (), []
    base_loras, word_files = (), ([], [])
    device, dtype = torch.device("cpu"), torch.float32
    codec = SimpleNamespace(channels=3, factor=2)
    denoiser = SimpleNamespace(path=build_path(PRESET.path))
    guidable = True

    def __init__(self, memory: int = 1 << 30):
        self.memory = memory
        self.batches: list[list[int]] = []

    def label(self, name: str) -> int:
        raise UsageError("the model fake has no classes")

    def generate(self, items: Sequence[SampleInput], settings: SampleConfig) -> Iterator[Any]:
        if len(items) > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        self.batches.append([item.seed for item in items])
        side = settings.size[1] // 2
        for index in range(settings.steps):
            values = torch.tensor([item.seed / 100 for item in items])
            x = values.reshape(-1, 1, 1, 1).expand(-1, 3, side, settings.size[0] // 2)
            if 13 in self.batches[-1]:
                x = torch.where(x == torch.tensor(0.13), torch.nan, x)
            yield SimpleNamespace(index=index, x=x)

    def decode(self, x0: Tensor) -> Tensor:
        return x0.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_ins = {
        (running, "generate"): lambda plan, items: plan.model.generate(items, plan.settings),
        (running, "decode"): lambda model, x0: model.decode(x0),
        (resolve, "token_count"): lambda model, prompt: (len(prompt.split()), 5),
    }
    for (module, name), function in stand_ins.items():
        monkeypatch.setattr(module, name, function)


def make(
    requests: Sequence[Request | DifftoolError | None],
    where: str = "out/[seed].png",
    memory: int = 1 << 30,
    **options: Any,
) -> tuple[list[Event], Any]:
    model: Any = FakeModel(memory)
    output = Output.parse(where, many=True, skip_existing=options.pop("skip_existing", False))
    events = list(SampleRun(model=model, output=output, **options).events(requests))
    return [event for event in events if not isinstance(event, Working)], model


def ask(prompt: str, *seeds: int, **settings: Any) -> Request:
    return Request(prompt=prompt, seeds=seeds, settings=settings)


def seeds_of(events: Sequence[Event]) -> list[int | None]:
    return [event.sample.seed for event in events if isinstance(event, Result)]


def failures_of(events: Sequence[Event]) -> list[str]:
    return [str(event.error) for event in events if isinstance(event, Failure)]


def test_like_settings_share_batches_and_order_is_kept():
    requests = [ask("a", 1), ask("b", 2, 3), ask("c", 4, steps=5), ask("d", 5), ask("e", 6)]
    events, model = make(requests, batch_size=2)
    assert model.batches == [[1, 2], [3, 5], [4], [6]]
    assert seeds_of(events) == [1, 2, 3, 4, 5, 6]
    assert [e.index for e in events if isinstance(e, Result)] == [0, 1, 2, 3, 4, 5]
    assert [e.sample.request.prompt for e in events if isinstance(e, Result)] == list("abbcde")


def test_a_stream_is_worked_on_before_it_goes_on():
    seen: list[Any] = []

    def requests() -> Iterator[Request | None]:
        yield ask("a", 1)
        yield ask("b", 2)
        assert not seen
        yield None
        assert seeds_of(seen) == [1, 2]
        yield ask("c", 3)

    model: Any = FakeModel()
    run = SampleRun(model=model, output=Output.parse("out/"), batch_size=16)
    for event in run.events(requests()):
        seen.append(event)
    assert model.batches == [[1, 2], [3]] and seeds_of(seen) == [1, 2, 3]


def test_what_fails_does_not_stop_the_others():
    bad = UsageError("line 2: nonsense")
    requests = [ask("a", 1), bad, ask("b", 2, steps=0), ask("c", 13), Request(), ask("d", 3)]
    events, model = make(requests, batch_size=8)
    assert model.batches == [[1, 13, 3]]
    kinds = [type(event) for event in events]
    assert kinds == [Result, Failure, Failure, Failure, Failure, Result]
    messages = failures_of(events)
    assert messages[0] == "line 2: nonsense" and "--steps 0" in messages[1]
    assert "image 3 (seed 13) has non-finite" in messages[2] and "needs a prompt" in messages[3]
    assert seeds_of(events) == [1, 3] and sorted(p.name for p in Path("out").iterdir()) == [
        "1.png",
        "3.png",
    ]


def test_errors_say_where_they_come_from():
    request = dataclasses.replace(ask("a", 1, steps=0), source="prompts.txt line 4")
    events, _ = make([request])
    assert failures_of(events) == ["prompts.txt line 4: --steps 0 is too few\ngive at least 1"]


def test_batches_too_large_for_memory_are_halved():
    events, model = make([ask("a", *range(20, 32))], memory=3, batch_size=8)
    assert seeds_of(events) == list(range(20, 32))
    assert [len(batch) for batch in model.batches] == [2] * 6
    with pytest.raises(RuntimeError, match="out of memory"):
        make([ask("a", 1, 2)], memory=0)


def test_every_picture_is_its_own_seeds():
    make([ask("a", 10, 90)])
    for seed in (10, 90):
        with Image.open(f"out/{seed}.png") as image:
            value = round((seed / 100 + 1) * 127.5)
            assert image.size == (8, 8) and image.getpixel((4, 4)) == (value,) * 3
        request = read(Path(f"out/{seed}.png"))
        assert request.seeds == (seed,) and request.prompt == "a"


def test_pictures_that_are_there_are_skipped_and_keep_their_index():
    make([ask("a", 1)], "out/[index].png")
    old = Path("out/0.png").read_bytes()
    requests = [ask("a", 1), ask("c", 3)]
    events, model = make(requests, "out/[index].png", skip_existing=True)
    assert isinstance(events[0], Existing) and events[0].path == Path("out/0.png")
    assert model.batches == [[3]]
    assert Path("out/0.png").read_bytes() == old and Path("out/1.png").exists()


def test_pictures_that_are_there_are_failures_else():
    make([ask("a", 1)])
    events, model = make([ask("b", 1), ask("b", 2)])
    assert "1.png exists" in failures_of(events)[0] and model.batches == [[2]]


def test_drawn_seeds_are_said():
    events, _ = make([Request(prompt="a", num=2)])
    first = seeds_of(events)[0]
    assert Note(f"seed {first}", warning=False) in events


def test_cut_prompts_are_said_once_or_refused():
    long = "one two three four five six seven"
    events, _ = make([ask(long, 1, prompt_syntax="none"), ask(long, 2, prompt_syntax="none")])
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1 and "7 tokens" in notes[0] and "last 2 are cut" in notes[0]
    events, _ = make([ask(long, 3), ask("short", 4)], strict=True)
    assert "7 tokens" in failures_of(events)[0] and seeds_of(events) == [4]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (ask("a", 1, guidance=0.0), "guidance 0 is read as 1"),
        (Request(prompt="a", negative="b", settings={"guidance": 1.0}), "has no effect"),
        (Request(prompt="a", model_hash="9876543210"), "made with the model 9876543210"),
    ],
)
def test_what_is_not_done_to_the_letter_is_said(request_, text):
    events, _ = make([request_])
    assert any(text in event.text for event in events if isinstance(event, Note) and event.warning)
    events, _ = make([Request(prompt="a", negative="b", model_hash="0123456789")])
    assert not any(event.warning for event in events if isinstance(event, Note))


def test_one_name_is_not_given_to_two_pictures():
    model: Any = FakeModel()
    output = Output.parse("out/[prompt].png", overwrite=True)
    requests = [ask("a", 1, 2), ask("a-2", 3), ask("A", 4), Request(prompt="b", seeds=(5, 6))]
    requests[-1] = dataclasses.replace(requests[-1], out="a.png")
    events = list(SampleRun(model=model, output=output).events(requests))
    paths = [event.path for event in events if isinstance(event, Result)]
    names = ["a.png", "a-2.png", "a-2-2.png", "A-3.png", "a-4.png", "a-5.png"]
    assert paths == [Path("out", name) for name in names]


def test_a_folder_to_start_from_makes_one_picture_each():
    Path("photos").mkdir()
    Path("masks").mkdir()
    for name in ("b.png", "a.jpg", "c.png"):
        Image.new("L", (8, 8), 200).save(Path("photos", name))
    for name in ("a.png", "b.webp"):
        Image.new("L", (8, 8), 255).save(Path("masks", name))
    Path("photos/notes.txt").write_text("no picture", encoding="utf-8")
    Path("photos/.hidden.png").write_text("no picture", encoding="utf-8")
    folder = Request(prompt="x", seeds=(1,), num=2, init="photos", settings={"strength": 1.0})
    events, _ = make([folder], "out/[init]-[seed].png")
    names = [f"{name}-{seed}.png" for name in "abc" for seed in (1, 2)]
    assert [e.path for e in events if isinstance(e, Result)] == [Path("out", n) for n in names]
    masked = dataclasses.replace(folder, mask="masks", num=1)
    events, _ = make([masked, ask("y", 9)], "masked/[init].png")
    indices = [e.index for e in events if isinstance(e, Result | Failure)]
    assert indices == [0, 1, 2, 3] and "masks/c.png" in failures_of(events)[0]
    Path("none").mkdir()
    events, _ = make([dataclasses.replace(folder, init="none"), ask("y", 9)], "none/[seed].png")
    assert "none holds no picture" in failures_of(events)[0] and seeds_of(events) == [9]


def test_a_full_disk_stops_the_run(monkeypatch):
    def full(*_args: Any) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr("difftool.sampling.output.write_whole", full)
    with pytest.raises(ResourceError):
        make([ask("a", 1, 2)])


def test_latents_are_saved_and_decode_to_the_same_picture():
    events, model = make([ask("a fox", 10, 20)], latents=True)
    result = events[0]
    assert isinstance(result, Result) and result.latents == Path("out/10.latents.safetensors")
    assert result.latents
    latents = load_tensors(result.latents)["latents"]
    assert latents.dtype == torch.float32 and latents.shape == (3, 4, 4)
    assert latents.unique().tolist() == [pytest.approx(0.1)]
    run = SampleRun(model=model, output=Output.parse("again/[seed].png"))
    (decoded,) = list(run.decode([result.latents]))
    assert isinstance(decoded, Result) and decoded.path == Path("again/10.png")
    assert Path("again/10.png").read_bytes() == Path("out/10.png").read_bytes()


def test_latents_that_cannot_be_decoded_are_kept(monkeypatch):
    def broken(self: Any, x0: Tensor) -> Tensor:
        raise RuntimeError("the decoder is broken")

    monkeypatch.setattr(FakeModel, "decode", broken)
    with pytest.raises(ResourceError, match=r"10\.latents") as stopped:
        make([ask("a", 10, 20)])
    assert "--from-latents" in str(stopped.value)
    files = sorted(Path("out").glob("*.latents.safetensors"))
    assert [file.name for file in files] == ["10.latents.safetensors", "20.latents.safetensors"]
    latents = load_tensors(files[1])["latents"]
    assert latents.unique().tolist() == [pytest.approx(0.2)]


def test_options_without_effect_are_said():
    events, _ = make([ask("a", 1, strength=0.5, noise_level=3)])
    texts = [event.text for event in events if isinstance(event, Note) and event.warning]
    assert any("--strength 0.5 has no effect" in text for text in texts)
    assert any("--noise-level 3 has no effect" in text for text in texts)
    events, _ = make([ask("a", 2)])
    assert not any("no effect" in e.text for e in events if isinstance(e, Note))


def test_syntax_of_other_tools_is_said_once_a_kind_and_names_what_stands_there():
    plain = {"prompt_syntax": "none"}
    events, _ = make(
        [ask("a (red:1.2) fox", 1, **plain), ask("a (blue:1.3) fox BREAK", 2, **plain)]
    )
    texts = [event.text for event in events if isinstance(event, Note) and event.warning]
    assert [text.split(" is not understood")[0] for text in texts] == ["(red:1.2)", "BREAK"]
    assert all("drawn as words" in text and "a1111" in text for text in texts)
    events, _ = make([ask("a (blue:1.3) fox", 3)])
    assert not [event for event in events if isinstance(event, Note) and event.warning]


def test_what_is_wrong_with_a_prompt_fails_its_picture_alone():
    prompts = ["a <lora:ink:1>", "a fox"]
    events, _ = make([ask(prompt, i, prompt_syntax="a1111") for i, prompt in enumerate(prompts)])
    assert [type(event) for event in events] == [Failure, Result]
    assert 'there is no LoRA "ink"' in failures_of(events)[0]


def test_latents_that_do_not_fit_are_refused(tmp_path):
    files = [tmp_path / f"{n}.safetensors" for n in range(5)]
    save_tensors(files[0], {"other": torch.zeros(3, 4, 4)}, {})
    save_tensors(files[1], {"latents": torch.zeros(4, 4, 4)}, {})
    files[2].write_bytes(b"junk")
    save_tensors(files[3], {"latents": torch.full((3, 4, 4), torch.inf)}, {})
    model: Any = FakeModel()
    events = list(SampleRun(model=model, output=Output.parse("out/")).decode(files))
    codes = [event.error.code for event in events if isinstance(event, Failure)]
    assert codes == [3, 3, 3, 3, 2] and not Path("out").exists()


def test_a_picture_of_latents_that_decode_to_no_numbers_is_not_written(monkeypatch):
    file = Path("x.safetensors")
    save_tensors(file, {"latents": torch.zeros(3, 2, 8)}, {})
    monkeypatch.setattr(FakeModel, "decode", lambda _, x0: x0 / 0)
    model: Any = FakeModel()
    (failure,) = SampleRun(model=model, output=Output.parse("out/")).decode([file])
    assert isinstance(failure, Failure) and failure.error.code == 5 and not Path("out").exists()


def test_latents_without_a_word_still_decode(tmp_path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"latents": torch.zeros(3, 2, 8)}, {})
    model: Any = FakeModel()
    (result,) = list(SampleRun(model=model, output=Output.parse("out/")).decode([file]))
    assert isinstance(result, Result) and result.path == Path("out/00000-latents.png")
    with Image.open("out/00000-latents.png") as image:
        assert image.size == (16, 4)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"width": 16}, {"size": (16, 8)}),
        ({"size": (4, 4), "height": 6}, {"size": (4, 6)}),
        ({"sampler": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m", "schedule": "karras"}),
        (
            {"sampler": "DPM++ 2M Karras", "schedule": "linspace"},
            {"sampler": "dpmpp_2m", "schedule": "linspace"},
        ),
    ],
)
def test_settings(asked, expected):
    model: Any = FakeModel()
    assert resolve_settings(model, asked) == dataclasses.replace(PRESET.sample, **expected)


def test_default_batches_shrink_with_size():
    sizes = [(8, 8), (256, 256), (512, 512), (1024, 1024), (4096, 4096)]
    assert [default_batch(SampleConfig(size=s)) for s in sizes] == [16, 16, 4, 1, 1]
