"""difftool as a library: a notebook's session, and that it makes what the commands make."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import lay, pictures
from PIL import Image, ImageDraw

import difftool
from difftool.pipeline import settings


@pytest.fixture(scope="module")
def model() -> difftool.Pipeline:
    return difftool.load("emoji", device="cpu")


@pytest.fixture
def command(difftool):
    """Run a command, in an empty folder."""
    return difftool


def disc(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A yellow disc on white."""
    made = Image.new("RGB", size, "white")
    ImageDraw.Draw(made).ellipse((6, 6, size[0] - 7, size[1] - 7), fill=(255, 204, 50))
    return made


def test_public_names_are_there_and_no_others():
    for name in difftool.__all__:
        assert getattr(difftool, name) is getattr(difftool, name)
        assert name in dir(difftool)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        difftool.laod  # noqa: B018  # type: ignore[attr-defined]
    assert "dpmpp_2m" in difftool.SAMPLERS and "cosine" in difftool.PATHS


def test_a_picture_is_the_command_s(model, command):
    prompts = ["a smiling fox", "a red heart"]
    made = model.sample(prompts, seed=[7, 3], steps=3, guidance=2.0)
    ran = command(
        "sample", *prompts, "--seed", "7,3", "--steps", "3", "--guidance", "2", "-o", "a/"
    )
    assert ran.code == 0 and len(made) == 4
    for picture, line in zip(made, ran.out.splitlines(), strict=True):
        with Image.open(line) as file:
            file.load()
            assert picture.tobytes() == file.tobytes() and picture.info == file.info
    assert {"parameters", "difftool"} == made[0].info.keys()
    assert len({each.tobytes() for each in made}) == 4


def test_what_is_asked_for_is_resolved_once(model):
    grid, built = difftool.GRIDS["linspace"], []

    def counted(*given, **options):
        built.append(given[1])
        return grid.function(*given, **options)

    difftool.GRIDS.add("counted", replace(grid, name="counted", function=counted, aliases=()))
    try:
        made = model.sample(["a fox", "a heart"], seed=[1, 2], steps=1, schedule="counted")
    finally:
        difftool.GRIDS.remove("counted")
    assert len(made) == 4 and built == [1]


def test_every_step_shows_the_clean_picture_of_the_moment(model):
    steps = list(model.steps("a smiling fox", seed=7, steps=4))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert {step.total for step in steps} == {4}
    assert all(step.x0.shape == (1, 8, 8, 8) for step in steps)
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0
    (picture,) = model.sample("a smiling fox", seed=7, steps=4)
    assert model.decode(steps[-1].x).tobytes() == picture.tobytes()
    errors = [(step.x0 - steps[-1].x).abs().mean() for step in steps]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01
    with pytest.raises(difftool.UsageError, match="one picture"):
        model.steps(["a fox", "a heart"])


def test_pictures_to_start_from_are_files_or_pictures(model, tmp_path):
    path = tmp_path / "p.png"
    disc().save(path)
    asked: dict[str, Any] = {"seed": 7, "steps": 4, "strength": 0.5}
    (made,) = model.sample("a smiling fox", init=path, **asked)
    (again,) = model.sample("a smiling fox", init=disc(), **asked)
    assert made.tobytes() == again.tobytes()
    assert len(list(model.steps("a smiling fox", init=disc(), **asked))) == 2
    (other,) = model.sample("a smiling fox", init=Image.new("RGB", (64, 64)), **asked)
    assert other.tobytes() != made.tobytes()


def test_pictures_can_be_written_too_and_made_again(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = model.sample("a red heart", num=2, seed=1, steps=2, output="out/[seed].png", grid=True)
    assert sorted(p.name for p in Path("out").iterdir()) == ["1.png", "2.png", "grid.png"]
    (again,) = model.sample(from_image="out/2.png")
    assert again.tobytes() == made[1].tobytes()
    Path("prompts.txt").write_text("a red heart --d 2 --s 2\n", encoding="utf-8")
    (third,) = model.sample(prompts="prompts.txt")
    assert third.tobytes() == made[1].tobytes()


def test_a_picture_that_names_files_elsewhere_needs_trust(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disc().save("p.png")
    asked: dict[str, Any] = {"init": "p.png", "seed": 1, "steps": 2, "output": "out/a.png"}
    (made,) = model.sample("a red heart", **asked)
    with pytest.raises(difftool.UsageError, match="--trust-image"):
        model.sample(from_image="out/a.png")
    (again,) = model.sample(from_image="out/a.png", trust_image=True)
    assert again.tobytes() == made.tobytes()
    (other,) = model.sample(from_image="out/a.png", init=disc())
    assert other.tobytes() == made.tobytes()
    Path("p.png").rename("out/p.png")
    (again,) = model.sample(from_image="out/a.png")
    assert again.tobytes() == made.tobytes()


OWN = """
from dataclasses import dataclass
from itertools import pairwise

from difftool.diffusion.samplers import SAMPLERS, Method
from difftool.diffusion.solvers import Sampler, Step, transition


@dataclass(frozen=True, kw_only=True)
class Plain(Sampler):
    def __call__(self, denoise, x, levels, noise):
        for i, (here, there) in enumerate(pairwise(levels)):
            x0, eps = denoise(x, here)
            x = transition(x0, eps, there)
            yield Step(i, there, x, x0)


SAMPLERS.add("plain", Method("plain", "DDIM, written out", Plain, {}, {}))
"""


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 10**5000},
        {"label": [10**5000]},
        {"sampler": True},
        {"schedule": {"karras": 1}},
        {"schedule": [["karras"], "linear"]},
        {"init": 1},
        {"mask": [1, 2]},
        {"size": {}},
    ],
)
def test_values_of_another_type_are_refused(model, given):
    with pytest.raises(difftool.UsageError):
        model.sample("a fox", steps=1, **given)


def test_names_of_files_that_are_too_long_are_refused_in_words(model):
    name = "x" * 300
    for call in (
        lambda: difftool.load(name),
        lambda: difftool.convert(name, "out", to="ldm"),
        lambda: difftool.convert("model", "out", to="ldm", lora=name),
        lambda: difftool.noise(name),
        lambda: difftool.train(name),
        lambda: difftool.inspect(name),
        lambda: model.sample(init=name),
    ):
        with pytest.raises(difftool.DifftoolError, match="x"):
            call()


def test_a_picture_that_no_memory_holds_is_refused_before_it_is_begun(command, monkeypatch):
    monkeypatch.setattr(settings, "free_memory", lambda device: 8 << 30)
    ran = command("sample", "a fox", "--size", "16384x16384", "--steps", "1", "--seed", "1")
    assert ran.code == 5 and "no memory for a picture of 16384x16384" in ran.err
    assert "smaller --size" in ran.err


@pytest.mark.usefixtures("forget")
def test_a_sampler_of_one_s_own_makes_pictures_that_are_made_again(model, tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    with pytest.raises(difftool.UsageError, match='no sampler "plain"'):
        model.sample("a fox", sampler="plain")
    difftool.load_plugins([tmp_path / "own.py"])
    assert "plain" in difftool.SAMPLERS
    asked: dict[str, Any] = {"seed": 5, "steps": 3}
    (made,) = model.sample("a fox", sampler="plain", output=tmp_path / "fox.png", **asked)
    assert "own.py" in made.info["difftool"]
    (again,) = model.sample(from_image=tmp_path / "fox.png")
    assert again.tobytes() == made.tobytes()
    (same,) = model.sample("a fox", sampler="ddim", **asked)
    assert same.tobytes() == made.tobytes()


def test_what_is_not_done_to_the_letter_is_a_warning(model):
    asked: dict[str, Any] = {"negative": "a dog", "guidance": 1.0, "seed": 1, "steps": 1}
    for made in (model.sample, model.steps):
        with pytest.warns(UserWarning, match="negative") as told:
            made("a fox", **asked)
        assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "--steps 0 is not"),
        ({"stepz": 3}, 'did you mean "steps"'),
        ({"sampler": "eulr"}, 'did you mean "euler"'),
        ({"seed": "x"}, "not a list of seeds"),
        ({"set": {"sample.clip": "hard"}}, "clip is not valid"),
        ({"set": {"train.lr": 1}}, "only sample.KEY"),
        ({"init": "none.png"}, "no picture none.png"),
        ({"size": (63, 64)}, "try 64x64"),
        ({"vae": "x"}, "give it to difftool.load"),
        ({"label": "cat"}, "no class"),
    ],
)
def test_wrong_keywords_are_the_errors_of_wrong_flags(model, options, says):
    with pytest.raises(difftool.UsageError) as refused:
        model.sample("a fox", **options)
    assert says in str(refused.value) and refused.value.code == 2


def test_what_is_about_pictures_is_not_given_to_load():
    with pytest.raises(difftool.UsageError, match="about pictures"):
        difftool.load("emoji", steps=3)
    with pytest.raises(difftool.UsageError, match='there is no option "devise"'):
        difftool.load("emoji", devise="cpu")


def test_pictures_go_through_the_model_s_space(model, tmp_path):
    z = model.encode(disc())
    assert z.shape == (1, 8, 8, 8)
    again = model.decode(z)
    assert again.size == (64, 64) and model.decode(z[0]).tobytes() == again.tobytes()
    error = np.asarray(again, float) - np.asarray(disc(), float)
    assert np.abs(error).mean() < 12
    path = tmp_path / "p.png"
    disc().save(path)
    assert model.encode(path).equal(z) and model.encode(str(path)).equal(z)
    assert model.encode(disc((71, 66))).equal(model.encode(disc((71, 66)), size=(64, 64)))


def test_pictures_of_every_kind_are_read_as_from_a_file(model, tmp_path):
    clear = disc().convert("RGBA")
    clear.putalpha(128)
    clear.save(tmp_path / "clear.png")
    assert model.encode(clear).equal(model.encode(tmp_path / "clear.png"))
    assert not model.encode(clear).equal(model.encode(disc()))


def test_what_cannot_be_is_an_error_with_its_parts(model):
    with pytest.raises(difftool.UsageError) as refused:
        model.encode(disc(), size=(63, 64))
    error = refused.value
    assert isinstance(error, difftool.DifftoolError) and error.code == 2
    assert error.what == "size 63x64 does not fit this model"
    assert error.why == "sides must be multiples of 8" and error.hint == "try 64x64"
    with pytest.raises(difftool.UsageError, match=r"one picture's"):
        model.decode(model.encode(disc()).repeat(2, 1, 1, 1))
    with pytest.raises(difftool.UsageError, match="no model"):
        difftool.load("no/such/model")


def test_noise_is_what_the_command_shows(command, tmp_path):
    noised = difftool.noise(disc((160, 90)), path="cosine", set={"steps": 500}, steps=4, seed=3)
    assert [picture.size for picture in noised] == [(160, 90)] * 4
    disc((160, 90)).save(tmp_path / "p.png")
    flags = ("--path", "cosine", "--set", "steps=500", "--steps", 4, "--seed", 3, "--json")
    ran = command("noise", tmp_path / "p.png", *flags)
    assert [{"index": i} | p.info for i, p in enumerate(noised)] == ran.object["levels"]
    with Image.open(ran.object["path"]) as strip:
        page = strip.tobytes()
    for picture in noised:
        assert np.asarray(picture)[45].tobytes() in page
    (again,) = difftool.noise(tmp_path / "p.png", path="flow", steps=1)
    assert again.tobytes() == disc((160, 90)).tobytes()


def test_noise_where_a_model_works_and_the_way_back():
    asked: dict[str, Any] = {"model": "emoji", "steps": 3, "device": "cpu"}
    noised = difftool.noise(disc(), latent=True, **asked)
    seen = difftool.noise(disc(), reverse=True, prompt="a yellow disc", **asked)
    assert noised[0].info["sigma"] == 0 and seen[0].tobytes() == noised[0].tobytes()
    assert seen[1].info["rmse"] > 0 and seen[1].tobytes() != noised[1].tobytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": "cosin"}, 'did you mean "cosine"'),
        ({"steps": 2000}, "it has 1000"),
        ({"prompt": "a fox"}, "--reverse"),
        ({"model": "emoji", "path": "flow"}, "exclude each other"),
        ({"curve": True}, 'no option "curve"'),
    ],
)
def test_wrong_keywords_of_noise_are_the_errors_of_wrong_flags(options, says):
    with pytest.raises(difftool.UsageError) as refused:
        difftool.noise(disc(), **options)
    assert says in str(refused.value)


def test_a_model_is_described_from_its_headers():
    found = difftool.inspect("emoji")
    assert found["prediction"] == "flow" and set(found["components"]) == {"unet", "vae", "text.0"}


def examples(path: Path) -> list[str]:
    """The indented blocks of a module's docstrings, in their order."""
    texts = re.findall(r'"""[\s\S]*?"""', path.read_text(encoding="utf-8"))
    cleaned = [inspect.cleandoc(text.strip('"')) for text in texts]
    found = [b for text in cleaned for b in re.findall(r"(?:^ {4}.*\n?|^\n)+", text, re.MULTILINE)]
    return [textwrap.dedent(block).strip() for block in found if block.strip()]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> dict[str, Any]:
    """What a notebook's session of all examples of the docstrings leaves: names, what was printed
    (`said`), and `folder`, where it was."""
    folder, said = tmp_path_factory.mktemp("session"), io.StringIO()
    lay(folder / "photos", pictures(*(f"{i}.png" for i in range(5))))
    package = Path(difftool.__file__).parent
    blocks = [*examples(package / "__init__.py"), *examples(package / "library.py")]
    names: dict[str, Any] = {"difftool": difftool, "folder": folder, "said": said}
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        for block in blocks:
            exec(compile(block, "<example>", "exec"), names)
    return names


def test_every_example_of_the_docstrings_runs(session):
    assert (session["folder"] / "fox.png").is_file()
    assert session["said"].getvalue().count("\n") == 4
    assert session["z"].shape == (1, 8, 8, 8) and session["again"].size == (64, 64)
    assert len(session["noised"]) == 8 and session["ledger"].verified.startswith("identical")


def test_training_is_one_call(session, monkeypatch):
    monkeypatch.chdir(session["folder"])
    run = session["run"]
    assert [line["step"] for line in run.metrics.training] == [3]
    assert (run.preset.name, run.preset.train.lr) == ("pixel-small", 1e-4)
    made = difftool.load(run.path, device="cpu").sample(seed=1, steps=1)
    assert made[0].size == (16, 16)
    with pytest.raises(difftool.UsageError, match="not empty"):
        difftool.train("photos", out="runs/p")
    with pytest.raises(difftool.UsageError, match='did you mean "steps"'):
        difftool.train("photos", stepz=3)


def test_a_conversion_is_its_ledger(tmp_path):
    ledger = difftool.convert("shapes", tmp_path / "m", to="diffusers")
    assert ledger.kinds == ("difftool", "diffusers") and ledger.verified.startswith("identical")
    assert sum(ledger.counts().values()) == len(ledger.entries) > 100
    assert difftool.inspect(tmp_path / "m")["format"] == "diffusers"
    with pytest.raises(difftool.UsageError, match="there already"):
        difftool.convert("shapes", tmp_path / "m", to="diffusers")
    with pytest.raises(difftool.UsageError, match="--to"):
        difftool.convert("shapes", tmp_path / "m", to="onnx")
    with pytest.raises(difftool.UsageError, match="option"):
        difftool.convert("shapes", tmp_path / "m", too="ldm")
