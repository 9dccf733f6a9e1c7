"""Work of a run that is no step: when it is done, how much of it, and how it is left."""

from __future__ import annotations

import math
import signal
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from folders import lay, solid
from folders import pictures as named_pictures
from runs import start_run

from difftool.config.schema import Part
from difftool.data import open_dataset
from difftool.errors import Stopped
from difftool.networks.codecs import VaeCodec
from difftool.training.metrics import Metrics
from difftool.training.run.evaluation import FIRST, SHARE, Evaluation, Work, plan_evaluation
from difftool.training.run.validation import count_held_out, hold_out

LATENT = {
    "codec": tiny.VAE | {"latent_channels": 4},
    "unet": tiny.UNET | {"depth": [0, 0], "in_channels": 4, "out_channels": 4},
    "sample": {"steps": 2},
    "train": tiny.TRAIN | {"flip": False, "steps": 4},
    "train_vae": tiny.TRAIN | {"flip": False, "steps": 4},
}


pytestmark = pytest.mark.usefixtures("closed_runs")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    return solid(folder, ((12 * i, 220, 240 - i) for i in range(20)))


def few(part: Part, every: int) -> dict[Part, Evaluation]:
    """Small sheets and measures."""
    return {part: Evaluation(every, pictures=2, samples=8)}


class Seen:
    """Progress that notes each piece of work, and signals at the first of one name."""

    def __init__(self, at: str | None = None):
        self.at, self.pieces = at, []

    @contextmanager
    def __call__(self, name: str, total: int | None):
        def update(done: int) -> None:
            self.pieces.append(name)
            if name == self.at:
                signal.raise_signal(signal.SIGTERM)

        yield type("Display", (), {"update": staticmethod(update)})


LORA = {"unet": {"depth": [0, 1]}, "train": {"lora_rank": 2}}
WORK = [
    ("unet", "measuring held-out pictures", 2, {}),
    ("unet", "drawing samples", 2, LORA),
    ("vae", "measuring latents", 4, {}),
]


@pytest.mark.parametrize(("part", "name", "step", "more"), WORK)
def test_a_signal_within_work_that_is_no_step_is_heeded_at_its_next_piece(
    tmp_path: Path, pictures, part, name, step, more
):
    values = [LATENT, {"parts": [part], "train": {"validation": 5}}, more]
    options = {"part": part, "preset": "vae-small", "evaluations": few(part, step)}
    seen = Seen(name)
    run = start_run(tmp_path / "run", pictures, *values, resume=False, progress=seen, **options)
    with pytest.raises(Stopped, match=f"after step {step}, saved"):
        for _ in run.steps():
            pass
        run.finish()
    assert seen.pieces.count(name) == 1
    run.folder.close()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert not (tmp_path / "run/model.safetensors").exists()
    run = start_run(tmp_path / "run", pictures, *values, resume=True, **options)
    for _ in run.steps():
        pass
    assert run.finish().exists()


def test_a_checkpoint_comes_before_a_sheet(tmp_path: Path, pictures, monkeypatch):
    options = {"preset": "vae-small", "part": "unet", "evaluations": few("unet", 3)}
    run = start_run(
        tmp_path / "run", pictures, LATENT, {"parts": ["unet"]}, resume=False, **options
    )
    kept: list[list[str]] = []
    shown = run.previews.make

    def make(*arguments):
        kept.append(sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()))
        return shown(*arguments)

    monkeypatch.setattr(run.previews, "make", make)
    for _ in run.steps():
        pass
    assert kept == [["step-000003"], ["step-000003", "step-000004"]]


def test_held_out_pictures_are_encoded_once(tmp_path: Path, pictures, monkeypatch):
    encoded = []
    posterior = VaeCodec.posterior
    monkeypatch.setattr(
        VaeCodec, "posterior", lambda self, x: encoded.append(len(x)) or posterior(self, x)
    )
    values = [LATENT, {"parts": ["unet"], "train": {"validation": 5, "steps": 8}}]
    options = {"preset": "vae-small", "part": "unet", "evaluations": few("unet", 2)}
    run = start_run(tmp_path / "run", pictures, *values, resume=False, **options)
    for _ in run.steps():
        pass
    assert len(Metrics.read(run.folder.metrics).validation) == 4
    assert sum(encoded) == 15 + 5


def test_the_first_is_early_and_the_intervals_grow():
    def steps(last: int, seconds: float, **options) -> list[int]:
        evaluation, found = Evaluation(**options), []
        for step in range(1, last + 1):
            shown = found[-1] if found else 0
            if evaluation.is_due(step, last, shown, step * seconds):
                found.append(step)
        return found

    fast, slow = steps(1562, 0.1), steps(1562, 1.2)
    assert fast[0] == FIRST
    assert fast[-1] == slow[-1] == 1562
    assert slow[0] * 1.2 <= 120
    for found in (fast, slow):
        gaps = [b - a for a, b in pairwise(found[:-1])]
        assert gaps == sorted(gaps)
        assert len(found) < 12
    assert steps(20, 0.1) == [20]
    assert steps(3, 70)[0] == 1
    assert steps(6, 0.1, every=4) == [4, 6]
    assert steps(6, 0.1, every=0) == []


@pytest.mark.parametrize("held", [0, 12, 5000])
@pytest.mark.parametrize("steps", [1, 2, 200, 1562, 40_000])
@pytest.mark.parametrize(
    "work",
    [
        Work(step=7e10, picture=1.5e10, sample=7e8),  # pixels
        Work(step=9.6e12, picture=4.4e13, sample=8.2e11),  # Stable Diffusion
    ],
)
def test_what_is_no_step_takes_a_small_share(work, steps, held):
    planned = plan_evaluation(steps, work, "cpu", held=held)
    sheet = planned.pictures * work.picture + (planned.samples * work.sample if held else 0)
    cost = planned.count(steps) * sheet
    assert cost <= max(SHARE * steps * work.step, 1e11)
    assert planned.share == pytest.approx(cost / (cost + steps * work.step), abs=0.02)
    if work.step < 1e12:  # where pictures are cheap there are sheets in any case
        assert planned.pictures


def test_what_is_asked_for_stands():
    costly = Work(step=9.6e12, picture=4.4e13, sample=8.2e11)
    planned = plan_evaluation(2, costly, "cpu", every=1, held=12)
    assert (planned.every, planned.pictures) == (1, 1)
    assert plan_evaluation(2, costly, "cpu", every=0).every == 0
    assert "no sheets" in plan_evaluation(2, costly, "cpu", every=0).words(12)
    none = plan_evaluation(2, costly, "cpu", held=12)
    assert (none.pictures, none.samples) == (0, 0)
    assert "none" in none.words(12)
    assert math.isfinite(none.share)


@pytest.mark.parametrize("wanted", [None, 0, 2, 0.5])
def test_as_many_are_planned_as_will_be_held_out(tmp_path, wanted):
    """Of a set's own validation split no more than a measure looks at."""
    names = [f"train/{i}.png" for i in range(4)] + [f"val/{i}.png" for i in range(260)]
    dataset = open_dataset(lay(tmp_path, named_pictures(*names)))
    held = hold_out(dataset, wanted)[1]
    count = count_held_out(dataset, wanted)
    assert count == (256 if wanted is None else 2 if wanted else 0)
    assert wanted == 0.5 or count == len(held or ())
