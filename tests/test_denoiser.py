"""What a network receives, and which dtype does what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from difftool.diffusion import PATHS, TARGETS, Level
from difftool.diffusion.denoiser import Cond, Denoiser
from difftool.diffusion.path import Discrete
from difftool.errors import UsageError


class Recorder(nn.Module):
    """Remembers its arguments; outputs the first `channels` channels of its input, tanh."""

    def __init__(self, channels: int = 3, heads: int = 1, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.channels, self.heads = channels, heads
        self.seen: dict[str, Tensor | None] = {}

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor | None) -> Tensor:
        self.seen = {"x": x, "t": t, **conditions}
        return (torch.tanh(x[:, : self.channels]) * self.scale).repeat(1, self.heads, 1, 1)


def image(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_eps_needs_a_signal_everywhere(path: str, target: str):
    """eps-prediction is refused where alpha = 0, and nothing else is."""
    built = PATHS[path]()
    if target == "eps" and built.level(built.t_max).alpha == 0:
        with pytest.raises(UsageError, match="alpha = 0"):
            Denoiser(Recorder(), built, target)
        return
    denoiser = Denoiser(Recorder(), built, target)
    noisiest = denoiser.path.level(denoiser.path.t_max)
    prediction = denoiser.predict(image(), noisiest)
    assert prediction.x0.isfinite().all()
    assert prediction.eps.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_network_sees_its_own_dtype_and_fp32_comes_out(dtype: torch.dtype):
    network = Recorder(dtype=dtype)
    denoiser = Denoiser(network, PATHS["sd15"](), "v")
    cond = Cond(
        context=torch.ones(2, 5, 8),
        vector=torch.ones(2, 6),
        concat=torch.ones(2, 1, 4, 4),
        label=torch.tensor([1, 2]),
        guidance=torch.tensor([7.5, 3.0]),
    )
    output = denoiser(image(), denoiser.path.level(500), cond)
    assert output.dtype == torch.float32
    seen = {k: v for k, v in network.seen.items() if v is not None}
    assert {name: seen[name].dtype for name in ("x", "context", "vector")} == dict.fromkeys(
        ("x", "context", "vector"), dtype
    )
    assert seen["x"].shape == (2, 4, 4, 4)  # with the concatenated channel
    assert (seen["x"][:, 3] == 1).all()
    assert seen["label"].dtype == torch.int64
    assert seen["t"].dtype == seen["guidance"].dtype == torch.float32
    assert seen["t"].tolist() == [500, 500]


def test_absent_conditions_are_none():
    network = Recorder()
    Denoiser(network, PATHS["sd15"](), "eps")(image(), PATHS["sd15"]().level(3))
    assert {k for k, v in network.seen.items() if v is None} == {
        "context",
        "vector",
        "label",
        "guidance",
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(2,), (2, 1, 1, 1)])
def test_tensor_levels_equal_float_levels(path: str, shape: tuple[int, ...]):
    denoiser = Denoiser(Recorder(), PATHS[path](), "v")
    levels = [denoiser.path.at_index(i) for i in (300, 700)]
    columns = (torch.tensor(column).view(shape) for column in zip(*levels, strict=True))
    together = denoiser.predict(image(), Level(*columns))  # type: ignore[arg-type]
    for k, level in enumerate(levels):
        alone = denoiser.predict(image()[k : k + 1], level)
        torch.testing.assert_close(together.x0[k : k + 1], alone.x0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.eps[k : k + 1], alone.eps, rtol=1e-4, atol=1e-4)


def test_edm_scales_the_input_and_the_time():
    network = Recorder()
    Denoiser(network, PATHS["edm"](), "edm")(image(), PATHS["edm"]().level(3.0))
    torch.testing.assert_close(network.seen["x"], image() / math.hypot(3, 0.5))
    torch.testing.assert_close(network.seen["t"], torch.full((2,), math.log(3) / 4))


def test_fractional_times_as_the_network_is_told_them():
    network = Recorder()
    for time, told in (("exact", 3.75), ("nearest", 4), ("floor", 3)):
        path = Discrete(time=time)  # type: ignore[arg-type]
        Denoiser(network, path, "eps")(image(), path.level(3.75))
        assert network.seen["t"].tolist() == [told, told]  # type: ignore[union-attr]


def test_learned_variance_is_dropped():
    level = PATHS["sd15"]().level(10)
    plain = Denoiser(Recorder(), PATHS["sd15"](), "eps")(image(), level)
    doubled = Denoiser(Recorder(heads=2), PATHS["sd15"](), "eps")(image(), level)
    assert torch.equal(plain, doubled)


def test_gradients_reach_the_network():
    network = Recorder()
    denoiser = Denoiser(network, PATHS["flow"](), "flow")
    denoiser(image(), denoiser.path.level(0.5)).square().mean().backward()
    assert network.scale.grad is not None
    assert network.scale.grad.abs() > 0
