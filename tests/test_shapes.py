"""The built-in set: its language, its drawing (against Pillow's polygons), its randomness."""

from __future__ import annotations

import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from slices import slow_but

from difftool.data import open_dataset, shapes
from difftool.data.shapes import ShapePlace
from difftool.errors import UsageError
from difftool.text.dice import coarse_uniforms

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import shapes_eval

EVERY = [c for i, c in enumerate(shapes.captions()) if i < 80 or i % 37 == 0]


def polygon(shape: str, place: ShapePlace, scale: float) -> list[tuple[float, float]]:
    """Corners of an outline in pixels, from its construction rather than from distances."""

    def turn(radius: float, degrees: float) -> tuple[float, float]:
        return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))

    ratio = math.sin(math.radians(18)) / math.sin(math.radians(54))  # of a pentagram's radii
    corners = {
        "circle": [turn(1, d) for d in range(360)],
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(x, y + 0.29) for x, y in (turn(1.16, d) for d in (-90, 30, 150))],
        "star": [turn(1.1 * (ratio if i % 2 else 1), -90 + 36 * i) for i in range(10)],
        "cross": [
            (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
            (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
        ],
    }[shape]  # fmt: skip
    return [
        ((place.x + place.radius * x) * scale, (place.y + place.radius * y) * scale)
        for x, y in corners
    ]


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("place", [ShapePlace(0.5, 0.45, 0.3), ShapePlace(0.31, 0.62, 0.12)])
def test_outlines_cover_what_pillow_fills(shape, place):
    size, fine = 48, 16
    drawn = np.zeros((size, size))
    rows, columns, cover = shapes.coverage(shape, place, size)
    drawn[rows, columns] = cover
    sheet = Image.new("L", (size * fine, size * fine))
    corners = [(x - 0.5, y - 0.5) for x, y in polygon(shape, place, size * fine)]
    ImageDraw.Draw(sheet).polygon(corners, fill=255)
    blocks = np.asarray(sheet, float).reshape(size, fine, size, fine) / 255
    filled = blocks.mean((1, 3))
    assert abs(drawn - filled).mean() * size**2 < 0.07 * filled.sum()
    assert abs(drawn - filled).max() < 0.5  # corners are rounder than a pixel, never more
    assert drawn.sum() == pytest.approx(filled.sum(), rel=0.02)


def test_captions_are_a_closed_language():
    everything = list(shapes.captions())
    assert len(everything) == len(set(everything)) == 80 + 80 * 80 * 4
    assert all(str(shapes.parse(caption)) == caption for caption in EVERY)


@pytest.mark.parametrize(
    ("caption", "hint"),
    [
        ("a large rde circle", '"red"'),
        ("a huge red circle", "small, large"),
        ("large red circle", "captions read like"),
        ("a large red circle next to a small red star", "captions read like"),
        ("a large red circle above", "captions read like"),
        ("", "captions read like"),
    ],
)
def test_other_captions_are_refused_with_a_hint(caption, hint):
    with pytest.raises(UsageError, match="not a shapes caption") as error:
        shapes.parse(caption)
    assert error.value.hint and hint in error.value.hint


@pytest.mark.parametrize("caption", EVERY)
def test_things_lie_inside_apart_and_as_related(caption):
    scene = shapes.parse(caption)
    for key in range(5):
        places = shapes.layout(scene, coarse_uniforms(caption, key)[3:])
        for place in places:
            low, high = place.radius + shapes.MARGIN, 1 - place.radius - shapes.MARGIN
            assert low - 1e-9 <= place.x <= high + 1e-9 and low - 1e-9 <= place.y <= high + 1e-9
        if scene.relation:
            (a, b), (dx, dy) = places, shapes.RELATIONS[scene.relation]
            ahead = (b.x - a.x) * dx + (b.y - a.y) * dy
            across = abs((b.x - a.x) * dy + (b.y - a.y) * dx)
            assert ahead >= a.radius + b.radius + shapes.GAP - 1e-9
            assert across <= shapes.DRIFT + 1e-9 < ahead / 3


def test_extremes_of_the_dice_still_fit():
    scene = shapes.parse("a large red star right of a large blue star")
    for corner in range(2**6):
        u = [float(corner >> bit & 1) * (1 - 2**-32) for bit in range(6)]
        for place in shapes.layout(scene, u):
            assert shapes.MARGIN - 1e-9 <= place.x - place.radius
            assert place.x + place.radius <= 1 - shapes.MARGIN + 1e-9


def test_one_in_ten_pairs_is_held_out_and_never_trained_on():
    pairs = list(islice(shapes.pairs(), 0, None, 3))
    share = sum(map(shapes.held_out, pairs)) / len(pairs)
    assert share == pytest.approx(0.1, abs=0.01)
    assert not any(map(shapes.held_out, shapes.singles()))
    # By hash, so that the split is the same for everybody for ever.
    assert shapes.held_out("a small red circle left of a small green square") is False
    data = open_dataset("shapes")
    captions = data.captions(range(20_000))
    assert not any(map(shapes.held_out, captions))
    share = shapes.SINGLES / (shapes.SINGLES + 0.9 * (1 - shapes.SINGLES))  # held-out pairs go
    singles = sum(shapes.parse(c).second is None for c in captions)
    assert singles == pytest.approx(20_000 * share, rel=0.05)
    assert set(shapes.singles()) <= set(captions)


def test_pictures_depend_on_index_and_key_alone():
    data = open_dataset("shapes")
    together = data.images([3, 9, 4], 32, None, [5, 6, 7])
    assert together.dtype == torch.uint8 and together.shape == (3, 3, 32, 32)
    assert torch.equal(together[1], data.images([9], 32, [False], [6])[0])
    assert not torch.equal(together[1], data.images([9], 32, None, [7])[0])
    assert torch.equal(together.flip(-1), data.images([3, 9, 4], 32, [True] * 3, [5, 6, 7]))
    caption = data.captions([9], [6])[0]
    drawn = torch.from_numpy(shapes.draw(caption, 32, 6)).permute(2, 0, 1)
    assert torch.equal(together[1], drawn)


def test_the_set_describes_itself():
    data = open_dataset("Shapes")
    assert data.kind == "text" and data.native_size is None and len(data) == 50_000
    assert data.fingerprint == open_dataset("shapes").fingerprint
    assert "50000 images" in data.audit.lines()[0]
    with pytest.raises(TypeError):
        data.labels([0])


@pytest.mark.parametrize("size", slow_but([32], [16, 32, 64]))
def test_the_judge_believes_real_pictures_and_no_others(size):
    captions = shapes_eval.prompts(25, seed=2)
    pictures = [shapes.draw(caption, size, key) for key, caption in enumerate(captions)]
    right = [shapes_eval.judge(p, c)["all"] for p, c in zip(pictures, captions, strict=True)]
    assert sum(right) >= 0.98 * len(right)
    moved = captions[1:] + captions[:1]
    assert sum(shapes_eval.judge(p, c)["all"] for p, c in zip(pictures, moved, strict=True)) <= 2


@pytest.mark.parametrize(
    ("shown", "asked", "wrong"),
    [
        ("a large red circle", "a large orange circle", {"colour"}),
        ("a large red circle", "a large red square", {"shape"}),
        ("a large red circle", "a small red circle", {"size"}),
        (
            "a large red circle above a small blue star",
            "a large red circle below a small blue star",
            {"relation"},
        ),
        (
            "a large red circle above a small blue star",
            "a small blue star above a large red circle",
            {"relation"},
        ),
        ("a large red circle above a small blue star", "a large red circle", {"number"}),
    ],
)
def test_the_judge_names_what_is_wrong(shown, asked, wrong):
    verdict = shapes_eval.judge(shapes.draw(shown, 32, 1), asked)
    assert {part for part, right in verdict.items() if not right} == wrong | {"all"}


def test_the_judge_sees_no_shape_in_a_blob_and_nothing_in_an_empty_picture():
    y, x = np.mgrid[:32, :32]
    picture = np.full((32, 32, 3), 240, np.uint8)
    assert not any(shapes_eval.judge(picture, "a large red circle").values())
    picture[(abs(x - 16) < 12) & (abs(y - 16) < 3)] = shapes.COLOURS["red"]
    for shape in shapes.SHAPES:
        assert not shapes_eval.judge(picture, f"a large red {shape}")["shape"]
