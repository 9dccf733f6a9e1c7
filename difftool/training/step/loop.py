"""The training loop: a generator of TrainStep, so that progress, previews and stops live outside.

A step of the U-Net, of which everything below is detail:

    for part in range(accumulate):
        slots = the next batch_size of the run's samples     # numbers, which seed all chance
        pictures, captions = dataset[order(epoch)[slots]]    # batches.py; threads draw them ahead
        x0 = encode(pictures)                                # or its latent, cached
        t, eps = times(uniform(slots)), normal(slots)        # rng.py
        alpha, sigma = path(t)
        x_t = alpha x0 + sigma eps
        F = unet(x_t, t, captions)                           # in bf16 where the device has it
        loss = weight(t) |F - (p x0 + q eps)|^2              # objectives.py; p, q: the target's
        (mean(loss) / accumulate).backward()                 # gradients add up
    g = clip(gradients, clip_norm)
    weights = weights - lr(step) optimizer(g)                # lr: a warm-up, then a decay
    average = average + (1 - decay) (weights - average)      # ema.py: by which samples are made
    every 10 steps: fetch the sums of what was measured      # the only wait for the device

A run that is stopped and resumed continues bit for bit (state.py). Several processes (parallel.py)
share each batch, and a run comes out the same but for rounding.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difftool.config.schema import OptimConfig, Part, TrainConfig
from difftool.data import Dataset
from difftool.engine.cpu import keep_memory
from difftool.errors import ResourceError, first_line
from difftool.pipeline.model import Model
from difftool.training.step import parallel
from difftool.training.step.batches import Batch, Batches, Conditioning, Prefetcher
from difftool.training.step.distillation import EctObjective, LcmObjective
from difftool.training.step.ema import Ema
from difftool.training.step.frames import buckets_of
from difftool.training.step.objectives import OBJECTIVES, Objective
from difftool.training.step.optim import OPTIMIZERS
from difftool.training.step.record import Record
from difftool.training.step.turbo import TurboObjective

LOG_EVERY = 10


class TrainStep(NamedTuple):
    """What one optimiser step did. What is measured on the device (loss, gradient norm, the terms
    of the loss, the loss by noise level) is the mean since the last report, and None or empty on
    the steps between reports, where it is not fetched."""

    step: int
    lr: float
    loss: float | None
    grad_norm: float | None
    images_per_second: float
    terms: dict[str, float]
    levels: list[float | None]
    """Mean loss in each bin of LEVELS; None where there was no sample."""


class Trainer:
    """Trains one part of a model on a dataset; every choice is in its preset's recipe for it."""

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        part: Part = "unet",
        *,
        workers: int | None = None,
        compiled: bool = False,
    ):
        """workers: threads that prepare batches ahead; None = as many as the device can use.
        compiled: run the U-Net through torch's compiler. Neither changes what is learned."""
        config = model.preset.recipe(part)
        assert config.steps and config.batch_size and config.size
        self.model, self.dataset, self.config = model, dataset, config
        self.part: Part = part
        self.step, self.seed = 0, config.seed
        self.objective = objective = objective_class(part, config)(model, config)
        drop = config.drop if isinstance(config, TrainConfig) else 0.0
        self.batches = Batches(
            dataset=dataset,
            conditioning=Conditioning.of(model, drop),
            seed=self.seed,
            size=config.size,
            flip=bool(config.flip),
            buckets=buckets_of(model.preset, config.size),
            batch_size=config.batch_size,
            device=model.device,
        )
        trained, helpers = objective.trained(), objective.helpers()
        for name, network in model.parts().items():
            network.requires_grad_(name in trained).train(name in trained)
        self.parameters = parameters_of(trained)
        """What the model keeps, by its names in a model file."""
        self.helper_parameters = parameters_of(helpers)
        """What is left behind."""
        self.learning = self.parameters | self.helper_parameters
        for network in (*model.parts().values(), *helpers.values()):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        own = objective.helper_optimizer()
        learning = self.learning if own is None else self.parameters
        self.optimizer = OPTIMIZERS[config.optimizer](learning, config)
        self.optimizers = [(self.optimizer, learning)]
        """And what each of them moves."""
        if own is not None:
            self.optimizers.append((own, self.helper_parameters))
        self.ema = Ema.of(config, self.parameters)
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if _has_bf16(model.device) else "fp32"
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
        self.record = Record(model.device)
        if model.device.type == "cpu":
            keep_memory()
        if isinstance(config, TrainConfig) and config.checkpointing:
            model.network.checkpoint()
        self.compiled = compiled and part == "unet"
        if self.compiled:
            model.network.compile(dynamic=False)
        # What is not a sum over samples every process computes whole.
        self.local = (
            parallel.local_slice(config.batch_size)
            if objective.by_sample
            else range(config.batch_size)
        )
        self.gradients = parallel.GradientSum(self.learning.values())
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if model.device.type == "cuda" else 0
        self.prefetcher = Prefetcher(self._draw, workers, config.steps * config.accumulate)

    # --- one step ----------------------------------------------------------------------------

    def lr(self, step: int) -> float:
        """Learning rate: a linear warm-up, then the decay to zero at the last step."""
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        rest = max(config.steps - config.warmup, 1)  # type: ignore[operator]
        left = min(1.0, max(0.0, 1 - (step - config.warmup) / rest))
        shape = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return config.lr * warm * shape[config.decay]

    def _draw(self, position: int) -> Batch:
        """This process's share of batch number `position` of the run."""
        first = position * (self.config.batch_size or 0) + self.local.start
        pictures = self.objective.needs_pictures()
        return self.batches.draw(first, len(self.local), pictures=pictures)

    def advance(self) -> None:
        """One optimiser step; what it measured stays on the device."""
        config, objective = self.config, self.objective
        if self.model.preset.unet.dropout:  # which draws from the global generator
            torch.manual_seed((self.seed * 1_000_003 + self.step) ^ (parallel.rank() << 48))
        for part in range(config.accumulate):
            batch = self.prefetcher[self.step * config.accumulate + part]
            enabled = self.autocast is not None
            with torch.autocast(self.model.device.type, self.autocast, enabled=enabled):
                output = objective.losses(batch, self.step)
            if part == config.accumulate - 1:  # before it, gradients add up in each process
                self.gradients.start()
            # backward() adds to the gradients, and processes' are added: a mean is made here.
            loss = output.loss.mean() / (config.accumulate * parallel.size())
            self.scaler.scale(loss).backward()  # fp16 loses small gradients; else it does nothing
            self.record.add(output)
        self.gradients.finish()
        norms = []
        for optimizer, parameters in self.optimizers:
            self.scaler.unscale_(optimizer)  # the norm is of the gradients as they are
            bound = config.clip_norm or math.inf  # without clipping it is measured all the same
            norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), bound))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        for optimizer, _ in self.optimizers:
            self.scaler.step(optimizer)  # skipped in fp16 where a gradient is not finite
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.ema:
            self.ema.update()
        objective.stepped()
        self.record.add_norm(norms[0].detach())
        self.step += 1

    def run(self) -> Iterator[TrainStep]:
        """Steps until the last; ResourceError if the loss or a gradient stops being finite."""
        config = self.config
        assert config.steps and config.batch_size
        began, images = time.monotonic(), 0
        try:
            while self.step < config.steps:
                lr = self.lr(self.step)
                self.advance()
                images += config.batch_size * config.accumulate
                step = TrainStep(self.step, lr, None, None, 0.0, {}, [])
                if self.step % LOG_EVERY == 0 or self.step == config.steps:  # which waits
                    step = step._replace(**self._report())
                yield step._replace(images_per_second=images / (time.monotonic() - began))
        finally:
            self.prefetcher.close()

    def _report(self) -> dict[str, Any]:
        self.record.reduce()
        report = self.record.report()
        loss, norm = report["loss"], report["grad_norm"]
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())):
            raise not_finite(self.step, f"loss {loss}, gradient norm {norm}")
        return report

    @contextmanager
    def eager(self) -> Iterator[None]:
        """In the block the U-Net is not compiled: other shapes would be compiled anew."""
        if not self.compiled:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def kept_parts(self) -> list[str]:
        """The parts that the run's files hold: the whole model if the U-Net is trained, else what
        is trained, for another model to adopt."""
        trained = self.objective.trained()
        return list(self.model.parts() if "unet" in trained else trained)


DISTILLATIONS: dict[str, type[Objective]] = {
    "lcm": LcmObjective,
    "turbo": TurboObjective,
    "ect": EctObjective,
}
"""By DistillConfig.method."""


def objective_class(part: Part, recipe: OptimConfig) -> type[Objective]:
    """What a part learns by a recipe."""
    method = recipe.distill.method if isinstance(recipe, TrainConfig) else "none"
    return OBJECTIVES[part] if method == "none" else DISTILLATIONS[method]


def not_finite(step: int, which: str) -> ResourceError:
    """What ends a run whose numbers are lost."""
    what = f"training stopped at step {step}: the numbers are not finite"
    hint = "go on from the last good checkpoint: --resume --allow-change with a lower --lr"
    return ResourceError(what, which, hint)


def compiler_problem(device: torch.device) -> str | None:
    """Why torch's compiler does not work here; None if it does. Compiles a line to know."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:
        return first_line(error)
    return None


def _has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 numbers natively (CPUs: with AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    tests = (getattr(torch.cpu, name, None) for name in names)
    return device.type == "cpu" and any(test() for test in tests if test)


def parameters_of(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of networks by their names in a model file."""
    named = ((prefix, network.named_parameters()) for prefix, network in networks.items())
    return {f"{prefix}.{name}": p for prefix, parameters in named for name, p in parameters}
