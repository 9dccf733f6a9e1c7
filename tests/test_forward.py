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

from difftool.diffusion.grids import GRIDS
from difftool.diffusion.path import PATHS, build_path
from difftool.errors import UsageError
from difftool.forward import process
from difftool.forward.figures import compare_figure, marginal_figure, markov_figure
from difftool.forward.levels import (
    csv_text,
    decibels,
    even_levels,
    finite,
    log_snr,
    psnr,
    rows,
    short,
    table,
    typeset,
)
from difftool.forward.process import PixelSpace, chain, chain_levels, marginals, unit, walk

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def image(width=24, height=16):
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


SPACE = PixelSpace(image())
X0 = SPACE.x0


@pytest.fixture(params=PATHS)
def path(request):
    return build_path({"kind": request.param})


# --- levels ----------------------------------------------------------------------------------


def test_even_levels_run_from_clean_to_noisy_over_the_whole_path(path):
    levels = even_levels(path, 9)
    snr = [level.half_log_snr for level in levels]
    assert len(levels) == 9
    assert snr == sorted(snr, reverse=True) and len(set(snr)) == 9
    assert snr[0] >= path.at_index(0).half_log_snr
    assert levels[-1] == path.level(path.t_max)


def test_all_levels_of_a_table_are_its_entries():
    path = build_path({"kind": "linear", "steps": 250})
    assert even_levels(path) == [path.level(t) for t in range(250)]
    assert [level.t for level in even_levels(path, 4)] == [0, 83, 166, 249]
    with pytest.raises(UsageError, match="more levels"):
        even_levels(path, 251)


def test_a_flow_begins_with_the_picture_and_keeps_its_shift():
    levels = even_levels(build_path({"kind": "flow", "shift": 3.0}), 3)
    assert [level.t for level in levels] == [0, 0.75, 1]


def test_an_edm_path_is_even_in_log_sigma():
    levels = even_levels(build_path({"kind": "edm"}), 3)
    assert [level.sigma for level in levels] == pytest.approx([0.002, 0.4, 80])


def test_rows_are_those_of_the_published_table():
    bar = DDPMScheduler(**SD15).alphas_cumprod.double()
    found = rows(even_levels(build_path({"kind": "scaled_linear"})))
    assert [row["index"] for row in found] == [row["t"] for row in found] == list(range(1000))
    np.testing.assert_allclose([r["alpha"] for r in found], bar.sqrt(), rtol=2e-5)
    np.testing.assert_allclose([r["sigma"] for r in found], (1 - bar).sqrt(), rtol=2e-5)
    np.testing.assert_allclose([r["log_snr"] for r in found], (bar / (1 - bar)).log(), atol=1e-4)


def test_csv_and_json_carry_the_rows_and_the_infinite_ends():
    found = rows(even_levels(build_path({"kind": "flow"}), 5))
    read = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [{key: float(value) for key, value in row.items()} for row in read] == found
    assert [row["log_snr"] for row in read][:: len(read) - 1] == ["inf", "-inf"]
    strict = json.loads(json.dumps(finite(found), allow_nan=False))
    assert strict[1:-1] == found[1:-1]
    assert strict[0]["log_snr"] is strict[-1]["log_snr"] is None


def test_errors_are_columns_of_their_own():
    found = rows(even_levels(build_path({"kind": "flow"}), 3), [0.0, 0.2, 2.0])
    assert list(found[0])[-2:] == ["rmse", "psnr"]
    assert [row["psnr"] for row in found] == [math.inf, pytest.approx(20), 0]
    assert finite(found)[0]["psnr"] is None
    # The same in the units of an 8-bit picture.
    assert psnr(0.1) == pytest.approx(20 * math.log10(255 / (0.1 * 127.5)))


def test_the_table_is_aligned_and_its_bars_are_the_signal_share():
    levels = even_levels(build_path({"kind": "flow"}), 5)
    plain, barred = table(levels), table(levels, bars=True)
    assert len({len(line) for line in plain}) == 1
    assert all(long.startswith(short) for short, long in zip(plain, barred, strict=True))
    assert [line.count("█") for line in barred[1:]] == [24, 21, 12, 2, 0]


def test_decibels():
    level = build_path({"kind": "edm"}).level(10.0)
    assert decibels(level) == pytest.approx(-20)
    assert log_snr(level) == pytest.approx(-2 * math.log(10))


def test_numbers_are_typeset():
    assert [typeset(v) for v in (-0.04, 0.04, -2.36, math.inf, -math.inf)] == [
        "0.0", "0.0", "−2.4", "∞", "−∞",
    ]  # fmt: skip
    assert [short(v) for v in (999.0, 999.6, 0.00057, 1 / 3, 80.0)] == [
        "999", "1e+03", "0.00057", "0.333", "80",
    ]  # fmt: skip


# --- the process -----------------------------------------------------------------------------


def test_marginals_are_those_of_diffusers():
    scheduler = DDPMScheduler(**SD15)
    levels = even_levels(build_path({"kind": "scaled_linear"}), 6)
    z = np.random.default_rng(3).standard_normal(X0.shape, dtype=np.float32)
    for level, x_t in zip(levels, marginals(X0, levels, 3), strict=True):
        t = torch.IntTensor([int(level.t)])
        expected = scheduler.add_noise(torch.tensor(X0), torch.tensor(z), t)
        np.testing.assert_allclose(x_t, expected, atol=2e-6)
        assert x_t.dtype == np.float32


def test_the_chain_takes_ddpms_steps():
    betas = DDPMScheduler(**SD15).betas.double().numpy()
    path = build_path({"kind": "scaled_linear"})
    levels = chain_levels(path, [])
    rng = np.random.default_rng((5, 1))
    expected = X0.astype(np.float64)
    for beta, x_t in zip(betas, chain(X0, levels, 5), strict=True):
        z = rng.standard_normal(X0.shape, dtype=np.float32)
        expected = math.sqrt(1 - beta) * expected + math.sqrt(beta) * z
        np.testing.assert_allclose(x_t, expected, atol=1e-4)


def test_the_chain_arrives_at_the_marginals_on_every_path(path):
    x0 = PixelSpace(image(48, 40)).x0
    levels = even_levels(path, 5)
    pictures, check = walk(x0, path, levels, 0)
    assert len(pictures) == 5
    assert check.transitions >= 1000
    assert 0 < check.mean < 5 / math.sqrt(x0.size)
    assert 0 < check.std < 5 / math.sqrt(2 * x0.size)
    assert not np.allclose(pictures[-1], list(marginals(x0, levels, 0))[-1])


def test_the_check_of_the_chain_sees_a_wrong_chain(monkeypatch):
    path = build_path({"kind": "sd15"})
    levels = even_levels(path, 4)
    monkeypatch.setattr(process, "chain", lambda *a: (1.2 * x_t for x_t in chain(*a)))
    _, check = walk(PixelSpace(image(48, 40)).x0, path, levels, 0)
    assert check.std > 0.1


@pytest.mark.parametrize(("kind", "schedule"), [("sd15", "karras"), ("sd21-zsnr", "trailing")])
def test_the_chain_passes_through_the_levels_of_a_sampler(kind, schedule):
    path = build_path({"kind": kind})
    levels = GRIDS[schedule](path, 6)[::-1]
    pictures, _ = walk(X0, path, levels, 0)
    assert len(pictures) == len(levels)
    np.testing.assert_array_equal(pictures[0], X0)  # the clean end


def test_noise_depends_on_the_seed_alone():
    levels = even_levels(build_path({"kind": "sd15"}), 3)
    first, again, other = (list(marginals(X0, levels, seed))[-1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_a_clean_picture_is_shown_as_it_is():
    clean = build_path({"kind": "flow"}).level(0.0)
    np.testing.assert_array_equal(SPACE.to_pixels(unit(X0, clean)), np.asarray(image()))


def test_only_growing_variance_is_scaled_down(path):
    level = path.level(path.t_max)
    x_t = np.array([-3.0, 0.0, 3.0]) * math.hypot(level.alpha, level.sigma)
    assert SPACE.to_pixels(unit(x_t, level)).tolist() == [0, 128, 255]
    x_t = np.array([0.5]) * max(1.0, level.sigma)
    assert abs(int(SPACE.to_pixels(unit(x_t, level))[0]) - 191) <= 1


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((24, 16), None, (24, 16)), ((600, 300), None, (256, 128)), ((24, 16), 48, (48, 32))],
)
def test_pictures_are_only_enlarged_when_asked(size, side, expected):
    space = PixelSpace(image(*size), side)
    assert space.size == expected and space.x0.shape == (*expected[::-1], 3)
    assert space.x0.dtype == np.float32
    assert -1 <= space.x0.min() < space.x0.max() <= 1


# --- figures ----------------------------------------------------------------------------------


def test_the_figures_of_chain_and_comparison():
    path = build_path({"kind": "sd15", "steps": 50})
    levels = even_levels(path, 4)
    figure, check = markov_figure(SPACE, "sd15", path, levels, 0)
    assert [strip.title for strip in figure.strips] == ["marginals", "chain"]
    assert f"{check.std:.4f}" in figure.caption
    assert check.transitions == 50
    assert figure.rows() == rows(levels)
    paths = {name: build_path({"kind": name}) for name in PATHS}
    compared = compare_figure(
        SPACE, paths, {name: even_levels(path, 4) for name, path in paths.items()}, 0
    )
    assert [strip.title for strip in compared.strips] == list(PATHS)
    assert [row["path"] for row in compared.rows()] == [name for name in PATHS for _ in range(4)]


def test_the_frames_of_a_strip_are_its_marginals():
    path = build_path({"kind": "edm"})
    levels = even_levels(path, 3)
    (strip,) = marginal_figure(SPACE, "edm", path, levels, 5).strips
    for frame, x_t, level in zip(strip.frames, marginals(X0, levels, 5), levels, strict=True):
        np.testing.assert_array_equal(frame, SPACE.to_pixels(unit(x_t, level)))


def test_a_strip_that_would_fill_the_memory_is_refused():
    path = build_path({"kind": "flow"})
    with pytest.raises(UsageError, match="too large"):
        marginal_figure(SPACE, "flow", path, even_levels(path, 10_000), 0)
