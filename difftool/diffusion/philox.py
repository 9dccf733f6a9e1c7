"""Philox4x32-10, and the normal numbers that CUDA makes of it. Torch-free at import.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), vectorised in integers of
torch: a whole batch in one go, the same integers on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from difftool.devices import on_device

if TYPE_CHECKING:
    from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
UNIT = 2.0**-32
CIRCLE = 6.2831855 * 2.3283064e-10
"""2 pi in units of 2^-32, as cuRAND has it; it is rounded to fp32."""


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors holding 32-bit words to four of the same shape.

    Both halves of a round are one tensor, which halves the kernels on a GPU. They change places in
    each: (c0, c2) becomes (c2, c0), and after ten rounds they are where they were.
    """
    import torch

    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    multiplied, other = torch.stack([c0, c2]), torch.stack([c1, c3])
    keys = [[(k + r * weyl) & MASK for k, weyl in zip(key, WEYL, strict=True)] for r in range(10)]
    swapped = [pair[:: (1 if r % 2 else -1)] for r, pair in enumerate(keys)]
    shape = (-1, 2, *[1] * c0.dim())
    factors = on_device([MULTIPLIERS, MULTIPLIERS[::-1]], c0.device).view(shape)
    for r, pair in enumerate(on_device(swapped, c0.device).view(shape)):
        # The product wraps to 64 bits; its bits are right, which is all that is used.
        product = multiplied * factors[r % 2]
        multiplied = ((product >> 32) & MASK) ^ other.flip(0) ^ pair
        other = product & MASK
    return multiplied[0], other[0], multiplied[1], other[1]


class CudaGenerator:
    """torch.Generator("cuda") in plain arithmetic, on the CPU: normal numbers of a seed.

    Number i of draw k is the first that cuRAND's Box-Muller makes of the counter (k, 0, i, 0) under
    the seed as key. So PyTorch draws on a card with a thread for each number, which holds up to
    4x128x128 on any card of some size; and A1111's web interface, as "NV", whatever the card. In
    float64 to the end, where a card rounds on the way: its numbers are within 1e-6 of these.
    """

    def __init__(self, seed: int):
        self.seed, self.draws = seed, 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next numbers; fp32 of that shape."""
        import torch

        count = math.prod(shape)
        place, zero = torch.arange(count), torch.zeros(1, dtype=torch.int64)
        counter = (zero + self.draws, zero, place & MASK, place >> 32)
        key = self.seed & MASK, (self.seed >> 32) & MASK
        radius, angle, _, _ = (word.double() for word in philox(counter, key))
        circle = torch.tensor(CIRCLE, dtype=torch.float32).item()
        length = (-2 * (radius * UNIT + UNIT / 2).log()).sqrt()
        self.draws += 1
        return (length * (angle * circle + circle / 2).sin()).float().reshape(*shape)
