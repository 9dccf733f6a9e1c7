"""Several processes that train one model (torchrun): each takes its share of every batch.

All compute the same step; the first alone writes and speaks. Where there is one process, everything
here does nothing. Collectives on CPU tensors go through gloo, on CUDA tensors through nccl.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from difftool.errors import UsageError

T = TypeVar("T")

BUCKET = 25 << 20
"""Bytes of gradients that are summed in one go."""
PATIENCE = timedelta(days=1)
"""How long the others wait for one: the first encodes whole datasets alone."""


def rank() -> int:
    """The number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def join(device: torch.device) -> torch.device:
    """Become one of the processes that torchrun has started, if it has; this process's device."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return device


# --- agreements ------------------------------------------------------------------------------


def local_slice(count: int) -> range:
    """Which of a batch's `count` samples are this process's."""
    if count % size():
        why = f"a batch of {count} does not divide among {size()} processes"
        raise UsageError("cannot train in parallel", why, "give another --batch-size")
    each = count // size()
    return range(rank() * each, (rank() + 1) * each)


def wait() -> None:
    """Go on when all have come here."""
    if size() > 1:
        dist.barrier()


def from_first(function: Callable[[], T]) -> T:
    """What the first process's function returns, called when all have come here."""
    if size() == 1:
        return function()
    wait()
    result = [function() if is_main() else None]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


@contextmanager
def first_before_others() -> Iterator[None]:
    """In the block the first process is done before the others begin: what it writes they read."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def max_over_ranks(number: int) -> int:
    """The largest of all processes' numbers; on the host, so that no device is waited for."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def mean(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors averaged over the processes, fp32."""
    flat = torch.cat([v.float().flatten() for v in values])
    if size() > 1:
        dist.all_reduce(flat)
        flat /= size()
    parts = flat.split([v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


# --- gradients -------------------------------------------------------------------------------


class GradientSum:
    """Sums gradients over the processes while the backward pass is still under way.

    Buckets are sent in one order, the parameters' from the last, as soon as all of a bucket's
    gradients are there; `finish` sends the rest (not every parameter has one) and waits.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.buckets: list[list[Tensor]] = [[]]
        self.active = False
        if size() == 1:
            return
        room = BUCKET
        for p in reversed(list(parameters)):
            if room <= 0:
                self.buckets.append([])
                room = BUCKET
            self.buckets[-1].append(p)
            room -= p.numel() * p.element_size()
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def start(self) -> None:
        """The next backward pass is the step's last."""
        self.active = size() > 1
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[list[Tensor], Tensor, dist.Work | None]] = []

    def finish(self) -> None:
        """Gradients are summed when this returns (on CUDA: for what is queued after it)."""
        if not self.active:
            return
        while len(self.sent) < len(self.buckets):
            self._send()
        self.active = False
        for gradients, flat, work in self.sent:
            if work is not None:
                work.wait()
                parts = flat.split([g.numel() for g in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view(gradient.shape))

    def _arrived(self, number: int, p: Tensor) -> None:
        if not self.active:
            return
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        gradients = [p.grad for p in bucket if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) if gradients else torch.empty(0)
        work = dist.all_reduce(flat, async_op=True) if gradients else None
        self.sent.append((gradients, flat, work))
