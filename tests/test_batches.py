"""Many prompts in one run: each picture is the same in any company, what is printed asks for it
again, and a run that is killed is begun again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import ENVIRONMENT
from PIL import Image

import difftool as library
from difftool.errors import UsageError
from difftool.pipeline.load import load_model
from difftool.sampling.events import Result, Working
from difftool.sampling.files.prompts import Lines
from difftool.sampling.metadata.files import read
from difftool.sampling.requests import Request, parse_line
from difftool.sampling.run import SampleRun
from difftool.text.tokenizer import Tokenizer

SAMPLE = {"size": [16, 16], "steps": 2, "sampler": "euler_a", "guidance": 2.0}
TEXT = tiny.TEXT | {"vocab_size": 300}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A text-to-image model with an autoencoder."""
    tokenizer = Tokenizer.learn(["a red fox", "a blue dog on a green hill"] * 9, 300)
    preset = tiny.small(
        "ldm-small",
        {"codec": tiny.LATENT["codec"], "unet": tiny.LATENT["unet"], "sample": SAMPLE},
        {"text": [TEXT | {"vocab_size": tokenizer.vocab_size}]},
    )
    path = tmp_path_factory.mktemp("models") / "text.safetensors"
    tiny.model(preset, seed=1, tokenizer_json=tokenizer.to_json()).save(path)
    return path


LINES = [
    {"prompt": "a red fox", "seed": 1},
    {"prompt": "a blue dog " * 9, "seed": 2, "negative": "a red fox"},
    {"prompt": "a red fox AND a green hill:0.5", "seed": 3},
    {"prompt": "a [red:blue:0.5] (fox:1.4)", "seed": 4},
    {"prompt": "a dog", "seed": 5, "steps": 3, "sampler": "dpmpp_2m_sde", "guidance": 3},
    {"prompt": "a hill", "seed": 6, "steps": 3, "sampler": "dpmpp_2m_sde", "guidance": 3},
    {"prompt": "a fox", "seed": 7, "width": 32},
    {"prompt": "a fox", "seed": 8, "init": "init.png", "strength": 0.7},
    {"prompt": "a {red|blue} dog --chaos 60", "seed": 9},
]


def test_a_picture_is_the_same_alone_and_in_any_batch_order_and_company(model, difftool):
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save("init.png")
    loaded = library.load(model, device="cpu")

    def pictures(order: list[int], **more: Any) -> dict[int, np.ndarray]:
        text = "\n".join(json.dumps(LINES[i]) for i in order)
        Path("p.jsonl").write_text(text, encoding="utf-8")
        made = loaded.sample(prompts="p.jsonl", **more)
        return {i: np.asarray(image, int) for i, image in zip(order, made, strict=True)}

    order, rng = list(range(len(LINES))), random.Random(0)
    exact = pictures(order, exact=True)
    for i in (1, 5, 8):
        assert (pictures([i])[i] == exact[i]).all(), LINES[i]
    for more in ({"exact": True}, {"batch_size": 2}, {"batch_size": 5}):
        rng.shuffle(order)
        for i, picture in pictures(order, **more).items():
            assert abs(picture - exact[i]).max() <= ("exact" not in more), LINES[i]
    assert len({picture.tobytes() for picture in exact.values()}) == len(LINES)


def test_what_is_printed_is_read_again_as_lines_and_as_one_array(model, difftool):
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save("init.png")
    lines = [
        *(json.dumps(line | {"id": i}) for i, line in enumerate(LINES[1::2])),
        "a red dog --ar 2:1 --tile --no hills --seed 11 --stop 70",
        "a dog --s 4 --d 12,13 --l 4 --w 32 --h 32 --ss euler",
        '{"prompt": "a fox", "seed": 14, "vary": 0.3, "vary_seed": 5, "rng": "gpu"}',
        '{"prompt": "", "negative": "a dog", "n_iter": 2, "seed": 15, "clip_skip": 1, "eta": 0.5}',
        '{"prompt": "a (fox)1.3", "prompt_syntax": "compel", "guidance_rescale": 0.5, "seed": 17}',
    ]
    Path("p.txt").write_text("\n".join(lines), encoding="utf-8")
    common = ("sample", "-m", model, "--device", "cpu", "--json")
    first = difftool(*common, "--prompts", "p.txt", "-o", "first/[index:02].png")
    assert first.code == 0 and len(first.objects) == len(lines) + 2, first.out
    assert [each["index"] for each in first.objects] == list(range(len(lines) + 2))
    assert [each.get("id") for each in first.objects][:6] == [0, 1, 2, 3, None, None]
    Path("lines.jsonl").write_text(first.out, encoding="utf-8")
    Path("array.json").write_text(json.dumps(first.objects, indent=1), encoding="utf-8")
    for name in ("lines.jsonl", "array.json"):
        again = difftool(*common, "--prompts", name, "-o", f"again-{name}/[index:02].png")
        assert again.code == 0, again.out
        for one, other in zip(first.objects, again.objects, strict=True):
            assert Path(one["path"]).read_bytes() == Path(other["path"]).read_bytes(), one
            assert {**one, "path": "", "seconds": 0} == {**other, "path": "", "seconds": 0}


SHAPES = ("1:1", "2:1", "1:2")


def run(model: Path, lines: Lines, **more: Any) -> list[Any]:
    """The images of each batch of a run and the index of each result, as they come."""
    made = SampleRun(model=load_model(str(model), device="cpu"), **more)
    found = []
    for event in made.events(lines):
        if isinstance(event, Working) and event.step == 1:
            found.append(f"{event.images} together")
        elif isinstance(event, Result):
            found.append(event.index)
    return found


def request(number: int, shape: str = "") -> Request:
    found = parse_line(f"a fox --ar {shape or SHAPES[number % 3]} --d {number}")
    assert found is not None
    return found


def test_pictures_of_one_shape_are_made_together_from_among_others(model):
    lines = [request(number) for number in range(13)]
    together = run(model, lines, batch_size=4)
    several = [0, "4 together", 1, "4 together", *range(2, 12)]
    assert together == ["4 together", *several, "1 together", 12]
    # what has to be waited for keeps back nothing, and what is no picture is told in its place
    wrong = UsageError("it is none")
    found = run(model, [*lines[:5], None, *lines[5:9], wrong], batch_size=4)
    assert found[:8] == ["2 together", 0, "2 together", 1, "1 together", 2, 3, 4]
    assert [each for each in found if isinstance(each, int)] == list(range(9))


def test_a_picture_that_is_alone_of_its_shape_holds_up_few(model):
    asked = []

    def lines() -> Iterator[Request]:
        for number in range(40):
            asked.append(number)
            yield request(number, "2:1" if not number else "1:1")

    made = SampleRun(model=load_model(str(model), device="cpu"), batch_size=4)
    first = next(event for event in made.events(lines()) if isinstance(event, Result))
    assert first.index == 0 and len(asked) <= 4 * 4 + 1


def test_mixed_shapes_are_printed_in_order_and_each_as_it_is_alone(model, difftool):
    lines = [f"a fox --ar {SHAPES[i % 3]} --d {i}" for i in range(7)]
    Path("p.txt").write_text("\n".join(lines), encoding="utf-8")
    common = ("sample", "-m", model, "--device", "cpu", "--json", "--exact")
    ran = difftool(*common, "--prompts", "p.txt", "-o", "out/")
    assert [each["seed"] for each in ran.objects] == list(range(7))
    assert [each["path"] for each in ran.objects] == [f"out/0000{i}-{i}.png" for i in range(7)]
    for i in (1, 5):
        (path,) = difftool(*common[:-2], "--exact", lines[i].replace("--d", "--seed")).lines
        assert Path(path).read_bytes() == Path(ran.objects[i]["path"]).read_bytes()


# --- a thousand prompts, in processes of their own -------------------------------------------


def started(model: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "difftool", "sample", "-m", str(model), "--device", "cpu"]
    return subprocess.Popen(
        [*program, "--prompts", "-", "-o", "out/", "--json", *more], cwd=folder, text=True,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def resident(process: subprocess.Popen[str]) -> int:
    """MiB of memory that a process has."""
    pages = Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("count", [40, 1000])
def test_a_slow_writer_s_prompts_are_drawn_as_they_come(model, tmp_path, count):
    process = started(model, tmp_path)
    assert process.stdin and process.stdout and process.stderr
    written = 0

    def write() -> None:
        nonlocal written
        assert process.stdin
        for written in range(1, count + 1):
            process.stdin.write(f"a red fox number {written} --d {written}\n")
            process.stdin.flush()
            time.sleep(0.002)
        process.stdin.close()

    writer = threading.Thread(target=write)
    first = process.stdin.write("a blue dog --d 0\n")
    process.stdin.flush()
    made = [json.loads(process.stdout.readline())]  # the writer waits for it
    assert first and made[0]["seed"] == 0
    writer.start()
    memory = []
    for line in process.stdout:
        made.append(json.loads(line))
        memory.append(resident(process))
    writer.join()
    assert process.wait() == 0
    assert [each["index"] for each in made] == list(range(count + 1))
    assert [each["seed"] for each in made] == list(range(count + 1))
    assert process.stderr.read().count("loading") == 1
    process.stdout.close()
    process.stderr.close()
    assert memory[-1] - memory[len(memory) // 4] < 16, memory[:: len(memory) // 8]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills")
@pytest.mark.parametrize(("count", "kills"), [(40, 3), (1000, 20)])
@pytest.mark.parametrize("seeds", ["given", "drawn"])
def test_a_run_that_is_killed_again_and_again_makes_each_picture_once(
    model, tmp_path, count, kills, seeds
):
    rng = random.Random(count)
    prompts = [f"a red fox number {i}" for i in range(count)]
    lines = [f"{p} --d {i}" if seeds == "given" else p for i, p in enumerate(prompts)]
    text = "\n".join(lines)
    for _ in range(kills):
        process = started(model, tmp_path, "--skip-existing")
        assert process.stdin and process.stdout and process.stderr
        feeder = threading.Thread(target=_feed, args=(process, text))
        feeder.start()
        new = rng.randrange(1, max(2, 2 * count // kills))
        for line in process.stdout:
            new -= not json.loads(line).get("existing")
            if new <= 0:
                break
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        feeder.join()
        process.stdout.close()
        process.stderr.close()
    process = started(model, tmp_path, "--skip-existing")
    out, err = process.communicate(text)
    assert process.returncode == 0, err
    reports = [json.loads(line) for line in out.splitlines()]
    assert [each["prompt"] for each in reports] == prompts
    assert [each["index"] for each in reports] == list(range(count))
    files = sorted((tmp_path / "out").glob("*.png"))
    assert {str(file.relative_to(tmp_path)) for file in files} == {e["path"] for e in reports}
    found = Counter((request.prompt, request.seeds) for request in map(read, files))
    assert found == Counter((each["prompt"], (each["seed"],)) for each in reports)
    assert len(found) == len(files) == count
    if seeds == "given":
        assert [each["seed"] for each in reports] == list(range(count))
    assert not list((tmp_path / "out").glob(".difftool-*.part"))


def _feed(process: subprocess.Popen[str], text: str) -> None:
    try:
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
    except (BrokenPipeError, ValueError):
        pass
