"""What is too large for a network to see at once, seen in overlapping windows whose predictions are
mixed at every step (MultiDiffusion 2302.08113): no window has an edge in the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from difftool.devices import on_device
from difftool.diffusion.prediction import Prediction

OVERLAP = 0.25
"""Share of a window's side that it has in common with the next, at least."""
Window = tuple[slice, slice]
"""Rows and columns."""


def in_windows(
    predict: Callable[[Tensor, Window], Prediction], x_t: Tensor, side: int | None
) -> Prediction:
    """What is predicted of x_t [B,C,H,W], in windows of that side at most; None = at once."""
    parts = windows(x_t.shape[2], x_t.shape[3], side)
    if len(parts) == 1:
        return predict(x_t, parts[0])
    x0, eps = torch.zeros_like(x_t), torch.zeros_like(x_t)
    total = torch.zeros_like(x_t[:1, :1])
    for rows, columns in parts:
        part = x_t[:, :, rows, columns]
        weights = _ramp(part.shape[2])[:, None] * _ramp(part.shape[3])
        weights = on_device(weights, x_t.device, x_t.dtype)
        predicted = predict(part, (rows, columns))
        x0[:, :, rows, columns] += weights * predicted.x0
        eps[:, :, rows, columns] += weights * predicted.eps
        total[:, :, rows, columns] += weights
    return Prediction(x0 / total, eps / total)


def windows(height: int, width: int, side: int | None) -> list[Window]:
    """The windows that cover a height and a width, evenly."""
    return [(rows, columns) for rows in _spans(height, side) for columns in _spans(width, side)]


def _spans(length: int, side: int | None) -> list[slice]:
    if side is None or side >= length:
        return [slice(0, length)]
    count = ceil((length - OVERLAP * side) / (side - OVERLAP * side))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    return [slice(start, start + side) for start in starts]


def _ramp(length: int) -> Tensor:
    """Weights that fall from the middle of a window to its ends."""
    places = torch.arange(1, length + 1)
    return torch.minimum(places, places.flip(0)).float() / ((length + 1) // 2)
