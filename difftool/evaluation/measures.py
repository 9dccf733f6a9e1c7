"""Distances of two sets of features, [N,D] and [M,D]; torch-free, all in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating[Any]]
"""[N,D]: a row a picture."""
SUBSETS, SUBSET, SEED = 100, 1000, 2020
"""Of KID: how many subsets of how many pictures are drawn, and by which seed (torch-fidelity)."""
NEIGHBOURS = 3
"""Of precision and recall (1904.06991)."""
ROWS = 2048
"""Whose distances to all others are in memory at once."""


def frechet_distance(made: Features, reference: Features) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^1/2) of the two Gaussians (FID, 1706.08500, eq. 6)."""
    one, other = made.astype(np.float64), reference.astype(np.float64)
    apart = one.mean(0) - other.mean(0)
    s, t = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (one, other))
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # (S T)^1/2 has the eigenvalues of (S^1/2 T S^1/2)^1/2, which is symmetric
    both = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(min=0)).sum()
    return max(0.0, float(apart @ apart + np.trace(s) + np.trace(t) - 2 * both))


def kernel_distance(
    made: Features, reference: Features, subset: int | None = None
) -> tuple[float, float]:
    """KID (1801.01401): the unbiased squared MMD by the kernel (x y / D + 1)^3, its mean and
    deviation over SUBSETS of that many pictures each; None = `subset_size`."""
    size = subset or subset_size(len(made), len(reference))
    rng = np.random.RandomState(SEED)
    found = []
    for _ in range(SUBSETS):
        one = made[rng.choice(len(made), size, replace=False)].astype(np.float64)
        other = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        found.append(_squared_mmd(one, other))
    return float(np.mean(found)), float(np.std(found))


def subset_size(made: int, reference: int) -> int:
    """SUBSET, or half of the smaller set where there are fewer."""
    least = min(made, reference)
    return SUBSET if least >= SUBSET else least // 2


def _squared_mmd(one: Features, other: Features) -> float:
    def kernel(x: Features, y: Features) -> Features:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(one)
    within = sum(k.sum() - np.trace(k) for k in (kernel(one, one), kernel(other, other)))
    return within / (n * (n - 1)) - 2 * kernel(one, other).mean()


def precision_recall(made: Features, reference: Features) -> tuple[float, float]:
    """The share of what is made that lies among the reference, and the share of the reference that
    lies among what is made (1904.06991): within the distance of a picture of the other set to its
    third neighbour there."""
    return _covered(made, reference), _covered(reference, made)


def _covered(points: Features, by: Features) -> float:
    """The share of points that are within the radius of any of the others."""
    radii = np.concatenate(
        [np.partition(rows, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for rows in _distances(by, by)]
    )  # the nearest to each is itself
    return float(np.concatenate([(rows <= radii).any(1) for rows in _distances(points, by)]).mean())


def _distances(ones: Features, others: Features) -> Iterator[Features]:
    """Squared, some rows at a time."""
    others = others.astype(np.float64)
    squares = (others**2).sum(1)
    for first in range(0, len(ones), ROWS):
        some = ones[first : first + ROWS].astype(np.float64)
        yield ((some**2).sum(1)[:, None] + squares - 2 * some @ others.T).clip(min=0)
