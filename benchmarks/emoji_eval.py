"""Does a model draw the emoji it is asked for, in the style it is asked for?

    python benchmarks/emoji.py emoji                                   # the pictures
    python benchmarks/emoji_eval.py --data emoji --check               # the measure itself
    python benchmarks/emoji_eval.py --data emoji --model runs/emoji --sheet sheet.png

1. Reconstruction: PSNR of codec.decode(codec.encode(picture)) on pictures of held-out pairs.
2. Retrieval: among the true pictures of all bases in the style that was asked for, how many are
   nearer to the sample than the one that was asked for? Top-1 and top-5, for held-out pairs, for
   training pairs, and for real pictures that were turned, moved, coloured, blurred and made noisy.
   Pictures of two bases that can hardly be told apart (flags of Norway and Svalbard) count as one.
   Held-out pairs are also scored without those of which another style has the very same picture.
3. Style: the share of samples that a classifier puts in the style that was asked for, or in one in
   which the base looks the same (fluent's flags are one picture in 3d and flat).
4. Seconds a picture, one at a time, at the model's own steps.

Features and styles come from two small networks that are trained once, on the training pictures
only, and kept in --encoder. By the features, two pictures of a base, in one style or in two, are to
be near each other and far from those of other bases (InfoNCE: van den Oord et al. 2018; Chen et al.
2020). The classifier sees patches of 26 pixels, so that it learns no base by heart.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import emoji  # the script beside this one
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftool.images.fit import to_tensor, to_uint8
from difftool.images.sheets import Cell, enlarged, sheet
from difftool.pipeline.decode import decode, encode
from difftool.pipeline.generate import generate
from difftool.pipeline.inputs import SampleInput
from difftool.pipeline.load import load_model
from difftool.pipeline.model import Model
from difftool.pipeline.settings import SamplePlan, plan_sampling, resolve_settings

SIZE = 64
"""Side of the pictures that the encoder sees."""
STYLES = tuple(emoji.STYLES)
STEPS, BATCH, LR = 1200, 192, 3e-3
"""Training of the encoder; each step sees two pictures of so many bases."""
STYLE_STEPS, STYLE_BATCH, STYLE_LR = 3600, 96, 4e-3
"""Training of the classifier of styles."""
TEMPERATURE = 0.1
TWINS = 35.0
"""PSNR in dB from which pictures of two bases count as one."""
LABELS = (
    *("fox", "pizza", "rocket", "red heart"),
    *("grinning face", "penguin", "Christmas tree", "guitar"),
)
PROMPTS = ("a smiling fox", "a red car next to a tree", "a sad banana", "a cat with sunglasses")
"""What the sheet shows: labels in each style, and what no emoji is called."""


# --- true pictures ---------------------------------------------------------------------------


class Real(NamedTuple):
    """The pictures of a data set. A pair stands for one of them, without skin tone if there is."""

    images: Tensor
    """uint8 [N,3,64,64]."""
    rows: list[dict[str, Any]]
    paths: list[Path]
    pairs: dict[tuple[str, str], int]
    """The picture that stands for a (base, style)."""

    def chosen(self, held_out: bool) -> list[tuple[str, str]]:
        """The pairs that are held out, or those that are not."""
        return [pair for pair in self.pairs if emoji.held_out(*pair) == held_out]


def load(data: Path) -> Real:
    """Both halves of what emoji.py laid out."""
    rows, paths = [], []
    for split in ("train", "heldout"):
        found = emoji.read(data / split)
        rows += found
        paths += [data / split / row["file_name"] for row in found]
    images = torch.stack([to_uint8(opened(path, SIZE)) for path in paths])
    pairs: dict[tuple[str, str], int] = {}
    for index in sorted(range(len(rows)), key=lambda i: bool(rows[i]["tone"])):
        pairs.setdefault((rows[index]["base"], rows[index]["style"]), index)
    return Real(images, rows, paths, pairs)


def opened(path: Path, size: int) -> Image.Image:
    """A picture as RGB with sides of `size`."""
    picture = Image.open(path).convert("RGB")
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.LANCZOS)


# --- the encoder -----------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions around which the input is added; the first may shrink."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.skip(x) + self.norms[1](self.second(h)))


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Features(nn.Module):
    """Pictures [B,3,64,64] in [-1, 1] to features [B,128] of length 1: what is on them."""

    def __init__(self) -> None:
        super().__init__()
        # What lies where matters (an arrow's direction), so the last 4x4 places are not averaged.
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4), layer(48, 48), Block(48, 96, 2), Block(96, 192, 2),
            nn.Conv2d(192, 32, 1), nn.Flatten(), nn.Linear(512, 128),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.body(images), dim=1)


class Styles(nn.Module):
    """Pictures [B,3,64,64] in [-1, 1] to style logits [B,4], by what small patches look like."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2), layer(12, 48), layer(48, 64, 2), layer(64, 96),
            nn.Dropout2d(0.1), layer(96, 96, 2),
        )  # fmt: skip
        self.out = nn.Sequential(nn.Dropout(0.3), nn.Linear(192, len(STYLES)))

    def forward(self, images: Tensor) -> Tensor:
        h = self.body(images)
        return self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


class Encoder(nn.Module):
    """Both networks."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.styles = Features(), Styles()


def perturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B,3,S,S] in [-1, 1], each changed in its own way: turned by up to 10 degrees,
    scaled by up to 15 %, moved by up to 8 %, coloured by up to 20 %, blurred, made noisy."""
    count, size = len(images), images.shape[-1]

    def uniform(reach: float, *shape: int) -> Tensor:
        return reach * (2 * torch.rand(count, *shape, generator=generator) - 1)

    turn, scale = uniform(0.175), 1 + uniform(0.15)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    shift = uniform(0.16, 2)
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)  # so that the ground stays white
    ink = ink * (1 + uniform(0.2, 3, 1, 1))
    coarse = torch.rand(count, 1, 1, 1, generator=generator)
    for blur, share in ((2, 0.6), (3, 0.2)):  # 40 % by 2, 20 % by 3
        small = F.interpolate(ink, size=size // blur, mode="bilinear", antialias=True)
        ink = torch.where(coarse < share, F.interpolate(small, size=size, mode="bilinear"), ink)
    noise = torch.randn(images.shape, generator=generator)
    noise = noise * 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    return (1 - ink + noise).clamp(-1, 1)


def softened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B,3,S,S] in [-1, 1], changed as little as a style bears: mirrored, moved
    by up to 2 pixels, coloured by up to 3 %, made a little soft and noisy."""
    count, size = len(images), images.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    images = torch.where(uniform(1, 1, 1) < 0.5, images.flip(3), images)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    ink = (1 - images.roll(shift, (2, 3))) * (0.97 + 0.06 * uniform(3, 1, 1))
    small = F.interpolate(ink, size=size // 2, mode="bilinear", antialias=True)
    ink = ink.lerp(F.interpolate(small, size=size, mode="bilinear"), 0.7 * uniform(1, 1, 1))
    noise = torch.randn(images.shape, generator=generator)
    return (1 - ink + 0.04 * uniform(1, 1, 1) * noise).clamp(-1, 1)


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """InfoNCE of features [B,D] of the same bases: each is to find its partner among all others."""
    both = torch.cat([first, second])
    logits = both @ both.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(both)).roll(len(first)))


def train(real: Real, seed: int = 0) -> Encoder:
    """Both networks from the training pictures; deterministic given the threads."""
    torch.manual_seed(seed)
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pictures: dict[str, list[int]] = collections.defaultdict(list)
    for index, row in enumerate(real.rows):
        if not emoji.held_out(row["base"], row["style"]):
            pictures[row["base"]].append(index)
    every = [index for indices in pictures.values() for index in indices]
    styles = torch.tensor([STYLES.index(row["style"]) for row in real.rows])
    model = Encoder().train()

    def shown() -> Tensor:
        """Loss of the features on a batch."""
        chosen: list[int] = []
        partners: list[int] = []
        for number, base in enumerate(dice.sample(sorted(pictures), BATCH)):
            style = STYLES[number % len(STYLES)]  # many of one style: those are hard to tell apart
            alike = [i for i in pictures[base] if real.rows[i]["style"] == style]
            chosen.append(dice.choice(alike or pictures[base]))
            partners.append(dice.choice([chosen[-1], dice.choice(pictures[base])]))
        images = perturbed(to_tensor(real.images[torch.tensor(chosen + partners)]), generator)
        return contrast(*model.features(images).chunk(2))

    def styled() -> Tensor:
        """Loss of the classifier on a batch."""
        indices = torch.tensor(dice.sample(every, STYLE_BATCH))
        images = softened(to_tensor(real.images[indices]), generator)
        return F.cross_entropy(model.styles(images), styles[indices])

    fit("features", model.features, shown, STEPS, LR)
    fit("styles", model.styles, styled, STYLE_STEPS, STYLE_LR)
    return model.eval()


def fit(name: str, network: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """Train a network by AdamW on the loss of so many batches."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"{name} {step}/{steps}  loss {value.item():.3f}  {seconds:.0f} s", flush=True)


def encoder(cache: Path, real: Real) -> Encoder:
    """The trained encoder, from the cache if it is there."""
    model = Encoder().eval()
    if cache.exists():
        model.load_state_dict(load_file(cache))
        return model
    model = train(real)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), cache)
    return model


# --- measures --------------------------------------------------------------------------------


@torch.no_grad()
def run(network: nn.Module, images: Tensor) -> Tensor:
    """What a network says of images [N,3,64,64] in [-1, 1]."""
    return torch.cat([network(batch) for batch in images.split(256)])


def ranks(queries: Tensor, gallery: Tensor, right: Tensor) -> Tensor:
    """The place [Q] of the best right answer among features [G,D]; right: bool [Q,G]."""
    near = queries @ gallery.T
    best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((near > best) & ~right).sum(1)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """In dB, of pictures [...,C,H,W] in [-1, 1]; equal ones are 100 dB."""
    error = ((first - second) / 2).square().mean((-3, -2, -1))
    return -10 * error.clamp(min=1e-10).log10()


class Judge:
    """An encoder and the true pictures of every pair."""

    def __init__(self, model: Encoder, real: Real):
        self.model, self.real = model, real
        self.pairs = list(real.pairs)
        self.images = real.images[torch.tensor(list(real.pairs.values()))]
        self.features = run(model.features, to_tensor(self.images))
        self.places = {
            style: torch.tensor([i for i, pair in enumerate(self.pairs) if pair[1] == style])
            for style in STYLES
        }

    def true(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """The true pictures of pairs, fp32 [N,3,64,64] in [-1, 1]."""
        return to_tensor(self.real.images[[self.real.pairs[pair] for pair in pairs]])

    def score(self, images: Tensor, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        """How well pictures [N,3,64,64] in [-1, 1] show the pairs that were asked for."""
        return summary(self.ranked(images, pairs), self.styled(images, pairs))

    def styled(self, images: Tensor, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Whether each picture is in the style that was asked for: bool [N]."""
        said = run(self.model.styles, images).argmax(1).tolist()
        return torch.tensor([STYLES[i] in self.same(*p) for i, p in zip(said, pairs, strict=True)])

    def ranked(self, images: Tensor, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """The place [N] of what was asked for among all true pictures in that style."""
        features = run(self.model.features, images)
        places = torch.zeros(len(pairs), dtype=torch.long)
        for style in {style for _, style in pairs}:
            these = [i for i, pair in enumerate(pairs) if pair[1] == style]
            at = self.places[style]
            gallery = to_tensor(self.images[at]).flatten(1)
            wanted = self.true([pairs[i] for i in these])
            twins = torch.stack(
                [psnr(one.reshape(1, 1, 1, -1), gallery[:, None, None]) for one in wanted]
            )
            places[these] = ranks(features[these], self.features[at], twins >= TWINS)
        return places

    def same(self, base: str, style: str) -> list[str]:
        """The styles in which a base looks as it does in one of them, that one included."""
        drawn = [other for other in STYLES if (base, other) in self.real.pairs]
        near = psnr(self.true([(base, other) for other in drawn]), self.true([(base, style)]))
        return [other for other, value in zip(drawn, near, strict=True) if value >= TWINS]

    def across(self, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Of true pictures: is the nearest picture in any other style of the same base?"""
        places = []
        for base, style in pairs:
            others = torch.tensor([i for i, p in enumerate(self.pairs) if p[1] != style])
            bases = [self.pairs[i][0] for i in others.tolist()]
            if base in bases:
                query = self.features[self.pairs.index((base, style))][None]
                # A base is as near as the nearest of its pictures, so rank bases, not pictures.
                best: dict[str, float] = {}
                for other, near in zip(
                    bases, (self.features[others] @ query[0]).tolist(), strict=True
                ):
                    best[other] = max(best.get(other, -1), near)
                places.append(1 + sum(near > best[base] for near in best.values()))
        return summary(torch.tensor(places))


def share(right: Tensor) -> float:
    """Of True, to four digits."""
    return round(float(right.float().mean()), 4)


def summary(places: Tensor, styled: Tensor | None = None) -> dict[str, float]:
    """Number, top-1 and top-5 of places that begin with 1, and the share in the right style."""
    found = {"n": len(places), "top1": share(places <= 1), "top5": share(places <= 5)}
    return found if styled is None else found | {"style": share(styled)}


def check(judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """Scores of real pictures: perturbed, of other pairs than asked for, across styles, noise."""
    generator = torch.Generator().manual_seed(0)
    held, seen = (some(judge.real.chosen(half), count) for half in (True, False))
    result = {}
    for name, pairs in (("held-out", held), ("training", seen)):
        images = perturbed(judge.true(pairs), generator)
        result[f"real, perturbed, {name}"] = judge.score(images, pairs)
        # Arrows may be mirrored there, so only the style counts.
        styled = judge.styled(softened(judge.true(pairs), generator), pairs)
        result[f"real, softened, {name}"] = {"n": len(pairs), "style": share(styled)}
        if name == "held-out":
            wrong = random.Random(0).sample(pairs, len(pairs))
            result["real, perturbed, wrong captions"] = judge.score(images, wrong)
            noise = torch.rand(images.shape, generator=generator) * 2 - 1
            result["noise"] = judge.score(noise, pairs)
    result["real, of the base in another style, held-out"] = judge.across(held)
    return result


def some(pairs: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """At most so many pairs, chosen by chance, the same each time."""
    return random.Random(1).sample(sorted(pairs), min(count, len(pairs)))


# --- the model -------------------------------------------------------------------------------


def draw(plan: SamplePlan, prompts: Sequence[str], batch: int) -> Tensor:
    """A model's pictures [N,3,H,W] in [-1, 1] of prompts, seeds 0, 1, ..."""
    images, start = [], time.perf_counter()
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        items = [SampleInput(prompt, seed=first + i) for i, prompt in enumerate(part)]
        *_, last = generate(plan, items)
        images.append(decode(plan.model, last.x).cpu())
        done = first + len(part)
        speed = done / (time.perf_counter() - start)
        print(f"\r{done} of {len(prompts)}, {speed:.1f}/s", end="", flush=True)
    print()
    return torch.cat(images)


def seconds(plan: SamplePlan, repeats: int = 5) -> float:
    """Median time of one picture, decoding included, after one that does not count."""
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        *_, last = generate(plan, [SampleInput("a smiling fox", seed=seed)])
        decode(plan.model, last.x).cpu()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[1:]), 3)


@torch.no_grad()
def reconstruction(model: Model, real: Real, count: int) -> float:
    """Mean PSNR in dB of pictures of held-out pairs that went through the codec."""
    size = model.preset.sample.size[0]
    paths = [real.paths[real.pairs[pair]] for pair in some(real.chosen(True), count)]
    values = []
    for first in range(0, len(paths), 32):
        part = [to_tensor(to_uint8(opened(path, size))) for path in paths[first : first + 32]]
        images = torch.stack(part).to(model.device)
        values.append(psnr(decode(model, encode(model, images)), images).cpu())
    return round(float(torch.cat(values).mean()), 2)


def evaluate(plan: SamplePlan, judge: Judge, count: int, batch: int) -> dict[str, Any]:
    """The four measures of a model."""
    real, result = judge.real, {}
    for name, half in (("held-out", True), ("training", False)):
        pairs = some(real.chosen(half), count)
        prompts = [real.rows[real.pairs[pair]]["text"][0] for pair in pairs]
        images = draw(plan, prompts, batch)
        if images.shape[-1] != SIZE:
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        places, styled = judge.ranked(images, pairs), judge.styled(images, pairs)
        result[f"samples, {name}"] = summary(places, styled)
        if name == "held-out":
            alone = [i for i, pair in enumerate(pairs) if judge.same(*pair) == [pair[1]]]
            told = summary(places[alone], styled[alone])
            result["samples, held-out, no twin in another style"] = told
    return result


def draw_sheet(plan: SamplePlan, real: Real) -> Image.Image:
    """A column a label, a row a style, held-out pairs with a star; then prompts, by four seeds."""
    bases = {row["label"]: row["base"] for row in real.rows}
    asked = [
        (f"{label}, {style.word} style", seed, emoji.held_out(bases[label], name))
        for name, style in emoji.STYLES.items()
        for seed, label in enumerate(LABELS)
    ]
    asked += [(prompt, seed, False) for prompt in PROMPTS for seed in range(len(STYLES))]
    cells = []
    for prompt, seed, star in asked:
        *_, last = generate(plan, [SampleInput(prompt, seed=seed)])
        picture = enlarged(decode(plan.model, last.x)[0].cpu())
        cells.append(Cell([picture], f"{prompt} *" if star else prompt))
    return sheet(cells, len(LABELS))


def table(scores: dict[str, dict[str, float]]) -> str:
    """The scores as text."""
    lines = [f"{'':45} {'n':>5} {'top-1':>7} {'top-5':>7} {'style':>7}"]
    for name, values in scores.items():
        cells = [values.get(key) for key in ("top1", "top5", "style")]
        texts = ["      -" if value is None else f"{value:7.1%}" for value in cells]
        lines.append(f"{name:45} {values['n']:5.0f} {' '.join(texts)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("emoji"), help="what emoji.py laid out")
    parser.add_argument("--model", help="the model; the bundled one where it is not said")
    parser.add_argument("--check", action="store_true", help="only check the measure itself")
    parser.add_argument("--encoder", type=Path, default=Path("runs/emoji-encoder.safetensors"))
    parser.add_argument("--count", type=int, default=300, help="pairs of each kind, at most")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet into this PNG")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    real = load(options.data)
    judge = Judge(encoder(options.encoder, real), real)
    scores = check(judge, options.count)
    result: dict[str, Any] = {"retrieval": scores}
    if not options.check:
        model = load_model(options.model)
        given = {k: getattr(options, k) for k in ("steps", "guidance", "sampler")}
        settings = resolve_settings(model, given)
        plan = plan_sampling(model, settings)
        scores |= evaluate(plan, judge, options.count, options.batch)
        result |= {
            "model": model.name,
            "settings": {k: getattr(settings, k) for k in ("steps", "guidance", "sampler")},
            "reconstruction_psnr": reconstruction(model, real, options.count),
            "seconds_a_picture": seconds(plan),
            "threads": options.threads,
        }
        if options.sheet:
            draw_sheet(plan, real).save(options.sheet)
    print(table(scores))
    print("\n".join(f"{name}: {value}" for name, value in result.items() if name != "retrieval"))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
