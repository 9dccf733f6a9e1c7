"""What makes training fast changes nothing that is learned: threads, checkpointing, processes,
precision's detours; and no step waits for the device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import wait_for
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from difftool.cli.train import STOPPING
from difftool.config.networks import UNetConfig
from difftool.data import open_dataset
from difftool.engine import cpu
from difftool.engine.cpu import CpuGroupNorm, CpuLinear, CpuUpsample, adapt, attend
from difftool.networks.unet import UNet
from difftool.pipeline.model import Model
from difftool.training.step import loop
from difftool.training.step.loop import Trainer
from difftool.training.step.state import restore_state, save_state

TINY = {"unet": tiny.UNET, "train": tiny.TRAIN | {"steps": 6, "flip": True}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speed") / "photos"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (16, 16), (30 * i, 100, 200 - 20 * i)).save(folder / f"{i}.png")
    return folder


def trainer(pictures: Path, train: dict | None = None, **options) -> Trainer:
    preset = tiny.small("pixel-small", TINY, {"train": train or {}})
    return Trainer(Model.fresh(preset, seed=0), open_dataset(str(pictures)), **options)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    tensors = {f"live.{name}": p for name, p in trainer.learning.items()}
    for rule, track in trainer.ema.tracks.items() if trainer.ema else ():
        tensors |= {f"ema.{rule}.{name}": value for name, value in track.items()}
    for name, p in trainer.learning.items():
        tensors |= {f"{name}.{k}": v for k, v in trainer.optimizer.state[p].items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def saved(trainer: Trainer, at: int, folder: Path) -> Path:
    """The checkpoint of a run that is stopped after step `at`."""
    next(step for step in trainer.run() if step.step == at)
    return save_state(trainer, folder, keep=1)


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(pictures, tmp_path, workers):
    plain, threaded = trainer(pictures), trainer(pictures, workers=workers)
    losses = [[step.loss for step in t.run()] for t in (plain, threaded)]
    assert losses[0] == losses[1]
    assert differences(state(plain), state(threaded)) == []

    stopped = trainer(pictures, workers=workers)
    resumed = trainer(pictures, workers=2)
    restore_state(resumed, saved(stopped, 3, tmp_path))
    assert [step.step for step in resumed.run()] == [4, 5, 6]
    assert differences(state(plain), state(resumed)) == []


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "muon"},
        {"ema_profile": "power"},
        {"optimizer": "muon", "ema_profile": "power", "accumulate": 2, "checkpointing": True},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_run_that_never_stopped(pictures, tmp_path, train, precision):
    train = {**train, "precision": precision}
    whole, stopped = trainer(pictures, train), trainer(pictures, train)
    for _ in whole.run():
        pass
    resumed = trainer(pictures, train)
    restore_state(resumed, saved(stopped, 4, tmp_path))
    for _ in resumed.run():
        pass
    assert differences(state(whole), state(resumed)) == []


def unet(**values) -> UNet:
    config = UNetConfig(
        in_channels=3, out_channels=3, channels=(8, 16), groups=4, blocks=1, head_dim=4,
        **{"depth": (1, 1), "attention": "transformer", "context_dim": 6, **values},
    )  # fmt: skip
    network = UNet(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.2, generator=generator)
    return network


def test_checkpointing_gives_the_same_gradients_and_keeps_less():
    network = unet(dropout=0.1).train()
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 6)

    def measure() -> tuple[list[Tensor], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        network.zero_grad()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(x, t, context=context).square().mean()
        loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None], kept

    plain, many = measure()
    network.checkpoint()
    again, few = measure()
    assert len(plain) == len(list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few < many / 2
    network.checkpoint(False)
    assert measure()[1] == many


@pytest.mark.parametrize("sides", [(4, 4), (3, 5)])
def test_doubled_pixels_are_convolved_as_they_were(sides):
    module = CpuUpsample(6)
    x = torch.randn(2, 6, *sides, requires_grad=True)
    size = [2 * side for side in sides]
    weights = torch.randn(2, 6, *size)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * weights).sum(), (x, *module.parameters())))

    fast, plain = module(x, None, size), module.conv(F.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(fast), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(module(x, None, size), plain)
    odd = [2 * sides[0] - 1, 2 * sides[1]]
    assert module(x, None, odd).shape[2:] == torch.Size(odd)


class Convolutions(TorchFunctionMode):
    """Which convolutions are called."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __enter__(self) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().__enter__()
        return self.calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("conv"):
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_network_keeps_its_weights_and_names_with_layers_of_the_cpu():
    config = UNetConfig(
        in_channels=3, out_channels=3, channels=(8, 8), depth=(1, 1), groups=4, head_dim=4
    )
    network = UNet(config)
    network.init_weights(torch.Generator().manual_seed(0))
    before = network.state_dict()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        plain = network(x, t)
        adapt(network)
        assert torch.equal(network(x, t), plain)
    assert {type(module) for module in network.modules()} & set(cpu.FASTER) == set()
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(
        before[name] is not None and torch.equal(before[name], after[name]) for name in after
    )


@pytest.mark.parametrize("bias", [True, False])
def test_tokens_are_multiplied_the_same_as_pictures(monkeypatch, bias):
    monkeypatch.setattr(cpu, "multiplies_slowly", lambda: True)
    module = CpuLinear(6, 4, bias=bias)
    x = torch.randn(3, 8, 6, requires_grad=True)
    weights = torch.randn(3, 8, 4)
    with Convolutions() as calls:
        fast = module(x)
    plain = F.linear(x, module.weight, module.bias)
    assert calls == ["conv2d"]
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-6)
    inputs = (x, *module.parameters())
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (fast, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for other in (x[:, :7], x[0], x[:, :2, :].bfloat16().float()[:1]):
        torch.testing.assert_close(module(other), F.linear(other, module.weight, module.bias))


def test_low_precision_on_a_cpu_takes_its_detours_in_fp32():
    norm = CpuGroupNorm(2, 8)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 8, 5, 5)
    low = x.bfloat16()
    wanted = F.group_norm(low.float(), 2, norm.weight, norm.bias, norm.eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(low), wanted)
    assert norm(x).dtype == torch.float32
    half = CpuGroupNorm(2, 8).to(torch.bfloat16)(low)
    assert half.dtype == torch.bfloat16
    q, k, v = torch.randn(3, 2, 2, 7, 4).bfloat16()
    out = attend(q, k, v)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.equal(out, exact.bfloat16())


# --- no waiting ------------------------------------------------------------------------------


class NoFetch(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which on a GPU waits for all that is queued."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", [{}, {"optimizer": "muon", "ema_profile": "power"}])
def test_a_step_asks_the_device_for_nothing(pictures, train):
    made = trainer(pictures, {**train, "accumulate": 2, "weight": "min_snr"})
    batches = {position: made.prefetcher[position] for position in range(2)}
    made.prefetcher = batches  # type: ignore[assignment]
    with NoFetch():
        made.advance()
    assert made.step == 1
    with pytest.raises(AssertionError, match="waits"), NoFetch():
        float(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("train", [{}, {"optimizer": "muon", "ema_profile": "power"}])
def test_a_step_on_a_gpu_waits_for_nothing(pictures, train):
    preset = tiny.small("pixel-small", TINY, {"train": train})
    model = Model.fresh(preset, seed=0, device="cuda")
    made = Trainer(model, open_dataset(str(pictures)))
    made.advance()  # lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            made.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        made.prefetcher.close()


# --- the compiler ----------------------------------------------------------------------------


def test_a_missing_compiler_is_told_in_a_line(monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler was found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    assert loop.compiler_problem(torch.device("cpu")) == "no C++ compiler was found"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_network_learns_the_same_under_the_same_names(pictures):
    if problem := loop.compiler_problem(torch.device("cpu")):
        pytest.skip(problem)
    plain, compiled = (
        trainer(pictures, {"precision": "fp32", "steps": 2}, compiled=on) for on in (False, True)
    )
    for made in (plain, compiled):
        for _ in made.run():
            pass
    ours, theirs = state(plain), state(compiled)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-4, rtol=1e-3, msg=name)
    assert compiled.model.tensors().keys() == plain.model.tensors().keys()


# --- several processes -----------------------------------------------------------------------

ARGUMENTS = [
    "--set", "unet.channels=[8,8]", "--set", "unet.groups=4", "--set", "unet.head_dim=4",
    "--set", "unet.blocks=1", "--set", "sample.steps=2", "--set", "train.warmup=0",
    "--batch-size", "4", "--accumulate", "2", "--size", "16", "--precision", "fp32",
    "--lr", "0.002", "--save-every", "2", "--sample-every", "1000",
]  # fmt: skip


def command(processes: int, *arguments: str) -> list[str]:
    run = ["-m", "difftool", "train", *arguments]
    if processes == 1:
        return [sys.executable, *run]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launch, *run]


def train(processes: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(processes, *arguments), cwd=folder, capture_output=True, text=True, env=environment
    )


def weights(run: Path) -> dict[str, Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return load_file(newest / "model.safetensors")


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_go_on_from_each_other(pictures):
    folder = pictures.parent
    for name, processes, steps in (("one", 1, 5), ("two", 2, 5), ("begun", 2, 2)):
        done = train(processes, folder, "photos", *ARGUMENTS, "--out", name, "--steps", str(steps),
                     "--set", "train.decay=none")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}/model.safetensors\n"
        assert done.stderr.count("run folder") == 1
    resumed = train(1, folder, "photos", "--out", "begun", "--resume", "--steps", "5")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from begun/checkpoints/step-000002" in resumed.stderr
    one = weights(folder / "one")
    moved = farthest(one, trainer(pictures, {"steps": 1}).model.tensors())
    for name in ("two", "begun"):
        assert farthest(one, weights(folder / name)) < 1e-5 < moved
    ours, theirs = (
        json.loads((folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("two", "one")
    )
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for a, b in zip(ours["levels"], theirs["levels"], strict=True):
        assert (a is None and b is None) or a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(pictures):
    done = train(2, pictures.parent, "photos", *ARGUMENTS, "--batch-size", "3", "--out", "odd",
                 "--steps", "2")  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("a batch of 3 does not divide among 2 processes") == 1


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_one_step(pictures):
    folder = pictures.parent
    line = command(2, "photos", *ARGUMENTS, "--out", "stopped", "--steps", "100000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(folder / "stopped/metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, talk = process.communicate(timeout=60)
    assert talk.count("stopped after step") == talk.count(STOPPING) == 1
    assert "--resume" in talk
    newest = sorted((folder / "stopped/checkpoints").iterdir())[-1]
    step = json.loads((newest / "state.json").read_text(encoding="utf-8"))["step"]
    assert f"stopped after step {step}," in talk
