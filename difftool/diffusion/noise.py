"""Sources of noise: everything random about image k comes from its own seed, on the CPU in fp32.

So an image is the same alone, in any batch and on any device. Torch-free at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from difftool.devices import on_device
from difftool.diffusion.path import Level
from difftool.diffusion.philox import MASK, CudaGenerator

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Generator(Protocol):
    """Normal numbers of a seed, drawn in turn."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next ones; fp32 of that shape, on the CPU."""
        ...


class TorchGenerator:
    """torch.Generator("cpu")."""

    def __init__(self, seed: int):
        import torch

        self.torch = torch.Generator().manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next numbers; fp32 of that shape."""
        import torch

        return torch.randn(tuple(shape), generator=self.torch)


GENERATORS: Mapping[str, Callable[[int], Generator]] = {"cpu": TorchGenerator, "gpu": CudaGenerator}
"""Whose numbers noise is made of: PyTorch's on a CPU, or PyTorch's on a GPU of NVIDIA."""


class ImageNoise:
    """One generator an image; each draw continues them.

    shape [C,H,W] is that of one image. rng: a name from GENERATORS.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        rng: str = "cpu",
    ):
        self.generators = [GENERATORS[rng](seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self, shape: Sequence[int] | None = None) -> Tensor:
        """The next unit noise of each image; [B,C,H,W], or of another shape."""
        import torch

        each = self.shape if shape is None else shape
        return on_device(torch.stack([g.normal(each) for g in self.generators]), self.device)

    def start(self, others: ImageNoise | None = None, strength: float = 0.0) -> Tensor:
        """The noise that images begin with, turned by that share of the way to others' of theirs
        (A1111's variation seeds)."""
        noise = self.draw()
        return noise if others is None else slerp(noise, others.draw(), strength)

    def shaped(self, shape: Sequence[int]) -> ImageNoise:
        """The same generators, which go on, for draws of another shape."""
        other = ImageNoise((), shape, self.device)
        other.generators = self.generators
        return other

    def __call__(self, here: Level, there: Level) -> Tensor:
        """Independent noise for a step."""
        return self.draw()


class StepSeed(NamedTuple):
    """A row of STEP_NOISE: the generator that the noise of steps is of."""

    about: str
    rng: str | None = None
    """A name from GENERATORS; None: that of the start noise."""
    seed: Callable[[int], int] | None = None
    """Its seed, from the picture's; None: the generator of the start noise goes on."""


STEP_NOISE: Mapping[str, StepSeed] = {
    "continued": StepSeed("the generator of the start noise goes on: A1111, diffusers"),
    "comfyui": StepSeed("ComfyUI on a CPU: seed + 1", "cpu", lambda seed: seed + 1),
    "comfyui-gpu": StepSeed("ComfyUI on a GPU: the seed, by the GPU", "gpu", lambda seed: seed),
    "invokeai": StepSeed("InvokeAI on a CPU: 32 bits flipped", "cpu", lambda seed: seed ^ MASK),
    "invokeai-gpu": StepSeed("InvokeAI on a GPU: the same", "gpu", lambda seed: seed ^ MASK),
}
"""What ancestral samplers draw, by tool."""


def step_noise(
    start: ImageNoise, seeds: Sequence[int], kind: str = "continued", delta: int = 0, rng: str = ""
) -> ImageNoise:
    """The noise of steps that are not of a Brownian path.

    start: of the start noise, by generators of that rng. kind: a name from STEP_NOISE. delta:
    A1111's "eta noise seed delta"; other than 0 it begins anew, that much further.
    """
    row = STEP_NOISE[kind]
    if row.seed is None and not delta:
        return start
    own = [((seed if row.seed is None else row.seed(seed)) + delta) % 2**64 for seed in seeds]
    return ImageNoise(own, start.shape, start.device, row.rng or rng)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Noise [B,C,H,W] turned that share of the way from a to b, column by column along H, as A1111
    turns it; on a straight line where both are nearly one."""
    unit_a, unit_b = (x / x.norm(dim=2, keepdim=True) for x in (a, b))
    cosine = (unit_a * unit_b).sum(2, keepdim=True)
    angle = cosine.acos()
    turned = ((1 - share) * angle).sin() / angle.sin() * a + (share * angle).sin() / angle.sin() * b
    near = cosine.mean((1, 2, 3), keepdim=True) > 0.9995
    return turned.where(~near, (1 - share) * a + share * b)


def start_noise(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """The first noise of each image; [B,C,H,W]."""
    return ImageNoise(seeds, shape, device).draw()


class BrownianNoise:
    """Scaled increments of Brownian paths over rho, whatever the steps and their order.

    Bit by bit those of k-diffusion's BrownianTreeNoiseSampler on the CPU (torchsde's BrownianTree).
    seeds: one path an image of shape [C,H,W]; or a single seed and the shape of the whole batch.
    levels: of the grid; the paths run from their lowest positive to their highest finite rho. rng:
    a name from GENERATORS; "gpu" are the paths of A1111, and of k-diffusion on a GPU.
    """

    def __init__(
        self,
        seeds: Sequence[int] | int,
        shape: Sequence[int],
        levels: Sequence[Level],
        device: torch.device | str = "cpu",
        rng: str = "cpu",
    ):
        rhos = [_fp32(level.rho) for level in levels if 0 < level.rho < math.inf]
        lo, hi = min(rhos, default=0.0), max(rhos, default=0.0)
        self.whole = isinstance(seeds, int)
        each = [seeds] if isinstance(seeds, int) else seeds
        self.trees = [_Tree(seed, tuple(shape), lo, hi, rng) for seed in each]
        self.device = device

    def __call__(self, here: Level, there: Level) -> Tensor:
        """Unit noise for the step: the same path at equal levels, independent at disjoint steps."""
        import torch

        start, end = _fp32(here.rho), _fp32(there.rho)
        images = [tree.unit(start, end) for tree in self.trees]
        return on_device(images[0] if self.whole else torch.stack(images), self.device)


class _Tree:
    """One Brownian path: an interval's increment, halved as often as a query needs."""

    def __init__(self, seed: int, shape: tuple[int, ...], lo: float, hi: float, rng: str):
        self.seed, self.shape, self.generator = seed, shape, GENERATORS[rng]
        self.lo, self.hi = round(lo, DIGITS), round(hi, DIGITS)
        self.increment = self._normal(3) * math.sqrt(hi - lo)

    def unit(self, start: float, end: float) -> Tensor:
        """The increment from start to end over the root of their distance, both fp32 numbers."""
        import torch

        lo, hi = sorted((start, end))
        if hi == math.inf:  # the normalised increment over infinity, wherever it begins
            return self._normal(4, INFINITE)
        ends = (round(min(max(rho, self.lo), self.hi), DIGITS) for rho in (lo, hi))
        increment = sum(self._pieces(*ends), start=torch.zeros(self.shape))
        distance = (torch.tensor(hi) - lo).sqrt()  # torch's own fp32 root is not the nearest number
        return increment / distance.copysign(end - start) if distance else increment

    def _pieces(self, lo: float, hi: float) -> Iterator[Tensor]:
        """Increments of dyadic intervals that make up [lo, hi], in ascending order."""
        todo = [(self.lo, self.hi, self.increment, 0, 0)]
        while todo:
            a, b, w, key, depth = todo.pop()
            if hi <= a or b <= lo:
                continue
            if lo <= a and b <= hi:
                yield w
                continue
            m = round((a + b) / 2, DIGITS)
            left, right, inverse = m - a, b - m, 1 / (b - a)
            bridge = math.sqrt(left * right * inverse) * self._normal(4, (key, depth))
            w_left = left * w * inverse + bridge
            todo.append((m, b, w - w_left, 2 * key + 1, depth + 1))
            todo.append((a, m, w_left, 2 * key, depth + 1))

    def _normal(self, words: int, spawn_key: tuple[int, ...] = ()) -> Tensor:
        from numpy.random import SeedSequence

        sequence = SeedSequence(self.seed % 2**64, spawn_key=spawn_key, pool_size=24)
        seed = int(sequence.generate_state(words)[0])
        return self.generator(seed).normal(self.shape)


DIGITS = 6
"""Decimals of rho that a path resolves, as torchsde's tolerance of 1e-6 has them."""
INFINITE = (1, 0)
"""A key and depth that no dyadic interval has."""


def _fp32(number: float) -> float:
    import torch

    return torch.tensor(number, dtype=torch.float32).item()
