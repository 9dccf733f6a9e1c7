"""Averages of a run's weights whose length is chosen afterwards, from snapshots of two others
(Karras et al. 2024, 2312.02696, section 3).

The weights of step i grow like i^gamma; a profile's length is its standard deviation, as a share of
the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difftool.errors import InputError, UsageError
from difftool.formats import open_model
from difftool.formats.native import write_native
from difftool.storage import runs
from difftool.storage.safetensors import load_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 0.28
"""The relative deviation of a flat profile, 12^-1/2, is the end of what power functions reach."""
MISFIT = 0.1
"""Largest share of a wanted profile that stored ones may leave unexplained."""


def exponent(length: float) -> float:
    """gamma >= 0 of the profile i^gamma whose standard deviation is `length` of the run:
    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    if not 0 < length <= LONGEST:
        why = f"it is a share of the run, more than 0 and at most {LONGEST}"
        raise UsageError(f"an average of length {length:g} cannot be made", why)
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by their step, in order."""
    return runs.by_step(folder, ".safetensors")


def reconstruct(folder: Path, length: float) -> tuple[dict[str, Tensor], float]:
    """Weights (fp32, by name) averaged over `length` of the run up to its last snapshot, from the
    snapshots in a folder; and the share of that average's profile that they leave unexplained.

    UsageError if there are none, or if they cannot make it.
    """
    found = snapshots(folder)
    if not found:
        hint = "train with --set train.ema_profile=power"
        raise UsageError(f"there are no averages to choose from in {folder}", hint=hint)
    points: list[tuple[int, float]] = []
    places: list[tuple[Path, str]] = []
    for step, path in found.items():
        for rule in dict.fromkeys(n.partition("/")[0] for n in read_header(path).tensors):
            points.append((step, exponent(_number(rule, path))))
            places.append((path, f"{rule}/"))
    shares, misfit = combine(points, (max(found), exponent(length)))
    if misfit > MISFIT:
        stored = ", ".join(dict.fromkeys(prefix.rstrip("/") for _, prefix in places))
        why = f"{len(found)} snapshots of lengths {stored} leave {misfit:.0%} of it unexplained"
        raise UsageError(f"an average of length {length:g} cannot be made from {folder}", why)
    total: dict[str, Tensor] = {}
    for (path, prefix), share in zip(places, shares, strict=True):
        for name, value in load_tensors(path).items():
            if name.startswith(prefix):
                name, value = name.removeprefix(prefix), value.float() * share
                total[name] = total[name].add_(value) if name in total else value
    return total, misfit


def write_model(run: Path, length: float, path: Path) -> tuple[float, tuple[str, ...]]:
    """The model of a run folder with its weights averaged over `length`, as a difftool file; the
    share of that average that could not be made, and what is odd about the run's files."""
    made, misfit = reconstruct(run / runs.AVERAGES, length)
    source = open_model(run)
    tensors = source.load()
    if unknown := made.keys() - tensors.keys():
        why = f"the model has no {sorted(unknown)[0]}"
        raise InputError(f"the averages in {run / runs.AVERAGES} are another model's", why)
    note = {"difftool.weights": "ema", "ema_length": f"{length:g}"}
    write_native(
        path, source.preset, tensors | made, tokenizer_json=source.tokenizer_json,
        extra_metadata=note,
    )  # fmt: skip
    return misfit, source.warnings


def combine(
    points: Sequence[tuple[int, float]], wanted: tuple[int, float]
) -> tuple[list[float], float]:
    """The shares of stored averages (step, gamma) whose sum is nearest to the wanted one, by least
    squares over their profiles; and the norm of what is left, relative to the wanted profile's."""
    gram = np.array([[_overlap(a, b) for b in points] for a in points])
    aim, norm = np.array([_overlap(a, wanted) for a in points]), _overlap(wanted, wanted)
    scale = np.sqrt(np.diag(gram))
    shares = np.linalg.lstsq(gram / np.outer(scale, scale), aim / scale, rcond=1e-12)[0] / scale
    left = norm - 2 * shares @ aim + shares @ gram @ shares
    return shares.tolist(), float(np.sqrt(max(left, 0.0) / norm))


def _overlap(a: tuple[int, float], b: tuple[int, float]) -> float:
    """The integral of the product of the profiles (gamma + 1) x^gamma / t^(gamma + 1), x in [0, t],
    of two averages (t, gamma)."""
    (s, f), (t, g) = a, b
    low = min(s, t)
    return (f + 1) * (g + 1) / (f + g + 1) * (low / s) ** f * (low / t) ** g * low / (s * t)


def _number(rule: str, path: Path) -> float:
    try:
        return float(rule)
    except ValueError:
        raise InputError(f"{path} holds no averages by length", f'"{rule}" is no length') from None
