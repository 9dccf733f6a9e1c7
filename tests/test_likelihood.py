"""Bits per dimension: against Gaussians, whose own are known, and one against the other."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import solid
from PIL import Image
from runs import start_run
from torch import Tensor, nn

from difftool.diffusion.denoiser import UNCONDITIONAL, Cond, Denoiser
from difftool.diffusion.likelihood import (
    INTERVALS,
    Likelihood,
    Measured,
    likelihood,
    log_mass,
    log_snr_range,
    mean_bits,
    predict,
    sample_bits,
)
from difftool.diffusion.losses import WEIGHTS, training_loss
from difftool.diffusion.path import PATHS
from difftool.diffusion.prediction import TARGETS, Prediction
from difftool.diffusion.slack import slack_evaluations, tightened
from difftool.images.fit import to_pil
from difftool.training.metrics import Metrics
from difftool.training.run.evaluation import Evaluation

MEAN, DEVIATION, SHRUNK = 0.1, 0.4, 0.5
PATH_AND_TARGET = [
    ("sd15", "eps"), ("sd15", "x0"), ("cosine", "v"), ("sd21-zsnr", "v"), ("flow", "flow"),
    ("edm", "edm"), ("edm", "eps"),
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("closed_runs")


class Exact(Denoiser):
    """The denoiser of data whose values are independent, N(MEAN, DEVIATION^2)."""

    def __init__(self, path: str, target: str):
        super().__init__(nn.Identity(), PATHS[path](), target)

    def forward(self, x_t: Tensor, level: Any, cond: Cond = UNCONDITIONAL) -> Tensor:
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in (level.alpha, level.sigma))
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        rest = (x_t - alpha * MEAN) / variance
        p, q = TARGETS[self.target](alpha, sigma)
        return p * (MEAN + alpha * DEVIATION**2 * rest) + q * sigma * rest


def measure(denoiser: Denoiser, x0: Tensor, *, discrete: bool, steps: int = 128) -> Likelihood:
    picture = Measured(denoiser=denoiser, x0=x0, cond=Cond(), discrete=discrete, steps=steps)
    return likelihood(picture)


def pixels(size: int = 32) -> Tensor:
    """A picture of such data, in steps of 2 / 255, [1,3,size,size]."""
    drawn = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    whole = ((MEAN + DEVIATION * drawn).clamp(-1, 1) + 1) * 127.5
    return whole.round() / 127.5 - 1


SLOW = [("sd15", "x0"), ("cosine", "v"), ("edm", "eps"), ("sd21-zsnr", "v")]


@pytest.mark.parametrize(
    ("path", "target"),
    [pytest.param(*p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PATH_AND_TARGET],
)
def test_both_estimates_give_a_gaussians_own_density(path, target):
    denoiser, x0 = Exact(path, target), pixels()
    found = measure(denoiser, x0, discrete=False)
    spread = DEVIATION**2 + math.exp(-log_snr_range(denoiser.path, discrete=False)[1])
    square = (x0.double() - MEAN).square().mean().item() + spread - DEVIATION**2
    exact = (math.log(2 * math.pi * spread) + square / spread) / 2 / math.log(2)
    assert found.bound.total == pytest.approx(exact, rel=0.01)
    assert found.flow.total == pytest.approx(exact, rel=0.01)
    for spent in (found.bound, found.flow):
        assert abs(spent.total - exact) < 4 * spent.uncertainty
    apart, error = found.difference
    assert abs(apart) < 3 * error


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("steps", [64, 128])
def test_a_gaussian_s_bound_has_no_slack(discrete, steps):
    given: dict[str, Any] = {"cond": Cond(), "discrete": discrete, "steps": steps}
    picture = Measured(denoiser=Exact("flow", "flow"), x0=pixels(13), **given)
    found, calls = likelihood(picture), []
    tight = tightened(picture, found, calls.append)
    assert calls[-1] == slack_evaluations(picture)
    assert tight.total == pytest.approx(found.flow.total, abs=0.01)  # both from the same z
    assert abs(tight.total - found.bound.total) < 4 * found.difference[1]


class Shrunk(Exact):
    """A denoiser whose x0 is too small where there is much noise: what its steps draw is a Gaussian
    again, but no bound of it by them is tight."""

    def predict(self, x_t: Tensor, level: Any, cond: Cond = UNCONDITIONAL) -> Any:
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in (level.alpha, level.sigma))
        x0 = super().predict(x_t, level, cond).x0
        x0 = x0 * (1 - SHRUNK * sigma / (alpha**2 + sigma**2) ** 0.5)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


def drawn_by(denoiser: Denoiser, low: float, high: float, steps: int = 1000) -> tuple[float, float]:
    """Mean and variance of each value of the z that ancestral steps draw from noise, which are
    linear for these denoisers."""
    mean, variance = 0.0, 1.0
    levels = torch.linspace(low, high, steps + 1, dtype=torch.float64).tolist()
    probe = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    for noisy, clean in pairwise(levels):
        (a, s), (a_s, s_s) = (
            (math.sqrt(1 / (1 + math.exp(-v))), math.sqrt(1 / (1 + math.exp(v))))
            for v in (noisy, clean)
        )
        at_0, at_1 = predict(denoiser, probe, torch.full((2,), noisy), Cond())[0].flatten().tolist()
        added = s**2 - (a / a_s * s_s) ** 2
        share, rest = a_s * added / s**2, a / a_s * (s_s / s) ** 2
        slope = share * (at_1 - at_0) + rest
        mean, variance = slope * mean + share * at_0, slope**2 * variance + added * (s_s / s) ** 2
    return mean, variance


def test_the_slack_of_a_bound_is_what_it_is_above_the_density_of_its_steps():
    picture = Measured(
        denoiser=Shrunk("flow", "flow"), x0=pixels(13), cond=Cond(), discrete=False, steps=256
    )
    found = likelihood(picture)
    tight = tightened(picture, found)
    low, high = found.edges[0], found.edges[-1]
    mean, variance = drawn_by(picture.denoiser, low, high)
    alpha, noise = 1 / math.sqrt(1 + math.exp(-high)), 1 / (1 + math.exp(high))
    square = (alpha * picture.x0.double() - mean).square().mean().item() + noise
    nats = (math.log(2 * math.pi * variance) + square / variance) / 2 - math.log(alpha)
    exact = nats / math.log(2)
    assert abs(tight.total - exact) < 3 * tight.uncertainty
    assert found.bound.total - exact > 3 * found.bound.uncertainty
    assert found.bound.total - tight.total > 2 * tight.uncertainty


@pytest.mark.parametrize(("path", "target"), [("sd15", "eps"), ("edm", "edm")])
def test_pixels_take_the_bits_of_their_bins(path, target):
    x0 = pixels()
    found = measure(Exact(path, target), x0, discrete=True)
    mean = torch.full_like(x0, MEAN).double()
    exact = -log_mass(x0.double(), mean, DEVIATION).mean().item() / math.log(2)
    assert found.bound.total == pytest.approx(exact, rel=0.01)
    assert found.flow.total == pytest.approx(exact, rel=0.01)


def test_the_masses_of_all_bins_are_one():
    x = torch.arange(256).double() / 127.5 - 1
    for mean, deviation in ((0.3, 0.2), (-1.0, 0.01), (0.999, 1e-4), (5.0, 0.1)):
        masses = log_mass(x, torch.full_like(x, mean), deviation)
        assert masses.isfinite().all()
        assert masses.logsumexp(0).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_set_takes_what_its_pictures_take(discrete):
    denoiser, pictures = Exact("flow", "flow"), pixels(16).expand(256, -1, -1, -1)
    slots = torch.arange(256)
    eps = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    samples = sample_bits(
        denoiser, pictures, Cond(),
        u=(slots + 0.5) / 256, eps=eps, edge=1 + slots % INTERVALS, discrete=discrete,
    )  # fmt: skip
    mean, error = mean_bits([samples])
    one = measure(denoiser, pixels(16), discrete=discrete).bound
    assert mean == pytest.approx(one.total, abs=4 * math.hypot(error, one.uncertainty))
    assert error < 0.1


def test_a_level_that_no_sample_had_is_not_made_up():
    few = torch.arange(3)
    samples = sample_bits(
        Exact("flow", "flow"), pixels(8).expand(3, -1, -1, -1), Cond(),
        u=(few + 0.5) / 9, eps=torch.randn(3, 3, 8, 8), edge=1 + few, discrete=True,
    )  # fmt: skip
    assert math.isnan(mean_bits([samples])[0])


def fields(count: int, seed: int) -> Tensor:
    """Smooth pictures with a little noise, [count,3,8,8]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 3, 10, 10, generator=generator)
    smooth = (1.5 * nn.functional.avg_pool2d(drawn, 3, 1)).tanh()
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return ((noisy.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.slow
def test_both_estimates_agree_on_a_model_that_was_trained():
    model = tiny.model(
        tiny.preset(unet={"channels": [32, 32], "groups": 8, "head_dim": 8}), deviation=0
    )
    denoiser, generator = model.denoiser, torch.Generator().manual_seed(0)
    low, high = log_snr_range(denoiser.path, discrete=True)
    parameters = [p.requires_grad_() for p in denoiser.parameters()]
    optimizer, steps = torch.optim.Adam(parameters), 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        u = torch.rand(64, generator=generator)
        losses, _ = training_loss(
            denoiser, fields(64, 10 + step), Cond(),
            times=denoiser.path.nearest_time(-(low + (high - low) * u) / 2),
            weight=partial(WEIGHTS["uniform"]), eps=torch.randn(64, 3, 8, 8, generator=generator),
        )  # fmt: skip
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    denoiser.requires_grad_(False).eval()
    found = [measure(denoiser, fields(1, seed), discrete=True) for seed in range(4)]
    for each in found:
        apart, error = each.difference
        assert error < 0.15 and abs(apart) < 3 * error
    assert all(6 < each.bound.total < 8 for each in found)  # smooth: 8 would be no model at all


# --- as commands -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models, of pixels and of latents."""
    folder = tmp_path_factory.mktemp("models")
    size: dict[str, Any] = {"size": [16, 16]}
    tiny.model(tiny.preset(sample=size)).save(folder / "pixels.safetensors")
    codec: dict[str, Any] = tiny.VAE | {"latent_channels": 4}
    tiny.model(tiny.preset(4, sample=size, codec=codec)).save(folder / "latents.safetensors")
    to_pil(pixels(16)[0]).save(folder / "photo.png")
    return folder


@pytest.mark.parametrize("of", ["pixels", "latents"])
def test_a_picture_s_bits_are_a_strip_a_table_and_json(difftool, models, of):
    given = ("noise", models / "photo.png", "--likelihood", "-m", models / f"{of}.safetensors")
    ran = difftool(*given, "--steps", 16, "-o", "strip.png", "--json")
    assert ran.code == 0, ran.err
    found = ran.object["likelihood"]
    assert found["of"] == of
    assert found["dimensions"] == (16 * 16 * 3 if of == "pixels" else 8 * 8 * 4)
    for which, prefix in (("bound", ""), ("flow", "flow_")):
        levels = sum(row[f"{prefix}bits"] for row in ran.object["levels"])
        sums = levels + found[which]["prior"] + found[which]["data"]
        assert found[which]["bits"] == pytest.approx(sums)
    assert "variational bound" in ran.err and "probability-flow ODE" in ran.err
    assert "bound less ODE" in ran.err
    assert ("as a density" in ran.err) == (of == "latents")
    assert "dequantised" in ran.err or of == "latents"
    with Image.open("strip.png") as strip:
        assert strip.width > 500
    again = difftool(*given, "--steps", 16, "-o", "bits.csv", "--json").object["likelihood"]
    assert again == found
    assert "flow_bits_error" in Path("bits.csv").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--path cosine", "exclude each other"),
        ("--schedule karras", "exclude each other"),
        ("--reverse", "exclude each other"),
        ("--prompt fox", "reads no prompt"),
        ("--label 1", "no class"),
    ],
)
def test_what_makes_no_sense_is_refused(difftool, models, words, said):
    model = models / "pixels.safetensors"
    given = () if "--path" in words else ("-m", model)
    ran = difftool("noise", models / "photo.png", "--likelihood", *given, *words.split())
    assert ran.code == 2 and said in ran.err


def test_numbers_that_give_out_are_told(difftool, models):
    broken = tiny.model(tiny.preset(sample={"size": [16, 16]}))
    next(broken.denoiser.network.parameters()).data.fill_(float("nan"))
    broken.save(Path("broken.safetensors"))
    ran = difftool("noise", models / "photo.png", "--likelihood", "-m", "broken.safetensors")
    assert ran.code == 5 and "not finite" in ran.err


def test_training_measures_it_of_held_out_pictures(tmp_path):
    data = solid(tmp_path / "data", ((9 * i, 200, 240 - i) for i in range(24)))
    values = {
        "unet": tiny.UNET | {"depth": [0, 0]},
        "train": tiny.TRAIN | {"flip": False, "steps": 2, "validation": 16},
        "sample": {"steps": 2},
    }
    options: dict[str, Any] = {"preset": "pixel-small", "likelihood": True}
    options["evaluations"] = {"unet": Evaluation(1, pictures=0, samples=16)}
    run = start_run(tmp_path / "run", data, values, resume=False, **options)
    for _ in run.steps():
        pass
    run.finish()
    metrics = Metrics.read(run.folder.metrics)
    lines = metrics.of("bits")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["bits"]["of"] == "pixels"
        assert 0 < line["bits"]["mean"] < 40 and 0 < line["bits"]["error"]
    assert "bits a dimension of pixels" in (tmp_path / "run/report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "said"), [("--validation 0", "nothing to measure"), ("--part vae", "the U-Net's")]
)
def test_training_refuses_what_has_no_likelihood(difftool, words, said):
    solid(Path("data"), ((9 * i, 200, 240 - i) for i in range(8)))
    preset = ("--preset", "vae-small") if "vae" in words else ()
    ran = difftool("train", "data", "--likelihood", "--dry-run", *words.split(), *preset)
    assert ran.code == 2 and said in ran.err
