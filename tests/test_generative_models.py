"""The comparison of generative models: networks, measures, what is kept, table and sheet."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # as the scripts see each other
from benchmarks import generative_models, generative_networks
from benchmarks.generative_models import Data, Row, Run

SHAPE = (1, 8, 8)
VALUES = torch.arange(256).double() / 127.5 - 1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- networks --------------------------------------------------------------------------------


def test_all_models_have_as_many_parameters():
    counts = {
        (name, shape): generative_networks.parameters(build(shape))
        for name, build in generative_networks.MODELS.items()
        for shape in (generative_networks.FASHION_MNIST, generative_networks.EMOJI)
    }
    for (_, shape), count in counts.items():
        assert count == pytest.approx(counts["diffusion", shape], rel=0.03)


def test_the_masses_of_a_logistics_bins_are_one():
    for centre, log_scale in ((0.2, -2.0), (-1.0, -6.0), (0.999, 0.0)):
        found = generative_networks.logistic_mass(
            VALUES, torch.tensor(centre).double(), torch.tensor(log_scale).double()
        )
        assert found.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_flow_goes_there_and_back_and_knows_its_determinant():
    flow = generative_networks.Flow(8, SHAPE).double()
    for parameter in flow.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    step = flow.inner[0]
    assert isinstance(step, generative_networks.FlowStep)
    x = torch.randn(2, 8, 2, 2).double()
    y, log_determinant = step(x)
    assert torch.allclose(step.inverse(y), x)
    one = torch.autograd.functional.jacobian(lambda v: step(v)[0], x[:1]).reshape(32, 32)
    assert torch.linalg.slogdet(one)[1].item() == pytest.approx(log_determinant[0].item())


def test_a_flow_begins_with_the_density_of_unit_noise():
    flow = generative_networks.Flow(8, SHAPE)
    flow.ready.fill_(True)
    with torch.no_grad():
        found = flow.log_density(torch.zeros(1, *SHAPE))
    assert found.item() == pytest.approx(-32 * math.log(2 * math.pi), rel=1e-4)


# --- a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gan", "vae", "flow"])
def test_a_model_learns_samples_and_counts_bits(name: str):
    kinds = {"gan": generative_networks.Gan, "vae": generative_networks.Vae}
    model = kinds.get(name, generative_networks.Flow)(8, SHAPE)
    pictures = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8)
    facts = generative_models.train(model, pictures, 0.1)
    assert facts["finite"] and facts["steps"] >= 1 and facts["seconds"] >= 0.1
    with torch.no_grad():
        made, speed = generative_models.sample(model, 40)
        bits = model.bits(pictures[:8].float() / 127.5 - 1)
    assert made.shape == (40, *SHAPE) and made.dtype == torch.uint8
    assert speed["a_second"] > 0 and speed["broken"] == 0
    assert set(bits) == {"gan": set(), "vae": {"bound"}, "flow": {"exact"}}[name]
    assert all(5 < value < 20 for value in bits.values())  # of noise, which takes 8


def test_the_diffusion_model_is_difftools_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generative_networks, "ODE_PICTURES", 1)
    monkeypatch.setattr(generative_networks, "ODE_STEPS", 16)
    model = generative_networks.Diffusion(SHAPE)
    pictures = torch.randint(0, 256, (48, *SHAPE), dtype=torch.uint8)
    assert generative_models.train(model, pictures, 0.05)["finite"]
    model.requires_grad_(False)
    with torch.no_grad():
        assert model.sample(2).shape == (2, *SHAPE)
        bits = model.bits(pictures.float() / 127.5 - 1)
    assert set(bits) == {"bound", "ODE"} and all(map(math.isfinite, bits.values()))


def test_a_run_that_is_not_finite_ends():
    class Broken(generative_networks.Vae):
        def losses(self, x, spent):
            yield "", next(super().losses(x, spent))[1] * math.nan

    pictures = torch.zeros(4, *SHAPE, dtype=torch.uint8)
    facts = generative_models.train(Broken(8, SHAPE), pictures, 60)
    assert not facts["finite"] and facts["seconds"] < 10


# --- measures --------------------------------------------------------------------------------


def test_coverage_counts_the_modes_that_are_not_dropped():
    true = torch.arange(10).repeat(100)
    assert generative_models.coverage(true, true) == 1
    assert generative_models.coverage(torch.tensor([0] * 50), true) == pytest.approx(0.1)
    few = torch.tensor([0] * 983 + [1] * 12 + [2] * 5)
    assert generative_models.coverage(few, true) == pytest.approx(0.2)  # one in 200 is too few


def test_k_means_finds_what_lies_apart():
    places = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = places.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = generative_models.k_means(points, 3)
    assert torch.cdist(places, found).amin(1).max() < 9
    assert torch.cdist(points, found).amin(1).mean() < 5


# --- what is kept and shown ------------------------------------------------------------------


def test_what_is_there_is_not_made_again(tmp_path: Path):
    made: list[int] = []

    def make():
        made.append(1)
        return {"value": 0.5}

    for _ in range(2):
        assert generative_models.kept(tmp_path / "a" / "b.json", make) == {"value": 0.5}
    assert len(made) == 1 and [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_other_settings_are_refused(tmp_path: Path):
    options = argparse.Namespace(out=tmp_path, minutes=5, count=100)
    settings = generative_models.check_settings(options)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert generative_models.check_settings(options) == settings
    options.minutes = 1
    with pytest.raises(SystemExit, match="say another --out"):
        generative_models.check_settings(options)


def results(out: Path) -> dict:
    """What would be measured of two models by two seeds, with the pictures that the sheet shows."""
    pictures = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8)
    generative_models.save(out / "toys" / "data.safetensors", Data(pictures, pictures)._asdict())
    measures = {"frechet": 2.0, "precision": 0.5, "recall": 0.4, "coverage": 0.9}
    models: dict[str, list] = {"gan": [], "diffusion": []}
    for model, runs in models.items():
        for seed in (0, 1):
            folder = Run("toys", model, seed).folder(out)
            generative_models.save(folder / "samples.safetensors", {"pictures": pictures})
            bits = {} if model == "gan" else {"bound": 3.25, "ODE": 3.0 + seed / 10}
            stages = {
                "train": {"finite": True, "steps": 100, "parameters": 1_000_000},
                "sample": {"a_second": 12.34, "evaluations": 1, "broken": 0},
                "bits": bits,
                "judge": measures | {"coverage": 0.9 - seed / 2, "frechet": 20.0 + seed},
            }
            for stage, facts in stages.items():
                generative_models.kept(folder / f"{stage}.json", lambda facts=facts: facts)
            runs.append(generative_models.facts_of(Run("toys", model, seed), out))
    return {"datasets": {"toys": {"true": measures, "models": models}}}


def test_the_table_has_mean_and_spread_of_the_seeds(tmp_path: Path):
    lines = generative_models.table(results(tmp_path)).splitlines()
    assert lines[0] == "toys:" and lines[4].startswith("| *true pictures* | 2 | 0.5 | 0.4 | 0.9 |")
    gan, diffusion = (line.split(" | ") for line in lines[5:7])
    assert gan[0] == "| gan" and gan[1] == "20.5 ± 0.7" and gan[4] == "0.65 ± 0.35"
    assert gan[5:7] == ["1 of 2", "none"]  # the second covers 0.4
    assert diffusion[6] == "bound 3.25 ± 0.00<br>ODE 3.05 ± 0.07"
    assert diffusion[7:] == ["1", "12.3", "1.00 M", "100 |"]
    assert len({line.count("|") for line in lines[2:7]}) == 1


def test_the_sheet_has_a_row_a_model(tmp_path: Path):
    page = generative_models.sheet_of(results(tmp_path), tmp_path)
    pictures = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    row = Row("a", [pictures, pictures], [1.0, 300.0], "#000000")
    low, high = (generative_models.draw_sheet("title", rows).height for rows in ([row], [row] * 3))
    assert high - low == 2 * 58 and page.height == high


def test_ticks_are_few_and_among_the_values():
    for values in ([3.1, 8.0], [0.01, 1e4], [90.0, 101.0]):
        found = generative_models.ticks(values)
        assert len(found) <= 8 and all(min(values) / 1.2 <= v <= max(values) * 1.2 for v in found)
