"""A network's layers by whichever way of computing them is the fastest on this CPU.

A network's own layers stay what they are. `quicken` gives them other classes, which compute the
same sums in another order where nothing is learned, in fp32, on a CPU: what an output differs by is
below 1e-4 of the outputs' deviation. What is made of the weights for that takes their place, where
they can be read again if they are ever needed as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.engine import trials
from difftool.engine.convolutions import KINDS, Case, Kind
from difftool.engine.cpu import CpuAttention, CpuLinear
from difftool.networks.layers import (
    Attention,
    PlainAttention,
    ResBlock,
    TokenLinear,
    TransformerBlock,
)
from difftool.networks.unet import Down, UNet

SMALL = 64 * 64
"""Inputs times outputs: below, what is done besides costs more than the sums."""
LARGE = 100e6
"""Weights of a network whose pictures take long enough for trials."""


class Prepared(NamedTuple):
    """What was made of a layer's weights, and for which way of computing."""

    weight: nn.Parameter
    version: int
    kind: Kind
    made: Tensor


class KeysOfContext(NamedTuple):
    """A context, and what was made of it by which weights."""

    context: Tensor
    version: int
    weights: list[nn.Parameter | None]
    keys_values: tuple[Tensor, Tensor]


class Reload:
    """Reads the weights of a whole network again, in which layers are asked for theirs."""

    def __init__(self, read: Callable[[], None]):
        self.read, self.running = read, False

    def __call__(self) -> None:
        if not self.running:
            self.running = True
            try:
                self.read()
            finally:
                self.running = False


class Quick(nn.Module):
    """What quick layers have in common: to be a convolution."""

    bias: nn.Parameter | None
    reload: Reload | None = None
    """None: the weights are kept as they were."""
    prepared: Prepared | None = None
    last = True
    """Whether channels are made the innermost; else where they are already."""

    def convolve(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """Of pictures [B,I,H,W], by weights [O,I] or [O,I,k,k]."""
        weight = self._parameters["weight"]
        assert weight is not None
        if (
            x.device.type != "cpu"
            or not x.dtype == weight.dtype == torch.float32
            or torch.is_grad_enabled()
        ):
            return F.conv2d(x, _kernel(self.weight), self.bias, stride, padding)
        shape = _kernel(weight).shape
        last = self.last or x.is_contiguous(memory_format=torch.channels_last)
        case = Case(x.shape, shape, stride, padding, last)
        x = x.contiguous(memory_format=case.form)
        prepared = self.prepared
        if prepared and prepared.weight is weight and prepared.version == weight._version:
            return prepared.kind.convolve(x, prepared.made, self.bias, case)
        small = shape[:2].numel() < SMALL
        kind = KINDS["plain" if small else trials.chosen(case)]
        made = _kernel(self.weight)
        if kind.prepare is not None:
            made = kind.prepare(made.detach(), case)
            weight = self.weight
            if self.reload is not None:
                weight = nn.Parameter(weight.to("meta"), requires_grad=False)
                self._parameters["weight"] = weight
            self.prepared = Prepared(weight, weight._version, kind, made)
        return kind.convolve(x, made, self.bias, case)

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As it was, read again where what was made of it is all there is."""
        weight = self._parameters["weight"]
        if weight is not None and weight.is_meta and self.prepared and self.reload is not None:
            self.reload()
        return self._parameters["weight"]  # pyright: ignore[reportReturnType]


def _kernel(weight: Tensor) -> Tensor:
    """Weights [O,I] or [O,I,k,k] as those of a convolution."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


class QuickConv2d(Quick, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution of square kernels, strides and padding."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.stride[0], int(self.padding[0]))


class QuickLinear(Quick, CpuLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer of tokens [B,N,C]."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (2, 3) or torch.is_grad_enabled() or input.dtype != torch.float32:
            return super().forward(input)
        tokens = input if input.dim() == 3 else input[None]
        picture = tokens.contiguous().transpose(1, 2)[:, :, None]
        return self.convolve(picture)[:, :, 0].transpose(1, 2).view(*input.shape[:-1], -1)


class QuickAttention(CpuAttention):
    """Attention that computes the keys and values of a context once."""

    told: KeysOfContext | None = None

    def of_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        told, weights = self.told, self._weights()
        if (
            told is None
            or torch.is_grad_enabled()
            or any(mine is not own for mine, own in zip(told.weights, weights, strict=True))
            or told.version != told.context._version
            or not (told.context is context or _equal(told.context, context))
        ):
            made = super().of_context(context)
            if torch.is_grad_enabled():
                return made
            told = self.told = KeysOfContext(context, context._version, self._weights(), made)
        return told.keys_values

    def _weights(self) -> list[nn.Parameter | None]:
        return [each._parameters["weight"] for each in (self.to_k, self.to_v)]


def of_pair(layer: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
    """What a layer makes of a batch; where its halves are alike, as a guided pair's are until a
    context tells them apart, of one half alone."""
    tensors = [each for each in given if each is not None]
    half, rest = divmod(len(tensors[0]), 2)
    single = rest or torch.is_grad_enabled() or tensors[0].device.type != "cpu"
    if single or not all(each[:half].equal(each[half:]) for each in tensors):
        return layer(*given)
    made = layer(*(None if each is None else each[:half] for each in given))
    return torch.cat([made, made])


class PairConv2d(QuickConv2d):
    """The convolution that x_t goes through first."""

    def forward(self, input: Tensor) -> Tensor:
        return of_pair(super().forward, input)


class PairResBlock(ResBlock):
    """The first residual block."""

    def forward(
        self, x: Tensor, emb: Tensor | None = None, size: torch.Size | None = None
    ) -> Tensor:
        return of_pair(partial(super().forward, size=size), x, emb)


class PairAttention(QuickAttention):
    """The first attention, before that to a context."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return of_pair(super().forward, x, context)


def _share_start(network: UNet) -> None:
    """Let the layers before the first attention to a context be computed once a guided pair."""
    level = network.down_blocks[0]
    assert isinstance(level, Down)
    if type(network.conv_in) is QuickConv2d:
        network.conv_in.__class__ = PairConv2d
    if type(level.resnets[0]) is ResBlock:
        level.resnets[0].__class__ = PairResBlock
    for block in (each for each in level.modules() if isinstance(each, TransformerBlock)):
        if type(block.attn1) is QuickAttention:  # where it sees no context
            block.attn1.__class__ = PairAttention
        break


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.equal(b)


def convolve_padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of pictures that have their padding already."""
    if isinstance(layer, QuickConv2d):
        return layer.convolve(x, layer.stride[0])
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def is_large(network: nn.Module) -> bool:
    """Whether it is quickened where nothing is said."""
    return sum(each.numel() for each in network.parameters()) >= LARGE


def quicken(
    network: nn.Module, reload: Callable[[], None] | None = None, last: bool = True
) -> None:
    """Let a network's large layers be computed by whatever way is the fastest. reload: reads its
    weights again from their file. last: with channels innermost, which suits large weights and
    small pictures."""
    again = None if reload is None else Reload(reload)
    for module in network.modules():
        if isinstance(module, Attention) and not isinstance(module, PlainAttention):
            module.__class__ = QuickAttention
        if isinstance(module, TokenLinear) or type(module) is nn.Linear:
            module.__class__ = QuickLinear
        elif type(module) is nn.Conv2d and _square(module):
            module.__class__ = QuickConv2d
        else:
            continue
        module.__dict__.update(reload=again, last=last)
    if isinstance(network, UNet):
        _share_start(network)


def _square(layer: nn.Conv2d) -> bool:
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    plain = (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
    return plain and all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes)
