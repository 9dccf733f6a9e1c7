"""Do GANs, VAEs, flows and diffusion models differ as textbooks say? Measured, at equal size and
equal compute, on Fashion-MNIST and on emoji.

    apt-get install dataset-fashion-mnist
    python benchmarks/emoji.py emoji --size 64 --tones default
    python benchmarks/generative_models.py --out runs/generative-models

Each model of generative_networks.py has about a million parameters and is trained for --minutes of
one core's time, by each of --seeds seeds; two processes of one thread work at a time. What is made
is kept in --out by data set, model, seed and stage (train, sample, bits, judge), so that the same
command goes on where it was stopped. In the end there are table.md, results.json and sheet.png.

Measured of each run, beside pictures that it was not trained on (as many as samples):

1. Fidelity: the Frechet distance, and precision: the share of samples that lie among true pictures.
2. Diversity: recall: the share of true pictures that lie among samples; and coverage: of the modes
   (classes) that true pictures have, the share of which a tenth as many samples are, at least.
3. Stability: the spread of these over seeds. A run is collapsed if its numbers are not finite, or
   if it covers less than half of the modes.
4. Likelihood, in bits per dimension: exact, a bound, or by the probability-flow ODE.
5. Speed of sampling: pictures a second of one core's time, batches of BATCH; and how often the
   network is evaluated for one.

Fashion-MNIST's features are those of the classifier of fashion_mnist.py, which says the modes too.
Emoji's are the first COMPONENTS principal components of difftool's own (`gradients`), in which
GROUPS centres of true pictures (k-means) are the modes: a picture is of the nearest one.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from generative_networks import MODELS, Generative, parameters  # the script beside this one
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difftool.evaluation.features import gradients
from difftool.evaluation.measures import frechet_distance, precision_recall
from difftool.images.fit import to_pixels, to_tensor
from difftool.images.fonts import opened, own_path
from difftool.images.theme import CAPTION, COLORS, INK, MUTED, PAPER, RULE
from difftool.storage.safetensors import load_tensors, save_tensors
from difftool.training.step.ema import Ema, exponential

BATCH = 32
WARM_UP, CLIP, EMA = 0.05, 1.0, 0.999
"""Share of the training in which the learning rate rises, before it falls to zero as a cosine; the
longest gradient; and of the average of the weights, which all are sampled by."""
SIDE = 32
"""Of emoji; that of Fashion-MNIST is 28."""
COMPONENTS, GROUPS, ROUNDS = 64, 50, 20
"""Features and modes of emoji; rounds of k-means."""
LIKELIHOOD = 500
"""Pictures whose bits are counted, at most."""
COVERED, COLLAPSED = 0.1, 0.5
"""What share of a mode's due covers it, and what coverage is too little."""
SHEET_SAMPLES = 5
"""Of each run, on the sheet."""


# --- data ------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Pictures, uint8 [N,C,S,S]: to train on, and to compare with."""

    train: Tensor
    reference: Tensor


Describe = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures, uint8 [N,C,S,S], to features [N,D] and modes [N]."""


def fashion_mnist(options: argparse.Namespace) -> Data:
    """Its training pictures, and some of the test pictures."""
    from datasets import fashion_mnist as read  # the script beside this one

    train, test = (torch.from_numpy(read(s, options.source)[0].copy()) for s in ("train", "test"))
    return Data(train[:, None], shuffled(test[:, None])[: options.count])


def fashion_mnist_judge(options: argparse.Namespace, data: Data) -> Describe:
    """The classifier, trained where that was not done yet."""
    from fashion_mnist import classifier, run  # the script beside this one

    model = classifier(options.out / "fashion-mnist" / "classifier.safetensors", options.source)
    return lambda pictures: run(model, pictures.float() / 255)


def emoji(options: argparse.Namespace) -> Data:
    """Both halves of what emoji.py laid out, divided anew: what is compared with is not seen."""
    from difftool.data import open_dataset

    folders = [options.emoji / split for split in ("train", "heldout")]
    if not all(folder.is_dir() for folder in folders):
        told = f"python benchmarks/emoji.py {options.emoji} --size 64 --tones default"
        raise SystemExit(f"{folders[0]} does not exist: {told}, or say --emoji FOLDER")
    sets = [open_dataset(str(folder)) for folder in folders]
    pictures = shuffled(torch.cat([each.images(range(len(each)), SIDE) for each in sets]))
    if len(pictures) <= 2 * options.count:
        raise SystemExit(f"{options.emoji} has {len(pictures)} pictures: say a smaller --count")
    return Data(pictures[options.count :], pictures[: options.count])


def emoji_judge(options: argparse.Namespace, data: Data) -> Describe:
    """Principal components, and centres of groups, of the pictures to train on."""
    path = options.out / "emoji" / "judge.safetensors"
    if not path.exists():
        found = torch.cat([gradients(some) for some in data.train.split(256)]).double()
        mean = found.mean(0)
        axes = torch.linalg.eigh(torch.cov(found.T))[1][:, -COMPONENTS:]
        centres = k_means((found - mean) @ axes, GROUPS)
        save(path, {"mean": mean, "axes": axes, "centres": centres})
    judge = load_tensors(path)

    def describe(pictures: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.cat([gradients(some) for some in pictures.split(256)]).double()
        features = (found - judge["mean"]) @ judge["axes"]
        return features, torch.cdist(features, judge["centres"]).argmin(1)

    return describe


DATASETS = {"fashion-mnist": (fashion_mnist, fashion_mnist_judge), "emoji": (emoji, emoji_judge)}


def shuffled(pictures: Tensor) -> Tensor:
    """In an order that is always the same."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    return pictures[order]


def k_means(points: Tensor, count: int) -> Tensor:
    """Centres [count,D] of points [N,D] (Lloyd), from points that are drawn."""
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        for k in nearest.unique():
            centres[k] = points[nearest == k].mean(0)
    return centres


# --- what is kept ----------------------------------------------------------------------------


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, overwrite=True)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The facts in a file, made if it is not there; it comes to be as a whole."""
    if not path.exists():
        facts = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def check_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all that is kept is made by; SystemExit if some was made otherwise."""
    now, path = {"minutes": options.minutes, "count": options.count}, options.out / "settings.json"
    before = kept(path, lambda: now) if path.exists() else now
    if before != now:
        raise SystemExit(f"{options.out} was made with {before}, not {now}: say another --out")
    return now


# --- one run ---------------------------------------------------------------------------------


class Run(NamedTuple):
    """A model of a data set and a seed."""

    dataset: str
    model: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where what is made of it lies."""
        return out / self.dataset / f"{self.model}-{self.seed}"


def train(model: Generative, pictures: Tensor, seconds: float) -> dict[str, Any]:
    """Train for so many seconds of processor time; the weights become their average."""
    optimizers = {
        part: torch.optim.Adam(
            model.get_submodule(part).parameters(), rate, betas=model.betas, fused=True
        )
        for part, rate in model.rates.items()
    }
    ema = Ema(dict(model.named_parameters()), {"decay": exponential(EMA)})
    start, steps, finite, last = time.process_time(), 0, True, 0.0
    while finite and (spent := (time.process_time() - start) / seconds) < 1:
        slow = min(1, (spent + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * spent)) / 2
        batch = to_tensor(pictures[torch.randint(len(pictures), (BATCH,))])
        for part, loss in model.losses(batch, spent):
            last = loss.item()
            optimizer = optimizers[part]
            optimizer.zero_grad()
            loss.backward()
            learning = optimizer.param_groups[0]
            learning["lr"] = model.rates[part] * slow
            norm = torch.nn.utils.clip_grad_norm_(learning["params"], CLIP)
            finite = finite and math.isfinite(last) and math.isfinite(norm.item())
            if not finite:
                break
            optimizer.step()
        ema.update()
        steps += 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ema.average[name])
    spent = time.process_time() - start
    facts = {"steps": steps, "pictures": steps * BATCH, "seconds": spent, "loss": last}
    return facts | {"finite": finite, "parameters": parameters(model)}


def sample(model: Generative, count: int) -> tuple[Tensor, dict[str, Any]]:
    """Pictures, uint8, and how fast they were made; what is not finite is grey."""
    start, made = time.process_time(), []
    while len(made) * BATCH < count:
        made.append(model.sample(BATCH))
    seconds = time.process_time() - start
    pictures = torch.cat(made)[:count]
    broken = int((~pictures.isfinite().flatten(1).all(1)).sum())
    speed = len(made) * BATCH / seconds
    facts = {"a_second": speed, "evaluations": model.evaluations, "broken": broken}
    return to_pixels(pictures.nan_to_num(0, 1, -1)), facts


def judge(made: Tensor, reference: Tensor, describe: Describe) -> dict[str, float]:
    """How near pictures are to those of the reference; uint8, [N,C,S,S] and [M,C,S,S]."""
    (features, modes), (true, classes) = describe(made), describe(reference)
    one, other = (each.double().numpy() for each in (features, true))
    precision, recall = precision_recall(one, other)
    return {
        "frechet": frechet_distance(one, other),
        "precision": precision,
        "recall": recall,
        "coverage": coverage(modes, classes),
    }


def coverage(made: Tensor, reference: Tensor) -> float:
    """The share of the reference's modes that are among those of what is made, COVERED times as
    often as they should at least; of modes [N] and [M]."""
    count = int(max(made.max(), reference.max())) + 1
    one, other = (each.bincount(minlength=count).double() / len(each) for each in (made, reference))
    there = other > 0
    return float(((one >= COVERED * other) & (one > 0))[there].float().mean())


def perform(run: Run, options: argparse.Namespace) -> str:
    """All stages of a run that are not done yet, on one thread; a line that says what came out."""
    torch.set_num_threads(1)
    folder, number = run.folder(options.out), list(MODELS).index(run.model)
    data = Data(**load_tensors(options.out / run.dataset / "data.safetensors"))
    reference = to_tensor(data.reference[:LIKELIHOOD])

    def seeded(stage: int) -> None:
        torch.manual_seed((run.seed * len(MODELS) + number) * 4 + stage)

    seeded(0)
    channels, side, _ = data.train.shape[1:]
    model = MODELS[run.model]((channels, side, side))
    weights, pictures = folder / "model.safetensors", folder / "samples.safetensors"

    def trained() -> dict[str, Any]:
        seeded(1)
        facts = train(model, data.train, 60 * options.minutes)
        save(weights, model.state_dict())
        return facts

    def sampled() -> dict[str, Any]:
        seeded(2)
        made, facts = sample(model, options.count)
        save(pictures, {"pictures": made})
        return facts

    def counted() -> dict[str, Any]:
        seeded(3)
        return model.bits(reference)

    def judged() -> dict[str, Any]:
        describe = DATASETS[run.dataset][1](options, data)
        return judge(load_tensors(pictures)["pictures"], data.reference, describe)

    facts = kept(folder / "train.json", trained)
    model.load_state_dict(load_tensors(weights))
    model.eval().requires_grad_(False)
    with torch.no_grad():
        facts |= kept(folder / "sample.json", sampled)
        facts |= kept(folder / "bits.json", counted)
        facts |= kept(folder / "judge.json", judged)
    told = ("steps", "frechet", "precision", "recall", "coverage")
    return f"{run.dataset} {run.model} {run.seed}: " + ", ".join(f"{k} {facts[k]:g}" for k in told)


def facts_of(run: Run, out: Path) -> dict[str, Any]:
    """What was found of a run, and whether it is collapsed."""
    found: dict[str, Any] = {}
    for stage in ("train", "sample", "bits", "judge"):
        found |= json.loads((run.folder(out) / f"{stage}.json").read_text(encoding="utf-8"))
    broken = not found["finite"] or found["broken"] > 0
    return found | {"seed": run.seed, "collapsed": broken or found["coverage"] < COLLAPSED}


# --- table -----------------------------------------------------------------------------------

COLUMNS = {
    "frechet": "Frechet distance", "precision": "precision", "recall": "recall",
    "coverage": "coverage",
}  # fmt: skip
BITS = ("exact", "bound", "ODE")


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def written(values: Iterable[float], least: int = 2) -> str:
    """Mean and deviation, as many places as three digits of the mean take."""
    mean, deviation = spread(values)
    places = max(0, least - max(0, math.floor(math.log10(max(abs(mean), 1e-9)))))
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a table a data set, a row a model."""
    lines = []
    for dataset, found in results["datasets"].items():
        head = ["", *COLUMNS.values(), "collapsed", "bits/dim"]
        head += ["evaluations", "pictures/s", "parameters", "steps"]
        lines += [f"{dataset}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        true = [f"{found['true'][key]:.3g}" for key in COLUMNS]
        lines.append(f"| *true pictures* | {' | '.join(true)} |" + " |" * (len(head) - 5))
        for model, runs in found["models"].items():
            cells = [model, *(written(run[key] for run in runs) for key in COLUMNS)]
            cells.append(f"{sum(run['collapsed'] for run in runs)} of {len(runs)}")
            bits = [f"{k} {written(run[k] for run in runs)}" for k in BITS if k in runs[0]]
            cells.append("<br>".join(bits) or "none")
            cells.append(f"{runs[0]['evaluations']}")
            speed = statistics.median(run["a_second"] for run in runs)
            cells.append(f"{speed:,.{0 if speed >= 100 else 1}f}")
            cells.append(f"{runs[0]['parameters'] / 1e6:.2f} M")
            cells.append(f"{statistics.median(run['steps'] for run in runs):.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


# --- sheet -----------------------------------------------------------------------------------

LEFT, PLOT, PICTURE, GAP = 120, 250, 48, 12
"""Pixels: names, the spread, a picture, and between the seeds."""


class Row(NamedTuple):
    """Of a data set's sheet."""

    name: str
    groups: Sequence[Tensor]
    """Pictures, uint8 [n,C,S,S], of each seed."""
    distances: Sequence[float]
    """Frechet distances of the seeds."""
    color: str


def shown(picture: Tensor) -> Image.Image:
    """A picture, uint8 [C,S,S], PICTURE pixels wide."""
    pixels = picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.BOX)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """That of grids and sheets."""
    return opened(own_path(bold), size)[0]


def draw_sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """A row a model, columns of samples by seed; beside them the Frechet distance of each seed, on
    a logarithmic axis."""
    groups = max(len(row.groups) for row in rows)
    each = max(len(group) for row in rows for group in row.groups)
    wide, pitch = each * (PICTURE + 2) + GAP, PICTURE + 10
    plot, top = LEFT + groups * wide + GAP, 52
    size = (plot + PLOT + 2 * GAP, top + len(rows) * pitch + 44)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 12), title, INK, font(15, True))
    draw.text((plot, 32), "Frechet distance of each seed", CAPTION, font(12))
    for k in range(groups):
        draw.text((LEFT + k * wide, 32), f"seed {k}", CAPTION, font(12))
    place = axis([d for row in rows for d in row.distances], plot, PLOT)
    bottom = top + len(rows) * pitch
    for value in ticks([d for row in rows for d in row.distances]):
        x = place(value)
        draw.line((x, top, x, bottom), RULE)
        draw.text((x, bottom + 6), f"{value:g}", MUTED, font(12), anchor="mt")
    for number, row in enumerate(rows):
        y = top + number * pitch
        draw.text((GAP, y + PICTURE / 2), row.name, INK, font(13), anchor="lm")
        for k, pictures in enumerate(row.groups):
            for i, picture in enumerate(pictures):
                page.paste(shown(picture), (LEFT + k * wide + i * (PICTURE + 2), y))
        for distance in row.distances:
            x, middle = place(distance), y + PICTURE / 2
            draw.ellipse((x - 5, middle - 5, x + 5, middle + 5), row.color, PAPER)
    return page


def axis(values: Sequence[float], left: float, width: float) -> Callable[[float], float]:
    """Where a value is on a logarithmic axis that has all of them, with a margin at both ends."""
    known = [math.log(value) for value in values if value > 0]
    low, high = min(known) - 0.2, max(known) + 0.2
    return lambda value: left + width * (math.log(max(value, 1e-9)) - low) / (high - low)


def ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten that are among the values, or the values' own ends."""
    known = [value for value in values if value > 0]
    low, high = min(known) / 1.2, max(known) * 1.2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high]
    return found if len(found) <= 8 else [v for v in found if math.log10(v).is_integer()]


def stacked(pages: Sequence[Image.Image]) -> Image.Image:
    """Pages below each other."""
    sheet = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), PAPER)
    top = 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    return sheet


def sheet_of(results: Mapping[str, Any], out: Path) -> Image.Image:
    """The contact sheet of all that was measured."""
    pages = []
    for dataset, found in results["datasets"].items():
        data = load_tensors(out / dataset / "data.safetensors")["train"]
        seeds = max(len(runs) for runs in found["models"].values())
        true = shuffled(data[: 100 * seeds])[: SHEET_SAMPLES * seeds].split(SHEET_SAMPLES)
        rows = [Row("true pictures", true, [found["true"]["frechet"]], INK)]
        for number, (model, runs) in enumerate(found["models"].items()):
            folders = [Run(dataset, model, run["seed"]).folder(out) for run in runs]
            made = [load_tensors(f / "samples.safetensors")["pictures"] for f in folders]
            groups = [pictures[:SHEET_SAMPLES] for pictures in made]
            rows.append(Row(model, groups, [run["frechet"] for run in runs], COLORS[number]))
        pages.append(draw_sheet(dataset, rows))
    return stacked(pages)


# --- all -------------------------------------------------------------------------------------


def prepare(dataset: str, options: argparse.Namespace) -> dict[str, float]:
    """Keep a data set's pictures and what judges them; how near true pictures are to others."""
    path = options.out / dataset / "data.safetensors"
    read, judge_of = DATASETS[dataset]
    if not path.exists():
        save(path, read(options)._asdict())
    data = Data(**load_tensors(path))

    def judged() -> dict[str, Any]:
        some = shuffled(data.train)[: options.count]
        return judge(some, data.reference, judge_of(options, data))

    return kept(options.out / dataset / "true.json", judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=5, help="runs of each model")
    parser.add_argument("--minutes", type=float, default=5, help="of one core, to train a model")
    parser.add_argument("--count", type=int, default=1000, help="samples of each run")
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--source", type=Path, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--emoji", type=Path, default=Path("emoji"), help="what emoji.py laid out")
    parser.add_argument("--out", type=Path, default=Path("runs/generative-models"))
    options = parser.parse_args()
    if "fashion-mnist" in options.datasets and options.source is None:
        from datasets import FASHION  # the script beside this one

        options.source = FASHION
    torch.set_num_threads(options.workers)
    settings = check_settings(options)
    true = {dataset: prepare(dataset, options) for dataset in options.datasets}
    kept(options.out / "settings.json", lambda: settings)

    runs = [
        Run(dataset, model, seed)
        for seed in range(options.seeds)
        for dataset in options.datasets
        for model in options.models
    ]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        waiting = [pool.apply_async(perform, (run, options)) for run in runs]
        for number, each in enumerate(waiting, 1):
            print(f"{number} of {len(runs)}: {each.get()}", flush=True)

    def found(dataset: str, model: str) -> list[dict[str, Any]]:
        seeds = range(options.seeds)
        return [facts_of(Run(dataset, model, seed), options.out) for seed in seeds]

    results = {
        **settings,
        "datasets": {
            dataset: {
                "true": true[dataset],
                "models": {m: found(dataset, m) for m in options.models},
            }
            for dataset in options.datasets
        },
    }
    text = table(results)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(text, encoding="utf-8")
    sheet_of(results, options.out).save(options.out / "sheet.png")
    print(text)


if __name__ == "__main__":
    main()
