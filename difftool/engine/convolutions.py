"""Ways to convolve on a CPU in fp32, all of the same sums: with weights laid out once, in another
order, or by fewer multiplications.

A linear layer of tokens [B,N,C] is here a 1x1 convolution of pictures [B,C,1,N], whose channels are
innermost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16 << 20
"""Bytes of tiles that are transformed at once, so that they are still in the cache after it."""
STRIP = 32 << 20
"""Bytes of a picture that NNPACK is given at once; it takes four times as many besides."""


class Case(NamedTuple):
    """What is convolved."""

    x: torch.Size
    """[B,I,H,W]."""
    weight: torch.Size
    """[O,I,k,k]."""
    stride: int = 1
    padding: int = 0
    last: bool = False
    """Whether channels are innermost in x, as they then are in what is made of it."""

    @property
    def form(self) -> torch.memory_format:
        """How x lies, and what is made of it."""
        return torch.channels_last if self.last else torch.contiguous_format


class Kind(NamedTuple):
    """A way to convolve: what is made of the weights once, and used in their place."""

    fits: Callable[[Case], bool]
    """Whether a case is computed, and worth a trial."""
    convolve: Callable[[Tensor, Tensor, Tensor | None, Case], Tensor]
    """(x, prepared weights, bias [O], case) -> [B,O,H',W']."""
    prepare: Callable[[Tensor, Case], Tensor] | None = None
    """Of the weights [O,I,k,k]; None: nothing is made of them."""
    size: float = 0
    """Of what is made, in sizes of the weights."""


class Winograd(NamedTuple):
    """F(m x m, 3 x 3), which makes m x m outputs of (m + 2) x (m + 2) inputs by as many products
    (Winograd 1980; Lavin and Gray 2015, 1509.09308, equation 8): y = A' ((G w G') * (B' x B)) A.
    """

    inputs: Tensor
    """B' [m+2,m+2]."""
    kernel: Tensor
    """G [m+2,3]."""
    outputs: Tensor
    """A' [m,m+2]."""

    def prepare(self, weight: Tensor, case: Case) -> Tensor:
        """[(m+2)^2,I,O], inputs innermost."""
        made = torch.kron(self.kernel, self.kernel) @ weight.reshape(-1, 9).T
        return made.view(-1, *weight.shape[:2]).transpose(1, 2)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
        (m, n), (batch, wide, *size), p = self.outputs.shape, x.shape, case.padding
        height, width = (side + 2 * p - 2 for side in size)
        rows, columns, out = -(-height // m), -(-width // m), weight.shape[2]
        beyond = columns * m + 2 - p - size[1], rows * m + 2 - p - size[0]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, p, beyond[0], p, beyond[1]))
        tiles = padded.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)
        inputs, outputs = (torch.kron(each, each) for each in (self.inputs, self.outputs))
        y = torch.empty((batch, out, rows * m, columns * m), memory_format=case.form)
        split = y.permute(0, 2, 3, 1).unflatten(2, (-1, m)).unflatten(1, (-1, m))
        step = max(1, CHUNK // (x.itemsize * n * n * batch * columns * max(wide, out)))
        for start in range(0, rows, step):
            some = tiles[:, :, :, start : start + step].reshape(n * n, -1)
            products = torch.bmm((inputs @ some).view(n * n, -1, wide), weight)
            if bias is not None:
                products[n + 1] += bias  # the point (1, 1) goes into each output once
            sums = (outputs @ products.flatten(1)).view(m, m, batch, -1, columns, out)
            split[:, start : start + step] = sums.permute(2, 3, 0, 4, 1, 5)
        return y[:, :, :height, :width]


TWO = Winograd(
    torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]]),
)
FOUR = Winograd(
    torch.tensor(
        [
            [4.0, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
    torch.tensor(
        [[6.0, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
    ) / 24,
    torch.tensor(
        [[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    ),
)  # fmt: skip


def _three(case: Case) -> bool:
    return case.weight[2:] == (3, 3) and case.stride == 1


def _one(case: Case) -> bool:
    return case.weight[2:] == (1, 1) and case.stride == 1 and case.padding == 0 and case.last


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    return F.conv2d(x, weight, bias, case.stride, case.padding)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _laid_out(weight: Tensor, case: Case) -> Tensor:
    """Weights as oneDNN's convolution of a case wants them, which else lays them out each time."""
    stride, padding, x = [case.stride] * 2, [case.padding] * 2, list(case.x)
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(weight.contiguous(), padding, stride, [1, 1], 1, x)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    stride, padding = [case.stride] * 2, [case.padding] * 2
    convolve = torch.ops.mkldnn._convolution_pointwise
    y = convolve(x, weight, bias, padding, stride, [1, 1], 1, "none", [], "")
    return y.contiguous(memory_format=case.form)


def _nnpack(x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    """NNPACK's Winograd, in strips of one picture, which is faster there and takes less memory."""
    convolve = torch._nnpack_spatial_convolution  # pyright: ignore[reportPrivateImportUsage]
    p, (batch, wide, height, width), out = case.padding, x.shape, weight.shape[0]
    size = height + 2 * p - 2, width + 2 * p - 2
    y = torch.empty((batch, out, *size), memory_format=case.form)
    count = -(-height * width * wide * x.itemsize // STRIP)
    rows = -(-size[0] // count)
    for start in range(0, size[0], rows):
        end = min(start + rows, size[0])
        above, below = max(p - start, 0), max(end + 2 - p - height, 0)
        strip = x[:, :, start - p + above : end + 2 - p - below]
        strip = F.pad(strip, (0, 0, above, below)) if above or below else strip
        for one, made in zip(strip, y, strict=True):
            made[:, start:end] = convolve(one[None].contiguous(), weight, bias, (0, p))[0]
    return y


@cache
def _has_packed() -> bool:
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    there = torch.backends.mkldnn.is_available()
    return there and all(hasattr(torch.ops.mkldnn, name) for name in names)


@cache
def _has_nnpack() -> bool:
    """NNPACK is asked whether it is there before it is used, which sets it up."""
    return torch._nnpack_available()  # pyright: ignore[reportPrivateImportUsage]


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda case: True, _plain),
    "linear": Kind(_one, _linear),
    "packed": Kind(lambda case: _has_packed(), _packed, _laid_out, 1),
    "winograd_2": Kind(_three, TWO.convolve, TWO.prepare, 16 / 9),
    "winograd_4": Kind(_three, FOUR.convolve, FOUR.prepare, 4),
    "nnpack": Kind(lambda c: _three(c) and min(c.x[2:]) >= 32 and _has_nnpack(), _nnpack),
}
