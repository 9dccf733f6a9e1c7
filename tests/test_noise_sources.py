"""Noise of an image depends on its seed alone; Brownian paths against k-diffusion's, bit by bit."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from difftool.diffusion import GRIDS, PATHS, Level
from difftool.diffusion.noise import BrownianNoise, ImageNoise, start_noise

SHAPE = (4, 16, 16)
HERE, THERE = Level(3.0, 1.0, 3.0), Level(1.0, 1.0, 1.0)
GOLDEN = load_file(Path(__file__).with_name("golden") / "k_diffusion.safetensors")
GRID = [Level(rho, 1.0, rho) for rho in GOLDEN["brownian/sigmas"].tolist()]


def test_the_first_noise_is_torchs_of_the_seed():
    expected = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in (3, 9)]
    assert start_noise([3, 9], SHAPE).equal(torch.stack(expected))
    assert ImageNoise([3, 9], SHAPE).start().equal(torch.stack(expected))


def test_an_image_has_the_same_noise_in_any_batch():
    together, alone = ImageNoise([1, 2, 3], SHAPE), ImageNoise([2], SHAPE)
    for _ in range(3):
        assert together(HERE, THERE)[1].equal(alone(HERE, THERE)[0])


def test_draws_follow_one_another():
    source = ImageNoise([5], SHAPE)
    generator = torch.Generator().manual_seed(5)
    for draw in (source.start(), source.draw(), source(HERE, THERE), source(HERE, THERE)):
        assert draw[0].equal(torch.randn(SHAPE, generator=generator))


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits(seed):
    noise = start_noise([seed], SHAPE)
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert BrownianNoise([seed], SHAPE, GRID)(GRID[0], GRID[1]).isfinite().all()


@pytest.mark.parametrize(
    ("name", "seeds", "shape"), [("single", 5, (2, 1, 3, 3)), ("each", [7, 2**40 + 1], (1, 3, 3))]
)
def test_the_increments_of_k_diffusion(name, seeds, shape):
    source = BrownianNoise(seeds, shape, GRID)
    pairs = GOLDEN["brownian/pairs"].tolist()
    assert len(pairs) == len(GOLDEN[f"brownian/{name}"]) == 10
    for (i, j), expected in zip(pairs, GOLDEN[f"brownian/{name}"], strict=True):
        assert source(GRID[i], GRID[j]).equal(expected)


def path(seeds: list[int] | int = 8, shape: tuple[int, ...] = SHAPE) -> BrownianNoise:
    return BrownianNoise(seeds, shape, GRID)


def test_the_order_of_the_steps_does_not_matter():
    steps = list(pairwise(GRID))
    forwards, backwards = path(), path()
    found = [forwards(*step) for step in steps]
    assert all(backwards(*s).equal(z) for s, z in reversed(list(zip(steps, found, strict=True))))


def test_a_path_goes_back_where_it_came_from():
    source = path()
    assert source(GRID[1], GRID[3]).equal(-source(GRID[3], GRID[1]))


def increment(source: BrownianNoise, here: Level, there: Level) -> Tensor:
    return source(here, there) * math.sqrt(abs(here.rho - there.rho))


def test_increments_add_up():
    source = path()
    parts = sum(increment(source, *step) for step in pairwise(GRID))
    assert torch.allclose(torch.as_tensor(parts), increment(source, GRID[0], GRID[-1]), atol=1e-5)


def test_increments_are_unit_noise_and_independent():
    levels = GRIDS["karras"](PATHS["edm"](), 8)
    source = BrownianNoise(3, (64, 32, 32), levels)
    draws = torch.stack([source(*step).flatten() for step in pairwise(levels[:-1])])
    correlations = draws @ draws.T / draws.shape[1]
    assert torch.allclose(correlations, torch.eye(len(draws)), atol=0.03)


def test_a_path_is_of_its_image_alone():
    step = (GRID[2], GRID[4])
    together = path([1, 2, 3])(*step)
    assert together[1].equal(path([2])(*step)[0])
    assert together[1].equal(path(2)(*step))
    assert not together[1].equal(together[0])


def test_a_path_from_alpha_0_is_that_of_infinite_length():
    """Unit noise that is independent of every finite step and wherever the step ends."""
    start = Level(1.0, 0.0, 1.0)
    grid = [start, *GRID]
    source = BrownianNoise(8, (64, 32, 32), grid)
    first = source(start, GRID[0])
    assert first.equal(source(start, GRID[2]))
    assert abs(float(first.std()) - 1) < 0.02
    assert abs(float((first * source(GRID[0], GRID[1])).mean())) < 0.02
    assert source(GRID[0], GRID[1]).equal(path(8, (64, 32, 32))(GRID[0], GRID[1]))


def test_levels_off_the_grid_and_empty_steps_are_finite():
    source = path()
    above = Level(20.0, 1.0, 20.0)
    for here, there in ((above, GRID[0]), (GRID[1], GRID[1]), (above, above)):
        assert source(here, there).isfinite().all()
    assert BrownianNoise([1], SHAPE, GRID[:1])(HERE, THERE).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_noise_is_the_same_on_a_gpu():
    assert start_noise([1, 2], SHAPE, "cuda").cpu().equal(start_noise([1, 2], SHAPE))
    gpu = BrownianNoise([1, 2], SHAPE, GRID, "cuda")
    assert gpu(HERE, THERE).device.type == "cuda"
    assert gpu(HERE, THERE).cpu().equal(path([1, 2])(HERE, THERE))
