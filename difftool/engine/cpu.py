"""The same networks, computed faster on a CPU: layers that take the place of the plain ones.

A network knows nothing of processors. `adapt` gives its layers the classes of this module, which
have the same weights under the same names, and compute as the plain ones do on any other device.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftool.networks.layers import Attention, PlainAttention, TokenLinear, Upsample, to_tokens

LOW = (torch.bfloat16, torch.float16)
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""glibc's numbers of these options."""


def adapt(network: nn.Module) -> None:
    """Give the layers of a network their faster forms."""
    for module in network.modules():
        module.__class__ = FASTER.get(type(module), type(module))


class CpuGroupNorm(nn.GroupNorm):
    """Group normalisation in fp32, because its bf16 form takes several times as long."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if x.device.type != "cpu" or x.dtype not in LOW:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        y = F.group_norm(x.float(), self.num_groups, weight, bias, self.eps)
        return y if torch.is_autocast_enabled("cpu") else y.to(x.dtype)


@cache
def multiplies_slowly() -> bool:
    """Whether torch multiplies matrices by MKL on a processor that MKL does not favour."""
    try:
        maker = "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return False
    return maker and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


class CpuLinear(TokenLinear):
    """A linear layer of tokens [B,N,C].

    In fp32 on AMD's processors oneDNN's convolutions do twice the work of MKL's products; where
    there are more tokens than features, training computes it as a 1x1 convolution of N = 2 (N/2).
    """

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.shape[:-1].numel()
        if (
            input.dim() != 3
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or input.shape[1] % 2
            or tokens < 2 * self.out_features
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not multiplies_slowly()
        ):
            return super().forward(input)
        picture = input.transpose(1, 2).unflatten(2, (2, -1))
        return to_tokens(F.conv2d(picture, self.weight[:, :, None, None], self.bias))


class CpuUpsample(Upsample):
    """A convolution of doubled pixels as a transposed one of the pixels, with the kernel summed
    over the copies: 16 products a pixel in place of 36. Training takes it that way, where there are
    more pixels than there are weights to sum."""

    def forward(self, x: Tensor, emb: Tensor | None, size: torch.Size | list[int]) -> Tensor:
        pixels = len(x) * x[0, 0].numel()
        doubled = tuple(size) == (2 * x.shape[2], 2 * x.shape[3])
        if doubled and x.device.type == "cpu" and torch.is_grad_enabled() and pixels >= x.shape[1]:
            return F.conv_transpose2d(x, self._summed(), self.conv.bias, stride=2, padding=1)
        return super().forward(x, emb, size)

    def _summed(self) -> Tensor:
        """The transposed convolution's kernel [in,out,4,4]."""
        shifts = ((0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0))
        kernel = sum(F.pad(self.conv.weight, shift) for shift in shifts)
        assert isinstance(kernel, Tensor)
        return kernel.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot product attention, [B,heads,N,C] each, in fp32, which is faster."""
    if q.device.type != "cpu" or q.dtype not in LOW:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class CpuAttention(Attention):
    """Attention by `attend`."""

    attend = staticmethod(attend)


class CpuPlainAttention(PlainAttention):
    """Attention of a picture to itself by `attend`."""

    attend = staticmethod(attend)


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: CpuGroupNorm,
    TokenLinear: CpuLinear,
    Upsample: CpuUpsample,
    Attention: CpuAttention,
    PlainAttention: CpuPlainAttention,
}
"""Plain layers and what takes their places."""


def keep_memory() -> None:
    """Keep freed memory for the next step: giving it back to the system and having new pages
    zeroed takes a tenth of a step on a CPU. Where the C library is not glibc nothing is done."""
    _allocate(MMAP_THRESHOLD, 1 << 30)
    _allocate(TRIM_THRESHOLD, (1 << 31) - 1)


def return_memory() -> None:
    """Give large blocks back to the system when they are freed, until `keep_memory`: weights that
    others will replace."""
    _allocate(MMAP_THRESHOLD, 1 << 16)


def _allocate(option: int, value: int) -> None:
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(option, value)
