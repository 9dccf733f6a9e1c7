"""How long help takes beside `python -c "import typer, rich.console"`.

    python benchmarks/startup.py [RUNS]

The runs are interleaved, so that a busy machine slows all alike. Targets: 2x for `difftool --help`,
4x for a command's help.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

BASELINE = ["-c", "import typer, rich.console"]
CASES = {
    "difftool --help": (["-m", "difftool", "--help"], 2.0),
    **{
        f"difftool {name} --help": (["-m", "difftool", name, "--help"], 4.0)
        for name in ("train", "sample", "noise", "convert")
    },
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(runs: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("baseline", *CASES)}
    for run in range(runs + 1):
        for name in times:
            took = seconds(BASELINE if name == "baseline" else CASES[name][0])
            if run:  # the first only warms the file cache
                times[name].append(took)
    base = median(times["baseline"])
    print(f"{'import typer, rich.console':<26} {1000 * base:6.0f} ms")
    for name, (_, target) in CASES.items():
        ratio = median(times[name]) / base
        mark = "" if ratio <= target else "  over"
        print(f"{name:<26} {1000 * ratio * base:6.0f} ms  {ratio:4.2f}x of {target:g}x{mark}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
