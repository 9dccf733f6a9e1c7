"""What is drawn of the forward process: strips, curves, moving pictures, a page to play with."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor
from slices import in_turn, slow_but

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS, build_path
from difftool.forward import drawing, plots
from difftool.forward.animation import FIRST, LAST, PACE, gif, webp
from difftool.forward.figures import (
    compare_figure,
    curve_figure,
    marginal_figure,
    markov_figure,
    page_figure,
)
from difftool.forward.levels import even_levels
from difftool.forward.outputs import OUTPUTS
from difftool.forward.page import NOISE_STEP, page
from difftool.forward.process import PixelSpace, noise_like, unit
from difftool.images import canvas, theme

SD15 = build_path({"kind": "sd15"})
TWO = {name: build_path({"kind": name}) for name in ("linear", "flow")}


def image(width=24, height=16):
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


SPACE = PixelSpace(image())


def strip(space=SPACE, path=SD15, count=4, seed=0):
    return marginal_figure(space, "a path", path, even_levels(path, count), seed)


def compared(space=SPACE, paths=TWO, count=3):
    levels = {name: even_levels(path, count) for name, path in paths.items()}
    return compare_figure(space, paths, levels, 0)


# --- pictures --------------------------------------------------------------------------------


def place(page: Image.Image, frame: np.ndarray) -> tuple[int, int]:
    """Where on a page (x, y) the middle row of a frame is seen; it is seen once."""
    row = frame[len(frame) // 2].tobytes()
    assert page.tobytes().count(row) == 1
    y, x = divmod(page.tobytes().index(row) // 3, page.width)
    return x, y


def test_a_strip_shows_every_frame_once_from_left_to_right():
    figure = strip(PixelSpace(image(160, 90)), count=5)
    page = drawing.draw(figure)
    xs, ys = zip(*(place(page, frame) for frame in figure.strips[0].frames), strict=True)
    assert list(xs) == sorted(xs) and len(set(ys)) == 1


def test_small_pictures_are_magnified_by_whole_pixels():
    flow = build_path({"kind": "flow"})
    page = drawing.draw(strip(PixelSpace(image(16, 9)), flow, 1))
    row = np.asarray(image(16, 9))[4].repeat(10, 0)
    assert page.tobytes().count(row.tobytes()) == 10


@pytest.mark.parametrize("count", [1, 10, 11, 23])
def test_long_strips_are_broken_into_even_lines(count):
    page, line = drawing.draw(strip(count=count)), drawing.draw(strip(count=1))
    assert (page.height == line.height) == (count <= 10)
    assert page.width <= 10 * line.width


SHAPES = {"square": (16, 16), "wide": (1000, 50), "tall": (20, 400), "usual": (200, 150)}


@pytest.fixture
def written(monkeypatch):
    """The boxes (left, top, right, bottom) and page of every text that a pen writes."""
    found = []
    write = canvas.Canvas.write

    def recorded(self, x, y, text, size, *args, **options):
        end = write(self, x, y, text, size, *args, **options)
        if text:
            height = size * self.unit
            left = end - canvas.length(text, height)
            found.append((self.page, (left, y - 0.7 * height, end, y + 0.22 * height), text))
        return end

    monkeypatch.setattr(canvas.Canvas, "write", recorded)
    return found


@pytest.mark.parametrize(("count", "shape"), in_turn([1, 2, 9, 12, 40], [*SHAPES]))
def test_no_label_is_cut_or_lies_on_another(shape, count, written):
    space = PixelSpace(image(*SHAPES[shape]))
    figures = [strip(space, build_path({"kind": "edm"}), count), strip(space, SD15, count)]
    figures.append(markov_figure(space, "sd15", SD15, even_levels(SD15, count), 0)[0])
    if count < 10:
        six = {name: build_path({"kind": name}) for name in ("cosine", "sd21-zsnr", "edm")}
        figures.append(compared(space, six, count))
    for figure in figures:
        written.clear()
        pages = [drawing.draw(figure), *(frame.page for frame in drawing.animation_frames(figure))]
        for drawn in pages:
            boxes = [(box, text) for other, box, text in written if other is drawn]
            assert boxes
            for (left, top, right, bottom), text in boxes:
                assert 0 < left < right < drawn.width, text
                assert 0 < top < bottom < drawn.height, text
            for k, (a, text) in enumerate(boxes):
                for b, other in boxes[:k]:
                    apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                    assert apart, (text, other)


def test_two_strips_are_higher_than_one_and_curves_wider():
    one, both = drawing.draw(strip()), drawing.draw(compared(count=4))
    assert both.height > 1.5 * one.height and both.width > 1.1 * one.width


def color_of(index: int) -> list[int]:
    return list(ImageColor.getrgb(theme.COLORS[index]))


def test_the_curves_are_drawn_in_the_colours_of_their_strips():
    page = np.asarray(drawing.draw(compared()))
    right = page[:, -page.shape[1] // 3 :].reshape(-1, 3).tolist()
    assert color_of(0) in right and color_of(1) in right


@pytest.mark.parametrize(
    "names", slow_but([["edm"], list(PATHS)], [["sd15"], ["edm"], ["flow"], list(PATHS)])
)
def test_curves_of_every_path(names):
    paths = {name: build_path({"kind": name}) for name in names}
    bare = plots.draw_curves(curve_figure(paths, {name: [] for name in names}))
    pixels = np.asarray(bare).reshape(-1, 3).tolist()
    assert all(color_of(k % len(theme.COLORS)) in pixels for k in range(len(names)))
    visited = {name: GRIDS["trailing"](path, 5) for name, path in paths.items()}
    dotted = plots.draw_curves(curve_figure(paths, visited))
    assert dotted.size == bare.size and dotted.tobytes() != bare.tobytes()


def test_levels_lie_on_their_curve_where_their_noise_says():
    curve = even_levels(SD15)
    assert plots.positions(curve, [curve[0], curve[333], curve[999]]) == pytest.approx(
        [0, 1 / 3, 1]
    )
    assert plots.positions(curve, [SD15.clean]) == [0]
    flow = even_levels(TWO["flow"])
    assert plots.positions(flow, [flow[0], flow[400], flow[1000]]) == pytest.approx([0, 0.4, 1])


# --- moving pictures -------------------------------------------------------------------------


@pytest.mark.parametrize("write", [gif, webp])
def test_a_moving_picture_begins_and_ends_with_a_pause(write):
    figure = strip(count=5)
    with Image.open(BytesIO(write(figure))) as moving:
        assert isinstance(getattr(moving, "n_frames", None), int)
        assert (moving.n_frames, moving.info["loop"]) == (5, 0)  # type: ignore[attr-defined]
        durations = []
        for k in range(5):
            moving.seek(k)
            moving.load()
            durations.append(moving.info["duration"])
        assert durations == [FIRST, *[PACE] * 3, LAST]
        first = next(drawing.animation_frames(figure))
        assert moving.size == first.page.size
        moving.seek(0)
        difference = np.abs(np.asarray(moving.convert("RGB"), int) - np.asarray(first.page, int))
        assert difference.mean() < (12 if write is gif else 1e-9)  # 256 colours are few for noise


def test_a_single_level_is_a_still_picture():
    for write in (gif, webp):
        with Image.open(BytesIO(write(strip(count=1)))) as still:
            assert getattr(still, "n_frames", 1) == 1


def test_the_paper_and_the_type_of_a_gif_are_exact_in_every_frame():
    figure = compared(count=4)
    with Image.open(BytesIO(gif(figure))) as moving:
        for k, frame in enumerate(drawing.animation_frames(figure)):
            moving.seek(k)
            found, page = np.array(moving.convert("RGB")), np.array(frame.page)
            for left, top, right, bottom in frame.boxes:
                found[top:bottom, left:right] = page[top:bottom, left:right] = 0
            for ink in (theme.PAPER, theme.INK, theme.RULE, *theme.COLORS[:2]):
                same = (page == ImageColor.getrgb(ink)).all(axis=2)
                assert (found[same] == ImageColor.getrgb(ink)).all()
            assert np.abs(found.astype(int) - page).max() < 24  # edges of the type


def test_a_smooth_picture_keeps_its_colours_in_a_gif():
    ramp = np.linspace(0, 255, 160)
    across = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.float64(128)), axis=2)
    flow = build_path({"kind": "flow"})
    figure = strip(PixelSpace(Image.fromarray(across.astype(np.uint8))), flow, 2)
    with Image.open(BytesIO(gif(figure))) as moving:
        left, top, right, bottom = next(drawing.animation_frames(figure)).boxes[0]
        found = np.asarray(moving.convert("RGB"), int)[top + 5 : bottom - 5, left + 5 : right - 5]
    assert np.abs(found - across[5:-5, 5:-5]).mean() < 6


# --- the page --------------------------------------------------------------------------------


class Tags(HTMLParser):
    """A strict enough reader: every element is closed where it must be, and ids are unique."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [str(values["id"])] if "id" in values else []
        self.addresses += [str(values[name]) for name in ("src", "href") if name in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def data_of(html: bytes) -> dict:
    text = html.decode()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


def live(paths=TWO, count=None, space=SPACE):
    levels = {name: even_levels(path, count) for name, path in paths.items()}
    return page_figure(space, paths, levels, 3)


def test_a_page_is_whole_and_asks_nobody():
    for figure in (live(), strip(), curve_figure(TWO, {name: [] for name in TWO})):
        text = page(figure).decode()
        tags = Tags(text)
        assert tags.addresses == [] and len(tags.ids) == len(set(tags.ids))
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert "default-src 'none'" in text
        wanted = re.findall(r'\$\("(\w+)"\)', text)
        assert wanted and set(wanted) <= set(tags.ids)
        assert not re.search(r"<!--[A-Z]+-->", text)


def test_text_on_a_page_stays_text():
    hostile = "</script><script>alert(1)</script>"
    html = page(strip()._replace(title=hostile, note="<!--SCRIPT-->", caption=hostile))
    assert Tags(html.decode()).ids
    assert html.count(b"alert(1)") == 3 and html.count(b"<script>alert") == 0
    assert data_of(html)["caption"] == hostile


def test_a_page_has_all_levels_and_what_its_pictures_are_made_of():
    data = data_of(page(live()))
    assert [band["title"] for band in data["strips"]] == ["linear", "flow"]
    assert [len(band["levels"]) for band in data["strips"]] == [1000, 1001]
    assert data["strips"][0]["levels"][999] == pytest.approx(list(TWO["linear"].level(999.0)), 1e-6)
    x0 = np.frombuffer(base64.b64decode(data["x0"]), np.uint8).reshape(16, 24, 3)
    np.testing.assert_array_equal(x0, np.asarray(image()))
    z = np.frombuffer(base64.b64decode(data["z"]), np.int8).reshape(16, 24, 3) * NOISE_STEP
    assert np.abs(z - noise_like(SPACE.x0, 3)).max() <= NOISE_STEP / 2 + 1e-6


def test_a_page_of_what_cannot_be_computed_holds_pictures():
    figure, _ = markov_figure(SPACE, "sd15", SD15, even_levels(SD15, 3), 0)
    data = data_of(page(figure))
    assert "x0" not in data and not data["comparison"] and len(data["whole"]) == 200
    assert data["strips"][0]["positions"] == pytest.approx([0, 0.5, 1], abs=2e-3)
    for band, shown in zip(data["strips"], figure.strips, strict=True):
        for uri, frame in zip(band["frames"], shown.frames, strict=True):
            head, _, body = uri.partition(",")
            assert head == "data:image/jpeg;base64"
            with Image.open(BytesIO(base64.b64decode(body))) as found:
                assert found.size == (24, 16)
                assert np.abs(np.asarray(found.convert("RGB"), int) - frame).mean() < 12


def test_a_page_of_curves_marks_what_a_sampler_visits():
    visited = GRIDS["karras"](SD15, 5)
    (band,) = data_of(page(curve_figure({"sd15": SD15}, {"sd15": visited})))["strips"]
    assert len(band["levels"]) == 1000 and len(band["visited"]) == len(band["dots"]) == 6
    assert band["dots"] == sorted(band["dots"], reverse=True)
    assert band["visited"][-1] == [-1, 1, 0]


node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


def run_node(code: str) -> Any:
    """What the code writes with `say`, the page's script being `page`."""
    script = str(files("difftool.forward") / "page.js")
    whole = f"const page = require({json.dumps(script)});\n"
    whole += "const say = (value) => console.log(JSON.stringify(value));\n" + code
    done = subprocess.run(["node", "-e", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@node
@pytest.mark.parametrize("kind", ["sd15", "sd21-zsnr", "flow", "edm"])
def test_the_page_computes_the_pictures_of_the_strip(kind):
    path = build_path({"kind": kind})
    levels = even_levels(path, 5)
    data = data_of(page(live({kind: path}, 5)))
    code = f"""
const data = {json.dumps(data)};
const x0 = page.bytes(data.x0), z = new Int8Array(page.bytes(data.z).buffer);
say(data.strips[0].levels.map((level) => Array.from(
  page.mix(x0, z, data.step, level, new Uint8ClampedArray(x0.length / 3 * 4)))));
"""
    for found, level in zip(np.array(run_node(code)), levels, strict=True):
        rgba = found.reshape(16, 24, 4)
        x_t = level.alpha * SPACE.x0 + level.sigma * noise_like(SPACE.x0, 3)
        difference = np.abs(rgba[..., :3] - SPACE.to_pixels(unit(x_t, level)).astype(int))
        assert difference.max() <= 3 and (rgba[..., 3] == 255).all()
        assert level.sigma > 0.01 or difference.max() <= 1


@node
def test_the_page_reads_off_what_the_strip_says():
    levels = [list(level) for level in (*even_levels(SD15, 8), SD15.clean)]
    found = run_node(f"say({json.dumps(levels)}.map((level) => page.readings(level, 0.02)))")
    snr = [dict(readings)["SNR"] for readings in found]
    shown = drawing.labels
    first = strip(count=8).strips[0]
    assert snr[:-1] == [shown(first, k)[1].removeprefix("SNR ") for k in range(8)]
    assert snr[-1] == "∞ dB" and dict(found[-1])["t"] == "clean"
    assert dict(found[0])["PSNR"] == "40.0 dB" and dict(found[0])["RMSE"] == "0.020"


@node
def test_the_plot_of_the_page_leaves_out_what_is_infinite():
    flow = [list(level) for level in even_levels(TWO["flow"], 5)]
    outline = run_node(f"say(page.outline({json.dumps(flow)}))")
    assert re.fullmatch(r"M[\d. ]+(L[\d. ]+){2}", outline)


def test_every_kind_of_output_is_what_it_says(tmp_path):
    begin = {"png": b"\x89PNG", "gif": b"GIF89a", "webp": b"RIFF", "html": b"<!DOCTYPE html>",
             "csv": b"index,t,alpha,sigma,log_snr\n"}  # fmt: skip
    assert set(begin) == set(OUTPUTS)
    for kind, output in OUTPUTS.items():
        assert output.encode(strip()).startswith(begin[kind])
        assert output.encode(compared()).startswith(begin[kind][:20])
