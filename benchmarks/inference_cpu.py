"""Sampling Stable Diffusion on a CPU, beside diffusers (and OpenVINO, if it is installed).

    python benchmarks/inference_cpu.py FOLDER [--cases unet32 unet64 vae64 sdxl64 whole]
        [--tools diffusers plain quick openvino deepcache tome] [--repeats 5]

makes diffusers folders of random weights in FOLDER once (SD1.5: 2 GB in fp16, SDXL: 7 GB), and
measures in fp32:

    unet32, unet64   a call of SD1.5's U-Net of 2 latents of 32x32 or 64x64
    sdxl64           the same of SDXL's
    vae64            decoding a latent of 64x64, a picture of 512x512
    whole            a command, from the start of Python to the PNG: 512x512, 20 steps, guided

deepcache and tome are quick with `--deepcache 3` and `--tome 0.5`, whose outputs are other ones.
Each tool runs in a process of its own, in turn, as often as there are repeats; in a process a call
is made once untimed (which tries things out, compiles or lays out weights) and then timed. Given
are medians, the ratios to diffusers', the most memory that a process had, and how far outputs are
from those of diffusers, in units of their deviation. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

CASES = {
    "unet32": ("sd15", "unet", 32),
    "unet64": ("sd15", "unet", 64),
    "sdxl64": ("sdxl", "unet", 64),
    "vae64": ("sd15", "vae", 64),
    "whole": ("sd15", "whole", 64),
}
TOOLS = ("diffusers", "plain", "quick", "openvino", "deepcache", "tome")
PERIOD = 3
OPTIONAL = {"deepcache": ("--deepcache", str(PERIOD)), "tome": ("--tome", "0.5")}
"""What is not measured unless it is asked for."""
MAKE = """
import sys
from pathlib import Path
import torch
import difftool
from difftool.config.layers import load_preset
from difftool.pipeline.model import Model
preset, whole = sys.argv[1:]
native = Path(whole).with_suffix(".difftool")
model = Model.fresh(load_preset(preset), seed=0)
generator = torch.Generator().manual_seed(0)
for part in (model.network, model.codec):  # layers that begin at zero would hide all others
    for each in part.parameters():
        if each.dim() > 1:
            each.data.normal_(std=each[0].numel() ** -0.5, generator=generator)
model.save(native, dtype="fp16", overwrite=True)
difftool.convert(native, whole, to="diffusers")
native.unlink()
"""
PIPELINE = """
import sys
import torch
from diffusers import StableDiffusionPipeline
folder, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe("a fox", num_inference_steps=20, guidance_scale=7.5, height=512, width=512).images[0].save(out)
"""


def made(preset: str, folder: Path) -> Path:
    """A diffusers folder of random weights, made once."""
    whole = folder / preset
    if not whole.exists():
        subprocess.run([sys.executable, "-c", MAKE, preset, whole], check=True)
    return whole


# --- in a process of its own ------------------------------------------------------------------


def prepared(tool: str, part: str, side: int, folder: Path):
    """What is timed, which gives a tensor."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if part == "vae":
        latent = noise(1, 4, side, side)
        if tool in ("diffusers", "openvino"):
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

            vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
            vae.forward = lambda x: vae.decode(x, return_dict=False)[0]  # pyright: ignore
            return run_by(tool, vae, (latent,))
        codec: Any = opened(folder, part, tool).codec
        vae = codec.network()
        return lambda: vae.decode(latent)
    sample, times = noise(2, 4, side, side), torch.tensor([500.0, 500.0])
    told = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    context = noise(2, 77, told["cross_attention_dim"])
    wide = told.get("addition_embed_type") == "text_time"
    pooled, sizes = noise(2, 1280), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    if tool in ("diffusers", "openvino"):
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        more = {"text_embeds": pooled, "time_ids": sizes} if wide else None

        class Call(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.unet = unet

            def forward(self, x, t, c):
                return self.unet(x, t, c, added_cond_kwargs=more, return_dict=False)[0]

        return run_by(tool, Call(), (sample, times, context))
    model = opened(folder, part, tool)
    vector = None
    if wide:
        from difftool.networks.layers import sinusoids

        vector = torch.cat([pooled, sinusoids(sizes.flatten(), 256).view(2, -1)], dim=1)

    def called() -> torch.Tensor:
        return model.network(sample, times, context=context, vector=vector)

    return approximated(tool, called, model.network, side) if tool in OPTIONAL else called


def approximated(tool: str, call: Callable[[], torch.Tensor], network: torch.nn.Module, side: int):
    """A call of a network in which tokens join, or three of a network that keeps deep features."""
    from difftool.engine.approximate import DeepFeatures, deep_features_kept, tokens_joined

    kept = DeepFeatures(PERIOD)

    def joined() -> torch.Tensor:
        with tokens_joined(network, 0.5, (side, side), 0):
            return call()

    def one(evaluation: int) -> torch.Tensor:
        with deep_features_kept(network, kept, evaluation):
            return call()

    def period() -> torch.Tensor:
        return [one(evaluation) for evaluation in range(PERIOD)][-1]

    return joined if tool == "tome" else period


def opened(folder: Path, part: str, tool: str):
    """A model of difftool with the weights of that part alone, as `sample` opens it."""
    from difftool.engine.cpu import keep_memory, return_memory
    from difftool.pipeline.load import load_model

    return_memory()
    model = load_model(str(folder), device="cpu", dtype="fp32")
    for prefix, each in model.all_parts().items():
        if prefix != part:
            each.to("meta")
    keep_memory()
    if tool != "plain":
        model.quicken()
    return model


def run_by(tool: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]):
    """diffusers' module by torch, or by OpenVINO."""
    module.eval()
    if tool == "diffusers":
        return lambda: module(*inputs)
    import openvino  # pyright: ignore[reportMissingImports]

    compiled = openvino.compile_model(openvino.convert_model(module, example_input=inputs), "CPU")
    return lambda: torch.from_numpy(compiled([x.numpy() for x in inputs])[0])


@torch.no_grad()
def work(tool: str, case: str, folder: Path, out: Path) -> None:
    """Prints seconds and memory as JSON, and keeps the output."""
    _, part, side = CASES[case]
    start = time.perf_counter()
    call = prepared(tool, part, side, folder)
    output = call()
    first = time.perf_counter() - start
    start = time.perf_counter()
    call()
    torch.save(output, out)
    calls = PERIOD if tool == "deepcache" else 1
    print(json.dumps({"seconds": (time.perf_counter() - start) / calls, "first": first}))


# --- in turn ----------------------------------------------------------------------------------


def measured(tool: str, case: str, folder: Path, scratch: Path) -> dict[str, float]:
    """Seconds, and GB at most, of one process."""
    out = scratch / f"{case}-{tool}.{'png' if case == 'whole' else 'pt'}"
    if case == "whole":
        command = [sys.executable, "-c", PIPELINE, folder, out]
        if tool != "diffusers":
            command = [sys.executable, "-m", "difftool", "sample", "a fox", "-m", folder]
            command += ["--dtype", "fp32", "--device", "cpu", "--size", "512x512", "--steps", "20"]
            command += ["--guidance", "7.5", "-o", out, "--overwrite"]
            command += OPTIONAL.get(tool) or ("--engine", tool)
    else:
        command = [sys.executable, __file__, str(folder), "--work", tool, case, str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    said, peak = process.stdout.read(), peak_of(process)
    if process.returncode:
        raise SystemExit(f"{tool} failed: {' '.join(map(str, command))}")
    seconds = time.perf_counter() - start
    found = {"seconds": seconds} if case == "whole" else json.loads(said.splitlines()[-1])
    return found | {"memory": peak}


def peak_of(process: subprocess.Popen[str]) -> float:
    """GB of the most memory that a process had, which it is waited for."""
    import os

    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024 / 1e9


def difference(case: str, tool: str, scratch: Path) -> str:
    """Of outputs to diffusers', in units of their deviation."""
    if case == "whole":
        return ""
    ours, theirs = (torch.load(scratch / f"{case}-{each}.pt") for each in (tool, "diffusers"))
    return f"{((ours - theirs).abs().max() / theirs.std()).item():.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    usual = [tool for tool in TOOLS if tool not in OPTIONAL]
    if not find_spec("openvino"):
        usual.remove("openvino")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=usual)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        tool, case, out = args.work
        return work(tool, case, args.folder, Path(out))
    args.folder.mkdir(parents=True, exist_ok=True)
    print("| case | tool | seconds | times diffusers | memory | difference |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in args.cases:
        folder = made(CASES[case][0], args.folder)
        tools = [t for t in args.tools if case != "whole" or t != "openvino"]
        runs = [
            [measured(t, case, folder, args.folder) for t in tools] for _ in range(args.repeats)
        ]
        medians = {
            tool: {n: statistics.median(run[i][n] for run in runs) for n in ("seconds", "memory")}
            for i, tool in enumerate(tools)
        }
        for tool, found in medians.items():
            base = medians.get("diffusers", found)
            ratios = [base[name] / found[name] for name in ("seconds", "memory")]
            print(
                f"| {case} | {tool} | {found['seconds']:.2f} | {ratios[0]:.2f}x | "
                f"{found['memory']:.2f} GB ({ratios[1]:.2f}x less) | "
                f"{difference(case, tool, args.folder) if 'diffusers' in tools else ''} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
