"""How long help takes beside importing typer and rich, and a first picture beside importing torch.

    python benchmarks/startup.py [RUNS]

Each run is a fresh interpreter; they are interleaved, so that a busy machine slows all alike.
Targets: 2x for `difftool --help`, 4x for a command's help, 4 s more for a picture of the bundled
model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from statistics import median

HELP = ["-c", "import typer, rich.console"]
TORCH = ["-c", "import torch"]
LIMITS = {
    "difftool --help": 2.0,
    **{f"difftool {name} --help": 4.0 for name in ("train", "sample", "noise", "convert")},
}
PICTURE = ["-m", "difftool", "sample", "a smiling fox"]
MORE = 4.0
"""Seconds that a picture may take beyond the import of torch."""


def seconds(arguments: list[str], folder: str) -> float:
    """Wall time of one fresh interpreter."""
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return time.perf_counter() - start


def main(runs: int) -> None:
    cases = {"typer, rich": HELP, **{name: ["-m", *name.split()] for name in LIMITS}}
    cases |= {"torch": TORCH, "picture": PICTURE}
    times: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs + 1):
            for name, arguments in cases.items():
                wall = seconds(arguments, folder)
                if run:  # the first only warms the file cache
                    times[name].append(wall)
    took = {name: median(values) for name, values in times.items()}
    base = took["typer, rich"]
    print(f"{HELP[1]:<30} {1000 * base:6.0f} ms")
    for name, limit in LIMITS.items():
        ratio = took[name] / base
        mark = "" if ratio <= limit else "  over"
        print(f"{name:<30} {1000 * took[name]:6.0f} ms  {ratio:4.2f}x of {limit:g}x{mark}")
    more = took["picture"] - took["torch"]
    mark = "" if more <= MORE else "  over"
    print(f"{TORCH[1]:<30} {took['torch']:6.2f} s")
    print(f"{'difftool sample':<30} {took['picture']:6.2f} s   +{more:.2f} s of {MORE:g} s{mark}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
