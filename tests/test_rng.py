"""Random numbers by coordinates: the published generator, and independence of everything else."""

from __future__ import annotations

import pytest
import torch

from difftool.training.step import rng
from difftool.training.step.rng import Stream

MASK = 0xFFFFFFFF
# Known answers published with Random123 (Salmon et al. 2011) for philox4x32, 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((MASK,) * 4, (MASK, MASK), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = rng.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert " ".join(f"{int(w):08x}" for w in words) == answer


def test_a_draw_depends_on_its_coordinates_alone():
    whole = rng.normal(7, Stream.NOISE, 3, torch.arange(8), (3, 5, 5))
    part = rng.normal(7, Stream.NOISE, 3, torch.tensor([6, 2]), (3, 5, 5))
    assert torch.equal(part, whole[[6, 2]])


@pytest.mark.parametrize(
    "other",
    [(8, Stream.NOISE, 3), (7, Stream.TIME, 3), (7, Stream.NOISE, 4), (7 + 2**40, Stream.NOISE, 3)],
)
def test_other_coordinates_give_other_numbers(other):
    slots = torch.arange(4)
    a = rng.normal(7, Stream.NOISE, 3, slots, (64,))
    seed, stream, step = other
    b = rng.normal(seed, stream, step, slots, (64,))
    assert (a == b).float().mean() < 0.01


def test_normals_are_normal():
    drawn = rng.normal(1, Stream.NOISE, 0, torch.arange(256), (1024,)).flatten().double()
    assert drawn.isfinite().all()
    # Standard errors at n = 2^18 are 0.002 (mean), 0.0014 (std), 0.005 (skew), 0.0096 (kurtosis).
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    assert abs((drawn**3).mean()) < 0.03
    assert abs((drawn**4).mean() - 3) < 0.06


def test_neighbouring_slots_are_uncorrelated():
    drawn = rng.normal(1, Stream.NOISE, 0, torch.arange(2), (65536,))
    assert abs((drawn[0] * drawn[1]).mean()) < 0.02


def test_uniform_is_open_and_even():
    drawn = rng.uniform(3, Stream.TIME, 0, torch.arange(100_000))
    assert 0 < drawn.min() and drawn.max() < 1
    counts = torch.histc(drawn, 10, 0, 1)
    assert (counts - 10_000).abs().max() < 500


def test_an_epoch_visits_every_sample_once_and_in_its_own_order():
    first, second = rng.permutation(1, 0, 1000), rng.permutation(1, 1, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == second).float().mean() < 0.02


def test_keys_belong_to_samples_and_epochs():
    epochs, indices = torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5])
    a, b, c = rng.keys(2, epochs, indices)
    assert len({a, b, c}) == 3
    assert rng.keys(2, epochs[2:], indices[2:]) == [c]


def test_spread_is_the_golden_ratio_sequence_in_single_precision():
    slots = torch.tensor([*range(64), 10**6, 2**31])
    exact = [((int(s) * 2 + 1) * (5**0.5 - 1) / 4) % 1 for s in slots[:64]]
    found = rng.spread(slots)
    assert found.dtype == torch.float32 and 0 < found.min() and found.max() < 1
    assert found[:64].tolist() == pytest.approx(exact, abs=1e-6)
    counts = torch.histc(rng.spread(torch.arange(7000, 7100)), 10, 0, 1)
    assert counts.min() >= 8 and counts.max() <= 12
