"""Pictures that are there already are known by what decides them, whatever they are called."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import Ran
from PIL import Image

from difftool.sampling.files.inventory import INDEX
from difftool.text.tokenizer import Tokenizer

SAMPLE = {"size": [16, 16], "steps": 2, "sampler": "euler", "schedule": "linspace", "guidance": 2.0}
Sample = Callable[..., Ran]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two text-to-image models that differ in their weights alone."""
    tokenizer = Tokenizer.learn(["a red fox", "a blue dog on a green hill"] * 9, 300)
    text = {"width": 32, "layers": 1, "heads": 2, "mlp": 64, "length": 8, "tokenizer": "learned"}
    preset = tiny.preset(
        12, name="text", codec=tiny.BLOCKS, sample=SAMPLE, path={"kind": "flow"}, target="flow",
        unet={"attention": "transformer", "depth": [0, 1], "context_dim": 32},
        text=[text | {"vocab_size": tokenizer.vocab_size}],
    )  # fmt: skip
    files = []
    for seed in (1, 2):
        files.append(tmp_path_factory.mktemp("models") / "text.safetensors")
        tiny.model(preset, seed=seed, tokenizer_json=tokenizer.to_json()).save(files[-1])
    return files


@pytest.fixture
def sample(models, difftool) -> Sample:
    """Run `difftool sample --skip-existing --json` in an empty folder."""

    def run(*args: object, model: int = 0) -> Ran:
        more = ("--device", "cpu", "--skip-existing", "--json")
        ran = difftool("sample", "-m", models[model], *args, *more)
        assert ran.code == 0, ran.err + ran.out
        return ran

    return run


def made(ran: Ran) -> list[str]:
    """The paths of what was made, and not there already."""
    return [each["path"] for each in ran.objects if not each.get("existing")]


def pictures() -> set[str]:
    return {str(path) for path in Path().rglob("*.png")}


@pytest.mark.parametrize("metadata", [True, False])
def test_a_folder_of_numbered_pictures_is_known(sample, metadata):
    args = (
        "a fox",
        "a dog",
        "-n",
        2,
        "--seed",
        5,
        "-o",
        "out/",
        *["--no-metadata"] * (not metadata),
    )
    first = sample(*args)
    assert len(made(first)) == 4 and "loading" in first.err
    again = sample(*args)
    assert made(again) == [] and "loading" not in again.err
    known = [{**each, "seconds": 0.0, "existing": True} for each in first.objects]
    assert again.objects == known
    Path(first.objects[2]["path"]).unlink()
    assert made(sample(*args)) == ["out/00004-5.png"]
    if metadata:  # it is all in the pictures
        Path("out", INDEX).unlink()
        assert made(sample(*args)) == []
    assert len(pictures()) == 4


def test_what_decides_a_picture_decides_whether_it_is_there(sample):
    Image.linear_gradient("L").resize((16, 16)).save("init.png")
    base = ("a fox", "--seed", 5, "-o", "out/[seed].png")
    started = (*base, "--init", "init.png", "--strength", 0.9)
    assert made(sample(*base)) == ["out/5.png"]
    for number, args in enumerate(((*base, "--negative", "a dog"), started), 2):
        assert made(sample(*args)) == [f"out/5-{number}.png"]
        assert made(sample(*args)) == []
    Image.linear_gradient("L").resize((16, 16)).rotate(90).save("init.png")
    assert made(sample(*started)) == ["out/5-4.png"]
    assert made(sample(*base, model=1)) == ["out/5-5.png"]
    # what does not decide it: how it is spelled, idle settings, names, batches, the template
    same = ("a fox", "--seed", "5,6", "--steps", 2, "--guidance", 2, "--set", "sample.clip=none")
    ran = sample(*same, "--strength", 0.5, "-o", "out/x-[index].png", "--batch-size", 2)
    assert made(ran) == ["out/x-1.png"]


def test_a_picture_that_is_no_longer_itself_is_made_again(sample):
    args = ("a fox", "-n", 3, "--seed", 5, "-o", "out/[index].png")
    sample(*args)
    whole = Path("out/1.png").read_bytes()
    Path("out/1.png").write_bytes(whole[:-40])
    Image.new("RGB", (16, 16)).save("out/2.png")
    assert made(sample(*args)) == ["out/1-2.png", "out/2-2.png"]
    assert Path("out/1-2.png").read_bytes() == whole
    Path("out", INDEX).unlink()
    assert made(sample(*args)) == []


def test_an_index_that_is_torn_or_hostile_is_no_harm(sample):
    args = ("a fox", "-n", 2, "--seed", 5, "-o", "out/")
    sample(*args)
    entry = json.loads(Path("out", INDEX).read_text(encoding="utf-8").splitlines()[0])
    os.rename("out/00000-5.png", "outside.png")
    lines = [
        *('{"path": "0', "[1]", "null", '{"path": 1}', "\xff"),
        json.dumps(entry | {"path": "../outside.png"}),
        json.dumps(entry | {"path": str(Path("outside.png").absolute())}),
        json.dumps(entry | {"seed": "x"}),
        '{"path": "torn',
    ]
    Path("out", INDEX).write_text("\n".join(lines), encoding="latin-1")
    assert made(sample(*args)) == ["out/00002-5.png"]
    assert made(sample(*args)) == []


def test_seeds_that_were_drawn_are_drawn_again_for_what_is_missing(sample):
    Path("p.txt").write_text("a fox\na {red|blue} dog\na fox\n", encoding="utf-8")
    args = ("--prompts", "p.txt", "-n", 2, "-o", "out/[index].png")
    first = sample(*args)
    seeds = [each["seed"] for each in first.objects]
    assert len(set(seeds)) == 6 and seeds[1::2] == [seed + 1 for seed in seeds[::2]]
    lost = {path: Path(path).read_bytes() for path in ("out/1.png", "out/3.png")}
    for path in (*lost, Path("out", INDEX)):
        os.unlink(path)
    again = sample(*args)
    assert [each["seed"] for each in again.objects] == seeds and made(again) == list(lost)
    assert lost == {path: Path(path).read_bytes() for path in lost}


def test_names_that_are_asked_for_are_made_under_them(sample, difftool, models):
    lines = [{"prompt": "a fox", "seed": 1, "out": name} for name in ("a.png", "b.png", "a.png")]
    lines += [{"prompt": "a dog", "seed": 2}, {"prompt": "a dog", "seed": 2}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    ran = sample("--prompts", "p.jsonl", "-o", "out/")
    assert made(ran) == ["out/a.png", "out/b.png", "out/00000-2.png"]
    assert [each["index"] for each in ran.objects] == [0, 1, 2, 3, 4]
    assert ran.objects[4]["path"] == "out/00000-2.png" and ran.objects[4]["existing"]
    assert made(sample("--prompts", "p.jsonl", "-o", "out/")) == []
    sample("a fox", "--seed", 1, "-o", "fox.png")
    assert made(sample("a fox", "--seed", 1, "-o", "fox.png")) == []
    other = difftool(
        "sample", "-m", models[0], "a dog", "--seed", 1, "-o", "fox.png", "--skip-existing"
    )
    assert other.code == 2 and "fox.png exists, and is another picture" in other.err


def test_what_is_printed_for_a_picture_that_is_there_asks_for_it_too(sample):
    sample("a fox", "--seed", 5, "-o", "out/")
    ran = sample("a fox", "--seed", 5, "-o", "out/")
    Path("again.jsonl").write_text(ran.out, encoding="utf-8")
    assert made(sample("--prompts", "again.jsonl", "-o", "out/")) == []
    (path,) = made(sample("--prompts", "again.jsonl", "-o", "again/"))
    assert Path(path).read_bytes() == Path("out/00000-5.png").read_bytes()


def test_pictures_that_are_there_are_on_the_grid(sample):
    args = ("a fox", "a dog", "--seed", 5, "-o", "out/[index].png", "--grid")
    sample(*args[:-1])
    Path("out/1.png").unlink()
    ran = sample(*args)
    assert made(ran) == ["out/1.png", "out/grid.png"] and ran.objects[-1]["grid"] == 2


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("where", ["out/", "out/[steps]-[seed].{}"])
def test_a_grid_is_not_made_again_where_its_pictures_are_there(sample, where, ending):
    """Neither refused as what is there already, nor made under another number."""
    args = ("a fox", "--steps", "1,2", "--seed", "5,6", "--grid", "-o", where.format(ending))
    args += ("--format", ending)
    first = sample(*args)
    files = {path: path.read_bytes() for path in Path("out").iterdir()}
    (grid,) = (each["path"] for each in first.objects if "grid" in each)
    for _ in range(2):
        again = sample(*args)
        assert made(again) == [] and "loading" not in again.err
        known = {"schema": 1, "path": grid, "grid": 4, "existing": True}
        assert again.objects[-1] == known and len(again.objects) == 5
        assert {path: path.read_bytes() for path in Path("out").iterdir()} == files
    Path(first.objects[1]["path"]).unlink()
    assert len(made(sample(*args))) == 1
    more = sample(*args, "--seed", "5-7")
    (grown,) = (each["path"] for each in more.objects if "grid" in each)
    assert more.objects[-1]["grid"] == 6 and (grown == grid) == ("[" in where)


def test_only_a_grid_is_renewed(sample, difftool, models):
    Path("out").mkdir()
    Image.new("RGB", (16, 16)).save("out/grid.png")
    args = ("a fox", "--seed", 5, "-o", "out/[seed].png", "--grid")
    more = ("--device", "cpu", "--skip-existing")
    ran = difftool("sample", "-m", models[0], *args, *more)
    assert ran.code == 2 and "out/grid.png exists, and is no grid" in ran.err
    Path("out/grid.png").unlink()
    assert made(sample(*args)) == ["out/5.png", "out/grid.png"]
    Path("out/5.png").unlink()  # a grid of one picture is not that picture
    assert made(sample(*args)) == ["out/5.png"]


def test_combinations_of_a_drawn_seed_are_begun_again(sample):
    args = ("a fox", "--steps", "1,2", "-o", "out/")
    first = sample(*args)
    assert len(made(first)) == 2 and len({each["seed"] for each in first.objects}) == 1
    assert made(sample(*args)) == []
