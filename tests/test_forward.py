"""The forward process against diffusers' schedulers and the statistics it must have."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image

from difftool import forward
from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS, build_path
from difftool.errors import UsageError

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def image(width=24, height=16):
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


X0 = forward.picture(image())


@pytest.fixture(params=PATHS)
def path(request):
    return build_path({"kind": request.param})


def test_even_levels_run_from_clean_to_noisy_over_the_whole_path(path):
    levels = forward.even_levels(path, 9)
    snr = [level.half_log_snr for level in levels]
    assert len(levels) == 9
    assert snr == sorted(snr, reverse=True) and len(set(snr)) == 9
    assert snr[0] >= path.at_index(0).half_log_snr
    assert levels[-1] == path.level(path.t_max)


def test_all_levels_of_a_table_are_its_entries():
    path = build_path({"kind": "linear", "steps": 250})
    assert forward.even_levels(path) == [path.level(t) for t in range(250)]
    assert [level.t for level in forward.even_levels(path, 4)] == [0, 83, 166, 249]
    with pytest.raises(UsageError, match="more levels"):
        forward.even_levels(path, 251)


def test_a_flow_begins_with_the_picture_and_keeps_its_shift():
    levels = forward.even_levels(build_path({"kind": "flow", "shift": 3.0}), 3)
    assert [level.t for level in levels] == [0, 0.75, 1]


def test_an_edm_path_is_even_in_log_sigma():
    levels = forward.even_levels(build_path({"kind": "edm"}), 3)
    assert [level.sigma for level in levels] == pytest.approx([0.002, 0.4, 80])


def test_rows_are_those_of_the_published_table():
    bar = DDPMScheduler(**SD15).alphas_cumprod.double()
    rows = forward.rows(forward.even_levels(build_path({"kind": "scaled_linear"})))
    assert [row["index"] for row in rows] == [row["t"] for row in rows] == list(range(1000))
    np.testing.assert_allclose([r["alpha"] for r in rows], bar.sqrt(), rtol=2e-5)
    np.testing.assert_allclose([r["sigma"] for r in rows], (1 - bar).sqrt(), rtol=2e-5)
    np.testing.assert_allclose([r["log_snr"] for r in rows], (bar / (1 - bar)).log(), atol=1e-4)


def test_csv_and_json_carry_the_rows_and_the_infinite_ends():
    levels = forward.even_levels(build_path({"kind": "flow"}), 5)
    rows = forward.rows(levels)
    read = list(csv.DictReader(io.StringIO(forward.csv_text(levels))))
    assert [{key: float(value) for key, value in row.items()} for row in read] == rows
    assert [row["log_snr"] for row in read][:: len(read) - 1] == ["inf", "-inf"]
    strict = json.loads(json.dumps(forward.json_rows(levels), allow_nan=False))
    assert strict[1:-1] == rows[1:-1]
    assert strict[0]["log_snr"] is strict[-1]["log_snr"] is None


def test_the_table_is_aligned_and_its_bars_are_the_signal_share():
    levels = forward.even_levels(build_path({"kind": "flow"}), 5)
    plain, barred = forward.table(levels), forward.table(levels, bars=True)
    assert len({len(line) for line in plain}) == 1
    assert all(long.startswith(short) for short, long in zip(plain, barred, strict=True))
    assert [line.count("█") for line in barred[1:]] == [24, 21, 12, 2, 0]


def test_decibels():
    level = build_path({"kind": "edm"}).level(10.0)
    assert forward.decibels(level) == pytest.approx(-20)
    assert forward.log_snr(level) == pytest.approx(-2 * math.log(10))


def test_marginals_are_those_of_diffusers():
    scheduler = DDPMScheduler(**SD15)
    levels = forward.even_levels(build_path({"kind": "scaled_linear"}), 6)
    z = np.random.default_rng(3).standard_normal(X0.shape, dtype=np.float32)
    for level, x_t in zip(levels, forward.marginals(X0, levels, 3), strict=True):
        t = torch.IntTensor([int(level.t)])
        expected = scheduler.add_noise(torch.tensor(X0), torch.tensor(z), t)
        np.testing.assert_allclose(x_t, expected, atol=2e-6)
        assert x_t.dtype == np.float32


def test_the_chain_takes_ddpms_steps():
    betas = DDPMScheduler(**SD15).betas.double().numpy()
    path = build_path({"kind": "scaled_linear"})
    levels = forward.chain_levels(path, [])
    rng = np.random.default_rng((5, 1))
    expected = X0.astype(np.float64)
    for beta, x_t in zip(betas, forward.chain(X0, levels, 5), strict=True):
        z = rng.standard_normal(X0.shape, dtype=np.float32)
        expected = math.sqrt(1 - beta) * expected + math.sqrt(beta) * z
        np.testing.assert_allclose(x_t, expected, atol=1e-4)


def test_the_chain_arrives_at_the_marginals_on_every_path(path):
    x0 = forward.picture(image(48, 40))
    levels = forward.even_levels(path, 5)
    pictures, check = forward.walk(x0, path, levels, 0)
    assert len(pictures) == 5
    assert check.transitions >= 1000
    assert 0 < check.mean < 5 / math.sqrt(x0.size)
    assert 0 < check.std < 5 / math.sqrt(2 * x0.size)
    assert not np.allclose(pictures[-1], forward.marginals(x0, levels, 0)[-1])


def test_the_check_of_the_chain_sees_a_wrong_chain(monkeypatch):
    path = build_path({"kind": "sd15"})
    levels = forward.even_levels(path, 4)
    right = forward.chain
    monkeypatch.setattr(forward, "chain", lambda *a: (1.2 * x_t for x_t in right(*a)))
    _, check = forward.walk(forward.picture(image(48, 40)), path, levels, 0)
    assert check.std > 0.1


@pytest.mark.parametrize(("kind", "schedule"), [("sd15", "karras"), ("sd21-zsnr", "trailing")])
def test_the_chain_passes_through_the_levels_of_a_sampler(kind, schedule):
    path = build_path({"kind": kind})
    levels = GRIDS[schedule](path, 6)[::-1]
    pictures, _ = forward.walk(X0, path, levels, 0)
    assert len(pictures) == len(levels)
    np.testing.assert_array_equal(pictures[0], X0)  # the clean end


def test_noise_depends_on_the_seed_alone():
    levels = forward.even_levels(build_path({"kind": "sd15"}), 3)
    first, again, other = (forward.marginals(X0, levels, seed)[-1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_a_clean_picture_is_shown_as_it_is():
    clean = build_path({"kind": "flow"}).level(0.0)
    np.testing.assert_array_equal(forward.visible(X0, clean), np.asarray(image()))


def test_only_growing_variance_is_scaled_down(path):
    level = path.level(path.t_max)
    x_t = np.array([-3.0, 0.0, 3.0]) * math.hypot(level.alpha, level.sigma)
    assert forward.visible(x_t, level).tolist() == [0, 128, 255]
    x_t = np.array([0.5]) * max(1.0, level.sigma)
    assert abs(int(forward.visible(x_t, level)[0]) - 191) <= 1


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((24, 16), None, (16, 24)), ((600, 300), None, (128, 256)), ((24, 16), 48, (32, 48))],
)
def test_pictures_are_only_enlarged_when_asked(size, side, expected):
    x0 = forward.picture(image(*size), side)
    assert x0.shape == (*expected, 3)
    assert x0.dtype == np.float32
    assert -1 <= x0.min() < x0.max() <= 1


def place(page: Image.Image, frame: np.ndarray) -> tuple[int, int]:
    """Where on a page (x, y) the middle row of a frame is seen; it is seen once."""
    row = frame[len(frame) // 2].tobytes()
    assert page.tobytes().count(row) == 1
    y, x = divmod(page.tobytes().index(row) // 3, page.width)
    return x, y


def test_a_strip_shows_every_frame_once_from_left_to_right():
    x0 = forward.picture(image(160, 90))
    path = build_path({"kind": "sd15"})
    levels = forward.even_levels(path, 5)
    page = forward.draw(forward.strip_sheet(x0, "sd15", path, levels, 0))
    pictures = forward.marginals(x0, levels, 0)
    frames = map(forward.visible, pictures, levels)
    xs, ys = zip(*(place(page, frame) for frame in frames), strict=True)
    assert list(xs) == sorted(xs) and len(set(ys)) == 1


def test_small_pictures_are_magnified_by_whole_pixels():
    x0 = forward.picture(image(16, 9))
    path = build_path({"kind": "flow"})
    page = forward.draw(forward.strip_sheet(x0, "flow", path, [path.level(0.0)], 0))
    row = np.asarray(image(16, 9))[4].repeat(10, 0)
    assert page.tobytes().count(row.tobytes()) == 10


@pytest.mark.parametrize("count", [1, 10, 11, 23])
def test_long_strips_are_broken_into_even_lines(count):
    path = build_path({"kind": "edm"})
    levels = forward.even_levels(path, count)
    page = forward.draw(forward.strip_sheet(X0, "edm", path, levels, 0))
    line = forward.draw(forward.strip_sheet(X0, "edm", path, levels[:1], 0))
    extra = page.height - line.height
    assert (extra == 0) == (count <= 10)
    assert page.width <= 10 * line.width


def test_the_sheets_of_chain_and_comparison():
    path = build_path({"kind": "sd15", "steps": 50})
    levels = forward.even_levels(path, 4)
    sheet, check = forward.markov_sheet(X0, "sd15", path, levels, 0)
    assert [band.title for band in sheet.bands] == ["marginals", "chain"]
    assert f"{check.std:.4f}" in sheet.caption
    assert check.transitions == 50
    paths = {name: build_path({"kind": name}) for name in PATHS}
    compared = forward.compare_sheet(X0, paths, 4, 0)
    assert [band.title for band in compared.bands] == list(PATHS)
    tall, low = forward.draw(compared), forward.draw(sheet)
    assert tall.height > 2 * low.height and tall.width > low.width


def test_the_curves_are_drawn_in_the_colours_of_their_bands():
    paths = {name: build_path({"kind": name}) for name in ("linear", "flow")}
    page = np.asarray(forward.draw(forward.compare_sheet(X0, paths, 2, 0)))
    right = page[:, -page.shape[1] // 3 :].reshape(-1, 3).tolist()
    for color in forward.COLORS[:2]:
        assert [int(color[i : i + 2], 16) for i in (1, 3, 5)] in right


def test_a_strip_that_would_fill_the_memory_is_refused():
    path = build_path({"kind": "flow"})
    with pytest.raises(UsageError, match="too large"):
        forward.strip_sheet(X0, "flow", path, forward.even_levels(path, 10_000), 0)
