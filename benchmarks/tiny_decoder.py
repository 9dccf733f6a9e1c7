"""Distil a model's decoder into a tiny one, by which pictures are seen while they are made.

    python benchmarks/emoji.py emoji --size 64 --tones 1        # whose captions are asked for
    python benchmarks/tiny_decoder.py emoji --out presets/emoji/preview.safetensors

What it learns from is what a preview shows: x0 at every step, of pictures that the model makes of
the captions of training pairs, and what the model's own decoder makes of it. Some smooth noise is
put between, so that it is no stranger to latents of other models made from this one. The file has
TAESD's names. In the end the PSNR to the model's own decoder, by step, of pictures of captions that
are held out: of the tiny decoder, and of the linear map that is used without one; and the time that
each takes for a picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import emoji  # the script beside this one
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftool.config.schema import OptimConfig
from difftool.networks.tiny import TinyBlock, TinyDecoder
from difftool.pipeline.decode import decode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import SamplePlan, plan_sampling, resolve_settings
from difftool.sampling.preview import Previewer, colours, linear, probe, smooth
from difftool.storage.safetensors import save_tensors
from difftool.training.step.muon import Muon, fused_adamw

WIDTHS = (40, 32, 20, 8)
"""Channels at each size, from that of the latents to that of the pictures."""
BATCH, LR, WARMUP = 16, 0.01, 50
SMOOTH = 128
"""Fields of smooth noise that are learned from too."""


class Lesson(NamedTuple):
    """Latents x0 [N,c,h,w] and what the model's decoder makes of them [N,3,H,W]."""

    x0: Tensor
    pictures: Tensor


def small(channels: int, factor: int) -> TinyDecoder:
    """An untrained decoder of latents so many times smaller, of one block a size."""
    widths = WIDTHS[: factor.bit_length()]
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
    for number, width in enumerate(widths):
        if number:
            layers.append(nn.Conv2d(widths[number - 1], width, 3, padding=1, bias=False))
        layers.append(TinyBlock(width, width))
    return TinyDecoder([*layers, nn.Conv2d(widths[-1], 3, 3, padding=1)])


@torch.no_grad()
def steps(plan: SamplePlan, captions: list[str], batch: int = 32) -> Iterator[list[Tensor]]:
    """x0 [B,c,h,w] at each step, of pictures of the captions, a batch at a time."""
    for first in range(0, len(captions), batch):
        part = captions[first : first + batch]
        inputs = [SampleInput(prompt=c, seed=first + i) for i, c in enumerate(part)]
        yield [step.x0.float().cpu() for step in generate(plan, inputs)]
        print(f"\r{first + len(part)} of {len(captions)} captions", end="", flush=True)
    print()


def lesson(model: Model, x0: Tensor) -> Lesson:
    """The latents with their pictures."""
    pictures = [decode(model, part.to(model.device)).cpu() for part in x0.split(64)]
    return Lesson(x0, torch.cat(pictures))


def train(decoder: TinyDecoder, given: Lesson, count: int) -> None:
    """So many steps of Muon on the squared error, by a rate that falls to nothing."""
    ends = {id(p) for layer in (decoder.layers[0], decoder.layers[-1]) for p in layer.parameters()}
    hidden = [p for p in decoder.parameters() if p.dim() > 1 and id(p) not in ends]
    others = [p for p in decoder.parameters() if p.dim() == 1 or id(p) in ends]
    optimizer = Muon(hidden, fused_adamw(others, OptimConfig()), lr=LR, weight_decay=0.0)
    generator, start = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(count):
        share = min(1.0, (step + 1) / WARMUP) * (1 - step / count)
        for group in optimizer.param_groups:
            group["lr"] = LR * share
        chosen = torch.randint(len(given.x0), (BATCH,), generator=generator)
        error = F.mse_loss(decoder(given.x0[chosen]), given.pictures[chosen])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step % 50 == 0 or step == count - 1:
            psnr, seconds = 10 * (4 / error).log10(), time.perf_counter() - start
            print(f"\rstep {step} of {count}, {psnr:.1f} dB, {seconds:.0f} s", end="", flush=True)
    print()


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Mean over pictures [B,3,H,W] in [-1, 1], in dB."""
    return (4 / (made - wanted).square().flatten(1).mean(1)).log10().mul(10).mean().item()


def seconds(work: Callable[[Tensor], Tensor], x0: Tensor, repeats: int = 20) -> float:
    """Median time for one picture, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work(x0)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def report(model: Model, decoder: TinyDecoder, seen: list[Lesson]) -> str:
    """How near to the model's own decoder both kinds of preview are, by step, and their times."""
    fitted = partial(linear, *colours(*probe(model)), model.codec.factor)
    ways = {
        "linear map": Previewer(model, fitted).pictures,
        "tiny decoder": Previewer(model, decoder).pictures,
    }
    lines = [f"{'':14}" + "".join(f"{'step ' + str(i + 1):>9}" for i in range(len(seen)))]
    for name, work in ways.items():
        values = [psnr(work(each.x0), each.pictures) for each in seen]
        once = seconds(work, seen[-1].x0[:1])
        cells = "".join(f"{value:9.1f}" for value in values)
        lines.append(f"{name:14}{cells}  dB, {1000 * once:.1f} ms a picture")
    once = seconds(lambda x0: decode(model, x0), seen[-1].x0[:1])
    return "\n".join([*lines, f"{'its own':14}{1000 * once:.1f} ms a picture"])


def latents(plan: SamplePlan, captions: list[str], kept: Path | None) -> Tensor:
    """x0 [N,c,h,w] at all steps of pictures of the captions; made once, where they are kept."""
    if kept and kept.exists():
        return load_file(kept)["x0"]
    x0 = torch.cat([part for made in steps(plan, captions) for part in made])
    if kept:
        save_file({"x0": x0}, kept)
    return x0


def captions(folder: Path, count: int) -> list[str]:
    """So many captions of a folder, of all its rows and kinds."""
    rows = emoji.read(folder)
    chosen = rows[:: max(1, len(rows) // count)][:count]
    return [row["text"][i % len(row["text"])] for i, row in enumerate(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("data", type=Path, help="what emoji.py laid out")
    parser.add_argument("--model", help="the bundled one where it is not said")
    parser.add_argument("--out", type=Path, required=True, help="the file of the tiny decoder")
    parser.add_argument("--captions", type=int, default=128, help="how many pictures are made")
    parser.add_argument("--drawn-in", type=int, default=10, help="steps that each is made in")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--kept", type=Path, help="file of the latents, made if it is not there")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(options.model)
    channels, factor = model.codec.channels, model.codec.factor
    plan = plan_sampling(model, resolve_settings(model, {"steps": options.drawn_in}))
    asked = captions(options.data / "train", options.captions)
    x0 = latents(plan, asked, options.kept)
    x0 = torch.cat([x0, smooth(SMOOTH, channels, x0.shape[-1], seed=1)])
    decoder = small(channels, factor)
    print(f"{sum(p.numel() for p in decoder.parameters())} parameters, {len(x0)} latents")
    train(decoder, lesson(model, x0), options.steps)
    decoder = decoder.eval().requires_grad_(False)
    tensors = {name.removeprefix("layers."): t.half() for name, t in decoder.state_dict().items()}
    save_tensors(options.out, tensors, {"made_for": model.name}, overwrite=True)
    decoder.load_state_dict({f"layers.{name}": t.float() for name, t in tensors.items()})
    held = zip(*steps(plan, captions(options.data / "heldout", 48)), strict=True)
    print(report(model, decoder, [lesson(model, torch.cat(each)) for each in held]))


if __name__ == "__main__":
    main()
