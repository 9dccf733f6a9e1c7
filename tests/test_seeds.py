"""Whose random numbers a picture is made of, and other tools' pictures made again by their rules,
which are written anew here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from difftool.diffusion import GRIDS
from difftool.diffusion.noise import STEP_NOISE, BrownianNoise, ImageNoise, slerp, step_noise
from difftool.diffusion.path import Level, build_path
from difftool.diffusion.philox import CudaGenerator, philox
from difftool.images.fit import to_pixels
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.matches import MATCHES
from difftool.pipeline.model import Model
from difftool.pipeline.settings import STRENGTH_RULES, plan_sampling, resolve_settings
from difftool.sampling.metadata.a1111 import from_parameters
from difftool.sampling.metadata.files import read
from difftool.sampling.metadata.others import from_invoke
from difftool.sampling.requests import Request

SHAPE = (3, 8, 8)
PUBLISHED = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]
"""Of seed 0, by A1111; and by torch.randn(3, 4, device="cuda")."""


def philox_word(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper has it, in whole numbers of Python."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def cuda_normal(seed: int, draw: int, count: int) -> list[float]:
    """Number by number: cuRAND's Box-Muller of the words of counter (draw, 0, i, 0)."""
    numbers = []
    for place in range(count):
        x, y, _, _ = philox_word([draw, 0, place, 0], [seed % 2**32, (seed >> 32) % 2**32])
        u, v = (x + 0.5) * 2.0**-32, (y + 0.5) * 2.0**-32
        numbers.append(math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v))
    return numbers


# --- the generator ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_known_answers_of_random123(counter, key, answer):
    words, keys = ([int(word, 16) for word in text.split()] for text in (counter, key))
    found = philox(tuple(torch.tensor([word]) for word in words), (keys[0], keys[1]))
    assert " ".join(f"{int(word):08x}" for word in found) == answer
    assert " ".join(f"{word:08x}" for word in philox_word(words, keys)) == answer


def test_the_published_numbers_of_a_gpu():
    found = CudaGenerator(0).normal((3, 4))
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(np.array(PUBLISHED), abs=5e-7)


@pytest.mark.parametrize("seed", [7, 2**32 + 5, 2**63 + 1, 2**64 - 1])
def test_draws_follow_one_another_as_on_a_gpu(seed):
    generator = CudaGenerator(seed)
    for draw in range(3):
        found = generator.normal((4, 5))
        assert found.flatten().numpy() == pytest.approx(cuda_normal(seed, draw, 20), abs=1e-6)


def test_its_numbers_are_normal():
    """Standard errors at n = 2^16 are 0.004 (mean), 0.003 (std), 0.04 (kurtosis)."""
    drawn = CudaGenerator(3).normal((4, 128, 128)).double()
    assert abs(drawn.mean()) < 0.015 and abs(drawn.std() - 1) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.13


def test_images_have_the_noise_of_a_gpu_alone_and_together():
    together = ImageNoise([1, 2], SHAPE, rng="gpu")
    generator = CudaGenerator(2)
    for _ in range(3):
        assert together.draw()[1].equal(generator.normal(SHAPE))


def test_brownian_paths_are_torchsde_s_with_the_numbers_of_a_gpu(monkeypatch):
    """k-diffusion's on a GPU, and A1111's, which gives torchsde its own numbers."""
    sde = pytest.importorskip("torchsde")
    normal = lambda size, dtype, device, seed: CudaGenerator(int(seed)).normal(size)  # noqa: E731
    monkeypatch.setattr("torchsde._brownian.brownian_interval._randn", normal)
    rhos = [14.0, 6.0, 2.0, 0.5]
    tree = sde.BrownianTree(0.5, torch.zeros(2, 3), 14.0, entropy=5)
    ours = BrownianNoise([5], (2, 3), [Level(rho, 1.0, rho) for rho in rhos], rng="gpu")
    for here, there in pairwise(rhos):
        expected = tree(there, here) / math.sqrt(here - there)
        found = ours(Level(here, 1.0, here), Level(there, 1.0, there))
        assert (found[0] + expected).abs().max() < 1e-5  # from here to there it is the way back


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("comfyui", lambda seed: torch.Generator().manual_seed(seed + 1)),
        ("invokeai", lambda seed: torch.Generator().manual_seed(seed ^ 0xFFFFFFFF)),
        ("comfyui-gpu", CudaGenerator),
        ("invokeai-gpu", lambda seed: CudaGenerator(seed ^ 0xFFFFFFFF)),
    ],
)
@pytest.mark.parametrize("rng", ["cpu", "gpu"])
def test_what_the_steps_of_tools_draw(kind, expected, rng):
    start = ImageNoise([5, 77], SHAPE, rng=rng)
    start.draw()
    steps = step_noise(start, [5, 77], kind, rng=rng)
    generators = [expected(seed) for seed in (5, 77)]
    for _ in range(2):
        for found, generator in zip(steps.draw(), generators, strict=True):
            cuda = isinstance(generator, CudaGenerator)
            draw = generator.normal(SHAPE) if cuda else torch.randn(SHAPE, generator=generator)
            assert found.equal(draw)


def test_steps_go_on_or_begin_anew_by_a_delta():
    start = ImageNoise([5], SHAPE, rng="gpu")
    assert step_noise(start, [5], rng="gpu") is start
    anew = step_noise(start, [5], delta=31337, rng="gpu")
    assert anew.draw()[0].equal(CudaGenerator(5 + 31337).normal(SHAPE))


# --- variation seeds -------------------------------------------------------------------------


def a1111_slerp(val: float, low: Tensor, high: Tensor) -> Tensor:
    """Of one picture's noise [C,H,W]: the angle of each column, by its norm along H."""
    dot = (low / low.norm(dim=1, keepdim=True) * high / high.norm(dim=1, keepdim=True)).sum(1)
    omega = torch.acos(dot)
    from_low, from_high = (torch.sin(part * omega) / omega.sin() for part in (1 - val, val))
    return from_low.unsqueeze(1) * low + from_high.unsqueeze(1) * high


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_noise_is_turned_as_a1111_turns_it(share):
    one, other = (ImageNoise(seeds, SHAPE).draw() for seeds in ([1, 2], [8, 9]))
    found = slerp(one, other, share)
    for k in range(2):
        assert (found[k] - a1111_slerp(share, one[k], other[k])).abs().max() < 1e-5
    assert (found.std() - 1).abs() < 0.1
    assert (slerp(one, one, share) - one).abs().max() < 1e-6  # where no angle is left


def test_a_variation_has_the_seed_of_all_and_a_seed_of_its_own():
    request = Request(seeds=(7,), num=3, vary_seed=9, settings={"vary": 0.2})
    assert list(request.images()) == [7, 7, 7]
    assert list(request.variations(3)) == [9, 10, 11]
    plain = Request(seeds=(7,), num=3)
    assert list(plain.images()) == [7, 8, 9] and list(plain.variations(3)) == [None] * 3
    drawn = Request(seeds=(7,), settings={"vary": 0.2}).variations(2)
    assert drawn[0] is not None and drawn[1] == drawn[0] + 1


# --- tools' pictures -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model(tiny.preset(3, sample={"size": [8, 8], "steps": 5}))


def euler_ancestral(model: Model, start: Callable[[float], Tensor], drawn: Callable[[], Tensor],
                    steps: int) -> Tensor:  # fmt: skip
    """k-diffusion's sample_euler_ancestral on its "normal" sigmas, as A1111 and ComfyUI run it."""
    path = build_path({"kind": "sd15"})
    rho = torch.tensor([path.at_index(i).rho for i in range(1000)], dtype=torch.float64)
    times = torch.linspace(999, 0, steps, dtype=torch.float64)
    low, high = times.floor().long(), times.ceil().long()
    logs = rho.log()
    sigmas = [*((1 - times.frac()) * logs[low] + times.frac() * logs[high]).exp().tolist(), 0.0]
    x = start(sigmas[0])
    for t, sigma, after in zip(times.tolist(), sigmas, sigmas[1:], strict=False):
        scaled = (x / math.sqrt(sigma**2 + 1)).float()
        eps = model.network(scaled[None], torch.tensor([t]))[0].double()
        up = min(after, math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        down = math.sqrt(after**2 - up**2)
        x = x + eps * (down - sigma)
        x = x + drawn() * up if after else x
    return x


@pytest.mark.parametrize("tool", ["a1111", "comfyui"])
@torch.no_grad()
def test_a_picture_of_the_tool_is_made_again(model, tool):
    seed = 123456789
    settings = resolve_settings(model, {"sampler": "euler_a", "guidance": 1.0}, tool)
    *_, last = generate(plan_sampling(model, settings), [SampleInput(seed=seed)])
    if tool == "a1111":  # the same generator, of the GPU
        first = CudaGenerator(seed)
        start = lambda sigma: first.normal(SHAPE).double() * sigma  # noqa: E731
        drawn = lambda: first.normal(SHAPE).double()  # noqa: E731
    else:  # another generator of the CPU
        first, second = (torch.Generator().manual_seed(seed + k) for k in (0, 1))
        start = lambda s: torch.randn(SHAPE, generator=first).double() * math.sqrt(1 + s * s)  # noqa: E731
        drawn = lambda: torch.randn(SHAPE, generator=second).double()  # noqa: E731
    expected = euler_ancestral(model, start, drawn, settings.steps)
    assert (last.x[0] - expected).abs().max() < 1e-4
    with pytest.raises(AssertionError):  # by another tool's rules it is another picture
        other = resolve_settings(model, {"sampler": "euler_a", "guidance": 1.0}, "invokeai")
        *_, last = generate(plan_sampling(model, other), [SampleInput(seed=seed)])
        assert (last.x[0] - expected).abs().max() < 1e-2


def test_the_grid_of_dpm2_lacks_the_last_sigma_but_one(model):
    path = model.denoiser.path
    whole = GRIDS["karras"](path, 6)
    settings = resolve_settings(model, {"sampler": "dpm2", "steps": 5}, "a1111")
    assert list(plan_sampling(model, settings).levels) == [*whole[:5], whole[6]]
    settings = resolve_settings(model, {"sampler": "unipc", "steps": 5}, "a1111")
    assert len(plan_sampling(model, settings).levels) == 6 and not settings.schedule_options


def test_every_row_sets_fields_that_can_be_set(model):
    for name, row in MATCHES.items():
        for gpu in (False, True):
            assert row.of(gpu)["step_noise"] in STEP_NOISE
        settings = resolve_settings(model, {"rng": "cpu"}, name)
        assert settings.rng == "cpu" and settings.rounding == row.settings["rounding"]
    line = MATCHES["a1111"].listed({"rng": "cpu", "rounding": "down"}, gpu=True)
    assert "rounding down" in line and line.endswith("; as asked for: rng cpu")
    assert "step noise comfyui-gpu" in MATCHES["comfyui"].listed({}, gpu=True)


@pytest.mark.parametrize(
    ("rule", "strength", "whole", "run"),
    [
        ("diffusers", 0.75, 20, 15),
        ("a1111", 0.75, 20, 16),
        ("a1111", 1.0, 20, 20),
        ("comfyui", 0.75, 26, 20),
        ("comfyui", 1.0, 20, 20),
        ("invokeai", 0.75, 20, 15),
    ],
)
def test_how_many_steps_a_strength_is(model, rule, strength, whole, run):
    assert rule in STRENGTH_RULES
    asked = {"steps": 20, "strength": strength, "strength_rule": rule, "schedule": "normal"}
    settings = resolve_settings(model, asked)
    levels = plan_sampling(model, settings, from_picture=True).levels
    assert list(levels) == GRIDS["normal"](model.denoiser.path, whole)[-run - 1 :]


def test_a_strength_of_invokeai_s_on_a_path_without_a_table():
    flow = tiny.model(tiny.preset(3, path={"kind": "flow"}, target="flow", sample={"size": [8, 8]}))
    asked = {"steps": 10, "strength": 0.5, "strength_rule": "invokeai", "schedule": "trailing"}
    plan = plan_sampling(flow, resolve_settings(flow, asked), from_picture=True)
    assert plan.steps == sum(1 - i / 10 < 0.5 for i in range(10)) == 4


def test_shades_are_cut_off_as_a1111_does():
    images = torch.linspace(-1.2, 1.2, 997).reshape(1, 1, -1)
    shades = 255 * np.clip((images.numpy() + 1) / 2, 0, 1)
    assert (to_pixels(images, "down").numpy() == shades.astype(np.uint8)).all()
    assert (to_pixels(images).numpy() == shades.round().astype(np.uint8)).mean() > 0.99


# --- the command, and what pictures say -------------------------------------------------------


def test_one_word_sets_it_and_a_picture_says_it(model, tmp_path, monkeypatch, difftool):
    monkeypatch.chdir(tmp_path)
    model.save(Path("m.safetensors"))
    common = ("sample", "-m", "m.safetensors", "--device", "cpu", "--sampler", "euler_a")
    more = ("--ensd", "31337", "--eta", "0.5", "-n", "2", "-o", "out/", "--json")
    ran = difftool(*common, "--match", "a1111", "--vary", "0.3", "--vary-seed", "9", "--seed", "5",
                   *more)  # fmt: skip
    assert ran.code == 0, ran.err
    assert "as in a1111: rng gpu, step noise continued" in ran.err.replace("\n", " ")
    one, two = ran.objects
    assert (one["seed"], one["vary_seed"], one["rng"]) == (5, 9, "gpu")
    assert (two["seed"], two["vary_seed"], two["vary"]) == (5, 10, 0.3)
    with Image.open(two["path"]) as picture:
        text = picture.text["parameters"]  # type: ignore[attr-defined]
    for words in ("RNG: NV", "Variation seed: 10", "Variation seed strength: 0.3", "ENSD: 31337",
                  "Eta: 0.5"):  # fmt: skip
        assert words in text
    taken = from_parameters(text, "test")
    assert (
        taken.vary_seed == 10 and taken.settings["vary"] == 0.3 and taken.settings["rng"] == "gpu"
    )
    assert read(Path(two["path"])).vary_seed == 10
    again = difftool("sample", "-m", "m.safetensors", "--device", "cpu", "--from-image",
                     two["path"], "-o", "again.png")  # fmt: skip
    assert again.code == 0 and "no effect" not in again.err
    pixels = [Image.open(p).tobytes() for p in (one["path"], two["path"], "again.png")]
    assert pixels[1] == pixels[2] != pixels[0]
    Path("two.jsonl").write_text(ran.out.splitlines()[1] + "\n", encoding="utf-8")
    ran = difftool("sample", "-m", "m.safetensors", "--device", "cpu", "--prompts", "two.jsonl",
                   "-o", "line/")  # fmt: skip
    assert ran.code == 0 and Image.open(next(Path("line").iterdir())).tobytes() == pixels[1]


def test_a_flag_stands_over_the_tool_s_own(model, tmp_path, monkeypatch, difftool):
    monkeypatch.chdir(tmp_path)
    model.save(Path("m.safetensors"))
    ran = difftool("sample", "-m", "m.safetensors", "--device", "cpu", "--match", "A1111",
                   "--rng", "cpu", "--schedule", "simple", "--seed", "5", "--json")  # fmt: skip
    assert ran.code == 0 and "as asked for: rng cpu, schedule simple" in " ".join(ran.err.split())
    assert ran.objects[0]["schedule"] == "simple" and "rng" not in ran.objects[0]
    ran = difftool("sample", "-m", "m.safetensors", "--match", "midjourney")
    assert ran.code == 2 and "midjourney" in ran.err
    ran = difftool("sample", "-m", "m.safetensors", "--device", "cpu", "--vary-seed", "3", "--seed",
                   "5", "-o", "x.png")  # fmt: skip
    assert ran.code == 2 and "add --vary" in ran.err


@pytest.mark.parametrize(("device", "rng"), [("cpu", None), ("cuda", "gpu"), ("mps", None)])
def test_where_invokeai_drew_its_noise_is_read(device, rng):
    said = {"positive_prompt": "a fox", "seed": 5, "steps": 9, "rand_device": device}
    request = from_invoke(json.dumps(said), "test")
    assert request.settings.get("rng") == rng
    assert bool(request.missed) == (device == "mps")


def test_a1111_s_words_are_read():
    said = "a\nSteps: 9, Sampler: Euler a, Seed: 5, Variation seed: 8, ENSD: 31337, Eta: 0.7, "
    said += "Variation seed strength: 0.25, {} Version: v1.10.1"
    request = from_parameters(said.format("RNG: CPU,"), "test")
    assert request.settings["rng"] == "cpu" and request.settings["ensd"] == 31337
    assert request.settings["vary"] == 0.25 and request.vary_seed == 8 and request.missed == ()
    assert from_parameters(said.format(""), "test").settings["rng"] == "gpu"
