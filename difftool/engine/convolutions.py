"""3x3 convolutions on a CPU with fewer multiplications, the fastest kind for each shape by trial.

A network's own convolutions stay what they are: `quicken` gives them another class, which computes
the same sums in another order where nothing is learned, in fp32, on a CPU. What an output differs
by is below 1e-4 of the outputs' deviation.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.errors import DifftoolError, InputError
from difftool.storage.commit import write_whole
from difftool.storage.places import user_cache
from difftool.storage.strict_json import read_json

SMALL = 64 * 64
"""Of a kernel's channels: below, what is done besides costs more than the sums."""
TRIALS = 3


class Kind(NamedTuple):
    """A way to convolve: what is made of the weights [O,I,3,3] once, and used in their place."""

    prepare: Callable[[Tensor], Tensor]
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x [B,I,H,W], prepared weights, bias [O]) -> [B,O,H,W]."""
    fits: Callable[[torch.Size], bool] = lambda shape: True
    """Whether it is worth a trial for pictures of a shape."""


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

    def prepare(self, weight: Tensor) -> Tensor:
        """[(m+2)^2,O,I]."""
        made = torch.kron(self.kernel, self.kernel) @ weight.reshape(-1, 9).T
        return made.view(-1, *weight.shape[:2])

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (m, n), (batch, _, height, width) = self.outputs.shape, x.shape
        rows, columns = -(-height // m), -(-width // m)
        padded = F.pad(x, (1, columns * m + 1 - width, 1, rows * m + 1 - height))
        tiles = padded.unfold(2, n, m).unfold(3, n, m).permute(4, 5, 1, 0, 2, 3)
        made = torch.kron(self.inputs, self.inputs) @ tiles.reshape(n * n, -1)
        products = torch.bmm(weight, made.view(n * n, weight.shape[2], -1))
        sums = torch.kron(self.outputs, self.outputs) @ products.flatten(1)
        sums = sums.view(m, m, -1, batch, rows, columns).permute(3, 2, 4, 0, 5, 1)
        y = sums.reshape(batch, -1, rows * m, columns * m)[:, :, :height, :width]
        return y if bias is None else y + bias[:, None, None]


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


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _nnpack(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """NNPACK's Winograd, one picture after the other, which is faster there."""
    convolve = torch._nnpack_spatial_convolution  # pyright: ignore[reportPrivateImportUsage]
    return torch.cat([convolve(one[None].contiguous(), weight, bias, 1) for one in x])


def _large(shape: torch.Size) -> bool:
    available = torch._nnpack_available  # pyright: ignore[reportPrivateImportUsage]
    return min(shape[2:]) >= 32 and available()


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda weight: weight, _plain),
    "channels_last": Kind(
        lambda weight: weight.contiguous(memory_format=torch.channels_last),
        lambda x, w, bias: _plain(x.contiguous(memory_format=torch.channels_last), w, bias),
    ),
    "winograd_2": Kind(TWO.prepare, TWO.convolve),
    "winograd_4": Kind(FOUR.prepare, FOUR.convolve),
    "nnpack": Kind(lambda weight: weight.contiguous(), _nnpack, _large),
}


def kept() -> Path:
    """Where choices are kept for the next process on this machine, with this torch and as many
    threads."""
    machine = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-{os.cpu_count()}"
    name = f"convolutions-{machine}-{torch.__version__}-{torch.get_num_threads()}.json"
    return user_cache() / "difftool" / name.replace(" ", "-")


@cache
def chosen(x: torch.Size, weight: torch.Size) -> str:
    """The fastest kind for inputs and a kernel of these shapes: as it was found before on this
    machine, or by a trial."""
    path, shapes, found = kept(), f"{list(x)} {list(weight)}", {}
    with suppress(InputError):
        found = read_json(path)
    if (name := found.get(shapes)) in KINDS and KINDS[name].fits(x):
        return name
    name = _fastest(x, weight)
    with suppress(DifftoolError, OSError):  # then it is tried again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found | {shapes: name}, indent=1), overwrite=True)
    return name


def _fastest(x: torch.Size, weight: torch.Size) -> str:
    generator = torch.Generator().manual_seed(0)
    picture, kernel = (torch.randn(shape, generator=generator) for shape in (x, weight))
    seconds = {}
    for name, kind in KINDS.items():
        if kind.fits(x):
            prepared = kind.prepare(kernel)
            seconds[name] = min(_timed(kind, picture, prepared) for _ in range(TRIALS))
    return min(seconds, key=seconds.__getitem__)


def _timed(kind: Kind, x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    kind.convolve(x, weight, None)
    return time.perf_counter() - start


class QuickConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 by the kind that is fastest for what it is given."""

    prepared: tuple[object, Tensor] | None = None
    """What was made of the weights, and of which."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            input.device.type != "cpu"
            or not input.dtype == weight.dtype == torch.float32
            or torch.is_grad_enabled()
        ):
            return super().forward(input)
        name = chosen(input.shape, weight.shape)
        of, made = (name, weight.data_ptr(), weight._version), self.prepared
        if made is None or made[0] != of:
            made = self.__dict__["prepared"] = of, KINDS[name].prepare(weight.detach())
        return KINDS[name].convolve(input, made[1], self.bias)


def quicken(network: nn.Module) -> None:
    """Let a network's large 3x3 convolutions be computed by whatever kind is fastest."""
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
            and module.in_channels * module.out_channels >= SMALL
        ):
            module.__class__ = QuickConv2d
