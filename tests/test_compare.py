"""Grids: which pictures stand where, how they are drawn, paged, and what they say."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from difftool.images.tables import Page, PictureTable, TableCell, drawn, page_size
from difftool.sampling.compare import layout
from difftool.sampling.compare.layout import Arrangement, Exhibit, arranged, pages
from difftool.sampling.compare.page import Embedded, page
from difftool.sampling.metadata.files import read
from difftool.sampling.metadata.grids import folded, unfolded

SIZE = (64, 64)


def shown(size: tuple[int, int] = SIZE, **facts: object) -> Exhibit:
    """A picture of these facts; `place_x` is of an axis, `of_x` of a setting."""
    named = {n.replace("_", ".", 1) if "_" in n else n: str(v) for n, v in facts.items()}
    base = {"model": "fake", "prompt": "a fox", "negative": "", "label": "", "seed": "1"}
    base |= named
    return Exhibit(
        {**base, "template": named.get("template", base["prompt"])}, size,
        lambda: Image.new("RGB", size, "red"),
    )  # fmt: skip


def names(made: Arrangement) -> list[str]:
    return [axis.name for axis in made.axes]


def test_a_product_has_its_axes():
    made = arranged(
        [
            shown(place_sampler=s, place_steps=n, seed=seed, of_sampler=s, of_steps=n)
            for s in ("euler", "heun") for n in (10, 20, 30) for seed in (1, 2)
        ]
    )  # fmt: skip
    assert names(made) == ["place.sampler", "place.steps", "seed"]
    assert [axis.texts for axis in made.axes] == [["euler", "heun"], ["10", "20", "30"], ["1", "2"]]
    assert made.at(["heun", "20", "2"]) == 9 and made.title == "a fox"
    assert set(made.captions) == {""}


@pytest.mark.parametrize(
    ("pictures", "axes"),
    [
        ([shown(seed=s) for s in (1, 2, 3)], ["seed"]),
        ([shown(prompt=p, seed=s) for p in "ab" for s in (1, 2)], ["prompt", "seed"]),
        ([shown(prompt=p, seed=s) for p, s in ("a1", "a2", "b3", "b4")], ["prompt", "image"]),
        ([shown(prompt=p, seed=7) for p in "abc"], ["prompt"]),
        ([shown(prompt=p, seed=s) for p, s in zip("abc", "123", strict=True)], ["prompt"]),
        ([shown(label=c, seed=s) for c in ("cat", "dog") for s in (1, 2)], ["label", "seed"]),
        # what stands for many: chosen by the seed, or every one
        (
            [shown(prompt=p, template="{x|y}", seed=s) for p, s in zip("xyx", "123", strict=True)],
            ["seed"],
        ),
        ([shown(prompt=p, template="{x|y}", seed=s) for p in "xy" for s in "12"],
         ["prompt", "seed"]),
        # texts replaced: the axis says it
        ([shown(prompt=p, place_replace=p, seed=s) for p in "rgb" for s in "12"],
         ["place.replace", "seed"]),
        # lines of JSON that make a product of settings
        ([shown(of_steps=n, of_guidance=g) for n in (1, 2) for g in (3, 4)],
         ["of.steps", "of.guidance"]),
        # sampler and schedule in one, sizes that change two sides
        ([shown(place_sampler=s, of_sampler=s, of_schedule=s, seed=7) for s in "abc"],
         ["place.sampler"]),
        # no product
        ([shown(of_steps=1), shown(of_steps=2), shown(of_steps=2, of_guidance=9)], []),
        ([shown()], []),
    ],
)  # fmt: skip
def test_what_pictures_differ_in_is_found(pictures, axes):
    assert names(arranged(pictures)) == axes


def test_what_failed_leaves_its_place_empty():
    every = [shown(place_sampler=s, place_steps=n) for s in "abc" for n in (1, 2)]
    made = arranged([each for i, each in enumerate(every) if i != 3], missing=1)
    assert names(made) == ["place.sampler", "place.steps"] and made.at(["b", "2"]) is None
    (page,) = pages(made)
    assert page.pictures == 5


def test_captions_say_what_the_axes_do_not():
    chosen = [shown(prompt=p, template="{x|y}", seed=s) for p, s in zip("xyx", "123", strict=True)]
    assert arranged(chosen).captions == ["x\nseed 1", "y\nseed 2", "x\nseed 3"]
    assert arranged(chosen).title == "{x|y}"
    odd = [shown(of_steps=1), shown(of_steps=2), shown(prompt="b", of_steps=2)]
    assert arranged(odd).captions == ["a fox\nsteps 1", "a fox\nsteps 2", "b\nsteps 2"]


def test_what_all_have_in_common_is_said_once():
    made = arranged(
        [
            shown(of_size="64x64", of_steps=n, of_guidance=3, negative="blue", place_steps=n)
            for n in (1, 2)
        ]
    )
    assert made.about == "fake  ·  64x64  ·  guidance 3  ·  seed 1  ·  not: blue"


def texts(page: Page) -> list[list[tuple[str, list[str], list[str]]]]:
    return [[(t.title, list(t.columns), list(t.rows)) for t in row] for row in page.tables]


def product_of(*lengths: int, size: tuple[int, int] = SIZE) -> Arrangement:
    made: list[dict[str, Any]] = [{}]
    for number, length in enumerate(lengths):
        made = [m | {f"place_{chr(97 + number)}": i} for m in made for i in range(length)]
    return arranged([shown(size, **each) for each in made])


def test_axes_are_columns_rows_tables_and_pages():
    (one,) = pages(product_of(3))
    assert texts(one) == [[("", ["0", "1", "2"], [])]] and one.columns == "a"
    (two,) = pages(product_of(2, 3))
    assert texts(two) == [[("", ["0", "1", "2"], ["0", "1"])]] and (two.rows, two.columns) == (
        "a",
        "b",
    )
    (three,) = pages(product_of(2, 2, 2))
    assert [t[0] for row in texts(three) for t in row] == ["a 0", "a 1"]
    (four,) = pages(product_of(2, 3, 2, 2))
    assert [[t[0] for t in row] for row in texts(four)] == [
        ["a 0 · b 0", "a 0 · b 1", "a 0 · b 2"], ["a 1 · b 0", "a 1 · b 1", "a 1 · b 2"],
    ]  # fmt: skip
    five = pages(product_of(2, 2, 2, 2, 2))
    assert [page.about.split("  ·  ")[0] for page in five] == ["a 0", "a 1"]
    assert five[1].about.endswith("page 2 of 2")


@pytest.mark.parametrize("lengths", [(30,), (20, 3), (3, 20), (9, 9), (2, 7, 8), (2, 2, 7, 6)])
def test_what_does_not_fit_is_paged_and_nothing_is_lost(lengths, monkeypatch):
    monkeypatch.setattr("difftool.sampling.compare.layout.MAX_SIDE", 1000)
    made = product_of(*lengths)
    found = pages(made)
    assert sum(page.pictures for page in found) == len(made.pictures) and len(found) > 1
    for each in found:
        assert max(page_size(each)) <= 1250


def test_a_picture_larger_than_a_page_has_a_page():
    (page,) = pages(arranged([shown((9000, 9000))]))
    assert page.pictures == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 9, 12, 16, 25])
def test_pictures_in_turn_fill_their_rows(count):
    columns = layout.best_columns(count, (64, 64), (40, 40))
    rows = -(-count // columns)
    assert {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 9: 3, 12: 4, 16: 4}.get(count, columns) == columns
    assert rows <= columns <= 2.5 * rows or count < 4


def test_a_page_is_drawn_with_every_picture_where_it_belongs():
    colours = [["red", "lime"], ["blue", "yellow"]]
    cells = [
        [TableCell(lambda c=c: Image.new("RGB", (64, 64), c), (64, 64), "a caption") for c in row]
        for row in colours
    ]
    page = Page(
        tables=[[PictureTable(cells, ["1", "2"], ["euler", "a name that is much longer"])]],
        title="a fox " * 30, about="a line", columns="steps", rows="sampler",
    )  # fmt: skip
    image = drawn(page)
    assert image.getcolors(1 << 20)
    seen = {
        image.getpixel((x, y)): (x, y)
        for y in range(0, image.height, 5)
        for x in range(0, image.width, 5)
    }
    places = [
        seen[c] for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    ]  # lowest right
    assert places[0][0] < places[1][0] and places[0][1] == places[1][1]
    assert places[0][1] < places[2][1] and places[0][0] == places[2][0]
    assert all(
        (255, 255, 255) != image.getpixel((x, y))
        for x, y in ((0, 0), (image.width - 1, image.height - 1))
    )


def test_pictures_of_several_sizes_share_a_grid():
    image = drawn(pages(arranged([shown((64, 32), seed=1), shown((32, 64), seed=2)]))[0])
    assert image.width > 350 and image.height > 350


def test_what_pictures_say_is_folded_and_unfolded():
    chunks = [
        {"a": 1, "request": {"seed": s, "files": ["a"]}, "sample": {"kind": k, "b": True}}
        for s, k in ((1, "v"), (2, "w"), (3, "v"))
    ]  # fmt: skip
    chunks[1]["sample"]["more"] = None
    whole = folded(chunks)
    assert whole["a"] == 1 and whole["pictures"][0] == {
        "request": {"seed": 1},
        "sample": {"kind": "v"},
    }
    assert unfolded(whole) == chunks and unfolded(json.loads(json.dumps(whole))) == chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "one.safetensors"
    preset = tiny.preset(name="one", unet={"num_classes": 2}, classes=["cat", "dog"],
                         sample={"size": [16, 16], "steps": 2})  # fmt: skip
    tiny.model(preset).save(path)
    return path


def test_the_grid_itself_is_what_is_named(difftool, model):
    common = ("sample", "-m", model, "--label", "cat", "--seed", "1-3")
    ran = difftool(*common, "--steps", "1,2", "--grid", "-o", "x.png", "--json")
    assert ran.code == 0 and [p.name for p in Path().iterdir()] == ["x.png"], ran.err
    (line,) = ran.objects
    assert (line["path"], line["grid"]) == ("x.png", 6)
    assert [(p["steps"], p["seed"]) for p in line["pictures"]] == [
        (n, s) for n in (1, 2) for s in (1, 2, 3)
    ]
    with Image.open("x.png") as image:
        told = unfolded(json.loads(image.info["difftool"]))
        assert image.width > 3 * 176 and image.info["Software"] == "difftool"
    assert [t["request"]["seed"] for t in told] == [1, 2, 3, 1, 2, 3]
    assert [t["preset"]["sample"]["steps"] for t in told] == [1, 1, 1, 2, 2, 2]
    ran = difftool(*common, "--grid", "-o", "x.png")
    assert ran.code == 2 and "x.png exists" in ran.err
    assert difftool(*common, "--grid", "-o", "x.png", "--overwrite").code == 0


def test_a_grid_is_made_again_picture_by_picture(difftool, model):
    common = ("sample", "-m", model, "--exact")
    asked = ("--label", "cat", "--steps", "1,2", "--seed", "1-2")
    difftool(*common, *asked, "-o", "first/[label]-[steps]-[seed].png")
    for name in ("x.png", "x.jpg"):
        assert difftool(*common, *asked, "--grid", "-o", name).code == 0
        again = difftool(*common, "--from-image", name, "-o", f"{name}s/[label]-[steps]-[seed].png")
        assert again.code == 0 and len(again.lines) == 4, again.err
        for path in again.lines:
            assert Path(path).read_bytes() == (Path("first") / Path(path).name).read_bytes()
    again = difftool(*common, "--from-image", "x.png", "--steps", "1,3", "--grid", "-o", "y.png")
    assert again.lines == ["y.png"]


def test_folders_and_templates_have_the_pictures_beside_the_grid(difftool, model):
    common = ("sample", "-m", model, "--label", "cat,dog", "--seed", "1-2", "--grid")
    ran = difftool(*common, "-o", "out/")
    assert ran.lines == [
        *("out/00000-1.png", "out/00001-2.png", "out/00002-1.png", "out/00003-2.png"),
        "out/00004-grid.png",
    ]
    assert difftool(*common, "-o", "[label]-[seed].png").lines[-1] == "grid.png"
    for more in ("--save-latents", "--skip-existing"):
        ran = difftool(*common, "-o", "y.png", more)
        assert ran.code == 2 and "needs a file for each picture" in ran.err


def test_pages_are_numbered(difftool, model, monkeypatch):
    monkeypatch.setattr("difftool.sampling.compare.layout.MAX_SIDE", 500)
    ran = difftool("sample", "-m", model, "--label", "cat", "-n", 7, "--grid", "-o", "x.webp")
    assert ran.lines == ["x.webp", "x-2.webp"] and ran.code == 0, ran.err


class Parsed(HTMLParser):
    """The tags of a page, and the text of its script of data."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data, self._in = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id") or ""

    def handle_data(self, data):
        self.data += data if self._in == "data" else ""

    def handle_endtag(self, tag):
        self._in = ""


def test_a_page_stands_alone_and_its_pictures_say_how_they_were_made(difftool, model):
    ran = difftool(
        *("sample", "-m", model, "--label", "cat,dog", "--seed", "1-2", "--steps", "1,2"),
        *("-o", "page.html", "--json", "--exact"),
    )
    assert ran.code == 0 and [p.name for p in Path().iterdir()] == ["page.html"], ran.err
    (line,) = ran.objects
    assert (line["path"], line["grid"], len(line["pictures"])) == ("page.html", 8, 8)
    text = Path("page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|src=\"(?!data:)", text)
    parsed = Parsed(text)
    data = json.loads(parsed.data)
    assert [axis["name"] for axis in data["axes"]] == ["label", "steps", "seed"]
    assert [p["at"] for p in data["pictures"]] == [
        [label, steps, seed] for label in (0, 1) for steps in (0, 1) for seed in (0, 1)
    ]
    images = [attrs["src"] or "" for tag, attrs in parsed.tags if tag == "img"]
    for number, (image, told) in enumerate(zip(images, line["pictures"], strict=True)):
        kind, _, code = image.partition(";base64,")
        assert kind == "data:image/png"
        Path("one.png").write_bytes(base64.b64decode(code))
        request = read(Path("one.png"))
        assert (request.label, request.seeds) == (told["label"], (told["seed"],)), number
    again = difftool("sample", "-m", model, "--from-image", "one.png", "-o", "again.png")
    with Image.open("again.png") as made, Image.open("one.png") as first:
        assert made.tobytes() == first.tobytes() and again.code == 0


def test_what_a_page_shows_is_text_whatever_it_holds():
    evil = '</script><!--SCRIPT--><img src=x onerror="alert(1)"> & <b>'
    made = arranged([shown(prompt=evil, seed=1), shown(prompt=evil, seed=2)])
    pictures = [Embedded(lambda: b"x", {"prompt": evil}) for _ in range(2)]
    text = page(made, pictures, "webp").decode()
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags].count("img") == 2 and text.count("</script>") == 2
    assert json.loads(parsed.data)["pictures"][0]["facts"]["prompt"] == evil
    assert 'src="data:image/webp;base64,eA=="' in text


def test_names_of_pages(difftool, model):
    common = ("sample", "-m", model, "--label", "cat", "--seed", "1")
    ran = difftool(*common, "-o", "page.htm", "--format", "webp", "--grid")
    assert ran.lines == ["page.htm"] and "image/webp" in Path("page.htm").read_text("utf-8")
    for more in (("-o", "[seed].html"), ("-o", "page.htm"), ("-o", "x.html", "--skip-existing")):
        assert difftool(*common, *more).code == 2


def test_pictures_that_are_there_already_are_on_the_grid_too(difftool, model):
    common = ("sample", "-m", model, "--label", "cat", "-o", "[seed].png")
    assert difftool(*common, "--seed", "1").code == 0
    ran = difftool(*common, "--seed", "1-2", "--skip-existing", "--grid", "--json")
    assert ran.code == 0 and ran.objects[-1]["grid"] == 2, ran.err
