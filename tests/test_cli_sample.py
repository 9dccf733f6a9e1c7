"""`difftool sample` from end to end, with tiny models of random weights."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from commands import ENVIRONMENT, Ran
from PIL import Image

from difftool import plugins
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.noise import start_noise
from difftool.diffusion.samplers import SAMPLERS
from difftool.sampling.metadata.a1111 import parse_parameters
from difftool.sampling.metadata.files import encode, read, texts
from difftool.storage.runs import MODEL, save_checkpoint
from difftool.storage.safetensors import load_tensors
from difftool.text.tokenizer import Tokenizer

KEYS = (
    "schema path index prompt negative seed sampler schedule steps guidance width height model"
    " model_hash seconds"
).split()
SAMPLE = {"size": [16, 16], "steps": 2, "sampler": "euler", "schedule": "linspace"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Files of a text-to-image, a class-conditional and an unconditional model."""
    folder = tmp_path_factory.mktemp("models")
    captions = ["a red fox", "a blue dog on a green hill"] * 9
    tokenizer = Tokenizer.learn(captions, 300)
    text = {"width": 32, "layers": 1, "heads": 2, "mlp": 64, "length": 8, "tokenizer": "learned"}
    kinds = {
        "text": {
            "unet": {"attention": "transformer", "depth": [0, 1], "context_dim": 32},
            "text": [text | {"vocab_size": tokenizer.vocab_size}],
            "sample": SAMPLE | {"guidance": 2.0},
        },
        "classes": {"unet": {"num_classes": 3}, "classes": ["fox", "dog"]},
        "plain": {},
    }
    files = {}
    for name, values in kinds.items():
        common = {"name": name, "codec": tiny.BLOCKS, "sample": SAMPLE}
        flow = {"path": {"kind": "flow"}, "target": "flow"}
        preset = tiny.preset(12, **(common | flow | values))
        vocabulary = tokenizer.to_json() if name == "text" else None
        files[name] = str(folder / f"{name}.safetensors")
        tiny.model(preset, seed=1, tokenizer_json=vocabulary).save(Path(files[name]))
    return files


@pytest.fixture
def sample(models, difftool):
    """Run `difftool sample` in an empty folder."""

    def run(*args: object, model: str | None = "text") -> Ran:
        where = ["--model", models.get(model, model)] if model else []
        return difftool("sample", *where, "--device", "cpu", *args)

    return run


def command(model: str, *args: str) -> list[str]:
    """The same as a process of its own."""
    return [sys.executable, "-m", "difftool", "sample", "-m", model, "--device", "cpu", *args]


def test_a_picture_and_its_path(sample):
    ran = sample("a red fox", "--seed", 7)
    assert (ran.code, ran.lines) == (0, ["outputs/00000-7.png"])
    with Image.open("outputs/00000-7.png") as image:
        assert image.size == (16, 16)
        values = parse_parameters(image.info["parameters"])
    assert values["Prompt"] == "a red fox" and values["Seed"] == "7" and values["Size"] == "16x16"
    assert sample("a red fox", "--seed", 7).lines == ["outputs/00001-7.png"]
    assert Path("outputs/00000-7.png").read_bytes() == Path("outputs/00001-7.png").read_bytes()


def test_the_default_model_can_be_named_by_the_environment(sample, models, monkeypatch):
    monkeypatch.setenv("DIFFTOOL_MODEL", models["plain"])
    assert sample("--seed", 1, model=None).code == 0


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(sample, models):
    for step, name in ((5, "plain"), (10, "text")):
        data = Path(models[name]).read_bytes()
        save_checkpoint(
            Path("run"), step, lambda p, data=data: (p / MODEL).write_bytes(data), keep=9
        )
    newest = Path("run/checkpoints/step-000010", MODEL)
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    ran = sample("--seed", 1, "--json", model="run")
    assert ran.code == 0 and ran.object["model"] == "plain"
    assert "step-000010 is damaged and was passed over" in ran.err


def test_json_objects(sample, models):
    ran = sample(
        "a fox", "--negative", "bad", "-n", 2, "--seed", 5, "--size", "32x16", "--steps", 3,
        "--sampler", "DPM++ 2M", "--schedule", "Karras", "--guidance", 3, "--json",
    )  # fmt: skip
    assert ran.code == 0
    for index, item in enumerate(ran.objects):
        assert set(KEYS) <= set(item) and Path(item["path"]).is_file()
        expected = {
            "schema": 1,
            "index": index,
            "seed": 5 + index,
            "prompt": "a fox",
            "negative": "bad",
            "steps": 3,
            "sampler": "dpmpp_2m",
            "schedule": "karras",
            "guidance": 3.0,
            "width": 32,
            "height": 16,
            "model": "text",
        }
        assert {key: item[key] for key in expected} == expected
        assert len(item["model_hash"]) == 10 and item["seconds"] >= 0
        with Image.open(item["path"]) as image:
            assert image.size == (32, 16)


ASKED_AGAIN = """
text     "a red fox" "a dog" -n 2 --seed 5
text     "a fox" --negative "a dog" --sampler euler_a --eta 0.5 --guidance 3 --schedule karras
text     "a fox" --size 32x16 --steps 3 --guidance-rescale 0.5 --guidance-interval=-2,inf
text     "a fox" --set sample.clip=static --set sample.rederive_eps=false --guidance 1
text     "a fox" --init photo.png --mask mask.png --strength 0.6 --steps 5
text     "a (red:1.4) fox" --prompt-syntax a1111 --clip-skip 1
classes  --label dog,0
plain    --sampler "DPM++ 2M Karras" --set sample.schedule_options.rho=5
"""


@pytest.mark.parametrize("line", ASKED_AGAIN.strip().splitlines())
def test_every_object_printed_asks_for_the_same_picture_again(sample, line):
    model, *args = shlex.split(line)
    Image.linear_gradient("L").resize((40, 24)).convert("RGB").save("photo.png")
    Image.linear_gradient("L").resize((40, 24)).save("mask.png")
    ran = sample(*args, "-o", "first/[index].png", "--json", model=model)
    assert ran.code == 0, ran.err
    Path("lines.jsonl").write_text(ran.out, encoding="utf-8")
    again = sample("--prompts", "lines.jsonl", "-o", "again/[index].png", model=model)
    assert again.code == 0 and len(again.lines) == len(ran.objects), again.err
    for path in again.lines:
        assert Path(path).read_bytes() == (Path("first") / Path(path).name).read_bytes()


def test_what_is_loaded_is_said_at_once_and_the_rest_in_two_lines(sample, models):
    ran = sample("a red fox", "--steps", 1)
    first, how, seed, *rest = ran.err.splitlines()
    assert first == f"loading {models['text']} ..."
    assert how.startswith("1 steps of euler, schedule linspace") and seed.startswith("seed ")
    assert all(line.startswith("sampling ") for line in rest)
    told = sample("a red fox", "--steps", 1, "--verbose").err
    assert "family difftool, target flow" in told and "fp32 on cpu" in told


def test_several_words_may_have_been_meant_as_one_prompt(sample):
    ran = sample("a", "smiling", "fox", "--seed", 1, "-o", "[prompt].png")
    assert ran.lines == ["a.png", "smiling.png", "fox.png"]
    assert 'warning: 3 prompts of a word each; one prompt is given as "a smiling fox"' in ran.err
    for prompts in (["fox"], ["a fox", "dog"]):
        assert "warning" not in sample(*prompts, "--seed", 1).err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_says_what_was_made(sample, monkeypatch, number):
    decoded = []

    def decode(model, x0):
        decoded.append(x0)
        if len(decoded) == 4:
            signal.raise_signal(number)
        return model.codec.decode(x0)

    monkeypatch.setattr("difftool.sampling.run.decode", decode)
    handler = signal.getsignal(number)
    ran = sample("a fox", "-n", 8, "--batch-size", 1, "--seed", 1, "-o", "[seed].png")
    assert ran.code == 128 + number and "Traceback" not in ran.err
    assert ran.lines == ["1.png", "2.png", "3.png"] == sorted(os.listdir())
    assert ran.err.splitlines()[-1] == "interrupted: 3 of 8 pictures made"
    assert signal.getsignal(number) == handler


def test_a_folder_that_cannot_be_written_to_is_refused(sample, monkeypatch):
    Path("file").write_text("mine", encoding="utf-8")
    assert sample("a fox", "-o", "file/in/it.png").code == 2
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for the superuser all are
    ran = sample("a fox", "-o", "out/")
    assert ran.code == 2 and "cannot write to the folder" in ran.err and "loading" not in ran.err


def test_seeds_that_are_drawn_are_printed(sample):
    ran = sample("a fox", "--json")
    assert f"seed {ran.objects[0]['seed']}" in ran.err


def test_many_prompts_seeds_and_names(sample):
    ran = sample("a fox", "a dog", "--seed", "3,8-9", "-o", "out/[prompt]/[seed:03].png")
    expected = [f"out/{p}/{s}.png" for p in ("a-fox", "a-dog") for s in ("003", "008", "009")]
    assert ran.lines == expected and all(Path(path).is_file() for path in expected)
    ran = sample("a fox", "-n", 2, "--seed", 1, "-o", "fox.png")
    assert ran.lines == ["fox-0000.png", "fox-0001.png"]


@pytest.mark.parametrize("options", [["-n", 1], ["-n", 3, "--grid"]])
def test_progress_counts_pictures_once_they_are_made(sample, options):
    ran, count = sample("a red fox", "--steps", 2, *options, "-o", "out/"), options[1]
    (line,) = [line for line in ran.err.splitlines() if line.startswith("sampling")]
    assert f"{2 * count}/{2 * count}  images {count}/{count}" in line


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_other_formats(sample, format):
    ran = sample("a fox", "--seed", 1, "--format", format)
    assert ran.lines == [f"outputs/00000-1.{format}"]
    assert read(Path(ran.lines[0])).prompt == "a fox"


def test_models_without_text_need_no_prompt(sample):
    assert sample("--seed", 1, model="plain").code == 0
    ran = sample("--seed", 1, "--label", "dog,0", "--json", model="classes")
    assert ran.code == 0 and [item["label"] for item in ran.objects] == ["dog", "0"]
    pictures = [Path(item["path"]).read_bytes() for item in ran.objects]
    assert pictures[0] != pictures[1]
    assert sample("--seed", 1, model="classes").code == 0


def test_the_picture_goes_to_stdout_and_nothing_else(models, tmp_path):
    argv = command(models["text"], "a fox", "-o", "-")
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.format == "PNG" and image.size == (16, 16)
    assert done.stdout.endswith(b"IEND\xaeB`\x82") and os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_no_picture_goes_to_a_terminal(models, tmp_path):
    ours, theirs = os.openpty()
    argv = command(models["text"], "a fox", "-o", "-")
    done = subprocess.run(
        argv, cwd=tmp_path, env=ENVIRONMENT, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2 and b"terminal" in done.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_results_reach_a_pipe_while_progress_shows_on_a_terminal(models, tmp_path):
    ours, theirs = os.openpty()
    argv = command(models["text"], "a fox", "--seed", "1")
    environment = ENVIRONMENT | {"TERM": "xterm"}
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, b"outputs/00000-1.png\n")


def test_the_first_picture_is_made_before_the_last_prompt_is_read(models, tmp_path):
    argv = command(models["text"], "--prompts", "-", "-o", "out/[index].png", "--json")
    process = subprocess.Popen(
        argv, cwd=tmp_path, env=ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin and process.stdout
    process.stdin.write(b"a fox\n")
    process.stdin.flush()
    first = json.loads(process.stdout.readline())
    assert first["prompt"] == "a fox" and (tmp_path / "out/0.png").is_file()
    process.stdin.write(b'{"prompt": "a dog", "steps": 1}\n{"promt": 1}\na hill')
    process.stdin.close()
    second, wrong, third = map(json.loads, process.stdout.read().splitlines())
    process.stdout.close()
    assert (second["prompt"], second["steps"], third["prompt"]) == ("a dog", 1, "a hill")
    assert wrong["error"]["code"] == 2 and "line 3" in wrong["error"]["message"]
    assert wrong["error"]["hint"].startswith('did you mean "prompt"')
    assert process.wait() == 1


def test_files_of_prompts(sample, tmp_path):
    lines = ["# foxes", "a red fox", '{"prompt": "a dog", "seed": 9, "out": "x/dog.png"}', ""]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    ran = sample("--prompts", "prompts.txt", "--seed", 4, "-o", "new/")
    assert (ran.code, ran.lines) == (0, ["new/00000-4.png", "new/x/dog.png"])


def test_restarts_skip_what_is_there(sample):
    args = ("a fox", "-n", 3, "--seed", 1, "-o", "out/[index].png")
    sample(*args)
    Path("out/1.png").unlink()
    before = Path("out/0.png").stat().st_mtime_ns
    ran = sample(*args, "--skip-existing")
    assert (ran.code, ran.lines) == (0, ["out/1.png"])
    assert "1 made, 2 there already" in ran.err
    assert sample(*args).code == 2 and Path("out/0.png").stat().st_mtime_ns == before
    assert sample(*args, "--overwrite").code == 0
    assert Path("out/0.png").stat().st_mtime_ns > before


MISUSE = {
    "no prompt": (),
    "two sources": ("x", "--prompts", "-"),
    "prompts missing": ("--prompts", "none.txt"),
    "sampler": ("x", "--sampler", "eulr"),
    "schedule": ("x", "--schedule", "karas"),
    "format": ("x", "--format", "gif"),
    "size": ("x", "--size", "16y16"),
    "odd size": ("x", "--size", "15x16"),
    "seed": ("x", "--seed", "5-1"),
    "steps": ("x", "--steps", "0"),
    "number": ("x", "-n", "0"),
    "guidance": ("x", "--guidance", "0.5"),
    "interval": ("x", "--guidance-interval", "3"),
    "label": ("x", "--label", "fox"),
    "unknown flag": ("x", "--sede", "1"),
    "unknown key": ("x", "--set", "sample.stepz=3"),
    "key of the network": ("x", "--set", "unet.blocks=3"),
    "field": ("x", "-o", "out/[sed].png"),
    "name": ("x", "-o", "fox.gif"),
    "picture missing": ("--from-image", "none.png"),
    "latents missing": ("--from-latents", "none.safetensors"),
    "exact": ("x", "--exact", "--batch-size", "2"),
    "two on stdout": ("x", "-n", "2", "-o", "-"),
    "json on stdout": ("x", "--json", "-o", "-"),
    "seeds and number": ("x", "--seed", "1,2", "-n", "3"),
    "device": ("x", "--device", "tpu"),
    "long prompt": ("x " * 99, "--strict-prompt"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_exit_2_in_few_lines_and_leaves_nothing(sample, name):
    ran = sample(*MISUSE[name])
    assert ran.code == 2 and "Traceback" not in ran.err and os.listdir() == []
    if "--json" in MISUSE[name]:
        assert ran.objects[0]["error"]["code"] == 2
        return
    message = ran.err[ran.err.index("error: ") :]
    assert ran.out == "" and 1 <= len(message.splitlines()) <= 3


def test_errors_as_json(sample):
    ran = sample("x", "--sampler", "eulr", "--json")
    (item,) = ran.objects
    assert item["schema"] == 1 and item["error"]["code"] == 2 and ran.code == 2
    assert "eulr" in item["error"]["message"] and "euler" in item["error"]["hint"]


def test_models_that_are_not_there_or_not_models(sample, tmp_path):
    assert sample("x", model="none.safetensors").code == 2
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    assert sample("x", model="junk.safetensors").code == 3
    (tmp_path / "junk.png").write_bytes(b"\xff" * 100)
    assert sample("--from-image", "junk.png").code == 3


def test_an_existing_picture_is_refused_before_the_work(sample):
    Path("fox.png").write_text("mine", encoding="utf-8")
    ran = sample("a fox", "-o", "fox.png", model="none.safetensors")
    assert ran.code == 2 and "fox.png exists" in ran.err
    assert Path("fox.png").read_text(encoding="utf-8") == "mine"


def latents(sample, *args: object) -> dict[int, torch.Tensor]:
    ran = sample("a fox", "--save-latents", "--json", *args)
    assert ran.code == 0, ran.err
    return {i["seed"]: load_tensors(Path(i["latents"]))["latents"] for i in ran.objects}


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m_sde"])
def test_an_image_is_the_same_alone_and_in_a_batch(sample, sampler):
    common = ("--sampler", sampler, "--steps", 4)
    together = latents(sample, *common, "--seed", "1-4", "--batch-size", 4)
    alone = latents(sample, *common, "--seed", 3)[3]
    exact = latents(sample, *common, "--seed", "2,3", "--exact")
    assert alone.isfinite().all() and alone.std() > 0.01
    assert (together[3] - alone).abs().max() < 1e-4
    assert (together[3] - together[2]).abs().max() > 0.1
    assert exact[3].equal(alone)
    first = start_noise([3], (12, 8, 8))[0]
    assert start_noise([1, 2, 3], (12, 8, 8))[2].equal(first)


def test_saved_latents_decode_to_the_same_picture(sample):
    sample("a fox", "--seed", 1, "--save-latents", "-o", "fox.png")
    ran = sample("--from-latents", "fox.latents.safetensors", "-o", "again.png")
    assert (ran.code, ran.lines) == (0, ["again.png"])
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()


def test_a_picture_is_made_again_from_itself(sample):
    args = ("--negative", "bad", "--sampler", "euler_a", "--eta", 0.5, "--guidance", 3)
    sample("a fox", *args, "--seed", 11, "--size", "32x16", "-o", "fox.png")
    assert sample("--from-image", "fox.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()
    ran = sample("--from-image", "fox.png", "--steps", 5, "--seed", 12, "--json")
    (item,) = ran.objects
    assert (item["prompt"], item["steps"], item["seed"]) == ("a fox", 5, 12)
    assert (item["negative"], item["sampler"], item["width"]) == ("bad", "euler_a", 32)


@pytest.mark.parametrize(
    "samplers",
    [
        "er_sde,Restart",
        pytest.param(
            "euler_a,dpmpp_2m_sde,sa_solver_pece,seeds_3,euler_cfg_pp,dpmpp_2s_a_cfg_pp,lcm,"
            "heunpp2,DPM fast,DPM adaptive,unipc,res_multistep_a,plms,ddpm,deis,er_sde",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_pictures_of_every_kind_of_sampler_are_made_again(sample, samplers):
    names = samplers.split(",")
    seeds, steps = ("1,2", 4) if len(names) > 5 else ("1", 20)
    args = ("--negative", "bad", "--guidance", 3, "--seed", seeds, "--size", "16x16", "--exact")
    ran = sample("a {red|blue} fox", *args, "--sampler", samplers, "--steps", steps, "-o", "out/")
    made = sorted(Path("out").iterdir())
    assert ran.code == 0 and len(made) == len(names) * len(seeds.split(","))
    for path in made:
        assert sample("--from-image", path, "-o", "again.png", "--overwrite").code == 0
        assert Path("again.png").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_a_picture_of_a_format_without_text_chunks_is_made_again_from_itself(sample, format):
    """Prompt syntax, eta and the picture that it was started from are no words of A1111's text."""
    sample("a hill", "--seed", 2, "-o", "hill.png")
    args = ("--negative", "bad", "--sampler", "euler_a", "--eta", 0.5, "--guidance", 3)
    args = (*args, "--prompt-syntax", "a1111", "--init", "hill.png", "--strength", 0.7)
    sample("a (red:1.4) fox", *args, "--seed", 11, "--steps", 4, "-o", f"fox.{format}")
    assert sample("--from-image", f"fox.{format}", "-o", f"again.{format}").code == 0
    assert Path(f"again.{format}").read_bytes() == Path(f"fox.{format}").read_bytes()


def test_latents_of_a_masked_picture_decode_to_the_same_picture(sample):
    sample("a hill", "--seed", 2, "-o", "hill.png")
    with Image.open("hill.png") as image:
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, image.width // 2, image.height))
        mask.save("mask.png")
    args = ("--init", "hill.png", "--mask", "mask.png", "--strength", 1)
    sample("a fox", *args, "--seed", 1, "--save-latents", "-o", "fox.png")
    ran = sample("--from-latents", "fox.latents.safetensors", "-o", "again.png")
    assert ran.code == 0 and "warning" not in ran.err
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()
    Path("hill.png").unlink()
    ran = sample("--from-latents", "fox.latents.safetensors", "-o", "alone.png")
    assert ran.code == 0 and "around the mask is not put back" in ran.err


def test_pictures_and_latents_name_files_from_their_folder_and_open_others_if_trusted(sample):
    sample("a hill", "--seed", 2, "-o", "in/hill.png")
    Image.new("L", (16, 16), 128).save("in/mask.png")
    args = ("--init", Path("in/hill.png").absolute(), "--mask", "in/mask.png", "--strength", 1)
    sample("a fox", *args, "--seed", 1, "--save-latents", "-o", "out/fox.png")
    data = Path("out/fox.png").read_bytes()
    for file in ("out/fox.png", "out/fox.latents.safetensors"):
        assert os.getcwd().encode() not in Path(file).read_bytes()
    with Image.open("out/fox.png") as image:
        asked = json.loads(image.info["difftool"])["request"]
    assert (asked["init"], asked["mask"]) == ("../in/hill.png", "../in/mask.png")
    assert all(len(digest) == 12 for digest in asked["hashes"].values())
    for source in (
        ("--from-image", "out/fox.png"),
        ("--from-latents", "out/fox.latents.safetensors"),
    ):
        ran = sample(*source, "-o", "out/again.png")
        assert ran.code == 2 and not Path("out/again.png").exists()
        for part in ("../in/hill.png (--init", "../in/mask.png (--mask", "--trust-image"):
            assert part in ran.err
        ran = sample(*source, "--trust-image", "-o", "out/again.png", "--overwrite")
        assert ran.code == 0 and "warning" not in ran.err
        assert f"opened because {source[1]} names them" in ran.err
        assert Path("out/again.png").read_bytes() == data
        Path("out/again.png").unlink()
    Path("in").rename("out/in")
    Path("out").rename("moved")
    for name in ("hill.png", "mask.png"):
        Path("moved/in", name).rename(Path("moved", name))
    ran = sample("--from-image", "moved/fox.png", "-o", "moved/again.png")
    assert ran.code == 0, "by name and hash"
    with Image.open("moved/again.png") as first, Image.open("moved/fox.png") as second:
        assert first.tobytes() == second.tobytes()
    Image.new("RGB", (16, 16)).save("moved/hill.png")
    ran = sample("--from-image", "moved/fox.png", "-o", "moved/other.png")
    assert ran.code == 0 and "warning" in ran.err and "hill.png is not as it was" in ran.err


def test_what_of_another_tool_s_picture_is_not_taken_over_is_said(sample):
    text = (
        "a (red:1.2) fox\nSteps: 2, Sampler: Euler, Seed: 5, Size: 16x16, Hypertile U-Net: True, "
    )
    text += "Schedule type: Automatic, Denoising strength: 0.4, Version: v1.10.1"
    Path("a.png").write_bytes(encode(Image.new("RGB", (8, 8)), "png", texts(text, None)))
    ran = sample("--from-image", "a.png", "-o", "again.png", "--json")
    (item,) = ran.objects
    assert (item["steps"], item["schedule"]) == (2, "normal")
    assert ran.err.count("not taken over") == 1
    assert item["rng"] == "gpu"  # which A1111 does not write
    assert (
        "Hypertile U-Net: True" in ran.err and "RNG" not in ran.err and "no effect" not in ran.err
    )


def test_a_picture_of_comfyui_is_made_again(sample):
    links = {
        "model": ["4", 0],
        "positive": ["6", 0],
        "negative": ["7", 0],
        "latent_image": ["5", 0],
    }
    settings = {"seed": 7, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
    nodes = {
        "3": ("KSampler", settings | links), "4": ("CheckpointLoaderSimple", {"ckpt_name": "x"}),
        "5": ("EmptyLatentImage", {"width": 32, "height": 16}),
        "6": ("CLIPTextEncode", {"text": "a fox", "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "bad", "clip": ["4", 1]}),
    }  # fmt: skip
    graph = {name: {"class_type": kind, "inputs": given} for name, (kind, given) in nodes.items()}
    data = encode(Image.new("RGB", (8, 8)), "png", {"prompt": json.dumps(graph)})
    Path("a.png").write_bytes(data)
    (item,) = sample("--from-image", "a.png", "-o", "again.png", "--json").objects
    made = ("prompt", "negative", "seed", "width", "height", "guidance", "sampler", "schedule")
    said = ["a fox", "bad", 7, 32, 16, 2.0, "euler", "normal"]
    assert [item[name] for name in made] == said


def test_a_schedule_that_a1111_would_choose(sample):
    lines = [
        '{"prompt": "a", "sampler_name": "DPM++ 2M", "scheduler": "Automatic", "steps": 2}',
        '{"prompt": "b", "sampler_name": "LMS", "scheduler": "Automatic", "steps": 2}',
        '{"prompt": "c", "scheduler": "Automatic", "steps": 2}',
        '{"prompt": "d", "sampler_name": "DPM fast", "scheduler": "Automatic", "steps": 2}',
        '{"prompt": "e", "sampler_name": "DPM adaptive", "steps": 2}',
    ]
    Path("p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ran = sample("--prompts", "p.jsonl", "-o", "out/", "--json")
    assert [item.get("schedule") for item in ran.objects[:2]] == ["karras", "normal"]
    assert "schedule" in ran.objects[2]
    assert [item["sampler"] for item in ran.objects[3:]] == ["dpm_fast", "dpm_adaptive"]


def test_files_that_a_picture_was_made_with_are_missed_before_anything_is_loaded(sample):
    sample("a fox", "--seed", 1, "-o", "fox.png")
    with Image.open("fox.png") as image:
        values = json.loads(image.info["difftool"])
        values["request"]["loras"] = [["none.safetensors", 0.5]]
        Path("fox.png").write_bytes(encode(image, "png", texts(None, values)))
    ran = sample("--from-image", "fox.png", "-o", "again.png")
    assert ran.code == 2 and "there is no LoRA none.safetensors" in ran.err
    assert "loading" not in ran.err


PLUGIN = """
from difftool.diffusion.grids import GRIDS, Grid

GRIDS.add("mine", Grid("mine", "index", lambda T, n: [T - 1 - 2 * i for i in range(n)], "mine"))
"""


@pytest.mark.usefixtures("forget")
def test_a_picture_of_a_plugin_names_it_and_never_loads_it(sample):
    Path("own.py").write_text(PLUGIN, encoding="utf-8")
    made = ("--plugin", "own.py", "--schedule", "mine", "--seed", 3)
    assert sample("a fox", *made, "-o", "fox.png").code == 0
    again = ("--from-image", "fox.png", "-o", "again.png", "--overwrite")
    plugins.unload(plugins.loaded()[-1])
    ran = sample(*again)
    assert ran.code == 2 and 'there is no schedule "mine"' in ran.err
    assert "made with the plugin own.py" in ran.err and "--plugin" in ran.err
    assert sample(*again, "--schedule", "karras").code == 0
    ran = sample(*again, "--plugin", "own.py")
    assert ran.code == 0 and "not as it was" not in ran.err
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()
    plugins.unload(plugins.loaded()[-1])
    Path("own.py").write_text(PLUGIN + "# another\n", encoding="utf-8")
    ran = sample(*again, "--plugin", "own.py")
    assert ran.code == 0 and "warning: the plugin own.py is not as it was" in ran.err


def test_the_command_line_wins_over_the_preset_and_says_so(sample):
    overrides = ("sample.clip=static", "sample.sampler_options.s_noise=0.5")
    flags = ("--steps", 9, "--eta", 0.5, "--sampler", "Euler a")
    flags += tuple(part for text in overrides for part in ("--set", text))
    ran = sample("a fox", *flags, "--print-config", "--json")
    (item,) = ran.objects
    config = item["config"]
    assert config["sample.steps"] == {"value": 9, "origin": "--steps"}
    assert config["sample.clip"] == {"value": "static", "origin": "--set sample.clip"}
    assert config["sample.sampler"] == {"value": "euler_a", "origin": "--sampler"}
    assert config["sample.schedule"] == {"value": "linspace", "origin": "model text"}
    assert config["sample.sampler_options.eta"] == {"value": 0.5, "origin": "--eta"}
    assert config["sample.sampler_options.s_noise"]["value"] == 0.5
    assert os.listdir() == []
    assert "# --steps" in sample("a fox", *flags, "--print-config").out


def test_no_metadata_and_quiet(sample):
    ran = sample("a fox", "--seed", 1, "--no-metadata", "--quiet", "-o", "fox.png")
    assert ran == Ran(0, "fox.png\n", "")
    with Image.open("fox.png") as image:
        assert image.info == {}


def test_long_prompts_are_cut_with_a_warning_where_they_are_read_as_they_stand(sample):
    ran = sample("x " * 50, "--seed", 1)
    assert ran.code == 0 and "warning" not in ran.err
    ran = sample("x " * 50, "--seed", 1, "--prompt-syntax", "none")
    assert ran.code == 0 and "warning: the prompt" in ran.err and "are cut" in ran.err


def test_help_lists_choices_and_examples(sample):
    ran = sample("--help")
    text = " ".join(ran.out.replace("│", " ").split())
    for part in (*SAMPLERS, *GRIDS, "[seed]", "difftool sample --from-image castle.png"):
        assert part in text, part


def test_tokens_show_how_a_prompt_is_read_and_make_no_picture(sample):
    ran = sample("a (red:1.3) fox", "--tokens", "-o", "fox.png")
    assert ran.code == 0 and "red*1.3" in ran.out and not Path("fox.png").exists()
    (item,) = sample("a fox AND [a|b]:0.5", "--tokens", "--steps", 2, "--json").objects
    told = [(part["share"], part["evaluations"], part["text"]) for part in item["read"][:3]]
    assert told == [(1.0, [1, 2], "a fox "), (0.5, [1, 2], " a"), (1.0, [1, 2], "")]
