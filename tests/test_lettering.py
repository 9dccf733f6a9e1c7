"""Text on sheets and grids: in fonts that have it, and readable where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pytest
from PIL import Image, ImageChops, ImageFont

from difftool.images import fonts
from difftool.images.lettering import face, substitute, without_font, wrapped

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
OTHER = str(FOLDER / "STIXGeneral.ttf")
ODD = "𝒜𝒞"  # script letters, which STIX has and DejaVu Sans lacks


@pytest.fixture(autouse=True)
def system(monkeypatch):
    """A system of which only the fonts are known that are named: none."""

    def forget() -> None:
        for each in (fonts.known, fonts.font_of):
            each.cache_clear()

    def named(*paths: str) -> None:
        monkeypatch.setenv(fonts.VARIABLE, os.pathsep.join(paths))
        forget()

    monkeypatch.setattr(fonts, "NAMES", ())
    monkeypatch.setenv("PATH", "")
    named()
    yield named
    monkeypatch.undo()
    forget()


def written(text: str, size: int = 20) -> Image.Image:
    picture = Image.new("RGB", (400, 60), "white")
    face(size).write(picture, (20, 40), text, "black")
    return picture


def box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.invert(picture).getbbox()


def test_what_dejavu_has_is_in_it_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(fonts, "font_of", lambda *given: pytest.fail("looked for"))
    assert [run.text for run in face(13).runs("a smiling fox, naïve")] == ["a smiling fox, naïve"]


def test_other_scripts_are_in_a_font_that_has_them(system):
    system(OTHER)
    runs = list(face(20).runs(f"an {ODD} fox"))
    assert [run.text for run in runs] == ["an ", ODD, " fox"]
    assert {run.font.path for run in runs[1:2]} == {OTHER} != {runs[0].font.path}
    assert face(20).length(f"an {ODD} fox") == pytest.approx(sum(run.width for run in runs))
    assert without_font([ODD, "smiling"]) == ""
    left, _, right, _ = box(written(f"an {ODD} fox")) or (0, 0, 0, 0)
    assert 20 <= left < 25 and right <= 20 + face(20).length(f"an {ODD} fox") + 2


def test_what_no_font_has_is_readable():
    assert substitute("🦊") == ":fox face:" and substitute("狐") == "\\u72d0"
    assert without_font(["a 🦊", "狐🦊", "👩🏽‍🚀", "❤️ naïve жук"]) == "🦊狐👩🚀"
    assert "".join(run.text for run in face(13).runs("a 🦊 狐")) == "a :fox face: \\u72d0"
    # what changes a character goes with it
    assert "".join(run.text for run in face(13).runs("👩🏽‍🚀!")) == ":woman::rocket:!"
    assert "".join(run.text for run in face(13).runs("\x1b[31m\udc80")) == "\\x1b[31m\\udc80"


def test_a_font_of_one_size_is_scaled(system, monkeypatch):
    def only(path: str, size: int) -> tuple[object, float]:
        return ImageFont.truetype(path, 109), 109 / size

    monkeypatch.setattr("difftool.images.lettering.opened", only)
    scaled, size = box(written("Hxg")), face(20).length("Hxg")
    monkeypatch.undo()
    plain = box(written("Hxg"))
    assert scaled and plain and size == pytest.approx(face(20).length("Hxg"), rel=0.03)
    assert max(abs(a - b) for a, b in zip(scaled, plain, strict=True)) <= 2


def test_lines_end_between_words_and_wide_characters_and_in_long_words():
    small, width = face(13), 100
    for text in ("a smiling fox in the snow", "model_v1.5-pruned-emaonly-fp16.safetensors"):
        lines = wrapped(text, width, 9, small)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "") and len(lines) > 1
        assert all(small.length(line) <= width for line in lines)
    assert wrapped("smiling foxes", width, 9, small) == ["smiling foxes"]
    assert wrapped("alpha beta gamma", small.length("alpha beta"), 9, small) == [
        "alpha beta", "gamma",
    ]  # fmt: skip
    (line,) = wrapped("model_v1.5-pruned-emaonly", width, 1, small)
    assert line.endswith("…") and small.length(line) <= width
    # each is one of ten that fill several lines
    wide = "一只微笑的狐狸在林里"
    lines = wrapped(wide, 2.5 * small.length("一"), 9, small)
    assert "".join(lines) == wide and {len(line) for line in lines} == {2}
    family = "👩🏽‍🚀"
    assert wrapped(family * 2, small.length(family) * 1.2, 9, small) == [family] * 2
    assert wrapped("", width, 3, small) == [] == wrapped("  ", width, 3, small)


def test_a_grid_says_once_what_has_no_font(difftool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = difftool("sample", "狐 🦊", "狐 b", "--steps", 1, "--seed", 1, "--grid", "-o", "g.png")
    assert ran.code == 0 and ran.err.count("no font here has 狐🦊") == 1, ran.err
    assert fonts.VARIABLE in ran.err and Path("g.png").exists()
    ran = difftool("sample", "狐", "b", "--steps", 1, "--seed", 1, "-o", "p.html")
    assert ran.code == 0 and "font" not in ran.err, ran.err
