"""Aspect buckets: the table, the schedule that starves nobody, and pictures of many shapes."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from folders import lay
from PIL import Image

from difftool.config.schema import DataConfig
from difftool.data import Buckets, Dataset, Schedule, Subset, open_dataset
from difftool.errors import UsageError
from difftool.images.fit import fit, framed
from difftool.training.step import rng

SHAPES = [(40, 40), (80, 40), (40, 80), (66, 40), (20, 20), (400, 40), (41, 40), (39, 41)]


@pytest.fixture
def photos(tmp_path) -> Dataset:
    dice = np.random.default_rng(0)
    for number, (width, height) in enumerate(SHAPES):
        pixels = dice.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return open_dataset(str(tmp_path))


@pytest.mark.parametrize(("size", "step"), [(512, 64), (1024, 64), (512, 8), (64, 8), (96, 64)])
def test_the_table(size, step):
    buckets = Buckets(size, step)
    square = size // step * step
    assert (square, square) in buckets.table
    for width, height in buckets.table:
        assert (height, width) in buckets.table
        assert width % step == height % step == 0
        assert width * height <= size**2 and max(width, height) <= 4 * min(width, height)
        # No larger bucket of this width keeps the area.
        assert width * (height + step) > size**2 or width >= height
    ratios = [width / height for width, height in buckets.table]
    assert ratios == sorted(set(ratios))


def test_the_usual_table_at_512():
    assert Buckets(512, 64, 2.0).table == (
        (384, 640), (448, 576), (512, 512), (576, 448), (640, 384),
    )  # fmt: skip


def test_a_picture_goes_to_the_nearest_shape():
    buckets = Buckets(512, 64)
    for picture in [(3000, 2000), (1, 1), (100, 900), (768, 768), (20000, 10), (641, 500)]:
        off = [abs(math.log(w / h * picture[1] / picture[0])) for w, h in buckets.table]
        assert buckets.of(picture) == buckets.table[off.index(min(off))]
        width, height = buckets.of(picture)
        assert buckets.of((picture[1], picture[0])) == (height, width)


def test_small_pictures_are_enlarged_only_where_wanted():
    up, as_is = Buckets(512, 64), Buckets(512, 64, upscale=False)
    assert up.of((200, 150)) == (576, 448) and as_is.of((200, 150)) == (192, 128)
    assert as_is.of((30, 700)) == (64, 640) and as_is.of((2000, 1500)) == up.of((2000, 1500))
    assert "  1 of 2 are enlarged" in up.lines([(200, 150), (600, 500)])
    assert not any("enlarged" in line for line in as_is.lines([(200, 150), (600, 500)]))


def test_the_printed_table():
    lines = Buckets(512, 64).lines([(512, 512)] * 3 + [(1000, 700)])
    assert lines == [
        "buckets: 2 of about 512x512, sides in multiples of 64",
        "  512x512: 3 images",
        "  576x448: 1 image",
    ]


@pytest.mark.parametrize(("size", "step", "aspect"), [(32, 64, 2), (64, 0, 2), (64, 8, 0.5)])
def test_impossible_buckets(size, step, aspect):
    with pytest.raises(UsageError):
        Buckets(size, step, aspect)


# --- the schedule ----------------------------------------------------------------------------


def order(number: int, count: int) -> list[int]:
    return rng.permutation(3, number, count).tolist()


@pytest.mark.parametrize(
    ("members", "batch"),
    [([100], 8), ([50, 30, 20], 8), ([97, 3, 1], 16), ([1], 4), ([5, 5, 5], 7), ([2, 1000], 64)],
)
def test_every_batch_is_full_of_one_bucket_and_nobody_starves(members, batch):
    buckets = [(64 + 8 * k, 64) for k, n in enumerate(members) for _ in range(n)]
    schedule, total = Schedule(buckets, batch, order), sum(members)
    seen, epochs = Counter(), 12
    number = 0
    for epoch in range(1, epochs + 1):
        while number < schedule.before(epoch):
            drawn = schedule[number]
            assert len(drawn.indices) == len(drawn.passes) == batch
            assert {buckets[i] for i in drawn.indices} == {drawn.bucket}
            if members[(drawn.bucket[0] - 64) // 8] >= 2 * batch:
                assert len(set(drawn.indices)) >= batch - batch // 2
            seen.update(drawn.indices)
            number += 1
        for index, bucket in enumerate(buckets):
            slack = 1 + batch / (2 * members[(bucket[0] - 64) // 8])
            assert abs(seen[index] - epoch) <= slack
    assert abs(number * batch - epochs * total) <= batch * len(members)


def test_passes_go_through_every_picture_once():
    buckets = [(8, 8)] * 10 + [(16, 8)] * 3
    schedule = Schedule(buckets, 4, order)
    seen = Counter()
    for number in range(200):
        drawn = schedule[number]
        seen.update(zip(drawn.passes, drawn.indices, strict=True))
    assert max(seen.values()) == 1
    for index in range(13):
        mine = sorted(n for n, i in seen if i == index)
        assert mine == list(range(len(mine)))


def test_any_batch_can_be_had_alone():
    buckets = [(8 * (1 + i % 3), 8) for i in range(50)]
    straight = [Schedule(buckets, 8, order)[n] for n in range(100)]
    schedule = Schedule(buckets, 8, order)
    for number in (99, 0, 57, 58, 3):
        assert schedule[number] == straight[number]


# --- pictures --------------------------------------------------------------------------------


def test_pictures_fill_their_buckets(photos):
    buckets = Buckets(48, 8)
    photos.prepare(buckets)
    for index, size in enumerate(SHAPES):
        assert photos.picture_size(index) == size
        bucket = photos.bucket(index, buckets)
        assert bucket == buckets.of(size)
        made = photos.images([index, index], bucket, [False, True])
        assert made.shape == (2, 3, bucket[1], bucket[0])
        with Image.open(f"{photos.audit.source}/{index}.png") as image:
            expected = np.asarray(framed(image.convert("RGB"), bucket))
        assert np.array_equal(made[0].permute(1, 2, 0), expected)
        assert torch.equal(made[1], made[0].flip(-1))


def test_memory_and_files_give_the_same(photos, monkeypatch):
    buckets = Buckets(48, 8)
    where = photos.audit.source
    for crop in ("centre", "random"):
        held = open_dataset(where, DataConfig(crop=crop))
        held.prepare(buckets)
        with monkeypatch.context() as patch:
            patch.setattr("difftool.data.pictures.MEMORY_CAP", 10)
            read = open_dataset(where, DataConfig(crop=crop), workers=1)
            read.prepare(buckets)
            for index in range(len(SHAPES)):
                bucket = held.bucket(index, buckets)
                args = [index] * 3, bucket, [False, True, False], [5, 5, 9]
                assert torch.equal(held.images(*args), read.images(*args))
            assert torch.equal(
                held.images([0, 5, 1], 32, None, [1, 2, 3]),
                read.images([0, 5, 1], 32, None, [1, 2, 3]),
            )


def test_random_crops_go_by_the_key(photos):
    data = open_dataset(photos.audit.source, DataConfig(crop="random"))
    assert photos.fixed and not data.fixed
    assert data.fingerprint != photos.fingerprint
    wide = SHAPES.index((400, 40))
    cuts = data.images([wide] * 40, 40, None, range(40))
    assert len({cut.numpy().tobytes() for cut in cuts}) > 30
    assert torch.equal(data.images([0, wide], 40, None, [1, 7])[1], cuts[7])
    with Image.open(f"{photos.audit.source}/{wide}.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    for key in range(40):
        left = data.fit(wide, 40, key).left  # type: ignore[attr-defined]
        assert torch.equal(cuts[key], pixels[:, :, left : left + 40])
    centre = fit((400, 40), (40, 40))
    assert torch.equal(photos.images([wide], 40)[0], pixels[:, :, centre.left : centre.left + 40])


def test_the_place_of_a_crop():
    places = {fit((100, 10), (10, 10), (u / 1000, 0.5)).left for u in range(1000)}
    assert places == set(range(91))
    assert fit((100, 10), (10, 10)) == (100, 10, 45, 0)
    assert fit((30, 20), (60, 60), (0.0, 0.0)) == (90, 60, 0, 0)


def test_strips_cost_no_memory():
    strip = Image.new("RGB", (20_000, 2), (9, 8, 7))
    made = framed(strip, (512, 512))
    assert made.size == (512, 512) and made.getpixel((0, 511)) == (9, 8, 7)


def test_another_size_does_not_throw_away_what_is_held(photos, monkeypatch):
    photos.prepare(40)
    monkeypatch.setattr(photos, "_decode", None)
    assert photos.images([0, 1], 40).shape == (2, 3, 40, 40)
    with pytest.raises(TypeError):
        photos.images([0], 16)
    assert photos.images([0, 1], 40).shape == (2, 3, 40, 40)


# --- parts of a set --------------------------------------------------------------------------


def test_held_out_pictures_stay_so_when_others_come(tmp_path):
    files = {f"{i:03d}.png": None for i in range(60)}
    before = open_dataset(lay(tmp_path, files))
    train, held = before.split(0.2)
    assert len(train) + len(held) == 60 and 4 <= len(held) <= 22
    names = {held.name(i) for i in range(len(held))}
    assert not names & {train.name(i) for i in range(len(train))}
    after = open_dataset(lay(tmp_path, {f"new{i}.png": None for i in range(40)}))
    train, held = after.split(0.2)
    now = {held.name(i) for i in range(len(held))}
    assert {name for name in now if not name.startswith("new")} == names
    assert now != {after.split(0.2, seed=1)[1].name(i) for i in range(len(held))}


def test_a_count_is_held_out(tmp_path):
    data = open_dataset(lay(tmp_path, {f"{i}_x/{k}.png": None for i in (1, 3) for k in range(5)}))
    train, held = data.split(4)
    names = {held.name(i) for i in range(len(held))}
    assert len(names) == 4 and not names & {train.name(i) for i in range(len(train))}
    assert len(data.split(0.0001)[1]) >= 1
    for amount in (0, -1, 10, 1000, 0.9999999):
        with pytest.raises(UsageError, match="hold out"):
            data.split(amount)


def test_a_part_is_a_set(photos):
    part = Subset(photos, [5, 2])
    assert len(part) == 2 and part.picture_size(1) == SHAPES[2]
    assert torch.equal(part.images([1, 0], 16), photos.images([2, 5], 16))
    assert part.content(0) == photos.content(5) and part.captions([0]) == [""]
    assert part.fingerprint != Subset(photos, [2, 5]).fingerprint
    assert part.bucket(0, Buckets(48, 8)) == photos.bucket(5, Buckets(48, 8))
    shapes = open_dataset("shapes")
    _, held = shapes.split(20)
    assert len(held) == 20 and held.bucket(0, Buckets(64, 8)) == (64, 64)


def test_content_follows_the_picture_not_its_name(photos, tmp_path):
    first = photos.content(3)
    (tmp_path / "3.png").rename(tmp_path / "renamed.png")
    again = open_dataset(str(tmp_path))
    names = [again.name(i) for i in range(len(again))]
    assert again.content(names.index("renamed.png")) == first
    assert len({photos.content(i) for i in range(len(photos))}) == len(photos)
