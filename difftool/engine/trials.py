"""Which way to convolve is the fastest on this machine: a short trial of each, kept for later."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from difftool.engine.convolutions import KINDS, Case, Kind
from difftool.errors import DifftoolError, InputError
from difftool.storage.commit import write_whole
from difftool.storage.places import user_cache
from difftool.storage.strict_json import read_json

ROWS, PIXELS = 64, 64 * 64
"""At most of what is tried: of a larger picture each way takes as much longer."""
TIMES, ENOUGH = 3, 0.1
"""Tries of a kind, and the seconds after which there are no more."""
HOPELESS = 1.5
"""A kind that took so much longer than the best is not tried again."""
FREE, WORTH = 16 << 20, 0.75e-9
"""Bytes by which what is made of a layer's weights may be larger than these; and the seconds that
each byte beyond must save."""


def kept() -> Path:
    """Where choices are kept for the next process on this machine, with this torch and as many
    threads."""
    machine = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-{os.cpu_count()}"
    name = f"layers-{machine}-{torch.__version__}-{torch.get_num_threads()}.json"
    return user_cache() / "difftool" / name.replace(" ", "-")


def chosen(case: Case) -> str:
    """The kind for a case: as it was found before on this machine, or by a trial."""
    batch, inside, height, width = case.x
    rows = min(height, ROWS)
    tried = torch.Size((batch, inside, rows, min(width, PIXELS // rows)))
    return _chosen(case._replace(x=tried), kept())


@cache
def _chosen(case: Case, path: Path) -> str:
    key, found = " ".join(map(str, (*case.x, "by", *case.weight, *case[2:]))), _found(path)
    if (name := found.get(key)) in KINDS and KINDS[name].fits(case):
        return name
    name = found[key] = _fastest(case)
    with suppress(DifftoolError, OSError):  # then it is tried again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(_read(path) | found, indent=1), overwrite=True)
    return name


@cache
def _found(path: Path) -> dict[str, str]:
    return _read(path)


def _read(path: Path) -> dict[str, str]:
    with suppress(InputError):
        return read_json(path)
    return {}


def _fastest(case: Case) -> str:
    """The kind of the least seconds, those counted in that its memory must save."""
    shapes = case.x, case.weight, case.weight[:1]
    x, weight, bias = (torch.full(shape, 0.5) for shape in shapes)
    x, best, fastest = x.contiguous(memory_format=case.form), float("inf"), "plain"
    for name, kind in KINDS.items():
        held = max((kind.size - 1) * weight.nbytes - FREE, 0) * WORTH
        if held < best and kind.fits(case):
            seconds = held + _seconds(kind, (x, weight, bias), case, HOPELESS * best - held)
            if seconds < best:
                best, fastest = seconds, name
    return fastest


def _seconds(kind: Kind, given: tuple[Tensor, Tensor, Tensor], case: Case, limit: float) -> float:
    """The least of some tries, of which the first sets things up, given x, weights and bias; fewer
    where it is beyond the limit."""
    x, weight, bias = given
    made, tries = weight if kind.prepare is None else kind.prepare(weight, case), []
    while len(tries) < TIMES and (len(tries) < 2 or (min(tries) < limit and sum(tries) < ENOUGH)):
        start = time.perf_counter()
        kind.convolve(x, made, bias, case)
        tries.append(time.perf_counter() - start)
    return min(tries)
