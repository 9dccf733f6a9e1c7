"""The Inception network of FID as TensorFlow had it (2015-12-05), as torch-fidelity and pytorch-fid
have its weights: average pools do not count what is padded, and the last block takes the maximum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
FEATURES = 2048

Kernel = int | tuple[int, int]
Convolution = tuple[str, int, Kernel]
"""Name, width and kernel of a convolution."""
ChainStep = tuple[Convolution, ...]
"""Of a chain: a convolution, or several of one input, whose outputs are side by side."""


class InceptionConv(nn.Module):
    """Convolution, batch norm by running statistics, ReLU."""

    def __init__(self, width: int, out: int, kernel: Kernel, stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(width, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Branches side by side, each a chain of convolutions, and a pool.

    pooled: width of the convolution after the pool; 0 = none. halves: whether the last of each
    chain, and the pool, take every second place. maximum: whether the pool is of the maximum.
    """

    def __init__(
        self,
        width: int,
        *chains: tuple[ChainStep, ...],
        pooled: int = 0,
        halves: bool = False,
        maximum: bool = False,
    ):
        super().__init__()
        self.chains = [[[name for name, *_ in step] for step in chain] for chain in chains]
        self.halves, self.maximum = halves, maximum
        for chain in chains:
            before = width
            for place, step in enumerate(chain, 1):
                stride = 2 if halves and place == len(chain) else 1
                for name, out, kernel in step:
                    self.add_module(name, InceptionConv(before, out, kernel, stride))
                before = step[0][1]
        if pooled:
            self.branch_pool = InceptionConv(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            found.append(y)
        return torch.cat([*found, self._pool(x)], 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(x, 3, 2)
        if self.maximum:
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def _chain(*layers: Convolution) -> tuple[ChainStep, ...]:
    return tuple((layer,) for layer in layers)


def _fives(width: int, pooled: int) -> InceptionBlock:
    return InceptionBlock(
        width,
        _chain(("branch1x1", 64, 1)),
        _chain(("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        _chain(("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        pooled=pooled,
    )


def _sevens(mid: int) -> InceptionBlock:
    wide, tall = (1, 7), (7, 1)
    return InceptionBlock(
        768,
        _chain(("branch1x1", 192, 1)),
        _chain(("branch7x7_1", mid, 1), ("branch7x7_2", mid, wide), ("branch7x7_3", 192, tall)),
        _chain(
            ("branch7x7dbl_1", mid, 1),
            *(("branch7x7dbl_2", mid, tall), ("branch7x7dbl_3", mid, wide)),
            *(("branch7x7dbl_4", mid, tall), ("branch7x7dbl_5", 192, wide)),
        ),
        pooled=192,
    )


def _last(width: int, maximum: bool) -> InceptionBlock:
    def pair(name: str) -> ChainStep:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    return InceptionBlock(
        width,
        _chain(("branch1x1", 320, 1)),
        (*_chain(("branch3x3_1", 384, 1)), pair("branch3x3_2")),
        (*_chain(("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)), pair("branch3x3dbl_3")),
        pooled=192,
        maximum=maximum,
    )


class Inception(nn.Module):
    """Pictures, uint8 [B,3,H,W] of any size, to features [B,2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = InceptionConv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = InceptionConv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = InceptionConv(32, 64, 3)
        self.Conv2d_3b_1x1 = InceptionConv(64, 80, 1)
        self.Conv2d_4a_3x3 = InceptionConv(80, 192, 3, pad=False)
        self.Mixed_5b = _fives(192, 32)
        self.Mixed_5c = _fives(256, 64)
        self.Mixed_5d = _fives(288, 64)
        self.Mixed_6a = InceptionBlock(
            288,
            _chain(("branch3x3", 384, 3)),
            _chain(("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
            halves=True,
        )
        self.Mixed_6b = _sevens(128)
        self.Mixed_6c = _sevens(160)
        self.Mixed_6d = _sevens(160)
        self.Mixed_6e = _sevens(192)
        self.Mixed_7a = InceptionBlock(
            768,
            _chain(("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)),
            _chain(
                *(("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7))),
                *(("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3)),
            ),
            halves=True,
        )
        self.Mixed_7b = _last(1280, maximum=False)
        self.Mixed_7c = _last(2048, maximum=True)

    def forward(self, pictures: Tensor) -> Tensor:
        x = (resized_as_tensorflow(pictures.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b):
            x = block(x)
        for block in (self.Mixed_6c, self.Mixed_6d, self.Mixed_6e, self.Mixed_7a):
            x = block(x)
        return self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))


def resized_as_tensorflow(x: Tensor, side: int) -> Tensor:
    """x [B,C,H,W] as a square, bilinear as TensorFlow 1's resize_bilinear without align_corners:
    the place i is at i H / side, with no half of a pixel and no smoothing."""
    for axis in (-2, -1):
        length = x.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=x.device)
        place = place * torch.tensor(length / side, dtype=torch.float32)
        low = place.long()
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).view(-1, 1) if axis == -2 else place - low
        a, b = x.index_select(axis, low), x.index_select(axis, high)
        x = a + (b - a) * share
    return x
