"""The page and the plots of a run, made from its files."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from difftool.config.layers import load_preset
from difftool.config.validate import to_yaml
from difftool.training.metrics import Metrics
from difftool.training.report.page import duration, report, usage, write_report
from difftool.training.report.plots import INK, loss_figure, png, running_mean, svg

FACTS: dict[str, Any] = {
    "schema": 1, "part": "unet", "data": "photos", "argument": "my photos", "example": "",
    "kind": "none", "audit": ["photos: 950 images", "skipped: <script>alert(1)</script>.png"],
    "images": 950, "held_out": 50, "size": 32, "steps": 400, "batch": 16,
    "parameters": {"unet": 4_010_000}, "device": "cpu, 2 threads", "version": "0", "torch": "2",
    "choices": [["train.size", 32, "chosen: pictures are 32"], ["train_vae.lr", 1.0, "--set"]],
    "sessions": [{"from": 0, "to": 200, "seconds": 100.0}, {"from": 200, "to": 400, "seconds": 60}],
    "finished": True,
}  # fmt: skip
COLOURS = {"mean": [0.1, 0.0, -0.1], "std": [0.5, 0.5, 0.5], "spread": [0.1, 0.1, 0.1]}


def lines(steps: int = 400, held: bool = True, **more: Any) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = 0.1 + 1 / step
        levels = [None, *[loss * (1 + abs(i - 6)) for i in range(12)], None]
        written.append({"step": step, "loss": loss, "grad_norm": loss, "lr": 1e-3, **more})
        if not more:
            written[-1]["levels"] = levels
        if step % 50 == 0 and held:
            measured = {"loss": 2 * loss, "levels": levels, **more}
            written.append({"step": step, "validation": measured})
            both = {"samples": COLOURS, "data": COLOURS, "count": 16}
            written.append({"step": step, "colours": both})
    return written


def write_metrics(folder: Path, written: list[dict[str, Any]]) -> Metrics:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    return Metrics.read(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a & b"
    write_metrics(folder, lines())
    (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / "config.yaml").write_text(to_yaml(load_preset("pixel-small")))
    (folder / "samples").mkdir()
    for step in range(10, 410, 10):
        Image.new("RGB", (20, 20), (step // 2, 0, 0)).save(folder / f"samples/step-{step:06d}.png")
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and gathers what they refer to."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_needs_nothing_else_and_runs_no_foreign_code(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1
    assert all(link.startswith(("data:image/webp", "#")) for link in page.links), page.links
    assert not re.search(r"@import|url\((?!#)", text)
    assert "a &amp; b" in text
    for svg_text in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg_text)


def test_the_report_tells_the_run(folder):
    text = report(folder)
    for words in (
        "trained on 950 pictures of photos", "finished, 400 steps", "2 min 40 s", "40.0 images/s",
        "4.01 M", "cpu, 2 threads", "photos: 950 images", "pictures are 32", "50 pictures are held",
        "difftool sample -m", "train &#x27;my photos&#x27;", "start_noise",
    ):  # fmt: skip
        assert words in text, words
    assert "train_vae.lr</code>" not in text  # another part's recipe


def test_the_slider_goes_through_the_sheets_from_the_first_to_the_last(folder):
    text = report(folder)
    steps = [int(s) for s in re.findall(r'data-step="(\d+)"', text)]
    assert len(steps) == 24
    assert (steps[0], steps[-1]) == (10, 400)
    assert steps == sorted(set(steps))
    assert f'max="{len(steps) - 1}"' in text
    shown = re.findall(r"<img [^>]*?(hidden)?>", text)
    assert shown.count("hidden") == 23


def test_a_run_of_several_parts_shows_those_before(folder):
    part = folder / "vae"
    write_metrics(part, lines(pixels=0.2, kl=3.0))
    (part / "run.json").write_text(json.dumps(FACTS | {"part": "vae"}))
    text = report(folder)
    assert "Before: the autoencoder" in text
    assert 'href="vae/report.html"' in text
    assert "Before: the text encoder" not in text


def test_a_run_that_has_measured_nothing_yet_has_a_report(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(FACTS | {"sessions": [], "finished": False}))
    (tmp_path / "config.yaml").write_text(to_yaml(load_preset("pixel-small")))
    text = report(tmp_path)
    Page(text)
    assert "step 0 of 400" in text


def test_warnings_come_from_the_measures(tmp_path):
    written = lines()
    assert write_metrics(tmp_path, written).warnings(400) == {}
    for line in written:
        if "validation" in line and line["step"] > 150:
            line["validation"]["loss"] *= line["step"] / 100
        if "colours" in line:
            line["colours"]["samples"] = COLOURS | {"mean": [0.1, 0.0, 0.5]}
    found = write_metrics(tmp_path, written).warnings(400)
    assert "lowest at step 150" in found["validation"]
    assert "more blue (+0.60)" in found["colours"]
    early = Metrics.read(tmp_path / "metrics.jsonl").warnings(4000)
    assert "colours" not in early


@pytest.mark.parametrize(
    ("part", "more", "titles"),
    [
        ("unet", {}, {"run", "by noise level", "gradient norm", "learning rate"}),
        ("vae", {"pixels": 0.2, "structure": 0.1, "kl": 9.0}, {"pixels", "structure", "kl"}),
        ("clip", {"right": 0.7}, {"captions matched with their picture in a batch"}),
    ],
)
def test_the_plot_shows_what_the_part_measures(tmp_path, part, more, titles):
    figure = loss_figure(write_metrics(tmp_path, lines(**more)), "run")
    assert figure is not None
    assert titles <= {axes.get_title("left") for axes in figure.axes}
    [loss] = [axes for axes in figure.axes if axes.get_title("left") == "run"]
    labels = [line.get_label() for line in loss.lines]
    assert "held-out pictures" in labels
    with Image.open(io.BytesIO(png(figure))) as image:
        assert image.size == (1440, 840)
    drawn = svg(figure)
    assert "var(--ink)" in drawn
    assert INK not in drawn


def test_an_adversarial_loss_is_not_compared_with_that_of_held_out_pictures(tmp_path):
    metrics = write_metrics(tmp_path, lines(pixels=0.2, critic=1.0))
    figure = loss_figure(metrics, "run")
    assert figure is not None
    assert metrics.compared == "pixels"
    labels = [line.get_label() for axes in figure.axes for line in axes.lines]
    assert "held-out pictures" not in labels


def test_a_line_cut_short_by_a_kill_ends_the_metrics(tmp_path):
    write_metrics(tmp_path, lines(30, held=False))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 40, "lo')
    assert [line["step"] for line in Metrics.read(path).training] == [10, 20, 30]
    assert loss_figure(Metrics.read(tmp_path / "missing.jsonl"), "run") is None


def test_the_running_mean_is_centred():
    values = np.random.default_rng(0).random(50)
    mean = np.array(running_mean(values.tolist(), 5), dtype=float)
    assert mean[2:-2] == pytest.approx(np.convolve(values, np.full(5, 0.2), "valid"))
    assert running_mean([1.0, None, 3.0], 3)[1] == 2.0


def test_the_next_command_names_a_class_or_a_caption():
    preset = load_preset("text-small")
    [first, *_] = usage(preset, FACTS | {"example": "a fox's den"}, Path("runs/a b"))
    assert first == """difftool sample 'a fox'"'"'s den' -m 'runs/a b' -n 4 --grid"""
    assert usage(preset, FACTS | {"part": "vae"}, Path("out")) == [
        "difftool train 'my photos' --part unet --vae out"
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (42, "42 s"), (725, "12 min 5 s"), (12000, "3 h 20 min"), (187200, "2 d 4 h")],
)
def test_durations_are_said_in_words(seconds, words):
    assert duration(seconds) == words
