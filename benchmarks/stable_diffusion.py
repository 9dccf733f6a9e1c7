"""Loading and converting Stable Diffusion at full size, beside diffusers and beside cp.

    python benchmarks/stable_diffusion.py FOLDER [--families sd15 sdxl] [--repeats 3]

makes models of random weights in FOLDER once (SDXL: 7 GB in fp16, and as much again twice), and
measures each tool in a process of its own, in turn, everything in the file cache:

    load      from the start of Python to the first output of the U-Net, 512x512, in fp32, from the
              same diffusers folder; and the most memory that was held, maps of files included
    convert   a single file to a diffusers folder, verified and not, beside cp alone and cp that
              waits for the disk, as a conversion does; and the most memory beyond the file cache

The best of the repeats is given. diffusers comes with the dev extra.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

DIFFTOOL = """
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.settings import plan_sampling, resolve_settings
model = load_model({path!r}, device="cpu", dtype="fp32")
settings = resolve_settings(model, {{"steps": 1, "size": (512, 512), "guidance": 1.0}})
next(generate(plan_sampling(model, settings), [SampleInput("a fox", seed=1)]))
"""
DIFFUSERS = """
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({path!r}, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe("a fox", height=512, width=512, num_inference_steps=1, guidance_scale=1.0,
     output_type="latent")
"""
MAKE = """
import sys
from pathlib import Path
import difftool
from difftool.config.layers import load_preset
from difftool.formats import open_model
from difftool.conversion.convert import convert
from difftool.pipeline.model import Model
preset, single, whole = sys.argv[1:]
native = Path(single).with_suffix(".difftool")
Model.fresh(load_preset(preset), seed=0).save(native, dtype="fp16", overwrite=True)
for target, kind in ((Path(single), "ldm"), (Path(whole), "diffusers")):
    if not target.exists():
        difftool.convert(native, target, to=kind)
native.unlink()
"""
GB = 1e9


def make(preset: str, folder: Path) -> tuple[Path, Path]:
    """A single file and a diffusers folder of random weights in fp16, made once."""
    single, whole = folder / f"{preset}.safetensors", folder / preset
    if not single.exists() or not whole.exists():
        # in a process of its own: what it holds is not to be in the way of what is measured
        subprocess.run([sys.executable, "-c", MAKE, preset, single, whole], check=True)
    return single, whole


def measured(command: list[str]) -> dict[str, float]:
    """Seconds of a process; the most memory it held (peak), and held of its own (own), in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = own = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            held = dict(re.findall(r"(\w+):\s+(\d+) kB", status.read_text(encoding="utf-8")))
        except (FileNotFoundError, ProcessLookupError):
            break
        peak = max(peak, int(held.get("VmHWM", 0)))
        own = max(own, int(held.get("RssAnon", 0)))
        time.sleep(0.02)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    if process.wait():
        sys.exit(f"{' '.join(command)[:200]}\n{errors}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak * 1024 / GB, "own": own * 1024 / GB}


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(min(run[key] for run in runs), 3) for key in runs[0]}


def warm(path: Path) -> int:
    """Read files into the cache; their bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as data:
            while data.read(1 << 24):
                pass
    return sum(file.stat().st_size for file in files)


def loading(whole: Path, repeats: int) -> dict[str, dict[str, float]]:
    """What each tool takes to the first output of the U-Net."""
    warm(whole)
    scripts = {"difftool": DIFFTOOL, "diffusers": DIFFUSERS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}
    for _ in range(repeats):
        for name, script in scripts.items():
            runs[name].append(measured([sys.executable, "-c", script.format(path=str(whole))]))
    found = {name: best(each) for name, each in runs.items()}
    ratio = {
        key: round(found["difftool"][key] / found["diffusers"][key], 3)
        for key in ("seconds", "peak")
    }
    return found | {"difftool / diffusers": ratio}


def converting(single: Path, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """What a conversion takes, and what a copy."""
    size, target = warm(single), folder / "out"
    tool = [sys.executable, "-m", "difftool", "convert", str(single), str(target), "--quiet"]
    commands = {
        "cp": ["cp", str(single), str(target)],
        "cp, sync": ["sh", "-c", f"cp '{single}' '{target}' && sync '{target}'"],
        "convert --no-verify": [*tool, "--to", "diffusers", "--no-verify"],
        "convert": [*tool, "--to", "diffusers"],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(measured(command))
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    found = {name: best(each) for name, each in runs.items()}
    return {
        name: each | {"GB/s": round(size / GB / each["seconds"], 2)} for name, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for preset in given.families:
        single, whole = make(preset, given.folder)
        result = {
            "family": preset,
            "load": loading(whole, given.repeats),
            "convert": converting(single, given.folder, given.repeats),
        }
        print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
