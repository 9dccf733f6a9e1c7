"""How many kernels a step launches, beside diffusers' for the same work.

Each operation that is not a view or an empty tensor is a kernel on a GPU, and of a small batch the
launches take longer than the sums. What is done once is left out: steps are counted as what one
more of them adds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from pipelines import WORDS, build, reschedule
from torch.utils._python_dispatch import TorchDispatchMode

from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.settings import plan_sampling, resolve_settings

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

STEPS = 5
GRID = [
    ("sd1", "euler"),
    *(
        pytest.param(family, sampler, marks=pytest.mark.slow)
        for family in ("sd1", "sd2-v", "sdxl")
        for sampler in ("euler", "ddim", "dpmpp_2m")
        if (family, sampler) != ("sd1", "euler")
    ),
]
QUIET = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "set_", "resize_"),
}
"""Operations that launch nothing though they are no views."""


class Launches(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in QUIET:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], Any]) -> Counter[str]:
    with Launches() as counter:
        work()
    return counter.counts


def of_a_step(work: Callable[[int], Any]) -> Counter[str]:
    """What one more step launches."""
    fewer, more = (launches(lambda n=n: work(n)) for n in (STEPS, STEPS + 1))
    more.subtract(fewer)
    return more


def told(ours: Counter[str], theirs: Counter[str]) -> str:
    """Where the two differ."""
    names = sorted(ours.keys() | theirs.keys(), key=lambda n: theirs[n] - ours[n])
    return "\n".join(
        f"{n}: {ours[n]}, diffusers {theirs[n]}" for n in names if ours[n] != theirs[n]
    )


@pytest.mark.parametrize(("family", "sampler"), GRID)
def test_a_step_of_sampling_launches_no_more_than_diffusers(tmp_path_factory, family, sampler):
    pipe, model = pair(tmp_path_factory, family)
    reschedule(pipe, sampler)

    def theirs(steps: int) -> None:
        pipe(
            prompt=WORDS, negative_prompt="a dog", num_inference_steps=steps, guidance_scale=3.0,
            width=32, height=48, output_type="latent",
        )  # fmt: skip

    def ours(steps: int) -> None:
        values = {"steps": steps, "size": (32, 48), "guidance": 3.0, "sampler": sampler}
        plan = plan_sampling(model, resolve_settings(model, values, "diffusers"))
        list(generate(plan, [SampleInput(prompt=WORDS, negative="a dog", seed=1)]))

    mine, other = of_a_step(ours), of_a_step(theirs)
    assert other.total() > 100
    assert mine.total() <= other.total(), told(mine, other)


PAIRS: dict[str, Any] = {}


def pair(factory, family: str) -> Any:
    """The same model in diffusers and here."""
    if family not in PAIRS:
        folder = factory.mktemp("launches")
        pipe = build(family, folder)
        pipe.saved_scheduler = pipe.scheduler.config
        PAIRS[family] = pipe, load_model(str(folder / family), device="cpu")
    return PAIRS[family]


@pytest.mark.parametrize("network", ["blocks", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_step_of_training_launches_no_more_than_a_plain_loop(monkeypatch, network):
    monkeypatch.setattr(sys, "path", [str(Path(ROOT) / "benchmarks"), *sys.path])
    speed = import_module("training_speed")
    # Both with the fused optimiser and without an average of the weights, which a loop may choose.
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, fused=True))
    monkeypatch.setattr(import_module("diffusers.training_utils").EMAModel, "step", lambda *_: None)
    # And without the forms that layers take on a CPU, which convolve more and multiply less.
    monkeypatch.setattr("difftool.pipeline.model.adapt", lambda network: None)
    task = speed.Task(network, "fp32", 4, 1, 1)
    pictures = torch.zeros(64, 3, speed.SIZE, speed.SIZE, dtype=torch.uint8)
    steps = [made(task, pictures).step for made in (speed.of_difftool, speed.of_diffusers)]
    trainer = steps[0].__self__
    drawn = [trainer.prefetcher[position] for position in range(2)]  # by the host, ahead of them
    monkeypatch.setattr(trainer, "prefetcher", drawn)
    for step in steps:
        step()  # what is done once
    mine, other = (launches(step) for step in steps)
    assert mine.total() <= other.total(), told(mine, other)
