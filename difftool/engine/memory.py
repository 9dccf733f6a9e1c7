"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

import torch

GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has for a new process, or the machine, for a CPU; None = it does not say.

    Of a machine what can be had without swapping counts, and no more than its container may use.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(filter(None, (_machine(), _container())), default=None)


def _machine() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(1024 * int(line.split()[1]) for line in file if "MemAvailable" in line)
    except (OSError, ValueError, StopIteration):
        return None


def _container() -> int | None:
    """What the control group may still use; its file cache does not count, which goes if needed."""
    try:
        limit, used = (int((GROUP / f"memory.{n}").read_text("utf-8")) for n in ("max", "current"))
        stat = (GROUP / "memory.stat").read_text("utf-8").split()
        cache = int(stat[stat.index("inactive_file") + 1])
    except (OSError, ValueError):  # there is none, or it says "max"
        return None
    return max(limit - used + cache, 1)
