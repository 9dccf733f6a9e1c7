"""Images a second of training: difftool, a plain diffusers loop, denoising-diffusion-pytorch.

    python benchmarks/training_speed.py [--repeats 7] [--steps 4] [--batch 32] [--threads 2]

Needs diffusers, and denoising-diffusion-pytorch with einops, ema-pytorch and accelerate (without it
that row is left out). Its torchvision import is stubbed: nothing that is timed uses torchvision.

Networks: "plain", a U-Net of 32x32 pictures with 64, 128, 256 channels, two blocks a level and
attention at 16x16; "blocks", the one of the preset pixel-small, over 2x2 blocks of pixels.
diffusers builds both with difftool's parameters and shapes, tensor by tensor; of
denoising-diffusion-pytorch, whose blocks are its own, the width is taken that comes nearest to as
many multiply-adds.

All see the same uint8 pictures in memory, the same batch, threads and precision, clip the gradient,
use Adam's moments and average the weights. Each has a process of its own; they take turns, a few
steps each, over and over, and medians are compared. Processor time is printed beside wall time: on
a busy machine it is the fairer one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from difftool.config.layers import Layer, preset_layers, resolve
from difftool.config.networks import UNetConfig
from difftool.config.schema import Preset
from difftool.data import open_dataset
from difftool.data.dataset import Dataset
from difftool.pipeline.model import Model
from difftool.training.step.loop import Trainer

COUNT = 2048
SIZE = 32
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {
        "codec": {"kind": "identity"},
        "unet": {
            "in_channels": 3, "out_channels": 3, "channels": [64, 128, 256], "blocks": 2,
            "attention": "plain", "depth": [0, 1, 0], "head_dim": 64,
        },
    },
    "blocks": {},
}  # fmt: skip


class Task(NamedTuple):
    """What is trained, and how."""

    network: str
    precision: str
    batch: int
    threads: int
    steps: int
    """Steps in a turn."""


class Contender(NamedTuple):
    """One way to train."""

    network: nn.Module
    step: Callable[[], None]
    """One optimiser step."""
    shape: tuple[int, ...]
    """Of a network's input, without the batch."""


class Held(Dataset):
    """Pictures in memory."""

    kind = "none"

    def __init__(self, pictures: Tensor):
        self.pictures, self.audit = pictures, open_dataset("shapes").audit

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def fingerprint(self) -> str:
        return "held"

    def draw(self, indices, size, keys) -> Tensor:
        return self.pictures[list(indices)]

    def caption(self, index, key) -> str:
        return ""


def preset_of(task: Task) -> Preset:
    train = {"size": SIZE, "batch_size": task.batch, "steps": 1 << 20, "flip": False}
    values = {**NETWORKS[task.network], "train": {**train, "precision": task.precision}}
    return resolve([*preset_layers("pixel-small"), Layer("benchmark", values)])


def of_difftool(task: Task, pictures: Tensor) -> Contender:
    preset = preset_of(task)
    model = Model.fresh(preset, seed=0)
    network, unet = model.network, preset.unet
    assert isinstance(unet, UNetConfig)
    side = SIZE // preset.codec.factor
    trainer = Trainer(model, Held(pictures))
    return Contender(network, trainer.advance, (unet.in_channels, side, side))


def of_diffusers(task: Task, pictures: Tensor) -> Contender:
    """diffusers' unconditional training example, its data loader left out."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    preset, bf16 = preset_of(task), task.precision == "bf16"
    config, block = preset.unet, preset.codec.factor
    assert isinstance(config, UNetConfig)
    side = SIZE // block
    kinds = ["Attn" if depth else "" for depth in config.depth]  # type: ignore[union-attr]
    network = UNet2DModel(
        sample_size=side,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.channels,
        layers_per_block=config.blocks,  # type: ignore[arg-type]
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=config.head_dim,
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99))
    ema = EMAModel(
        network.parameters(), decay=0.999, model_cls=UNet2DModel, model_config=network.config
    )

    def step() -> None:
        chosen = pictures[torch.randint(len(pictures), (task.batch,))]
        x0 = F.pixel_unshuffle(chosen.float() / 127.5 - 1, block)
        noise = torch.randn_like(x0)
        times = torch.randint(0, 1000, (task.batch,))
        noisy = scheduler.add_noise(x0, noise, times)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(network(noisy, times, return_dict=False)[0].float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        loss.detach().item()  # it logs every step

    return Contender(network, step, (config.in_channels, side, side))


def of_denoising_diffusion(task: Task, pictures: Tensor) -> Contender:
    """The step of denoising-diffusion-pytorch's Trainer, its data loader left out."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    stub: Any = sys.modules["torchvision"]
    stub.transforms = sys.modules["torchvision.transforms"]
    stub.utils = sys.modules["torchvision.utils"]
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # type: ignore[import-not-found]
    from ema_pytorch import EMA  # type: ignore[import-not-found]

    preset, bf16 = preset_of(task), task.precision == "bf16"
    config, block = preset.unet, preset.codec.factor
    assert isinstance(config, UNetConfig)
    side, first = SIZE // block, config.channels[0]
    shape = (config.in_channels, side, side)

    def build(width: int) -> nn.Module:
        return Unet(
            width,
            dim_mults=tuple(wide // first for wide in config.channels),
            channels=config.in_channels,
            full_attn=tuple(bool(depth) for depth in config.depth),  # type: ignore[union-attr]
            flash_attn=True,
        )

    wanted = multiply_adds(Model.fresh(preset, seed=0).network, shape)
    widths = range(first, first * 3 // 2, 4)
    network = build(min(widths, key=lambda w: abs(multiply_adds(build(w), shape) - wanted)))
    diffusion = GaussianDiffusion(network, image_size=side, auto_normalize=False)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-3, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)  # its defaults

    def step() -> None:
        chosen = pictures[torch.randint(len(pictures), (task.batch,))]
        x0 = F.pixel_unshuffle(chosen.float() / 127.5 - 1, block)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = diffusion(x0)
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return Contender(network, step, (config.in_channels, side, side))


CONTENDERS: dict[str, Callable[[Task, Tensor], Contender]] = {
    "difftool": of_difftool,
    "diffusers": of_diffusers,
    "denoising-diffusion-pytorch": of_denoising_diffusion,
}


@torch.no_grad()
def multiply_adds(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of a forward pass of one picture, as the textbook counts them."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape), torch.zeros(1))
    return counter.get_total_flops() // 2


def serve(name: str, task: Task, turns: Connection) -> None:
    """One contender's process: parameters and multiply-adds, then a turn whenever it is asked."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(task.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (COUNT, 3, SIZE, SIZE)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    made = CONTENDERS[name](task, pictures)
    count = sum(p.numel() for p in made.network.parameters())
    turns.send((count, multiply_adds(made.network, made.shape)))
    made.network.train()
    while turns.recv():
        made.step()  # its weights come back into the cache, untimed
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(task.steps):
            made.step()
        spent = time.perf_counter() - wall, time.process_time() - processor
        turns.send([task.steps * task.batch / seconds for seconds in spent])


def compare(task: Task, repeats: int) -> None:
    """Train by turns, and print a line each."""
    names = list(CONTENDERS)
    if not importlib.util.find_spec("denoising_diffusion_pytorch"):
        names.remove("denoising-diffusion-pytorch")
    context, lines, sizes = get_context("spawn"), {}, {}
    for name in names:
        lines[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, task, theirs), daemon=True).start()
        sizes[name] = lines[name].recv()
    speeds: dict[str, list[list[float]]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name in names:
            lines[name].send(True)
            speed = lines[name].recv()
            if repeat:  # the first turn only warms up
                speeds[name].append(speed)
    for line in lines.values():
        line.send(False)
    print(f"\n{task.network}, {task.precision}, batch {task.batch}, {task.threads} threads")
    print(f"{'':<30}{'parameters':>12}{'madd/image':>12}{'img/s':>9}{'img/cpu s':>11}   ratios")
    medians = {
        name: [median(column) for column in zip(*rows, strict=True)]
        for name, rows in speeds.items()
    }
    for name, (wall, processor) in medians.items():
        parameters, madds = sizes[name]
        ours = medians["difftool"]
        print(
            f"{name:<30}{parameters / 1e6:>10.2f} M{madds / 1e9:>10.2f} G{wall:>9.1f}"
            f"{processor:>11.1f}   {ours[0] / wall:.2f} {ours[1] / processor:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--precisions", nargs="*", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    )
    for network in options.networks:
        for precision in options.precisions:
            task = Task(network, precision, options.batch, options.threads, options.steps)
            compare(task, options.repeats)


if __name__ == "__main__":
    main()
